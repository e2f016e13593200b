"""One run as typed data. Every variant is a tagged union, every unknown key an error with its path.

No torch here: the buffer and the command line read configs too. Values that the papers fix stand with their sources
in `configs/`; defaults here are those of DAPO (arXiv 2503.14476) where it has one.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct, field

from protocols.messages import Sampling


class ConfigError(ValueError):
    """A config that cannot run; names the file, the key, what it got and what it expected."""


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """What all sections share: unknown keys are refused."""


# --- the model -----------------------------------------------------------------------------------------------------


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


# --- where prompts come from, and how answers are scored ------------------------------------------------------------


class ReasoningGymScore(Section, frozen=True, tag="reasoning-gym"):
    """The data set's own `score_answer`; correct at `threshold` or above."""

    threshold: float = 1.0


class MathVerifyScore(Section, frozen=True, tag="math-verify"):
    """`math_verify` equivalence of the extracted answer with the row's answer."""


class ExactScore(Section, frozen=True, tag="exact"):
    """String equality after stripping white space."""


class PythonScore(Section, frozen=True, tag="python"):
    """A function of yours, `module:function`, called as `function(text, answer_row) -> bool | float | {"correct", "reward", ...parts}`."""

    function: str


Extract = Literal["whole", "first-line", "last-line", "answer-line", "boxed", "answer-tag", "hashes"]


class ReasoningGymTask(Section, frozen=True, tag="reasoning-gym"):
    """A procedural data set of reasoning-gym: `params` go to its config, rows are drawn from `seed`."""

    dataset: str
    params: dict[str, Any] = {}
    size: int = 20_000
    seed: int = 1
    prompt: str = "{question}"
    solution: str = "{answer}"
    chat: bool = True
    system: str | None = None
    extract: Extract = "answer-line"
    score: ReasoningGymScore | ExactScore | PythonScore = ReasoningGymScore()
    held_out: int = 256
    weight: float = 1.0


class JsonlTask(Section, frozen=True, tag="jsonl"):
    """Rows of a .jsonl or .jsonl.gz file. `prompt`, `solution` and `answer` are format strings over a row's fields
    (dotted and indexed access allowed, as in `{reward_model[ground_truth]}`); `messages` names a field that already
    holds chat messages and then replaces `prompt`."""

    path: str
    prompt: str = "{prompt}"
    messages: str | None = None
    solution: str | None = None
    answer: str = "{answer}"
    chat: bool = True
    system: str | None = None
    extract: Extract = "answer-line"
    score: MathVerifyScore | ExactScore | PythonScore = MathVerifyScore()
    held_out_path: str | None = None
    held_out: int = 256
    weight: float = 1.0


Task = ReasoningGymTask | JsonlTask


# --- what is trained -----------------------------------------------------------------------------------------------


class NoCorrection(Section, frozen=True, tag="none"):
    """The ratio is taken against the behaviour log-probabilities themselves (two policies, no extra pass)."""


class DecoupledCorrection(Section, frozen=True, tag="decoupled"):
    """Three policies (AReaL): clip against the recomputed policy of the step's start, weight by old / behaviour."""


class TruncatedCorrection(Section, frozen=True, tag="truncated"):
    """As decoupled, the weight truncated at `cap`, per token or per sequence."""

    cap: float = 2.0
    level: Literal["token", "sequence"] = "token"


class IcepopCorrection(Section, frozen=True, tag="icepop"):
    """As decoupled, tokens whose weight lies outside [low, high] are masked out."""

    low: float = 0.5
    high: float = 5.0


class DapoObjective(Section, frozen=True, tag="dapo"):
    """DAPO; GRPO is `clip_high = 0.2`, `loss = "sequence"` and `dynamic_sampling = false`."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    normalize_std: bool = True
    loss: Literal["token", "sequence"] = "token"
    overlong_filter: bool = False
    correction: NoCorrection | TruncatedCorrection | IcepopCorrection | DecoupledCorrection = TruncatedCorrection()


class SftObjective(Section, frozen=True, tag="sft"):
    """Maximum likelihood of the rows' solutions: the cold start."""


Objective = DapoObjective | SftObjective


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
    lease_s: float = 60.0
    heartbeat_s: float = 2.0


class TorchEngine(Section, frozen=True, tag="torch"):
    """Our own continuous batching over a Hugging Face causal language model."""

    slots: int = 64
    on_new_weights: Literal["keep", "recompute"] = "keep"


class GeneratorConfig(Section, frozen=True):
    sampling: Sampling
    count: int = 1
    engine: TorchEngine = TorchEngine()
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


class LearnerConfig(Section, frozen=True):
    lr: float
    ranks: int = 1
    updates_per_step: int = 1
    warmup_steps: int = 0
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
    peer_timeout_s: float = 60.0


class EvalConfig(Section, frozen=True):
    """Accuracy on held-out prompts before, after and every `every` steps (0: only before and after)."""

    prompts: int = 0
    samples: int = 1
    every: int = 0
    temperature: float = 1.0
    top_p: float = 1.0


class Config(Section, frozen=True):
    name: str
    steps: int
    model: PathModel | NewModel
    tasks: list[Task]
    objective: Objective
    buffer: BufferConfig
    learner: LearnerConfig
    generator: GeneratorConfig | None = None
    reward: RewardConfig = RewardConfig()
    eval: EvalConfig = EvalConfig()
    cold_start: str | None = None
    seed: int = 0
    runs: str = "runs"
    source: str = field(default="", name="_source")

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
        _apply(data, override)
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


def _apply(data: dict[str, Any], override: str) -> None:
    """Sets one value; a number in the key is a place in a list, as in `tasks.0.path`."""
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
            place = place.setdefault(part, {})
        else:
            raise ConfigError(f"--set {override!r}: {'.'.join(path[: depth + 1])}: no such section")
    if not isinstance(place, dict):
        raise ConfigError(f"--set {override!r}: {'.'.join(path)} is not a section")
    place[last] = value


def policy_folder(config: Config) -> Path:
    """The Hugging Face folder that step 0 of this run starts from. Raises `ConfigError` when the cold start has not run."""
    if config.cold_start:
        first = load_config(config.cold_start)
        checkpoints = sorted((first.run_dir / "checkpoints").glob("step-*[0-9]"))
        if not checkpoints:
            raise ConfigError(
                f"{config.source}: cold_start: no checkpoint in {first.run_dir}; run `headrace launch {config.cold_start}` first"
            )
        return checkpoints[-1]
    return Path(config.model.path) if isinstance(config.model, PathModel) else config.run_dir / "model"
