"""The generator on a real SGLang server: the same numbers as plain transformers, exact versions, and a clean end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sglang_cases
import vllm_cases as cases
from sglang_cases import children, steps
from vllm_cases import finish, forcing, fresh_logprobs, ticket, torch_generator, weights

from engine.config import ConfigError, SglangEngine
from engine.generate_engine import EngineGenerator
from engine.generate_requests import EngineLost
from protocols.messages import HandBack, Rollout

pytestmark = [sglang_cases.needs_sglang, pytest.mark.timeout(1200)]
FORCED = 77
LONG = 400


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_folder(tmp_path_factory.mktemp("tied") / "model")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_folder(tmp_path_factory.mktemp("untied") / "model", tied=False)


@pytest.fixture(scope="module")
def keeping(tied: Path) -> Iterator[EngineGenerator]:
    generator = sglang_cases.start(tied, SglangEngine(slots=8, deadline_s=20.0, **sglang_cases.REAL))
    yield generator
    generator.close()


@pytest.fixture(scope="module")
def recomputing(untied: Path) -> Iterator[EngineGenerator]:
    """With a head of its own, and tokens three at a time."""
    config = SglangEngine(slots=8, deadline_s=20.0, on_new_weights="recompute", stream_interval=3, **sglang_cases.REAL)
    generator = sglang_cases.start(untied, config)
    yield generator
    generator.close()


def long_ones(done: dict[tuple[int, int], Rollout], group: int, across: list[int]) -> list[Rollout]:
    """Those that did not stop by chance before the exchange."""
    found = [r for (number, _), r in done.items() if number == group and [v for v, _ in r.versions] == across]
    assert len(found) >= 2
    return found


def test_log_probabilities_are_those_of_the_distribution_that_is_trained(keeping: EngineGenerator, tied: Path) -> None:
    items = [
        ticket(1, 70, 4, max_tokens=40), ticket(2, 1, 2, max_tokens=9), ticket(3, 300, 2, max_tokens=30, temperature=0.7),
        ticket(4, 33, 3, max_tokens=17, top_p=0.6), ticket(5, 2, 1, max_tokens=21, top_k=5, temperature=1.5),
    ]  # fmt: skip
    new = weights(tied, 1)
    keeping.load(new, 1)
    for item in items:
        keeping.add(item)
    done = finish(keeping)
    assert keeping.held() == []
    for item in items:
        for sample in item.samples:
            rollout = done[item.group, sample]
            np.testing.assert_allclose(rollout.logprobs, fresh_logprobs(tied, new, item, rollout.tokens), atol=1e-4)
            assert rollout.versions == [(1, len(rollout.tokens))]
            assert (rollout.finish == "stop") == (rollout.tokens[-1] == 1)
    assert keeping.counters["prefill_saved_tokens"] > 0


@pytest.mark.parametrize("fixture", ["keeping", "recomputing"])
def test_after_an_exchange_in_flight_tokens_come_from_the_new_weights(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    engine: EngineGenerator = request.getfixturevalue(fixture)
    folder: Path = request.getfixturevalue("tied" if fixture == "keeping" else "untied")
    old, new, item = weights(folder, 2), forcing(folder, FORCED), ticket(6, 40, 6, max_tokens=LONG)
    engine.load(old, 2)
    engine.stage(new, 3)
    engine.add(item)
    steps(engine, 30)
    engine.load(new, 3)
    engine.add(ticket(7, 40, 2, max_tokens=5))
    done = finish(engine)
    for rollout in long_ones(done, 6, [2, 3]):
        made = rollout.versions[0][1]
        assert rollout.tokens[made:].tolist() == [FORCED] * (LONG - made)
        expected = fresh_logprobs(folder, old, item, rollout.tokens)[:made]
        np.testing.assert_allclose(rollout.logprobs[:made], expected, atol=1e-4)
    for sample in (0, 1):
        assert (done[7, sample].tokens.tolist(), done[7, sample].versions) == ([FORCED] * 5, [(3, 5)])
    engine.load(weights(folder, 4), 4)  # what forced is gone again


@pytest.mark.parametrize("fixture", ["keeping", "recomputing"])
def test_keys_and_values_after_an_exchange(request: pytest.FixtureRequest, fixture: str) -> None:
    """Recomputed, the rest of a response is as if all of it had come from the new weights; kept, it is not. A request that
    starts afterwards with the same prompt sees nothing of the old weights in both."""
    engine: EngineGenerator = request.getfixturevalue(fixture)
    folder: Path = request.getfixturevalue("tied" if fixture == "keeping" else "untied")
    old, new, first = weights(folder, 5), weights(folder, 6), ticket(8, 96, 6, max_tokens=LONG)
    engine.load(old, 5)
    engine.stage(new, 6)
    engine.add(first)
    steps(engine, 30)
    engine.load(new, 6)
    renamed = cases.Ticket(9, [0, 1], 1, first.prompt, ticket(9, 1, 1, max_tokens=20).sampling, 5)
    engine.add(renamed)
    done = finish(engine)
    off = []
    for rollout in long_ones(done, 8, [5, 6]):
        made = rollout.versions[0][1]
        before = np.abs(rollout.logprobs - fresh_logprobs(folder, old, first, rollout.tokens))[:made]
        assert before.max() < 1e-4  # so the first of the new version is exactly the first
        off.append(np.abs(rollout.logprobs - fresh_logprobs(folder, new, first, rollout.tokens))[made:].max())
    assert max(off) < 1e-4 if fixture == "recomputing" else min(off) > 1e-2
    for sample in (0, 1):
        rollout = done[9, sample]
        np.testing.assert_allclose(rollout.logprobs, fresh_logprobs(folder, new, renamed, rollout.tokens), atol=1e-4)


def test_what_is_handed_back_goes_on_here_and_on_our_own_generator(keeping: EngineGenerator, tied: Path) -> None:
    new, item = weights(tied, 7), ticket(10, 50, 6, max_tokens=LONG)
    keeping.load(new, 7)
    keeping.add(item)
    steps(keeping, 60)
    (handed,) = [each for each in keeping.hand_back() if isinstance(each, HandBack)]
    assert (handed.group, handed.fence, keeping.ready) == (10, 1, False)
    assert min(len(partial.tokens) for partial in handed.partials) >= 5
    again = ticket(10, 50, 6, fence=2, max_tokens=LONG, resume=list(handed.partials))
    keeping.add(again)
    other = torch_generator(tied, new, 8)
    other.add(again)
    for done, version in [(finish(keeping), 7), (finish(other), 8)]:
        for partial in handed.partials:
            rollout, size = done[10, partial.sample], len(partial.tokens)
            assert rollout.tokens[:size].tolist() == partial.tokens.tolist()
            np.testing.assert_allclose(rollout.logprobs, fresh_logprobs(tied, new, again, rollout.tokens), atol=1e-4)
            assert rollout.versions[-1][0] == version


def test_a_model_that_sglang_does_not_know_is_refused(tied: Path) -> None:
    """Its folder says so; ours reads the same weights by another class."""
    other = tied.parent / "unknown"
    other.mkdir()
    for file in tied.iterdir():
        text = file.read_bytes()
        (other / file.name).write_bytes(text.replace(b'"LlamaForCausalLM"', b'"NowhereForCausalLM"'))
    with pytest.raises(ConfigError, match=r"SGLang does not start: .*NowhereForCausalLM"):
        sglang_cases.start(other, SglangEngine(slots=8, **sglang_cases.REAL))


@pytest.mark.parametrize("fixture", ["keeping", "recomputing"])
def test_a_killed_scheduler_is_noticed_and_what_there_is_is_handed_back(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    """The process that computes, or the one that answers."""
    engine: EngineGenerator = request.getfixturevalue(fixture)
    folder: Path = request.getfixturevalue("tied" if fixture == "keeping" else "untied")
    engine.load(weights(folder, 15), 15)
    engine.add(ticket(16, 12, 80, max_tokens=LONG))  # so many that some are under way whatever the machine does
    steps(engine, 30)
    leash = sglang_cases.server_of(engine)
    processes = [leash, *children(leash)]
    titles = {process: Path(f"/proc/{process}/cmdline").read_text() for process in processes}
    scheduler = next(process for process, title in titles.items() if "scheduler" in title)
    os.kill(scheduler if fixture == "keeping" else processes[1], signal.SIGKILL)
    with pytest.raises(EngineLost, match="SGLang is lost"):
        steps(engine, 10**9, timeout_s=10.0)
    (handed,) = [each for each in engine.hand_back() if isinstance(each, HandBack)]
    assert handed.partials
    deadline = time.monotonic() + 10
    while any(map(cases.alive, processes)):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)
