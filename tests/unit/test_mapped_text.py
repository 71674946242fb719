"""A real ``str`` over a memory file. What could crash the interpreter runs in a process of its own."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlm_sandbox import Context
from rlm_sandbox.runners.mapped_text import load_text, map_text, self_test

KINDS = {"ascii": "\x7f", "latin-1": "\xe9", "ucs2": "\u20ac", "surrogates": "\ud83d\ude00", "ucs4": "\U0001f600"}

# The attacks on the header: every one of them ended the process in a version without the extra references or the NUL.
ATTACKS = """
import gc, os, re, resource, sys
from rlm_sandbox.context import Context
from rlm_sandbox.runners.mapped_text import map_text

for widest in ("\\x7f", "\\xe9", "\\u20ac", "\\U0001f600"):
    text = ("needle " + widest) * 5000
    context = Context.from_text(text)
    file = context.memory_file()
    P = map_text(file.fd, file.chars, file.width, file.ascii_only)
    P += "x"
    assert P == text + "x"
    P = map_text(file.fd, file.chars, file.width, file.ascii_only)
    for _ in range(1000):
        Q = P
        del Q
    keep = [P] * 100_000
    del keep, P
    gc.collect()
    P = map_text(file.fd, file.chars, file.width, file.ascii_only)
    sys.intern(P)
    setattr(type("C", (), {}), "a" + P[:3], 1)
    assert getattr(type("C", (), {P: 1}), P) == 1
    assert re.findall(r"needle (.)", P)[:2] == [widest, widest]
    assert P.encode("utf-8") == text.encode("utf-8")
    assert P.encode("utf-8") is not P
    assert hash(P) == hash(text) and P is not text and P.upper() == text.upper() and "".join([P]) == text
    assert P.replace("needle", "") == text.replace("needle", "") and P.split() == text.split()
    if os.fork() == 0:
        assert P == text
        del P
        gc.collect()
        os._exit(0)
    assert os.wait()[1] == 0
    assert sys.getsizeof(P) > len(text)

page = os.sysconf("SC_PAGE_SIZE")
for length in (1, page - 1, page, page + 1, 2 * page):
    context = Context.from_text("1" * length)
    file = context.memory_file()
    P = map_text(file.fd, file.chars, file.width, file.ascii_only)
    assert float(P) == float("1" * length)
for single in ("a", "\\xe9", "\\u20ac", "\\U0001f600"):
    context = Context.from_text(single)
    file = context.memory_file()
    P = map_text(file.fd, file.chars, file.width, file.ascii_only)
    assert P == single and {single: 1}[P] == 1 and sys.intern(P) == single and P in "x" + single
big = Context.from_text("x" * 50_000_000)
file = big.memory_file()
before = int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
P = map_text(file.fd, file.chars, file.width, file.ascii_only)
assert P.find("y") == -1
after = int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
assert after - before < 1000, (before, after)
print("survived")
"""


def _mapped(text: str) -> str:
    context = Context.from_text(text)
    file = context.memory_file()
    return map_text(file.fd, file.chars, file.width, file.ascii_only)


def test_it_works_in_this_interpreter() -> None:
    assert self_test()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapped_text_is_its_text(kind: str) -> None:
    for length in (1, 100, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 1):
        text = (KINDS[kind] + "needle") * length
        mapped = _mapped(text)
        assert type(mapped) is str
        assert mapped == text
        assert mapped.rfind("needle") == text.rfind("needle")
        assert hash(mapped[3:]) == hash(text[3:])
        assert mapped[-1] + mapped[:9] == text[-1] + text[:9]


def test_the_empty_text_is_the_empty_string() -> None:
    assert _mapped("") is "".join(())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapped", [False, True])
def test_load_text_both_ways(kind: str, mapped: bool) -> None:
    for text in ("", KINDS[kind], "text " + KINDS[kind] * 5000):
        context = Context.from_text(text)
        file = context.memory_file()
        assert load_text(file.fd, file.chars, file.width, file.ascii_only, mapped=mapped) == text


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_is_too_short_is_refused_not_a_bus_error(tmp_path: Path, mapped: bool) -> None:
    (tmp_path / "short").write_bytes(b"x" * mmap.PAGESIZE)
    with (tmp_path / "short").open("rb") as file:
        for chars in (mmap.PAGESIZE, 1 << 60, -1):
            with pytest.raises(ValueError, match="shorter than its text"):
                load_text(file.fileno(), chars, 1, True, mapped=mapped)
        with pytest.raises(ValueError, match="1, 2 or 4"):
            load_text(file.fileno(), 1, 3, True, mapped=mapped)


def test_a_descriptor_that_cannot_be_mapped_is_an_error() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(ValueError, match="shorter"):
            map_text(reader, 10, 1, True)
    finally:
        os.close(reader)
        os.close(writer)


def _pythons() -> list[str]:
    """This interpreter and the others of the versions we support, where a version manager has them."""
    found = {f"3.{sys.version_info.minor}": sys.executable}
    for path in sorted(Path.home().glob(".pyenv/versions/3.*/bin/python")):
        minor = path.parts[-3].split(".")[1]
        if int(minor) >= 11:
            found.setdefault(f"3.{minor}", str(path))
    return list(found.values())


@pytest.mark.parametrize("python", _pythons())
def test_nothing_done_to_a_mapped_text_ends_the_process(python: str) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [python, "-I", "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{ATTACKS}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "survived\n", "")
