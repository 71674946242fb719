"""The registry: names, what is refused before a session opens, and what ``auto`` may choose."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from rlm_sandbox import (
    BackendUnavailable,
    Capabilities,
    Feature,
    Grade,
    JailOptions,
    Limits,
    MontyOptions,
    UnsupportedLimit,
    available,
    backend_names,
    open_repl,
    registry,
)
from rlm_sandbox.options import BackendOptions
from rlm_sandbox.registry import AUTO_ORDER, Availability, SessionConfig, backends_with, load_backend

GRADED = (
    "time_seconds", "wall_seconds", "output_bytes", "host_calls", "value_bytes", "memory_mb", "processes", "disk_mb",
    "session_seconds", "network", "crash", "interrupt",
)  # fmt: skip


class FakeBackend:
    """A backend that opens nothing and remembers what it was asked for."""

    def __init__(self, *, availability: Availability | None = None, **capabilities: Any) -> None:
        self.availability = availability or Availability(True)
        self.declared = capabilities
        self.opened: list[SessionConfig] = []

    def probe(self, options: BackendOptions | None = None) -> Availability:
        return self.availability

    def capabilities(self, config: SessionConfig) -> Capabilities:
        graded: dict[str, Any] = dict.fromkeys(GRADED, Grade.HARD)
        return Capabilities(**{"backend": "jail", "isolation": "none: a fake", **graded, **self.declared})

    def open(self, config: SessionConfig) -> Any:
        self.opened.append(config)
        return self


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    """Stands in for ``jail``."""
    backend = FakeBackend()
    install(monkeypatch, "jail", backend)
    return backend


def install(monkeypatch: pytest.MonkeyPatch, name: str, backend: FakeBackend) -> None:
    module = ModuleType(f"fake_backend_{name}")
    module.BACKEND = backend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    entry = registry._BACKENDS[name]
    monkeypatch.setitem(registry._BACKENDS, name, registry._Entry(module.__name__, entry.options, entry.requires, entry.remedy))


def test_names_are_in_alphabetical_order() -> None:
    assert list(backend_names()) == sorted(backend_names())
    assert {"jail", "monty"} <= set(backend_names())


@pytest.mark.parametrize("name", backend_names())
def test_what_is_said_of_a_language_is_what_its_backend_declares(name: str) -> None:
    try:
        capabilities = load_backend(name).capabilities(SessionConfig())
    except BackendUnavailable:
        pytest.skip(f"a package of {name} is not installed")
    assert {feature for feature in Feature if name not in backends_with(feature)} == {
        feature for feature in Feature if not capabilities.has(feature)
    }


def test_who_has_a_feature_is_told_without_importing_anybody() -> None:
    code = (
        "import sys; from rlm_sandbox.registry import backends_with; from rlm_sandbox.protocol import Feature; "
        "assert backends_with(Feature.GENERATORS) == ('docker', 'jail', 'restricted', 'wasm'); "
        "sys.exit(any(name.startswith('rlm_sandbox.backends.') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=100).returncode == 0


def test_auto_never_picks_what_is_no_isolation() -> None:
    assert set(AUTO_ORDER) <= set(backend_names())
    assert "restricted" not in AUTO_ORDER
    assert AUTO_ORDER[0] == "jail"


@pytest.mark.parametrize("name", ["nothing", "", "Jail", "os", "rlm_sandbox.backends.jail"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="choose from auto, docker, jail"):
        open_repl(name)
    with pytest.raises(ValueError, match="unknown backend"):
        load_backend(name)


def test_a_missing_package_is_unavailable_with_a_remedy(fake: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        registry._BACKENDS, "monty", registry._Entry("no_such_engine", MontyOptions, "no_such_engine", "run: pip install it")
    )
    with pytest.raises(BackendUnavailable) as caught:
        open_repl("monty")
    assert caught.value.remedy == "run: pip install it"
    assert available()["monty"] == Availability(False, caught.value.reason, caught.value.remedy)


def test_another_import_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        registry._BACKENDS, "monty", registry._Entry("no_such_module", MontyOptions, "pydantic_monty", "install it")
    )
    with pytest.raises(ImportError):
        load_backend("monty")


def test_an_unusable_backend_is_not_opened(fake: FakeBackend) -> None:
    fake.availability = Availability(False, "no user namespaces", "run: sysctl ...")
    with pytest.raises(BackendUnavailable) as caught:
        open_repl("jail")
    assert (caught.value.backend, caught.value.reason, caught.value.remedy) == ("jail", "no user namespaces", "run: sysctl ...")
    with pytest.raises(BackendUnavailable, match="no user namespaces"):
        open_repl(options=JailOptions())  # of the candidates of auto, those that take these
    assert fake.opened == []


def test_auto_opens_the_first_that_works(fake: FakeBackend) -> None:
    open_repl(limits=Limits(time_seconds=3), setup="x = 1", recovery=False, options=JailOptions())
    assert fake.opened == [SessionConfig(limits=Limits(time_seconds=3), setup="x = 1", recovery=False, options=JailOptions())]


# ---- grades


@pytest.mark.parametrize("limit", GRADED[:10])
def test_a_limit_below_the_accepted_grade_is_refused(fake: FakeBackend, limit: str) -> None:
    for grade in (Grade.NONE, Grade.COOPERATIVE):
        fake.declared = {limit: grade}
        with pytest.raises(UnsupportedLimit, match=limit):
            open_repl("jail", trusted=True)
    assert fake.opened == []


@pytest.mark.parametrize("limit", GRADED)
def test_below_hard_has_to_be_trusted_in_so_many_words(fake: FakeBackend, limit: str) -> None:
    fake.declared = {limit: Grade.COOPERATIVE}
    with pytest.raises(UnsupportedLimit, match=limit):
        open_repl("jail", accept=Grade.COOPERATIVE)
    assert fake.opened == []
    open_repl("jail", accept=Grade.COOPERATIVE, trusted=True)
    assert len(fake.opened) == 1


def test_a_limit_that_is_not_asked_for_needs_no_grade(fake: FakeBackend) -> None:
    fake.declared = {"memory_mb": Grade.NONE}
    open_repl("jail", limits=Limits(memory_mb=None))
    assert len(fake.opened) == 1


def test_trusted_alone_lowers_nothing(fake: FakeBackend) -> None:
    fake.declared = {"time_seconds": Grade.COOPERATIVE}
    with pytest.raises(UnsupportedLimit, match="time_seconds"):
        open_repl("jail", trusted=True)


def test_every_grade_missing_is_named(fake: FakeBackend) -> None:
    fake.declared = {"memory_mb": Grade.NONE, "disk_mb": Grade.COOPERATIVE}
    with pytest.raises(UnsupportedLimit, match=r"memory_mb \(NONE\), disk_mb \(COOPERATIVE\)"):
        open_repl("jail", trusted=True)


# ---- arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"limits": {"time_seconds": 1}},
        {"setup": b"x = 1"},
        {"packages": "numpy"},
        {"packages": (1,)},
        {"files": ["a.txt"]},
        {"files": {1: "a.txt"}},
        {"files": {"a.txt": 1}},
        {"options": {"isolation": "namespaces"}},
        {"options": MontyOptions()},
        {"options": BackendOptions()},
    ],
)
def test_wrong_arguments_are_type_errors(fake: FakeBackend, arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        open_repl("jail", **arguments)
    assert fake.opened == []


def test_loose_keywords_are_refused() -> None:
    arguments: dict[str, Any] = {"time_seconds": 5}
    with pytest.raises(TypeError):
        open_repl("jail", **arguments)


def test_files_and_packages_need_the_capability(fake: FakeBackend) -> None:
    with pytest.raises(ValueError, match="files"):
        open_repl("jail", files={"a.txt": "a.txt"})
    with pytest.raises(ValueError, match="packages"):
        open_repl("jail", packages=("numpy",))
    assert fake.opened == []
    fake.declared = {"files": True, "packages": True}
    open_repl("jail", files={"a.txt": "a.txt"}, packages=("numpy",))
    assert fake.opened[0].packages == ("numpy",)


def test_options_are_checked_on_construction() -> None:
    with pytest.raises(ValueError, match="isolation"):
        JailOptions(isolation="none")  # type: ignore[arg-type]
    for wrong in (0, 5_000):
        with pytest.raises(ValueError, match="max_processes"):
            MontyOptions(max_processes=wrong)
    with pytest.raises(TypeError):
        MontyOptions(max_processes=True)


def test_capabilities_grade_by_name() -> None:
    capabilities = FakeBackend(memory_mb=Grade.NONE).capabilities(SessionConfig())
    assert capabilities.grade("memory_mb") is Grade.NONE
    for name in ("language", "nothing", "backend"):
        with pytest.raises(AttributeError):
            capabilities.grade(name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"files": ["x"]}, "files takes a dict of names and paths, not list"),
        ({"files": {5: "x"}}, "files takes names as texts"),
        ({"files": {"x": 5}}, "files takes paths as texts or Path objects; 'x' has int"),
        ({"files": {"x": b"x"}}, "files takes paths as texts or Path objects; 'x' has bytes"),
        ({"packages": "numpy"}, "not one string; write \\('numpy',\\)"),
        ({"packages": 5}, "packages takes a tuple of names, not int"),
        ({"packages": (5,)}, "packages takes names as texts"),
    ],
)
def test_inputs_of_wrong_types_say_what_is_right(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        open_repl("wasm", **options)
