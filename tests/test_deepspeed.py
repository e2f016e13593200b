"""The sharded learner against the plain one: two ranks over gloo, every ZeRO stage; what one saves the other continues."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import deepspeed_rank
import pytest
import torch
from learner_cases import make_config, tiny_model
from safetensors.torch import load_file

from engine.config import ConfigError
from engine.learn_torch import TorchLearner
from workers.check import problems, refuse
from workers.memory import memory
from workers.model_shape import model_shape

HERE = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not HERE, reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install --no-build-isolation -e '.[deepspeed]'"
)
PLAIN = ["torch-zero", "torch-bfloat16", "torch-ppo", "torch-untied"]
RESUMED = ["torch-zero:zero3", "zero3:torch-zero", "zero2:zero3", "zero1-bfloat16:zero3-bfloat16"]
"""FORM:OTHER: what OTHER has after a step goes on in FORM."""
REPEATED = ["zero1:zero1", "zero2-offload:zero2-offload", "zero3:zero3", "zero3-bfloat16:zero3-bfloat16"]
"""The same form on as many ranks: to the same bits."""
ALONE = ["zero3:zero3", "zero2:zero1"]
"""The same on one rank."""


def run_ranks(world: int, folder: Path, jobs: list[str]) -> None:
    (folder / "store").unlink(missing_ok=True)
    command = [sys.executable, deepspeed_rank.__file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    logs = [folder / f"rank-{world}-{rank}.txt" for rank in range(world)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            arguments = [*command, str(rank), str(world), str(folder), *jobs]
            ranks.append(subprocess.Popen(arguments, env=environment, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=250) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks left metrics and states of all jobs."""
    folder = tmp_path_factory.mktemp("deepspeed")
    run_ranks(2, folder, [*PLAIN, *deepspeed_rank.JOBS, *RESUMED, *REPEATED, "poison", "types", "buckets"])
    run_ranks(1, folder, ALONE)
    return folder


def compare(results: Path, got: str, expected: str, step: int) -> None:
    """Losses, gradients' norms and all other metrics; moments, which are means of gradients; weights."""
    first, plain = (json.loads((results / f"{name}-{step}-0.json").read_text()) for name in (got, expected))
    assert first == pytest.approx(plain, rel=2e-5, abs=2e-5)
    ours, theirs = (load_file(results / f"{name}-{step}-0.safetensors") for name in (got, expected))
    assert ours.keys() == theirs.keys()
    rounding = 3e-3 if "bfloat16" in got else 3e-5
    for name, tensor in theirs.items():
        scale = tensor.abs().max().item() if name.startswith("optimizer.exp_avg") else 1.0
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=rounding * scale + 1e-9, msg=lambda m, n=name: f"{n}: {m}")  # fmt: skip


@needs_deepspeed
@pytest.mark.parametrize("job", deepspeed_rank.JOBS)
def test_it_trains_as_the_plain_learner_does(job: str, results: Path) -> None:
    kind = next((kind for kind in ("bfloat16", "ppo", "untied") if kind in job), "zero")
    for step in (1, 2):
        compare(results, job, f"torch-{kind}", step)
        metrics = [json.loads((results / f"{job}-{step}-{rank}.json").read_text()) for rank in (0, 1)]
        assert metrics[0] == metrics[1]
        whole = [load_file(results / f"{job}-{step}-{rank}.safetensors") for rank in (0, 1)]
        assert all(torch.equal(whole[0][name], whole[1][name]) for name in whole[0])


@needs_deepspeed
@pytest.mark.parametrize("job", RESUMED)
def test_what_one_form_saved_another_continues(job: str, results: Path) -> None:
    compare(results, f"{job}:2", "torch-bfloat16" if "bfloat16" in job else "torch-zero", 2)


@needs_deepspeed
@pytest.mark.parametrize("job", REPEATED)
def test_resumed_training_continues_to_the_same_bits(job: str, results: Path) -> None:
    resumed, whole = (load_file(results / f"{name}-2-0.safetensors") for name in (f"{job}:2", job.partition(":")[0]))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@needs_deepspeed
@pytest.mark.parametrize("job", ALONE)
def test_another_number_of_ranks_continues(job: str, results: Path) -> None:
    compare(results, f"{job}:1", "torch-zero", 2)


@needs_deepspeed
def test_a_rank_with_bad_numbers_stops_all_ranks_before_a_weight_changes(results: Path) -> None:
    for rank in (0, 1):
        error = (results / f"poison-{rank}.error").read_text()
        assert f"learner rank {rank}: step 1, update 1 of 1: policy: not finite: the loss (nan)" in error
        assert "unchanged=True" in error


@needs_deepspeed
def test_no_more_than_a_bucket_is_whole_at_a_time(results: Path) -> None:
    for rank in (0, 1):
        whole, sizes = json.loads((results / f"buckets-{rank}.json").read_text())
        assert len(whole) == len(sizes)
        assert max(sizes.values()) <= max(whole) <= 8192 < sum(sizes.values()) / 4


@needs_deepspeed
def test_weights_of_another_type_are_refused(results: Path) -> None:
    error = (results / "types-0.error").read_text()
    assert "policy: model.embed_tokens.weight is torch.bfloat16, learner.dtype says torch.float32" in error


@pytest.mark.skipif(HERE, reason="DeepSpeed is installed here")
def test_without_deepspeed_the_error_says_how_to_get_it() -> None:
    config = make_config(backend={"type": "deepspeed"})
    missing = r"DeepSpeed is not installed here, expected version 0\.19: .*\.\[deepspeed\]"
    with pytest.raises(ConfigError, match=missing):
        TorchLearner(config, tiny_model())
    with pytest.raises(ConfigError, match=missing):
        refuse(config)


@pytest.mark.parametrize(
    ("backend", "objective", "error"),
    [
        ({"whole_below": -1}, {}, "learner.backend.whole_below: got -1, expected at least 0"),
        ({}, {"type": "collect"}, 'objective.type = "collect" trains nothing: got learner.backend.type = "deepspeed"'),
    ],
)
def test_contradictions_are_named(backend: dict, objective: dict, error: str) -> None:
    found = problems(make_config(backend={"type": "deepspeed", **backend}, objective=objective))
    assert any(error in problem for problem in found), found


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Invalid enum value 4.*learner\.backend\.zero"):
        make_config(backend={"type": "deepspeed", "zero": 4})


def test_the_estimate_of_memory_shares_out_what_the_stage_does() -> None:
    size = model_shape(make_config()).parameters
    parts = {}
    for zero in (1, 2, 3):
        config = make_config(ranks=4, backend={"type": "deepspeed", "zero": zero})
        parts[zero] = next(role.parts for role in memory(config, model_shape(config)) if role.name == "learner")
        assert parts[zero]["optimizer"] == pytest.approx(12 * size / 4, abs=1)
    assert [parts[zero]["gradients"] for zero in (1, 2, 3)] == pytest.approx([4 * size, size, size], abs=1)
    assert [parts[zero]["weights"] for zero in (1, 2, 3)] == pytest.approx([4 * size, 4 * size, size], abs=1)
