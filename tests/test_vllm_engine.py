"""The vLLM generator against plain transformers and against our own: the same numbers, the same tokens, exact versions."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_cases as cases
from vllm_cases import finish, forcing, fresh_logprobs, ticket, torch_generator, weights

from engine.config import ConfigError, GeneratorConfig, VllmEngine
from engine.generate_engine import EngineGenerator
from engine.generate_requests import EngineLost
from engine.generate_torch import WeightsRefused
from engine.generate_vllm import start_vllm
from protocols.messages import Sampling

pytestmark = [cases.needs_vllm, pytest.mark.timeout(900)]
FORCED = 77
TICKETS = [
    ticket(1, 70, 4, max_tokens=40),  # a prompt of two shared blocks and a rest
    ticket(2, 1, 2, max_tokens=9),
    ticket(3, 300, 2, max_tokens=30, temperature=0.7),
    ticket(4, 33, 3, max_tokens=17, top_p=0.6),
    ticket(5, 2, 1, max_tokens=21, top_k=5, temperature=1.5),
]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_folder(tmp_path_factory.mktemp("tied") / "model")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_folder(tmp_path_factory.mktemp("untied") / "model", tied=False)


@pytest.fixture(scope="module")
def keeping(tied: Path) -> Iterator[EngineGenerator]:
    engine = cases.start(tied)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def recomputing(untied: Path) -> Iterator[EngineGenerator]:
    engine = cases.start(untied, mode="recompute")
    yield engine
    engine.close()


def test_log_probabilities_are_those_of_the_distribution_that_is_trained_and_draws_are_ours(
    keeping: EngineGenerator, tied: Path
) -> None:
    new = weights(tied, 1)
    keeping.load(new, 1)
    other = torch_generator(tied, new, 1)
    for item in TICKETS:
        keeping.add(item)
        other.add(item)
    saved = keeping.counters["prefill_saved_tokens"]
    done, expected = finish(keeping), finish(other)
    assert keeping.held() == []
    assert done.keys() == expected.keys()
    assert {key: r.tokens.tolist() for key, r in done.items()} == {
        key: r.tokens.tolist() for key, r in expected.items()
    }
    for item in TICKETS:
        for sample in item.samples:
            rollout = done[item.group, sample]
            np.testing.assert_allclose(rollout.logprobs, fresh_logprobs(tied, new, item, rollout.tokens), atol=1e-4)
            assert rollout.versions == [(1, len(rollout.tokens))]
            assert rollout.finish == expected[item.group, sample].finish
    # Groups 1, 3 and 4 share the whole blocks of 32 tokens of their prompts.
    assert keeping.counters["prefill_saved_tokens"] - saved == 3 * 64 + 1 * 288 + 2 * 32


@pytest.mark.parametrize("fixture", ["keeping", "recomputing"])
def test_after_an_exchange_in_flight_tokens_come_from_the_new_weights(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    """The weights force one token, through a tied head in one engine and through one of its own in the other."""
    engine: EngineGenerator = request.getfixturevalue(fixture)
    folder: Path = request.getfixturevalue("tied" if fixture == "keeping" else "untied")
    old, item = weights(folder, 2), ticket(6, 40, 4, max_tokens=60)
    engine.load(old, 2)
    engine.add(item)
    for _ in range(15):
        assert engine.step() == []
    engine.load(forcing(folder, FORCED), 3)
    late = ticket(7, 40, 2, max_tokens=5)
    engine.add(late)
    done = finish(engine)
    for sample in item.samples:
        rollout = done[6, sample]
        assert [version for version, _ in rollout.versions] == [2, 3]
        made = rollout.versions[0][1]
        assert 13 <= made <= 15
        assert rollout.tokens[made:].tolist() == [FORCED] * (60 - made)
        np.testing.assert_allclose(
            rollout.logprobs[:made], fresh_logprobs(folder, old, item, rollout.tokens)[:made], atol=1e-4
        )
    for sample in late.samples:
        assert (done[7, sample].tokens.tolist(), done[7, sample].versions) == ([FORCED] * 5, [(3, 5)])
    engine.load(weights(folder, 4), 4)  # what forced is gone again


@pytest.mark.parametrize("fixture", ["keeping", "recomputing"])
def test_keys_and_values_after_an_exchange(request: pytest.FixtureRequest, fixture: str) -> None:
    """Recomputed, the rest of a response is as if all of it had come from the new weights; kept, it is not. A request that
    starts afterwards with the same prompt sees nothing of the old weights in both."""
    engine: EngineGenerator = request.getfixturevalue(fixture)
    folder: Path = request.getfixturevalue("tied" if fixture == "keeping" else "untied")
    new, first, same = weights(folder, 6), ticket(8, 96, 3, max_tokens=50), ticket(8, 96, 2, fence=2, max_tokens=20)
    engine.load(weights(folder, 5), 5)
    engine.add(first)
    for _ in range(20):
        engine.step()
    engine.load(new, 6)
    renamed = cases.Ticket(9, same.samples, 1, first.prompt, same.sampling, 5)
    engine.add(renamed)
    done = finish(engine)
    off = []
    for sample in first.samples:
        rollout = done[8, sample]
        made = rollout.versions[0][1]
        off.append(np.abs(rollout.logprobs - fresh_logprobs(folder, new, first, rollout.tokens))[made:].max())
    assert max(off) < 1e-4 if fixture == "recomputing" else min(off) > 1e-2
    for sample in same.samples:
        rollout = done[9, sample]
        np.testing.assert_allclose(rollout.logprobs, fresh_logprobs(folder, new, renamed, rollout.tokens), atol=1e-4)


def test_what_is_handed_back_goes_on_here_and_on_our_own_generator(keeping: EngineGenerator, tied: Path) -> None:
    new, item = weights(tied, 7), ticket(10, 50, 4, max_tokens=40)
    keeping.load(new, 7)
    keeping.add(item)
    whole = finish(keeping)
    keeping.add(item)
    for _ in range(17):
        keeping.step()
    (handed,) = keeping.hand_back()
    assert (handed.group, handed.fence, sorted(handed.samples), keeping.ready) == (10, 1, [0, 1, 2, 3], False)
    assert {len(partial.tokens) for partial in handed.partials} <= {16, 17}
    again = ticket(10, 50, 4, fence=2, max_tokens=40, resume=list(handed.partials))
    keeping.add(again)
    other = torch_generator(tied, new, 8)
    other.add(again)
    for done, version in [(finish(keeping), 7), (finish(other), 8)]:
        for partial in handed.partials:
            rollout, size = done[10, partial.sample], len(partial.tokens)
            assert rollout.tokens.tolist() == whole[10, partial.sample].tokens.tolist()
            np.testing.assert_array_equal(rollout.logprobs[:size], partial.logprobs)
            np.testing.assert_allclose(rollout.logprobs, whole[10, partial.sample].logprobs, atol=1e-4)
            assert sum(count for number, count in rollout.versions if number == 7) == (40 if version == 7 else size)
            assert rollout.fence == 2


def test_what_is_cancelled_or_issued_anew_is_dropped(keeping: EngineGenerator, tied: Path) -> None:
    keeping.load(weights(tied, 8), 8)
    keeping.add(ticket(11, 20, 8, max_tokens=400))  # every slot
    keeping.add(ticket(12, 20, 2, max_tokens=10))
    for _ in range(5):
        keeping.step()
    keeping.cancel(11, fence=2)
    assert [(held.group, held.fence) for held in keeping.held()] == [(11, 1), (12, 1)]
    keeping.add(cases.Ticket(11, [0, 1], 2, ticket(11, 20, 1).prompt, Sampling(max_tokens=3), 5))
    assert [(held.group, held.fence) for held in keeping.held()] == [(11, 1), (12, 1), (11, 2)]
    keeping.cancel(11, fence=1)
    done = finish(keeping)
    assert {(r.group, r.fence, len(r.tokens)) for r in done.values()} == {(12, 1, 10), (11, 2, 3)}


def test_weights_that_are_not_the_models_change_nothing(keeping: EngineGenerator, tied: Path) -> None:
    new, item = weights(tied, 9), ticket(13, 12, 1)
    keeping.load(new, 9)
    wrong = {name: tensor for name, tensor in weights(tied, 10).items() if name != "model.norm.weight"}
    with pytest.raises(WeightsRefused, match=r"version 10.*1 missing: model.norm.weight"):
        keeping.load(wrong, 10)
    with pytest.raises(FloatingPointError, match="version 10 give logits that are not finite"):
        keeping.load({name: tensor * torch.nan for name, tensor in new.items()}, 10)
    assert keeping.version == 9
    keeping.add(item)
    rollout = finish(keeping)[13, 0]
    np.testing.assert_allclose(rollout.logprobs, fresh_logprobs(tied, new, item, rollout.tokens), atol=1e-4)


def test_nothing_is_served_that_other_weights_than_those_that_came_have_sampled(
    keeping: EngineGenerator, tied: Path
) -> None:
    """What is staged changes after its answer to the canary was reckoned, as a stale copy in vLLM would."""
    keeping.load(weights(tied, 11), 11)
    keeping.add(ticket(14, 12, 2, max_tokens=30))
    for _ in range(6):
        keeping.step()
    new = weights(tied, 12)
    keeping.stage(new, 12)
    keeping._canary.stage.tensors["model.layers.1.self_attn.q_proj.weight"] *= 1.5
    with pytest.raises(EngineLost, match=r"other weights than those of version 12: .* differ by"):
        keeping.load(new, 12)
    (handed,) = keeping.hand_back()
    assert {tuple(partial.versions) for partial in handed.partials} == {((11, len(handed.partials[0].tokens)),)}
    keeping.load(new, 12)  # only here: the role leaves


def test_a_stopped_worker_is_an_engine_that_is_lost(recomputing: EngineGenerator, untied: Path) -> None:
    recomputing.load(weights(untied, 13), 13)
    recomputing.add(ticket(15, 12, 2, max_tokens=300))
    for _ in range(6):
        recomputing.step()
    (worker,) = workers(recomputing)
    os.kill(worker, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(EngineLost, match="no answer within 20 s"):
        recomputing.step()
    assert time.monotonic() - began < 25
    (handed,) = recomputing.hand_back()
    assert {len(partial.tokens) for partial in handed.partials} <= {5, 6}
    with pytest.raises(EngineLost, match="it is lost"):
        recomputing.load(weights(untied, 14), 14)
    recomputing.close()
    assert not cases.alive(worker)


def test_a_killed_worker_is_noticed_at_once_and_what_there_is_is_handed_back(
    keeping: EngineGenerator, tied: Path
) -> None:
    keeping.load(weights(tied, 15), 15)
    keeping.add(ticket(16, 12, 2, max_tokens=400))
    for _ in range(6):
        keeping.step()
    for worker in workers(keeping):
        os.kill(worker, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineLost, match="vLLM cannot go on: RuntimeError: a worker process has ended"):
        check_until(keeping, began + 5)
    with pytest.raises(EngineLost, match="vLLM cannot compute a step"):
        keeping.step()
    (handed,) = keeping.hand_back()
    assert min(len(partial.tokens) for partial in handed.partials) >= 5


def test_what_does_not_fit_is_refused_at_the_start(tied: Path) -> None:
    engine = VllmEngine(slots=4, kv_gb=1e-4)
    with pytest.raises(ConfigError, match=r"generator\.engine: vLLM refuses"):
        start_vllm(tied, GeneratorConfig(sampling=Sampling(max_tokens=8), engine=engine, device="cpu"), engine)


def check_until(engine: EngineGenerator, deadline: float) -> None:
    while time.monotonic() < deadline:
        engine.check()


def workers(engine: EngineGenerator) -> set[int]:
    return {handle.proc.pid for handle in engine._engine._engine.model_executor.workers}
