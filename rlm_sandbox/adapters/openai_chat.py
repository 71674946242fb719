"""`OpenAIAdapter`: every endpoint that speaks OpenAI's chat completions, through the ``openai`` SDK."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from ..orchestrator.llm import AdapterError, AdapterErrorKind, Completion, Message, TokenUsage, estimate_tokens

__all__ = ("OpenAIAdapter",)

KEY_VARIABLES: Final = ("LLM_API_KEY", "OPENAI_API_KEY")
URL_VARIABLES: Final = ("LLM_BASE_URL", "OPENAI_BASE_URL")
OFFICIAL_HOST: Final = "api.openai.com"
#: Characters kept of what a server says about an error.
MAX_DETAIL_CHARS: Final = 300


class OpenAIAdapter:
    """A model behind an OpenAI-compatible endpoint. Usable from several threads.

    Args:
        model: the model's name at the endpoint.
        base_url: the endpoint; default ``LLM_BASE_URL`` or ``OPENAI_BASE_URL``, else OpenAI's own.
        api_key: default ``LLM_API_KEY`` or ``OPENAI_API_KEY``. Stays in this process; no guest ever sees it.
        timeout: seconds one attempt may take, from connecting to the last byte of the answer.
        max_retries: further attempts after a refused or broken connection, a timeout, a rate limit or a server error. The
            SDK makes them; it waits as the server asks.

    Raises:
        AdapterError: there is no key, or ``base_url`` is not an http(s) address.
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 2,
    ) -> None:
        if not isinstance(model, str) or not model.strip():
            raise ValueError("OpenAIAdapter needs the name of a model, such as the ones your endpoint lists under /models")
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= 86_400:
            raise ValueError(f"OpenAIAdapter.timeout must be above 0 and at most 86,400 seconds, got {timeout!r}")
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or not 0 <= max_retries <= 100:
            raise ValueError(f"OpenAIAdapter.max_retries must be between 0 and 100, got {max_retries!r}")
        key = api_key or _from_environment(KEY_VARIABLES)
        if not key:
            raise AdapterError(
                "auth",
                "there is no API key; set OPENAI_API_KEY or LLM_API_KEY (any text will do for a local server that needs none)",
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise AdapterError("auth", "the API key has characters that no key has; copy it again, without spaces or quotes")
        url = base_url or _from_environment(URL_VARIABLES)
        where = OFFICIAL_HOST if url is None else _host(url)
        if not where:
            raise AdapterError("request", "the base URL is not an http or https address; give one like https://host/v1")

        import openai  # here and not above: importing the SDK takes a second, and most users of the package never need it

        from .openai_client import BROKEN, ChatClient

        self._sdk = openai
        self._broken = BROKEN
        self._key = key
        self._model = model
        self._where = where
        self._timeout = timeout
        # OpenAI's newer models refuse max_tokens; many compatible servers know nothing else.
        self._cap_name = "max_completion_tokens" if self._where == OFFICIAL_HOST else "max_tokens"
        self._client = ChatClient(key, url or f"https://{OFFICIAL_HOST}/v1", timeout, max_retries)

    @property
    def model(self) -> str:
        """The model asked by default."""
        return self._model

    def __repr__(self) -> str:
        return f"<OpenAIAdapter {self._model} at {self._where}>"

    def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seconds: float | None = None,
    ) -> Completion:
        """Ask the endpoint. Ctrl-C gives the call up and is raised.

        Raises:
            AdapterError: see its ``kind``.
        """
        asked = model or self._model
        options: dict[str, Any] = {}
        if max_tokens is not None:
            options[self._cap_name] = max_tokens
        if temperature is not None:
            options["temperature"] = temperature
        conversation = [{"role": item["role"], "content": _encodable(item["content"])} for item in messages]
        attempts: list[str] = []
        try:
            reply = self._client.create(attempts, seconds, model=asked, messages=conversation, **options)
            return self._completion(reply, messages, tuple(attempts[:-1]))
        except AdapterError as exc:
            exc.retries = tuple(attempts[:-1])
            raise
        except TimeoutError:
            # The attempt under way came to nothing, so all that are noted were before it.
            retries = tuple(attempts)
            what = f"{self._where} did not answer in the {seconds:g} s that were left{_after(retries)}"
            raise AdapterError("timeout", f"{what}; allow the run more time", retries=retries) from None
        except self._sdk.OpenAIError as exc:
            retries = tuple(attempts[:-1])
            kind, what, remedy = self._explained(exc, asked, attempts[-1] if attempts else "")
            # Not chained: the SDK's exception holds the request, its headers and so the key.
            raise AdapterError(kind, f"{what}{_after(retries)}; {remedy}", retries=retries) from None
        except (ValueError, TypeError, AttributeError, RecursionError) as exc:
            raise AdapterError(
                "response", f"{self._where} did not answer with chat completions ({type(exc).__name__}); check the base URL",
                retries=tuple(attempts[:-1]),
            ) from exc  # fmt: skip

    def _completion(self, reply: Any, messages: Sequence[Message], retries: tuple[str, ...]) -> Completion:
        """The reply as the orchestrator knows it. A compatible server's reply may have any shape."""
        choices = getattr(reply, "choices", None)
        if not isinstance(choices, list) or not choices:
            raise AdapterError("response", f"{self._where} answered without a choice; check the base URL and the model")
        message = getattr(choices[0], "message", None)
        text = getattr(message, "content", None)
        reason = getattr(choices[0], "finish_reason", None)
        refusal = getattr(message, "refusal", None)
        if not isinstance(text, str) or (not text and refusal):
            if isinstance(refusal, str) and refusal:
                raise AdapterError("response", f"the model refused: {self._clean(refusal)}; reword the question")
            if reason == "content_filter":
                raise AdapterError("response", "the provider's content filter stopped the reply; reword the question")
            if reason == "length":
                raise AdapterError(
                    "response", "the model used its whole output limit before it said anything; raise max_output_tokens"
                )
            raise AdapterError("response", "the model answered without text; try another model")
        usage = getattr(reply, "usage", None)
        sent, received = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
        if isinstance(sent, int) and isinstance(received, int) and sent >= 0 and received >= 0:
            tokens = TokenUsage(sent, received)
        else:
            sent = sum(estimate_tokens(item["content"]) for item in messages)
            tokens = TokenUsage(sent, estimate_tokens(text), estimated=True)
        return Completion(text, tokens, reason if isinstance(reason, str) else None, retries)

    def _explained(self, exc: Exception, model: str, last: str) -> tuple[AdapterErrorKind, str, str]:
        """The kind of error, what happened, and what to do. ``last``: what the last attempt came to."""
        sdk, where = self._sdk, self._where
        if isinstance(exc, sdk.APITimeoutError):
            return "timeout", f"{where} did not answer within {self._timeout:g} s", "try again or raise the timeout"
        if isinstance(exc, sdk.APIConnectionError) and last == self._broken:
            return "connection", f"the connection to {where} broke before the answer was whole", "try again later"
        if isinstance(exc, sdk.APIConnectionError):
            return "connection", f"cannot connect to {where}", "check the base URL and that the server is running"
        if isinstance(exc, sdk.AuthenticationError):
            return "auth", f"{where} refused the API key", "check OPENAI_API_KEY or LLM_API_KEY"
        if isinstance(exc, sdk.PermissionDeniedError):
            return "auth", f"{where} does not let this API key use {model!r}", "use another model or key"
        if isinstance(exc, sdk.NotFoundError):
            what = f"{where} has no model {model!r}, or nothing at this path"
            return "model", what, "check the model's name and the base URL"
        if isinstance(exc, sdk.RateLimitError):
            what = f"{where} limits the rate or the quota is used up"
            return "rate_limit", what, "wait, or lower max_concurrent_subcalls"
        if isinstance(exc, sdk.InternalServerError):
            return "server", f"{where} failed with status {exc.status_code}", "try again later"
        if isinstance(exc, sdk.APIStatusError):
            what = f"{where} refused the request with status {exc.status_code}: {self._clean(_server_message(exc))}"
            return "request", what, "check the model and the limits"
        if isinstance(exc, sdk.APIResponseValidationError):
            return "response", f"{where} answered in a form that is not chat completions", "check the base URL"
        return "response", f"{where}: {type(exc).__name__}", "try again"

    def _clean(self, text: str) -> str:
        """A server's words, fit to print: one line, short, printable, without the key."""
        shown = "".join(char if char.isprintable() else " " for char in text.replace(self._key, "***")[:MAX_DETAIL_CHARS])
        return " ".join(shown.split()).rstrip(".")


def _after(retries: Sequence[str]) -> str:
    """How many attempts were made before and what they came to, for a sentence."""
    if not retries:
        return ""
    times = "1 retry" if len(retries) == 1 else f"{len(retries)} retries"
    return f" after {times} ({', '.join(dict.fromkeys(retries))})"


def _host(url: str) -> str:
    """Host and port of an http(s) address, without user and password; empty if it is none."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is no number
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    usable = parts.scheme in ("http", "https") and parts.hostname and url.isprintable() and " " not in url
    return host if usable else ""


def _encodable(text: str) -> str:
    """``text`` without lone surrogates, which a guest can print and JSON over HTTP cannot carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _server_message(exc: Any) -> str:
    body = getattr(exc, "body", None)
    if isinstance(body, dict):
        message = body.get("message")
        if isinstance(message, str):
            return message
    return str(getattr(exc, "message", ""))


def _from_environment(names: tuple[str, ...]) -> str | None:
    return next((value for value in (os.environ.get(name, "").strip() for name in names) if value), None)
