"""Contexts on a remote engine: one volume of this process there, into which each text is copied once.

The volume is mounted read-only in every session's container. Its directory may be entered but not listed, and a text's
name in it is a random number that only the sessions bound to it are told (their relay opens it, the worker gets a
descriptor), so that sessions do not see each other's contexts.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tarfile
import threading
import weakref
from collections.abc import Iterator
from typing import Final

import docker.errors
import requests.exceptions
from docker.types import Mount

from ...context import Context, DataContext
from ...runners.container import CONTEXTS
from .engine import OWNER_LABEL, Engine, mapped_errors, own_name

__all__ = ("ContextVolume", "forget", "volume_for")

_CHUNK: Final = 1 << 20
_BLOCK: Final = 512  # of a tar archive


class ContextVolume:
    """The texts of this process on one engine. Thread-safe."""

    def __init__(self, engine: Engine, image: str) -> None:
        """Raises `BackendUnavailable` if the engine refuses."""
        self._engine = engine
        self._image = image
        self._lock = threading.Lock()
        self._digests: weakref.WeakKeyDictionary[Context | DataContext, str] = weakref.WeakKeyDictionary()
        self._names: dict[str, str] = {}
        self._files: dict[tuple[int, int], str] = {}
        self.name = f"rlm-sandbox-{secrets.token_hex(8)}"
        with mapped_errors("creating a volume"):
            engine.api.create_volume(self.name, labels={OWNER_LABEL: own_name()})

    def mount(self) -> Mount:
        """What a session's container gets. On its first use the engine gives it the image's directory, with its mode."""
        return Mount(target=CONTEXTS, source=self.name, type="volume", read_only=True)

    def open(self, context: Context | DataContext) -> int:
        """A descriptor of a context whose text is on the engine, copied there on the first call for such a text.

        Raises:
            BackendUnavailable: the engine refuses.
        """
        stored = context.memory_file()
        with self._lock:
            digest = self._digests.get(context)
            if digest is None:
                digest = self._digests[context] = _digest(stored.fd)
            name = self._names.get(digest)
            if name is None:
                name = secrets.token_hex(16)
                self._copy(stored.fd, name)
                self._names[digest] = name
            status = os.fstat(stored.fd)
            self._files[status.st_dev, status.st_ino] = name
        return os.open(f"/proc/self/fd/{stored.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def link(self, fd: int) -> str:
        """The name in the volume of a text that `open` gave a descriptor of."""
        status = os.fstat(fd)
        return self._files[status.st_dev, status.st_ino]

    def _copy(self, fd: int, name: str) -> None:
        """By an archive into a container that is never started: nothing on the engine's machine has to run for it."""
        with mapped_errors("copying a context to the engine"):
            api = self._engine.api
            made = api.create_container(
                self._image,
                labels={OWNER_LABEL: own_name()},
                network_disabled=True,
                host_config=api.create_host_config(
                    network_mode="none", mounts=[Mount(target=CONTEXTS, source=self.name, type="volume")]
                ),
            )
            try:
                api.put_archive(made["Id"], CONTEXTS, _archive(fd, name))
            finally:
                self._engine.remove(made["Id"])

    def remove(self) -> None:
        """Before the process ends, which removes it otherwise. A container that still uses it keeps it; then a sweep removes it."""
        try:
            self._engine.api.remove_volume(self.name)
        except (docker.errors.DockerException, requests.exceptions.RequestException, OSError):
            pass


def _digest(fd: int) -> str:
    found = hashlib.blake2b()
    for piece in _pieces(fd):
        found.update(piece)
    return found.hexdigest()


def _pieces(fd: int) -> Iterator[bytes]:
    offset = 0
    while piece := os.pread(fd, _CHUNK, offset):
        yield piece
        offset += len(piece)


def _archive(fd: int, name: str) -> Iterator[bytes]:
    """A tar archive with one file, read while it is sent."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = os.fstat(fd).st_size, 0o444
    yield entry.tobuf(tarfile.PAX_FORMAT)
    yield from _pieces(fd)
    yield bytes(-entry.size % _BLOCK + 2 * _BLOCK)


_volumes: Final[dict[int, ContextVolume]] = {}
_lock = threading.Lock()


def volume_for(engine: Engine, image: str) -> ContextVolume:
    """This process's volume on an engine, made on the first call.

    Raises:
        BackendUnavailable: the engine refuses.
    """
    with _lock:
        found = _volumes.get(id(engine))
        if found is None:
            found = _volumes[id(engine)] = ContextVolume(engine, image)
        return found


def forget(engine: Engine) -> None:
    """Remove this process's volume on an engine, if there is one; the next session there gets another."""
    with _lock:
        found = _volumes.pop(id(engine), None)
    if found is not None:
        found.remove()


def _after_fork() -> None:
    """In a forked child the engine's client is another one, and so is the volume."""
    global _lock
    _lock = threading.Lock()
    _volumes.clear()


os.register_at_fork(after_in_child=_after_fork)
