"""What a generator has in hand: tickets as `Job`s, their samples as `Response`s in the making. No model, no tensors
but a job's prompt prefix; `engine.generate_torch` moves responses from waiting to a slot to finished."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.kv_slots import Prefix, Prompt
from engine.sampling import sequence_key
from protocols.messages import FLOAT, INT, Finish, HandBack, Partial, Rollout, Sampling, Ticket


class TicketRefused(ValueError):
    """A ticket that this model cannot serve; says which, what it got and what it expected. Nothing of it was taken."""


@dataclass(slots=True, eq=False)
class Response:
    """One sample, waiting or in a slot. `versions` are runs over the first `labelled` tokens; those after were sampled
    under the weights that are loaded now."""

    job: Job
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    labelled: int = 0
    started_at: float = 0.0
    prefix: Prefix | None = None
    """Prompt and tokens but the last, being computed; only for a response that continues."""

    @classmethod
    def of(cls, job: Job, sample: int, partial: Partial | None) -> Response:
        if partial is None:
            return cls(job, sample)
        tokens, logprobs = partial.tokens.tolist(), partial.logprobs.tolist()
        return cls(job, sample, tokens, logprobs, list(partial.versions), len(tokens))

    def label(self, version: int) -> None:
        """Note that the tokens since the last call were sampled under `version`."""
        count = len(self.tokens) - self.labelled
        if count == 0:
            return
        if self.versions and self.versions[-1][0] == version:
            count += self.versions.pop()[1]
        self.versions.append((version, count))
        self.labelled = len(self.tokens)

    def relabel(self, versions: list[tuple[int, int]]) -> None:
        """`versions` are the runs over all tokens."""
        self.versions, self.labelled = [], 0
        for version, count in versions:
            if self.versions and self.versions[-1][0] == version:
                count += self.versions.pop()[1]
            self.versions.append((version, count))
        self.labelled = len(self.tokens)

    def computed_ids(self) -> np.ndarray:
        """int32: every token but the last, whose keys and values the next decode step computes."""
        return np.concatenate([self.job.ticket.prompt, np.array(self.tokens, dtype=INT)])[:-1]

    def partial(self) -> Partial:
        """What is there of it; `label` was called."""
        return Partial(self.sample, np.array(self.tokens, INT), np.array(self.logprobs, FLOAT), self.versions)

    def rollout(self, finish: Finish, text: str, finished_at: float) -> Rollout:
        """The finished response; `label` was called."""
        ticket = self.job.ticket
        return Rollout(
            ticket.group, self.sample, ticket.fence, np.array(self.tokens, INT), np.array(self.logprobs, FLOAT),
            self.versions, finish, text, self.started_at, finished_at,
        )  # fmt: skip


class Job:
    """A ticket in work: `waiting` responses in order, `live` in slots, and the prompt once it is held."""

    def __init__(self, ticket: Ticket, samples: list[int], *, context: int) -> None:
        self.ticket = ticket
        self.limit = min(ticket.sampling.max_tokens, context - len(ticket.prompt))
        """Response tokens after which the finish is "length"."""
        partials = {partial.sample: partial for partial in ticket.resume if len(partial.tokens)}
        self.waiting = [Response.of(self, sample, partials.get(sample)) for sample in samples]
        self.live: list[Response] = []
        self.prompt: Prompt | None = None

    @property
    def sampling(self) -> Sampling:
        return self.ticket.sampling

    @property
    def unfinished(self) -> list[Response]:
        return self.live + self.waiting

    def key(self, sample: int) -> int:
        """Which draws sample `sample` gets."""
        return sequence_key(self.ticket.seed, sample)

    def hand_back(self) -> HandBack:
        """All that is unfinished, with the tokens there are; `Response.label` was called for those in slots."""
        responses = sorted(self.unfinished, key=lambda response: response.sample)
        partials = [response.partial() for response in responses if response.tokens]
        return HandBack(self.ticket.group, self.ticket.fence, [response.sample for response in responses], partials)


def check_ticket(ticket: Ticket, *, context: int, vocabulary: int) -> None:
    """Raises `TicketRefused` for a ticket that cannot be served by a model of this context length and vocabulary."""
    where = f"ticket of group {ticket.group} (fence {ticket.fence})"
    if len(ticket.prompt) >= context:
        raise TicketRefused(
            f"{where}: the prompt has {len(ticket.prompt)} tokens, expected at most {context - 1}: "
            f"the model's context is {context}"
        )
    limit = min(ticket.sampling.max_tokens, context - len(ticket.prompt))
    for name, ids in [("prompt", ticket.prompt), *((f"sample {p.sample}", p.tokens) for p in ticket.resume)]:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise TicketRefused(
                f"{where}: {name} has token ids {ids.min()} to {ids.max()}, expected 0 to {vocabulary - 1}"
            )
    for partial in ticket.resume:
        if partial.sample not in ticket.samples or len(partial.tokens) >= limit:
            raise TicketRefused(
                f"{where}: got {len(partial.tokens)} tokens of sample {partial.sample} to continue, "
                f"expected fewer than {limit}, of one of the samples {ticket.samples}"
            )
