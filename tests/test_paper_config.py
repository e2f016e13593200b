"""configs/dapo-qwen2.5-32b.toml is the paper's run: the numbers here were typed from the paper and the authors' script."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from engine.config import Config, DapoObjective, JsonlTask, NoCorrection, Overlong, PathModel, PythonScore, load_config
from engine.rewards import Score, score, shaped
from engine.tasks import Source

PATH = Path(__file__).resolve().parent.parent / "configs" / "dapo-qwen2.5-32b.toml"


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(PATH)


def test_batches(config: Config) -> None:
    """Section 4.1: 512 prompts, 16 responses each, 16 gradient updates a rollout step."""
    assert config.buffer.groups_per_step == 512
    assert config.buffer.samples_per_group == 16
    assert config.learner.updates_per_step == 16
    assert config.buffer.groups_per_step * config.buffer.samples_per_group / config.learner.updates_per_step == 512
    assert config.buffer.max_lag == 0  # algorithm 1: sample, then train
    assert config.buffer.dynamic_sampling
    assert config.buffer.max_oversample * config.buffer.groups_per_step == 1536


def test_objective(config: Config) -> None:
    """Equations 8 to 12: clip-higher, group-normalised advantages, one token mean, no KL (there is no such setting)."""
    expected = DapoObjective(
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=10.0,
        normalize_std=True,
        loss="token",
        overlong_filter=False,
        correction=NoCorrection(),
    )
    assert config.objective == expected
    assert not any("kl" in name or "entropy" in name for name in DapoObjective.__struct_fields__)


def test_optimizer(config: Config) -> None:
    """Section 4.1: AdamW, constant 1e-6 after 20 linear warm-up steps; weight decay and clipping of the script."""
    learner = config.learner
    assert learner.lr == 1e-6
    assert learner.warmup_steps == 20
    assert learner.weight_decay == 0.1
    assert learner.grad_clip == 1.0
    assert learner.betas == (0.9, 0.999)


def test_lengths_and_sampling(config: Config) -> None:
    """Section 4.1: 16384 expected tokens plus 4096 of soft punishment; temperature 1."""
    assert config.generator is not None
    sampling = config.generator.sampling
    assert sampling.max_tokens == 16384 + 4096 == 20480
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert config.buffer.prompt_tokens == 2048
    assert config.learner.token_budget >= 2048 + 20480


def test_reward(config: Config) -> None:
    """Equation 7 (+1, -1) and equation 13 (L_max = 20480, L_cache = 4096), added up."""
    assert (config.reward.right, config.reward.wrong) == (1.0, -1.0)
    assert config.reward.overlong == Overlong(max_length=20480, cache=4096)
    right, wrong = Score(correct=True, value=1.0), Score(correct=False, value=0.0)
    for tokens, reward in ((1, 1.0), (16384, 1.0), (18432, 0.5), (20480, 0.0)):
        assert shaped(right, config.reward, tokens)[0] == pytest.approx(reward)
        assert shaped(wrong, config.reward, tokens)[0] == pytest.approx(reward - 2)


def test_evaluation(config: Config) -> None:
    """Section 4.1: AIME 2024, 32 samples of each of 30 problems, temperature 1.0, top-p 0.7."""
    assert (config.eval.prompts, config.eval.samples) == (30, 32)
    assert config.eval.prompts * config.eval.samples == 960
    assert (config.eval.temperature, config.eval.top_p) == (1.0, 0.7)


def test_model_and_task(config: Config) -> None:
    assert isinstance(config.model, PathModel)
    assert config.model.path.endswith("Qwen2.5-32B")
    assert config.cold_start is None
    (task,) = config.tasks
    assert isinstance(task, JsonlTask)
    assert task.chat
    assert task.system is None
    assert task.score == PythonScore("engine.answers:dapo")


def test_rows_in_the_published_schema_are_taken_and_scored(config: Config, tmp_path: Path) -> None:
    """The files' schema: `prompt` holds one user message, `reward_model.ground_truth` the integer answer as text."""

    def row(number: int) -> dict:
        text = (
            "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
            f"$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is {number}?\n\n"
            'Remember to put your answer on its own line after "Answer:".'
        )
        return {
            "data_source": "math_dapo",
            "prompt": [{"content": text, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(number), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": number},
        }

    for name, numbers in (("train", [*range(5)] * 3), ("aime", [3, 540])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in numbers))
    data = load_config(
        PATH, [f'tasks = [{{type = "jsonl", path = "{tmp_path}/train.jsonl", held_out_path = "{tmp_path}/aime.jsonl",'
               'messages = "prompt", answer = "{reward_model[ground_truth]}", chat = true, extract = "answer-line",'
               'score = {type = "python", function = "engine.answers:dapo"}}]'],
    )  # fmt: skip
    (task,) = data.tasks
    (published,) = config.tasks
    assert isinstance(task, JsonlTask)
    assert isinstance(published, JsonlTask)
    assert (task.messages, task.answer, task.extract, task.score) == (
        published.messages, published.answer, published.extract, published.score
    )  # fmt: skip
    source = Source(data.tasks, 0)
    assert len({source[i].prompt_id for i in range(100)}) == 4  # 3 is held out
    held = source.held_out(2)
    answers = {str(json.loads(row.answer)["answer"]) for row in held}
    assert answers == {"3", "540"}
    for held_row in held:
        right = json.loads(held_row.answer)["answer"]
        assert score(task, f"So it is\n\nAnswer: ${right}$", held_row.answer).correct
        assert not score(task, f"Answer: {right}.", held_row.answer).correct
        assert not score(task, f"\\boxed{{{right}}}", held_row.answer).correct


def test_every_value_names_its_source() -> None:
    lines = PATH.read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if re.match(r"\w+ = ", line) and not line.startswith(("name", "type", "path"))]
    assert len(settings) > 35
    for line in settings:
        assert re.search(r"\[(paper [\w., ]+|paper eq\. \d+|script|ours)\]|\[paper ", line.partition("#")[2]), line
