"""For tests of code that uses sessions: `FakeREPL`. NO isolation: its cells run in this process with all its rights.

Not a backend: `open_repl` does not know it. Give it to `RLM(..., repl_factory=FakeREPL)`.
"""

from __future__ import annotations

import ast
import contextlib
import io
import time
import traceback as traceback_module
from collections.abc import Callable, Iterator
from types import CodeType, TracebackType
from typing import Any, Final, Self

from .binding import Exposed
from .bridge.names import checked_name
from .context import Context, WholeText
from .errors import SessionBusy, SessionClosed
from .limits import Limits
from .protocol import Capabilities, Feature, Grade
from .results import ExecResult, LimitHit, Opaque, OutputChunk, Usage

__all__ = ("FakeREPL", "HostCallError")

_PLAIN: Final = (type(None), bool, int, float, str, bytes)


class HostCallError(Exception):
    """What a cell sees of a host function that failed."""


class _Ended(BaseException):
    """Ends a cell at a host call. Not an `Exception`, so that ordinary handlers in a cell let it pass."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class FakeREPL:
    """`REPLProtocol` by ``exec`` in this process. For trusted test code only; enforces next to nothing.

    ``wall_seconds``, ``host_calls`` and `interrupt` end a cell at its next host call, which is enough to test what
    comes after. Every other limit is not looked at.
    """

    def __init__(self, *, limits: Limits | None = None, setup: str = "") -> None:
        self._limits = limits or Limits()
        self._setup = setup
        self._bindings: dict[str, Any] = {}
        self._closed = False
        self._running = False
        self._interrupted = False
        self._deadline: float | None = None
        self._calls = 0
        self._calls_allowed: int | None = None
        self._cell = 0
        self.cells: list[str] = []
        """The source of every cell run, for assertions."""
        self._globals: dict[str, Any] = {}
        self._hidden: frozenset[str] = frozenset()
        self.reset()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            backend="fake",
            isolation="none: cells run in the host process (for tests)",
            time_seconds=Grade.NONE,
            wall_seconds=Grade.NONE,
            output_bytes=Grade.NONE,
            host_calls=Grade.NONE,
            value_bytes=Grade.NONE,
            memory_mb=Grade.NONE,
            processes=Grade.NONE,
            disk_mb=Grade.NONE,
            session_seconds=Grade.NONE,
            network=Grade.NONE,
            crash=Grade.NONE,
            interrupt=Grade.NONE,
            language=frozenset(Feature),
            recovery="none",
            context_route="object",
        )

    @property
    def limits(self) -> Limits:
        return self._limits

    def exec(
        self,
        code: str,
        *,
        limits: Limits | None = None,
        read: tuple[str, ...] = (),
        on_output: Callable[[OutputChunk], None] | None = None,
    ) -> ExecResult:
        """Run one cell in this process."""
        with self._turn():
            narrowed = self._limits.narrowed(limits)
            self._cell += 1
            self.cells.append(code)
            started = time.monotonic()
            self._interrupted = False
            self._deadline = None if narrowed.wall_seconds is None else started + narrowed.wall_seconds
            self._calls, self._calls_allowed = 0, narrowed.host_calls
            streams = {"stdout": _Stream("stdout", on_output), "stderr": _Stream("stderr", on_output)}
            value = error = trace = None
            limit: LimitHit | None = None
            outcome: Any = "ok"
            try:
                with contextlib.redirect_stdout(streams["stdout"]), contextlib.redirect_stderr(streams["stderr"]):
                    value = self._run(code)
            except _Ended as exc:
                outcome = "interrupted" if exc.kind == "interrupt" else "limit"
                if outcome == "limit":
                    limit = LimitHit(exc.kind, getattr(narrowed, exc.kind) or 0, None, "host")
            except KeyboardInterrupt:
                raise
            except BaseException as exc:  # noqa: BLE001 - whatever a cell raises is its result
                outcome, error = "error", f"{type(exc).__name__}: {exc}"
                frames = exc.__traceback__.tb_next.tb_next if exc.__traceback__ and exc.__traceback__.tb_next else None
                trace = "".join(traceback_module.format_exception(type(exc), exc, frames))
            return ExecResult(
                outcome=outcome,
                stdout=streams["stdout"].getvalue(),
                stderr=streams["stderr"].getvalue(),
                value=value,
                error=error,
                traceback=trace,
                limit=limit,
                read={name: _plain(self._globals[name]) for name in read if name in self._globals},
                usage=Usage(wall_seconds=time.monotonic() - started, host_calls=self._calls),
            )

    def get(self, name: str, default: Any = None) -> Any:
        """The variable, as plain data or `Opaque`. Raises as every backend does for what no variable can be called."""
        checked_name(name)
        with self._turn():
            return _plain(self._globals[name]) if name in self._globals else default

    def set(self, name: str, value: Any) -> None:
        """Give a variable a value."""
        checked_name(name)
        if callable(value):
            raise TypeError("set() takes plain data; use bind() for a function")
        with self._turn():
            self._globals[name] = value

    def bind(self, name: str, target: Any, *, inline: bool = False, errors: tuple[type[BaseException], ...] = ()) -> None:
        """Put ``target`` under ``name``; a function is wrapped as the contract says, an object is itself."""
        checked_name(name)
        with self._turn():
            self._bindings[name] = self._globals[name] = self._bound(name, target, errors)

    def names(self) -> dict[str, str]:
        """Variables of the cells."""
        with self._turn():
            return self._session_names()

    def interrupt(self) -> None:
        """End the running cell at its next host call."""
        self._interrupted = True

    def reset(self) -> None:
        """Start over: bindings and setup again."""
        with self._turn():
            self._globals = {"__name__": "__main__", "session_names": self._session_names, "HostCallError": HostCallError}
            exec(compile(self._setup, "<setup>", "exec", dont_inherit=True), self._globals)  # noqa: S102 - see the module's docstring
            self._hidden = frozenset(self._globals)
            self._globals.update(self._bindings)

    def close(self) -> None:
        """Refuse every later call."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if self._closed:
            raise SessionClosed("the session is closed; open a new one")
        if self._running:
            raise SessionBusy("the session is running another call; wait for it to end")
        self._running = True
        try:
            yield
        finally:
            self._running = False

    def _run(self, code: str) -> str | None:
        tree = ast.parse(code, f"<cell {self._cell}>")
        last: CodeType | None = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            tail = tree.body.pop()
            assert isinstance(tail, ast.Expr)
            last = compile(ast.Expression(tail.value), f"<cell {self._cell}>", "eval", dont_inherit=True)
        exec(compile(tree, f"<cell {self._cell}>", "exec", dont_inherit=True), self._globals)  # noqa: S102 - see the module's docstring
        value = eval(last, self._globals) if last is not None else None  # noqa: S307 - see the module's docstring
        return None if value is None else repr(value)

    def _bound(self, name: str, target: Any, errors: tuple[type[BaseException], ...]) -> Any:
        if isinstance(target, WholeText):
            return target.context.text
        if isinstance(target, Exposed):
            return target.target
        if isinstance(target, Context):
            return target
        if not callable(target):
            raise TypeError(f"cannot bind a {type(target).__name__}")

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            self._check(self._calls_allowed is not None and self._calls > self._calls_allowed)
            try:
                return target(*args, **kwargs)
            except errors:
                raise
            except Exception as exc:
                raise HostCallError(f"{name} failed") from exc
            finally:
                self._check(False)

        return call

    def _check(self, too_many: bool) -> None:
        if too_many:
            raise _Ended("host_calls")
        if self._interrupted:
            raise _Ended("interrupt")
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise _Ended("wall_seconds")

    def _session_names(self) -> dict[str, str]:
        return {
            name: _summary(value)
            for name, value in self._globals.items()
            if name not in self._hidden and name not in self._bindings and not name.startswith("__")
        }


def _summary(value: Any) -> str:
    try:
        return f"{type(value).__name__}: {repr(value)[:80]}"
    except Exception:  # noqa: BLE001 - of a cell's class, or of a number with too many digits
        return type(value).__name__


class _Stream(io.StringIO):
    def __init__(self, name: Any, on_output: Callable[[OutputChunk], None] | None) -> None:
        super().__init__()
        self._name = name
        self._on_output = on_output

    def write(self, text: str) -> int:
        if self._on_output is not None and text:
            self._on_output(OutputChunk(self._name, text))
        return super().write(text)


def _plain(value: Any) -> Any:
    """``value`` if it is plain data, else what `get` gives for it."""
    if type(value) in _PLAIN:
        return value
    if type(value) in (list, tuple, set):
        return type(value)(_plain(item) for item in value)
    if type(value) is dict:
        return {_plain(key): _plain(item) for key, item in value.items()}
    return Opaque(type(value).__name__, repr(value)[:200])
