"""`ChatClient`: the ``openai`` SDK with an end to each attempt and each call, and a note of what every attempt came to.

Imported with the first adapter and not with the package: the SDK takes a second.
"""

from __future__ import annotations

import asyncio
import importlib
import weakref
from contextvars import ContextVar
from typing import Any, Final

import openai

from .background import run_in_background, schedule

__all__ = ("BROKEN", "ChatClient")

TIMEOUT: Final = "timeout"
REFUSED: Final = "no connection"
BROKEN: Final = "broken connection"

#: What each attempt of the call under way came to. The SDK retries; this is how anyone hears of it.
_attempts: Final[ContextVar[list[str]]] = ContextVar("attempts")


class ChatClient:
    """Asks for chat completions. Usable from several threads; the connections go when the client does.

    Args:
        key: the API key.
        url: the endpoint.
        timeout: seconds one attempt may take, as a whole.
        max_retries: how often the SDK tries again.
    """

    def __init__(self, key: str, url: str, timeout: float, max_retries: int) -> None:
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=url, timeout=timeout, max_retries=max_retries, http_client=_limited_client(timeout)
        )
        weakref.finalize(self, _close, self._client).atexit = False  # then the process's end closes them

    def create(self, attempts: list[str], seconds: float | None, **request: Any) -> Any:
        """The SDK's reply. ``attempts`` gets a note of each attempt, as it ends.

        Raises:
            TimeoutError: it took longer than ``seconds``, retries and all.
            openai.OpenAIError: the SDK gave up.
            ValueError, TypeError, AttributeError, RecursionError: what the SDK raises over a body that is no JSON, or too
                deep, or of another shape.
        """

        async def ask() -> Any:
            _attempts.set(attempts)
            async with asyncio.timeout(seconds):
                return await self._client.chat.completions.create(**request)

        return run_in_background(ask())


def _limited_client(timeout: float) -> Any:
    """The SDK's own HTTP client, with a limit on each attempt as a whole: its time-outs are for one read each."""
    # httpx; in later SDKs its successor: whichever the SDK's client comes from has the errors that the SDK retries on.
    parent: Any = openai.DefaultAsyncHttpxClient
    base = next(cls for cls in parent.__mro__ if cls.__name__ == "AsyncClient")
    transport: Any = importlib.import_module(base.__module__.partition(".")[0])

    class Client(parent):  # type: ignore[misc]
        async def send(self, request: Any, **options: Any) -> Any:
            noted = _attempts.get([])
            try:
                async with asyncio.timeout(timeout):
                    response = await super().send(request, **options)
            except (TimeoutError, transport.TimeoutException) as exc:
                noted.append(TIMEOUT)
                raise transport.ReadTimeout("the attempt took too long", request=request) from exc
            except transport.ConnectError:
                noted.append(REFUSED)
                raise
            except transport.RequestError:
                noted.append(BROKEN)
                raise
            noted.append(f"status {response.status_code}")
            return response

    return Client()


def _close(client: openai.AsyncOpenAI) -> None:
    schedule(client.close())
