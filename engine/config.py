"""One run as typed data. Every variant is a tagged union, every unknown key an error with its path.

No torch here: the buffer and the command line read configs too. Values that the papers fix stand with their sources
in `configs/`; defaults here are those of DAPO (arXiv 2503.14476) where it has one.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import field

from engine.config_engines import SglangEngine, TorchEngine, VllmEngine
from engine.config_objectives import (
    CollectObjective,
    DapoObjective,
    DecoupledCorrection,
    IcepopCorrection,
    LengthAdaptive,
    NoCorrection,
    Objective,
    PpoObjective,
    SftObjective,
    TruncatedCorrection,
    VapoObjective,
    VcppoObjective,
)
from engine.config_pages import PagesTask, UtelModel, UtelObjective, UtelTagObjective
from engine.config_placement import Placement
from engine.config_section import ConfigError, Section
from engine.config_tasks import (
    DocumentScore,
    DocumentsTask,
    ExactScore,
    Extract,
    JsonlTask,
    LogTask,
    MathVerifyScore,
    PythonScore,
    ReasoningGymScore,
    ReasoningGymTask,
    Task,
)
from protocols.messages import Sampling

__all__ = [
    "AnyTask", "BufferConfig", "CollectObjective", "Config", "ConfigError", "CriticConfig", "DapoObjective",
    "DecoupledCorrection", "DeepSpeedBackend", "DocumentScore", "DocumentsTask", "EvalConfig", "ExactScore",
    "Extract", "GeneratorConfig", "IcepopCorrection", "JsonlTask", "LearnerConfig", "LengthAdaptive", "LevelOff",
    "LogTask", "MathVerifyScore", "NewModel", "NoCorrection", "Objective", "Overlong", "PagesTask", "PathModel",
    "Placement", "PpoObjective", "PythonScore", "ReasoningGymScore", "ReasoningGymTask", "RewardConfig", "Section",
    "SftObjective", "SglangEngine", "Task", "TorchBackend", "TorchEngine", "TruncatedCorrection", "UtelModel",
    "UtelObjective", "UtelTagObjective", "VapoObjective", "VcppoObjective", "VllmEngine", "apply_override",
    "dump_config", "load_config", "parse_config",
]  # fmt: skip


class PathModel(Section, frozen=True, tag="path"):
    """A Hugging Face folder (config.json, safetensors, tokenizer.json)."""

    path: str


class NewModel(Section, frozen=True, tag="new"):
    """A small Llama with fresh weights and one token a character, for runs that train from nothing."""

    alphabet: str
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 512
    context: int = 512


# --- the roles -----------------------------------------------------------------------------------------------------


class BufferConfig(Section, frozen=True):
    groups_per_step: int
    samples_per_group: int = 16
    max_lag: int = 1
    dynamic_sampling: bool = True
    max_oversample: float = 3.0
    prompt_tokens: int = 2048
    long_prompts: Literal["error", "skip"] = "error"
    address: str = "tcp://127.0.0.1:0"
    keys: str | None = None
    lease_s: float = 60.0
    heartbeat_s: float = 2.0


class GeneratorConfig(Section, frozen=True):
    sampling: Sampling
    count: int = 1
    engine: TorchEngine | VllmEngine | SglangEngine = TorchEngine()
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1


class Overlong(Section, frozen=True):
    """DAPO's soft overlong punishment (eq. 13): from `max_length - cache` tokens on, down to -1 at `max_length`."""

    max_length: int
    cache: int


class RewardConfig(Section, frozen=True):
    count: int = 1
    scorers: int = 1
    tasks_per_scorer: int = 16
    timeout_s: float = 10.0
    memory_mb: int = 2048
    attempts: int = 2
    right: float = 1.0
    wrong: float = -1.0
    overlong: Overlong | None = None


class TorchBackend(Section, frozen=True, tag="torch"):
    """Plain PyTorch: every rank keeps the whole model, its gradient and its optimizer."""


class DeepSpeedBackend(Section, frozen=True, tag="deepspeed"):
    """DeepSpeed (extra `deepspeed`): `zero` 1 gives every rank a part of the optimizer, 2 of the gradient too, 3 also of the
    weights, but for those of at most `whole_below` elements. `offload` keeps the optimizer in the host's memory."""

    zero: Literal[1, 2, 3] = 3
    offload: bool = False
    whole_below: int = 100_000


class LearnerConfig(Section, frozen=True):
    """`weight_updates`: "sparse" sends generators only the weights whose bits a step changed (a second copy of the weights
    is kept for it), "dense" all of them; "auto" is sparse for bfloat16, where most weights round to what they were.
    After `decay_steps` steps, warm-up included, the rate has gone down to 0 on a straight line; 0 keeps it as it is."""

    lr: float
    backend: TorchBackend | DeepSpeedBackend = TorchBackend()
    ranks: int = 1
    updates_per_step: int = 1
    warmup_steps: int = 0
    decay_steps: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    token_budget: int = 8192
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    device: str = "auto"
    threads: int = 1
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    bucket_mb: int = 32
    weight_updates: Literal["auto", "dense", "sparse"] = "auto"
    peer_timeout_s: float = 60.0


class LevelOff(Section, frozen=True):
    """Value pretraining ends when neither figure has moved by more than its tolerance between the means of the last two
    windows of `window` measurements each: the value loss (relative) and the explained variance (absolute)."""

    window: int = 5
    loss: float = 0.02
    explained_variance: float = 0.02


class CriticConfig(Section, frozen=True):
    """The value model: the policy's architecture with a value head, started from `path` (a critic's folder), or from the
    policy with a head of zeros.

    For the first `pretrain_steps` of a run only the critic is trained, with lambda 1, and the policy stays as it is;
    with `level_off` this ends as soon as the critic has learnt what it can.
    """

    lr: float
    path: str | None = None
    warmup_steps: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    value_clip: float | None = None
    pretrain_steps: int = 0
    level_off: LevelOff | None = None


class EvalConfig(Section, frozen=True):
    """Accuracy on held-out prompts before, after and every `every` steps (0: only before and after)."""

    prompts: int = 0
    samples: int = 1
    every: int = 0
    temperature: float = 1.0
    top_p: float = 1.0


AnyTask = Task | LogTask | PagesTask
"""What can stand in `tasks`."""


class Config(Section, frozen=True):
    name: str
    steps: int
    model: PathModel | NewModel | UtelModel
    tasks: list[AnyTask]
    objective: Objective | UtelObjective | UtelTagObjective
    buffer: BufferConfig
    learner: LearnerConfig
    generator: GeneratorConfig | None = None
    critic: CriticConfig | None = None
    reward: RewardConfig = RewardConfig()
    eval: EvalConfig = EvalConfig()
    placement: Placement = Placement()
    cold_start: str | None = None
    seed: int = 0
    runs: str = "runs"
    source: str = field(default="", name="_source")

    @property
    def reads_pages(self) -> bool:
        """Whether UTel is trained, on pages instead of prompts."""
        return isinstance(self.objective, UtelObjective | UtelTagObjective)

    @property
    def samples(self) -> bool:
        """Whether generators make the responses; otherwise rows bring them."""
        return self.generates and not self.offline

    @property
    def generates(self) -> bool:
        """Whether generators run: they make the responses, or those of evaluations."""
        return self.generator is not None and not isinstance(self.objective, SftObjective) and not self.reads_pages

    @property
    def offline(self) -> bool:
        """Whether the training data are rollouts of stored logs."""
        return any(isinstance(task, LogTask) for task in self.tasks)

    @property
    def run_dir(self) -> Path:
        """Where the log, the checkpoints and the metrics of this run live."""
        return Path(self.runs) / self.name


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The typed config of a TOML file; `overrides` are `section.key=TOML value`. Raises `ConfigError`."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for override in overrides or []:
        apply_override(data, override)
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], where: str) -> Config:
    """The typed config of plain data. Raises `ConfigError` naming `where` and the key's path."""
    try:
        return msgspec.convert({**data, "_source": where}, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error


def dump_config(config: Config) -> dict[str, Any]:
    """Plain data that `parse_config` reads back; it is what the log keeps."""
    data = msgspec.to_builtins(config)
    data.pop("_source")
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one value of `section.key=TOML value` in plain data; a number in the key is a place in a list, as in
    `tasks.0.path`. Raises `ConfigError`."""
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    place: Any = data
    for depth, part in enumerate(path):
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            if place.get(part) is None:  # a section that plain data has as null
                place[part] = {}
            place = place[part]
        else:
            raise ConfigError(f"--set {override!r}: {'.'.join(path[: depth + 1])}: no such section")
    if not isinstance(place, dict):
        raise ConfigError(f"--set {override!r}: {'.'.join(path)} is not a section")
    place[last] = value
