"""The naive guest that the jail is compared with: JSON lines over a pipe to a Python process. No limits, no isolation of its own.

Run as a program it is the guest; imported, `JsonPipe` is its host, with any command in front (bubblewrap, say).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class JsonPipe:
    """A session of the naive kind."""

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        command = [*prefix, sys.executable, "-I", "-S", str(Path(__file__).resolve())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._function: Callable[[Any], Any] = lambda value: value

    def bind(self, function: Callable[[Any], Any]) -> None:
        """What ``f`` calls on the host."""
        self._function = function

    def exec(self, code: str, **values: Any) -> Any:
        """Run a cell; the value of ``result`` after it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"code": code, "values": values}) + "\n")
        self.process.stdin.flush()
        while True:
            message = json.loads(self.process.stdout.readline())
            if "call" not in message:
                return message["result"]
            self.process.stdin.write(json.dumps({"answer": self._function(message["call"])}) + "\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        """The only way to stop a cell: its state goes, too."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def serve() -> None:
    """Be the guest."""

    def f(value: Any) -> Any:
        sys.stdout.write(json.dumps({"call": value}) + "\n")
        sys.stdout.flush()
        return json.loads(sys.stdin.readline())["answer"]

    names: dict[str, Any] = {"f": f}
    while line := sys.stdin.readline():
        message = json.loads(line)
        names.update(message["values"])
        names["result"] = None
        exec(message["code"], names)  # noqa: S102 - what a guest is for
        sys.stdout.write(json.dumps({"result": names["result"]}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
