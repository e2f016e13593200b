"""A generator that computes nothing: every slot emits tokens at a fixed rate by the clock, to a seeded trace.

The loop, the link and the weight feed are those of `workers/generator.py`; only the engine is another one. Lengths are
lognormal, answers are right for a share that differs from prompt to prompt, and both are a function of (ticket's seed,
sample), so that runs at different lags generate the same responses.

    python -m tools.benchmarks.paced_generator CONFIG --join tcp://HOST:PORT --pace 400
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import torch
import typer
from msgspec import Struct
from torch import Tensor

from engine.config import ConfigError, load_config
from engine.generate_torch import TorchGenerator
from engine.start_folder import policy_folder
from engine.text import TextModel
from protocols.link import Client
from protocols.link_messages import Held, Hello
from protocols.messages import FLOAT, INT, HandBack, Partial, Rollout, Ticket
from workers.generator import Generator, capacity
from workers.weight_feed import WeightFeed

TICK_S = 0.005
"""Longest time in `step`: so soon are messages and new weights seen, as between two decode steps of a small model."""
TIMEOUT_S = 60.0


class Trace(Struct, frozen=True):
    """Response tokens are lognormal, cut to `shortest` .. `longest`; of the prompts, `all_wrong` are never answered
    right, `all_right` always, the others with a probability between 0.2 and 0.8."""

    median: int = 40
    sigma: float = 0.8
    shortest: int = 10
    longest: int = 200
    all_wrong: float = 0.15
    all_right: float = 0.15

    def draw(self, seed: int, sample: int) -> tuple[int, bool]:
        """(response tokens, whether its answer is right) of one sample of the ticket with this seed."""
        kind, share = np.random.default_rng([seed]).random(2)
        chance = 0.2 + 0.6 * share
        if kind < self.all_wrong + self.all_right:
            chance = 0.0 if kind < self.all_wrong else 1.0
        rng = np.random.default_rng([seed, sample])
        length = int(rng.lognormal(np.log(self.median), self.sigma))
        return min(max(length, self.shortest), self.longest), bool(rng.random() < chance)


@dataclass(slots=True, eq=False)
class Response:
    """One sample; it had `brought` tokens at `began` (monotonic seconds) and gets one every 1 / pace after that."""

    ticket: Ticket
    sample: int
    tokens: np.ndarray
    text: str
    brought: int
    versions: list[tuple[int, int]]
    began: float = 0.0
    started_at: float = 0.0

    def made(self, now: float, pace: float) -> int:
        return min(len(self.tokens), self.brought + int((now - self.began) * pace + 1e-6))

    def label(self, made: int, version: int) -> None:
        """The tokens up to `made` that have no version yet are of this one."""
        count = made - sum(count for _, count in self.versions)
        if count > 0:
            if self.versions and self.versions[-1][0] == version:
                count += self.versions.pop()[1]
            self.versions.append((version, count))


class PacedEngine:
    """What the generator's loop needs of `TorchGenerator`. A slot that becomes free takes the oldest response that may
    start, from the very moment at which the one before ended."""

    def __init__(self, text: TextModel, *, slots: int, pace: float, trace: Trace) -> None:
        """`pace`: tokens a second and slot."""
        self.version, self.slots, self.pace = 0, slots, pace
        self.counters: dict[str, float] = dict.fromkeys(["generated_tokens", "finished", "swaps"], 0)
        self._text, self._trace = text, trace
        self._logprob = -float(np.log(text.vocabulary))
        self._waiting: list[tuple[float, Response]] = []
        """With the time from which on each may start."""
        self._live: list[Response] = []
        self._free = [0.0] * slots
        """When each slot that is not in use became free."""

    @property
    def ready(self) -> bool:
        return bool(self._live) or any(r.ticket.min_version <= self.version for _, r in self._waiting)

    def add(self, ticket: Ticket) -> None:
        now = time.monotonic()
        partials = {partial.sample: partial for partial in ticket.resume}
        answer = self._text.decode(ticket.prompt)
        for sample in ticket.samples:
            length, right = self._trace.draw(ticket.seed, sample)
            ending = f"####{answer if right else 'x'}"
            text = "a" * (length - len(ending) - 1) + ending
            tokens = np.append(self._text.encode(text), np.int32(self._text.eos)).astype(INT)
            partial = partials.get(sample)
            brought, versions = (len(partial.tokens), list(partial.versions)) if partial else (0, [])
            self._waiting.append((now, Response(ticket, sample, tokens, text, brought, versions)))

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Tokens up to now are of the old version; responses that waited for this one may start from now on."""
        now = time.monotonic()
        for response in self._live:
            response.label(response.made(now, self.pace), self.version)
        self._waiting = [
            (now if at < now and self.version < response.ticket.min_version else at, response)
            for at, response in self._waiting
        ]
        self.version = version
        self.counters["swaps"] += 1

    def step(self) -> list[Rollout]:
        """Sleeps until the next response ends, at most a tick; returns all that have ended."""
        self._start()
        now = time.monotonic()
        due = min((self._ends(response) for response in self._live), default=now + TICK_S)
        time.sleep(max(0.0, min(due - now, TICK_S)))
        now, finished = time.monotonic(), []
        while ended := [response for response in self._live if self._ends(response) <= now]:
            for response in ended:
                self._live.remove(response)
                self._free.append(self._ends(response))
                finished.append(self._rollout(response))
            self._start()
        return finished

    def held(self) -> list[Held]:
        tickets = {(r.ticket.group, r.ticket.fence) for r in self._unfinished()}
        return [Held(group, fence) for group, fence in sorted(tickets)]

    def hand_back(self) -> list[HandBack]:
        now = time.monotonic()
        handed: dict[tuple[int, int], list[tuple[int, Partial | None]]] = {}
        for response in self._unfinished():
            made = response.made(now, self.pace) if response.started_at else response.brought
            response.label(made, self.version)
            logprobs = np.full(made, self._logprob, FLOAT)
            partial = Partial(response.sample, response.tokens[:made], logprobs, response.versions) if made else None
            key = response.ticket.group, response.ticket.fence
            handed.setdefault(key, []).append((response.sample, partial))
        self._live, self._waiting = [], []
        return [
            HandBack(group, fence, [sample for sample, _ in each], [partial for _, partial in each if partial])
            for (group, fence), each in handed.items()
        ]

    def _unfinished(self) -> list[Response]:
        return [*self._live, *(response for _, response in self._waiting)]

    def _start(self) -> None:
        """The slot that was free first takes the response that came first."""
        for entry in [entry for entry in self._waiting if entry[1].ticket.min_version <= self.version]:
            if not self._free:
                return
            came, response = entry
            free = min(self._free)
            self._free.remove(free)
            self._waiting.remove(entry)
            response.began, response.started_at = max(came, free), time.time()
            self._live.append(response)

    def _ends(self, response: Response) -> float:
        return response.began + (len(response.tokens) - response.brought) / self.pace

    def _rollout(self, response: Response) -> Rollout:
        size = len(response.tokens)
        response.label(size, self.version)
        self.counters["generated_tokens"] += size
        self.counters["finished"] += 1
        logprobs = np.full(size, self._logprob, FLOAT)
        return Rollout(
            response.ticket.group, response.sample, response.ticket.fence, response.tokens, logprobs,
            response.versions, "stop", response.text, response.started_at, time.time(),
        )  # fmt: skip


def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    join: Annotated[str, typer.Option()],
    pace: Annotated[float, typer.Option(min=1e-3, help="Tokens a second and slot.")],
    name: Annotated[str, typer.Option()] = "generator-0",
    set: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Serve a run as its generator until the buffer says goodbye or SIGTERM comes."""
    torch.set_num_threads(1)
    loaded = load_config(config, set)
    if loaded.generator is None:
        raise ConfigError(f"{config}: it has no [generator] section")
    slots = loaded.generator.engine.slots
    engine = PacedEngine(TextModel.load(policy_folder(loaded)), slots=slots, pace=pace, trace=Trace())
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    hello = Hello(role="generator", name=name, host=socket.gethostname(), pid=os.getpid(), capacity=capacity(slots))
    with (
        closing(Client(join, hello, timeout_s=TIMEOUT_S)) as client,
        closing(WeightFeed(name, device="cpu", peer_timeout_s=TIMEOUT_S)) as weights,
    ):
        Generator(client, cast(TorchGenerator, engine), weights, stop, gone_s=TIMEOUT_S).serve()


if __name__ == "__main__":
    typer.run(main)
