"""The sequences in slots, and everything that is kept by slot: lengths, draws, prompts, keys and values."""

from __future__ import annotations

import numpy as np

from engine.generate_attention import DecodeAttention, Sharing
from engine.kv_slots import KvShape, KvSlots, Prompt, PromptTable
from engine.responses import Response
from engine.slot_ranges import ranges, reorder

SLOT = np.dtype(
    [
        ("prompt", np.int64), ("made", np.int64), ("limit", np.int64), ("token", np.int64), ("key", np.uint64),
        ("temperature", np.float32), ("top_p", np.float32), ("top_k", np.int64),
    ]
)  # fmt: skip
"""Prompt tokens but the last, response tokens so far and at most, the next input, and how to draw."""

_PLAN_EVERY = 16
"""Decode steps between two looks at which slots attend together."""
_RANGE_BYTES = {"cpu": 256 << 10, "cuda": 64 << 20}
"""Keys and values of one layer that can be read in the time that one more range of slots costs in launches: measured
on one CPU core, where half or four times as much is no slower; reckoned for a GPU."""


class Running:
    """Live sequences in slots 0 to n - 1, in no particular order; `state` has a row of `SLOT` for each."""

    def __init__(self, shape: KvShape, slots: int, prompts: PromptTable, *, range_bytes: int | None = None) -> None:
        """`range_bytes`: see `_RANGE_BYTES`, from which it comes when None."""
        self.responses: list[Response] = []
        self.size, self._shape = slots, shape
        self._state = np.zeros(slots, dtype=SLOT)
        self._slots, self._table = KvSlots(shape, slots), prompts
        self._prompts: list[Prompt] = []
        self._sharing: Sharing | None = None
        self._seen = 0
        self._bounds: list[int] = []
        self._steps = 0
        token_bytes = 2 * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
        if range_bytes is None:
            range_bytes = _RANGE_BYTES.get(shape.device.type, _RANGE_BYTES["cuda"])
        self._range_tokens = range_bytes // token_bytes

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def free(self) -> int:
        """Slots without a sequence."""
        return self.size - len(self.responses)

    @property
    def state(self) -> np.ndarray:
        """[n], a view."""
        return self._state[: len(self.responses)]

    def add(self, response: Response, prompt: Prompt) -> None:
        """Start a response whose prompt, and `prefix` where it continues, are computed."""
        job, known, sampling = response.job, len(prompt.ids), response.job.ticket.sampling
        prompt.users += 1
        prompt.given += 1
        self._prompts.append(prompt)
        own = response.prefix.kv[..., known:, :] if response.prefix else self._shape.zeros(tokens=0)
        slot = self._slots.append(own)
        token = response.tokens[-1] if response.tokens else int(job.ticket.prompt[-1])
        self._state[slot] = (
            known, len(response.tokens), job.limit, token, job.key(response.sample),
            sampling.temperature, sampling.top_p, sampling.top_k,
        )  # fmt: skip
        response.prefix, self._sharing = None, None
        job.live.append(response)
        self.responses.append(response)

    def remove(self, slot: int) -> Response:
        """Free a slot; the last live sequence moves into it."""
        response, prompt = self.responses[slot], self._prompts[slot]
        self.responses[slot], self._prompts[slot] = self.responses[-1], self._prompts[-1]
        self.responses.pop()
        self._prompts.pop()
        self._state[slot] = self._state[len(self.responses)]
        self._slots.remove(slot)
        self._table.release(prompt)
        response.job.live.remove(response)
        self._sharing = None
        return response

    def clear(self) -> None:
        """Free all slots; the responses' jobs are left to the caller."""
        for prompt in self._prompts:
            self._table.release(prompt)
        self.responses, self._prompts, self._sharing = [], [], None
        self._slots.clear()

    def extend(self) -> tuple[np.ndarray, DecodeAttention]:
        """One more token for every sequence: its position int64 [n], and the attention of the pass that computes it."""
        if self._steps % _PLAN_EVERY == 0:
            self._plan()
        self._steps += 1
        positions = self.state["prompt"] + self._slots.lengths
        self._slots.extend()
        if self._sharing is None or self._seen != self._table.changes:
            self._sharing = Sharing(self._table.slots, np.array([prompt.slot for prompt in self._prompts]))
            self._seen = self._table.changes
        return positions, DecodeAttention(self._slots, self._sharing, self._bounds)

    def _plan(self) -> None:
        """Attention reads each range of slots up to the longest in it: choose ranges, and sort the slots by length when
        the reading that this saves until the next look is more than what it moves."""
        order = reorder(self._slots.lengths, range_cost=self._range_tokens, horizon=_PLAN_EVERY)
        if order is not None:
            self._slots.permute(order)
            self._state[: len(order)] = self._state[order]
            self.responses = [self.responses[slot] for slot in order]
            self._prompts = [self._prompts[slot] for slot in order]
            self._sharing = None
        self._bounds = ranges(self._slots.lengths, range_cost=self._range_tokens)
