"""What a generator on an engine promises, whatever the engine: numbers, versions, exchanges, and what is handed back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_cases as cases
from vllm_cases import finish, forcing, fresh_logprobs, steps, ticket, torch_generator, weights

from engine.generate_engine import EngineGenerator
from engine.generate_torch import WeightsRefused
from protocols.messages import HandBack, Rollout, Sampling, Ticket

FORCED, STOP = 77, 1
Done = dict[tuple[int, int], Rollout]
TICKETS = [
    ticket(1, 70, 4, max_tokens=40),  # a prompt of two shared blocks of vLLM's and a rest
    ticket(2, 1, 2, max_tokens=9),
    ticket(3, 300, 2, max_tokens=30, temperature=0.7),
    ticket(4, 33, 3, max_tokens=17, top_p=0.6),
    ticket(5, 2, 1, max_tokens=21, top_k=5, temperature=1.5),
]


class EngineContract:
    """For a class of tests of one engine. Its generators are started once for the class, so tests that end one come last."""

    start: Callable[[Path, str], EngineGenerator]
    """A generator with 8 slots on the model of a folder, with this `on_new_weights`."""

    long: int
    """Tokens of a response that is under way while a test acts."""

    stepped: bool
    """Whether the engine computes in `step` and `load` only, not between them."""

    @pytest.fixture(scope="class")
    @classmethod
    def tied(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return cases.make_folder(tmp_path_factory.mktemp("tied") / "model")

    @pytest.fixture(scope="class")
    @classmethod
    def untied(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """With a head of its own."""
        return cases.make_folder(tmp_path_factory.mktemp("untied") / "model", tied=False)

    @pytest.fixture(scope="class")
    @classmethod
    def keeping(cls, tied: Path) -> Iterator[EngineGenerator]:
        generator = cls.start(tied, "keep")
        yield generator
        generator.close()

    @pytest.fixture(scope="class")
    @classmethod
    def recomputing(cls, untied: Path) -> Iterator[EngineGenerator]:
        generator = cls.start(untied, "recompute")
        yield generator
        generator.close()

    @pytest.fixture(params=["keeping", "recomputing"])
    def engine(self, request: pytest.FixtureRequest) -> EngineGenerator:
        return request.getfixturevalue(request.param)

    @pytest.fixture
    def folder(self, engine: EngineGenerator, request: pytest.FixtureRequest) -> Path:
        """Of the engine's model."""
        return request.getfixturevalue("tied" if engine.config.on_new_weights == "keep" else "untied")

    def test_log_probabilities_are_those_of_the_distribution_that_is_trained(
        self, keeping: EngineGenerator, tied: Path
    ) -> None:
        new = weights(tied, 1)
        keeping.load(new, 1)
        for item in TICKETS:
            keeping.add(item)
        done = finish(keeping)
        assert keeping.held() == []
        assert not keeping.ready
        for item in TICKETS:
            for sample in item.samples:
                rollout = done[item.group, sample]
                np.testing.assert_allclose(rollout.logprobs, fresh_logprobs(tied, new, item, rollout.tokens), atol=1e-4)
                assert rollout.versions == [(1, len(rollout.tokens))]
                assert whole(rollout, item.sampling.max_tokens)
        keeping.load(forcing(tied, STOP), 2)
        keeping.add(ticket(4, 8, 1))
        rollout = finish(keeping)[4, 0]
        assert (rollout.tokens.tolist(), rollout.finish) == ([STOP], "stop")

    def test_after_an_exchange_in_flight_tokens_come_from_the_new_weights(
        self, engine: EngineGenerator, folder: Path
    ) -> None:
        """The weights force one token, through a tied head in one engine and through one of its own in the other."""
        old, new, item = weights(folder, 2), forcing(folder, FORCED), ticket(6, 40, 6, max_tokens=self.long)
        engine.load(old, 2)
        engine.stage(new, 3)
        engine.add(item)
        before = engine.counters["generated_tokens"]
        done = steps(engine, 30)
        came = engine.counters["generated_tokens"] - before
        engine.load(new, 3)
        engine.add(ticket(7, 40, 2, max_tokens=5))
        done |= finish(engine)
        of_old = sum(count for each in done.values() for version, count in each.versions if version == 2)
        assert of_old == came if self.stepped else of_old >= came
        for rollout in long_ones(done, 6, [2, 3]):
            made = rollout.versions[0][1]
            assert rollout.tokens[made:].tolist() == [FORCED] * (self.long - made)
            expected = fresh_logprobs(folder, old, item, rollout.tokens)[:made]
            np.testing.assert_allclose(rollout.logprobs[:made], expected, atol=1e-4)
        for sample in (0, 1):
            assert (done[7, sample].tokens.tolist(), done[7, sample].versions) == ([FORCED] * 5, [(3, 5)])
        engine.load(weights(folder, 4), 4)  # what forced is gone again

    def test_what_is_handed_back_goes_on_here_and_on_our_own_generator(
        self, engine: EngineGenerator, folder: Path
    ) -> None:
        new = weights(folder, 7)
        engine.load(new, 7)
        engine.add(ticket(10, 50, 6, max_tokens=self.long))
        done = steps(engine, 60)
        back = engine.hand_back()
        (handed,) = [each for each in back if isinstance(each, HandBack)]
        ended = [sample for _, sample in done] + [each.sample for each in back if isinstance(each, Rollout)]
        assert sorted([*ended, *handed.samples]) == list(range(6))
        assert (handed.group, handed.fence, engine.ready) == (10, 1, False)
        assert min(len(partial.tokens) for partial in handed.partials) >= 5
        again = ticket(10, 50, 6, fence=2, max_tokens=self.long, resume=list(handed.partials))
        engine.add(again)
        other = torch_generator(folder, new, 8)
        other.add(again)
        for done, version in [(finish(engine), 7), (finish(other), 8)]:
            for partial in handed.partials:
                rollout, size = done[10, partial.sample], len(partial.tokens)
                assert rollout.tokens[:size].tolist() == partial.tokens.tolist()
                np.testing.assert_array_equal(rollout.logprobs[:size], partial.logprobs)
                expected = fresh_logprobs(folder, new, again, rollout.tokens)
                np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)
                total = len(rollout.tokens)
                assert rollout.versions == ([(7, total)] if version == 7 else [(7, size), (8, total - size)])
                assert rollout.fence == 2

    def test_what_is_cancelled_or_issued_anew_is_dropped(self, keeping: EngineGenerator, tied: Path) -> None:
        keeping.load(weights(tied, 8), 8)
        keeping.add(ticket(11, 20, 8, max_tokens=400))  # every slot
        keeping.add(ticket(12, 20, 2, max_tokens=10))
        steps(keeping, 30)
        keeping.cancel(11, fence=2)
        assert [(held.group, held.fence) for held in keeping.held()] == [(11, 1), (12, 1)]
        keeping.add(Ticket(11, [0, 1], 2, ticket(11, 20, 1).prompt, Sampling(max_tokens=3), 5))
        assert [(held.group, held.fence) for held in keeping.held()] == [(11, 1), (12, 1), (11, 2)]
        keeping.cancel(11, fence=1)
        done = finish(keeping)
        assert {(*key, rollout.fence) for key, rollout in done.items()} == {
            (12, 0, 1), (12, 1, 1), (11, 0, 2), (11, 1, 2),
        }  # fmt: skip
        assert all(whole(rollout, 10 if rollout.group == 12 else 3) for rollout in done.values())

    def test_weights_that_are_not_the_models_change_nothing(self, keeping: EngineGenerator, tied: Path) -> None:
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


class CachingEngineContract(EngineContract):
    """Of an engine that has keys and values, which a server of the tests has not."""

    def test_keys_and_values_after_an_exchange(self, engine: EngineGenerator, folder: Path) -> None:
        """Recomputed, the rest of a response is as if all of it had come from the new weights; kept, it is not. A request
        that starts afterwards with the same prompt sees nothing of the old weights in both."""
        old, new, first = weights(folder, 5), weights(folder, 6), ticket(8, 96, 6, max_tokens=self.long)
        engine.load(old, 5)
        engine.stage(new, 6)
        engine.add(first)
        done = steps(engine, 30)
        engine.load(new, 6)
        renamed = Ticket(9, [0, 1], 1, first.prompt, Sampling(max_tokens=20), 5)
        engine.add(renamed)
        done |= finish(engine)
        off = []
        for rollout in long_ones(done, 8, [5, 6]):
            made = rollout.versions[0][1]
            before = np.abs(rollout.logprobs - fresh_logprobs(folder, old, first, rollout.tokens))[:made]
            assert before.max() < 1e-4  # so the first of the new version is exactly the first
            off.append(np.abs(rollout.logprobs - fresh_logprobs(folder, new, first, rollout.tokens))[made:].max())
        assert max(off) < 1e-4 if engine.config.on_new_weights == "recompute" else min(off) > 1e-2
        for sample in (0, 1):
            rollout = done[9, sample]
            expected = fresh_logprobs(folder, new, renamed, rollout.tokens)
            np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)


def whole(rollout: Rollout, limit: int) -> bool:
    """It has ended with the stop token, or else at its limit."""
    stopped = rollout.tokens[-1] == STOP
    return rollout.finish == ("stop" if stopped else "length") and (stopped or len(rollout.tokens) == limit)


def long_ones(done: Done, group: int, across: list[int]) -> list[Rollout]:
    """Those that did not stop by chance before the exchange."""
    found = [r for (number, _), r in done.items() if number == group and [v for v, _ in r.versions] == across]
    assert len(found) >= 2
    return found
