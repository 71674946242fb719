"""What the policy of ``restricted`` costs: the same kernels as plain Python and as restricted cells, in turns, in one process.

One JSON line a kernel: seconds of the best run of each, and their ratio, which is to stay at or below ``most``.

    python benchmarks/bench_restricted.py [ROUNDS]
"""

from __future__ import annotations

import json
import platform
import sys
import time
from typing import Final

from rlm_sandbox import Grade, Limits, open_repl

MOST: Final = 4.0
#: Each defines ``kernel()``.
KERNELS: Final = {
    "arithmetic loop": """
def kernel():
    total = 0
    for i in range(200_000):
        total = (total + i * 7) % 1_000_003
    return total
""",
    "fib calls": """
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)
def kernel():
    return fib(21)
""",
    "dict and str": """
def kernel():
    counts = {}
    for i in range(60_000):
        word = ("w" + str(i % 97)).upper()
        counts[word] = counts.get(word, 0) + len(word)
        counts[word] += 1
    return sorted(counts.items())[0]
""",
    "objects": """
class Counter:
    def __init__(self):
        self.total = 0
        self._seen = 0
    def add(self, n):
        self.total += n
        self._seen += 1
        if self._seen > self.total:
            self.total = self._seen
        return self.total
def kernel():
    counter = Counter()
    for i in range(40_000):
        counter.add(i % 7)
    return counter.total
""",
    "text": """
def kernel():
    lines = ["item %d costs %s" % (i, i * 3) for i in range(8_000)]
    found = {}
    for line in lines:
        words = line.split()
        if words[0].startswith("item") and len(words) == 4:
            found[words[1]] = "{}={}".format(words[1], words[3].upper())
    return len("; ".join(found.values()))
""",
    "comprehensions": """
def kernel():
    rows = [(i, i * i) for i in range(60_000) if i % 3]
    table = {a: b for a, b in rows}
    return sum(table[a] for a, _ in rows) + len({b % 101 for _, b in rows})
""",
}


def main() -> int:
    """Run; the status says whether every ratio is within its bound."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    worst = 0.0
    limits = Limits(time_seconds=600, memory_mb=None)
    for name, source in KERNELS.items():
        plain: dict[str, object] = {}
        exec(compile(source, name, "exec"), plain)  # noqa: S102 - the kernels above
        kernel = plain["kernel"]
        assert callable(kernel)
        best_plain = best_restricted = float("inf")
        with open_repl("restricted", limits=limits, accept=Grade.NONE, trusted=True) as repl:
            repl.exec(source)
            for _ in range(rounds):
                started = time.perf_counter()
                expected = kernel()
                best_plain = min(best_plain, time.perf_counter() - started)
                result = repl.exec(
                    "import time\nstarted = time.perf_counter()\nfound = kernel()\ntook = time.perf_counter() - started"
                )
                assert result.ok, result.error
                best_restricted = min(best_restricted, float(repl.get("took")))
            assert repl.get("found") == expected
        ratio = best_restricted / best_plain
        worst = max(worst, ratio)
        print(
            json.dumps(
                {
                    "benchmark": "restricted", "kernel": name, "plain_seconds": round(best_plain, 6),
                    "restricted_seconds": round(best_restricted, 6), "ratio": round(ratio, 2), "most": MOST, "rounds": rounds,
                    "python": platform.python_version(),
                }
            )
        )  # fmt: skip
    return 0 if worst <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
