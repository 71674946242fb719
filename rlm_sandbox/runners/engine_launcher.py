"""Becomes a confined engine worker: confines this process, then executes the engine's program in it.

The engine starts it in place of its own program, by a small script of the host's (`backends.monty.launch`), with an empty
environment. There is no process between host and worker: the pid that the engine knows is the worker's own.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from ..confine.engine import confine_engine, engine_command

__all__ = ("main",)


def main(program: str, libraries: dict[str, str], parent: int, args: list[str]) -> NoReturn:
    """Confine and execute; ends the process with status 97 and the reason on standard error if a step fails."""
    try:
        confine_engine(program, libraries, parent)
        command = engine_command(libraries, *args)
        os.execve(command[0], command, {})
    except OSError as exc:
        os.write(2, f"{exc.strerror or exc}"[:500].encode(errors="replace"))
    finally:
        sys.stderr = None  # nothing more may be written there
        os._exit(97)
