"""What the start of a container imports, in one file, and the finder that reads it.

Some 200 modules are looked for in directories, and each is opened, measured and read: ten system calls, for which gVisor takes
17 us and its file server more. That was half of a start there, and a third elsewhere. The image's build writes their files of
bytecode (PEP 552, valid without a look at the source) one after the other. It is the interpreter itself that loads them, and that
says of a module that it came from its source.

The file: a line for each module with its name, its source or its extension's path, whether it is a package, and where its
file of bytecode begins and how long it is, separated by tabs; an empty line; those files. An extension has none.
"""

from __future__ import annotations

# Only what the interpreter has built in: whatever else is imported before the file is open is not taken from it.
import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec, SourceFileLoader

TYPE_CHECKING = False  # the name by which type checkers know it, without the module
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType, TracebackType
    from typing import Any, Final

__all__ = ("FILE_NAME", "InOneFile", "listing")

#: Beside the guest's `__main__.py`.
FILE_NAME: Final = "start_modules"


class _Loader(SourceFileLoader):
    """The interpreter's own, for which the file of the bytecode has been read already, the first time that it is asked for."""

    def __init__(self, name: str, path: str, bytecode: memoryview) -> None:
        super().__init__(name, path)
        self._bytecode: memoryview | None = bytecode

    def path_stats(self, path: str) -> Mapping[str, Any]:
        """See `importlib.abc.SourceLoader.path_stats`. What this bytecode is valid for is not a time."""
        return super().path_stats(path) if self._bytecode is None else {"mtime": 0}

    def get_data(self, path: str) -> bytes:
        """See `importlib.abc.ResourceLoader.get_data`."""
        if self._bytecode is None or not path.endswith(".pyc"):
            return super().get_data(path)
        bytecode, self._bytecode = self._bytecode, None
        return bytes(bytecode)


class _Finder:
    """A finder for `sys.meta_path`."""

    def __init__(self, content: bytes) -> None:
        index, _, _ = content.partition(b"\n\n")
        self._bytecode = memoryview(content)[len(index) + 2 :]
        lines = (line.split("\t") for line in index.decode().splitlines())
        self._places = {name: place for name, *place in lines}

    def find_spec(self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder.find_spec`."""
        place = self._places.get(name)
        if place is None:
            return None
        origin, package, begin, size = place
        loader: ExtensionFileLoader | _Loader
        if size == "0":
            loader = ExtensionFileLoader(name, origin)
        else:
            loader = _Loader(name, origin, self._bytecode[int(begin) : int(begin) + int(size)])
        spec = ModuleSpec(name, loader, origin=origin, is_package=package == "1")
        spec.has_location = True
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(origin.rpartition("/")[0])
        return spec


class InOneFile:
    """While this is entered, what is imported comes from the file ``path``, if it is there and has it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._finder: _Finder | None = None

    def __enter__(self) -> None:
        try:
            with open(self._path, "rb") as file:
                self._finder = _Finder(file.read())
        except FileNotFoundError:
            return
        sys.meta_path.insert(0, self._finder)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        if self._finder is not None:
            sys.meta_path.remove(self._finder)
            self._finder = None


def listing() -> str:
    """For the image's build: what has been imported from files, as the first three fields of a line for each."""
    lines = []
    for name, module in sorted(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if name != "__main__" and spec is not None and spec.name == name and spec.has_location:
            lines.append(f"{name}\t{spec.origin}\t{int(spec.submodule_search_locations is not None)}\n")
    return "".join(lines)
