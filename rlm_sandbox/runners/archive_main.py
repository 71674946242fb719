"""Entry point of the guest archive, of which it becomes the ``__main__.py``.

``python ARCHIVE launcher|zygote|inputs|libraries|container|check|modules|plain``
"""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False  # see `start_modules`: nothing is imported before its file is open that need not be
if TYPE_CHECKING:
    from typing import Any


def _be_container(program: str, arguments: list[str]) -> int:
    start_modules: Any = importlib.import_module("rlm_guest.runners.start_modules")
    with start_modules.InOneFile(f"{__file__.rpartition('/')[0]}/{start_modules.FILE_NAME}"):
        mapped_text: Any = importlib.import_module("rlm_guest.runners.mapped_text")
        test = mapped_text.begin_self_test()  # in a child, beside all that follows
        container: Any = importlib.import_module("rlm_guest.runners.container")
        container.preload(*(arguments if program == "modules" else ()))
    if program == "check":
        return int(container.check(test))
    if program == "modules":
        sys.stdout.write(start_modules.listing())
        return 0
    if arguments in ([], ["sockets"]):
        container.main(test, sockets=bool(arguments))
    return 2


def main() -> int:
    """Start the program named by the first argument."""
    program, *numbers = sys.argv[1:]
    if program == "launcher":
        launcher = importlib.import_module("rlm_guest.runners.launcher")
        return int(launcher.main(*map(int, numbers)))
    if program == "zygote":
        with importlib.import_module("rlm_guest.runners.fork_hooks").lean_fork_hooks():
            zygote = importlib.import_module("rlm_guest.runners.zygote")
        return int(zygote.main(*map(int, numbers)))
    if program == "inputs":
        inputs = importlib.import_module("rlm_guest.runners.inputs")
        return int(inputs.main(*map(int, numbers)))
    if program == "libraries":
        json = importlib.import_module("json")
        tree = importlib.import_module("rlm_guest.confine.tree")
        sys.stdout.write(json.dumps(tree.libraries_found()))
        return 0
    if program in ("container", "check", "modules"):
        return _be_container(program, numbers)
    if program == "plain":
        plain = importlib.import_module("rlm_guest.runners.plain_child")
        return int(plain.main(*map(int, numbers)))
    return 2


if __name__ == "__main__":
    sys.exit(main())
