"""Record what `rlm-sandbox doctor` says on this machine: as root, as a user without rights, and without user namespaces.

    python scripts/record_doctor.py        writes docs/doctor/*.txt; as root, on Linux, with the engines installed

The machine itself is not changed: the user namespaces are forbidden inside one that is thrown away.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parent.parent
_NOBODY: Final = 65534
#: How the command is run, by the file that keeps what it said.
_AS: Final = {
    "root": 'exec "$@"',
    # The interpreter may lie in a home that is closed to others: then that home is covered, and only the interpreter is in it.
    "ordinary-user": 'if [ "$CLOSED" ]; then mount --bind "$TREE" "$PLACE" && mount -t tmpfs -o mode=755 none "$CLOSED" '
    '&& mkdir -p "$TREE" && mount --bind "$PLACE" "$TREE" || exit; fi; '
    f'exec setpriv --reuid={_NOBODY} --regid={_NOBODY} --clear-groups "$@"',
    "no-user-namespaces": "exec unshare --user --map-root-user sh -c "
    '\'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"\' sh "$@"',
}


def record(name: str) -> None:
    """Write one of them."""
    place = Path(tempfile.mkdtemp(prefix="rlm-doctor-"))
    try:
        place.chmod(0o755)
        home, tree = place / "home", place / "python"
        home.mkdir(0o700)
        tree.mkdir()
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "COLUMNS": "120", "PYTHONUTF8": "1"}
        environment["DOCKER_HOST"] = "unix:///nowhere/docker.sock"  # an engine and its images are no part of the machine
        if name == "ordinary-user":
            os.chown(home, _NOBODY, _NOBODY)
            closed = [str(above) for above in Path(sys.base_prefix).parents if not above.stat().st_mode & stat.S_IXOTH]
            environment |= {"CLOSED": closed[-1] if closed else "", "TREE": sys.base_prefix, "PLACE": str(tree)}
        command = ["unshare", "--mount", "sh", "-c", _AS[name], "sh", sys.executable, "-m", "rlm_sandbox", "doctor"]
        for _ in range(2):  # the second time its caches are there, as on any day but the first
            done = subprocess.run(command, env=environment, cwd="/", stdout=subprocess.PIPE, text=True, timeout=600, check=False)
        said = "\n".join(line.rstrip() for line in done.stdout.splitlines())
        said = re.sub(r"(Linux \d+\.\d+)\S*", r"\1", said)  # the rest is one machine's
        (_ROOT / "docs" / "doctor" / f"{name}.txt").write_text(f"{said}\nexit status {done.returncode}\n")
    finally:
        shutil.rmtree(place)


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("run as root: the other users are made from it")
    for name in _AS:
        record(name)


if __name__ == "__main__":
    main()
