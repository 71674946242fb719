"""The fuzz targets run over their own corpus, without the fuzzer: what it once found stays found, and they do not rot."""

from __future__ import annotations

import contextlib
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest

FUZZ = Path(__file__).parent.parent.parent / "fuzz"


@pytest.mark.parametrize("name", ["frames", "codec", "handles"])
def test_a_target_holds_over_its_corpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not FUZZ.is_dir():
        pytest.skip("the fuzz targets are not in the source distribution")
    stub: Any = types.ModuleType("atheris")
    stub.instrument_imports = lambda **_: contextlib.nullcontext()
    monkeypatch.setitem(sys.modules, "atheris", stub)
    target = runpy.run_path(str(FUZZ / f"fuzz_{name}.py"))["one_input"]
    inputs = sorted((FUZZ / "corpus" / name).iterdir())
    assert inputs
    for path in inputs:
        data = path.read_bytes()
        target(data)
        for at in range(0, len(data), 7):
            target(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
