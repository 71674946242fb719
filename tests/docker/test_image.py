"""The runner image: what is in it and what is not, the same image from the same inputs, its variant and its papers."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("docker", reason="the extra 'docker' is not installed")

from rlm_sandbox import bundle, open_repl
from rlm_sandbox.options import DockerOptions

from ..conftest import skip_unless_required

ROOT = Path(__file__).parents[2]
TAG = "rlm-sandbox-test-image:1"


def _build(base: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "runner_image.py"), "--tag", TAG, "--base", base, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def base(api: Any) -> str:
    """What the image under test was built on, which is here then."""
    labels = api.inspect_image(DockerOptions().image)["Config"]["Labels"]
    return str(labels["org.opencontainers.image.base.name"])


@pytest.fixture(scope="module")
def built(api: Any, base: str) -> Iterator[str]:
    yield base
    subprocess.run(["docker", "image", "rm", "--force", TAG], capture_output=True, check=False)


@pytest.fixture(scope="module")
def names(api: Any) -> dict[str, tarfile.TarInfo]:
    """Every file of the image."""
    made = api.create_container(DockerOptions().image, network_disabled=True)
    try:
        data = b"".join(api.export(made["Id"]))
    finally:
        api.remove_container(made["Id"])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {entry.name: entry for entry in archive}


def test_no_shell_no_package_manager_and_one_program(names: dict[str, tarfile.TarInfo]) -> None:
    ours = {name: entry for name, entry in names.items() if name.partition("/")[0] in ("bin", "sbin", "usr", "opt", "lib", "lib64")}
    programs = {Path(name).name for name, entry in ours.items() if entry.isfile() and entry.mode & 0o111 and ".so" not in name}
    assert len(programs) == 1, programs
    assert programs.pop().startswith("python3")
    for forbidden in ("sh", "bash", "dash", "busybox", "apt", "apt-get", "dpkg", "pip", "pip3", "ensurepip", "su", "mount"):
        assert not [name for name, entry in names.items() if entry.isfile() and Path(name).name == forbidden], forbidden
    assert not [name for name, entry in names.items() if entry.mode & 0o6000], "set-user-id"


def test_its_papers(api: Any) -> None:
    config = api.inspect_image(DockerOptions().image)["Config"]
    labels = config["Labels"]
    assert labels["org.rlm-sandbox.guest"] == bundle.digest(), "the image is of other sources: make image"
    for name in ("title", "description", "licenses", "version", "revision", "base.name"):
        assert f"org.opencontainers.image.{name}" in labels
    assert config["User"] == "65534:65534"
    assert [item.partition("=")[0] for item in config["Env"]] == ["PATH"]
    assert config["Healthcheck"]["Test"][-1] == "check"
    default = next(
        line for line in (ROOT / "images" / "runner" / "Dockerfile").read_text().splitlines() if line.startswith("ARG BASE_")
    )
    assert "@sha256:" in default


@pytest.mark.parametrize("runtime", [None, "runsc"], ids=["default", "gvisor"])
def test_the_self_check(api: Any, runtime: str | None) -> None:
    words = ["--runtime", runtime] if runtime else []
    flags = ["--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    done = subprocess.run(
        ["docker", "run", "--rm", *flags, *words, DockerOptions().image, "check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["mapped_texts"] is True
    assert found["user"] == 65534
    assert ("no seccomp" in found["supervision"]) == (runtime == "runsc")


#: In the image: the one file of what a start imports has the files of bytecode of the others.
_COMPARE = """
import importlib.util
content = open("/usr/lib/rlm_guest/start_modules", "rb").read()
index, _, code = content.partition(b"\\n\\n")
for line in index.decode().splitlines():
    name, path, package, begin, size = line.split("\\t")
    if size == "0":
        assert ".so" in path and open(path, "rb").read(1), name
    else:
        expected = open(importlib.util.cache_from_source(path), "rb").read()
        assert code[int(begin) : int(begin) + int(size)] == expected, name
    print(name, path, package, sep="\\t")
"""


def test_what_a_start_imports_is_in_one_file(api: Any) -> None:
    def run(*words: str) -> list[str]:
        command = ["docker", "run", "--rm", "--network", "none", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()

    image = DockerOptions().image
    imported = run(image, "modules")
    stored = run("--entrypoint", "/usr/lib/rlm_python", image, "-I", "-S", "-X", "utf8", "-c", _COMPARE)
    assert set(stored) == set(imported)
    assert any(line.startswith("rlm_guest.runners.worker\t/usr/lib/rlm_guest/") for line in stored)


@pytest.mark.timeout(300)
def test_the_same_inputs_give_the_same_files(api: Any, built: str) -> None:
    layers = []
    for _ in range(2):
        done = _build(built, "--no-cache")
        assert done.returncode == 0, done.stderr
        layers.append(api.inspect_image(TAG)["RootFS"]["Layers"])
    assert layers[0] == layers[1]
    assert "MiB" in done.stdout  # the report of sizes


@pytest.mark.timeout(300)
def test_the_variant_with_packages(api: Any, built: str) -> None:
    done = _build(built, "--variant", "data")
    if done.returncode != 0 and "pip" in done.stderr:
        skip_unless_required("docker", f"no package registry is in reach: {done.stderr[-500:]}")
    assert done.returncode == 0, done.stderr
    with open_repl("docker", options=DockerOptions(image=TAG)) as repl:
        code = "import numpy as np, pandas as pd\nframe = pd.DataFrame({'a': np.arange(4)})\nint(frame['a'].sum()), float((np.eye(3) @ np.ones(3)).sum())"
        assert repl.exec(code).value == "(6, 3.0)"
        assert repl.exec("import os\nos._exit(1)").state == "restored"
        assert (
            repl.exec("int((np.arange(10_000.0).reshape(100, 100) @ np.ones((100, 100))).sum() > 0), len(frame)").value == "(1, 4)"
        )


def test_a_bill_of_materials(api: Any, built: str, tmp_path: Path) -> None:
    if shutil.which("debsbom", path=str(Path(sys.executable).parent)) is None:
        skip_unless_required("docker", "debsbom is not installed (the extra 'dev')")
    done = _build(built, "--sbom", str(tmp_path / "bom"))
    assert done.returncode == 0, done.stderr
    bill = json.loads((tmp_path / "bom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    found = {item["name"] for item in bill["components"]}
    assert any(name.startswith("libc6") for name in found), found
    assert json.loads((tmp_path / "bom.spdx.json").read_text())["spdxVersion"].startswith("SPDX-")


def test_an_image_of_other_sources_is_refused(api: Any) -> None:
    """What happens when somebody edits the guest and forgets the image."""
    from rlm_sandbox import BackendUnavailable

    made = api.create_container(DockerOptions().image, network_disabled=True)
    try:
        api.commit(made["Id"], "rlm-sandbox-test-image", "stale", changes='LABEL org.rlm-sandbox.guest="0000"')
        with pytest.raises(BackendUnavailable, match="another version") as caught:
            open_repl("docker", options=DockerOptions(image="rlm-sandbox-test-image:stale"))
        assert "make image" in caught.value.remedy
    finally:
        api.remove_container(made["Id"])
        api.remove_image("rlm-sandbox-test-image:stale", force=True)
