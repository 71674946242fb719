"""The way to an engine on another machine by ssh: OpenSSH forwards a socket of ours to the engine's."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
import weakref
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from ...errors import BackendUnavailable

__all__ = ("Tunnel",)

_SECONDS: Final = 20.0
_REMOTE_SOCKET: Final = "/var/run/docker.sock"


class Tunnel:
    """A unix socket here that is the engine's there, for the life of this process.

    ssh runs `cat` there on a pipe of ours: when this process ends, however it does, so does the pipe, `cat`, and ssh.
    """

    def __init__(self, address: str) -> None:
        """``address``: ``ssh://[user@]host[:port]``.

        Raises:
            BackendUnavailable: ssh is not installed, or does not get there without asking somebody.
        """
        parts = urlsplit(address)
        ssh = shutil.which("ssh")
        if ssh is None or not parts.hostname or parts.hostname.startswith("-"):
            reason = "the program ssh is not installed" if ssh is None else "the engine's address names no machine"
            raise BackendUnavailable("docker", reason, "install OpenSSH, or give ssh://user@machine")
        folder = Path(tempfile.mkdtemp(prefix="rlm-sandbox-ssh."))  # 0700: who reaches the socket is root on that machine
        socket = folder / "docker.sock"
        login = [*(["-p", str(parts.port)] if parts.port else []), *(["-l", parts.username] if parts.username else [])]
        options = ["BatchMode=yes", "ExitOnForwardFailure=yes", "ServerAliveInterval=15"]
        command = [ssh, "-T", *(part for option in options for part in ("-o", option)), *login]
        command += ["-L", f"{socket}:{_REMOTE_SOCKET}", "--", parts.hostname, "cat"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self._finalizer = weakref.finalize(self, _end, process, folder)
        until = time.monotonic() + _SECONDS
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > until:
                assert process.stderr is not None
                process.kill()
                said = process.stderr.read(500).decode("utf-8", "replace").strip().splitlines()
                self._finalizer()
                last = f" ({said[-1]})" if said else ""
                raise BackendUnavailable(
                    "docker", f"ssh does not reach the engine's machine{last}", f"try: ssh {parts.hostname} true"
                )
            time.sleep(0.02)
        self.address = f"unix://{socket}"
        self._process = process

    def is_open(self) -> bool:
        """Whether ssh still runs. It ends when the connection does: it asks the other end every 15 s."""
        return self._process.poll() is None


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    shutil.rmtree(folder, ignore_errors=True)
