"""``rlm-sandbox repl``: a prompt into a sandbox, for people, and the same for input that is piped."""

from __future__ import annotations
