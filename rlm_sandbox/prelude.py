"""What a model finds in its REPL besides the bound names. Guest code: given to a session as its ``setup``.

Written in the subset of Python that every backend accepts. Nothing is imported and no name outside this file is
touched while it runs: ``ctx`` and ``session_names`` are looked up when a function is called.
"""

# The host reads `rlm_final` after each cell. ``count`` grows with each answer, so that an old one is never taken twice;
# ``name`` is the variable that holds it. The text is apart, so that a huge answer is not read again with every cell.
rlm_final = {"count": 0, "name": ""}
rlm_answer = ""

rlm_own_names = (
    "rlm_final", "rlm_answer", "rlm_own_names", "rlm_record", "peek", "tail", "lenP", "SHOW_VARS", "FINAL", "FINAL_VAR",
    "ctx", "P", "llm_query", "llm_batch",
)  # fmt: skip


def peek(n: int = 2000) -> str:
    """The first ``n`` characters of the context."""
    return ctx.slice(0, max(0, n))  # type: ignore[name-defined, no-any-return]  # noqa: F821


def tail(n: int = 2000) -> str:
    """The last ``n`` characters of the context."""
    end = ctx.len_chars()  # type: ignore[name-defined]  # noqa: F821
    return ctx.slice(max(0, end - max(0, n)), end)  # type: ignore[name-defined, no-any-return]  # noqa: F821


def lenP() -> int:  # noqa: N802 - the name models know
    """The length of the context in characters."""
    return ctx.len_chars()  # type: ignore[name-defined, no-any-return]  # noqa: F821


def SHOW_VARS() -> dict[str, str]:  # noqa: N802 - the name models know
    """Your own variables: name to a short summary."""
    found = session_names()  # type: ignore[name-defined]  # noqa: F821
    return {name: found[name] for name in found if name not in rlm_own_names}


def rlm_record(name: str) -> None:
    """Tell the host that a variable holds the answer."""
    count = rlm_final.get("count", 0)
    rlm_final["count"] = count + 1 if isinstance(count, int) else 1
    rlm_final["name"] = name


def FINAL(answer: object) -> None:  # noqa: N802 - the name models know
    """Give the final answer: a text, or anything with a useful ``str()``."""
    global rlm_answer
    if answer is None:
        raise ValueError("FINAL(None) is no answer; give the text of the answer")
    rlm_answer = answer if isinstance(answer, str) else str(answer)
    rlm_record("rlm_answer")


def FINAL_VAR(name: object) -> None:  # noqa: N802 - the name models know
    """Give the value of a variable, by its name, as the final answer. A value that is no name is the answer itself."""
    if isinstance(name, str) and name.strip().isidentifier():
        rlm_record(name.strip())
    else:
        FINAL(name)
