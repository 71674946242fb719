"""Bytes, arrays and tables as contexts: mapped, read-only, the same as on the host, and what cannot be mapped says so."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlm_sandbox import DataContext, GuestError, Limits, REPLProtocol, open_repl
from rlm_sandbox.bridge.handles import HandleTable
from rlm_sandbox.context import backing
from rlm_sandbox.registry import load_backend

from ..conftest import require_usable


@pytest.fixture(autouse=True)
def usable() -> None:
    require_usable("jail", load_backend("jail").probe())


@pytest.fixture
def repl() -> Iterator[REPLProtocol]:
    with open_repl("jail", limits=Limits(memory_mb=64)) as repl:
        yield repl


@pytest.fixture(scope="module")
def tables() -> Iterator[REPLProtocol]:
    with open_repl("jail", limits=Limits(memory_mb=256), packages=("numpy", "pandas")) as repl:
        yield repl


def value(repl: REPLProtocol, code: str) -> Any:
    result = repl.exec(f"answer = {code}", read=("answer",))
    assert result.ok, result
    return result.read["answer"]


def anonymous_kb(repl: REPLProtocol) -> int:
    pid = repl._guest._worker_pid  # type: ignore[attr-defined]
    return next(
        int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon:")
    )


@pytest.mark.parametrize("size", [0, 1, 2, 4095, 4096, 4097, 100_000])
def test_bytes_are_bytes(size: int, repl: REPLProtocol) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    repl.bind("data", DataContext.from_bytes(data))
    repl.set("same", data)
    tests = "type(data) is bytes, data == same, len(data), hash(data) == hash(same), data[-3:], data.find(b'\\xfe\\xff')"
    assert value(repl, f"({tests})") == (True, True, size, True, data[-3:], data.find(b"\xfe\xff"))
    assert value(repl, "(data + b'x')[-2:], bytes(memoryview(data)) == same, {data: 1}[same]") == ((data + b"x")[-2:], True, 1)


def test_bytes_beyond_the_memory_limit_cost_the_guest_nothing(repl: REPLProtocol) -> None:
    data = DataContext.from_bytes(memoryview(bytearray(150_000_000)))
    before = anonymous_kb(repl)
    repl.bind("data", data)
    assert value(repl, "len(data), data.count(b'\\x01')") == (150_000_000, 0)
    assert anonymous_kb(repl) - before < 1024


def test_bytes_survive_a_kill_and_a_reset(repl: REPLProtocol) -> None:
    repl.bind("data", DataContext.from_bytes(b"abc" * 10_000))
    assert repl.exec("import os; os.kill(os.getpid(), 9)").state == "restored"
    assert value(repl, "data[-3:]") == b"abc"
    repl.reset()
    assert value(repl, "data[-3:]") == b"abc"


def test_mapped_bytes_cannot_be_written(repl: REPLProtocol) -> None:
    """By an object built over the same address: the page is read-only, and the process dies of it, not the data."""
    context = DataContext.from_bytes(b"original" * 1000)
    repl.bind("data", context)
    attack = "import ctypes; ctypes.memset(id(data) + 32, 0x58, 8)"
    result = repl.exec(attack)
    assert result.outcome in ("crashed", "error"), result
    assert os.pread(context.memory_file().fd, 8, 0) == b"original"
    assert value(repl, "data[:8]") == b"original"


@pytest.mark.parametrize("dtype", ["?", "i1", "<u4", ">i8", "f4", "f8", "c16", "M8[ns]", "m8[s]"])
def test_an_array_is_the_same_and_read_only(dtype: str, tables: REPLProtocol) -> None:
    array = np.arange(24).astype(dtype).reshape(2, 3, 4)
    tables.bind("a", DataContext.from_array(array))
    assert value(tables, "(str(a.dtype), a.shape, a.tobytes(), a.flags.writeable)") == (
        str(array.dtype),
        (2, 3, 4),
        array.tobytes(),
        False,
    )
    tables.bind("a", DataContext.from_array(array[:, ::2].T))
    assert value(tables, "(a.shape, a.tobytes())") == (array[:, ::2].T.shape, array[:, ::2].T.tobytes())


def test_a_large_table_is_mapped(tables: REPLProtocol) -> None:
    """160 MB of numbers in a guest that may have 256 beside pandas; nothing of it is copied."""
    rows = 10_000_000
    frame = pd.DataFrame({"i": np.arange(rows), "f": np.arange(rows) / 2})
    context = DataContext.from_dataframe(frame)
    tables.exec("import pandas")
    before = anonymous_kb(tables)
    tables.bind("df", context)
    assert value(tables, "(df.shape, int(df['i'].sum()), float(df['f'].max()))") == (
        (rows, 2),
        rows * (rows - 1) // 2,
        (rows - 1) / 2,
    )
    assert anonymous_kb(tables) - before < 20_000


def test_a_table_of_many_kinds_is_the_same(tables: REPLProtocol) -> None:
    frame = pd.DataFrame(
        {
            "n": [3, 1, 2],
            "x": [0.5, float("nan"), -1.0],
            "yes": [True, False, True],
            "when": pd.to_datetime(["2020-01-01", "2021-02-03", None]),
            "text": ["caf\u00e9", None, "\U0001f600 long" * 100],
            "object": np.array(["a", "", None], dtype=object),
        }
    )
    tables.bind("df", DataContext.from_dataframe(frame))
    assert value(tables, "list(df.columns)") == list(frame.columns)
    assert value(tables, "df['n'].tolist(), df['x'].isna().tolist(), df['yes'].tolist()") == (
        [3, 1, 2],
        [False, True, False],
        [True, False, True],
    )
    assert value(tables, "[None if t != t or t is None else t for t in df['text']]") == ["caf\u00e9", None, "\U0001f600 long" * 100]
    assert value(tables, "[t if isinstance(t, str) else None for t in df['object']]") == ["a", "", None]
    assert value(tables, "df['when'][1].to_pydatetime(), df['when'].isna().tolist()") == (
        dt.datetime(2021, 2, 3),
        [False, False, True],
    )
    assert value(tables, "df.groupby('yes')['n'].sum().to_dict()") == {False: 1, True: 5}
    empty = DataContext.from_dataframe(pd.DataFrame({"a": np.array([], dtype=float)}))
    tables.bind("empty", empty)
    assert value(tables, "empty.shape") == (0, 1)


def test_what_cannot_be_mapped_says_what_to_do() -> None:
    frame = pd.DataFrame({"a": [1, 2]})
    refused: list[tuple[Callable[[Any], object], Any, str]] = [
        (DataContext.from_bytes, "text", "takes bytes"),
        (DataContext.from_array, [1, 2], "takes a numpy array"),
        (DataContext.from_array, np.array([object()]), "convert it"),
        (DataContext.from_dataframe, [1], "takes a pandas DataFrame"),
        (DataContext.from_dataframe, frame.set_index("a"), "reset_index"),
        (DataContext.from_dataframe, pd.DataFrame({"a": [[1], [2]]}), "column 'a'.*neither numbers, times nor texts"),
        (DataContext.from_dataframe, pd.DataFrame([[1, 2]]), "names that are texts"),
    ]
    for make, data, words in refused:
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises((TypeError, ValueError), match=words):
            make(data)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_table_without_its_package_in_the_guest_names_the_remedy(repl: REPLProtocol) -> None:
    with pytest.raises(GuestError, match=r"packages=\('pandas',\)"):
        repl.bind("df", DataContext.from_dataframe(pd.DataFrame({"a": [1]})))
    assert repl.exec("1 + 1").value == "2"


def test_backends_that_cannot_map_refuse_it() -> None:
    with pytest.raises(TypeError, match="cannot map data; bind a DataContext in a session of 'jail'"):
        HandleTable().add("data", DataContext.from_bytes(b"x"))


def test_data_too_large_for_memory_goes_to_a_file(repl: REPLProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "memory_budget", lambda: 10)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    context = DataContext.from_bytes(b"0123456789" * 1000)
    assert not context.memory_file().in_memory
    repl.bind("data", context)
    assert value(repl, "data[5000:5010]") == b"0123456789"
