"""Continuous batching over a Hugging Face causal language model, weights exchanged between decode steps.

A step computes some prompt tokens (at most a budget, so that a long prompt delays the running sequences by one bounded
pass) and then one token for every live sequence, as one row without padding. The last token of a prompt or of a
continued response is not computed beforehand: it is the sequence's first decode input, so the first token needs no
path of its own. A prompt's keys and values are computed once and kept until all samples of its ticket have a slot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from engine.adopt_weights import WeightsRefused, adopt_weights
from engine.config import TorchEngine
from engine.generate_attention import PrefillAttention
from engine.kv_slots import KvShape, Prefix, PromptTable
from engine.models import hidden_states, output_weight
from engine.responses import Job, Response, TicketRefused
from engine.running import Running
from engine.sampling import draw, uniforms
from engine.ticket_queue import TicketQueue
from protocols.link_messages import Held
from protocols.messages import HandBack, Rollout, Ticket

__all__ = ["TicketRefused", "TorchGenerator", "WeightsRefused"]


class TorchGenerator:
    """See the module's docstring. `version` is the version of the weights that are loaded; `counters` only grow."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        config: TorchEngine,
        stop_ids: Collection[int],
        decode: Callable[[np.ndarray], str],
        version: int = 0,
        prefill_tokens: int = 512,
        range_bytes: int | None = None,
    ) -> None:
        """`decode` turns a response's tokens, its stop token included, into `Rollout.text`. `prefill_tokens` is the
        budget of prompt tokens of one step; `range_bytes` as for `Running`."""
        if config.slots < 1 or prefill_tokens < 1:
            raise ValueError(f"slots {config.slots}, prefill_tokens {prefill_tokens}: expected at least 1 of each")
        self.model, self.config, self.version = model.eval(), config, version
        self.context = int(model.config.max_position_embeddings)
        self.vocabulary = int(output_weight(model).shape[0])
        self.counters: dict[str, float] = dict.fromkeys(
            ["generated_tokens", "prefill_tokens", "prefill_saved_tokens", "finished", "swaps"], 0
        ) | dict.fromkeys(["decode_s", "prefill_s", "swap_s"], 0.0)
        self._shape = KvShape.of(model.config, output_weight(model))
        self._prompts = PromptTable(self._shape)
        self._running = Running(self._shape, config.slots, self._prompts, range_bytes=range_bytes)
        self._decode_text, self._budget = decode, prefill_tokens
        self._stops = np.zeros(self.vocabulary, dtype=bool)
        self._stops[[token for token in stop_ids if token < self.vocabulary]] = True
        self._tickets = TicketQueue(context=self.context, vocabulary=self.vocabulary, drop=self._drop)

    # --- tickets ---------------------------------------------------------------------------------------------------

    def add(self, ticket: Ticket) -> None:
        """Queue the ticket's samples. Those in hand already under this fence or a later one are left alone; those in
        hand under an earlier one are dropped, since their results would be refused. Raises `TicketRefused`."""
        self._tickets.add(ticket)

    def cancel(self, group: int, fence: int) -> None:
        """Drop every unfinished sample that was issued under this fence, if any."""
        self._tickets.cancel(group, fence)

    @torch.inference_mode()
    def hand_back(self) -> list[HandBack]:
        """Everything unfinished, with its tokens so far; the generator is then empty."""
        for response in self._running.responses:
            response.label(self.version)
        handed = [job.hand_back() for job in self._tickets.jobs]
        self._running.clear()
        for job in list(self._tickets.jobs):
            self._close(job)
        return handed

    def held(self) -> list[Held]:
        """The tickets with unfinished samples."""
        return self._tickets.held()

    @property
    def ready(self) -> bool:
        """Whether `step` has something to do; a ticket that waits for newer weights is nothing to do."""
        return len(self._running) > 0 or next(self._tickets.startable(self.version), None) is not None

    @torch.inference_mode()
    def _drop(self, job: Job, samples: Collection[int]) -> None:
        job.waiting = [response for response in job.waiting if response.sample not in samples]
        for response in [response for response in job.live if response.sample in samples]:
            self._running.remove(self._running.responses.index(response))
        if not job.unfinished:
            self._close(job)

    def _close(self, job: Job) -> None:
        self._tickets.jobs.remove(job)
        self._release_prompt(job)

    def _release_prompt(self, job: Job) -> None:
        if job.prompt is not None:
            self._prompts.release(job.prompt)
            job.prompt = None

    # --- weights ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy `weights` (names of `engine.models.named_weights`) into the model, between two steps.

        Sequences in flight go on: with their keys and values as they are (`on_new_weights = "keep"`) or computed anew
        under the new weights ("recompute"). Prompts of samples that have not started are computed anew in both.
        Raises `WeightsRefused`, with nothing changed, unless names and shapes are exactly the model's.
        """
        began = time.perf_counter()
        adopt_weights(self.model, weights, version)
        for response in self._running.responses:
            response.label(self.version)
        self.version = version
        self._prompts.expire()
        for job in self._tickets.jobs:
            self._release_prompt(job)
            if self.config.on_new_weights == "recompute":
                job.waiting, job.live = job.live + job.waiting, []
            for response in job.waiting:
                response.prefix = None
        if self.config.on_new_weights == "recompute":
            self._running.clear()
        self.counters["swaps"] += 1
        self.counters["swap_s"] += time.perf_counter() - began

    # --- one step --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Rollout]:
        """One pass of prompt tokens if any are due, one token for each live sequence; returns what finished."""
        began = time.perf_counter()
        self._prefill()
        self._start()
        prefilled = time.perf_counter()
        self.counters["prefill_s"] += prefilled - began
        finished = self._decode() if len(self._running) else []
        self.counters["decode_s"] += time.perf_counter() - prefilled
        return finished

    def _prefill(self) -> None:
        stretches = self._stretches()
        if not stretches:
            return
        ids = np.concatenate([prefix.ids[prefix.done : prefix.done + count] for prefix, count in stretches])
        positions = np.concatenate([np.arange(prefix.done, prefix.done + count) for prefix, count in stretches])
        attention = PrefillAttention(stretches)
        hidden_states(self.model, self._on_device(ids.astype(np.int64)), self._on_device(positions), attention)
        for prefix, count in stretches:
            prefix.done += count
        self.counters["prefill_tokens"] += len(ids)

    def _stretches(self) -> list[tuple[Prefix, int]]:
        """What to compute next: of the oldest tickets, as far as slots are free and the budget goes."""
        budget, room = self._budget, self._running.free
        chosen: list[tuple[Prefix, int]] = []
        for job in self._tickets.startable(self.version):
            for response in job.waiting[:room]:
                prefix = self._to_compute(job, response)
                if prefix is None or any(prefix is other for other, _ in chosen):
                    continue
                chosen.append((prefix, min(budget, prefix.left)))
                budget -= chosen[-1][1]
                if budget == 0:
                    return chosen
            room -= len(job.waiting[:room])
            if room == 0:
                break
        return chosen

    def _to_compute(self, job: Job, response: Response) -> Prefix | None:
        """What has to be computed next before `response` can start: the prompt, then its own tokens if it continues."""
        if job.prompt is None:
            job.prompt = self._prompts.hold(job.ticket.prompt[:-1])
        self._prompts.place(job.prompt)
        if job.prompt.prefix is not None or not response.tokens:
            return job.prompt.prefix
        if response.prefix is None:
            response.prefix = Prefix(self._shape, response.computed_ids(), self._prompts.read(job.prompt))
        return response.prefix if response.prefix.left else None

    def _start(self) -> None:
        """Give free slots to the oldest waiting responses for which everything is computed."""
        for job in self._tickets.startable(self.version):
            for response in job.waiting[: self._running.free]:
                if self._to_compute(job, response) is not None or job.prompt is None:
                    continue
                job.waiting.remove(response)
                self._running.add(response, job.prompt)
                response.started_at = response.started_at or time.time()
                if job.prompt.given > 1:
                    self.counters["prefill_saved_tokens"] += len(job.prompt.ids)

    def _decode(self) -> list[Rollout]:
        positions, attention = self._running.extend()
        state = self._running.state
        hidden = hidden_states(self.model, self._on_device(state["token"]), self._on_device(positions), attention)
        drawn, logprobs = draw(
            F.linear(hidden, output_weight(self.model)),
            uniforms(state["key"], state["made"]),
            temperature=state["temperature"],
            top_p=state["top_p"],
            top_k=state["top_k"],
        )
        tokens, values = drawn.cpu().numpy(), logprobs.cpu().numpy()
        if not np.isfinite(values).all():
            raise FloatingPointError(f"generator: weights of version {self.version} give logits that are not finite")
        return self._record(state, tokens, values)

    def _record(self, state: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> list[Rollout]:
        state["made"] += 1
        state["token"] = tokens
        for response, token, logprob in zip(self._running.responses, tokens.tolist(), logprobs.tolist(), strict=True):
            response.tokens.append(token)
            response.logprobs.append(logprob)
        self.counters["generated_tokens"] += len(tokens)
        stopped = self._stops[tokens]
        ended = np.flatnonzero(stopped | (state["made"] >= state["limit"]))
        # From the last slot on: what moves into a hole is then never itself one that ended.
        return [self._finish(int(slot), bool(stopped[slot])) for slot in ended[::-1]]

    def _finish(self, slot: int, stopped: bool) -> Rollout:
        response = self._running.remove(slot)
        if not response.job.unfinished:
            self._close(response.job)
        response.label(self.version)
        self.counters["finished"] += 1
        text = self._decode_text(np.array(response.tokens))
        return response.rollout("stop" if stopped else "length", text, time.time())

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._shape.device, non_blocking=True)
