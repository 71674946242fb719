"""Contexts in the jail: the whole of `ctx` on the mapped text at every width, and texts beyond the memory of guest and machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlm_sandbox import Context, Limits, REPLProtocol, open_repl
from rlm_sandbox.context import backing, source
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable

#: One of each kind in which CPython keeps a text: ASCII, one byte, two bytes, four bytes a character.
WIDEST = {"ascii": "n", "latin": "\u00e9", "two": "\u20ac", "four": "\U0001f600"}

#: Every operation of a context, and Python's own on the same object.
OPERATIONS = (
    "len(ctx)", "bool(ctx)", "ctx.len_chars()", "ctx.num_documents()", "ctx.document_lengths()", "ctx.metadata()", "list(ctx)",
    "ctx.find(W)", "ctx.find(W, max_matches=2)", "ctx.find('needle', start=40)", "ctx.find('needle', end=40)", "ctx.find('absent')",
    "ctx.find('NEEDLE', case_sensitive=False)", r"ctx.find('n\\w+e', regex=True)", "ctx.find(W + '.', regex=True)",
    "ctx.slice(3, 30)", "ctx.slice(-5, 10**6)", "ctx[5:25]", "ctx[-7:]", "ctx[::3]", "ctx[4]", "ctx[-1]",
    "ctx.chunk(17)", "ctx.chunk(17, overlap=4)", "ctx.chunk_documents(2)", "ctx.get_document(0)", "ctx.get_document(2)",
    "ctx.page(1)", "ctx.page(2)", "ctx.page(9)", "W in ctx", "'absent' in ctx", "chr(0x10fffe) in ctx",
)  # fmt: skip


@pytest.fixture(autouse=True)
def usable() -> None:
    require_usable("jail", load_backend("jail").probe())


@pytest.fixture
def repl() -> Iterator[REPLProtocol]:
    with open_repl("jail", limits=Limits(memory_mb=64), recovery=False) as repl:
        yield repl


@pytest.mark.parametrize("stored_as", ["text", "files"])
@pytest.mark.parametrize("kind", WIDEST)
def test_every_operation_at_every_width_is_the_same_on_both_sides(
    kind: str, stored_as: str, repl: REPLProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = WIDEST[kind]
    texts = [
        f"a needle {wide} and more {wide}{wide}",
        f"<!-- Page 1 -->one needle{wide}<!-- Page 2 -->two",
        wide * 5,
        "the needle last",
    ]
    here = Context.from_documents(texts, metadata={"files": ["0", "1", "2", "3"]})
    context = here
    if stored_as == "files":
        monkeypatch.setattr(source, "_STREAMED_BYTES", 0)
        for index, text in enumerate(texts):
            (tmp_path / str(index)).write_text(text, encoding="utf-8")
        context = Context.from_files([tmp_path / str(index) for index in range(4)])
    repl.bind("ctx", context)
    repl.bind("P", context.whole)
    repl.set("W", wide)
    cell = "answers = [" + ", ".join(OPERATIONS) + ", P, P.upper(), P.count(W), P.encode('utf-8'), hash(P) == hash(P[:9] + P[9:])]"
    result = repl.exec(cell, read=("answers",))
    assert result.ok, result
    names: dict[str, Any] = {"ctx": here, "W": wide, "P": here.text}
    exec(cell, names)
    for operation, found, expected in zip(OPERATIONS, result.read["answers"], names["answers"], strict=False):
        assert found == expected, operation
    assert result.read["answers"] == names["answers"]


def test_a_context_beyond_the_memory_limit(repl: REPLProtocol) -> None:
    """150 MB in a guest that may have 64: searched to its end, and what the guest itself holds did not grow."""
    text = "0123456789abcde\n" * 9_400_000 + "needle"
    worker = psutil.Process(repl._guest._worker_pid)  # type: ignore[attr-defined]
    before = _anonymous_kb(worker.pid)
    repl.bind("ctx", Context.from_text(text))
    assert repl.exec("ctx.find('needle')[0][0]").value == str(len(text) - 6)
    assert _anonymous_kb(worker.pid) - before < 1024
    assert "MemoryError" in str(repl.exec("copy = ctx[:]*2").error), "a copy is the guest's own memory"


def _anonymous_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError("no such process")


def test_a_context_that_is_too_large_for_memory_is_mapped_from_a_file(
    repl: REPLProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backing, "memory_budget", lambda: 1 << 20)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(source, "_STREAMED_BYTES", 0)
    line = "0123456789 \u20ac abc\n"
    (tmp_path / "large.txt").write_text(line * 200_000 + "needle", encoding="utf-8")
    context = Context.from_files([tmp_path / "large.txt"])
    stored = context.memory_file()
    assert not stored.in_memory
    assert os.fstat(stored.fd).st_nlink == 0
    repl.bind("ctx", context)
    assert repl.exec("ctx.find('needle')[0][0] == len(ctx) - 6 and ctx[:17]").value == repr(line)
    assert [entry.name for entry in tmp_path.iterdir()] == ["large.txt"]
    with open_repl("jail", recovery=False) as other:
        other.bind("P", context.whole)
        assert other.exec("P[-6:]").value == "'needle'"
