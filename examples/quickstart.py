"""The example of README.md, whole: a text, a host function, a cell, and a cell that never ends."""

from rlm_sandbox import Context, Limits, open_repl

text = "hay " * 1_000_000 + "needle" + " hay" * 1_000_000


def ask_model(prompt: str) -> str:
    """Stands in for a call of your model; it runs here, on the host."""
    return f"a model would read {len(prompt)} characters"


with open_repl("jail", limits=Limits(time_seconds=2, memory_mb=256)) as repl:
    repl.bind("ctx", Context.from_text(text))  # the text is mapped into the sandbox, not copied
    repl.bind("llm_query", ask_model)  # a host function that the cells may call

    result = repl.exec("hits = ctx.find('needle')\nlen(hits)")
    print(result.outcome, result.value)  # ok 1
    print(repl.get("hits"))  # [(4000000, 4000006, 'needle')]: plain values only

    result = repl.exec("llm_query(ctx.slice(hits[0][0] - 20, hits[0][1] + 20))")
    print(result.value)  # 'a model would read 46 characters'

    result = repl.exec("import itertools\nhits = None\nmax(itertools.count())")  # never ends, and no interrupt reaches it
    print(result.outcome, result.limit and result.limit.kind, result.state)  # limit time_seconds restored
    print(repl.get("hits"))  # [(4000000, 4000006, 'needle')]: as before that cell
