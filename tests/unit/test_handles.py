"""`HandleTable`: the only door from a guest to host code, tried with everything but the right key."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_sandbox import Context, Exposed, expose
from rlm_sandbox.bridge import handles
from rlm_sandbox.bridge.handles import (
    CallFailed,
    CallRefused,
    CallReturned,
    HandleTable,
    HostCall,
    failure,
    opaque,
    plain_copy,
    run_call,
)
from rlm_sandbox.wire.codec import MAX_ELEMENTS, OpaqueValue, ValueRefused

SECRET = "hunter2"


class Store:
    secret = SECRET

    def __init__(self) -> None:
        self.size = 3

    def find(self, key: str, *, limit: int = 5) -> list[Any]:
        return [key, limit]

    def drop(self) -> str:
        raise AssertionError("a guest reached a method that is not in the allow-list")

    async def later(self) -> int:
        return 1

    def __len__(self) -> int:
        return 2

    def __getitem__(self, key: str) -> str:
        return key * 2

    def __contains__(self, key: object) -> bool:
        return key == "a"

    def __iter__(self) -> Iterator[int]:
        return itertools.count()

    def __eq__(self, other: object) -> bool:
        return other == "equal"

    def __hash__(self) -> int:
        return 1

    def __str__(self) -> str:
        return "a store"


@pytest.fixture
def table() -> HandleTable:
    return HandleTable()


@pytest.fixture
def store(table: HandleTable) -> int:
    return bind(
        table, expose(Store(), methods=("find", "later"), attributes=("size",), operators=("len", "getitem", "iter", "str"))
    )


def bind(table: HandleTable, target: Any, **kwargs: Any) -> int:
    return table.add("thing", target, **kwargs)[1].handle


def called(table: HandleTable, handle: int, method: str | None = None, args: Any = (), kwargs: Any = None) -> Any:
    outcome = run_call(table.resolve(handle, method, args, {} if kwargs is None else kwargs))
    assert isinstance(outcome, CallReturned), outcome
    return outcome.value


# ---- add


def test_kinds_and_references(table: HandleTable) -> None:
    async def coroutine() -> None: ...

    class Asks:
        async def __call__(self) -> None: ...

    assert table.add("f", len)[0] == "function"
    assert table.add("f", Store().find)[0] == "function"
    assert table.add("f", coroutine)[0] == "async"
    assert table.add("f", Asks())[0] == "async"
    kind, reference = table.add("s", expose(Store(), methods=("find",), operators=("len",)))
    assert kind == "object"
    assert (reference.type_name, reference.methods, reference.attributes, reference.operators) == ("Store", ("find",), (), ("len",))
    assert table.add("c", Context.from_text("x"))[1].type_name == "Context"


def test_handles_are_never_given_twice(table: HandleTable) -> None:
    first = bind(table, len)
    table.remove(first)
    assert bind(table, len) != first


@pytest.mark.parametrize("target", [1, "text", None, object(), int, Store, [], Store()])
def test_what_cannot_be_bound(table: HandleTable, target: Any) -> None:
    with pytest.raises(TypeError, match="bind"):
        table.add("x", target)
    assert len(table) == 0


def test_errors_are_exception_classes(table: HandleTable) -> None:
    for wrong in (ValueError, [ValueError], ("ValueError",), (ValueError(),), (int,)):
        with pytest.raises(TypeError, match="exception classes"):
            bind(table, len, errors=wrong)


def test_an_async_function_is_not_inline(table: HandleTable) -> None:
    async def coroutine() -> None: ...

    with pytest.raises(TypeError, match="inline"):
        bind(table, coroutine, inline=True)


def test_an_allow_list_made_by_hand_opens_no_private_name(table: HandleTable) -> None:
    for made in (Exposed(Store(), frozenset({"__class__"})), Exposed(Store(), frozenset(), frozenset({"_x"}))):
        with pytest.raises(TypeError, match="public names"):
            table.add("x", made)


def test_handles_are_capped(table: HandleTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "MAX_HANDLES", 3)
    for _ in range(3):
        bind(table, len)
    with pytest.raises(ValueError, match="3 handles"):
        bind(table, len)
    with pytest.raises(ValueRefused):
        table.export(expose(Store()))


# ---- resolve


def test_a_function_is_called(table: HandleTable) -> None:
    handle = bind(table, lambda *args, **kwargs: (args, kwargs))
    assert called(table, handle, None, [1, "a"], {"k": None}) == ((1, "a"), {"k": None})
    assert called(table, handle, None, ("a",)) == (("a",), {})


def test_methods_attributes_and_operators_of_the_list(table: HandleTable, store: int) -> None:
    assert called(table, store, "find", ["x"], {"limit": 2}) == ["x", 2]
    assert called(table, store, ".size") == 3
    assert called(table, store, "#len") == 2
    assert called(table, store, "#getitem", ["ab"]) == "abab"
    assert called(table, store, "#str") == "a store"
    assert table.resolve(store, "later", [], {}).is_async
    assert not table.resolve(store, "find", [], {}).is_async


def test_an_endless_iterator_is_cut_where_the_codec_refuses_it(table: HandleTable, store: int) -> None:
    assert len(called(table, store, "#iter")) == MAX_ELEMENTS + 1


@pytest.mark.parametrize(
    "method",
    [
        None, "", "drop", "secret", "size", ".secret", ".find", ".", "..size", ".size.real", "#contains", "#eq", "#bool", "#", "#__len__",
        "#find", "find.__globals__", "find\0", " find", "__class__", ".__class__", "__init__", "__getattribute__", "__dict__", ".__dict__",
        "\ud800", "f" * 1_000_000, "{0.secret}", "ﬁnd",
    ],
    ids=lambda method: repr(method)[:20].encode("ascii", "replace").decode(),
)  # fmt: skip
def test_everything_else_is_refused(table: HandleTable, store: int, method: str | None) -> None:
    for args in ([], ["a"], ["secret"]):
        with pytest.raises(CallRefused) as caught:
            table.resolve(store, method, args, {})
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("method", ["find", ".size", "#len", "__call__", ".__globals__", ""])
def test_a_function_has_no_members(table: HandleTable, method: str) -> None:
    with pytest.raises(CallRefused):
        table.resolve(bind(table, len), method, [], {})


@pytest.mark.parametrize("method", [".size", "#len"])
def test_reading_takes_no_arguments(table: HandleTable, store: int, method: str) -> None:
    for args, kwargs in (([1], {}), ([], {"default": 1}), (["secret"], {})):
        with pytest.raises(CallRefused):
            table.resolve(store, method, args, kwargs)


def test_operators_take_as_many_arguments_as_they_have(table: HandleTable, store: int) -> None:
    for args in ([], ["a", "b"]):
        with pytest.raises(CallRefused):
            table.resolve(store, "#getitem", args, {})


@pytest.mark.parametrize("handle", [0, -1, 10**30, None, "1", 1.0, True, [], {}, (1,)])
def test_handles_are_whole_numbers_that_were_given_out(table: HandleTable, handle: Any) -> None:
    assert bind(table, len) == 1
    with pytest.raises(CallRefused):
        table.resolve(handle, None, [], {})


@pytest.mark.parametrize(
    ("method", "args", "kwargs"),
    [
        (None, "ab", {}), (None, None, {}), (None, {"a": 1}, {}), (None, {1}, {}), (None, [], None), (None, [], []), (None, [], {1: 2}),
        (None, [], {"a b": 1}), (None, [], {"": 1}), (None, [], {None: 1}), (None, OpaqueValue("a", "b"), {}), (1, [], {}), ([], [], {}),
        (b"find", [], {}),
    ],
)  # fmt: skip
def test_malformed_requests_are_refused(table: HandleTable, method: Any, args: Any, kwargs: Any) -> None:
    with pytest.raises(CallRefused):
        table.resolve(bind(table, len), method, args, kwargs)


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.text(max_size=8) | st.sampled_from([".size", "#len", "find", "#getitem"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(handle=_ANY, method=_ANY, args=_ANY, kwargs=_ANY)
def test_any_request_is_a_call_of_the_list_or_refused(handle: Any, method: Any, args: Any, kwargs: Any) -> None:
    table = HandleTable()
    bind(table, expose(Store(), methods=("find",), attributes=("size",), operators=("len", "getitem")))
    try:
        call = table.resolve(handle, method, args, kwargs)
    except CallRefused:
        return
    assert call.name in ("thing.find", "thing.size", "thing (len)", "thing (getitem)")
    run_call(call)


def test_a_method_that_went_away_is_refused(table: HandleTable) -> None:
    target = Store()
    target.extra = len  # type: ignore[attr-defined]
    handle = bind(table, expose(target, methods=("extra",)))
    del target.extra  # type: ignore[attr-defined]
    with pytest.raises(CallRefused):
        table.resolve(handle, "extra", [], {})


def test_handles_of_a_lost_guest_are_dropped(table: HandleTable) -> None:
    kept = bind(table, len)
    mark = table.mark()
    result = table.export(expose(Store(), methods=("find",)))
    assert called(table, result.handle, "find", ["x"]) == ["x", 5]
    table.drop_since(mark)
    with pytest.raises(CallRefused):
        table.resolve(result.handle, "find", ["x"], {})
    assert called(table, kept, None, ["abc"]) == 3
    table.remove(kept)
    table.remove(kept)
    with pytest.raises(CallRefused):
        table.resolve(kept, None, ["abc"], {})
    assert len(table) == 0


# ---- outcomes


def host_call(function: Any, *args: Any, errors: tuple[type[BaseException], ...] = (), inline: bool = False) -> HostCall:
    return HostCall("llm_query", function, args, {}, inline, False, errors)


def raises(exc: BaseException) -> Any:
    def function() -> None:
        raise exc

    return function


@pytest.mark.parametrize(
    "exc", [ValueError(SECRET), KeyError(SECRET), SystemExit(SECRET), GeneratorExit(SECRET), asyncio.CancelledError(SECRET)]
)
def test_failures_are_scrubbed_and_logged(exc: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rlm_sandbox"):
        assert run_call(host_call(raises(exc))) == CallFailed("HostCallError", "llm_query failed")
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[1] is exc


def test_allowed_errors_keep_their_text_up_to_a_length() -> None:
    class Quota(Exception):
        pass

    assert run_call(host_call(raises(Quota("none left")), errors=(Quota,))) == CallFailed("Quota", "none left")
    long = run_call(host_call(raises(Quota("x" * 10_000)), errors=(Quota,)))
    assert long == CallFailed("Quota", "x" * handles.MAX_MESSAGE_CHARS)
    assert run_call(host_call(raises(ValueError(SECRET)), errors=(Quota,))) == CallFailed("HostCallError", "llm_query failed")


def test_an_allowed_error_with_a_broken_text_is_harmless() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError(SECRET)

    assert failure(host_call(len, errors=(Broken,)), Broken()) == CallFailed("Broken", "")


def test_ctrl_c_in_an_inline_function_is_the_hosts() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_call(host_call(raises(KeyboardInterrupt()), inline=True))
    assert run_call(host_call(raises(KeyboardInterrupt()))) == CallFailed("HostCallError", "llm_query failed")


# ---- values


def test_plain_copy_is_a_copy_of_plain_data() -> None:
    value = {"a": [1, (2, b"x")], "long": "y" * 1_000}
    copy = plain_copy(value, max_bytes=None)
    assert copy == value
    assert copy["a"] is not value["a"]
    with pytest.raises(ValueRefused):
        plain_copy(object(), max_bytes=None)
    with pytest.raises(ValueRefused):
        plain_copy("x" * 100, max_bytes=50)


def test_export_makes_handles_of_exposed_results_only(table: HandleTable) -> None:
    copy = plain_copy([expose(Store(), methods=("find",))], max_bytes=None, fallback=table.export)
    assert called(table, copy[0].handle, "find", ["x"]) == ["x", 5]
    for value in (Store(), len, lambda: 1, Store, object()):
        with pytest.raises(ValueRefused):
            table.export(value)


def test_opaque_survives_a_broken_repr() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    assert opaque(Broken()) == OpaqueValue("Broken", "<repr failed>")


_TEXT = Context.from_documents(["a" * 40 + "c"])
_CATASTROPHIC = "(a|aa)+$"


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (_TEXT.find, (_CATASTROPHIC,), {"regex": True}),
        (_TEXT.page, (1, _CATASTROPHIC), {}),
        (_TEXT.page, (1,), {"marker_pattern": _CATASTROPHIC}),
        (functools.partial(_TEXT.find, regex=True), (_CATASTROPHIC,), {}),
        (functools.partial(functools.partial(_TEXT.find, _CATASTROPHIC), max_matches=1), (), {"regex": True}),
        (functools.partial(_TEXT.page, 1), (_CATASTROPHIC,), {}),
        (_TEXT.find, ("b" * 100_000_000,), {"case_sensitive": False}),
    ],
)
def test_a_method_of_a_context_bound_by_itself_runs_no_pattern_on_the_host(
    table: HandleTable, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """``bind("search", ctx.find)`` is not a way around what ``bind("ctx", ctx)`` refuses."""
    handle = bind(table, target)
    with pytest.raises(CallRefused, match="slice"):
        table.resolve(handle, None, args, kwargs)
    call = table.resolve(bind(table, _TEXT.find), None, ("aac",), {})
    assert call.function(*call.args, **call.kwargs) == [(38, 41, "aac")]
