"""A generator on top of an engine that batches and computes by itself: the interface of `engine.generate_torch.TorchGenerator`.

Weights are staged while decoding goes on, applied while the engine stands still, and vetted before anything that they
sampled leaves: the canary prompt runs along with the first tokens under them, which are kept back until its answer is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from engine.config import SglangEngine, VllmEngine
from engine.generate_canary import TEMPERATURE, Canary, Expected
from engine.generate_requests import Draws, Engine, EngineLost, Progress
from engine.responses import Job, Response
from engine.ticket_queue import TicketQueue
from protocols.link_messages import Held
from protocols.messages import HandBack, Rollout, Ticket


@dataclass(slots=True)
class _Live:
    """A response that the engine works on; `begun` once a token has come back. `before` are the runs of versions of the
    tokens that the request began with."""

    response: Response
    before: list[tuple[int, int]]
    begun: bool = False


class EngineGenerator:
    """See the module's docstring. `version` is the version of the weights that are loaded; `counters` only grow."""

    def __init__(
        self,
        engine: Engine,
        canary: Canary,
        *,
        config: VllmEngine | SglangEngine,
        context: int,
        decode: Callable[[np.ndarray], str],
        version: int = 0,
    ) -> None:
        self.config, self.version, self.context, self.vocabulary = config, version, context, canary.vocabulary
        self.counters: dict[str, float] = dict.fromkeys(
            ["generated_tokens", "prefill_tokens", "prefill_saved_tokens", "finished", "swaps"], 0
        ) | dict.fromkeys(["step_s", "stage_s", "swap_s", "vet_s", "canary_max"], 0.0)
        self._engine, self._canary, self._decode_text = engine, canary, decode
        self._tickets = TicketQueue(context=self.context, vocabulary=self.vocabulary, drop=self._drop)
        self._live: dict[str, _Live] = {}
        self._made = 0
        self._vetted = True
        """False while what comes from the engine may be of other weights than it says."""
        self._staged: tuple[Mapping[str, Tensor], Expected] | None = None
        self._finished: list[Rollout] = []

    # --- tickets ---------------------------------------------------------------------------------------------------

    def add(self, ticket: Ticket) -> None:
        """Queue the ticket's samples. Those in hand already under this fence or a later one are left alone; those in
        hand under an earlier one are dropped, since their results would be refused. Raises `TicketRefused`."""
        self._tickets.add(ticket)

    def cancel(self, group: int, fence: int) -> None:
        """Drop every unfinished sample that was issued under this fence, if any."""
        self._tickets.cancel(group, fence)

    def hand_back(self) -> list[Rollout | HandBack]:
        """What has finished and `step` has not returned, and everything unfinished, with its tokens so far; the generator
        is then empty. The engine may be lost."""
        if self._vetted:
            for progress in self._engine.recall(list(self._live)):
                self._record(progress)
        else:
            self._engine.abort(list(self._live))
        for live in self._live.values():
            live.response.label(self.version)
        handed: list[Rollout | HandBack] = [*self._finished, *(job.hand_back() for job in self._tickets.jobs)]
        self._finished = []
        self._live.clear()
        self._tickets.jobs.clear()
        return handed

    def held(self) -> list[Held]:
        """The tickets with unfinished samples."""
        return self._tickets.held()

    @property
    def ready(self) -> bool:
        """Whether `step` has something to do; a ticket that waits for newer weights is nothing to do."""
        return bool(self._live or self._finished) or next(self._tickets.startable(self.version), None) is not None

    def _drop(self, job: Job, samples: Collection[int]) -> None:
        job.waiting = [response for response in job.waiting if response.sample not in samples]
        names = self._names(job, samples)
        self._engine.abort(names)
        for name in names:
            job.live.remove(self._live.pop(name).response)
        if not job.unfinished:
            self._tickets.jobs.remove(job)

    def _names(self, job: Job, samples: Collection[int]) -> list[str]:
        """The requests of these samples, as far as the engine has them."""
        return [
            name for name, live in self._live.items() if live.response.job is job and live.response.sample in samples
        ]

    # --- weights ---------------------------------------------------------------------------------------------------

    def stage(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Put `weights` where the engine takes them from, and reckon what they must give; decoding may go on meanwhile,
        `load` may not. Raises `WeightsRefused`, with nothing changed, unless names and shapes are exactly the model's,
        and `FloatingPointError` for weights that give no numbers."""
        self._staged = None
        self._staged = (weights, self._fill(weights, version))

    def _fill(self, weights: Mapping[str, Tensor], version: int) -> Expected:
        began = time.perf_counter()
        expected = self._canary.fill(weights, version)
        self.counters["stage_s"] += time.perf_counter() - began
        return expected

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Serve `weights` (names of `engine.models.named_weights`) from now on; staged here unless `stage` was called
        with them. Raises as `stage` does, and `EngineLost` when the engine then computes something
        else.

        Sequences in flight go on: with their keys and values as they are (`on_new_weights = "keep"`) or computed anew
        under the new weights ("recompute"). Responses without a token start anew in both, and no request that starts
        after this is served keys and values of older weights.
        """
        staged, self._staged = self._staged, None
        expected = staged[1] if staged is not None and staged[0] is weights else self._fill(weights, version)
        began = time.perf_counter()
        recompute = self.config.on_new_weights == "recompute"
        self._start_anew(begun=recompute and not self._engine.recomputes)
        self._vetted = False
        self._engine.apply(version, recompute=recompute)
        self.counters["swaps"] += 1
        self.counters["swap_s"] += time.perf_counter() - began
        kept_back = self._vet(expected, version)
        self.version, self._vetted = version, True
        for progress in kept_back:
            self._record(progress)

    def _start_anew(self, *, begun: bool) -> None:
        """What is under way comes in. What the engine has not begun with waits again, before all others: its prompt may be there
        under old weights. So does, with `begun`, what it has begun with: it starts anew from its tokens."""
        names = [name for name, live in self._live.items() if begun or not live.begun]
        for progress in self._engine.recall(names):
            self._record(progress)
        for live in self._live.values():
            live.response.label(self.version)
        recalled = [self._live.pop(name).response for name in names if name in self._live]
        for job in self._tickets.jobs:
            again = [response for response in recalled if response.job is job]
            job.live = [response for response in job.live if response not in again]
            job.waiting = again + job.waiting

    def _vet(self, expected: Expected, version: int) -> list[Progress]:
        """Step until the canary has answered, and return what the steps gave otherwise. Raises `EngineLost`."""
        began = time.perf_counter()
        name = self._name()
        self._engine.add_canary(name, self._canary.prompt, draws=Draws(0, 0, TEMPERATURE, 1.0, 0), share=name)
        kept_back: list[Progress] = []
        largest: float | None = None
        heard = began
        while largest is None:
            news = self._engine.step()
            now = time.perf_counter()
            heard = now if news else heard  # the canary may have to wait for room that others have
            if now - heard > self.config.deadline_s:
                raise EngineLost(
                    f"waited {self.config.deadline_s:.0f} s for {self._engine.name} to answer the canary of version {version}"
                )
            for progress in news:
                if progress.request != name:
                    kept_back.append(progress)
                elif progress.prompt_logprobs is not None:
                    largest = expected.difference(progress.prompt_logprobs, progress.tokens[0], progress.logprobs[0])
        self.counters["canary_max"] = max(self.counters["canary_max"], largest)
        self.counters["vet_s"] += time.perf_counter() - began
        if not largest <= self._canary.tolerance:
            raise EngineLost(
                f"{self._engine.name} computes with other weights than those of version {version}: log-probabilities of the canary "
                f"prompt differ by {largest:.3g}, expected at most {self._canary.tolerance:g}"
            )
        return kept_back

    # --- one step --------------------------------------------------------------------------------------------------

    def step(self) -> list[Rollout]:
        """Hand over what waits, as far as slots are free, and let the engine compute; returns what finished. Raises
        `EngineLost`; what there is can then still be handed back."""
        began = time.perf_counter()
        if not self._finished:  # of the steps while weights were vetted: those must not wait for another
            self._start()
            for progress in self._engine.step() if self._live else []:
                self._record(progress)
        finished, self._finished = self._finished, []
        self.counters["step_s"] += time.perf_counter() - began
        return finished

    def check(self) -> None:
        """Raises `EngineLost` when the engine has ended, also while there is nothing to decode."""
        self._engine.check()

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    def _start(self) -> None:
        for job in self._tickets.startable(self.version):
            for response in job.waiting[: self.config.slots - len(self._live)]:
                name, sampling = self._name(), job.sampling
                made = len(response.tokens)
                draws = Draws(job.key(response.sample), made, sampling.temperature, sampling.top_p, sampling.top_k)
                prompt = job.ticket.prompt.tolist() + response.tokens
                self._engine.add(name, prompt, tokens=job.limit - made, draws=draws, share=f"version {self.version}")
                self._live[name] = _Live(response, list(response.versions))
                job.waiting.remove(response)
                job.live.append(response)
                response.started_at = response.started_at or time.time()

    def _name(self) -> str:
        self._made += 1
        return str(self._made)

    def _record(self, progress: Progress) -> None:
        live = self._live.get(progress.request)
        if live is None:  # recalled, and the engine had more of it on the way
            return
        response = live.response
        if not np.isfinite(progress.logprobs).all():
            raise FloatingPointError(f"generator: weights of version {self.version} give logits that are not finite")
        if progress.tokens and not live.begun:
            live.begun = True
            self.counters["prefill_tokens"] += len(response.job.ticket.prompt) + len(response.tokens) - progress.cached
            self.counters["prefill_saved_tokens"] += progress.cached
        response.tokens += progress.tokens
        response.logprobs += progress.logprobs
        if progress.versions is not None:
            response.relabel(live.before + progress.versions)
        self.counters["generated_tokens"] += len(progress.tokens)
        if progress.finish is not None:
            self._finish(progress.request, progress.finish)

    def _finish(self, request: str, reason: str) -> None:
        response = self._live.pop(request).response
        job = response.job
        job.live.remove(response)
        if reason not in ("stop", "length"):
            job.waiting.insert(0, response)
            raise EngineLost(
                f"{self._engine.name} ended sample {response.sample} of group {job.ticket.group} by itself: {reason}"
            )
        if not job.unfinished:
            self._tickets.jobs.remove(job)
        response.label(self.version)
        self.counters["finished"] += 1
        text = self._decode_text(np.array(response.tokens))
        self._finished.append(response.rollout("stop" if reason == "stop" else "length", text, time.time()))
