"""A server in miniature: it reads requests as lines of JSON and runs each one's code in a sandbox of its own, with a deadline.

``python examples/async_server.py`` starts it on a free port of this machine, sends it requests at once, and ends.
"""

from __future__ import annotations

import asyncio
import functools
import json

from rlm_sandbox import AsyncREPL, Limits, SessionPool

#: What one request may take, its wait for a sandbox included.
DEADLINE_SECONDS = 5.0
#: The longest line that is read.
MAX_LINE = 1 << 16


async def ask_model(prompt: str) -> str:
    """Stands in for a model behind HTTP. It runs in the server's own loop, so it may use the server's own client."""
    await asyncio.sleep(0.1)
    return f"a model would read {len(prompt)} characters"


async def answer(pool: SessionPool, code: str) -> dict[str, str | None]:
    """Run one request. A deadline that passes ends the cell, not the server."""
    try:
        async with asyncio.timeout(DEADLINE_SECONDS), await AsyncREPL.from_pool(pool) as repl:
            await repl.bind("llm_query", ask_model)
            result = await repl.exec(code)
    except TimeoutError:
        return {"outcome": "deadline", "value": None}
    return {"outcome": result.outcome, "value": result.value, "error": result.error}


async def serve_one(pool: SessionPool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection: a line in, a line out."""
    request = json.loads(await reader.readline())
    writer.write(json.dumps(await answer(pool, str(request["code"]))).encode() + b"\n")
    await writer.drain()
    writer.close()


async def ask(port: int, code: str) -> str:
    """A client of the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(json.dumps({"code": code}).encode() + b"\n")
    line = await reader.readline()
    writer.close()
    return f"{code!r}: {line.decode().strip()}"


async def main() -> None:
    limits = Limits(time_seconds=2, memory_mb=256)
    with await asyncio.to_thread(SessionPool, "auto", 8, limits) as pool:
        serve = functools.partial(serve_one, pool)
        async with await asyncio.start_server(serve, "127.0.0.1", 0, limit=MAX_LINE) as server:
            port = server.sockets[0].getsockname()[1]
            requests = [f"{number} ** 2" for number in range(10)]
            requests += ["await llm_query('who?')", "1 / 0", "while True: pass", "import os; os._exit(1)"]
            for reply in await asyncio.gather(*(ask(port, code) for code in requests)):
                print(reply)


if __name__ == "__main__":
    asyncio.run(main())
