"""An SGLang server as an engine: its requests' tokens as they come, weights while it stands still.

Whatever goes wrong becomes `EngineLost`; a server of ours is then killed, for nothing it holds is of use: a half-done update
leaves the model between two versions, and one that waits for weights that do not come would wait for 30 minutes.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from engine.config import ConfigError, SglangEngine
from engine.generate_requests import Draws, EngineLost, Progress
from engine.generate_sglang_http import Api, Refused
from engine.generate_sglang_server import Server
from engine.generate_sglang_stream import Stream
from engine.generate_sglang_weights import WeightGroup
from engine.generate_stage import Stage

STEP_S = 0.02
"""How long `step` waits for something new."""
BEAT_S = 1.0
RECALL_S = 10.0
ABORT_AGAIN_S = 0.5
"""An abort that overtakes its request is not heard."""
READ_BACK = 1 << 20
"""Largest weight that is read back at the start: the server makes a Python list of all of it."""
TRIAL = "0"
"""What tokens would be labelled with before the first weights; there are none."""


class Engine:
    """See `engine.generate_requests.Engine`; `attach` comes first."""

    name = "SGLang"

    def __init__(
        self, api: Api, server: Server | None, *, config: SglangEngine, stop_ids: list[int], session: bool
    ) -> None:
        """`server` is None for one that somebody else has started. `session`: whether weights are updated in sessions."""
        self.recomputes = session
        self._api, self._server, self._config, self._session = api, server, config, session
        self._stop_ids = stop_ids
        self._group: WeightGroup | None = None
        self._stage: Stage | None = None
        self.lost: str | None = None
        self._events: queue.SimpleQueue[tuple[str, bytes | EngineLost | None]] = queue.SimpleQueue()
        self._open: dict[str, tuple[Stream, Future[None]]] = {}
        self._beat: Future[dict[str, Any]] | None = None
        self._beat_at = 0.0
        self._heard_at = 0.0
        """When anything came of any request."""

    def attach(self, stage: Stage, folder: Path) -> None:
        """Take weights from `stage` from now on, and load what is there once: zeros, which are then read back.

        Raises `ConfigError` for a weight whose name or shape the server refuses, or passes over without a word.
        """
        self._stage = stage
        since = 0 if self._server is None else self._server.mark
        where = f"generator.engine: SGLang at {self._api.base}"
        with self._guarded("join a group for weights"):
            self._group = WeightGroup(self._api, ranks=self._config.tensor_parallel, timeout_s=self._config.deadline_s)
        try:
            self._update(TRIAL, "in_place")
        except Refused as error:
            raise ConfigError(f"{where} does not take the weights of {folder}: {error}") from error
        said = "" if self._server is None else self._server.said(since)
        for line in said.splitlines():
            if "not found in params_dict" in line:
                raise ConfigError(f"{where} does not know a weight of {folder}: {line.strip()}")
        with self._guarded("read weights back"):
            self._read_back(stage, f"{where} does not know a weight of {folder}")

    def _read_back(self, stage: Stage, complaint: str) -> None:
        """Only some of SGLang's models can; those that know none of their weights are passed over."""
        found: dict[str, bool] = {}
        for name, tensor in stage.tensors.items():
            if tensor.numel() > READ_BACK:
                continue
            try:
                values = self._api.post("/get_weights_by_name", {"name": name, "truncate_size": 1}).get("value")
            except Refused:
                found[name] = False
            else:
                while isinstance(values, list) and values:
                    values = values[0]
                found[name] = values == 0
        if any(found.values()) and not all(found.values()):
            missing = [name for name, there in found.items() if not there]
            raise ConfigError(f"{complaint}: {len(missing)} were not loaded: {', '.join(missing[:3])}")

    def add(self, request: str, prompt: list[int], *, tokens: int, draws: Draws, share: str) -> None:
        self._stream(Stream(request), self._body(request, prompt, tokens, draws, share))

    def add_canary(self, request: str, prompt: list[int], *, draws: Draws, share: str) -> None:
        body = self._body(request, prompt, 1, draws, share) | {"logprob_start_len": 0}
        self._stream(Stream(request, of_prompt=True), body)

    def step(self) -> list[Progress]:
        """What has come; raises `EngineLost` only after all of it was returned."""
        self.check()
        return self._take(STEP_S)

    def apply(self, version: int, *, recompute: bool) -> None:
        """With `recompute`, requests go back to the queue and their keys and values, like all others, are forgotten."""
        try:
            self._update(str(version), "retract" if recompute and self._session else "in_place")
        except Refused as error:
            raise self._fail(f"cannot load the weights of version {version}: {error}") from error
        self._heard_at = time.monotonic()

    def check(self) -> None:
        """Raises `EngineLost` when the server has ended, does not answer, or is silent about all requests for too long."""
        if self.lost is not None:
            raise EngineLost(f"SGLang is lost: {self.lost}")
        if self._server is not None and (end := self._server.end) is not None:
            raise self._fail(end)
        silent_s = time.monotonic() - self._heard_at
        if self._open and self._events.empty() and silent_s > self._config.deadline_s:
            raise self._fail(f"no answer within {self._config.deadline_s:.0f} s to any of {len(self._open)} requests")
        if self._beat is not None and self._beat.done():
            beat, self._beat = self._beat, None
            with self._guarded("answer"):
                beat.result(0)
        if self._beat is None and time.monotonic() > self._beat_at + BEAT_S:
            self._beat_at, self._beat = time.monotonic(), self._api.begin("/model_info")

    def abort(self, requests: list[str]) -> None:
        for request in requests:
            self._forget(request)

    def recall(self, requests: list[str]) -> list[Progress]:
        """Waits for the server's last words about each of them, at most `RECALL_S`."""
        collected: list[Progress] = []
        asked_at, deadline = 0.0, time.monotonic() + RECALL_S
        while self.lost is None and (left := [name for name in requests if name in self._open]):
            now = time.monotonic()
            if now > deadline:
                break
            if now > asked_at + ABORT_AGAIN_S:
                asked_at = now
                for name in left:
                    self._api.begin("/abort_request", {"rid": _rid(name)})
            with contextlib.suppress(EngineLost):
                collected += self._take(STEP_S)
        self.abort(requests)
        asked = set(requests)
        return [
            progress._replace(finish=None) if progress.finish == "abort" and progress.request in asked else progress
            for progress in collected
        ]

    def close(self) -> None:
        """End a server of ours; leave another one as it is, without our requests."""
        self.lost = self.lost or "it was closed"
        self.abort(list(self._open))
        if self._group is not None:
            self._group.close()
        if self._server is not None:
            self._server.kill()
        self._api.close()

    # --- weights ---------------------------------------------------------------------------------------------------

    def _update(self, label: str, pause: str) -> None:
        """Raises `Refused` when the server does not take the weights."""
        if self._group is None or self._stage is None:
            raise RuntimeError("attach comes first")
        with self._guarded("take new weights"):
            self._api.post("/pause_generation", {"mode": pause})
            if self._session:
                self._begin_session()
            self._group.send(self._stage.tensors, label)
            if self._session:
                self._api.post("/end_weight_update", {})
            if pause == "retract":
                self._api.post("/flush_cache", {})
            self._api.post("/continue_generation", {})

    def _begin_session(self) -> None:
        try:
            self._api.post("/begin_weight_update", {})
        except Refused:  # a generator before this one has left one open
            self._api.post("/end_weight_update", {})
            self._api.post("/begin_weight_update", {})

    # --- requests --------------------------------------------------------------------------------------------------

    def _body(self, request: str, prompt: list[int], tokens: int, draws: Draws, share: str) -> dict[str, object]:
        sampling: dict[str, object] = {
            "max_new_tokens": tokens,
            "temperature": draws.temperature,
            "top_p": draws.top_p,
            "top_k": draws.top_k or -1,
        }
        # With `ignore_eos` the server does not look at `stop_token_ids` either.
        sampling |= {"stop_token_ids": self._stop_ids} if self._stop_ids else {"ignore_eos": True}
        return {
            "rid": _rid(request),
            "input_ids": prompt,
            "sampling_params": sampling,
            "return_logprob": True,
            "stream": True,
            "extra_key": share,
        }

    def _stream(self, stream: Stream, body: dict[str, object]) -> None:
        if self.lost is not None:
            raise EngineLost(f"SGLang is lost: {self.lost}")
        request = stream.request
        if not self._open:
            self._heard_at = time.monotonic()
        future = self._api.stream("/generate", body, partial(self._receive, request))
        self._open[request] = stream, future

    def _receive(self, request: str, event: bytes | EngineLost | None) -> None:
        self._events.put((request, event))

    def _take(self, timeout_s: float) -> list[Progress]:
        collected: list[Progress] = []
        try:
            request, event = self._events.get(timeout=timeout_s)
            while True:
                if request in self._open:
                    self._heard_at = time.monotonic()
                    try:
                        collected += self._progress(request, event)
                    except EngineLost as error:
                        lost = self._fail(str(error))
                        if not collected:
                            raise lost from error
                        return collected
                request, event = self._events.get_nowait()
        except queue.Empty:
            return collected

    def _progress(self, request: str, event: bytes | EngineLost | None) -> list[Progress]:
        if isinstance(event, EngineLost):
            raise event
        if event is None:
            raise EngineLost(f"it closed the connection of request {request} before its end")
        progress = self._open[request][0].take(event)
        if progress.finish is not None:
            del self._open[request]
        return [progress]

    def _forget(self, request: str) -> None:
        """Closing its connection makes the server forget it too."""
        entry = self._open.pop(request, None)
        if entry is not None:
            entry[1].cancel()
            if self.lost is None:
                self._api.begin("/abort_request", {"rid": _rid(request)})

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        if self.lost is not None:
            raise EngineLost(f"SGLang cannot {what}: it is lost: {self.lost}")
        try:
            yield
        except EngineLost as error:
            raise self._fail(f"it cannot {what}: {error}") from error

    def _fail(self, reason: str) -> EngineLost:
        if self.lost is None:
            self.lost = reason
            if self._server is not None:
                if self._server.error not in reason:
                    self.lost += f"; its last error: {self._server.error}"
                self._server.kill()
        return EngineLost(f"SGLang is lost: {self.lost}")


def _rid(request: str) -> str:
    """Of one length: the server aborts every request whose name begins so."""
    return f"headrace-{request:0>12}"
