"""What a guest's interpreter has imported before its first cell."""

from __future__ import annotations

from typing import Final

__all__ = ("PRELOADED",)

#: Imported once, shared by every session: what model-written cells use most. Others load from the tree on demand.
PRELOADED: Final = (
    "abc", "array", "ast", "asyncio", "base64", "bisect", "builtins", "calendar", "codecs", "collections", "collections.abc",
    "concurrent.futures", "concurrent.futures.thread", "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib",
    "enum", "fnmatch", "fractions", "functools", "glob", "hashlib", "heapq", "html", "inspect", "io", "itertools", "json",
    "keyword", "linecache", "locale", "math", "numbers", "operator", "os", "pathlib", "pprint", "queue", "random", "re",
    "secrets", "shutil", "statistics", "string", "struct", "sys", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize",
    "traceback", "types", "typing", "unicodedata", "urllib.parse", "uuid", "warnings", "weakref", "zlib",
)  # fmt: skip
