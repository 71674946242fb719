"""`Policy`: one session's restricted language: compiles cells, runs them, and holds what they can reach."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from types import CodeType
from typing import Any, Final

from .guards import Guards
from .modules import Importer, make_modules
from .names import make_builtins
from .transformer import ELSEWHERE, CellPolicy

__all__ = ("MAX_SOURCE_CHARS", "Policy", "Refused")

#: A cell is parsed by the host's own interpreter, which no limit can end meanwhile.
MAX_SOURCE_CHARS: Final = 1_000_000
#: Refusals named in one error.
_SHOWN: Final = 3


class Refused(SyntaxError):
    """A cell uses what the restricted language does not have."""


Refused.__name__ = Refused.__qualname__ = "SyntaxError"  # its name in a cell's result
Refused.__module__ = "builtins"


class Policy:
    """Runs cells on ``names``, the session's variables."""

    def __init__(
        self,
        names: dict[str, Any],
        *,
        write: Callable[[str, str], None],
        sleep: Callable[[float], None],
        halt: Callable[[], None],
        max_bytes: int,
    ) -> None:
        """
        Args:
            names: the variables; they get ``__builtins__`` and ``__name__``.
            write: takes ``stdout`` or ``stderr`` and a text.
            sleep: what ``time.sleep`` is.
            halt: raises what ends the cell. Called where `stop` was set.
            max_bytes: what one operation may make, where it is looked at.
        """
        self.names = names
        self._write = write
        self._halt = halt
        guards = Guards(names, max_bytes, self._check)
        self._streams = make_modules(guards, write, sleep)
        self.builtins = make_builtins(guards, self._print, Importer(self._streams), halt)
        names["__builtins__"] = self.builtins
        names["__name__"] = "__main__"

    @property
    def stop(self) -> bool:
        """Whether the cell is to end at its next loop, call or handler."""
        return bool(self.builtins[".stop"])

    @stop.setter
    def stop(self, value: bool) -> None:
        self.builtins[".stop"] = value

    def _check(self) -> None:
        if self.builtins[".stop"]:
            self._halt()

    def _print(self, *values: Any, sep: str | None = " ", end: str | None = "\n", file: Any = None, flush: bool = False) -> None:
        for option, given in (("sep", sep), ("end", end)):
            if given is not None and not isinstance(given, str):
                raise TypeError(f"{option} must be None or a string, not {type(given).__name__}")
        # Of `str` by name: a cell's own kind of text has methods of its own.
        text = str.join("", (str.join(" " if sep is None else sep, map(str, values)), "\n" if end is None else end))
        if file is None:
            self._write("stdout", text)
        else:
            file.write(text)

    def compile(self, source: str, name: str) -> tuple[CodeType | None, CodeType | None]:
        """The cell's statements, and its last expression if it ends in one.

        Raises:
            SyntaxError, ValueError, RecursionError, MemoryError: it cannot be compiled, or may not.
        """
        if len(source) > MAX_SOURCE_CHARS:
            raise ValueError(f"a restricted cell may have {MAX_SOURCE_CHARS:,} characters; set() a long text instead")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the cell's source: not the host's concern
            # Not by ast.parse(), whose own frame would be in the traceback of a syntax error.
            tree: Any = compile(source, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
            policy = CellPolicy()
            tree = policy.visit(tree)
            if policy.refused:
                listed = "; ".join(f"line {line}: {what}" for line, what in policy.refused[:_SHOWN])
                raise Refused(f"{listed}; {ELSEWHERE}")
            ast.fix_missing_locations(tree)
            last = None
            if tree.body and isinstance(tree.body[-1], ast.Expr):
                last = ast.Expression(tree.body.pop().value)
            return (
                compile(tree, name, "exec", dont_inherit=True) if tree.body else None,
                compile(last, name, "eval", dont_inherit=True) if last is not None else None,
            )

    def run(self, source: str, name: str) -> Any:
        """Run a cell; returns the value of its last expression, or None. Raises whatever the cell raises."""
        statements, last = self.compile(source, name)
        if statements is not None:
            exec(statements, self.names)  # noqa: S102 - cells are what this runs, under the policy
        return eval(last, self.names) if last is not None else None  # noqa: S307 - see above
