"""An engine at another address: contexts are copied there once, TLS and ssh reach it, and nothing is left on it."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("docker", reason="the extra 'docker' is not installed")

from rlm_sandbox import BackendUnavailable, Context, SessionClosed, open_repl
from rlm_sandbox.backends.docker import engine as engines
from rlm_sandbox.backends.docker import volumes
from rlm_sandbox.options import DockerOptions
from rlm_sandbox.registry import SessionConfig, load_backend

from ..conftest import skip_unless_required
from .conftest import ours, until

SOCKET = "/var/run/docker.sock"


class Forwarder:
    """A TCP port that leads to the engine's socket, as on a machine that offers its engine on the network."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._tls = tls
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                client = client if self._tls is None else self._tls.wrap_socket(client, server_side=True)
            except OSError:
                continue
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as engine:
            engine.connect(SOCKET)
            back = threading.Thread(target=self._copy, args=(engine, client), daemon=True)
            back.start()
            self._copy(client, engine)
            back.join()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def remote(api: Any) -> Iterator[DockerOptions]:
    server = Forwarder()
    yield DockerOptions(docker_host=f"tcp://127.0.0.1:{server.port}")
    _forget_engines()
    server.close()


def _forget_engines() -> None:
    for address, engine in list(engines._engines.items()):
        if address and address.startswith(("tcp://", "ssh://")):
            volumes.forget(engine)
            del engines._engines[address]


def test_contexts_are_copied_once_per_text(api: Any, remote: DockerOptions) -> None:
    text = "needle " * 50_000
    copies = []
    copy = volumes.ContextVolume._copy
    volumes.ContextVolume._copy = lambda *args: copies.append(1) or copy(*args)  # type: ignore[method-assign, func-returns-value]
    try:
        with open_repl("docker", options=remote) as first, open_repl("docker", options=remote) as second:
            assert first.capabilities.context_route == "mapped"
            for repl in (first, second):
                repl.bind("ctx", Context.from_text(text))  # another object with the same text
                assert repl.exec("ctx.len_chars(), ctx.find('needle')[0]").value == "(350000, (0, 6, 'needle'))"
            assert len(copies) == 1
            # A killed cell gets its text back.
            assert first.exec("import os\nos._exit(1)").state == "restored"
            assert first.exec("ctx.len_chars()").value == "350000"
            # Sessions cannot list what others were given, nor write there.
            looked = second.exec(
                "import os\ndef tried(f, *a):\n    try: return f(*a)\n    except OSError as exc: return type(exc).__name__\n"
                "tried(os.listdir, '/ctx'), tried(open, '/ctx/x', 'w')"
            )
            assert looked.value == "('PermissionError', 'OSError')"
    finally:
        volumes.ContextVolume._copy = copy  # type: ignore[method-assign]


def test_nothing_is_left_on_it(api: Any, remote: DockerOptions) -> None:
    before = {volume["Name"] for volume in api.volumes()["Volumes"] or []}
    with open_repl("docker", options=remote) as repl:
        repl.bind("ctx", Context.from_text("text"))
        made = {volume["Name"] for volume in api.volumes()["Volumes"] or []} - before
        assert len(made) == 1
        assert repl.exec("ctx.len_chars()").value == "4"
    volumes.forget(engines.engine_for(remote.docker_host))
    assert {volume["Name"] for volume in api.volumes()["Volumes"] or []} == before


def test_a_volume_of_a_dead_process_is_swept(api: Any) -> None:
    dead = engines.own_name().split(".")[0] + ".4194303.1"
    api.create_volume("rlm-sandbox-test-dead", labels={engines.OWNER_LABEL: dead})
    assert "rlm-sandbox-test-dead" in engines.engine_for(None).prune()


def test_an_engine_behind_tls(api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With certificates of both sides, as the docker client takes them from the environment."""
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    openssl += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(openssl, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    (tmp_path / "ca.pem").write_bytes((tmp_path / "cert.pem").read_bytes())
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    tls.load_verify_locations(tmp_path / "ca.pem")
    tls.verify_mode = ssl.CERT_REQUIRED
    server = Forwarder(tls)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # of the machine; they would replace the engine's authority
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
    try:
        with open_repl("docker", options=DockerOptions(docker_host=f"tcp://127.0.0.1:{server.port}")) as repl:
            assert repl.exec("len('x' * 3_000_000)").value == "3000000"
            repl.set("big", "y" * 3_000_000)
            assert len(repl.get("big")) == 3_000_000
            assert repl.exec("print('z' * 50_000)").stdout.strip() == "z" * 50_000
    finally:
        _forget_engines()
        server.close()


_SSHD = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PidFile none
"""


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def over_ssh(api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DockerOptions]:
    """An OpenSSH server with keys of its own, and a client that knows it."""
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if sshd is None or os.getuid() != 0:
        skip_unless_required("ssh", "needs OpenSSH's sshd, and root to start it")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True, timeout=60)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "sshd").write_text(_SSHD.format(port=port, folder=tmp_path))
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {(tmp_path / 'host.pub').read_text()}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -F none -o IdentityFile={tmp_path}/user -o UserKnownHostsFile={tmp_path}/known "$@"\n'
    )
    (tmp_path / "bin/ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with subprocess.Popen([sshd, "-D", "-f", str(tmp_path / "sshd")], stderr=subprocess.DEVNULL) as server:
        try:
            until(lambda: _answers(port))
            yield DockerOptions(docker_host=f"ssh://{getpass.getuser()}@127.0.0.1:{port}")
            _forget_engines()
        finally:
            server.terminate()


def test_an_engine_behind_ssh(api: Any, over_ssh: DockerOptions) -> None:
    with open_repl("docker", options=over_ssh) as repl:
        repl.bind("ctx", Context.from_text("needle " * 50_000))
        repl.bind("double", lambda value: 2 * value)
        assert repl.exec("ctx.len_chars(), double(21)").value == "(350000, 42)"
        repl.set("big", "y" * 3_000_000)
        assert len(repl.get("big")) == 3_000_000
        assert repl.exec("import os\nos._exit(1)").state == "restored"
    until(lambda: not ours(api, engines.own_name()))


def test_a_connection_by_ssh_that_was_lost_is_made_again(api: Any, over_ssh: DockerOptions) -> None:
    with open_repl("docker", options=over_ssh) as repl:
        tunnel = engines.engine_for(over_ssh.docker_host)._tunnel
        assert tunnel is not None
        tunnel._process.send_signal(signal.SIGKILL)
        tunnel._process.wait()
        with pytest.raises(SessionClosed):
            repl.exec("1")
    with open_repl("docker", options=over_ssh) as repl:
        assert repl.exec("2").value == "2"


def test_an_address_that_answers_nothing(api: Any) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        open_repl("docker", options=DockerOptions(docker_host="tcp://127.0.0.1:9"))
    assert "does not answer" in caught.value.reason


def test_capabilities_are_the_truth_of_each_address() -> None:
    backend = load_backend("docker")
    for host in (None, "tcp://192.0.2.1:2376", "ssh://user@192.0.2.1"):
        found = backend.capabilities(SessionConfig(options=DockerOptions(docker_host=host)))
        assert found.context_route == "mapped"
