"""`ConsoleListener`: a run as it happens, for people. Guest and model text reaches a terminal only through `inert`."""

from __future__ import annotations

import sys
import unicodedata
from types import TracebackType
from typing import Final, Self

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.syntax import Syntax
from rich.text import Text

from .orchestrator.events import (
    AnswerRejected,
    BatchFinished,
    BatchStarted,
    CellFinished,
    CellOutput,
    CellStarted,
    Event,
    ModelReplied,
    RunFinished,
    RunStarted,
    StepStarted,
    SubcallFinished,
    SubcallStarted,
)
from .orchestrator.replies import parse_reply
from .results import LimitHit, State

__all__ = ("ConsoleListener", "inert", "limit_words", "one_line", "state_words")

#: Characters of a cell's output that are shown; the trajectory has the rest.
MAX_OUTPUT_CHARS: Final = 8_000
#: Characters of a cell's code that are shown: colouring a megabyte takes a minute.
MAX_CODE_CHARS: Final = 20_000
#: Characters of a model's words around its code, of a traceback, and of an echoed value.
MAX_PROSE_CHARS: Final = 600
MAX_TRACEBACK_CHARS: Final = 3_000
MAX_VALUE_CHARS: Final = 300

_KEPT_CONTROLS: Final = "\n\t"

_STATES: Final = {
    "kept": "state kept: every variable is still there",
    "restored": "state restored: the variables are as they were before this cell",
}
_STOPS: Final = {
    "final": "the model gave its answer",
    "max_steps": "the step budget is used up",
    "max_empty_replies": "the model replied neither with code nor with an answer",
    "max_total_tokens": "the token budget is used up",
    "max_seconds": "the time budget is used up",
    "session_closed": "the session could not go on",
    "adapter_error": "the model could not be asked",
    "interrupted": "interrupted",
    "error": "an error ended the run",
}


def inert(text: str) -> str:
    """``text`` with everything that is not a visible character, a space, a newline or a tab written as an escape.

    So an ANSI or OSC sequence, a carriage return, a NUL, a bidirectional override or a zero-width character is seen
    and does nothing. A guest's text goes to a terminal in no other way.
    """
    if text.isascii() and text.translate({ord(char): None for char in _KEPT_CONTROLS}).isprintable():
        return text
    return "".join(char if _harmless(char) else char.encode("unicode_escape").decode("ascii") for char in text)


def one_line(text: str, limit: int) -> str:
    """The beginning of ``text``, `inert`, on one line of at most ``limit`` characters."""
    line = " ".join(inert(text[: 4 * limit]).split())
    return line if len(line) <= limit and len(text) <= 4 * limit else line[: limit - 3] + "..."


def limit_words(hit: LimitHit) -> str:
    """A limit that was hit, in a sentence."""
    seen = "" if hit.observed is None else f", observed {hit.observed:,.4g}"
    return f"limit hit: {hit.kind} of {hit.limit:,.4g}{seen} (measured by the {hit.source})"


def state_words(state: State, lost_names: tuple[str, ...] = ()) -> str:
    """What became of the session's variables, in a sentence. `inert`: names are a guest's."""
    if state != "lost":
        return _STATES[state]
    names = f" ({one_line(', '.join(lost_names), 200)})" if lost_names else ""
    return f"state lost: the session starts again without its variables{names}"


def _harmless(char: str) -> bool:
    # Zs: no-break and ideographic spaces, which isprintable() does not count. Co: no terminal acts on private use.
    return char.isprintable() or char in _KEPT_CONTROLS or unicodedata.category(char) in ("Zs", "Co")


class ConsoleListener:
    """Shows a run's events on a terminal, or as plain lines where there is none.

    Colours follow ``NO_COLOR``; spinner and progress bar appear only on a terminal. Close it (or use ``with``) so
    that an interrupted run leaves no bar behind.
    """

    def __init__(self, console: Console | None = None, *, max_output_chars: int = MAX_OUTPUT_CHARS) -> None:
        # Bound to the stream of now: where a cell runs in this process, sys.stdout is the guest's while it does.
        self._console = console if console is not None else Console(file=sys.stdout, highlight=False)
        self._max_output = max_output_chars
        self._shown = 0
        self._at_line_start = True
        self._held = ""
        self._spinner: Progress | None = None
        self._progress: Progress | None = None
        self._bars: dict[int, TaskID] = {}
        self._gone = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take spinner and bar away. Idempotent."""
        self._wait_for(None)
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._bars.clear()

    def __call__(self, event: Event) -> None:
        """Show ``event``."""
        if self._gone:
            return
        try:
            self._show(event)
        except (BrokenPipeError, SystemExit):  # the reader (head, less) has gone, which rich takes for the end; the run goes on
            self._gone = True

    def _show(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._run_started(event)
            case StepStarted():
                self._line()
                self._line(f"Step {event.step}", "bold cyan")
                self._wait_for("asking the model")
            case ModelReplied():
                self._model_replied(event)
            case CellStarted():
                self._cell_started(event)
            case CellOutput():
                self._cell_output(event)
            case CellFinished():
                self._cell_finished(event)
            case BatchStarted():
                self._batch_started(event)
            case BatchFinished():
                self._batch_finished(event)
            case SubcallStarted() if event.batch is None:
                self._wait_for(f"llm_query: {one_line(event.prompt, 60)}")
            case SubcallFinished():
                self._subcall_finished(event)
            case AnswerRejected():
                self._line(f"answer not taken: {one_line(event.reason, 300)}", "yellow")
            case RunFinished():
                self._run_finished(event)
            case _:
                pass

    # ---- pieces of the screen

    def _print(self, what: RenderableType) -> None:
        self._end_line()
        self._console.print(what)

    def _line(self, text: str = "", style: str = "") -> None:
        self._end_line()
        self._console.print(Text(self._fit(text), style), soft_wrap=True)

    def _fit(self, text: str) -> str:
        """``text`` with an escape for what the terminal's encoding does not have."""
        return text.encode(self._console.encoding, "backslashreplace").decode(self._console.encoding)

    def _end_line(self) -> None:
        """Finish a line of output that the guest left open."""
        if self._held:
            held, self._held = self._held, ""
            self._console.print(Text(held), soft_wrap=True)
        if not self._at_line_start:
            self._at_line_start = True
            self._console.print()

    def _wait_for(self, what: str | None) -> None:
        """Show a spinner with ``what`` beside it, or take it away."""
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None
        if what is not None and self._console.is_terminal and self._progress is None:
            self._end_line()
            self._spinner = self._live(SpinnerColumn("line"), TextColumn("{task.description}", "dim", markup=False))
            self._spinner.add_task(self._fit(what), total=None)

    def _live(self, *columns: ProgressColumn) -> Progress:
        """A line at the bottom that changes. It leaves ``sys.stdout`` alone, for the reason given above."""
        live = Progress(*columns, console=self._console, transient=True, redirect_stdout=False, redirect_stderr=False)
        live.start()
        return live

    # ---- events

    def _run_started(self, event: RunStarted) -> None:
        documents = "1 document" if event.context_documents == 1 else f"{event.context_documents:,} documents"
        models = event.model if event.model == event.subcall_model else f"{event.model}, sub-calls {event.subcall_model}"
        self._line(inert(event.query), "bold")
        self._line(f"context  {event.context_chars:,} characters, {documents}", "dim")
        self._line(f"model    {one_line(models, 200)}", "dim")
        self._line(f"backend  {event.backend}: {event.isolation}", "dim")

    def _model_replied(self, event: ModelReplied) -> None:
        self._wait_for(None)
        tokens = f"{event.input_tokens:,} tokens in, {event.output_tokens:,} out"
        self._line(f"model replied in {event.seconds:.1f} s ({tokens}){_after(event.retries)}", "dim")
        prose = parse_reply(event.text).prose
        if prose:
            self._line(inert(_cut(prose, MAX_PROSE_CHARS)), "italic")

    def _cell_started(self, event: CellStarted) -> None:
        self._shown = 0
        self._line(f"cell {event.cell}", "bold")
        code = self._fit(inert(_cut(event.code.strip("\n"), MAX_CODE_CHARS)))
        if self._console.is_terminal:
            syntax = Syntax(code, "python", theme="ansi_dark", background_color="default", word_wrap=True)
            self._print(Padding(syntax, (0, 0, 0, 2)))
        else:
            self._line("\n".join(f"  {line}" for line in code.split("\n")))
        self._wait_for("running")

    def _cell_output(self, event: CellOutput) -> None:
        room = self._max_output - self._shown
        if room <= 0 or not event.text:
            return
        self._wait_for(None)
        text = self._fit(inert(event.text[:room]))
        self._shown += len(event.text)
        if self._progress is not None:
            # A live bar owns the last line: only whole lines can go above it.
            text = self._held + text
            whole, newline, self._held = text.rpartition("\n")
            if newline:
                self._console.print(Text(whole), soft_wrap=True)
        else:
            style = "yellow" if event.stream == "stderr" else ""
            self._console.print(Text(text, style), end="", soft_wrap=True)
            self._at_line_start = text.endswith("\n")
        if self._shown >= self._max_output:
            self._line(f"[only the first {self._max_output:,} characters of this cell's output are shown]", "dim")

    def _cell_finished(self, event: CellFinished) -> None:
        self.close()
        if event.value is not None:
            self._line(f"=> {inert(_cut(event.value, MAX_VALUE_CHARS))}", "green")
        if event.dropped_bytes:
            self._line(f"[{event.dropped_bytes:,} bytes of output were over the limit and are dropped]", "dim")
        if event.outcome == "error":
            self._line(_cut_head(inert(event.traceback or event.error or "error").rstrip("\n"), MAX_TRACEBACK_CHARS), "red")
        elif event.outcome == "limit" and event.limit is not None:
            self._line(limit_words(event.limit), "bold yellow")
        elif event.outcome != "ok":
            why = f": {one_line(event.error, 300)}" if event.error else ""
            self._line(f"{event.outcome}{why}", "bold red")
        self._state(event)
        self._line(f"cell {event.cell} {event.outcome} in {event.seconds:.2f} s", "dim")

    def _state(self, event: CellFinished) -> None:
        if event.outcome not in ("ok", "error") or event.state != "kept":
            self._line(state_words(event.state, event.lost_names), "bold red" if event.state == "lost" else "bold green")

    def _batch_started(self, event: BatchStarted) -> None:
        self._wait_for(None)
        if not self._console.is_terminal:
            self._line(f"llm_batch: {event.size:,} sub-calls", "magenta")
            return
        self._end_line()
        if self._progress is None:
            bar = BarColumn()
            self._progress = self._live(TextColumn("{task.description}"), bar, MofNCompleteColumn(), TimeElapsedColumn())
        self._bars[event.batch] = self._progress.add_task("llm_batch", total=event.size)

    def _batch_finished(self, event: BatchFinished) -> None:
        bar = self._bars.pop(event.batch, None)
        if self._progress is not None and bar is not None:
            self._progress.remove_task(bar)
            if not self._bars:
                self.close()
        style = "magenta" if event.ok == event.size else "yellow"
        self._line(f"llm_batch: {event.ok:,} of {event.size:,} answered in {event.seconds:.1f} s", style)

    def _subcall_finished(self, event: SubcallFinished) -> None:
        if event.batch is not None:
            if self._progress is not None and event.batch in self._bars:
                self._progress.advance(self._bars[event.batch])
            if event.error is not None:
                self._line(f"sub-call {event.subcall} failed: {one_line(event.error, 300)}", "yellow")
            return
        self._wait_for(None)
        if event.error is None:
            retried = _after(event.retries)
            self._line(f"llm_query answered in {event.seconds:.1f} s{retried}: {one_line(event.response, 100)}", "magenta")
        else:
            self._line(f"llm_query failed: {one_line(event.error, 300)}{_after(event.retries)}", "yellow")

    def _run_finished(self, event: RunFinished) -> None:
        self.close()
        self._line()
        title = "answer" if event.verified else "best answer so far, not verified"
        if event.answer and self._console.is_terminal:
            border = "green" if event.verified else "yellow"
            self._print(Panel(Text(self._fit(inert(event.answer))), title=title, title_align="left", border_style=border))
        elif event.answer:
            self._line(f"{title}: {inert(event.answer)}")
        if event.stop_reason != "final":
            # Where an exception ended the run, whoever catches it says what it was.
            why = (
                f": {one_line(event.error, 500)}" if event.error and event.stop_reason in ("session_closed", "max_seconds") else ""
            )
            self._line(f"stopped: {_STOPS[event.stop_reason]}{why}", "yellow")
        tokens = f"{event.input_tokens:,} tokens in, {event.output_tokens:,} out"
        self._line(
            f"{event.steps} steps, {event.cells} cells, {event.subcalls:,} sub-calls, {tokens}, {event.seconds:.1f} s", "dim"
        )


def _after(retries: tuple[str, ...]) -> str:
    if not retries:
        return ""
    times = "1 retry" if len(retries) == 1 else f"{len(retries):,} retries"
    return f", after {times} ({one_line(', '.join(dict.fromkeys(retries)), 100)})"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} [... {len(text) - limit:,} more characters]"


def _cut_head(text: str, limit: int) -> str:
    """The end of a traceback says more than its beginning."""
    return text if len(text) <= limit else f"[{len(text) - limit:,} characters left out ...] {text[-limit:]}"
