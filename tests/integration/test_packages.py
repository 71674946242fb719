"""numpy and pandas in the jail: their threads, memory and failures. From outside: what the session's processes are."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from rlm_sandbox import InputRefused, Limits, REPLProtocol, open_repl
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable


@pytest.fixture(autouse=True)
def _usable_jail() -> None:
    require_usable("jail", load_backend("jail").probe())


def ok(repl: REPLProtocol, code: str) -> str | None:
    result = repl.exec(code)
    assert result.outcome == "ok", result
    return result.value


def test_numpy_and_pandas_work_and_say_nothing_of_the_host(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "data.csv").write_text("name,amount\na,1\nb,2\na,3\n")
    with open_repl("jail", packages=("pandas", "numpy"), files={"data.csv": tmp_path / "data.csv"}) as repl:
        assert ok(repl, "import sys; [name in sys.modules for name in ('numpy', 'pandas')]") == "[True, True]"
        code = "import pandas as pd\npd.read_csv('/input/data.csv').groupby('name')['amount'].sum().to_dict()"
        assert ok(repl, code) == "{'a': 4, 'b': 2}"
        assert ok(repl, "import numpy as np\nfloat((np.ones((400, 400)) @ np.ones((400, 400))).sum())") == "64000000.0"
        # Every file that came along: the host's places are in none of them, bytecode and machine code included.
        places = [sys.prefix, sys.base_prefix, sysconfig.get_path("purelib")]
        search = f"""
import os
found = []
for base, _, names in os.walk('/usr/lib/packages'):
    for name in names:
        data = open(base + '/' + name, 'rb').read()
        found += [(base, name) for place in {places!r} if place.encode() in data]
found"""
        assert ok(repl, search) == "[]"
        assert repl.exec("import pytest").outcome == "error"


def test_threads_of_numpy_obey_the_process_limit() -> None:
    limits = Limits(processes=4, memory_mb=400, time_seconds=3)
    with open_repl("jail", packages=("numpy",), limits=limits) as repl:
        ok(repl, "import numpy as np, ctypes, glob\nkept = 7\nones = np.ones((600, 600))")
        assert ok(repl, "float((ones @ ones).sum())") == "216000000.0"
        # More threads than it may have: whatever the library makes of that, the session goes on with what it had.
        code = """
for path in glob.glob('/usr/lib/packages/numpy.libs/*openblas*'):
    library = ctypes.CDLL(path)
    for name in ('scipy_openblas_set_num_threads64_', 'openblas_set_num_threads64_', 'openblas_set_num_threads'):
        if hasattr(library, name):
            getattr(library, name)(16)
float((ones @ ones).sum())"""
        assert repl.exec(code).outcome in ("ok", "error", "limit", "crashed")
        assert ok(repl, "kept") == "7"
        assert ok(repl, "float((ones[:10] @ ones).sum())") == "3600000.0"


def test_two_threads_of_numpy_survive_the_standby() -> None:
    with open_repl("jail", packages=("numpy",), limits=Limits(processes=16)) as repl:
        code = """
import numpy as np, ctypes, glob
ones = np.ones((600, 600))
for path in glob.glob('/usr/lib/packages/numpy.libs/libscipy_openblas*'):
    ctypes.CDLL(path).scipy_openblas_set_num_threads64_(2)
float((ones @ ones).sum())"""
        for _ in range(3):
            assert ok(repl, code) == "216000000.0"
        assert repl.exec("import os; os.kill(os.getpid(), 9)").state == "restored"
        assert ok(repl, "float((ones @ ones).sum())") == "216000000.0"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the path of this interpreter."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RLM_SANDBOX_CACHE", str(tmp_path / "cache"))
    return tmp_path


def add_package(where: Path, name: str, source: str) -> None:
    (where / name).mkdir()
    (where / name / "__init__.py").write_text(source)
    info = where / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "direct_url.json").write_text(f'{{"url": "file://{where}"}}')
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n{name}-1.0.dist-info/METADATA,,\n{name}-1.0.dist-info/direct_url.json,,\n")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise RuntimeError('no')", "RuntimeError: no"),
        ("raise SystemExit(3)", "SystemExit"),
        ("import os; os._exit(0)", "ended the interpreter"),
        ("import ctypes; ctypes.string_at(0)", "ended the interpreter"),
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "threads"),
    ],
)
def test_a_package_that_fails_at_its_import_is_refused(install: Path, source: str, says: str) -> None:
    add_package(install, "badpackage", source)
    with pytest.raises(InputRefused, match=says) as refused:
        open_repl("jail", packages=("badpackage",))
    assert refused.value.name == "badpackage"
    with open_repl("jail") as repl:
        assert ok(repl, "1 + 1") == "2"


def test_a_changed_package_is_copied_again_and_a_damaged_copy_is_not_used(install: Path) -> None:
    add_package(install, "goodpackage", "word = 'one'")
    with open_repl("jail", packages=("goodpackage",)) as repl:
        assert ok(
            repl, "import goodpackage, os; (goodpackage.word, os.listdir('/usr/lib/packages/goodpackage-1.0.dist-info'))"
        ) == ("('one', ['METADATA'])")
    script = (
        "from rlm_sandbox import open_repl\n"
        "with open_repl('jail', packages=('goodpackage',)) as repl: print(repl.exec('import goodpackage; goodpackage.word').value)"
    )

    def in_another_process() -> str:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(install)!r})\n{script}"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    (copy,) = (install / "cache" / "jail").glob("packages-*/packages/goodpackage/__init__.py")
    assert in_another_process() == "'one'"
    copy.write_text("word = 'evil'")
    assert in_another_process() == "'one'"
    (install / "goodpackage" / "__init__.py").write_text("word = 'three'")
    assert in_another_process() == "'three'"


def test_a_cache_that_is_open_to_others_is_not_used(install: Path) -> None:
    add_package(install, "lonely", "")
    (install / "cache").mkdir()
    (install / "cache" / "jail").mkdir(mode=0o777)
    (install / "cache" / "jail").chmod(0o777)
    with pytest.raises(Exception, match="open to others"):
        open_repl("jail", packages=("lonely",))
