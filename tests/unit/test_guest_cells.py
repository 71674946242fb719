"""Which cells a guest compiles without a look at their tree: none that has something to echo."""

from __future__ import annotations

import ast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlm_sandbox.runners.session import _ECHOES_NOTHING

_WORDS = st.sampled_from(
    (
        "x",
        "y.z",
        "=",
        "==",
        "+=",
        ":=",
        "**=",
        "<=",
        " ",
        "\t",
        "\n",
        "\r",
        "\x0c",
        "\\",
        ";",
        ":",
        ",",
        "(",
        ")",
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
        '"""',
        "f'",
        "#",
        "lambda",
        "import",
        "from",
        "await",
        "yield",
        "if",
        "else",
        "match",
        "type",
        "1",
        "é",
        "\x00",
    )
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(_WORDS, max_size=9).map("".join))
@example("x = 1\n\n")
@example("x = '''\n5\n'''")
@example("lambda \\\nx = 1: x")
@example("x = 1\n5")
def test_a_cell_with_something_to_echo_is_never_compiled_as_one_without(source: str) -> None:
    if not _ECHOES_NOTHING.match(source):
        return
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # an error either way
    assert len(tree.body) == 1
    assert isinstance(tree.body[0], ast.Assign | ast.AugAssign | ast.Import | ast.ImportFrom)


@pytest.mark.parametrize("source", ["x=1", "x.y = f('=')\n", "n += 1", "n **= 2", "n //= 2", "import re", "from re import match"])
def test_the_usual_ones_are(source: str) -> None:
    assert _ECHOES_NOTHING.match(source)


@pytest.mark.parametrize("source", ["x == 1", "x <= 1", "x", "x = 1; x", "x = 1\nx", "", "f(x=1)", "importer", "fromage", "x != 1"])
def test_what_may_have_something_to_echo_is_not(source: str) -> None:
    assert not _ECHOES_NOTHING.match(source)
