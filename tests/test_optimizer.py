"""Learning rate, clipping, resuming, bfloat16 masters and checkpointed layers of the learner."""

from __future__ import annotations

import pytest
import torch
from learner_cases import GROUPS, make_batch, make_config, near_policy, same_bits, tiny_model, weights_of

from engine.learn_torch import TorchLearner
from engine.optimizer import Optimizer


def test_warm_up_is_linear_in_rollout_steps() -> None:
    learner = TorchLearner(make_config(lr=0.4, warmup_steps=4), tiny_model())
    rates = [learner.step(step, [make_batch(GROUPS, step=step)] * 2)["lr"] for step in (1, 2, 4, 5, 9)]
    assert rates == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4])


def test_the_rate_goes_down_to_nothing_in_as_many_steps_as_are_set() -> None:
    learner = TorchLearner(make_config(lr=0.4, warmup_steps=2, decay_steps=5), tiny_model())
    rates = [learner.step(step, [make_batch(GROUPS, step=step)])["lr"] for step in range(1, 8)]
    assert rates == pytest.approx([0.2, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0])


def test_gradient_is_clipped_by_its_global_norm() -> None:
    batch = near_policy(make_batch(GROUPS))
    free, held = (TorchLearner(make_config(grad_clip=clip), tiny_model()) for clip in (0.0, 0.01))
    norm = free.step(1, [batch])["grad_norm"]
    assert norm == pytest.approx(free.optimizer.gradient.norm().item())
    assert held.step(1, [batch])["grad_norm"] == pytest.approx(norm)
    assert held.optimizer.gradient.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_training_continues_to_the_same_bits(dtype: str) -> None:
    batches = [make_batch(GROUPS, seed=step, step=step) for step in (1, 2)]
    config = make_config(dtype=dtype, lr=1e-3)
    model = tiny_model(dtype=getattr(torch, dtype))
    learner = TorchLearner(config, model)
    learner.step(1, batches[:1])
    weights = weights_of(model)
    state = {name: tensor.clone() for name, tensor in learner.optimizer_state().items()}
    learner.step(2, batches[1:])

    other = tiny_model(dtype=getattr(torch, dtype))
    resumed = TorchLearner(config, other)
    resumed.load(weights, state)
    resumed.step(2, batches[1:])
    assert same_bits(weights_of(other), weights_of(model))
    assert same_bits(resumed.optimizer.state(), learner.optimizer.state())


def test_optimizer_state_of_another_model_is_refused() -> None:
    learner = TorchLearner(make_config(), tiny_model())
    weights, state = weights_of(learner.model), learner.optimizer.state()
    with pytest.raises(ValueError, match=r"1 tensors are missing or unknown, the first is exp_avg\."):
        learner.load(weights, {name: t for name, t in state.items() if not name.endswith("avg.model.norm.weight")})
    with pytest.raises(ValueError, match=r"model\.norm\.weight: got shape \[3\], expected \[32\]"):
        learner.load(weights, state | {"exp_avg.model.norm.weight": torch.zeros(3)})


def test_bfloat16_keeps_steps_that_its_weights_cannot_show() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    learner = TorchLearner(make_config(dtype="bfloat16", lr=1e-6, weight_decay=0.0), model)
    weight, master = model.model.norm.weight, learner.optimizer.state()["master.model.norm.weight"]
    before = master.clone()
    learner.step(1, [near_policy(make_batch(GROUPS))])
    assert (master != before).all()  # by about 1e-6 of 1.0, where bfloat16 has steps of 8e-3
    assert (weight == 1).all()
    assert weight.dtype == torch.bfloat16


def test_bfloat16_gradient_is_close_to_float32() -> None:
    batch = near_policy(make_batch(GROUPS))
    learners = [
        TorchLearner(make_config(dtype=str(dtype)[6:], token_budget=20, grad_clip=0.0), tiny_model(dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for learner in learners:
        learner.step(1, [batch])
    exact, rough = (learner.optimizer.gradient for learner in learners)
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.99


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    batch = near_policy(make_batch(GROUPS))
    kept, remade = (TorchLearner(make_config(gradient_checkpointing=on), tiny_model()) for on in (False, True))
    kept.step(1, [batch])
    forward_passes = []
    remade.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forward_passes.append(1))
    remade.step(1, [batch])
    assert len(forward_passes) == 2
    torch.testing.assert_close(kept.optimizer.gradient, remade.optimizer.gradient, atol=1e-7, rtol=1e-5)


def test_same_data_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        model = tiny_model()
        learner = TorchLearner(make_config(token_budget=30, updates_per_step=2), model)
        metrics = learner.step(1, [near_policy(make_batch(GROUPS, seed=seed)) for seed in (1, 2)])
        results.append((metrics, weights_of(model)))
    assert results[0][0] == results[1][0]
    assert same_bits(results[0][1], results[1][1])


def test_norm_of_a_large_gradient_is_exact() -> None:
    optimizer = Optimizer({"w": torch.zeros(40_000_003)}, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    optimizer.gradient.fill_(1e-3)
    optimizer.gradient[-1] = 2.0
    exact = (40_000_002 * float(torch.tensor(1e-3)) ** 2 + 4.0) ** 0.5
    assert optimizer.norm() == pytest.approx(exact, rel=1e-6)
