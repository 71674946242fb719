"""Coverage-guided fuzzing of `HandleTable.resolve`: whatever a guest asks for is a call of the allow-list or refused.

Run by ``make fuzz``, or: ``python fuzz/fuzz_handles.py fuzz/corpus/handles -max_total_time=60``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import atheris

with atheris.instrument_imports(include=["rlm_sandbox.bridge.handles", "rlm_sandbox.wire", "rlm_sandbox.context"]):
    from rlm_sandbox import Context, expose
    from rlm_sandbox.bridge.handles import CallRefused, CallReturned, HandleTable, run_call
    from rlm_sandbox.wire.codec import Decoder, Encoder, ValueRefused, WireError


class Store:
    """A host object: what is not exposed ends the run when it is reached."""

    size = 3

    def find(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [list(args), sorted(kwargs)]

    def drop(self, *args: Any, **kwargs: Any) -> None:
        raise SystemExit("a guest reached a method that is not exposed")

    @property
    def secret(self) -> str:
        raise SystemExit("a guest reached an attribute that is not exposed")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, key: Any) -> Any:
        return key


TABLE = HandleTable()
TABLE.add("store", expose(Store(), methods=("find",), attributes=("size",), operators=("len", "getitem")))
TABLE.add("ctx", Context.from_documents(["first text", "second text"]))
TABLE.add("f", lambda *args, **kwargs: [list(args), kwargs])
NAMES = {"store.find", "store.size", "store (len)", "store (getitem)", "f"}


def one_input(data: bytes) -> None:
    """The bytes as JSON text of a call: handle, method, arguments as trees."""
    try:
        fields = json.loads(data)
        handle, method, args, kwargs = fields
    except (ValueError, TypeError, RecursionError):
        return
    try:
        decoder = Decoder(["text", b"bytes"])
        call = TABLE.resolve(handle, method, decoder.decode(args), decoder.decode(kwargs))
    except (WireError, CallRefused) as exc:
        if len(str(exc)) > 300:
            raise AssertionError("a refusal quotes what the guest sent") from None
        return
    assert call.name in NAMES or call.name.startswith("ctx"), call.name
    outcome = run_call(call)
    if isinstance(outcome, CallReturned):
        try:
            Encoder(TABLE.export, max_bytes=1 << 20).encode(outcome.value)
        except ValueRefused:
            pass
    elif call.name.startswith(("ctx", "store", "f")):
        assert outcome.message == f"{call.name} failed", "the guest sees the text of a host exception"


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
