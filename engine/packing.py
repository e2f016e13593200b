"""How a step's groups are dealt to updates and ranks, and laid out in rows without padding.

A packed row is `[prompt, response, response, ..., prompt, response, ...]`: a group's prompt is computed once for all its
responses. Positions restart after the prompt for each response. A response's last token predicts nothing that is trained,
so it is not in the row, and its first token is predicted by the prompt's last position.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.packed_attention import PackedAttention
from protocols.messages import Batch, GroupSize


def assign(groups: Sequence[GroupSize], *, updates: int, ranks: int) -> list[list[list[int]]]:
    """Deal groups to updates and ranks: [update][rank] -> group ids in the order given. Deterministic.

    A group weighs its prompt and response tokens. Groups are dealt heaviest first (ties: lower id first). To updates in
    rounds, one group to each update a round and the heaviest to the lightest so far, so that group counts differ by one at
    most; within an update each group goes to the lightest rank (longest processing time first: the heaviest rank has at
    most 4/3 of the best possible). Ties go to the lower index. A rank may get nothing.

    Raises ValueError when there are fewer groups than updates.
    """
    if len(groups) < updates:
        raise ValueError(f"assign: got {len(groups)} groups for {updates} updates, expected at least one for each")
    order = {size.group: place for place, size in enumerate(groups)}
    weigh = {size.group: size.prompt_tokens + sum(size.response_tokens) for size in groups}
    heaviest = sorted(order, key=lambda group: (-weigh[group], group))
    dealt: list[list[int]] = [[] for _ in range(updates)]
    load = [0] * updates
    for first in range(0, len(heaviest), updates):
        lightest = sorted(range(updates), key=lambda update: (load[update], update))
        for update, group in zip(lightest, heaviest[first : first + updates], strict=False):  # the last round is short
            dealt[update].append(group)
            load[update] += weigh[group]
    return [[sorted(share, key=order.__getitem__) for share in _spread(update, weigh, ranks)] for update in dealt]


def _spread(groups: list[int], weigh: dict[int, int], ranks: int) -> list[list[int]]:
    """`groups`, heaviest first, each to the lightest rank so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for group in groups:
        load, rank = loads[0]
        shares[rank].append(group)
        heapq.heapreplace(loads, (load + weigh[group], rank))
    return shares


@dataclass(frozen=True)
class Pack:
    """One micro-batch: a row of N input positions that predicts the T tokens of S responses.

    `ids`, `positions` int64 [N]; token t of the pack is `targets`[t], predicted by the hidden state at row position
    `predictors`[t]; it is token `tokens`[t] of the batch's columns. The S responses are `responses` of the batch. All are
    on the device, but `tokens` and `responses`, which index the batch's numpy columns.
    """

    ids: Tensor
    positions: Tensor
    attention: PackedAttention
    predictors: Tensor
    targets: Tensor
    tokens: np.ndarray
    responses: np.ndarray
    slots: Tensor
    shape: tuple[int, int]

    def rows(self, flat: Tensor) -> Tensor:
        """Per-token values [T] as [S, L], one response a row, 0 behind its end. Differentiable."""
        count, length = self.shape
        return flat.new_zeros(count * length).index_copy(0, self.slots, flat).view(count, length)

    def column(self, column: np.ndarray) -> Tensor:
        """A column over the batch's tokens as [S, L] on the device, 0 behind a response's end."""
        return self.rows(torch.from_numpy(column[self.tokens]).to(self.slots.device))


@dataclass(frozen=True)
class _Unit:
    """Responses of one group that share a prompt in a row, and the input positions they take with it."""

    group: int
    responses: list[int]
    inputs: int


def pack(batch: Batch, *, token_budget: int, device: torch.device | str) -> list[Pack]:
    """Micro-batches of at most `token_budget` input positions, made of whole groups where possible. Deterministic.

    A group that is larger than the budget is cut by responses, its prompt repeated; a response that is larger with its
    prompt gets a micro-batch of its own. An empty batch has none.
    """
    bins: list[list[_Unit]] = []
    room: list[int] = []
    for unit in sorted(_units(batch, token_budget), key=lambda unit: -unit.inputs):  # first fit, largest first
        place = next((i for i, left in enumerate(room) if left >= unit.inputs), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(token_budget)
        bins[place].append(unit)
        room[place] -= unit.inputs
    return [_lay_out(batch, sorted(units, key=lambda unit: unit.responses[0]), device) for units in bins]


def idle_pack(device: torch.device | str) -> Pack:
    """A micro-batch of one input position and no token: its loss is 0, and so is the gradient of every weight."""
    nothing, nobody = torch.zeros(0, dtype=torch.int64, device=device), np.zeros(0, np.int64)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    attention = PackedAttention(np.array([(0, 1, 0, 0)]), device)
    return Pack(one, one, attention, nothing, nothing, nobody, nobody, nothing, (0, 1))


def _units(batch: Batch, token_budget: int) -> list[_Unit]:
    units: list[_Unit] = []
    first = 0
    for group, (prompt, size) in enumerate(zip(batch.prompt_lengths.tolist(), batch.sizes.tolist(), strict=True)):
        chosen: list[int] = []
        inputs = prompt
        for response in range(first, first + size):
            own = int(batch.lengths[response]) - 1
            if chosen and inputs + own > token_budget:
                units.append(_Unit(group, chosen, inputs))
                chosen, inputs = [], prompt
            chosen.append(response)
            inputs += own
        if chosen:
            units.append(_Unit(group, chosen, inputs))
        first += size
    return units


def _lay_out(batch: Batch, units: list[_Unit], device: torch.device | str) -> Pack:
    prompt_ends, ends = np.cumsum(batch.prompt_lengths).tolist(), np.cumsum(batch.lengths).tolist()
    ids, positions, predictors, tokens, segments = [], [], [], [], []
    at = 0
    for unit in units:
        end = prompt_ends[unit.group]
        prompt = batch.prompts[end - batch.prompt_lengths[unit.group] : end]
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        prompt_at, at = at, at + len(prompt)
        segments.append((prompt_at, len(prompt), prompt_at, 0))
        for response in unit.responses:
            token = np.arange(ends[response] - batch.lengths[response], ends[response])
            own = len(token) - 1
            ids.append(batch.tokens[token[:-1]])
            positions.append(np.arange(len(prompt), len(prompt) + own))
            predictors.append(np.concatenate([[prompt_at + len(prompt) - 1], np.arange(at, at + own)]))
            tokens.append(token)
            segments.append((at, own, prompt_at, len(prompt)))
            at += own
    responses = np.array([response for unit in units for response in unit.responses])
    lengths = batch.lengths[responses].astype(np.int64)
    shape = (len(responses), int(lengths.max()))
    token = np.concatenate(tokens)
    slots = np.flatnonzero(np.arange(shape[1])[None] < lengths[:, None])

    def move(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x.astype(np.int64)).to(device)

    return Pack(
        ids=move(np.concatenate(ids)),
        positions=move(np.concatenate(positions)),
        attention=PackedAttention(np.array(segments), device),
        predictors=move(np.concatenate(predictors)),
        targets=move(batch.tokens[token]),
        tokens=token,
        responses=responses,
        slots=move(slots),
        shape=shape,
    )
