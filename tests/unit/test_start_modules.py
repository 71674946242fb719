"""`start_modules`: what is imported from the one file is as if it had been imported from its own."""

from __future__ import annotations

import importlib.util
import py_compile
import subprocess
import sys
from pathlib import Path

import rlm_sandbox

_FILE = Path(rlm_sandbox.__file__).parent / "runners" / "start_modules.py"
_SOURCE = "def where():\n    return __file__, __name__, __package__, __spec__.cached\n"
#: In an interpreter of its own: it is about what has been imported.
_BEGIN = """
import runpy, sys
found = runpy.run_path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
"""


def _write(folder: Path) -> Path:
    """A package with a module, an extension's path, and the file; what the file has is not what the sources say."""
    (folder / "parcel").mkdir()
    for name in ("parcel/__init__.py", "parcel/inner.py", "alone.py", "other.py"):
        (folder / name).write_text(_SOURCE)
    index, content = "", b""
    for name, path in (("parcel", "parcel/__init__.py"), ("parcel.inner", "parcel/inner.py"), ("alone", "alone.py")):
        other = folder / "other_source.py"
        other.write_text(_SOURCE + "stored = True\n")
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        code = Path(str(py_compile.compile(str(other), str(folder / "out.pyc"), invalidation_mode=mode))).read_bytes()
        index += f"{name}\t{folder / path}\t{int(name == 'parcel')}\t{len(content)}\t{len(code)}\n"
        content += code
    extension = importlib.util.find_spec("_json")
    if extension is not None and extension.has_location:
        index += f"_json\t{extension.origin}\t0\t{len(content)}\t0\n"
    file = folder / "start_modules"
    file.write_bytes(index.encode() + b"\n" + content)
    return file


def _run(folder: Path, script: str) -> None:
    command = [sys.executable, "-c", _BEGIN + script, str(_FILE), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_come_from_the_file_and_say_where_they_are_from(tmp_path: Path) -> None:
    _write(tmp_path)
    _run(
        tmp_path,
        """
folder = sys.argv[2]
with found["InOneFile"](folder + "/start_modules"):
    import alone, parcel.inner, _json
assert not [entry for entry in sys.meta_path if type(entry).__name__ == "_Finder"]
import importlib.util, other
for module, path in ((alone, "alone.py"), (parcel, "parcel/__init__.py"), (parcel.inner, "parcel/inner.py")):
    assert module.stored
    full = f"{folder}/{path}"
    package = module.__name__.rpartition(".")[0] if path.endswith("inner.py") else "parcel" if module is parcel else ""
    assert module.where() == (full, module.__name__, package, importlib.util.cache_from_source(full)), module.where()
assert parcel.__path__ == [f"{folder}/parcel"]
assert alone.where.__code__.co_filename == f"{folder}/alone.py"
assert not hasattr(other, "stored")
assert _json.make_encoder
""",
    )


def test_afterwards_everything_is_the_sources(tmp_path: Path) -> None:
    _write(tmp_path)
    _run(
        tmp_path,
        """
with found["InOneFile"](sys.argv[2] + "/start_modules"):
    import alone
import importlib, inspect
assert inspect.getsource(alone.where).startswith("def where")
del alone.stored
importlib.reload(alone)
assert not hasattr(alone, "stored")
assert alone.__loader__.get_code("alone").co_filename.endswith("alone.py")
""",
    )


def test_a_file_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    _write(tmp_path).unlink()
    _run(
        tmp_path,
        """
before = list(sys.meta_path)
with found["InOneFile"](sys.argv[2] + "/start_modules"):
    assert sys.meta_path == before
    import alone
assert not hasattr(alone, "stored")
""",
    )


def test_a_listing_names_what_has_been_imported_from_files(tmp_path: Path) -> None:
    _write(tmp_path)
    _run(
        tmp_path,
        """
import alone, parcel.inner, os.path
lines = found["listing"]().splitlines()
assert f"alone\\t{sys.argv[2]}/alone.py\\t0" in lines
assert f"parcel\\t{sys.argv[2]}/parcel/__init__.py\\t1" in lines
names = [line.partition("\\t")[0] for line in lines]
assert "parcel.inner" in names
assert not {"sys", "__main__", "os.path", "other"} & set(names), names
""",
    )
