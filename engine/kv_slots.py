"""Where keys and values of running sequences lie: slots of one tensor, the live ones always first.

A prompt's lie once, in a table of their own, however many samples share it: decoding is bound by the memory that
attention reads, and the samples of a group would otherwise read the same prompt each for itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

GROWTH = 128
"""Tokens by which the capacity of all slots grows."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token's keys and values take: [layers, 2, kv_heads, d] of `dtype`."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, config: PretrainedConfig, like: Tensor) -> KvShape:
        """From a Hugging Face config of the Llama and Qwen families; type and device of the tensor `like`."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dim, like.dtype, like.device)

    def zeros(self, *slots: int, tokens: int) -> Tensor:
        """[layers, 2, *slots, kv_heads, tokens, d]. Zeros: a masked position may hold anything but NaN or infinity."""
        shape = (self.layers, 2, *slots, self.kv_heads, tokens, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


class KvSlots:
    """`kv` [layers, 2, slots, kv_heads, capacity, d]; the first `live` slots hold `lengths` (int64) tokens each."""

    def __init__(self, shape: KvShape, slots: int) -> None:
        self.shape = shape
        self.kv = shape.zeros(slots, tokens=GROWTH)
        self.live = 0
        self._lengths = np.zeros(slots, dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [live], a view."""
        return self._lengths[: self.live]

    def reserve(self, slots: int, tokens: int) -> None:
        """Room for that many slots of that many tokens; what is there stays."""
        had_slots, had_tokens = len(self._lengths), int(self.kv.shape[-2])
        if slots <= had_slots and tokens <= had_tokens:
            return
        old, wanted = self.kv, had_slots if slots <= had_slots else max(slots, 2 * had_slots)
        self.kv = self.shape.zeros(wanted, tokens=max(had_tokens, math.ceil(tokens / GROWTH) * GROWTH))
        self.kv[:, :, : self.live, :, :had_tokens] = old[:, :, : self.live]
        self._lengths = np.concatenate([self._lengths, np.zeros(wanted - had_slots, dtype=np.int64)])

    def append(self, kv: Tensor) -> int:
        """Put a copy of `kv` [layers, 2, kv_heads, n, d] into the next slot; returns its number."""
        slot, tokens = self.live, int(kv.shape[-2])
        self.reserve(slot + 1, tokens)
        self.kv[:, :, slot, :, :tokens] = kv
        self._lengths[slot] = tokens
        self.live += 1
        return slot

    def extend(self) -> None:
        """Make every live slot one token longer; its keys and values are the caller's to write."""
        self.reserve(0, int(self.lengths.max()) + 1)
        self.lengths[:] += 1

    def remove(self, slot: int) -> None:
        """Free a slot; the last live one moves into it."""
        last = self.live - 1
        if slot != last:
            tokens = int(self._lengths[last])
            self.kv[:, :, slot, :, :tokens] = self.kv[:, :, last, :, :tokens]
            self._lengths[slot] = tokens
        self.live = last

    def permute(self, order: np.ndarray) -> None:
        """Slot i gets what slot `order[i]` holds; `order` int [live] is a permutation."""
        moved = np.flatnonzero(order != np.arange(self.live))
        tokens = int(self.lengths[moved].max(initial=0))
        targets, sources = (torch.from_numpy(slots).to(self.shape.device) for slots in (moved, order[moved]))
        for layer in self.kv:  # one at a time: what is moved lies in memory twice meanwhile
            layer[:, targets, :, :tokens] = layer[:, sources, :, :tokens]
        self.lengths[moved] = self.lengths[order[moved]]

    def clear(self) -> None:
        """Free all slots."""
        self.live = 0


class Prefix:
    """The first tokens of a sequence and, as far as they are computed (`done` tokens), their keys and values."""

    def __init__(self, shape: KvShape, ids: np.ndarray, start: Tensor | None = None) -> None:
        """`ids` int32 [n]; `start` [layers, 2, kv_heads, m, d]: what is computed of them already."""
        self.ids = ids
        self.kv = shape.zeros(tokens=len(ids))
        self.done = 0
        if start is not None:
            self.done = int(start.shape[-2])
            self.kv[..., : self.done, :] = start

    @property
    def left(self) -> int:
        """Tokens still to be computed."""
        return len(self.ids) - self.done


@dataclass(slots=True, eq=False)
class Prompt:
    """The tokens of a prompt but the last: `prefix` while they are computed, then a `slot` of the table."""

    ids: np.ndarray
    prefix: Prefix | None
    slot: int = -1
    users: int = 0
    """Unfinished tickets and live sequences that hold it."""
    given: int = 0
    """Sequences that started with it."""


class PromptTable:
    """Prompts that are held, each once, however many tickets and sequences hold it."""

    def __init__(self, shape: KvShape) -> None:
        self.slots = KvSlots(shape, 8)
        self.changes = 0
        """Grows whenever a prompt comes into `slots` or moves there."""
        self._placed: list[Prompt] = []
        self._current: list[Prompt] = []

    def hold(self, ids: np.ndarray) -> Prompt:
        """The prompt of these tokens under the weights that are loaded; new, and to be computed, if nobody holds it."""
        prompt = next((each for each in self._current if np.array_equal(each.ids, ids)), None)
        if prompt is None:
            prompt = Prompt(ids, Prefix(self.slots.shape, ids))
            self._current.append(prompt)
        prompt.users += 1
        return prompt

    def place(self, prompt: Prompt) -> None:
        """Take in a prompt if its computation is complete and was not taken in yet."""
        if prompt.prefix is None or prompt.prefix.left:
            return
        prompt.slot, prompt.prefix = self.slots.append(prompt.prefix.kv), None
        self._placed.append(prompt)
        self.changes += 1

    def read(self, prompt: Prompt) -> Tensor:
        """Keys and values of a prompt that was taken in, a view."""
        return self.slots.kv[:, :, prompt.slot, :, : len(prompt.ids)]

    def release(self, prompt: Prompt) -> None:
        """One holder fewer; a prompt that nobody holds is forgotten."""
        prompt.users -= 1
        if prompt.users:
            return
        self._current = [each for each in self._current if each is not prompt]
        if prompt.prefix is None:
            self.slots.remove(prompt.slot)
            self._placed[-1].slot = prompt.slot
            self._placed[prompt.slot] = self._placed[-1]
            self._placed.pop()
            self.changes += 1

    def expire(self) -> None:
        """The weights changed: what is held stays for its holders, but nobody new gets it."""
        self._current = []
