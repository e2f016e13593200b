"""About how much memory each role of a run takes, from the policy's shape and the config's lengths."""

from __future__ import annotations

from msgspec import Struct

from engine.config import CollectObjective, Config, DeepSpeedBackend, LearnerConfig, PpoObjective
from workers.model_shape import BYTES, ModelShape

PROCESS_BYTES = {"buffer": 300 << 20, "generator": 500 << 20, "learner": 500 << 20, "reward": 100 << 20}
"""The interpreter, its libraries, and small things."""
NORM_COPIES = {"float32": 9, "bfloat16": 12}
"""Hidden-sized values that autograd keeps per token and layer, counted on Llama: norms keep fp32 copies of bf16."""

KV_GROWTH = 128
"""Generators make room for keys and values in pieces of this many tokens."""


class Memory(Struct, frozen=True):
    """One role: what each of its processes holds, in bytes by part."""

    name: str
    processes: int
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def memory(config: Config, shape: ModelShape) -> list[Memory]:
    """Every role of the run as `launch` starts it. A learner's ranks each hold the whole policy, and the whole critic,
    unless DeepSpeed shares them out."""
    found = [
        Memory("buffer", 1, {"process": PROCESS_BYTES["buffer"], "messages": _buffer_bytes(config)}),
        Memory("learner", config.learner.ranks, _learner_parts(config, shape)),
    ]
    if config.generator is not None and config.generates:
        found.append(Memory("generator", config.generator.count, _generator_parts(config, shape)))
        budget = config.reward.scorers * config.reward.memory_mb * 10**6
        parts = {"process": PROCESS_BYTES["reward"], "scorers at their limit": budget}
        found.append(Memory("reward", config.reward.count, parts))
    return found


def activation_bytes(shape: ModelShape, tokens: int, dtype: str, *, checkpointed: bool = False) -> int:
    """What autograd keeps of one micro-batch until its backward pass; logits are made in chunks and never kept."""
    per_layer = 4 * shape.intermediate + NORM_COPIES[dtype] * shape.hidden
    kept = shape.layers * shape.hidden + per_layer if checkpointed else shape.layers * per_layer
    return tokens * kept * BYTES[dtype]


def _learner_parts(config: Config, shape: ModelShape) -> dict[str, int]:
    learner = config.learner
    size = BYTES[learner.dtype]
    tokens = learner.token_budget
    if config.generator is not None and config.generates:
        longest = config.buffer.prompt_tokens + config.generator.sampling.max_tokens
        tokens = max(longest, min(tokens, _share_of_update(config) * longest))
    parts = {"process": PROCESS_BYTES["learner"], "weights": _kept(learner, shape.parameters * size, 3)}
    if not isinstance(config.objective, CollectObjective):
        parts |= {
            "gradients": _kept(learner, shape.parameters * size, 2),
            "optimizer": _optimizer(learner, shape.parameters),
            "activations": activation_bytes(shape, tokens, learner.dtype, checkpointed=learner.gradient_checkpointing),
        }
    if isinstance(config.objective, PpoObjective):
        own = _critic_parameters(shape)
        parts["critic"] = _kept(learner, own * size, 3) + _kept(learner, own * size, 2) + _optimizer(learner, own)
    if config.generates:
        parts["copy to publish"] = -(-shape.parameters * size // learner.ranks)
    return parts


def _kept(learner: LearnerConfig, size: int, stage: int) -> int:
    """What one rank keeps of what is shared out from this stage of ZeRO on."""
    shared = isinstance(learner.backend, DeepSpeedBackend) and learner.backend.zero >= stage
    return -(-size // learner.ranks) if shared else size


def _optimizer(learner: LearnerConfig, parameters: int) -> int:
    """Two moments; DeepSpeed has master weights beside every model's. `offload` only moves them to the same machine's
    memory."""
    copies = 3 if isinstance(learner.backend, DeepSpeedBackend) else 2
    return _kept(learner, parameters * copies * BYTES["float32"], 1)


def _critic_parameters(shape: ModelShape) -> int:
    """The policy's without its output layer, with a value head; its activations are not kept beside the policy's."""
    output = 0 if shape.tied else shape.vocabulary * shape.hidden
    return shape.parameters - output + shape.hidden + 1


def _generator_parts(config: Config, shape: ModelShape) -> dict[str, int]:
    generator, buffer = config.generator, config.buffer
    if generator is None:
        return {}
    slots = generator.engine.slots
    prompts = -(-slots // buffer.samples_per_group)  # a group's prompt lies there once
    tokens = slots * _rounded(generator.sampling.max_tokens) + prompts * _rounded(buffer.prompt_tokens)
    size = BYTES[generator.dtype]
    return {
        "process": PROCESS_BYTES["generator"],
        "weights": shape.parameters * size,
        "weights that arrive": shape.parameters * BYTES[config.learner.dtype],
        "keys and values": shape.kv_bytes(tokens, generator.dtype),
    }


def _buffer_bytes(config: Config) -> int:
    """The largest message: one update's share of the groups for one rank, as columns, read and sent."""
    if config.generator is None or not config.generates:
        return 0
    return 2 * 12 * _share_of_update(config) * config.generator.sampling.max_tokens


def _share_of_update(config: Config) -> int:
    """Samples of one update that one rank trains."""
    groups = -(-config.buffer.groups_per_step // (config.learner.updates_per_step * config.learner.ranks))
    return groups * config.buffer.samples_per_group


def _rounded(tokens: int) -> int:
    return -(-tokens // KV_GROWTH) * KV_GROWTH
