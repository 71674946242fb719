"""A model's reply, taken apart: code to run and a final answer. One pass over the lines; never raises.

The rules, in the order they apply:

1. A leading ``<think>`` block is dropped.
2. A fence is a line that starts with three or more backticks or tildes; the next line of at least as many closes it.
   ``repl``, ``python``, ``py`` and ``python3`` are code. A fence without a tag is code if the reply has no tagged code.
   A fence the reply ends in was cut off: it is code all the same.
3. Outside a fence, a line that starts with ``FINAL_VAR:``, ``FINAL:``, or either as a call, is the final answer. After
   ``FINAL:`` everything to the end of the reply is its text, other people's fences included; only ``repl`` fences are
   still code. The first one counts.
4. Models also put ``FINAL: ...`` inside a fence, alone or as its last line. It is taken from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ("CodeBlock", "FinalAnswer", "Reply", "parse_reply")

_OWN_TAG: Final = "repl"
_CODE_TAGS: Final = frozenset({_OWN_TAG, "python", "py", "python3"})
#: Markdown that models wrap around the marker.
_MARKUP: Final = "*_`"
_LEADING: Final = _MARKUP + "#>- \t"
_THINK_TAGS: Final = (("<think>", "</think>"), ("<thinking>", "</thinking>"))
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'", "\n": ""}


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """Code of one fence. ``closed`` is false if the reply ended inside it."""

    code: str
    closed: bool = True


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """A final answer as written: a ``text``, or the name of a ``variable`` (not yet checked to be one)."""

    kind: Literal["text", "variable"]
    text: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What a reply holds. ``prose`` is what is neither code nor answer."""

    blocks: tuple[CodeBlock, ...]
    final: FinalAnswer | None
    prose: str


@dataclass(slots=True)
class _Fence:
    mark: str
    width: int
    indent: int
    tag: str
    lines: list[str]
    closed: bool = False


def parse_reply(text: str) -> Reply:
    """Take a reply apart. Linear in its length; any text is a reply."""
    lines = [line.removesuffix("\r") for line in _without_thinking(text).split("\n")]
    fences: list[_Fence] = []
    prose: list[str] = []
    answer: list[str] | None = None  # the lines of a FINAL: that claims the rest of the reply
    closer = ""
    final: FinalAnswer | None = None
    fence: _Fence | None = None
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if fence is not None:
            if _closes(line, fence):
                fence.closed = True
                fence = None
            else:
                fence.lines.append(_dedented(line, fence.indent))
            continue
        opened = _opening(line)
        if opened is not None and (answer is None or opened.tag == _OWN_TAG):
            fence = opened
            fences.append(fence)
            continue
        if answer is not None:
            answer.append(line)
            continue
        marker = None if final is not None else _marker(line)
        if marker is None:
            prose.append(line)
        elif marker.called:
            content, used = _call_content(marker.rest, lines[at:])
            at += used
            final = _variable(content) if marker.variable else FinalAnswer("text", _unquoted(content))
        elif marker.variable:
            final = _variable(marker.rest)
        else:
            answer, closer = [marker.rest], marker.closer
    if answer is not None:
        said = "\n".join(answer).strip()
        final = FinalAnswer("text", said.removesuffix(closer).rstrip() if closer else said)
    return _assembled(fences, final, prose)


def _assembled(fences: list[_Fence], final: FinalAnswer | None, prose: list[str]) -> Reply:
    tagged = any(fence.tag in _CODE_TAGS and _has_text(fence.lines) for fence in fences)
    blocks: list[CodeBlock] = []
    for fence in fences:
        is_code = fence.tag in _CODE_TAGS or (not fence.tag and not tagged)
        inner, kept = _final_in_fence(fence.lines, is_code)
        final = final or inner
        if is_code and _has_text(kept):
            blocks.append(CodeBlock("\n".join(kept), fence.closed))
        elif not is_code and inner is None:
            prose.extend(fence.lines)
    return Reply(tuple(blocks), final, "\n".join(prose).strip())


def _without_thinking(text: str) -> str:
    start = text.lstrip()
    for opening, closing in _THINK_TAGS:
        if start.startswith(opening):
            # An unclosed one was cut off while thinking: there is nothing else in the reply.
            return start.partition(closing)[2]
    return text


def _opening(line: str) -> _Fence | None:
    stripped = line.lstrip()
    mark = stripped[:1]
    if mark not in ("`", "~") or not stripped.startswith(mark * 3):
        return None
    info = stripped.lstrip(mark)
    width = len(stripped) - len(info)
    if "`" in info:  # ```code``` within a line
        return None
    words = info.strip().split(None, 1)
    tag = words[0].strip("{}.").lower() if words else ""
    return _Fence(mark, width, len(line) - len(stripped), tag, [])


def _closes(line: str, fence: _Fence) -> bool:
    stripped = line.strip()
    return len(stripped) >= fence.width and not stripped.strip(fence.mark)


def _dedented(line: str, indent: int) -> str:
    """The line without the indentation its fence had (in a list item, say)."""
    return line[indent:] if not line[:indent].strip() else line


def _has_text(lines: list[str]) -> bool:
    return any(line.strip() for line in lines)


@dataclass(frozen=True, slots=True)
class _Marker:
    variable: bool
    called: bool
    rest: str
    closer: str


def _marker(line: str) -> _Marker | None:
    """The final answer's marker at the start of a line, whatever Markdown is around it."""
    start = line.lstrip(_LEADING)
    for word, variable in (("FINAL_VAR", True), ("FINAL_ANSWER", False), ("FINAL ANSWER", False), ("FINAL", False)):
        if not start.startswith(word):
            continue
        rest = start[len(word) :].lstrip(_MARKUP + " \t")
        if rest[:1] not in (":", "("):
            return None
        lead = line[: len(line) - len(start)].strip("#>- \t")
        said = rest[1:]
        closer = lead if lead and not said.lstrip().startswith(lead) else ""
        if not closer and lead:
            said = said.lstrip().removeprefix(lead)
        return _Marker(variable, rest[0] == "(", said.lstrip() if rest[0] == ":" else said, closer)
    return None


def _variable(text: str) -> FinalAnswer:
    first = text.strip().partition("\n")[0]
    return FinalAnswer("variable", first.strip(_MARKUP.replace("_", "") + "\"' \t.,;"))


def _final_in_fence(lines: list[str], is_code: bool) -> tuple[FinalAnswer | None, list[str]]:
    """A ``FINAL:`` that makes up a fence, or ends a code fence; and the lines that are left.

    Only the form with a colon: the call is code. (``FINAL: 42`` would be code too, an annotation without effect.)
    """
    filled = [index for index, line in enumerate(lines) if line.strip()]
    if not filled:
        return None, lines
    for index in (filled[0], filled[-1]):
        if lines[index][:1] != "F":
            continue
        marker = _marker(lines[index])
        if marker is not None and not marker.called:
            if marker.variable:
                return _variable(marker.rest), lines[:index]
            return FinalAnswer("text", "\n".join([marker.rest, *lines[index + 1 :]]).strip()), lines[:index]
        if not is_code:
            break
    return None, lines


def _call_content(first: str, later: list[str]) -> tuple[str, int]:
    """What stands between ``FINAL(`` and its closing bracket, and how many later lines it took."""
    text = "\n".join([first, *later])
    end = _string_end(text)
    if end is None or not text[end:].lstrip().startswith(")"):
        end = _bracket_end(text)
    return text[:end].strip(), text.count("\n", 0, end)


def _quote_at(text: str, at: int) -> str:
    for quote in ('"""', "'''", '"', "'"):
        if text.startswith(quote, at):
            return quote
    return ""


def _string_end(text: str) -> int | None:
    """Where the string literal that ``text`` starts with ends, or None if it starts with none."""
    at = len(text) - len(text.lstrip())
    quote = _quote_at(text, at)
    if not quote:
        return None
    at += len(quote)
    while at < len(text):
        if text[at] == "\\":
            at += 2
        elif text.startswith(quote, at):
            return at + len(quote)
        else:
            at += 1
    return None


def _bracket_end(text: str) -> int:
    depth = 1
    for at, char in enumerate(text):
        if char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                return at
    return len(text)


def _unquoted(text: str) -> str:
    """The content of a string literal, with its usual escapes; other text as it is. Host parsers never see it."""
    quote = _quote_at(text, 0)
    if not quote or len(text) < 2 * len(quote) or _string_end(text) != len(text):
        return text
    body = text[len(quote) : -len(quote)]
    pieces: list[str] = []
    at = 0
    while True:
        slash = body.find("\\", at)
        if slash < 0 or slash + 1 >= len(body):
            pieces.append(body[at:])
            return "".join(pieces)
        pieces.append(body[at:slash])
        pieces.append(_ESCAPES.get(body[slash + 1], body[slash : slash + 2]))
        at = slash + 2
