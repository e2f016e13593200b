"""SGLang's HTTP interface. Requests run on an event loop in a thread of its own; every one has a timeout.

A server that does not answer, or closes a connection, is `EngineLost`; an answer that says no is `Refused`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import httpx2
import msgspec

from engine.generate_requests import EngineLost

CONNECT_S = 5.0
CLOSE_S = 5.0
"""For the loop's thread to end."""
DATA, DONE = "data: ", "[DONE]"


class Refused(RuntimeError):
    """The server answered with an error; says to what, and its own words."""


class Api:
    """`get` and `post` wait for the answer; `begin` returns a future of it; `stream` calls back with each event."""

    def __init__(self, base: str, *, deadline_s: float) -> None:
        """`base` is http://HOST:PORT."""
        self.base, self._deadline_s = base, deadline_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-http", daemon=True)
        self._thread.start()
        self._client = httpx2.AsyncClient(
            base_url=base,
            timeout=httpx2.Timeout(deadline_s, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,  # no proxy stands between a generator and its engine
        )

    def get(self, path: str, *, timeout_s: float | None = None) -> dict[str, Any]:
        return self._wait(self._begin("GET", path, None, timeout_s))

    def post(self, path: str, body: Mapping[str, object], *, timeout_s: float | None = None) -> dict[str, Any]:
        """The answer as plain data, empty when it is no JSON object. Raises `Refused` and `EngineLost`."""
        return self._wait(self._begin("POST", path, body, timeout_s))

    def begin(self, path: str, body: Mapping[str, object] | None = None) -> Future[dict[str, Any]]:
        """As `post`, or as `get` without a body, but does not wait."""
        return self._begin("GET" if body is None else "POST", path, body, None)

    def stream(
        self, path: str, body: Mapping[str, object], receive: Callable[[bytes | EngineLost | None], object]
    ) -> Future[None]:
        """Post, and call `receive` on the loop's thread with each event's data; last with None, or with what went wrong.
        Cancelling the future closes the connection, and nothing more is received. How long a request may be silent is the
        caller's to say, who knows of all others: it may wait for room in the server."""
        return asyncio.run_coroutine_threadsafe(self._stream(path, body, receive), self._loop)

    def close(self) -> None:
        """Closes all connections."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()
        self._loop.stop()

    def _begin(
        self, method: str, path: str, body: Mapping[str, object] | None, timeout_s: float | None
    ) -> Future[dict[str, Any]]:
        return asyncio.run_coroutine_threadsafe(self._ask(method, path, body, timeout_s), self._loop)

    def _wait(self, answer: Future[dict[str, Any]]) -> dict[str, Any]:
        return answer.result(CONNECT_S + 2 * self._deadline_s)  # the request itself ends sooner

    async def _ask(
        self, method: str, path: str, body: Mapping[str, object] | None, timeout_s: float | None
    ) -> dict[str, Any]:
        what, limit = f"{method} {self.base}{path}", timeout_s or self._deadline_s
        try:
            async with asyncio.timeout(limit):
                response = await self._client.request(method, path, json=body, timeout=limit)
        except TimeoutError as error:
            raise EngineLost(f"{what}: no answer within {limit:.0f} s") from error
        except httpx2.HTTPError as error:
            raise EngineLost(f"{what}: {_words(error, limit)}") from error
        if response.status_code != 200:
            raise Refused(f"{what}: {_said(response.status_code, response.content)}")
        try:
            answer = msgspec.json.decode(response.content) if response.content else {}
        except msgspec.DecodeError:  # some answers are plain text
            return {}
        return answer if isinstance(answer, dict) else {"value": answer}

    async def _stream(
        self, path: str, body: Mapping[str, object], receive: Callable[[bytes | EngineLost | None], object]
    ) -> None:
        what, unlimited = f"POST {self.base}{path}", httpx2.Timeout(None, connect=CONNECT_S)
        try:
            async with self._client.stream("POST", path, json=body, timeout=unlimited) as response:
                if response.status_code != 200:
                    said = _said(response.status_code, await response.aread())
                    receive(EngineLost(f"{what}: {said}"))
                    return
                async for line in response.aiter_lines():
                    if line.startswith(DATA) and line != DATA + DONE:
                        receive(line[len(DATA) :].encode())
        except httpx2.HTTPError as error:
            receive(EngineLost(f"{what}: {_words(error, self._deadline_s)}"))
        else:
            receive(None)


def _words(error: httpx2.HTTPError, limit: float) -> str:
    if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
        return f"no answer within {limit:.0f} s"
    return f"{type(error).__name__}: {error}"


def _said(status: int, content: bytes) -> str:
    """SGLang's answers say why as `message`, or inside `error`."""
    text = content.decode(errors="replace").strip()
    try:
        answer = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return f"{status}: {text[:500]}"
    inner = answer.get("error", answer) if isinstance(answer, dict) else answer
    words = inner.get("message", inner) if isinstance(inner, dict) else inner
    return f"{status}: {str(words)[:500]}"
