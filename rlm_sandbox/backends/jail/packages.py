"""Packages of the host's environment for guests: which distributions, which files, which modules to import beforehand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ...confine.places import GUEST_PACKAGES
from ...errors import InputRefused
from .store import compile_tree, copy_neutral, needed_libraries, stored

__all__ = ("PackageSet", "package_set")

#: What of a distribution's own records a guest gets: not where it was installed from.
_RECORDS: Final = ("METADATA", "PKG-INFO", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")


@dataclass(frozen=True, slots=True)
class PackageSet:
    """``directory``: a copy of the distributions, made for guests. ``imports``: modules to import beforehand."""

    directory: Path
    imports: tuple[str, ...]


def package_set(names: tuple[str, ...]) -> PackageSet:
    """The packages ``names`` (of distributions, or modules) with everything that they depend on.

    Raises:
        InputRefused: there is no such package, or its files are not known.
        BackendUnavailable: there is no directory for the copy.
    """
    chosen: dict[str, metadata.Distribution] = {}
    imports: list[str] = []
    for name in names:
        distribution, module = _find(name)
        imports += module
        _add_with_dependencies(distribution, frozenset(), chosen, {})
    files = {name: _files(name, distribution) for name, distribution in chosen.items()}
    described = [f"{name} {chosen[name].version}" for name in sorted(chosen)]
    for source, target in sorted(pair for pairs in files.values() for pair in pairs):
        status = source.stat()
        described.append(f"{target} {status.st_size} {status.st_mtime_ns}")

    def make(directory: Path) -> None:
        packages = directory / "packages"
        packages.mkdir(mode=0o755)
        copy_neutral((source, packages / target) for pairs in files.values() for source, target in pairs)
        compile_tree(packages, GUEST_PACKAGES)
        (directory / "lib").mkdir(mode=0o755)
        copy_neutral((path, directory / "lib" / name) for name, path in needed_libraries(packages).items())

    return PackageSet(stored("packages", "\n".join(described), make), tuple(dict.fromkeys(imports)))


def _find(name: str) -> tuple[metadata.Distribution, list[str]]:
    """The distribution of that name, or the one that brings a module of that name; and which modules are meant."""
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        owners = metadata.packages_distributions().get(name)
        if not owners:
            raise InputRefused(
                name, "this Python has no such package", "install it for this interpreter, or leave it out"
            ) from None
        return metadata.distribution(owners[0]), [name]
    modules = _modules(distribution)
    own = next((module for module in modules if canonicalize_name(module) == canonicalize_name(name)), None)
    return distribution, [own] if own else [module for module in modules if not module.startswith("_")]


def _modules(distribution: metadata.Distribution) -> list[str]:
    """Top-level modules of a distribution."""
    found = set()
    for file in distribution.files or ():
        first = file.parts[0]
        if len(file.parts) > 1 and first.isidentifier() and file.suffix in (".py", ".so"):
            found.add(first)
        elif len(file.parts) == 1 and file.suffix in (".py", ".so") and (stem := first.partition(".")[0]).isidentifier():
            found.add(stem)
    return sorted(found)


def _add_with_dependencies(
    distribution: metadata.Distribution, extras: frozenset[str], chosen: dict[str, metadata.Distribution], done: dict[str, set[str]]
) -> None:
    name = canonicalize_name(distribution.metadata["Name"])
    chosen[name] = distribution
    seen = done.setdefault(name, set())
    wanted = {"", *extras} - seen
    seen |= wanted
    for text in distribution.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if any(requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in wanted):
            try:
                needed = metadata.distribution(requirement.name)
            except metadata.PackageNotFoundError:
                continue  # the package itself says so when it is imported, if it cannot do without
            _add_with_dependencies(needed, frozenset(requirement.extras), chosen, done)


def _files(name: str, distribution: metadata.Distribution) -> list[tuple[Path, Path]]:
    """Files of a distribution with their places below the guest's directory of packages."""
    found = []
    for file in distribution.files or ():
        parts = file.parts
        if ".." in parts or "__pycache__" in parts or file.is_absolute() or file.suffix in (".pth", ".pyc"):
            continue
        if re.search(r"\.(dist|egg)-info$", parts[0]) and file.name not in _RECORDS:
            continue
        source = Path(str(distribution.locate_file(file)))
        if source.is_file():
            found.append((source, Path(*parts)))
    if not any(target.suffix in (".py", ".so") for _, target in found):
        remedy = "install it as a wheel: pip install --no-deps --force-reinstall (and not in editable mode)"
        raise InputRefused(name, "which files are its own is not recorded", remedy)
    return found
