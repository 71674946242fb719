"""Input files, packages of the host, and files brought out, on every backend that declares them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlm_sandbox import GuestError, InputRefused, LimitExceeded, Limits, REPLProtocol, open_repl
from rlm_sandbox.protocol import Capabilities, SupportsReadFile

from ..conftest import OpenSession

has_files = pytest.mark.only_if(lambda capabilities: capabilities.files, "it mounts no input files")
has_packages = pytest.mark.only_if(lambda capabilities: capabilities.packages, "it has no packages of the host")
#: A dependency of this project in pure Python, with records of its files.
PACKAGE = "packaging"


@contextmanager
def opened(backend: str, **arguments: Any) -> Iterator[REPLProtocol]:
    with open_repl(backend, trusted=True, **arguments) as repl:
        yield repl


def value(repl: REPLProtocol, code: str) -> str | None:
    result = repl.exec(code)
    assert result.outcome == "ok", result
    return result.value


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """A file, a directory with a link that leads out of it, and a link to the file."""
    tmp_path.chmod(0o755)
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "part.txt").write_text("part")
    (folder / "out").symlink_to("/etc/passwd")
    (tmp_path / "link").symlink_to("data.csv")
    return {"data.csv": tmp_path / "data.csv", "folder": folder, "latest": tmp_path / "link"}


@has_files
def test_files_and_directories_are_read_only_inputs(backend: str, inputs: dict[str, Path]) -> None:
    before = {path: (path.stat().st_mode, path.stat().st_mtime_ns) for path in inputs.values()}
    with opened(backend, files=inputs) as repl:
        assert value(repl, "open('/input/data.csv').read()") == repr("a,b\n1,2\n")
        assert value(repl, "open('/input/latest').read()") == repr("a,b\n1,2\n")
        assert value(repl, "import os; sorted(os.listdir('/input'))") == repr(sorted(inputs))
        assert value(repl, "open('/input/folder/part.txt').read()") == repr("part")
        attempts = ["open('/input/data.csv', 'a')", "os.chmod('/input/data.csv', 0)", "os.remove('/input/data.csv')",
                    "os.utime('/input/data.csv', (0, 0))", "open('/input/new', 'w')", "open('/input/folder/new', 'w')",
                    "os.rename('/input/data.csv', '/input/other')", "os.truncate('/input/data.csv', 0)",
                    "open('/input/folder/out').read()"]  # fmt: skip
        for attempt in attempts:
            assert repl.exec(attempt).outcome == "error", attempt
    assert {path: (path.stat().st_mode, path.stat().st_mtime_ns) for path in inputs.values()} == before
    assert sorted(path.name for path in inputs["folder"].iterdir()) == ["out", "part.txt"]


@has_files
def test_inputs_are_there_after_a_reset_and_a_kill(backend: str, inputs: dict[str, Path]) -> None:
    with opened(backend, files=inputs, limits=Limits(time_seconds=0.5)) as repl:
        assert repl.exec("while True:\n    try:\n        while True: pass\n    except BaseException: pass").outcome == "limit"
        assert value(repl, "len(open('/input/data.csv').read())") == "8"
        repl.reset()
        assert value(repl, "len(open('/input/data.csv').read())") == "8"


@has_files
@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/abs", "a\nb", "x" * 500])
def test_a_name_that_is_no_plain_file_name_is_refused(backend: str, inputs: dict[str, Path], name: str) -> None:
    with pytest.raises(InputRefused) as refused, opened(backend, files={name: inputs["data.csv"]}):
        pass
    assert refused.value.remedy


@has_files
def test_what_cannot_be_an_input_is_refused_with_a_remedy(backend: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    wrong = [tmp_path / "missing", tmp_path / "pipe", tmp_path / "loop", "/dev/null", "/dev/zero", "/proc/self/environ", "/proc"]
    for path in wrong:
        with pytest.raises(InputRefused) as refused, opened(backend, files={"input": path}):
            pass
        assert refused.value.name == "input"
        assert refused.value.remedy


@has_packages
def test_packages_of_the_host_can_be_imported(backend: str) -> None:
    with opened(backend, packages=(PACKAGE,)) as repl:
        assert value(repl, "from packaging.version import Version; Version('1.2') < Version('1.10')") == "True"
        where = value(repl, "import packaging; packaging.__file__") or ""
        assert str(Path.home()) not in where
        assert "site-packages" not in where
        assert repl.exec("import pytest").error == "ModuleNotFoundError: No module named 'pytest'"
        assert repl.exec("open(packaging.__file__, 'a')").outcome == "error"
        assert repl.exec("import os; open(os.path.dirname(packaging.__file__) + '/new.py', 'w')").outcome == "error"
    with opened(backend) as repl:
        assert (repl.exec("import packaging").error or "").startswith("ModuleNotFoundError")


@has_packages
def test_an_unknown_package_is_refused_at_the_start(backend: str) -> None:
    with pytest.raises(InputRefused, match="no such package") as refused, opened(backend, packages=("no-such-package-at-all",)):
        pass
    assert refused.value.remedy


@pytest.fixture
def reader(open_session: OpenSession, capabilities: Capabilities) -> Any:
    repl = open_session(limits=Limits(value_bytes=100_000))
    if not isinstance(repl, SupportsReadFile):
        assert not capabilities.files
        pytest.skip(f"{capabilities.backend}: it has no read_file()")
    return repl


def test_a_file_is_brought_out(reader: Any) -> None:
    assert reader.exec("open('answer.bin', 'wb').write(bytes(range(256)) * 300)").outcome == "ok"
    for name in ("answer.bin", "/tmp/answer.bin", "./x/../answer.bin"):
        assert reader.read_file(name) == bytes(range(256)) * 300
    assert reader.exec("open('empty', 'w').close(); open('täst', 'w').write('ä')").outcome == "ok"
    assert reader.read_file("empty") == b""
    assert reader.read_file("täst") == "ä".encode()


def test_a_file_is_capped_at_value_bytes(reader: Any) -> None:
    reader.exec("open('exact', 'wb').write(bytes(100_000)); open('more', 'wb').write(bytes(100_001))")
    assert len(reader.read_file("exact")) == 100_000
    with pytest.raises(LimitExceeded) as exceeded:
        reader.read_file("more")
    assert exceeded.value.kind == "value_bytes"
    assert reader.exec("1 + 1").value == "2"


@pytest.mark.parametrize("name", ["../etc/passwd", "/etc/passwd", "", ".", "/tmp", "x/../..", "a\0b", "\ud800", "x" * 5_000])
def test_a_name_outside_of_tmp_is_refused(reader: Any, name: str) -> None:
    with pytest.raises(ValueError):
        reader.read_file(name)


def test_what_is_no_regular_file_is_not_read(reader: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("host")
    reader.exec(f"import os\nos.mkdir('folder')\nos.symlink({str(secret)!r}, 'out')\nos.symlink('/dev/urandom', 'device')")
    reader.exec("os.symlink('loop', 'loop')\nos.symlink('/proc/1/environ', 'environ')")
    for name in ("missing", "folder", "out", "device", "loop", "environ"):
        with pytest.raises(GuestError):
            reader.read_file(name)
    with pytest.raises(TypeError):
        reader.read_file(b"bytes")
    assert reader.exec("1 + 1").value == "2"
