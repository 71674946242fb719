"""Ordinary model-written cells give the same result on every backend, or the difference is listed in its limitations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

from rlm_sandbox import Context, Limits, REPLProtocol, backend_names

from ..conftest import VARIANTS, declared_by, lowest_grade, open_variant, require_usable, variant_state

HERE: Final = Path(__file__).parent
LIMITATIONS: Final = HERE.parents[1] / "docs" / "limitations"
#: Every other backend is compared with this one, which runs CPython itself.
REFERENCE: Final = "jail"
TEXT: Final = "".join(f"line {n} has id={n * 7} and {'a needle' if n % 5 == 0 else 'hay'} in it\n" for n in range(20))


@dataclass(frozen=True)
class Case:
    """One session's cells, the names to read back at the end, and the differences a backend may have listed."""

    name: str
    cells: tuple[str, ...]
    read: tuple[str, ...]
    differs: frozenset[str]


def _cases() -> Iterator[Case]:
    for path in sorted((HERE / "corpus").glob("*.cells")):
        for block in path.read_text(encoding="utf-8").split("=== ")[1:]:
            head, _, source = block.partition("\n")
            name, _, read = head.partition("|")
            found = re.search(r"^\| differs: ([a-z-]+(?:, [a-z-]+)*)\n", source, re.MULTILINE)
            if found:
                source = source[: found.start()]
            cells = tuple(part.strip("\n") for part in re.split(r"^---\s*$", source, flags=re.MULTILINE))
            names = tuple(part.strip() for part in read.partition("read:")[2].split(",") if part.strip())
            yield Case(f"{path.stem}: {name.strip()}", cells, names, frozenset(found[1].split(", ") if found else ()))


CASES: Final = tuple(_cases())


def _fail(message: str) -> str:
    raise ValueError(message)


async def _ask_async(prompt: str) -> str:
    return f"async {len(prompt)}"


_kept: Final[dict[str, REPLProtocol]] = {}


@pytest.fixture(scope="module", autouse=True)
def _close_kept() -> Iterator[None]:
    yield
    while _kept:
        _kept.popitem()[1].close()


@contextmanager
def _session(backend: str) -> Iterator[REPLProtocol]:
    """A session nobody has used. One in a container takes half a second to open, so it is reset: as good as new, by the contract."""
    accept = lowest_grade(declared_by(backend), Limits())
    if VARIANTS[backend][0] != "docker":
        with open_variant(backend, accept=accept, trusted=True) as repl:  # the cells are ours
            yield repl
        return
    if backend in _kept:
        _kept[backend].reset()
    else:
        _kept[backend] = open_variant(backend, accept=accept)
    yield _kept[backend]


def run(backend: str, case: Case) -> list[tuple[Any, ...]]:
    """What each cell of a case came to: outcome, type of the error, value, output, and the values read after the last."""
    context = Context.from_text(TEXT)
    results: list[tuple[Any, ...]] = []
    with _session(backend) as repl:
        repl.bind("llm_query", lambda prompt: f"answer {len(prompt)}")
        repl.bind("llm_batch", lambda prompts: [f"answer {len(prompt)}" for prompt in prompts])
        repl.bind("ask_async", _ask_async)
        repl.bind("fail", _fail)
        repl.bind("ctx", context)
        repl.bind("P", context.whole)
        repl.set("given", {"list": [1, 2], "text": "é"})
        for number, code in enumerate(case.cells, 1):
            result = repl.exec(code, read=case.read if number == len(case.cells) else ())
            error = (result.error or "").partition(":")[0]
            results.append((result.outcome, error, result.value, result.stdout, dict(result.read)))
    return results


@cache
def reference(case: Case) -> list[tuple[Any, ...]]:
    """The reference backend's results; the test is skipped where it does not work."""
    require_usable(REFERENCE, variant_state(REFERENCE))
    return run(REFERENCE, case)


def listed(backend: str) -> frozenset[str]:
    """The differences that a backend's limitations describe."""
    path = LIMITATIONS / f"{VARIANTS[backend][0]}.md"
    return frozenset(re.findall(r"<!-- differs: ([a-z-]+) -->", path.read_text(encoding="utf-8"))) if path.exists() else frozenset()


def test_the_corpus_is_a_corpus() -> None:
    assert len(CASES) >= 100
    assert len({case.name for case in CASES}) == len(CASES)
    used = frozenset().union(*(case.differs for case in CASES))
    for backend in backend_names():
        assert listed(backend) <= used, "a difference is listed that no case shows"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_cell_means_the_same(backend: str, case: Case) -> None:
    expected = reference(case)
    assert all(outcome in ("ok", "error") for outcome, *_ in expected)
    found = expected if backend == REFERENCE else run(backend, case)
    known = case.differs & listed(backend)
    if known:
        assert found != expected, f"{backend} no longer differs in {', '.join(known)}: take it out of docs/limitations/{backend}.md"
    else:
        assert found == expected
