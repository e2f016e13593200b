"""The generator on top of vLLM: the interface of `engine.generate_torch.TorchGenerator`, vLLM's batching and kernels.

Weights are staged while decoding goes on, applied between two steps, and vetted before anything that they sampled leaves:
the canary prompt runs along with the first steps under them, whose tokens are kept back until its answer is right. Draws
are those of `engine.sampling`, so the two kinds of generator can work on one run and continue each other's responses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from engine.config import GeneratorConfig, VllmEngine
from engine.devices import resolve_device
from engine.generate_vllm_canary import Canary
from engine.generate_vllm_requests import Draws, EngineLost, Progress
from engine.generate_vllm_start import check_installed, check_parallel, set_environment
from engine.responses import Job, Response
from engine.text import TextModel
from engine.ticket_queue import TicketQueue
from protocols.messages import HandBack, Held, Rollout, Ticket

if TYPE_CHECKING:
    from engine.generate_vllm_engine import Engine

__all__ = ["EngineLost", "VllmGenerator", "start_vllm"]


def start_vllm(folder: Path, settings: GeneratorConfig, config: VllmEngine) -> VllmGenerator:
    """The generator without weights, its workers running. Raises `ConfigError` when vLLM, the model and the config do not
    fit one another, `EngineLost` when vLLM fails."""
    check_installed()
    canary = Canary(folder, settings.dtype)
    check_parallel(folder, canary.model.config, config)
    set_environment(config, settings.threads)
    from engine.generate_vllm_engine import Engine  # vLLM may be missing, and reads its environment when imported

    text = TextModel.load(folder)
    context = min(config.context or canary.context, canary.context)
    engine = Engine(
        folder,
        config,
        device=resolve_device(settings.device),
        dtype=settings.dtype,
        context=context,
        stop_ids=sorted(text.stop_ids),
    )
    engine.attach(canary.stage)
    canary.stage.seal()
    return VllmGenerator(engine, canary, config=config, context=context, decode=text.decode)


@dataclass(slots=True)
class _Live:
    """A response that vLLM works on; `begun` once a token has come back."""

    response: Response
    begun: bool = False


class VllmGenerator:
    """See the module's docstring. `version` is the version of the weights that are loaded; `counters` only grow."""

    def __init__(
        self,
        engine: Engine,
        canary: Canary,
        *,
        config: VllmEngine,
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
        self._staged: tuple[Mapping[str, Tensor], np.ndarray] | None = None
        self._finished: list[Rollout] = []

    # --- tickets ---------------------------------------------------------------------------------------------------

    def add(self, ticket: Ticket) -> None:
        """Queue the ticket's samples. Those in hand already under this fence or a later one are left alone; those in
        hand under an earlier one are dropped, since their results would be refused. Raises `TicketRefused`."""
        self._tickets.add(ticket)

    def cancel(self, group: int, fence: int) -> None:
        """Drop every unfinished sample that was issued under this fence, if any."""
        self._tickets.cancel(group, fence)

    def hand_back(self) -> list[HandBack]:
        """Everything unfinished, with its tokens so far; the generator is then empty. vLLM may be lost."""
        for live in self._live.values():
            live.response.label(self.version)
        handed = [job.hand_back() for job in self._tickets.jobs]
        self._engine.abort(list(self._live))
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
        self._recall({response.sample for response in job.live} & set(samples), job)
        if not job.unfinished:
            self._tickets.jobs.remove(job)

    def _recall(self, samples: Collection[int], job: Job) -> list[Response]:
        """Take these samples out of vLLM's hands."""
        names = [
            name for name, live in self._live.items() if live.response.job is job and live.response.sample in samples
        ]
        self._engine.abort(names)
        recalled = [self._live.pop(name).response for name in names]
        job.live = [response for response in job.live if response.sample not in samples]
        return recalled

    # --- weights ---------------------------------------------------------------------------------------------------

    def stage(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Put `weights` where the workers load them from, and reckon what they must give; decoding may go on meanwhile,
        `load` may not. Raises `WeightsRefused`, with nothing changed, unless names and shapes are exactly the model's,
        and `FloatingPointError` for weights that give no numbers."""
        self._staged = None
        self._staged = (weights, self._fill(weights, version))

    def _fill(self, weights: Mapping[str, Tensor], version: int) -> np.ndarray:
        began = time.perf_counter()
        expected = self._canary.fill(weights, version)
        self.counters["stage_s"] += time.perf_counter() - began
        return expected

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Serve `weights` (names of `engine.models.named_weights`) from now on; staged here unless `stage` was called
        with them. Raises as `stage` does, and `EngineLost` when vLLM then computes something else.

        Sequences in flight go on: with their keys and values as they are (`on_new_weights = "keep"`) or computed anew
        under the new weights ("recompute"). Responses without a token start anew in both, and no request that starts
        after this is served keys and values of older weights.
        """
        staged, self._staged = self._staged, None
        expected = staged[1] if staged is not None and staged[0] is weights else self._fill(weights, version)
        began = time.perf_counter()
        for live in self._live.values():
            live.response.label(self.version)
        self._restart_unbegun()
        self._engine.apply()
        if self.config.on_new_weights == "recompute":
            self._engine.recompute()
        self.counters["swaps"] += 1
        self.counters["swap_s"] += time.perf_counter() - began
        kept_back = self._vet(expected, version)
        self.version = version
        for progress in kept_back:
            self._record(progress)

    def _restart_unbegun(self) -> None:
        """What vLLM has not begun with waits again, before all others: its prompt may be there under old weights."""
        for job in self._tickets.jobs:
            unbegun = {
                live.response.sample for live in self._live.values() if live.response.job is job and not live.begun
            }
            job.waiting = self._recall(unbegun, job) + job.waiting

    def _vet(self, expected: np.ndarray, version: int) -> list[Progress]:
        """Step until the canary has answered, and return what the steps gave otherwise. Raises `EngineLost`."""
        began = time.perf_counter()
        name = self._name()
        self._engine.add_canary(name, self._canary.prompt, share=name)
        kept_back: list[Progress] = []
        found: np.ndarray | None = None
        while found is None:
            if time.perf_counter() - began > self.config.deadline_s:
                raise EngineLost(
                    f"waited {self.config.deadline_s:.0f} s for vLLM to answer the canary of version {version}"
                )
            for progress in self._engine.step():
                if progress.request == name:
                    found = progress.prompt_logprobs
                else:
                    kept_back.append(progress)
        largest = float(np.abs(found - expected).max())
        self.counters["canary_max"] = max(self.counters["canary_max"], largest)
        self.counters["vet_s"] += time.perf_counter() - began
        if not largest <= self._canary.tolerance:
            raise EngineLost(
                f"vLLM computes with other weights than those of version {version}: log-probabilities of the canary prompt "
                f"differ by {largest:.3g}, expected at most {self._canary.tolerance:g}"
            )
        return kept_back

    # --- one step --------------------------------------------------------------------------------------------------

    def step(self) -> list[Rollout]:
        """Hand over what waits, as far as slots are free, and let vLLM compute one pass; returns what finished. Raises
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
        """Raises `EngineLost` when one of vLLM's workers has ended, also while there is nothing to decode."""
        self._engine.check()

    def close(self) -> None:
        """End vLLM's workers."""
        self._engine.close()

    def _start(self) -> None:
        for job in self._tickets.startable(self.version):
            for response in job.waiting[: self.config.slots - len(self._live)]:
                name, sampling = self._name(), job.sampling
                made = len(response.tokens)
                draws = Draws(job.key(response.sample), made, sampling.temperature, sampling.top_p, sampling.top_k)
                prompt = job.ticket.prompt.tolist() + response.tokens
                self._engine.add(name, prompt, tokens=job.limit - made, draws=draws, share=f"version {self.version}")
                self._live[name] = _Live(response)
                job.waiting.remove(response)
                job.live.append(response)
                response.started_at = response.started_at or time.time()

    def _name(self) -> str:
        self._made += 1
        return str(self._made)

    def _record(self, progress: Progress) -> None:
        live = self._live[progress.request]
        response = live.response
        if not np.isfinite(progress.logprobs).all():
            raise FloatingPointError(f"generator: weights of version {self.version} give logits that are not finite")
        if not live.begun:
            live.begun = True
            self.counters["prefill_tokens"] += len(response.job.ticket.prompt) + len(response.tokens) - progress.cached
            self.counters["prefill_saved_tokens"] += progress.cached
        response.tokens += progress.tokens
        response.logprobs += progress.logprobs
        self.counters["generated_tokens"] += len(progress.tokens)
        if progress.finish is not None:
            self._finish(progress.request, progress.finish)

    def _finish(self, request: str, reason: str) -> None:
        response = self._live.pop(request).response
        job = response.job
        job.live.remove(response)
        if reason not in ("stop", "length"):
            job.waiting.insert(0, response)
            raise EngineLost(f"vLLM ended sample {response.sample} of group {job.ticket.group} by itself: {reason}")
        if not job.unfinished:
            self._tickets.jobs.remove(job)
        response.label(self.version)
        self.counters["finished"] += 1
        text = self._decode_text(np.array(response.tokens))
        self._finished.append(response.rollout("stop" if reason == "stop" else "length", text, time.time()))
