"""The wheel carries the guest component of the wasm backend, so that installing it needs no tool. Run by hatchling."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "rlm_sandbox/backends/wasm"


class GuestComponentHook(BuildHookInterface[Any]):
    """Builds the component: into the wheel; for an editable install, beside its sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See hatchling."""
        root = Path(self.root)
        spec = importlib.util.spec_from_file_location("guest_build", root / FOLDER / "build.py")
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        if version == "editable":
            target = root / FOLDER / "guest"
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="rlm-sandbox-wheel-")
            target = Path(self._temporary.name)
        if version == "editable" and build.is_current(target):
            return  # these very sources were built before
        self.app.display_waiting("building the wasm guest, which takes half a minute")
        build.build(target)
        if version != "editable":
            for name in (build.COMPONENT_NAME, build.RECORD_NAME):
                build_data["force_include"][str(target / name)] = f"{FOLDER}/guest/{name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """See hatchling."""
        if version != "editable":
            self._temporary.cleanup()
