"""To run something as a user without privileges, who may not enter the folders of whoever runs the tests."""

from __future__ import annotations

import importlib.util
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .conftest import skip_unless_required


def _readable_by_all(path: Path) -> bool:
    """Whether any user can reach and execute it: every directory on the way lets others through."""
    resolved = path.resolve()
    return all(part.stat().st_mode & stat.S_IXOTH for part in (resolved, *resolved.parents))


def interpreter() -> str:
    """An interpreter from 3.11 on that a user without privileges may run."""
    for candidate in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        path = Path(candidate).resolve()  # not by way of an environment, which may lie in a closed directory
        if path.exists() and _readable_by_all(path) and _is_new_enough(path):
            return str(path)
    message = "there is no interpreter from 3.11 on that an ordinary user can execute (home directories are closed)"
    return skip_unless_required("jail", message)


def _is_new_enough(path: Path) -> bool:
    found = subprocess.run([path, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True)
    return found.stdout.strip() == "True"


@contextmanager
def copied(*packages: str) -> Iterator[str]:
    """A directory with copies of these packages that everybody can read, for PYTHONPATH."""
    directory = Path(tempfile.mkdtemp())
    try:
        directory.chmod(0o755)
        for name in packages:
            found = importlib.util.find_spec(name)
            assert found is not None
            assert found.origin is not None
            shutil.copytree(Path(found.origin).parent, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in directory.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield str(directory)
    finally:
        shutil.rmtree(directory)
