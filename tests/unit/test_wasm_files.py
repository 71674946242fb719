"""Where the wasm backend's component and compiled code come from: whole and the user's own, or made again, or one clear error."""

from __future__ import annotations

import hashlib
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

from rlm_sandbox import BackendUnavailable, WasmOptions
from rlm_sandbox.backends.wasm import build, cache, component
from rlm_sandbox.backends.wasm.cache import cache_directory, compiled_file
from rlm_sandbox.backends.wasm.component import GuestComponent, find_component

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


def test_every_guest_file_is_among_the_sources() -> None:
    """A module that the guest imports and the list lacks would fail the build only where somebody builds."""
    listed = set(build._FILES)
    assert {"wire/codec.py", "runners/wasm_main.py", "context/view.py"} <= listed
    root = Path(build.__file__).parents[2]
    for name in listed:
        assert (root / name).is_file()
