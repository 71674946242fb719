"""Where a context's text comes from, and its memory file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rlm_sandbox import Context
from rlm_sandbox.context import MemoryFile, backing, source, stored


def test_documents_are_joined_and_keep_their_bounds() -> None:
    context = Context.from_documents(iter(["first", "", "th\u00efrd"]))
    assert context.text == "first\n\n---\n\n\n\n---\n\nth\u00efrd"
    assert list(context) == ["first", "", "th\u00efrd"]
    assert memoryview(context.spans).format == "Q"  # type: ignore[arg-type]
    assert list(Context.from_documents(["a", "b"], separator="")) == ["a", "b"]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Context.from_documents("text"), TypeError, "use from_text"),
        (
            lambda: Context.from_documents([b"x"]),  # type: ignore[list-item]
            TypeError,
            "document 0 is a bytes",
        ),
        (lambda: Context.from_documents([]), ValueError, "no documents"),
        (
            lambda: Context.from_text(b"x"),  # type: ignore[arg-type]
            TypeError,
            "decode bytes",
        ),
        (lambda: Context.from_files([]), ValueError, "no files"),
        (lambda: Context.from_files("a.txt"), TypeError, "several paths"),
        (lambda: Context.from_files(["a\0b"]), ValueError, "NUL"),
    ],
)
def test_wrong_arguments_are_named(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_files_become_documents_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    (tmp_path / "b.txt").write_text("tw\u00f6", encoding="utf-8")
    context = Context.from_files([tmp_path / "a.txt", str(tmp_path / "b.txt")])
    assert list(context) == ["one\r\n", "tw\u00f6"]
    assert context.metadata()["files"] == ["a.txt", "b.txt"]
    assert str(tmp_path) not in repr((context.metadata(), context.text, context))


def test_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("h\u00e9", encoding="utf-16")
    assert Context.from_files([tmp_path / "a.txt"], encoding="utf-16").text == "h\u00e9"
    with pytest.raises(ValueError, match="unknown encoding 'utf-17'"):
        Context.from_files([tmp_path / "a.txt"], encoding="utf-17")


def test_what_cannot_be_read_says_so_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "nul").write_bytes(b"PK\x03\x04\x00\x00")
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    expected: list[tuple[Path, type[Exception], str]] = [
        (tmp_path / "absent\x1b[31m", FileNotFoundError, r"\\x1b\[31m': No such file or directory; check the path"),
        (tmp_path, IsADirectoryError, "is a directory; name the files"),
        (Path("/dev/zero"), OSError, "not a regular file"),
        (tmp_path / "empty", ValueError, "is empty; leave it out"),
        (tmp_path / "nul", ValueError, "binary file"),
        (tmp_path / "latin", ValueError, r"is not utf-8 text \(byte 3 does not fit\); convert it"),
    ]
    for path, error, words in expected:
        with pytest.raises(error, match=words) as caught:
            Context.from_files([path])
        assert type(caught.value) is error
        assert "\n" not in str(caught.value)


def _content(file: MemoryFile) -> bytes:
    return os.pread(file.fd, 1 << 24, 0)


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("", 1),
        ("plain", 1),
        ("caf\u00e9", 1),
        ("x" * 50 + "\u20ac", 2),
        ("\ufeff\ud83d\ude00 \ude00", 2),
        ("\U0001f600 \ud800", 4),
        ("a" * mmap.PAGESIZE, 1),
        ("\u20ac" * (mmap.PAGESIZE // 2), 2),
    ],
)
def test_the_memory_file_holds_the_text_at_its_own_width(text: str, width: int) -> None:
    context = Context.from_text(text)
    file = context.memory_file()
    assert (file.chars, file.width, file.ascii_only) == (len(text), width, text.isascii())
    content = _content(file)
    assert len(content) % mmap.PAGESIZE == 0
    assert stored.decode_stored(content[: len(text) * width], width) == text
    assert not any(content[len(text) * width :])
    assert len(content) >= (len(text) + 1) * width


@pytest.mark.parametrize("late", ["\u00e9", "\u20ac", "\U0001f600"])
def test_a_wide_character_after_the_first_slice(monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    monkeypatch.setattr(stored, "_SLICE_CHARS", 7)
    text = "abc \u00e9"[:4] * 10 + late + "end"
    context = Context.from_text(text)
    file = context.memory_file()
    assert stored.decode_stored(_content(file)[: file.chars * file.width], file.width) == text


def test_the_memory_file_is_sealed_and_closed_on_exec() -> None:
    context = Context.from_text("secret")
    fd = context.memory_file().fd
    assert fcntl.fcntl(fd, backing._F_ADD_SEALS + 1) == 0xF  # F_GET_SEALS: seal, shrink, grow, write
    assert not os.get_inheritable(fd)
    for attempt in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 1), lambda: os.ftruncate(fd, 1 << 20)):
        with pytest.raises(PermissionError):
            attempt()


def test_a_python_built_against_an_old_libc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    context = Context.from_text("text")
    file = context.memory_file()
    assert _content(file).startswith(b"text\0")
    assert not os.get_inheritable(file.fd)


def test_the_memory_file_is_written_once() -> None:
    context = Context.from_text("x" * 100_000)
    files: list[MemoryFile] = []
    threads = [threading.Thread(target=lambda: files.append(context.memory_file())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files) == 8
    assert len(set(files)) == 1


def test_the_memory_file_is_closed_with_the_context() -> None:
    context = Context.from_text("text")
    fd = context.memory_file().fd
    inode = os.fstat(fd).st_ino
    del context
    gc.collect()
    with contextlib.suppress(OSError):  # closed
        assert os.fstat(fd).st_ino != inode  # or somebody else's by now


# ---- large contexts


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of any size are stored while they are read, in pieces that cut through characters."""
    monkeypatch.setattr(source, "_STREAMED_BYTES", 0)
    monkeypatch.setattr(source, "_READ_BYTES", 3)
    monkeypatch.setattr(stored, "_SLICE_CHARS", 4)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(
    "texts",
    [
        ["plain text", "more of it"],
        ["plain text, then caf\u00e9", "na\u00efve"],
        ["plain", "caf\u00e9", "\u20ac 5 and \ufeff inside", "again plain"],
        ["first narrow " * 5, "then \U0001f600 wide", "\u20ac"],
        ["\U0001f600" * 9, "narrow"],
    ],
)
def test_large_files_become_the_same_context(texts: list[str], tmp_path: Path) -> None:
    paths = []
    for index, text in enumerate(texts):
        paths.append(tmp_path / f"{index}.txt")
        paths[-1].write_bytes(b"\xef\xbb\xbf" * (index == 0) + text.encode())
    context = Context.from_files(paths)
    plain = Context.from_documents(texts)
    assert context._stored is not None, "it was stored while it was read"
    assert (len(context), list(context.spans), context.document_lengths()) == (
        len(plain),
        list(plain.spans),
        plain.document_lengths(),
    )
    assert list(context) == texts
    file, expected = context.memory_file(), plain.memory_file()
    assert (file.chars, file.width, file.ascii_only) == (expected.chars, expected.width, expected.ascii_only)
    assert _content(file) == _content(expected)
    for pattern in ("text", "e", "\u20ac", "\U0001f600", "\x00", "absent"):
        assert context.find(pattern) == plain.find(pattern), pattern
        assert (pattern in context) == (pattern in plain)
    assert [context.slice(at, at + 3) for at in range(len(plain))] == [plain.slice(at, at + 3) for at in range(len(plain))]
    assert context.chunk(7, 2) == plain.chunk(7, 2)
    assert context.chunk_documents(2) == plain.chunk_documents(2)
    assert (context[-1], context[2:9:3], context[9:2]) == (plain[-1], plain[2:9:3], plain[9:2])
    assert not isinstance(context._text, str), "none of this needs the text in memory"
    assert context.find("[a-z]+", regex=True) == plain.find("[a-z]+", regex=True)
    assert context.text == plain.text


@pytest.mark.usefixtures("streamed")
def test_what_cannot_be_streamed_says_so_and_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("good")
    (tmp_path / "empty").touch()
    (tmp_path / "nul").write_bytes(b"text, then PK\x03\x04\x00\x00")
    (tmp_path / "latin").write_bytes(b"a caf\xc3\xa9 and a caf\xe9 au lait")
    (tmp_path / "cut").write_bytes(b"the end of a caf\xc3")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name, words in (
        ("empty", "is empty; leave it out"),
        ("nul", "binary file"),
        ("latin", r"is not utf-8 text \(byte 17 does not fit\); convert it"),
        ("cut", r"byte 16 does not fit"),
        ("absent", "No such file"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            Context.from_files([tmp_path / "good", tmp_path / name])
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def _opened(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


@pytest.mark.parametrize("budget", [0, 100])
def test_a_text_too_large_for_memory_goes_to_a_file_without_a_name(
    budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget of nothing: it begins there. One that is met on the way: it moves, and nothing is lost."""
    monkeypatch.setattr(backing, "memory_budget", lambda: budget)
    monkeypatch.setattr(stored, "_SLICE_CHARS", 16)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    text = "narrow at first, " * 4 + "\u20ac " * 30
    writer = stored.TextWriter(1)
    writer.write(text)
    file = writer.finish()
    try:
        assert not file.in_memory
        assert str(tmp_path) in _opened(file.fd)
        assert not list(tmp_path.iterdir())
        assert fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert stored.decode_stored(_content(file)[: file.chars * file.width], file.width) == text
        with pytest.raises(OSError):
            os.pwrite(file.fd, b"x", 0)
    finally:
        os.close(file.fd)


def test_a_full_disk_is_an_error_that_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"no room to store the context.*TMPDIR") as caught:
        Context.from_text("text").memory_file()
    assert caught.value.errno == errno.ENOSPC


_PEAK = """
import sys
from pathlib import Path
from rlm_sandbox import Context

def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

before = status("VmHWM:")
context = Context.from_files(sys.argv[1:])
context.memory_file()
assert context[:6] == "needle" and "needle" not in context[7:1_000_007] and len(context) > 60_000_000, len(context)
print(status("VmHWM:") - before, status("RssAnon:"))
"""


def test_large_files_are_never_held_by_the_host(tmp_path: Path) -> None:
    """64 MB: the peak of what the host has in memory grows by a small part of it."""
    path = tmp_path / "large.txt"
    with path.open("w") as file:
        file.write("needle ")
        for _ in range(64):
            file.write("0123456789abcde\n" * 62_500)
    found = subprocess.run([sys.executable, "-c", _PEAK, path], capture_output=True, text=True, timeout=60, check=True)
    grown_kb, _ = map(int, found.stdout.split())
    assert grown_kb < 16_000, found.stdout
