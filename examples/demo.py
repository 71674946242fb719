"""A Recursive Language Model at work, without a key and without a network.

The text is real: the Python sources of the standard library, 10 MB and more. The sandbox is real: the code runs in it,
searches the text, calls sub-models through the bridge, runs into a limit and goes on. Only the two models are scripted: the
root model says what a model would, and the sub-model reads its prompt and works its reply out of it. At the end the answer
is compared with one computed here in plain Python.

    python examples/demo.py                   # the best backend of this machine
    python examples/demo.py --backend monty
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import sysconfig
import time
from pathlib import Path
from typing import Final

from rlm_sandbox import RLM, Context, Grade, Limits, Policy, SandboxError
from rlm_sandbox.adapters import FakeAdapter
from rlm_sandbox.console import ConsoleListener
from rlm_sandbox.registry import SessionConfig, load_backend
from rlm_sandbox.trajectory import JsonlWriter

NEEDED_CHARS: Final = 10_000_000
NEEDLE: Final = "raise NotImplementedError"
TOP: Final = 12

QUESTION: Final = (
    f"Which file of the standard library says '{NEEDLE}' most often, what is it for, "
    f"and how many functions do the {TOP} files that say it most define together?"
)

#: What the runaway cell does to a variable that the next step needs, where a killed cell costs only itself.
SPOIL: Final = "top = []"
#: Backends that cannot undo a cell: what it did before its limit stays, so here it spoils nothing, and the state is ``kept``.
KEEP_STATE: Final = ("restricted",)

# What the root model says, one reply a step. The cells stay within the Python that every backend speaks.
SCRIPT: Final = [
    f"""I look at the text first, and search it for the phrase.

```repl
print(lenP(), "characters in", ctx.num_documents(), "documents; they begin:")
print(peek(160))
names = ctx.metadata()["files"]
hits = ctx.find("{NEEDLE}", max_matches=100000)
len(hits)
```""",
    f"""Now I count the matches in each document and keep the {TOP} files with the most.

```repl
separator = 7
lengths = ctx.document_lengths()
counts = {{}}
index = 0
end = lengths[0]
for hit in hits:
    while hit[0] >= end:
        index += 1
        end += separator + lengths[index]
    counts[index] = counts.get(index, 0) + 1
top = sorted(counts.items(), key=lambda item: (-item[1], names[item[0]]))[:{TOP}]
for index, count in top:
    print(count, names[index])
```""",
    # A mistake that no interrupt inside the guest can end: the loop is in C and never looks up. It has spoilt `top` by
    # then, which the next step needs, so the answer is right only if the state is really restored.
    f"""I look for the last number there is, to rank the files by it.

```repl
import itertools
{SPOIL}
last = max(itertools.count())
```""",
    f"""That loop could never end. It had emptied `top`, but the state is restored, so I go on: the sub-model counts the functions of
the {TOP} files, all at once.

```repl
prompts = []
for index, count in top:
    prompts.append("Count the function definitions in this file. Reply with the number only.\\n\\n" + ctx.get_document(index))
replies = llm_batch(prompts)
functions = sum([int(reply) for reply in replies])
print(replies, functions)
```""",
    """One more question to the sub-model, and the answer is complete.

```repl
first, most = top[0]
purpose = llm_query("Reply with the first line of this file's docstring.\\n\\n" + ctx.get_document(first))
answer = names[first] + " (" + str(most) + " times): " + purpose + " " + str(functions) + " functions in all."
answer
```""",
    "FINAL_VAR: answer",
]


def standard_library() -> list[tuple[str, str]]:
    """Name and source of the files of the standard library, its tests only if it is small without them.

    Raises:
        SystemExit: there are less than 10 MB of them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts[len(root.parts) :])
    )
    in_tests = {path for path in files if any("test" in part for part in path.parts[len(root.parts) :])}
    found: list[tuple[str, str]] = []
    size = 0
    for path in (*(path for path in files if path not in in_tests), *sorted(in_tests)):
        if path in in_tests and size >= NEEDED_CHARS:
            break
        try:
            source = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):  # a few are in other encodings, on purpose
            continue
        if source:
            found.append((path.relative_to(root).as_posix(), source))
            size += len(source)
    if size < NEEDED_CHARS:
        raise SystemExit(
            f"demo: this Python has only {size:,} characters of library source, and the demo wants {NEEDED_CHARS:,}; "
            f"install its test package or use a Python built from source"
        )
    return found


def sub_model() -> FakeAdapter:
    """A sub-model that does its small task on the text in its prompt."""

    def count_functions(prompt: str) -> str:
        time.sleep(0.3 + len(prompt) / 100_000)  # about as long as a fast model takes to begin
        return str(len(re.findall(r"^[ \t]*(?:async )?def \w", prompt.partition("\n\n")[2], re.MULTILINE)))

    def first_line(prompt: str) -> str:
        time.sleep(0.5)
        return (ast.get_docstring(ast.parse(prompt.partition("\n\n")[2])) or "no docstring").partition("\n")[0]

    adapter = FakeAdapter(model="scripted-sub-model")
    adapter.add_rule("Count the function definitions", count_functions)
    adapter.add_rule("first line of this file's docstring", first_line)
    return adapter


def expected_answer(documents: list[tuple[str, str]]) -> str:
    """The answer, worked out here and in another way: no sandbox, no offsets, no models."""
    ranked = sorted(documents, key=lambda document: (-document[1].count(NEEDLE), document[0]))[:TOP]
    name, source = ranked[0]
    purpose = (ast.get_docstring(ast.parse(source)) or "no docstring").partition("\n")[0]
    functions = sum(1 for _, text in ranked for line in text.split("\n") if re.match(r"[ \t]*(async )?def \w", line))
    return f"{name} ({source.count(NEEDLE)} times): {purpose} {functions} functions in all."


def run_demo(backend: str, trace_path: Path) -> bool:
    """Run the demo; True if the answer is right, and the endless loop was stopped and cost only itself."""
    documents = standard_library()
    context = Context.from_documents([source for _, source in documents], metadata={"files": [name for name, _ in documents]})
    trace_path.parent.mkdir(parents=True, exist_ok=True)
    state, script = "restored", SCRIPT
    if backend in KEEP_STATE:
        state = "kept"
        script = [
            reply.replace(SPOIL, "pass").replace("It had emptied `top`, but the state is restored", "The state is kept")
            for reply in SCRIPT
        ]
        isolation = load_backend(backend).capabilities(SessionConfig()).isolation
        print(f"note:       {backend} is opened with trusted=True, because the script is ours; its isolation: {isolation}")
    # The script is ours, so a backend that cannot enforce every limit from outside is acceptable if it is asked for by name.
    asked_for = backend not in ("auto", "jail")
    with ConsoleListener() as console, JsonlWriter(trace_path) as trajectory:
        rlm = RLM(
            FakeAdapter(script, model="scripted-model"),
            subcall_adapter=sub_model(),
            repl_backend=backend,
            limits=Limits(time_seconds=2, memory_mb=256),
            policy=Policy(max_steps=len(script) + 1, max_subcalls=50),
            accept=Grade.NONE if asked_for else Grade.HARD,
            trusted=asked_for,
            listeners=[console, trajectory],
        )
        answer, trace = rlm.run(QUESTION, context)
    expected = expected_answer(documents)
    stopped = [cell for cell in trace.cells if cell.outcome == "limit"]
    good = answer == expected and trace.verified and len(stopped) == 1 and stopped[0].state == state
    print(f"expected:   {expected}")
    print(f"checked:    {'the answer is right' if good else 'WRONG'}")
    print(f"trajectory: {trace_path}")
    return good


def main() -> int:
    """Parse the arguments and run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="A Recursive Language Model at work, without a key and without a network.")
    parser.add_argument("--backend", default="auto", help="where the code runs (default: the best of this machine)")
    parser.add_argument("--trace", type=Path, help="the trajectory (default: trajectories/demo-BACKEND.jsonl)")
    arguments = parser.parse_args()
    try:
        trace_path = arguments.trace or Path("trajectories", f"demo-{arguments.backend}.jsonl")
        return 0 if run_demo(arguments.backend, trace_path) else 1
    except (SandboxError, ValueError, OSError) as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
