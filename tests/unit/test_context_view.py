"""The algorithms of a context, which host and guests share."""

from __future__ import annotations

import itertools
import re
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_sandbox.context import view
from rlm_sandbox.context.view import ContextView

TEXT = "Alpha beta ALPHA gamma\nalpha."


def test_it_behaves_like_its_text() -> None:
    context = ContextView(TEXT)
    assert len(context) == context.len_chars() == len(TEXT)
    assert context
    assert not ContextView("")
    assert "gamma" in context
    assert "delta" not in context
    assert context[0] == "A"
    assert context[-1] == "."
    assert context[:5] == "Alpha"
    assert context[-6:-1] == "alpha"
    assert context[::10] == TEXT[::10]
    with pytest.raises(IndexError):
        context[len(TEXT)]
    assert list(context) == [TEXT]


@pytest.mark.parametrize(
    ("start", "end", "expected"), [(0, 5, "Alpha"), (-3, 2, "Al"), (26, 10**9, "ha."), (5, 2, ""), (99, 100, "")]
)
def test_slice_clamps(start: int, end: int, expected: str) -> None:
    assert ContextView(TEXT).slice(start, end) == expected


def test_find_literal_is_not_a_pattern() -> None:
    context = ContextView("a.b axb a.b")
    assert context.find("a.b") == [(0, 3, "a.b"), (8, 11, "a.b")]
    assert context.find("a.b", start=1) == [(8, 11, "a.b")]
    assert context.find("a.b", end=8) == [(0, 3, "a.b")]
    assert context.find("a.b", start=-5, end=-1) == []
    assert context.find("a.b", start=99) == []
    assert context.find("") == []


def test_find_without_case() -> None:
    assert [match[2] for match in ContextView(TEXT).find("alpha", case_sensitive=False)] == ["Alpha", "ALPHA", "alpha"]
    assert ContextView("A.B axb").find("a.b", case_sensitive=False) == [(0, 3, "A.B")]


def test_find_regex() -> None:
    context = ContextView(TEXT)
    assert context.find(r"\b[a-z]+\b", regex=True, max_matches=2) == [(6, 10, "beta"), (17, 22, "gamma")]
    assert context.find("ALPHA", regex=True, case_sensitive=False, start=1, end=16) == [(11, 16, "ALPHA")]
    with pytest.raises(re.error):
        context.find("(", regex=True)


@pytest.mark.parametrize("regex", [False, True])
def test_find_stops_at_max_matches(regex: bool) -> None:
    context = ContextView("a" * 50)
    assert len(context.find("a", regex=regex)) == 20
    assert len(context.find("a", regex=regex, max_matches=50)) == 50
    assert context.find("a", regex=regex, max_matches=0) == []
    assert context.find("a", regex=regex, max_matches=-1) == []


@pytest.mark.parametrize("regex", [False, True])
def test_find_is_bounded_whatever_is_asked(monkeypatch: pytest.MonkeyPatch, regex: bool) -> None:
    monkeypatch.setattr(view, "MAX_ITEMS", 10)
    assert len(ContextView("a" * 10).find("a", regex=regex, max_matches=10**9)) == 10
    with pytest.raises(ValueError, match="more than 10 matches"):
        ContextView("a" * 11).find("a", regex=regex, max_matches=10**9)


@settings(max_examples=60)
@given(st.text(max_size=60), st.integers(1, 20), st.integers(0, 19))
def test_chunk_covers_the_text(text: str, size: int, overlap: int) -> None:
    context = ContextView(text)
    if overlap >= size:
        with pytest.raises(ValueError, match="overlap"):
            context.chunk(size, overlap)
        return
    try:
        pieces = context.chunk(size, overlap)
    except ValueError:
        assert overlap > size // 2
        return
    assert all(piece == text[start:end] and start < end for start, end, piece in pieces)
    assert "".join(pieces[0][2] if index == 0 else piece[2][overlap:] for index, piece in enumerate(pieces)) == text
    assert all(later[0] == earlier[1] - overlap for earlier, later in itertools.pairwise(pieces))


def test_chunk_is_bounded() -> None:
    context = ContextView("a" * 200_000)
    with pytest.raises(ValueError, match="more than 100,000 pieces"):
        context.chunk(1)
    with pytest.raises(ValueError, match="repeat the text"):
        context.chunk(100_000, 99_000)
    with pytest.raises(ValueError, match="size"):
        context.chunk(0)


def test_documents() -> None:
    context = ContextView("one|two||", array("Q", (0, 3, 4, 7, 8, 8, 9, 9)))
    assert context.num_documents() == 4
    assert list(context) == ["one", "two", "", ""]
    assert context.get_document(1) == "two"
    assert context.document_lengths() == [3, 3, 0, 0]
    assert context.chunk_documents(3) == [(0, 3, ["one", "two", ""]), (3, 4, [""])]
    for index in (-1, 4):
        with pytest.raises(IndexError, match="the context has 4"):
            context.get_document(index)
    with pytest.raises(ValueError, match="docs_per_chunk"):
        context.chunk_documents(0)


def test_pages() -> None:
    context = ContextView("<!-- Page 1 -->one<!-- Page 02 -->two<!-- Page 3 -->")
    assert context.page(1) == "one"
    assert context.page(2) == "two"
    assert context.page(3) == ""
    assert context.page(4) is None
    assert ContextView("[iv]four[5]five").page(5, marker_pattern=r"\[(\w+)\]") == "five"
    assert ContextView("[x][]").page(0, marker_pattern=r"\[(\d)?\w?\]") is None


def test_a_bad_page_marker_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="must have a group"):
        ContextView(TEXT).page(1, marker_pattern="Page")
    with pytest.raises(re.error):
        ContextView(TEXT).page(1, marker_pattern="(")


def test_metadata() -> None:
    assert ContextView("abc", (), {"files": ["a.txt"]}).metadata() == {"total_length": 3, "num_documents": 1, "files": ["a.txt"]}
