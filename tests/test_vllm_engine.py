"""The vLLM generator: what every engine promises, the same tokens as our own generator, and what happens when vLLM fails."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import vllm_cases as cases
from engine_contract import FORCED, TICKETS, CachingEngineContract
from vllm_cases import finish, forcing, fresh_logprobs, steps, ticket, torch_generator, weights

from engine.config import ConfigError, GeneratorConfig, VllmEngine
from engine.generate_engine import EngineGenerator
from engine.generate_requests import EngineLost
from engine.generate_vllm import start_vllm
from protocols.messages import Sampling

pytestmark = [cases.needs_vllm, pytest.mark.timeout(900)]


class TestVllm(CachingEngineContract):
    start = staticmethod(cases.start)
    long, stepped = 60, True

    def test_draws_are_ours_and_whole_blocks_of_prompts_are_shared(self, keeping: EngineGenerator, tied: Path) -> None:
        saved = keeping.counters["prefill_saved_tokens"]
        check_draws(keeping, tied)
        # Groups 1, 3 and 4 share the whole blocks of 32 tokens of their prompts.
        assert keeping.counters["prefill_saved_tokens"] - saved == 3 * 64 + 1 * 288 + 2 * 32

    def test_what_is_handed_back_goes_on_to_the_same_tokens(self, keeping: EngineGenerator, tied: Path) -> None:
        new, item = weights(tied, 7), ticket(10, 50, 4, max_tokens=40)
        keeping.load(new, 7)
        keeping.add(item)
        undisturbed = finish(keeping)
        keeping.add(item)
        for _ in range(17):
            keeping.step()
        (handed,) = keeping.hand_back()
        assert sorted(handed.samples) == [0, 1, 2, 3]
        assert {len(partial.tokens) for partial in handed.partials} <= {16, 17}
        again = ticket(10, 50, 4, fence=2, max_tokens=40, resume=list(handed.partials))
        other = torch_generator(tied, new, 8)
        for engine in (keeping, other):
            engine.add(again)
            done = finish(engine)
            assert done.keys() == undisturbed.keys()
            for key, rollout in done.items():
                assert rollout.tokens.tolist() == undisturbed[key].tokens.tolist()
                np.testing.assert_allclose(rollout.logprobs, undisturbed[key].logprobs, atol=1e-4)

    def test_nothing_is_served_that_other_weights_than_those_that_came_have_sampled(
        self, keeping: EngineGenerator, tied: Path
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

    def test_a_stopped_worker_is_an_engine_that_is_lost(self, recomputing: EngineGenerator, untied: Path) -> None:
        recomputing.load(weights(untied, 13), 13)
        recomputing.add(ticket(15, 12, 2, max_tokens=300))
        for _ in range(6):
            recomputing.step()
        (worker,) = workers(recomputing)
        os.kill(worker, signal.SIGSTOP)
        check_silence(recomputing)
        (handed,) = recomputing.hand_back()
        assert {len(partial.tokens) for partial in handed.partials} <= {5, 6}
        with pytest.raises(EngineLost, match="it is lost"):
            recomputing.load(weights(untied, 14), 14)
        recomputing.close()
        assert not cases.alive(worker)

    def test_a_killed_worker_is_noticed_at_once_and_what_there_is_is_handed_back(
        self, keeping: EngineGenerator, tied: Path
    ) -> None:
        keeping.load(weights(tied, 15), 15)
        keeping.add(ticket(16, 12, 2, max_tokens=400))
        for _ in range(6):
            keeping.step()
        for worker in workers(keeping):
            os.kill(worker, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineLost, match="vLLM cannot go on: RuntimeError: a worker process has ended"):
            repeat_until(keeping.check, began + 5)
        with pytest.raises(EngineLost, match="vLLM cannot compute a step"):
            keeping.step()
        (handed,) = keeping.hand_back()
        assert min(len(partial.tokens) for partial in handed.partials) >= 5

    def test_what_does_not_fit_is_refused_at_the_start(self, tied: Path) -> None:
        engine = VllmEngine(slots=4, kv_gb=1e-4)
        with pytest.raises(ConfigError, match=r"generator\.engine: vLLM refuses"):
            start_vllm(tied, GeneratorConfig(sampling=Sampling(max_tokens=8), engine=engine, device="cpu"), engine)


class TestParallelVllm(CachingEngineContract):
    """A pipeline of two stages, of which each is cut in two in the generator that recomputes: batches are under way between
    steps, and must have ended before weights come."""

    long, stepped = 60, False

    @staticmethod
    def start(folder: Path, mode: str) -> EngineGenerator:
        return cases.start(folder, mode, pipeline_parallel=2, tensor_parallel=2 if mode == "recompute" else 1)

    def test_draws_are_ours(self, engine: EngineGenerator, folder: Path) -> None:
        check_draws(engine, folder)

    def test_a_batch_that_is_under_way_ends_on_the_weights_that_it_began_with(
        self, keeping: EngineGenerator, tied: Path
    ) -> None:
        old, items = weights(tied, 11), [ticket(20, 12, 2, max_tokens=40), ticket(21, 12, 2, max_tokens=40)]
        keeping.load(old, 11)
        for item in items:  # the second comes while the first is under way: two batches take turns
            keeping.add(item)
            keeping.step()
        done = steps(keeping, 8)
        under_way = keeping._engine._engine.engine_core.engine_core.batch_queue
        assert sum(scheduled.total_num_scheduled_tokens for _, scheduled, _ in under_way) == 2
        keeping.load(forcing(tied, FORCED), 12)
        done |= finish(keeping)
        for item in items:
            for rollout in (done[item.group, sample] for sample in item.samples):
                (_, made), _ = rollout.versions
                assert rollout.tokens[made:].tolist() == [FORCED] * (40 - made)
                expected = fresh_logprobs(tied, old, item, rollout.tokens)[:made]
                np.testing.assert_allclose(rollout.logprobs[:made], expected, atol=1e-4)

    def test_a_stopped_worker_of_several_is_an_engine_that_is_lost(self, engine: EngineGenerator, folder: Path) -> None:
        """The first stage in one engine, half of the last one in the other."""
        engine.load(weights(folder, 13), 13)
        engine.add(ticket(15, 12, 2, max_tokens=300))
        steps(engine, 10)
        stopped = workers(engine)[0 if engine.config.on_new_weights == "keep" else -1]
        os.kill(stopped, signal.SIGSTOP)
        check_silence(engine)
        (handed,) = engine.hand_back()
        assert min(len(partial.tokens) for partial in handed.partials) >= 5
        engine.close()
        assert not cases.alive(stopped)


def check_draws(engine: EngineGenerator, folder: Path) -> None:
    """Every ticket's tokens are those of our own generator."""
    new = weights(folder, 10)
    engine.load(new, 10)
    other = torch_generator(folder, new, 10)
    for item in TICKETS:
        engine.add(item)
        other.add(item)
    done, expected = finish(engine), finish(other)
    assert {key: (r.tokens.tolist(), r.finish) for key, r in done.items()} == {
        key: (r.tokens.tolist(), r.finish) for key, r in expected.items()
    }


def check_silence(engine: EngineGenerator) -> None:
    """It is lost once a step was not answered for its deadline of 10 s."""
    began = time.monotonic()
    with pytest.raises(EngineLost, match="no answer within 10 s"):
        repeat_until(engine.step, began + 15)
    assert time.monotonic() - began < 15


def repeat_until(call: Callable[[], object], deadline: float) -> None:
    while time.monotonic() < deadline:
        call()


def workers(engine: EngineGenerator) -> list[int]:
    """Stage after stage."""
    return [handle.proc.pid for handle in engine._engine._engine.model_executor.workers]
