"""What of the vLLM generator needs no vLLM: refusals before it is imported, the stage, the canary's answer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_cases as cases

from engine.adopt_weights import WeightsRefused
from engine.config import ConfigError, GeneratorConfig, VllmEngine
from engine.generate_canary import Canary
from engine.generate_stage import Stage
from engine.generate_vllm import start_vllm
from engine.tensor_parallel import check_parallel
from protocols.messages import INT, Sampling

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_folder(tmp_path_factory.mktemp(request.param) / "model", tied=request.param == "tied")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_without_vllm_the_error_says_how_to_get_it(folder: Path) -> None:
    settings = GeneratorConfig(sampling=Sampling(max_tokens=8), engine=VllmEngine())
    with pytest.raises(ConfigError, match=r"vllm is not installed, expected version 0\.32\.0: .*tools/test-engines"):
        start_vllm(folder, settings, VllmEngine())


@pytest.mark.parametrize(
    ("ranks", "error"),
    [(3, "does not divide the 2 attention heads"), (0, "expected at least 1"), (1, None), (2, None)],
)
def test_degrees_of_tensor_parallelism(folder: Path, ranks: int, error: str | None) -> None:
    model = Canary(folder, "float32").model.config
    if error is None:
        check_parallel(folder, model, ranks)
        return
    with pytest.raises(ConfigError, match=f"tensor_parallel = {ranks}.*{error}"):
        check_parallel(folder, model, ranks)


@pytest.mark.parametrize(("stages", "fit"), [(0, False), (1, True), (2, True), (3, False)])
def test_stages_of_a_pipeline(folder: Path, stages: int, fit: bool) -> None:
    model = Canary(folder, "float32").model.config
    if fit:
        check_parallel(folder, model, 1, stages=stages)
        return
    with pytest.raises(ConfigError, match=f"pipeline_parallel = {stages}: expected 1 to 2, the layers of"):
        check_parallel(folder, model, 1, stages=stages)


def test_the_canary_gives_what_the_weights_give(folder: Path) -> None:
    canary, new = Canary(folder, "float32"), cases.weights(folder, 1)
    found = canary.fill(new, 1)
    item = cases.Ticket(0, [0], 0, np.array(canary.prompt[:1], INT), Sampling(max_tokens=1), 0)
    expected = cases.fresh_logprobs(folder, new, item, np.array(canary.prompt[1:]))
    np.testing.assert_allclose(found.prompt, expected, atol=1e-5)
    assert found.difference(found.prompt, 7, found.following[7]) == 0
    other = canary.fill(cases.weights(folder, 2), 2)
    assert found.difference(other.prompt, 7, found.following[7]) > 0.1
    assert found.difference(found.prompt, 7, other.following[7]) > 0.1


def test_the_canary_refuses_other_names_and_keeps_what_is_staged(folder: Path) -> None:
    canary, new = Canary(folder, "bfloat16"), cases.weights(folder, 1)
    canary.fill(new, 1)
    before = canary.stage.flat.clone()
    with pytest.raises(WeightsRefused, match=r"version 2.*1 unknown: more"):
        canary.fill(new | {"more": torch.ones(2)}, 2)
    assert torch.equal(canary.stage.flat, before)
    for name, tensor in canary.stage.tensors.items():
        assert torch.equal(tensor, new[name].to(torch.bfloat16))


def test_a_stage_is_seen_by_another_process_and_needs_no_name() -> None:
    stage = Stage.create({"b": torch.zeros(3, 2, dtype=torch.bfloat16), "a": torch.zeros(5)})
    stage.fill({"a": torch.arange(5.0), "b": torch.ones(3, 2)})
    code = (
        "import sys; from engine.generate_stage import Stage; s = Stage.attach((sys.argv[1], sys.argv[2]));"
        "print(s.tensors['a'].tolist(), s.tensors['b'].sum().item()); s.tensors['a'][0] = 9"
    )
    done = subprocess.run([sys.executable, "-c", code, *stage.description], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[0.0, 1.0, 2.0, 3.0, 4.0] 6.0\n", done.stderr
    assert stage.tensors["a"][0] == 9
    stage.seal()
    assert not os.path.exists(stage.path)
    assert stage.tensors["a"].sum() == 19
