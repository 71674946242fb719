"""The command line. Whatever goes wrong is one sentence and an exit status, never a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from .adapters import OpenAIAdapter
from .console import ConsoleListener, inert
from .context import Context
from .errors import SandboxError
from .limits import Limits
from .orchestrator import RLM, Listener, Policy, RunFinished, Trace
from .protocol import Grade, REPLProtocol
from .registry import backend_names, open_repl, prune
from .trajectory import JsonlWriter

__all__ = ("main",)

DEFAULT_MODEL: Final = "gpt-5-mini"

#: Exit statuses besides 0 and 2, which stands for a command line that cannot be parsed.
FAILED: Final = 1
NOT_VERIFIED: Final = 3
INTERRUPTED: Final = 130

RUN_HELP: Final = f"""Answer QUESTION over the text of FILES: a model writes Python, which runs in a sandbox.

The model is behind any endpoint that speaks OpenAI's chat completions. The key comes from OPENAI_API_KEY or
LLM_API_KEY, the address from --base-url or LLM_BASE_URL.

\b
Examples:
  rlm-sandbox run "Who tells the story?" moby-dick.txt
  rlm-sandbox run "Which of these leak a file?" src/*.py --trace run.jsonl
  rlm-sandbox run "Sum up chapter 3" book.txt --base-url http://localhost:8000/v1 --model qwen3
  rlm-sandbox run "How many refunds?" mails.txt --json | jq -r .answer

\b
Exit status:
  0    the model gave an answer
  {FAILED}    it could not be done; standard error says why
  2    the command line cannot be parsed
  {NOT_VERIFIED}    a budget ran out: the answer is the best so far, not verified
  {INTERRUPTED}  interrupted
"""

REPL_HELP: Final = f"""A prompt into a sandbox: what is typed runs there, as a model's code would.

With FILES, ctx is their text as a model finds it, and P is the text itself. Limits that are hit, and what became of the
variables, are said in words. What is piped in is cut into cells at blank lines; each has limits of its own.

\b
Examples:
  rlm-sandbox repl
  rlm-sandbox repl --backend monty --time-seconds 2 moby-dick.txt
  rlm-sandbox repl book.txt < cells.py

\b
Exit status:
  0    the input ended, and the last piped cell had run to its end
  {FAILED}    it could not be done, the session ended first, or the last piped cell failed
  2    the command line cannot be parsed
  {INTERRUPTED}  interrupted, where the input is piped
"""

DOCTOR_HELP: Final = f"""Try every backend and every isolation layer on this machine.

Each is tried in a process of its own, not looked up: PASS, CAUTION (works, with less than there could be), FAIL, or
SKIPPED (not tried, or nothing depends on it), with what follows from it and what to do.

\b
Exit status:
  0    --backend auto works here
  {FAILED}    it does not
"""

_LIMITS: Final = Limits()
_POLICY: Final = Policy()

app = typer.Typer(
    help="The execution layer for Recursive Language Models: a model's code runs in a sandbox with limits.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _backends(incomplete: str) -> list[str]:
    return [name for name in ("auto", *backend_names()) if name.startswith(incomplete)]


docker_app = typer.Typer(help="Containers of the docker backend.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(docker_app, name="docker")


def main() -> None:
    """The ``rlm-sandbox`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal that cannot show a character of the text gets its escape, and not an exception.
            stream.reconfigure(errors="backslashreplace")
    app()


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"rlm-sandbox {version('rlm-sandbox')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(help=RUN_HELP, short_help="Answer a question over text files.")
def run(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to answer.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Text files; each becomes a document.")],
    backend: Annotated[
        str, typer.Option(help=f"Where the code runs: auto, {', '.join(backend_names())}.", autocompletion=_backends)
    ] = "auto",
    model: Annotated[str, typer.Option(envvar="LLM_MODEL", help="The model to ask.")] = DEFAULT_MODEL,
    sub_model: Annotated[str | None, typer.Option(help="The model for sub-calls; the same, if not given.")] = None,
    base_url: Annotated[str | None, typer.Option(help="The endpoint, such as https://host/v1.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the trajectory to this file, as JSON lines.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; all else goes to standard error.")] = False,
    encoding: Annotated[str, typer.Option(help="The encoding of the files.")] = "utf-8",
    time_seconds: Annotated[float | None, typer.Option(help="Seconds one cell may compute.")] = _LIMITS.time_seconds,
    memory_mb: Annotated[int | None, typer.Option(help="Memory of the sandbox, in MiB.")] = _LIMITS.memory_mb,
    max_steps: Annotated[int, typer.Option(help="Replies of the model.")] = _POLICY.max_steps,
    max_subcalls: Annotated[int | None, typer.Option(help="Sub-calls in all.")] = _POLICY.max_subcalls,
    max_total_tokens: Annotated[int | None, typer.Option(help="Tokens in all, sub-calls included; no limit by default.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Seconds for the whole run; no limit by default.")] = None,
    trusted: Annotated[
        bool, typer.Option("--trusted", help="Accept limits that the backend does not enforce from outside the code.")
    ] = False,
) -> None:
    events = Trace()
    with contextlib.ExitStack() as listening:
        with _explained(SandboxError, OSError, ValueError):
            if backend != "auto" and backend not in backend_names():
                raise ValueError(f"unknown backend {backend!r}; choose from auto, {', '.join(backend_names())}")
            if not question.strip():
                raise ValueError("the question is empty; ask something")
            limits = replace(_LIMITS, time_seconds=time_seconds, memory_mb=memory_mb)
            policy = replace(
                _POLICY, max_steps=max_steps, max_subcalls=max_subcalls, max_total_tokens=max_total_tokens, max_seconds=max_seconds
            )
            context = Context.from_files(files, encoding=encoding)
            adapter = OpenAIAdapter(model, base_url=base_url)
            listeners: list[Listener] = [events]
            if trace is not None:
                listeners.append(listening.enter_context(_open_trace(trace, files)))
            listeners.append(
                listening.enter_context(ConsoleListener(Console(file=sys.stderr if as_json else sys.stdout, highlight=False)))
            )
            rlm = RLM(
                adapter,
                subcall_adapter=adapter if sub_model is None else OpenAIAdapter(sub_model, base_url=base_url),
                repl_backend=backend,
                limits=limits,
                policy=policy,
                accept=Grade.NONE if trusted else Grade.HARD,
                trusted=trusted,
                listeners=listeners,
            )
        try:
            with _explained(SandboxError):
                rlm.run(question, context)
        finally:
            if events.finished is not None:
                _report(events.finished, events, trace, as_json)
    if not events.verified:
        raise typer.Exit(NOT_VERIFIED)


@app.command(help=REPL_HELP, short_help="A prompt into a sandbox.")
def repl(
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="Text files: ctx, and P, their text.")] = None,
    backend: Annotated[
        str, typer.Option(help=f"Where the code runs: auto, {', '.join(backend_names())}.", autocompletion=_backends)
    ] = "auto",
    encoding: Annotated[str, typer.Option(help="The encoding of the files.")] = "utf-8",
    time_seconds: Annotated[float | None, typer.Option(help="Seconds one cell may compute.")] = _LIMITS.time_seconds,
    memory_mb: Annotated[int | None, typer.Option(help="Memory of the sandbox, in MiB.")] = _LIMITS.memory_mb,
    trusted: Annotated[
        bool, typer.Option("--trusted", help="Accept limits that the backend does not enforce from outside the code.")
    ] = False,
) -> None:
    from .repl.cells import split_cells
    from .repl.screen import Screen
    from .repl.shell import Shell

    typed = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Screen(Console(file=sys.stdout, highlight=False), Console(file=sys.stderr, highlight=False))
    with contextlib.ExitStack() as open_ones:
        with _explained(SandboxError, OSError, ValueError):
            if backend != "auto" and backend not in backend_names():
                raise ValueError(f"unknown backend {backend!r}; choose from auto, {', '.join(backend_names())}")
            limits = replace(_LIMITS, time_seconds=time_seconds, memory_mb=memory_mb)
            context = Context.from_files(files, encoding=encoding) if files else None
            cells = [] if typed else split_cells(_standard_input())
            accept = Grade.NONE if trusted else Grade.HARD
            session = open_ones.enter_context(open_repl(backend, limits=limits, accept=accept, trusted=trusted))
            if context is not None:
                session.bind("ctx", context)
                session.bind("P", context.whole)
        shell = Shell(session, screen)
        with _explained():
            if typed:
                from .repl.prompt import Prompt, open_history

                for line in _greeting(session, context):
                    screen.notice(line)
                ok = shell.converse(Prompt(open_history()))
            else:
                ok = shell.run_all(cells)
    if not ok:
        raise typer.Exit(FAILED)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("standard input is not UTF-8 text; give Python code") from None


def _greeting(session: REPLProtocol, context: Context | None) -> Iterator[str]:
    yield f"{session.capabilities.backend}: {session.capabilities.isolation}"
    limits = session.limits
    time_limit = "any time" if limits.time_seconds is None else f"{limits.time_seconds:g} s"
    memory = "any amount of memory" if limits.memory_mb is None else f"{limits.memory_mb:,} MiB"
    yield f"limits: {time_limit} for a cell, {memory}"
    if context is not None:
        documents = "1 document" if context.num_documents() == 1 else f"{context.num_documents():,} documents"
        yield f"ctx and P: {context.len_chars():,} characters in {documents}"
    yield "Ctrl-C interrupts a cell, Ctrl-D leaves"


@app.command(help=DOCTOR_HELP, short_help="Say what works on this machine, by trying it.")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    from .doctor import diagnose, render

    with _explained():
        waiting = Console(stderr=True, highlight=False)
        with waiting.status("trying") as status:
            diagnosis = diagnose(lambda what: status.update(f"trying {what}"))
    if as_json:
        typer.echo(json.dumps(diagnosis.to_json()))
    else:
        render(diagnosis, Console(file=sys.stdout, highlight=False))
    if not diagnosis.usable:
        raise typer.Exit(FAILED)


@docker_app.command(name="prune")
def docker_prune() -> None:
    """Remove containers whose host process is gone, or whose session has expired."""
    with _explained(SandboxError):
        removed = prune("docker")
    for name in removed:
        typer.echo(f"removed {inert(name)}")
    if not removed:
        typer.echo("nothing was left behind")


@contextlib.contextmanager
def _explained(*errors: type[Exception]) -> Iterator[None]:
    """End the command with the sentence of an expected error; anything else is a bug and keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("rlm-sandbox: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except errors as exc:
        # The fields of Limits and Policy are the options of this command.
        sentence = re.sub(r"\b(?:Limits|Policy)\.(\w+)", lambda found: "--" + found[1].replace("_", "-"), str(exc))
        typer.echo(f"rlm-sandbox: {inert(sentence.removesuffix('; write None for no limit'))}", err=True)
        raise typer.Exit(FAILED) from None


def _open_trace(path: Path, files: list[Path]) -> JsonlWriter:
    for file in files:
        with contextlib.suppress(OSError):  # not there yet
            if path.samefile(file):
                raise ValueError(f"--trace would overwrite the input file {str(path)!r}; choose another path")
    try:
        return JsonlWriter(path)
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno else "it is no file"
        raise OSError(f"cannot write the trace {str(path)!r}: {reason}; choose another --trace path") from None


def _report(finished: RunFinished, events: Trace, trace: Path | None, as_json: bool) -> None:
    if trace is not None:
        typer.echo(f"trajectory: {inert(str(trace))}", err=as_json)
    if not as_json:
        return
    started = events.started
    report = {
        "answer": finished.answer,
        "verified": finished.verified,
        "stop_reason": finished.stop_reason,
        "error": finished.error,
        "usage": {
            "steps": finished.steps,
            "cells": finished.cells,
            "subcalls": finished.subcalls,
            "input_tokens": finished.input_tokens,
            "output_tokens": finished.output_tokens,
            "seconds": round(finished.seconds, 3),
        },
        "backend": None if started is None else started.backend,
        "model": None if started is None else started.model,
        "trace": None if trace is None else str(trace),
    }
    typer.echo(json.dumps(report))
