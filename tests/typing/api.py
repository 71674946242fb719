"""The public API as a type checker sees it. Never executed: mypy reads it, and a wrong type here is a broken promise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_type

from rlm_sandbox import (
    Capabilities,
    Context,
    DockerOptions,
    ExecResult,
    Exposed,
    Feature,
    Grade,
    JailOptions,
    LimitHit,
    Limits,
    MontyOptions,
    OutputChunk,
    REPLProtocol,
    RestrictedOptions,
    SupportsFork,
    Usage,
    available,
    backend_names,
    expose,
    open_repl,
)
from rlm_sandbox.registry import Availability


def opening() -> None:
    assert_type(open_repl(), REPLProtocol)
    open_repl("jail", limits=Limits(time_seconds=5, memory_mb=256), accept=Grade.HARD, options=JailOptions())
    open_repl("docker", options=DockerOptions(runtime="runsc", cpus=2, image="runner:1", docker_host="unix:///run/docker.sock"))
    open_repl("monty", accept=Grade.COOPERATIVE, trusted=True, options=MontyOptions(max_processes=2), recovery=False)
    open_repl("restricted", accept=Grade.NONE, trusted=True, options=RestrictedOptions(process=True))
    open_repl(setup="x = 1", files={"data.csv": "data.csv"}, packages=("numpy",))
    Limits(time_seconds=None, host_calls=None)
    assert_type(backend_names(), tuple[str, ...])
    assert_type(available(), dict[str, Availability])

    open_repl("jail", options={"isolation": "namespaces"})  # type: ignore[arg-type]
    open_repl("jail", time_seconds=5)  # type: ignore[call-arg]
    Limits(time_second=5)  # type: ignore[call-arg]
    Limits(5)  # type: ignore[call-arg]
    Limits(memory_mb="lots")  # type: ignore[arg-type]
    JailOptions(isolation="none")  # type: ignore[arg-type]


def using(repl: REPLProtocol) -> None:
    with repl as session:
        assert_type(session, REPLProtocol)

    def listen(chunk: OutputChunk) -> None:
        print(chunk.stream, chunk.text)

    result = repl.exec("x = 1", limits=Limits(time_seconds=1), read=("x",), on_output=listen)
    assert_type(result, ExecResult)
    assert_type(repl.get("x"), Any)
    assert_type(repl.names(), dict[str, str])
    assert_type(repl.capabilities, Capabilities)
    assert_type(repl.limits, Limits)
    repl.set("x", [1, 2])
    repl.interrupt()
    repl.reset()
    repl.close()

    repl.exec(b"x = 1")  # type: ignore[arg-type]
    repl.exec("x", Limits())  # type: ignore[call-arg]
    repl.exec("x", read=["x"])  # type: ignore[arg-type]
    if isinstance(repl, SupportsFork):
        assert_type(repl.fork(), REPLProtocol)


def results(result: ExecResult) -> None:
    assert_type(result.ok, bool)
    assert_type(result.stdout, str)
    assert_type(result.value, str | None)
    assert_type(result.error, str | None)
    assert_type(result.limit, LimitHit | None)
    assert_type(result.lost_names, tuple[str, ...])
    assert_type(result.read, Mapping[str, Any])
    assert_type(result.usage, Usage)
    assert_type(result.usage.cpu_seconds, float | None)
    if result.outcome == "limit" and result.state == "restored":
        print(result.dropped_bytes)

    result.stdout = "forged"  # type: ignore[misc]
    if result.outcome == "timeout":  # type: ignore[comparison-overlap]
        print("no such outcome")


def binding(repl: REPLProtocol) -> None:
    class Index:
        def lookup(self, key: str) -> int:
            return len(key)

    async def ask(prompt: str) -> str:
        return prompt

    exposed = expose(Index(), methods=("lookup",), operators=["len"])
    assert_type(exposed, Exposed)
    repl.bind("index", exposed)
    repl.bind("ask", ask, errors=(TimeoutError,))
    repl.bind("inline", print, inline=True)
    context = Context.from_text("text", metadata={"source": "here"})
    assert_type(context, Context)
    assert_type(context.find("t", max_matches=3), list[tuple[int, int, str]])
    assert_type(context.get_document(0), str)
    assert_type(Context.from_documents(["a", "b"]), Context)
    assert_type(Context.from_files(["a.txt"]), Context)
    repl.bind("ctx", context)
    repl.bind("P", context.whole)

    repl.bind("ask", ask, errors=[TimeoutError])  # type: ignore[arg-type]


def capabilities(declared: Capabilities) -> None:
    assert_type(declared.grade("memory_mb"), Grade)
    assert_type(declared.has(Feature.GENERATORS), bool)
    assert_type(declared.language, frozenset[Feature])
    if declared.memory_mb >= Grade.COOPERATIVE:
        print(declared.isolation)
