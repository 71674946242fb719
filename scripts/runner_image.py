"""Build the runner image: ``python scripts/runner_image.py [--base IMAGE] [--tag TAG] [--variant data] [--sbom PREFIX]``.

The build context is made here and holds the Dockerfile, the script that collects the image's files, the guest archive and the
wheels of the variant, nothing else of the source tree. What is printed last is a report of sizes.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from rlm_sandbox import bundle
from rlm_sandbox.options import DockerOptions

_ROOT = Path(__file__).parent.parent
_IMAGE = _ROOT / "images" / "runner"
_NO_BASE = "if no registry is in reach, build on another base: make image BASE_IMAGE=... (scripts/docker_engine.sh base makes one)"
_ENTRY = ["/usr/lib/rlm_python", "-I", "-S", "-c"]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _default_base() -> str:
    lines = (_IMAGE / "Dockerfile").read_text().splitlines()
    return next(line.removeprefix("ARG BASE_IMAGE=") for line in lines if line.startswith("ARG BASE_IMAGE="))


def _fetch_wheels(base: str, folder: Path) -> None:
    """Wheels of the data variant for the base's Python, of the versions that images/runner/data.txt allows."""
    python = _output("docker", "run", "--rm", "--network", "none", "--entrypoint", "python3", base, "-c",
                     "import sys; print('%d.%d' % sys.version_info[:2])")  # fmt: skip
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    for tag in ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"):
        command += ["--platform", tag]
    subprocess.run([*command, "--requirement", str(_IMAGE / "data.txt")], check=True, stderr=subprocess.PIPE)


def _exported(tag: str) -> bytes:
    """The image's files as a tar archive."""
    made = _output("docker", "create", "--network", "none", tag)
    try:
        return subprocess.run(["docker", "export", made], check=True, capture_output=True).stdout
    finally:
        subprocess.run(["docker", "rm", made], check=True, stdout=subprocess.DEVNULL)


def _report(tag: str, files: bytes) -> None:
    """What is in the image, by folder, in MiB."""
    sizes: Counter[str] = Counter()
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        for entry in archive:
            sizes["/".join(entry.name.split("/")[:3])] += entry.size
    sys.stdout.write(f"size of {tag}: {sum(sizes.values()) / 2**20:.1f} MiB\n")
    for folder, size in sizes.most_common(8):
        sys.stdout.write(f"  {size / 2**20:7.1f}  {folder}\n")


def _write_sbom(tag: str, files: bytes, prefix: Path) -> None:
    """Bills of materials of the image's Debian packages, from the records inside the image: PREFIX.cdx.json, PREFIX.spdx.json."""
    command = [
        str(Path(sys.executable).parent / "debsbom"),
        "generate",
        "--root",
        "-",
        "--distro-arch",
        "amd64",
        "--out",
        str(prefix),
    ]
    subprocess.run([*command, "--distro-name", tag.replace(":", "-"), "--validate"], check=True, input=files)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the runner image of the docker backend.")
    parser.add_argument("--base", default="", help="image to build on: Debian or compatible with Python 3.11 or newer")
    parser.add_argument("--tag", default="", help="the image's name; by default the one that DockerOptions asks for")
    parser.add_argument("--variant", choices=("plain", "data"), default="plain", help="data: with numpy and pandas")
    parser.add_argument(
        "--sbom", type=Path, metavar="PREFIX", help="also write PREFIX.cdx.json and PREFIX.spdx.json (needs debsbom)"
    )
    parser.add_argument("--no-cache", action="store_true", help="build every step anew")
    options = parser.parse_args()
    tag = options.tag or DockerOptions().image + ("-data" if options.variant == "data" else "")
    base = options.base or _default_base()
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        (context / "rlm_guest.zip").write_bytes(bundle.guest_archive())
        for name in ("Dockerfile", "collect.py"):
            (context / name).write_bytes((_IMAGE / name).read_bytes())
        if options.variant == "data":
            try:
                _fetch_wheels(base, context / "wheels")
            except subprocess.CalledProcessError as exc:
                said = exc.stderr if isinstance(exc.stderr, str) else (exc.stderr or b"").decode("utf-8", "replace")
                sys.stderr.write(f"{said}fetching the wheels of the data variant failed: {exc.cmd[0]} ... {exc.cmd[-1]}\n")
                if not options.base:
                    sys.stderr.write(f"{_NO_BASE}\n")
                return 1
        for path in (*context.rglob("*"), context):
            os.utime(path, (0, 0))
        command = ["docker", "build", "--quiet", "--network", "none", "--tag", tag]
        given = {
            "BASE_IMAGE": base,
            "GUEST_DIGEST": bundle.digest(),
            "VARIANT": options.variant,
            "VERSION": version("rlm-sandbox"),
            "REVISION": _revision(),
        }
        command += [part for name, value in given.items() for part in ("--build-arg", f"{name}={value}")]
        command += ["--no-cache"] if options.no_cache else []
        done = subprocess.run([*command, str(context)], check=False)
    if done.returncode != 0 and not options.base:
        sys.stderr.write(f"{_NO_BASE}\n")
    if done.returncode == 0:
        sys.stdout.write(f"built {tag} with the guest archive {bundle.digest()}\n")
        files = _exported(tag)
        _report(tag, files)
        if options.sbom:
            _write_sbom(tag, files, options.sbom)
    return done.returncode


def _revision() -> str:
    try:
        return _output("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
