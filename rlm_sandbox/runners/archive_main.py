"""Entry point of the guest archive: ``python ARCHIVE launcher|zygote|inputs|libraries|container|check|plain``. Becomes its ``__main__.py``."""

from __future__ import annotations

import importlib
import json
import sys


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
        tree = importlib.import_module("rlm_guest.confine.tree")
        sys.stdout.write(json.dumps(tree.libraries_found()))
        return 0
    if program == "container":
        container = importlib.import_module("rlm_guest.runners.container")
        if numbers in ([], ["sockets"]):
            container.main(sockets=bool(numbers))
    if program == "plain":
        plain = importlib.import_module("rlm_guest.runners.plain_child")
        return int(plain.main(*map(int, numbers)))
    if program == "check":
        container = importlib.import_module("rlm_guest.runners.container")
        return int(container.check())
    return 2


if __name__ == "__main__":
    sys.exit(main())
