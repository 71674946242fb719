"""Where the wasm backend's component and compiled code come from: whole and the user's own, or made again, or one clear error."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import wasmtime
import wasmtime.component

from rlm_sandbox import BackendUnavailable, WasmOptions, available, open_repl, usercache
from rlm_sandbox.backends.wasm import build, cache, component, engine_version
from rlm_sandbox.backends.wasm.cache import cache_directory, compiled_file
from rlm_sandbox.backends.wasm.component import GuestComponent, find_component
from rlm_sandbox.backends.wasm.parts import examine_parts
from rlm_sandbox.backends.wasm.progress import progress
from rlm_sandbox.registry import Part, load_backend

from ..conftest import require_usable

#: The smallest component there is.
TINY = bytes(wasmtime.wat2wasm("(component)"))
SOURCE = GuestComponent(TINY, hashlib.sha256(TINY).hexdigest(), True)


@pytest.fixture(scope="module")
def engine() -> Any:
    return wasmtime.Engine(wasmtime.Config())


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each compilation."""
    made: list[str] = []
    real = wasmtime.component.Component

    class Counting(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            made.append("compiled")
            super().__init__(*args)

    monkeypatch.setattr(cache, "Component", Counting)
    return made


def entry(directory: Path) -> Path:
    (found,) = (directory / "wasm").glob("guest-*.cwasm")
    return found


# ---- the cache


def test_compiled_once(engine: Any, tmp_path: Path, compiled: list[str]) -> None:
    for _ in range(3):
        compiled_file(engine, SOURCE, "c", tmp_path)
    assert compiled == ["compiled"]
    assert (tmp_path / "wasm").stat().st_mode & 0o077 == 0
    assert entry(tmp_path).stat().st_mode & 0o077 == 0


def test_another_configuration_version_or_component_is_another_entry(
    engine: Any, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_file(engine, SOURCE, "c", tmp_path)
    compiled_file(engine, SOURCE, "d", tmp_path)
    compiled_file(engine, GuestComponent(TINY, "other", True), "c", tmp_path)
    monkeypatch.setattr(cache, "_ENGINE", "51.0.0")
    compiled_file(engine, SOURCE, "c", tmp_path)
    assert len(compiled) == 4


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _replace_with_own_record(path: Path) -> None:
    """An entry of another engine, say, with a record that fits it."""
    path.write_bytes(b"\x7fELF nonsense")
    path.with_suffix(".json").write_text(json.dumps({"digest": hashlib.sha256(path.read_bytes()).hexdigest()}))


def _drop_record(path: Path) -> None:
    path.with_suffix(".json").unlink()


def _bad_record(path: Path) -> None:
    path.with_suffix(".json").write_text("[1]")


def _link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("spoil", [_truncate, _replace_with_own_record, _drop_record, _bad_record, _link])
def test_a_damaged_or_foreign_entry_is_made_again(engine: Any, tmp_path: Path, compiled: list[str], spoil: Any) -> None:
    compiled_file(engine, SOURCE, "c", tmp_path)
    spoil(entry(tmp_path))
    compiled_file(engine, SOURCE, "c", tmp_path)
    assert len(compiled) == 2
    compiled_file(engine, SOURCE, "c", tmp_path)
    assert len(compiled) == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a file away")
def test_an_entry_of_somebody_else_is_made_again(engine: Any, tmp_path: Path, compiled: list[str]) -> None:
    compiled_file(engine, SOURCE, "c", tmp_path)
    os.chown(entry(tmp_path), 65534, 65534)
    compiled_file(engine, SOURCE, "c", tmp_path)
    assert len(compiled) == 2
    os.chown(tmp_path / "wasm", 65534, 65534)
    with pytest.raises(BackendUnavailable, match="belongs to somebody else"):
        compiled_file(engine, SOURCE, "c", tmp_path)


def test_entries_nobody_uses_any_more_are_dropped_after_a_day(engine: Any, tmp_path: Path) -> None:
    for configuration in "abcdefgh":
        compiled_file(engine, SOURCE, configuration, tmp_path)
    assert len(list((tmp_path / "wasm").glob("*.cwasm"))) == 8  # several checkouts may share a cache
    for path in (tmp_path / "wasm").iterdir():
        os.utime(path, (0, 0))
    compiled_file(engine, SOURCE, "i", tmp_path)
    assert len(list((tmp_path / "wasm").glob("*.cwasm"))) == 4


def test_two_processes_that_compile_at_once_do_the_work_once(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib, wasmtime\n"
        "from rlm_sandbox.backends.wasm import cache\n"
        "from rlm_sandbox.backends.wasm.component import GuestComponent\n"
        "real = cache.Component\n"
        "class Slow(real):\n"
        "    def __init__(self, *args):\n"
        "        print('compiled'); time.sleep(0.5); super().__init__(*args)\n"
        "cache.Component = Slow\n"
        "engine = wasmtime.Engine(wasmtime.Config())\n"
        "data = bytes(wasmtime.wat2wasm('(component)'))\n"
        f"cache.compiled_file(engine, GuestComponent(data, 'digest', True), 'c', pathlib.Path({str(tmp_path)!r}))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = "".join(process.communicate(timeout=60)[0] for process in running)
    assert [process.returncode for process in running] == [0, 0, 0]
    assert said.split() == ["compiled"]


def test_a_cache_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendUnavailable, match="RLM_SANDBOX_CACHE"):
        cache_directory(tmp_path / "file")


def test_a_full_cache_is_one_clear_error(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.raises(BackendUnavailable, match=r"No space left on device.*RLM_SANDBOX_CACHE"):
        compiled_file(engine, SOURCE, "c", tmp_path)


def test_a_cache_open_to_others_is_refused(tmp_path: Path) -> None:
    directory = cache_directory(tmp_path)
    directory.chmod(0o755)
    with pytest.raises(BackendUnavailable, match="chmod 700"):
        cache_directory(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_cache_that_others_could_exchange_is_refused(tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check of an entry and its use, whoever may write above the directory could put code of his own there."""
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(mode)
    monkeypatch.setattr(usercache, "_is_private_group", lambda gid: False)
    for named in (above, above / "below"):
        with pytest.raises(BackendUnavailable, match=r"changed by others.*chmod go-w"):
            cache_directory(named)
    above.chmod(mode | 0o1000)  # as /tmp: only its owner renames what is in it
    assert cache_directory(above).is_dir()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a directory away")
def test_a_cache_below_somebody_elses_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs" / "mine").mkdir(parents=True)
    os.chown(tmp_path / "theirs", 65534, 65534)
    with pytest.raises(BackendUnavailable, match="changed by others"):
        cache_directory(tmp_path / "theirs" / "mine")


def test_a_link_to_a_cache_is_followed_before_it_is_checked(tmp_path: Path) -> None:
    """A link could be pointed elsewhere later; the directory that was checked is the one that is used."""
    cache_directory(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert cache_directory(tmp_path / "link") == tmp_path.resolve() / "real" / "wasm"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "wasm").symlink_to(tmp_path / "real" / "wasm")
    with pytest.raises(BackendUnavailable, match="belongs to somebody else"):
        cache_directory(tmp_path / "other")


def test_an_entry_that_others_may_write_is_made_again(engine: Any, tmp_path: Path, compiled: list[str]) -> None:
    compiled_file(engine, SOURCE, "c", tmp_path)
    entry(tmp_path).chmod(0o666)
    compiled_file(engine, SOURCE, "c", tmp_path)
    assert len(compiled) == 2


def test_a_disk_that_fills_up_is_one_clear_error(tmp_path: Path) -> None:
    """A limit of file sizes fails a write in the middle, as a full disk does. Nothing half-written is left."""
    program = (
        "import pathlib, resource, sys, wasmtime\n"
        "from rlm_sandbox import BackendUnavailable\n"
        "from rlm_sandbox.backends.wasm.cache import compiled_file\n"
        "from rlm_sandbox.backends.wasm.component import GuestComponent\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "engine = wasmtime.Engine(wasmtime.Config())\n"
        "source = GuestComponent(bytes(wasmtime.wat2wasm('(component)')), 'digest', True)\n"
        "try:\n"
        "    compiled_file(engine, source, 'c', pathlib.Path(sys.argv[1]))\n"
        "except BackendUnavailable as exc:\n"
        "    print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "cannot be written (File too large)" in done.stdout
    assert "RLM_SANDBOX_CACHE" in done.stdout
    assert done.stdout.count("\n") == 1
    assert [path.suffix for path in (tmp_path / "wasm").iterdir()] == [".lock"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_read_only_cache_is_one_clear_error() -> None:
    with pytest.raises(BackendUnavailable, match=r"no cache directory.*RLM_SANDBOX_CACHE"):
        cache_directory(Path("/proc/self"))  # read-only, for root too


# ---- the engine


@pytest.mark.parametrize("found", ["49.0.0", "51.0.0", "50.1.0"])
def test_an_engine_of_another_release_is_one_clear_error(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_version, "version", lambda name: found)
    engine_version.check_engine.cache_clear()
    with pytest.raises(BackendUnavailable, match=rf"wasmtime {found} is installed.*pip install 'wasmtime==50.0.1'"):
        open_repl("wasm")
    assert not available()["wasm"].usable


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_too_little_address_space_is_one_clear_error() -> None:
    require_usable("wasm", load_backend("wasm").probe())  # built and compiled with room to do it
    program = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "from rlm_sandbox import BackendUnavailable, open_repl\n"
        "try:\n"
        "    open_repl('wasm')\n"
        "except BackendUnavailable as exc:\n"
        "    print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert "raise the limit of address space" in done.stdout


def test_what_takes_long_says_so_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with progress("compiling"):
        pass
    assert shown.getvalue().startswith("\rrlm_sandbox: compiling ... 0 s")
    assert shown.getvalue().endswith("\n")


def test_no_engine_is_one_clear_error() -> None:
    program = (
        "import sys\n"
        "sys.modules['wasmtime'] = None\n"
        "from rlm_sandbox import BackendUnavailable, open_repl\n"
        "try:\n"
        "    open_repl('wasm')\n"
        "except BackendUnavailable as exc:\n"
        "    print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert "cannot be loaded" in done.stdout


def test_the_cache_is_the_users_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLM_SANDBOX_CACHE", str(tmp_path / "named"))
    assert cache_directory(None) == tmp_path / "named" / "wasm"
    assert cache_directory(tmp_path / "chosen") == tmp_path / "chosen" / "wasm"
    monkeypatch.delenv("RLM_SANDBOX_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory(None) == tmp_path / "xdg" / "rlm-sandbox" / "wasm"


def test_options_take_a_path() -> None:
    with pytest.raises(TypeError, match="pathlib"):
        WasmOptions(cache="somewhere")  # type: ignore[arg-type]


# ---- the component


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel's component that fits its record."""
    directory = tmp_path / "packaged"
    directory.mkdir()
    (directory / build.COMPONENT_NAME).write_bytes(TINY)
    record = {"digest": hashlib.sha256(TINY).hexdigest(), "sources": build.sources_digest()}
    (directory / build.RECORD_NAME).write_text(json.dumps(record))
    monkeypatch.setattr(component, "_PACKAGED", directory)
    return directory


def test_the_wheels_component_is_taken(packaged: Path, tmp_path: Path) -> None:
    assert find_component(tmp_path).data == TINY


def test_a_component_that_is_not_the_recorded_one_is_refused(packaged: Path, tmp_path: Path) -> None:
    (packaged / build.COMPONENT_NAME).write_bytes(TINY + b"\0")
    with pytest.raises(BackendUnavailable, match=r"not the one that was recorded.*reinstall"):
        find_component(tmp_path)


@pytest.mark.parametrize("record", ["", "[]", "{", None])
def test_a_component_without_its_record_is_refused(packaged: Path, tmp_path: Path, record: str | None) -> None:
    if record is None:
        (packaged / build.RECORD_NAME).unlink()
    else:
        (packaged / build.RECORD_NAME).write_text(record)
    with pytest.raises(BackendUnavailable, match=r"damaged.*reinstall"):
        find_component(tmp_path)


def test_a_component_older_than_its_sources_is_built_anew(packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (packaged / build.RECORD_NAME).write_text(json.dumps({"digest": SOURCE.digest, "sources": "older"}))
    built: list[Path] = []

    def fake_build(directory: Path) -> None:
        built.append(directory)
        directory.mkdir()
        (directory / build.COMPONENT_NAME).write_bytes(TINY)
        (directory / build.RECORD_NAME).write_text(json.dumps({"digest": SOURCE.digest, "sources": build.sources_digest()}))

    monkeypatch.setattr(build, "can_build", lambda: True)
    monkeypatch.setattr(build, "build", fake_build)
    assert find_component(tmp_path).digest == SOURCE.digest
    assert find_component(tmp_path).digest == SOURCE.digest
    assert len(built) == 1


def test_a_missing_component_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(component, "_PACKAGED", tmp_path / "nothing")
    monkeypatch.setattr(build, "can_build", lambda: False)
    with pytest.raises(BackendUnavailable, match=r"missing.*pip install 'componentize-py"):
        find_component(tmp_path)


def test_every_module_the_guest_imports_is_among_its_sources() -> None:
    """A module that were missing would fail the build, and only where somebody builds."""
    sources = build._sources()
    assert {"wire/codec.py", "wire/strings.py", "runners/session.py", "runners/wasm_main.py", "context/view.py"} <= set(sources)
    package = Path(build.__file__).parents[2]
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)) if name.endswith(".py") else ():
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = (package / name).parents[node.level - 1].joinpath(*(node.module or "").split("."))
                below = folder.relative_to(package).as_posix()
                wanted = [f"{below}.py"] if node.module else [f"{below}/{alias.name}.py" for alias in node.names]
                assert set(wanted) <= set(sources), f"{name} imports {wanted}"
    assert not any(name.startswith(("backends", "bridge", "confine")) for name in sources)


def test_a_build_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tool's own words, as it says them about a module that is not there: the cause, and then a backtrace of its own."""
    said = (
        "AssertionError: Traceback (most recent call last):\n  File ...\nModuleNotFoundError: No module named 'x'\n\n\n"
        "Caused by:\n    ModuleNotFoundError: No module named 'x'\n\nStack backtrace:\n   0: <anyhow::Error>::msg\n  28: _start\n"
    )
    failed = subprocess.CompletedProcess([], 1, b"", said.encode())
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(build.BuildFailed, match=r"ModuleNotFoundError: No module named 'x'$"):
        build.build(tmp_path)


def test_a_build_is_done_again_only_for_other_sources(packaged: Path) -> None:
    assert build.is_current(packaged)
    (packaged / build.COMPONENT_NAME).write_bytes(TINY + b"\0")
    assert not build.is_current(packaged)
    (packaged / build.RECORD_NAME).unlink()
    assert not build.is_current(packaged)


# ---- what the doctor says of them


def parts() -> dict[str, Part]:
    return {part.name: part for part in examine_parts()}


def test_the_doctor_names_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_version, "version", lambda name: "51.0.0")
    engine_version.check_engine.cache_clear()
    found = parts()
    assert set(found) == {"engine"}
    assert (found["engine"].works, found["engine"].remedy) == (False, "run: pip install 'wasmtime==50.0.1'")


def test_the_doctor_names_a_missing_and_a_damaged_component(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLM_SANDBOX_CACHE", str(tmp_path / "cache"))
    assert parts()["component"].works
    assert parts()["compiled code"].found == "not there yet"
    (packaged / build.COMPONENT_NAME).write_bytes(TINY + b"\0")
    assert "not the one that was recorded" in parts()["component"].found
    monkeypatch.setattr(component, "_PACKAGED", tmp_path / "nothing")
    monkeypatch.setattr(build, "can_build", lambda: False)
    found = parts()["component"]
    assert (found.works, found.needed) == (False, True)
    assert "componentize-py" in found.remedy


def test_the_doctor_names_a_cache_that_is_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLM_SANDBOX_CACHE", str(tmp_path))
    cache_directory(None).chmod(0o755)
    found = parts()["cache"]
    assert not found.works
    assert found.remedy.startswith("run: chmod 700")
