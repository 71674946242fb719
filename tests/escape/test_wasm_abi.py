"""The imports of the wasm backend against a guest of our own making: code that was never CPython, with any pointer it likes.

A cell that corrupts its interpreter's memory can come to this. Nothing of the guest's is used here: the component is written by
hand, each attack is the body of its one export, and the verdict is the host's: how it ended, when, and what it cost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, NamedTuple

import pytest

from rlm_sandbox.registry import load_backend

from ..conftest import require_usable
from .outside import wait_until
from .wasm_host import HostMemory, guest_threads

_MEMORY_MB: Final = 256
#: Seconds after which the host stops the guest, and what it may take beyond.
_STOP_AFTER: Final = 0.3
_MOST_SECONDS: Final = 5.0

#: `%s`: how memory is given out for what the host brings, and what the guest does. Results of imports go to address 64.
_COMPONENT: Final = """
(component
  (import "suspend" (func $suspend (param "frame" string) (result string)))
  (import "write-out" (func $write-out (param "descriptor" u32) (param "raw" bool) (param "text" string)))
  (import "text-piece" (func $text-piece (param "start" u64) (result string)))
  (import "seed" (func $seed (result u64)))
  (import "wasi:random/random@0.2.9" (instance $random
    (export "get-random-bytes" (func (param "len" u64) (result (list u8))))))
  (import "wasi:io/poll@0.2.9" (instance $poll
    (export "pollable" (type $pollable (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $pollable))))
    (export "poll" (func (param "in" (list (borrow $pollable))) (result (list u32))))))
  (alias export $poll "pollable" (type $pollable))
  (import "wasi:clocks/monotonic-clock@0.2.9" (instance $clock
    (alias outer 1 $pollable (type $p))
    (export "pollable" (type $q (eq $p)))
    (export "subscribe-duration" (func (param "when" u64) (result (own $q))))))
  (import "wasi:filesystem/types@0.2.9" (instance $files (export "not-there" (func (param "x" string)))))
  (core module $base
    (memory (export "memory") 32)
    (global $at (mut i32) (i32.const 1048576))
    (func (export "realloc") (param $old i32) (param $had i32) (param $align i32) (param $size i32) (result i32) %s))
  (core instance $base (instantiate $base))
  (alias core export $base "memory" (core memory $memory))
  (alias core export $base "realloc" (core func $realloc))
  (core func $suspend' (canon lower (func $suspend) (memory $memory) (realloc $realloc)))
  (core func $write' (canon lower (func $write-out) (memory $memory)))
  (core func $piece' (canon lower (func $text-piece) (memory $memory) (realloc $realloc)))
  (core func $seed' (canon lower (func $seed)))
  (core func $random' (canon lower (func $random "get-random-bytes") (memory $memory) (realloc $realloc)))
  (core func $block' (canon lower (func $poll "[method]pollable.block")))
  (core func $poll' (canon lower (func $poll "poll") (memory $memory) (realloc $realloc)))
  (core func $subscribe' (canon lower (func $clock "subscribe-duration")))
  (core func $files' (canon lower (func $files "not-there") (memory $memory)))
  (core module $main
    (import "base" "memory" (memory 32))
    (import "host" "suspend" (func $suspend (param i32 i32 i32)))
    (import "host" "write" (func $write (param i32 i32 i32 i32)))
    (import "host" "piece" (func $piece (param i64 i32)))
    (import "host" "seed" (func $seed (result i64)))
    (import "host" "random" (func $random (param i64 i32)))
    (import "host" "block" (func $block (param i32)))
    (import "host" "poll" (func $poll (param i32 i32 i32)))
    (import "host" "subscribe" (func $subscribe (param i64) (result i32)))
    (import "host" "files" (func $files (param i32 i32)))
    (table $t 1 funcref)
    (func $deep (param i64) (result i64) (i64.add (call $deep (local.get 0)) (i64.const 1)))
    (func (export "request") (param $ptr i32) (param $len i32) (result i32) (local $i i32)
      %s
      (i32.const 64)))
  (core instance $main (instantiate $main
    (with "base" (instance $base))
    (with "host" (instance
      (export "suspend" (func $suspend')) (export "write" (func $write')) (export "piece" (func $piece'))
      (export "seed" (func $seed')) (export "random" (func $random')) (export "block" (func $block'))
      (export "poll" (func $poll')) (export "subscribe" (func $subscribe')) (export "files" (func $files'))))))
  (func (export "request") (param "frame" string) (result string)
    (canon lift (core func $main "request") (memory $memory) (realloc $realloc)))
)
"""
_HONEST: Final = "(global.set $at (i32.add (global.get $at) (i32.const 65536))) (i32.sub (global.get $at) (i32.const 65536))"


def _loop(body: str) -> str:
    return f"(loop $l {body} (br $l))"


class Attack(NamedTuple):
    """``ends``: what the host is to see: a trap of its own accord, or that it had to be stopped, or an answer."""

    id: str
    goal: str
    body: str
    ends: tuple[str, ...] = ("trapped",)
    realloc: str = _HONEST
    most_mb: float = 64.0


_FULL: Final = "(drop (memory.grow (i32.const 3000)))"
ATTACKS: Final = (
    Attack("ABI-601", "a text beyond the end of memory", "(call $suspend (i32.const 0xfffffff0) (i32.const 0x7fffffff) (i32.const 64))"),
    Attack("ABI-602", "a text of 4 GiB", "(call $suspend (i32.const 0) (i32.const -1) (i32.const 64))"),
    Attack("ABI-603", "a text that is no UTF-8", "(i32.store (i32.const 128) (i32.const 0xfffefdff)) (call $write (i32.const 1) (i32.const 0) (i32.const 128) (i32.const 4))"),
    Attack("ABI-604", "an answer to an address beyond memory", "(call $piece (i64.const -1) (i32.const 0xfffffff8))"),
    Attack("ABI-605", "a flag that is neither true nor false", _loop("(call $write (i32.const 0xffffffff) (i32.const 77) (i32.const 0) (i32.const 0))"), ("trapped", "stopped")),
    Attack("ABI-606", "texts of 180 MB without end", _FULL + _loop("(call $write (i32.const 1) (i32.const 0) (i32.const 1048576) (i32.const 180000000))"), most_mb=3 * 180.0 + 64),
    Attack("ABI-607", "texts of 60 MB without end", _FULL + _loop("(call $write (i32.const 1) (i32.const 1) (i32.const 1048576) (i32.const 60000000))"), ("stopped",), most_mb=8 * 60.0 + 64),
    Attack("ABI-608", "memory for an answer at an address of its choice", "(call $random (i64.const 256) (i32.const 64))", realloc="(i32.const 0xfffffff0)"),
    Attack("ABI-609", "take for ever to find memory for an answer", "(call $random (i64.const 256) (i32.const 64))", ("stopped",), realloc="(loop $l (br $l)) (i32.const 0)"),
    Attack("ABI-610", "more random numbers than there is memory", "(call $random (i64.const -1) (i32.const 64))"),
    Attack("ABI-611", "random numbers without end", _loop("(call $random (i64.const 4096) (i32.const 64))"), ("stopped",), realloc="(i32.const 1048576)"),
    Attack("ABI-612", "a handle that was never given", "(call $block (i32.const 12345))"),
    Attack("ABI-613", "timers without end", _loop("(drop (call $subscribe (i64.const -1)))")),
    Attack("ABI-614", "wait for a million timers at once", (
        _FULL + "(i32.store (i32.const 128) (call $subscribe (i64.const 0)))"
        "(loop $l (i32.store (i32.add (i32.const 2000000) (i32.mul (local.get $i) (i32.const 4))) (i32.load (i32.const 128)))"
        "(br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 1000000))))"
        "(call $poll (i32.const 2000000) (i32.const 1000000) (i32.const 64))"
    ), most_mb=1024),
    Attack("ABI-615", "wait for no timer", "(call $poll (i32.const 128) (i32.const 0) (i32.const 64))"),
    Attack("ABI-616", "sleep for 500 years", "(call $block (call $subscribe (i64.const 0x7fffffffffffffff)))", ("stopped",)),
    Attack("ABI-617", "return from beyond memory", "(return (i32.const 0xfffffff0))"),
    Attack("ABI-618", "return a text of 4 GiB", "(i32.store (i32.const 64) (i32.const 0)) (i32.store (i32.const 68) (i32.const -1))"),
    Attack("ABI-619", "return nothing", "", ("answered",)),
    Attack("ABI-620", "run for ever", _loop(""), ("stopped",)),
    Attack("ABI-621", "recurse for ever", "(drop (call $deep (i64.const 1)))"),
    Attack("ABI-622", "all of memory, again and again", _loop("(drop (memory.grow (i32.const 1))) (memory.fill (i32.const 0) (i32.const 1) (i32.mul (memory.size) (i32.const 65536)))"), ("stopped",), most_mb=_MEMORY_MB + 64),
    Attack("ABI-623", "memory that is no memory: tables", _loop("(drop (table.grow $t (ref.null func) (i32.const 1000000)))"), ("stopped",)),
    Attack("ABI-624", "an import that is not offered", "(call $files (i32.const 0) (i32.const 1))"),
    Attack("ABI-625", "suspend for ever with nothing", _loop("(call $suspend (i32.const 0) (i32.const 0) (i32.const 64))"), ("stopped",), realloc="(i32.const 1048576)"),
    Attack("ABI-626", "seeds without end", _loop("(drop (call $seed))"), ("stopped",)),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _usable_wasm() -> None:
    require_usable("wasm", load_backend("wasm").probe())


@pytest.fixture(scope="module")
def make_instance() -> Callable[[str, str], Any]:
    """An instance of a component that does what an attack says, with the imports and limits every guest has."""
    from wasmtime import wat2wasm
    from wasmtime.component import Component

    from rlm_sandbox.backends.wasm.engine import shared_engine
    from rlm_sandbox.backends.wasm.instance import Instance
    from rlm_sandbox.backends.wasm.wasi import linker

    loaded = shared_engine(None)

    def make(body: str, realloc: str) -> Instance:
        component = Component(loaded.engine, bytes(wat2wasm(_COMPONENT % (realloc, body))))
        instance = Instance(replace(loaded, component=component, linker=linker(loaded.engine, component)))
        instance.limit_memory(_MEMORY_MB)
        return instance

    return make


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_contained(make_instance: Callable[[str, str], Any], attack: Attack) -> None:
    """It ends by a trap or when it is stopped, soon, at a bounded cost, and leaves no thread running."""
    from rlm_sandbox.backends.wasm.journal import Entry
    from rlm_sandbox.backends.wasm.peer import LivePeer

    instance = make_instance(attack.body, attack.realloc)
    peer = LivePeer(Entry(""))
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        peer.stop()

    started = time.monotonic()
    timer = threading.Timer(_STOP_AFTER, stop)
    with HostMemory() as memory:
        instance.start("frame", peer)
        timer.start()
        while peer.ended is None and peer.failed is None:
            assert time.monotonic() - started < _STOP_AFTER + _MOST_SECONDS
            if peer.suspended is not None:
                peer.suspended = None
                peer.answer("answer")
            peer.take_output()
            time.sleep(0.001)
    timer.cancel()
    ended = "answered" if peer.ended is not None else "stopped" if stopped.is_set() else "trapped"
    assert ended in attack.ends, peer.failed
    assert memory.grown_mb < attack.most_mb
    assert peer.entry.size < 70 << 20
    instance.discard()
    wait_until(lambda: guest_threads() == 0, "a guest runs on")  # the pool makes ready ones, too


def test_ids_are_unique() -> None:
    assert len({attack.id for attack in ATTACKS}) == len(ATTACKS)
