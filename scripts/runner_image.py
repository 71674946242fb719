"""Build the runner image: ``python scripts/runner_image.py [--base IMAGE] [--tag TAG]``.

The build context is made here and holds the Dockerfile and the guest archive, nothing else of the source tree.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from rlm_sandbox import bundle
from rlm_sandbox.options import DockerOptions

_DOCKERFILE = Path(__file__).parent.parent / "images" / "runner" / "Dockerfile"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the runner image of the docker backend.")
    parser.add_argument("--base", default="", help="image to build on: Debian or compatible with Python 3.11 or newer")
    parser.add_argument("--tag", default=DockerOptions().image)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        (context / "rlm_guest.zip").write_bytes(bundle.guest_archive())
        (context / "Dockerfile").write_bytes(_DOCKERFILE.read_bytes())
        command = ["docker", "build", "--quiet", "--tag", options.tag, "--build-arg", f"GUEST_DIGEST={bundle.digest()}"]
        if options.base:
            command += ["--build-arg", f"BASE_IMAGE={options.base}"]
        done = subprocess.run([*command, str(context)], check=False)
    if done.returncode == 0:
        sys.stdout.write(f"built {options.tag} with the guest archive {bundle.digest()}\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
