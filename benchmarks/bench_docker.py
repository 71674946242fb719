"""The figures of the docker backend, as JSON lines, each beside the bare thing that it is compared with.

    python benchmarks/bench_docker.py [--runtime runsc] [--rounds N] [--check] [--rlm IMAGE]

The bare things, measured in the same run and in turns: the raw attached socket to a container of the same image that echoes,
the pipes of a `docker run -i` client with the same echo, and a `docker run` of the same image that does nothing. Times are
medians. `--check` exits with 1 if a promised figure is not kept. `--rlm`: beside rlm's docker REPL, too, where its package (rlms) can be
imported; the image has python, requests and dill.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, Final

import docker

from rlm_sandbox import Context, Limits, REPLProtocol, SessionPool, open_repl
from rlm_sandbox.backends.docker.container import container_settings
from rlm_sandbox.backends.docker.engine import OWNER_LABEL, own_name
from rlm_sandbox.options import DockerOptions

_now = time.perf_counter
#: Echoes pieces of 100 bytes: what a round trip through the engine costs when the guest does nothing.
_ECHO: Final = "import os\nwhile True:\n    data = os.read(0, 65536)\n    if not data: break\n    os.write(1, data)"
_PIECE: Final = b"x" * 100
_PYTHON: Final = ["/usr/lib/rlm_python", "-I", "-S", "-c"]
_missed: list[str] = []


def say(name: str, seconds: float, *, target: float | None = None, n: int = 1, **more: Any) -> None:
    """``target`` is in the unit of the figure, milliseconds."""
    line: dict[str, Any] = {"name": name, "value": round(seconds * 1e3, 4), "unit": "ms", "n": n}
    if target is not None:
        line |= {"target": round(target, 4), "met": seconds * 1e3 <= target}
        if not line["met"]:
            _missed.append(name)
    print(json.dumps(line | more), flush=True)


class RawEcho:
    """A container of the same image with the same flags, whose attached socket echoes."""

    def __init__(self, options: DockerOptions) -> None:
        self._api = docker.APIClient(version="auto")
        settings = container_settings(options, Limits(), recovery=True)
        made = self._api.create_container(
            options.image, entrypoint=_PYTHON, command=[_ECHO], stdin_open=True, user="65534:65534",
            host_config=self._api.create_host_config(**settings),
        )  # fmt: skip
        self._id = made["Id"]
        self._response = self._api.attach_socket(self._id, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        self._sock: socket.socket = getattr(self._response, "_sock", self._response)
        self._api.start(self._id)
        self.round_trip()

    def round_trip(self) -> float:
        started = _now()
        self._sock.sendall(_PIECE)
        left = len(_PIECE)
        while left:
            _, size = struct.unpack(">BxxxI", self._take(8))
            left -= len(self._take(size))
        return _now() - started

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._sock.recv(size - len(data))
            if not piece:
                raise RuntimeError("the echo ended")
            data += piece
        return data

    def close(self) -> None:
        with suppress(docker.errors.DockerException):
            self._api.remove_container(self._id, force=True)
        self._sock.close()
        self._api.close()


@contextmanager
def client_pipe(options: DockerOptions) -> Iterator[Callable[[], float]]:
    """The same echo through the pipes of a `docker run -i` client."""
    runtime = ["--runtime", options.runtime] if options.runtime else []
    command = [
        "docker",
        "run",
        "-i",
        "--rm",
        "--network",
        "none",
        *runtime,
        "--entrypoint",
        _PYTHON[0],
        options.image,
        *_PYTHON[1:],
    ]
    with subprocess.Popen([*command, _ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def round_trip() -> float:
            started = _now()
            process.stdin.write(_PIECE)  # type: ignore[union-attr]
            left = len(_PIECE)
            while left:
                left -= len(process.stdout.read(left) or b"")  # type: ignore[union-attr]
            return _now() - started

        round_trip()
        yield round_trip
        process.stdin.close()
        process.wait(30)


def timed(run: Callable[[], object]) -> float:
    started = _now()
    run()
    return _now() - started


def ways(options: DockerOptions) -> dict[str, DockerOptions]:
    """The ways to a container that there are with these options, the usual one first."""
    if options.runtime is not None:
        return {"": options}
    return {"": options, ", signals by order": options, ", attached stream": replace(options, channel="attached")}


def messages(options: DockerOptions, rounds: int) -> None:
    """A cell and a host call beside the raw round trip, in turns, by each way to a container."""
    raw, piped, kept = [], [], []
    cells: dict[str, list[float]] = {}
    calls: dict[str, list[float]] = {}
    code = "for _ in range(20): f(1)"
    with ExitStack() as closing:
        echo = RawEcho(options)
        closing.callback(echo.close)
        pipe = closing.enter_context(client_pipe(options))
        recovering = closing.enter_context(open_repl("docker", options=options))
        recovering.exec("x = 1")
        sessions = {
            way: closing.enter_context(open_repl("docker", options=its, recovery=False)) for way, its in ways(options).items()
        }
        if ", signals by order" in sessions:  # as for a host whose user may not signal what runs in a container
            sessions[", signals by order"]._guest._may_signal = False  # type: ignore[attr-defined]
        for repl in sessions.values():
            repl.bind("f", lambda x: x, inline=True)
            repl.exec(code)
        for _ in range(rounds):
            raw += [echo.round_trip() for _ in range(20)]
            piped += [pipe() for _ in range(20)]
            for way, repl in sessions.items():
                cell = [timed(lambda: repl.exec("x = 1")) for _ in range(20)]  # noqa: B023 - called at once
                cells.setdefault(way, []).extend(cell)
                bare = statistics.median(cell)
                call = [max(0.0, timed(lambda: repl.exec(code)) - bare) / 20 for _ in range(5)]  # noqa: B023
                calls.setdefault(way, []).extend(call)
            time.sleep(0.02)
            kept.append(timed(lambda: recovering.exec("x = 1")))
    bare = statistics.median(raw)
    say("raw round trip, attached socket", bare, n=len(raw))
    say("raw round trip, pipes of docker run -i", statistics.median(piped), n=len(piped))
    for name, by_way in (("cell without recovery", cells), ("host call, inline", calls)):
        for way, times in by_way.items():
            middle = statistics.median(times)
            say(name + way, middle, target=None if way else bare * 2e3, n=len(times), ratio=round(middle / bare, 2))
    say("cell with recovery, 20 ms apart", statistics.median(kept), n=len(kept), ratio=round(statistics.median(kept) / bare, 2))


def starts(options: DockerOptions, rounds: int) -> None:
    """A session without a pool beside a bare `docker run`, in turns; and one from the pool."""
    bare, cold, closed, hit = [], [], [], []
    runtime = ["--runtime", options.runtime] if options.runtime else []
    command = [
        "docker",
        "run",
        "--rm",
        "--network",
        "none",
        *runtime,
        "--entrypoint",
        _PYTHON[0],
        options.image,
        *_PYTHON[1:],
        "pass",
    ]
    for _ in range(rounds):
        bare.append(timed(lambda: subprocess.run(command, check=True)))
        started = _now()
        repl = open_repl("docker", options=options)
        cold.append(_now() - started)
        closed.append(timed(repl.close))
    say("docker run of the same image", statistics.median(bare), n=rounds)
    say("session, cold", statistics.median(cold), target=statistics.median(bare) * 1.2e3, n=rounds)
    say("session, closing", statistics.median(closed), n=rounds)
    with SessionPool("docker", size=4, options=options) as pool:
        for _ in range(rounds):
            time.sleep(statistics.median(cold) * 4 + 0.3)  # until it is full again
            started = _now()
            taken = pool.open_repl()
            hit.append(_now() - started)
            taken.close()
    say("session, pool hit", statistics.median(hit), target=5.0, n=rounds)


def contexts(options: DockerOptions, rounds: int) -> None:
    """Attaching 100 MB: by sockets its memory file is sent along; on the attached stream a file is written once, and linked."""
    context = Context.from_text("0123456789" * 10_000_000)
    context.memory_file()
    attached = []
    with open_repl("docker", options=options) as repl:
        say("binding a context of 100 MB, first of the process", timed(lambda: repl.bind("P", context.whole)))
    for _ in range(rounds):
        with open_repl("docker", options=options) as repl:
            attached.append(timed(lambda repl=repl: repl.bind("P", context.whole)))  # type: ignore[misc]
            assert repl.exec("len(P)").value == "100000000"
    say("binding a context of 100 MB, each session", statistics.median(attached), target=20.0, n=rounds)


def kills(options: DockerOptions, rounds: int) -> None:
    """How much later than its limit and the grace of 0.25 s a cell ends that defeats the soft interrupt."""
    stubborn = "try:\n    while True:\n        z = 1\nexcept BaseException:\n    while True:\n        z = 2"
    seconds = 0.3
    over, restored = [], 0
    with open_repl("docker", options=options, limits=Limits(time_seconds=seconds)) as repl:
        repl.exec("x = 1")
        for _ in range(rounds):
            time.sleep(0.05)
            started = _now()
            result = repl.exec(stubborn)
            over.append(_now() - started - seconds - 0.25)
            restored += result.state == "restored"
    say("kill, over limit and grace, recovery included", statistics.median(over), target=150.0, n=rounds, restored=restored)


def dead_container(options: DockerOptions, rounds: int) -> None:
    """From the death of a container in the middle of a cell to a session that works again."""
    took = []
    api = docker.APIClient(version="auto")
    for _ in range(rounds):
        with open_repl("docker", options=options) as repl:
            (mine,) = api.containers(filters={"label": f"{OWNER_LABEL}={own_name()}"})
            repl.exec("x = 1")
            took.append(_replaced(api, mine["Id"], repl))
    api.close()
    say("recovery of a dead container", statistics.median(took), target=2000.0, n=rounds)


def _replaced(api: Any, container: str, repl: REPLProtocol) -> float:
    api.kill(container)
    started = _now()
    repl.exec("x = 1")
    return _now() - started


def peer(options: DockerOptions, rounds: int, image: str) -> None:
    """rlm's docker REPL and ours, in turns: start, the same cell, end."""
    from rlm.environments.docker_repl import DockerREPL

    theirs: list[list[float]] = [[], [], []]
    ours: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        for times, start, run, end in (
            (theirs, lambda: DockerREPL(image=image), DockerREPL.execute_code, DockerREPL.cleanup),
            (ours, lambda: open_repl("docker", options=options), lambda repl, code: repl.exec(code), lambda repl: repl.close()),
        ):
            started = _now()
            repl = start()
            times[0].append(_now() - started)
            run(repl, "x = 1")
            for _ in range(5):
                time.sleep(0.02)
                times[1].append(timed(lambda run=run, repl=repl: run(repl, "x = 1")))  # type: ignore[misc]
            times[2].append(timed(lambda end=end, repl=repl: end(repl)))  # type: ignore[misc]
    for name, their, our in zip(("start", "cell, 20 ms apart", "end"), theirs, ours, strict=True):
        say(f"rlm's docker REPL: {name}", statistics.median(their), n=len(their), ours=round(statistics.median(our) * 1e3, 3))


def main() -> int:
    parser = argparse.ArgumentParser(description="The figures of the docker backend.")
    parser.add_argument("--runtime", default=None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rlm", metavar="IMAGE")
    asked = parser.parse_args()
    options = DockerOptions(runtime=asked.runtime)
    api = docker.APIClient(version="auto")
    engine = api.version()["Version"]
    api.close()
    print(json.dumps({
        "name": "machine", "python": platform.python_version(), "kernel": platform.release(), "engine": engine,
        "runtime": asked.runtime or "default", "processors": os.cpu_count(), "load": os.getloadavg()[0],
    }))  # fmt: skip
    for part in (messages, starts, contexts, kills, dead_container):
        part(options, asked.rounds)
    if asked.rlm:
        peer(options, asked.rounds, asked.rlm)
    return 1 if asked.check and _missed else 0


if __name__ == "__main__":
    sys.exit(main())
