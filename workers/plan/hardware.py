"""What the parts of a run take on GPUs, by formulas: nothing here was measured on one.

    decode pass    max(weights and live keys and values / memory bandwidth, 2 P x live / peak) at an efficiency each, and
                   a fixed time of launches
    prefill        2 P FLOPs a token
    training       6 P FLOPs a token, and 2 P more where the weights' own log-probabilities are computed anew
    weights        2 P bytes over one network card at the share of its rate that broadcasts reach

P are the parameters. Peaks and bandwidths are those of the vendors' data sheets (dense bfloat16). For a 7B model on an H100
with 64 live sequences of 2,000 tokens a pass takes 12 ms, so 5,200 tokens/s; 6,300 are reported for vLLM.
"""

from __future__ import annotations

import math
import re

from msgspec import Struct

from engine.config import Config, ConfigError
from workers.model_shape import ModelShape
from workers.plan.costs import Costs, GeneratorCost, LearnerCost, RewardCost, Work

STATE_BYTES = 16
"""Of a parameter on the learner's side, shared out over its GPUs: bfloat16 weight and gradient, fp32 copy and two moments."""


class Gpu(Struct, frozen=True):
    """Dense bfloat16 FLOP/s, bytes a second of its memory, bytes of it, and bytes a second of a network card."""

    flops: float
    bandwidth: float
    memory: float
    network: float = 50e9


GPUS = {
    "a100": Gpu(312e12, 2.04e12, 80e9, 25e9),
    "h100": Gpu(989e12, 3.35e12, 80e9),
    "h200": Gpu(989e12, 4.8e12, 141e9),
    "h20": Gpu(148e12, 4.0e12, 96e9),
    "b200": Gpu(2250e12, 8.0e12, 180e9),
    "l40s": Gpu(362e12, 0.864e12, 48e9, 12.5e9),
}


def qwen(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int = 152_064
) -> ModelShape:
    """A model of the Qwen2.5 family."""
    head = hidden // heads
    return ModelShape(
        "qwen2", vocabulary, hidden, layers, heads, kv_heads, head, intermediate, 32_768, tied=vocabulary == 151_936
    )


MODELS = {
    "0.5b": qwen(896, 24, 14, 2, 4864, 151_936),
    "1.5b": qwen(1536, 28, 12, 2, 8960, 151_936),
    "3b": qwen(2048, 36, 16, 2, 11_008, 151_936),
    "7b": qwen(3584, 28, 28, 4, 18_944),
    "14b": qwen(5120, 48, 40, 8, 13_824),
    "32b": qwen(5120, 64, 40, 8, 27_648),
    "72b": qwen(8192, 80, 64, 8, 29_568),
}


class Assumptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Shares of what the hardware could do at most; each may be given on the command line."""

    mfu: float = 0.40
    """Of peak FLOP/s in training."""
    prefill_mfu: float = 0.50
    decode_mfu: float = 0.50
    bandwidth: float = 0.65
    """Of memory bandwidth in a decode pass."""
    network: float = 0.16
    """Of a card's rate in a broadcast: 16 % published for NCCL, 30 to 35 % for the best sharded transfer."""
    launch_seconds: float = 2e-3
    """Of a decode pass, whatever its size."""
    step_seconds: float = 1.0
    """Of a training step, whatever its size: optimizer, fingerprints, commit."""
    score_seconds: float = 2e-3
    """Of a grade, on a CPU core."""
    kv_share: float = 0.85
    """Of a generator's GPU memory that weights, keys and values may take."""

    def __post_init__(self) -> None:
        shares = (self.mfu, self.prefill_mfu, self.decode_mfu, self.bandwidth, self.network, self.kv_share)
        if (
            not all(0 < share <= 1 for share in shares)
            or min(self.launch_seconds, self.step_seconds, self.score_seconds) < 0
        ):
            raise ValueError(f"expected shares above 0 and at most 1, and seconds of at least 0, got {self}")


class Machines(Struct, frozen=True):
    """So many GPUs of a kind; `kind` is None where the costs come from a run."""

    count: int
    kind: str | None

    @property
    def gpu(self) -> Gpu:
        if self.kind is None:
            raise ConfigError(
                "--gpus: got a number alone, expected one with a kind, e.g. 64xh100 (or --from RUN for its costs)"
            )
        return GPUS[self.kind]


def machines(text: str) -> Machines:
    """Of `64xh100` or `8`. Raises `ConfigError`."""
    found = re.fullmatch(r"(\d+)(?:x([a-z0-9]+))?", text.strip().lower())
    if found is None or int(found[1]) < 2 or (found[2] and found[2] not in GPUS):
        raise ConfigError(
            f"--gpus {text!r}: expected a number of at least 2, or one with a kind as in 64xh100: {', '.join(GPUS)}"
        )
    return Machines(int(found[1]), found[2])


def tensor_parallel(shape: ModelShape, gpu: Gpu) -> int:
    """GPUs of one generator: the fewest, by powers of two, whose memory the weights fill at most by half."""
    return 2 ** max(0, math.ceil(math.log2(2 * shape.parameters / (0.5 * gpu.memory))))


def least_learner(shape: ModelShape, gpu: Gpu) -> int:
    """GPUs whose memory the training state fills at most by three quarters."""
    return max(1, math.ceil(STATE_BYTES * shape.parameters / (0.75 * gpu.memory)))


def generator_cost(shape: ModelShape, gpu: Gpu, config: Config, work: Work, given: Assumptions) -> GeneratorCost:
    """A generator of as many GPUs as the model needs; its slots are those of the config, or what its memory holds."""
    count, weights = tensor_parallel(shape, gpu), 2.0 * shape.parameters
    context = work.prompt / config.buffer.samples_per_group + work.response / 2
    kv = shape.kv_bytes(1, "bfloat16") * context
    room = count * gpu.memory * given.kv_share - weights
    wanted = config.generator.engine.slots if config.generator else 64
    slots = max(1, min(wanted, int(room / (2 * kv))))  # the longest are about twice as long as the mean
    bandwidth, peak = count * gpu.bandwidth * given.bandwidth, count * gpu.flops * given.decode_mfu

    def pass_seconds(live: int) -> float:
        return given.launch_seconds + max((weights + live * kv) / bandwidth, 2.0 * shape.parameters * live / peak)

    points = sorted({1, *(max(1, slots * i // 8) for i in range(1, 9))})
    return GeneratorCost(
        slots,
        [(live, pass_seconds(live)) for live in points],
        prefill_token_seconds=2.0 * shape.parameters / (count * gpu.flops * given.prefill_mfu),
        adopt_seconds=2 * weights / bandwidth,
        recompute=config.generator is not None and config.generator.engine.on_new_weights == "recompute",
        gpus=count,
    )


def learner_cost(shape: ModelShape, gpu: Gpu, gpus: int, config: Config, given: Assumptions) -> LearnerCost:
    """`gpus` GPUs share every step; more than one update a step needs the log-probabilities of the weights before them."""
    flops = (6.0 + 2.0 * (config.learner.updates_per_step > 1)) * shape.parameters
    return LearnerCost(flops / (gpus * gpu.flops * given.mfu), fixed_seconds=given.step_seconds)


def gpu_costs(
    shape: ModelShape, gpu: Gpu, *, learner: int, total: int, config: Config, work: Work, given: Assumptions
) -> Costs:
    """`learner` of `total` GPUs train, the others generate."""
    generator = generator_cost(shape, gpu, config, work, given)
    count = (total - learner) // generator.gpus
    reward = config.reward
    return Costs(
        generators=[generator] * count,
        learner=learner_cost(shape, gpu, learner, config, given),
        reward=RewardCost(reward.count, reward.scorers, reward.tasks_per_scorer, given.score_seconds),
        sync_seconds=2.0 * shape.parameters / (gpu.network * given.network),
        send_seconds=2e-3,
    )
