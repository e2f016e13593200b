"""What the `generate` benchmark measures of a generator on vLLM or SGLang: speed, exchange of weights, accuracy."""

from __future__ import annotations

import statistics

import numpy as np
import torch
from transformers import PreTrainedModel

from engine.generate_engine import EngineGenerator
from engine.models import named_weights
from protocols.messages import Rollout, Sampling, Ticket

SWAPS = 5


def generate(engine: EngineGenerator, tickets: list[Ticket]) -> list[Rollout]:
    for ticket in tickets:
        engine.add(ticket)
    rollouts: list[Rollout] = []
    while engine.ready:
        rollouts += engine.step()
    return rollouts


def exchange(engine: EngineGenerator, model: PreTrainedModel, tickets: list[Ticket]) -> dict[str, float]:
    """Median seconds of an exchange with all tickets' sequences in flight: to stage (decoding may go on), to apply (it
    stands still), and until the canary has answered (the sequences go on, their tokens are kept back)."""
    weights = {name: tensor.detach() for name, tensor in named_weights(model).items()}
    for ticket in tickets:
        engine.add(Ticket(ticket.group, ticket.samples, ticket.fence, ticket.prompt, Sampling(max_tokens=1000), 0))
    begun = engine.counters["generated_tokens"] + 4 * len(tickets)
    while engine.counters["generated_tokens"] < begun:
        engine.step()
    took: dict[str, list[float]] = {"stage_s": [], "swap_s": [], "vet_s": []}
    for version in range(1, SWAPS + 1):
        before = dict(engine.counters)
        engine.stage(weights, version)
        engine.load(weights, version)
        for name, each in took.items():
            each.append(engine.counters[name] - before[name])
        engine.step()
    engine.hand_back()
    return {name: statistics.median(each) for name, each in took.items()}


def errors(model: PreTrainedModel, rollouts: list[Rollout], prompts: np.ndarray) -> dict[str, float]:
    """Absolute differences between recorded log-probabilities and a forward pass of `transformers` in fp32."""
    found = []
    for rollout in rollouts:
        prompt = prompts[rollout.group]
        ids = torch.from_numpy(np.concatenate([prompt, rollout.tokens]).astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
        fresh = torch.log_softmax(logits.float(), -1).gather(-1, ids[len(prompt) :, None])[:, 0].numpy()
        found.append(np.abs(fresh - rollout.logprobs))
    every = np.concatenate(found)
    return {
        "error_mean": float(every.mean()),
        "error_p99": float(np.quantile(every, 0.99)),
        "error_max": float(every.max()),
    }
