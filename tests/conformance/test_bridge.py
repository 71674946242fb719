"""The bridge from a guest to the host: functions, exposed objects, the context, and what is refused."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from rlm_sandbox import Context, Feature, REPLProtocol, SessionBusy, expose

from ..conftest import OpenSession
from .support import MISSING, error_type, needs, ok, run

SECRET = "the password is hunter2 in /home/alice/.config"

#: A guest cell that tries something and leaves the outcome in ``r``.
TRY = "try:\n    r = ('returned', {call})\nexcept Exception as e:\n    r = ('raised', str(e))"


def attempt(repl: REPLProtocol, call: str) -> Any:
    """What ``call`` comes to in the guest: ("returned", value) or ("raised", message)."""
    return run(repl, TRY.format(call=call), "r")


def refused(repl: REPLProtocol, call: str) -> bool:
    return bool(attempt(repl, call)[0] == "raised")


# ---- functions


def test_a_bound_function_is_called_with_plain_data(repl: REPLProtocol) -> None:
    seen: list[Any] = []

    def f(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return {"n": len(args), "names": sorted(kwargs)}

    repl.bind("f", f)
    assert run(repl, "r = f(1, [2, 'three'], key={'a': None}, other=(4,))", "r") == {"n": 2, "names": ["key", "other"]}
    assert seen == [((1, [2, "three"]), {"key": {"a": None}, "other": (4,)})]


def test_a_function_may_return_nothing(repl: REPLProtocol) -> None:
    repl.bind("f", lambda: None)
    assert run(repl, "r = [f()]", "r") == [None]


def test_a_function_is_called_in_order_and_from_functions(repl: REPLProtocol) -> None:
    seen: list[int] = []
    repl.bind("f", seen.append)
    ok(repl.exec("def twice(n):\n    f(n)\n    f(n + 1)\nfor i in (10, 20):\n    twice(i)"))
    assert seen == [10, 11, 20, 21]


def test_a_function_runs_on_the_pool_unless_inline(repl: REPLProtocol) -> None:
    repl.bind("pooled", threading.get_ident)
    repl.bind("inline", threading.get_ident, inline=True)
    pooled, inline = run(repl, "r = [pooled(), inline()]", "r")
    assert inline == threading.get_ident()
    assert pooled != threading.get_ident()


def test_a_bound_method_and_a_callable_object(repl: REPLProtocol) -> None:
    class Model:
        def __call__(self, prompt: str) -> str:
            return prompt.upper()

        def ask(self, prompt: str) -> str:
            return prompt[::-1]

    model = Model()
    repl.bind("call", model)
    repl.bind("ask", model.ask)
    assert run(repl, "r = [call('abc'), ask('abc')]", "r") == ["ABC", "cba"]


def test_binding_a_name_again_replaces_it(repl: REPLProtocol) -> None:
    repl.bind("f", lambda: "old")
    repl.bind("f", lambda: "new")
    assert run(repl, "r = f()", "r") == "new"


def test_a_guest_may_take_a_function_along(repl: REPLProtocol) -> None:
    repl.bind("f", lambda x: x + 1)
    assert run(repl, "g = f\nr = [g(1) for _ in range(2)]", "r") == [2, 2]


@needs(Feature.TOP_LEVEL_AWAIT)
def test_an_async_function_is_awaitable(repl: REPLProtocol) -> None:
    async def f(x: int) -> int:
        await asyncio.sleep(0)
        return x * 2

    repl.bind("f", f)
    assert run(repl, "r = await f(21)", "r") == 42


@needs(Feature.TOP_LEVEL_AWAIT, Feature.ASYNC)
def test_gather_runs_async_functions_in_parallel(repl: REPLProtocol) -> None:
    started: list[int] = []
    both = asyncio.Event()

    async def f(x: int) -> int:
        started.append(x)
        if len(started) == 3:
            both.set()
        await asyncio.wait_for(both.wait(), 20)
        return x * 2

    repl.bind("f", f)
    assert list(run(repl, "import asyncio\nr = await asyncio.gather(f(1), f(2), f(3))", "r")) == [2, 4, 6]


@needs(Feature.THREADS)
def test_guest_threads_call_the_host_in_parallel(repl: REPLProtocol) -> None:
    barrier = threading.Barrier(3)

    def f(x: int) -> int:
        barrier.wait(20)
        return x * 2

    repl.bind("f", f)
    code = "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(3) as pool:\n    r = list(pool.map(f, [1, 2, 3]))"
    assert run(repl, code, "r") == [2, 4, 6]


def test_bind_refuses_what_it_cannot_bridge(repl: REPLProtocol) -> None:
    for target in (42, "text", [1], object(), int):
        with pytest.raises(TypeError):
            repl.bind("x", target)
    assert repl.get("x", MISSING) is MISSING


@pytest.mark.parametrize("name", ["not a name", "1x", "", "class", "a.b"])
def test_bind_and_set_want_an_identifier(repl: REPLProtocol, name: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        repl.bind(name, lambda: 1)
    with pytest.raises(ValueError, match=r"."):
        repl.set(name, 1)


# ---- errors


def test_a_failure_is_scrubbed(repl: REPLProtocol, caplog: pytest.LogCaptureFixture) -> None:
    def llm_query(prompt: str) -> str:
        raise RuntimeError(SECRET)

    repl.bind("llm_query", llm_query)
    with caplog.at_level(logging.INFO, logger="rlm_sandbox"):
        outcome, message = attempt(repl, "llm_query('hello')")
        result = repl.exec("llm_query('hello')")
    assert outcome == "raised"
    assert "llm_query failed" in message
    assert result.outcome == "error"
    shown = f"{message}{result.error}{result.traceback}{result.stdout}{result.stderr}"
    assert "hunter2" not in shown
    assert "alice" not in shown
    assert __file__ not in shown
    assert any(record.exc_info for record in caplog.records), "the host's log has the whole of it"


def test_a_failure_is_a_host_call_error(repl: REPLProtocol) -> None:
    def llm_query(prompt: str) -> str:
        raise RuntimeError(SECRET)

    repl.bind("llm_query", llm_query)
    assert repl.exec("llm_query('hello')").error == "HostCallError: llm_query failed"
    code = "try:\n    llm_query('hello')\nexcept HostCallError as e:\n    r = isinstance(e, Exception)"
    assert run(repl, code, "r") is True


class QuotaExceeded(Exception):
    """An exception class of the host, whose message the guest may see."""


def test_allowed_errors_keep_their_message(repl: REPLProtocol) -> None:
    def f(kind: str) -> str:
        if kind == "quota":
            raise QuotaExceeded("5 calls are left of 5")
        raise ValueError(SECRET)

    repl.bind("f", f, errors=(QuotaExceeded,))
    assert "5 calls are left of 5" in attempt(repl, "f('quota')")[1]
    assert "hunter2" not in attempt(repl, "f('other')")[1]
    assert "5 calls are left of 5" in (repl.exec("f('quota')").error or "")


def test_an_allowed_builtin_error_keeps_its_type(repl: REPLProtocol) -> None:
    def f() -> str:
        raise ValueError("not a date")

    repl.bind("f", f, errors=(ValueError,))
    assert repl.exec("f()").error == "ValueError: not a date"
    assert run(repl, "try:\n    f()\nexcept ValueError as e:\n    r = str(e)", "r") == "not a date"


@pytest.mark.parametrize("raised", [SystemExit(SECRET), KeyboardInterrupt(), GeneratorExit()])
def test_whatever_a_pooled_function_raises_is_the_guests_failure(repl: REPLProtocol, raised: BaseException) -> None:
    def f() -> None:
        raise raised

    repl.bind("f", f)
    assert refused(repl, "f()")
    assert run(repl, "x = 1", "x") == 1


def test_wrong_arguments_are_a_failure_of_the_call(repl: REPLProtocol) -> None:
    repl.bind("f", lambda a: a)
    assert refused(repl, "f()")
    assert refused(repl, "f(1, 2)")
    assert refused(repl, "f(b=1)")
    assert attempt(repl, "f(a=1)") == ("returned", 1)


def test_a_result_that_is_not_plain_data_is_refused(repl: REPLProtocol) -> None:
    for made in (object(), lambda: 1, QuotaExceeded, {"x": object()}):
        repl.bind("f", lambda made=made: made)
        outcome, message = attempt(repl, "f()")
        assert outcome == "raised"
        assert "0x" not in message, "no address of the host in an error text"


def test_guest_callables_are_refused_as_arguments(repl: REPLProtocol) -> None:
    calls: list[Any] = []
    repl.bind("f", calls.append)
    repl.exec("def mine():\n    return 1")
    repl.exec("f(mine)")
    repl.exec("f([mine])")
    repl.exec("f(lambda: 1)")
    assert not any(callable(item) for call in calls for item in (call if isinstance(call, list) else [call]))
    assert calls == [], "a callable argument is refused, not turned into something else"


# ---- exposed objects


class Store:
    """A host object with things a guest may and may not reach."""

    size = 3
    secret = SECRET

    def __init__(self) -> None:
        self.items = {"a": 1, "b": 2}
        self._private = SECRET

    def lookup(self, key: str, default: int = 0) -> int:
        return self.items.get(key, default)

    def drop_everything(self) -> str:
        return SECRET

    def child(self, key: str) -> Any:
        return expose(Store(), methods=("lookup",))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: str) -> int:
        return self.items[key]

    def __contains__(self, key: str) -> bool:
        return key in self.items

    def __iter__(self) -> Any:
        return iter(self.items)


@pytest.fixture
def store(repl: REPLProtocol) -> Store:
    made = Store()
    repl.bind("store", expose(made, methods=("lookup", "child"), attributes=("size",)))
    return made


def test_methods_of_the_allow_list(repl: REPLProtocol, store: Store) -> None:
    assert run(repl, "r = [store.lookup('a'), store.lookup('z', default=9)]", "r") == [1, 9]


def test_attributes_of_the_allow_list(repl: REPLProtocol, store: Store) -> None:
    assert run(repl, "r = store.size", "r") == 3
    store.size = 4
    assert run(repl, "r = store.size", "r") == 4


@pytest.mark.parametrize(
    "call",
    [
        "store.secret",
        "store.drop_everything()",
        "store._private",
        "store.items",
        "store.__dict__['items']",
        "store.lookup.__globals__['SECRET']",
        "store.lookup.__self__.secret",
        "len(store)",
        "store['a']",
        "store()",
    ],
)
def test_everything_else_is_refused(repl: REPLProtocol, store: Store, call: str) -> None:
    result = repl.exec(f"r = {call}")
    assert result.outcome == "error"
    assert "hunter2" not in f"{result.error}{result.traceback}"


def test_the_real_class_and_its_builtins_are_out_of_reach(repl: REPLProtocol, store: Store) -> None:
    result = repl.exec("r = store.__class__.__init__.__globals__['SECRET']")
    assert result.outcome == "error"
    assert "hunter2" not in f"{repl.get('r')}{result.error}"


def test_a_guest_cannot_write_attributes_of_the_host(repl: REPLProtocol, store: Store) -> None:
    repl.exec("store.size = 99")
    repl.exec("store.secret = 'mine'")
    assert (store.size, store.secret) == (3, SECRET)


def test_a_method_may_return_another_exposed_object(repl: REPLProtocol, store: Store) -> None:
    assert run(repl, "child = store.child('x')\nr = child.lookup('b')", "r") == 2
    assert repl.exec("child.child('x')").outcome == "error"


def test_operators_of_the_allow_list(repl: REPLProtocol) -> None:
    repl.bind("store", expose(Store(), operators=("len", "getitem", "contains", "iter", "bool")))
    assert run(repl, "r = [len(store), store['b'], 'a' in store, 'z' in store, sorted(store), bool(store)]", "r") == [
        2, 2, True, False, ["a", "b"], True,
    ]  # fmt: skip
    assert repl.exec("store['nope']").outcome == "error"


def test_a_proxy_comes_back_as_no_plain_value(repl: REPLProtocol, store: Store) -> None:
    assert not isinstance(repl.get("store"), dict | str | Store)


# ---- the context

TEXT = "alpha beta gamma\nthe needle is here\nand the needle again\n"


@pytest.fixture
def ctx(repl: REPLProtocol) -> Context:
    context = Context.from_text(TEXT)
    repl.bind("ctx", context)
    return context


@pytest.mark.parametrize(
    "call",
    [
        "ctx.find('needle')",
        "ctx.find('needle', max_matches=1)",
        "ctx.find('NEEDLE', case_sensitive=False)",
        "ctx.find(r'n\\w+e', regex=True)",
        "ctx.find('needle', start=30)",
        "ctx.find('nothing')",
        "ctx.find('')",
        "ctx.slice(0, 5)",
        "ctx.slice(-5, 10**6)",
        "ctx.chunk(20)",
        "ctx.chunk(20, overlap=5)",
        "ctx.len_chars()",
        "ctx.num_documents()",
        "ctx.get_document(0)",
        "ctx.document_lengths()",
        "ctx.chunk_documents(2)",
        "ctx.metadata()",
        "ctx.page(1)",
    ],
)
def test_the_context_means_the_same_as_on_the_host(repl: REPLProtocol, ctx: Context, call: str) -> None:
    expected = eval(call, {"ctx": ctx})
    assert run(repl, f"r = {call}", "r") == expected


def test_documents_of_the_context(repl: REPLProtocol) -> None:
    context = Context.from_documents(["first text", "zweiter täxt", "third \U0001f600 text"])
    repl.bind("ctx", context)
    assert run(repl, "r = [ctx.get_document(i) for i in range(ctx.num_documents())]", "r") == [
        "first text", "zweiter täxt", "third \U0001f600 text",
    ]  # fmt: skip
    assert run(repl, "r = ctx.find('text')", "r") == context.find("text")
    assert run(repl, "r = ctx.document_lengths()", "r") == [10, 12, 12]
    assert refused(repl, "ctx.get_document(3)")


@pytest.mark.parametrize("text", ["", "a", "é" * 10, "日本" * 10, "\U0001f600x" * 10, "a\x00b", "x" * 100_000])
def test_contexts_of_every_width(repl: REPLProtocol, text: str) -> None:
    repl.bind("ctx", Context.from_text(text))
    assert run(repl, "r = [ctx.len_chars(), ctx.slice(0, 3), ctx.slice(ctx.len_chars() - 2, ctx.len_chars())]", "r") == [
        len(text), text[:3], text[max(0, len(text) - 2):],
    ]  # fmt: skip


def test_operators_of_the_context(repl: REPLProtocol, ctx: Context) -> None:
    assert run(repl, "r = [len(ctx), ctx[0], ctx[6:10], ctx[-6:], 'needle' in ctx, 'nope' in ctx]", "r") == [
        len(TEXT), "a", "beta", TEXT[-6:], True, False,
    ]  # fmt: skip


def test_the_whole_text_is_a_string(repl: REPLProtocol) -> None:
    context = Context.from_text(TEXT + "é日\U0001f600")
    repl.bind("P", context.whole)
    assert run(repl, "r = [len(P), P[6:10], P.count('needle'), P.splitlines()[1], 'here' in P]", "r") == [
        len(context.text), "beta", 2, "the needle is here", True,
    ]  # fmt: skip
    assert repl.get("P") == context.text


def test_a_context_survives_its_use_after_an_error(repl: REPLProtocol, ctx: Context) -> None:
    repl.exec("hits = ctx.find('needle')\n1 / 0")
    assert run(repl, "r = len(hits) + ctx.len_chars()", "r") == 2 + len(TEXT)


def test_a_bad_pattern_is_the_guests_error(repl: REPLProtocol, ctx: Context) -> None:
    assert refused(repl, "ctx.find('(', regex=True)")
    assert run(repl, "r = ctx.len_chars()", "r") == len(TEXT)


# ---- turns


def test_a_second_call_from_a_host_function_is_refused(repl: REPLProtocol) -> None:
    caught: list[BaseException] = []

    def nested() -> str:
        for call in (lambda: repl.exec("y = 1"), lambda: repl.get("x"), lambda: repl.set("x", 2), repl.names, repl.reset):
            try:
                call()
            except SessionBusy as exc:
                caught.append(exc)
        return "done"

    repl.bind("pooled", nested)
    repl.bind("inline", nested, inline=True)
    assert run(repl, "x = 1\nr = [pooled(), inline()]", "r") == ["done", "done"]
    assert len(caught) == 10
    assert repl.get("y", MISSING) is MISSING
    assert repl.get("x") == 1


def test_a_host_function_may_open_and_use_another_session(repl: REPLProtocol, open_session: OpenSession) -> None:
    def nested(n: int) -> int:
        inner = open_session()
        try:
            result: int = run(inner, f"r = {n} * 2", "r")
            return result
        finally:
            inner.close()

    repl.bind("pooled", nested)
    repl.bind("inline", nested, inline=True)
    assert run(repl, "r = [pooled(1), inline(2)]", "r") == [2, 4]


def test_host_calls_in_a_cell_that_fails_afterwards(repl: REPLProtocol) -> None:
    calls: list[int] = []
    repl.bind("f", calls.append)
    assert error_type(repl.exec("f(1)\nraise ValueError('after')")) == "ValueError"
    ok(repl.exec("f(2)"))
    assert calls == [1, 2]
