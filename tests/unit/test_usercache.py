"""The user's cache, from the jail's side: what runs is taken from no place that somebody else could change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlm_sandbox import BackendUnavailable
from rlm_sandbox.backends.jail.store import stored


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_copy_of_python_is_not_kept_where_others_could_exchange_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(directory: Path) -> None:
        made.append(directory)
        (directory / "code.py").write_text("")

    above = tmp_path / "above"
    above.mkdir()
    above.chmod(0o777)
    monkeypatch.setenv("RLM_SANDBOX_CACHE", str(above / "cache"))
    with pytest.raises(BackendUnavailable, match="changed by others"):
        stored("python", "any", make)
    assert not made

    above.chmod(0o700)
    kept = stored("python", "any", make)
    (kept / "code.py").write_text("import evil")  # by the user, or by an accident: made again
    assert (stored("python", "any", make) / "code.py").read_text() == ""
    assert len(made) == 2
