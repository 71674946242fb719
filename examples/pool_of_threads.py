"""Many questions, few sandboxes: threads share a pool, and a cell may ask for another session of it.

Run it with ``python examples/pool_of_threads.py``.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from rlm_sandbox import Limits, PoolTimeout, SessionPool

QUESTIONS = [f"sum(range({number}))" for number in range(1, 21)]


def main() -> None:
    with SessionPool("auto", size=4, limits=Limits(time_seconds=5, memory_mb=256), setup="import math") as pool:

        def solve(code: str) -> str | None:
            """One question, in a session that nobody has used before and nobody will use again."""
            with pool.open_repl(timeout_seconds=60) as repl:
                repl.bind("sub_solve", sub_solve)
                return repl.exec(f"sub_solve({code!r})").value

        def sub_solve(code: str) -> str | None:
            """A host function that needs a session itself. It does not queue behind the one that called it."""
            with pool.open_repl() as repl:
                return repl.exec(f"math.isqrt({code})").value

        with ThreadPoolExecutor(16) as threads:
            for code, answer in zip(QUESTIONS, threads.map(solve, QUESTIONS), strict=True):
                print(f"isqrt({code}) = {answer}")

        held = [pool.open_repl() for _ in range(4)]
        try:
            pool.open_repl(timeout_seconds=0.1)
        except PoolTimeout as exc:
            print(exc)
        for repl in held:
            repl.close()


if __name__ == "__main__":
    main()
