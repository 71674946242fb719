"""Dumps with a seal: the engine is given no state but one that it wrote for this process.

A dump is not checked by the engine, which trusts its bytes. The key is made anew in every process and never leaves it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from typing import Final

__all__ = ("BrokenSeal", "Sealed", "seal", "unseal")

_KEY: Final = secrets.token_bytes(32)


class BrokenSeal(Exception):
    """The state is not one that `seal` was given in this process."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A state and its authentication code."""

    state: bytes = field(repr=False)
    code: bytes = field(repr=False)


def _code(state: bytes) -> bytes:
    return hmac.digest(_KEY, state, hashlib.sha256)


def seal(state: bytes) -> Sealed:
    """Seal a state that an engine of this process has just written."""
    return Sealed(state, _code(state))


def unseal(sealed: Sealed) -> bytes:
    """The state.

    Raises:
        BrokenSeal: it is not as it was sealed.
    """
    if not hmac.compare_digest(sealed.code, _code(sealed.state)):
        raise BrokenSeal("the state of a session is not what was written; open a new session")
    return sealed.state
