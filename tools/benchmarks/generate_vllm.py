"""The vLLM generator on the work of the `generate` benchmark, where vLLM is installed: speed, exchange of weights, accuracy."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from engine.config import VllmEngine
from engine.generate_canary import Canary
from engine.generate_engine import EngineGenerator
from engine.generate_vllm_start import set_environment
from engine.models import named_weights
from protocols.messages import Rollout, Sampling, Ticket

SWAPS = 5


@contextmanager
def vllm_generator(model: PreTrainedModel, dtype: str, *, slots: int, threads: int) -> Iterator[EngineGenerator]:
    """One for `model` whose responses end by their length alone."""
    config = VllmEngine(slots=slots, kv_gb=1.0)
    set_environment(config, threads)
    from engine.generate_vllm_engine import Engine  # vLLM reads its environment when imported

    with tempfile.TemporaryDirectory() as folder:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        canary = Canary(Path(folder), dtype)
        context = canary.context
        engine = Engine(Path(folder), config, device="cpu", dtype=dtype, context=context, stop_ids=[])
        try:
            engine.attach(canary.stage)
            generator = EngineGenerator(engine, canary, config=config, context=context, decode=lambda tokens: "")
            generator.load({name: tensor.detach() for name, tensor in named_weights(model).items()}, 0)
            yield generator
        finally:
            engine.close()


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
    for _ in range(4):
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
