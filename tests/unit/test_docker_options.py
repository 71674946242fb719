"""What can be said of the docker backend without an engine: its options, its profile and how it names owners."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from rlm_sandbox import BackendUnavailable, DockerOptions, Limits, open_repl
from rlm_sandbox.registry import prune

pytest.importorskip("docker", reason="the extra 'docker' is not installed")

from rlm_sandbox.backends.docker.container import memory_mb
from rlm_sandbox.backends.docker.engine import own_name, owner_is_alive


@pytest.mark.parametrize(
    "options",
    [{"image": ""}, {"image": None}, {"image": 3}, {"runtime": ""}, {"docker_host": 1}, {"cpus": True}, {"cpus": "2"}],
    ids=str,
)
def test_options_of_the_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        DockerOptions(**options)


@pytest.mark.parametrize("cpus", [0, -1, 0.001, float("nan"), 1e9])
def test_a_share_of_processors_that_no_machine_has(cpus: float) -> None:
    with pytest.raises(ValueError, match="between"):
        DockerOptions(cpus=cpus)


def test_no_engine_is_an_error_with_a_remedy() -> None:
    with pytest.raises(BackendUnavailable) as caught:
        open_repl("docker", options=DockerOptions(docker_host="unix:///nowhere/at/all.sock"))
    assert "does not answer" in caught.value.reason
    assert "start Docker" in caught.value.remedy


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_the_socket_of_an_engine_that_is_gone_is_an_error_and_leaks_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(tmp_path / "docker.sock"))
    with pytest.raises(BackendUnavailable) as caught:
        open_repl("docker", options=DockerOptions(docker_host=f"unix://{tmp_path}/docker.sock"))
    assert "refused" in caught.value.reason
    gc.collect()


def test_memory_of_a_container() -> None:
    limits = Limits(memory_mb=100, disk_mb=10)
    assert memory_mb(limits, recovery=True) == 358
    assert memory_mb(limits, recovery=False) == 158
    assert memory_mb(Limits(memory_mb=None), recovery=True) is None


def test_owners() -> None:
    boot, pid, started = own_name().split(".")
    assert int(pid) == os.getpid()
    assert owner_is_alive(own_name()) is True
    assert owner_is_alive(f"{boot}.{pid}.{int(started) + 1}") is False  # another process has the pid by now
    assert owner_is_alive(f"{boot}.4194303.{started}") is False
    assert owner_is_alive(f"another-machine.{pid}.{started}") is None
    assert owner_is_alive("") is None
    assert owner_is_alive("unknown.1.1") is None


def test_only_a_backend_with_an_engine_can_be_pruned() -> None:
    with pytest.raises(ValueError, match="leaves nothing behind"):
        prune("jail")
