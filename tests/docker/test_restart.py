"""An engine that ends and comes back in the middle of a session: one of the test's own, beside the machine's."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("docker", reason="the extra 'docker' is not installed")

from rlm_sandbox import BackendUnavailable, SessionClosed, open_repl
from rlm_sandbox.backends.docker import engine as engines
from rlm_sandbox.options import DockerOptions

from ..conftest import skip_unless_required
from .conftest import until


class OwnEngine:
    """A dockerd with nothing of the machine's but the runtimes."""

    def __init__(self, folder: Path) -> None:
        self.address = f"unix://{folder}/docker.sock"
        self._folder = folder
        self._command = [
            # In a network of its own: without a bridge it would remove that of the machine's engine.
            "unshare", "--net", "--", "dockerd", "--host", self.address, "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec",
            "--pidfile", f"{folder}/pid", "--bridge", "none", "--iptables=false", "--storage-driver", "overlay2", "--shutdown-timeout", "1",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def docker(self, *words: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["docker", "--host", self.address, *words], capture_output=True, timeout=60, check=False, **more)

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        until(lambda: self.docker("info").returncode == 0, 60.0)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(10)
            self._process = None


@pytest.fixture
def own_engine(api: Any, tmp_path: Path) -> Iterator[OwnEngine]:
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        skip_unless_required("docker", "only root can start an engine of its own, where dockerd is installed")
    folder = Path("/run") / f"rlm-test-{os.getpid()}"  # a socket's path is short
    folder.mkdir(mode=0o700)
    engine = OwnEngine(folder)
    try:
        engine.start()
        saved = subprocess.run(["docker", "save", DockerOptions().image], capture_output=True, check=True, timeout=60).stdout
        assert engine.docker("load", input=saved).returncode == 0
        yield engine
    finally:
        engine.stop()
        known = engines._engines.pop(engine.address, None)
        if known is not None:
            known.api.close()
        shutil.rmtree(folder, ignore_errors=True)
        with warnings.catch_warnings():
            # docker-py leaves sockets to the collector whose connect was refused.
            warnings.simplefilter("ignore", ResourceWarning)
            del known, engine
            gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("channel", ["auto", "attached"])
def test_an_engine_that_ends_in_the_middle_of_a_session(own_engine: OwnEngine, channel: Any) -> None:
    options = DockerOptions(docker_host=own_engine.address, channel=channel)
    repl = open_repl("docker", options=options)
    try:
        assert repl.exec("x = 1").ok
        own_engine.stop()
        start = time.monotonic()
        try:
            result = repl.exec("x")
        except SessionClosed:
            pass
        else:
            assert (result.outcome, result.state) == ("crashed", "lost")
        with pytest.raises(SessionClosed):
            repl.exec("x")
        assert time.monotonic() - start < 30
        with pytest.raises(BackendUnavailable, match="does not answer"):
            open_repl("docker", options=options)
    finally:
        repl.close()
    own_engine.start()
    with open_repl("docker", options=options) as again:
        assert again.exec("1 + 1").value == "2"
