"""Where a cell ends: for what is typed line by line, and for what comes through a pipe as a whole."""

from __future__ import annotations

import ast
import codeop
from typing import Final

__all__ = ("INDENT", "ends_cell", "is_complete", "next_indent", "split_cells")

#: Beyond this, nobody asks the parser whether a text is complete: it is what the sandbox is for to bear what it holds.
MAX_PARSED_CHARS: Final = 64 * 1024
#: How often a piped cell may turn out to be incomplete at a blank line, before nobody asks any more.
MAX_ASKED: Final = 200
#: Columns of one level of indentation.
INDENT: Final = 4
#: A line that starts with one of these goes on with the statement above it.
_CONTINUES: Final = ("elif", "else", "except", "finally", "case")

_compiler: Final = codeop.CommandCompiler()
_compiler.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT


def is_complete(code: str) -> bool:
    """False while ``code`` needs more lines. Wrong code is complete: the sandbox says what is wrong with it."""
    if len(code) > MAX_PARSED_CHARS:
        return True
    try:
        return _compiler(code, "<cell>", "exec") is not None
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
        return True


def ends_cell(code: str) -> bool:
    """True if Enter at the end of ``code`` runs it: it is complete, and its last line is not inside a block."""
    last = code.rpartition("\n")[2]
    inside = last.strip() and last[:1].isspace()
    return not inside and is_complete(code)


def next_indent(code: str) -> str:
    """The indentation of a new line below ``code``."""
    last = code.rpartition("\n")[2]
    indent = last[: len(last) - len(last.lstrip())]
    return indent + " " * INDENT if last.rstrip().endswith(":") else indent


def split_cells(text: str) -> list[str]:
    """The cells of a piped text: cut at blank lines, where what is above is complete and what is below begins anew.

    What is too long to be asked about, or never comes to an end, is not cut any further.
    """
    cells: list[str] = []
    lines = text.split("\n")
    start = asked = 0
    for at, line in enumerate(lines):
        if line.strip() or at == start or at + 1 == len(lines):
            continue
        below = lines[at + 1]
        if not below.strip() or below[:1].isspace() or _goes_on(below):
            continue
        above = "\n".join(lines[start:at])
        asked += 1
        if len(above) > MAX_PARSED_CHARS or asked > MAX_ASKED:
            break
        if is_complete(above):
            cells.append(above)
            start, asked = at + 1, 0
    cells.append("\n".join(lines[start:]))
    return [cell.strip("\n") for cell in cells if cell.strip()]


def _goes_on(line: str) -> bool:
    return any(line.startswith(word) and not line[len(word) :][:1].isidentifier() for word in _CONTINUES)
