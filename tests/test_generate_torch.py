"""The generator against plain transformers: the same log-probabilities, the same tokens however the work is cut."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from engine.attention import NAME
from engine.config import TorchEngine
from engine.generate_torch import TicketRefused, TorchGenerator, WeightsRefused
from engine.models import named_weights
from engine.slot_ranges import ranges, reorder, tokens_read
from protocols.messages import INT, HandBack, Rollout, Sampling, Ticket

VOCABULARY, CONTEXT = 97, 320
FAMILIES: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@cache
def reference(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model with eager attention; weights large enough for attention to matter and draws to be varied."""
    config = FAMILIES[family](
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=12 if family == "qwen3" else 8, max_position_embeddings=CONTEXT,
        tie_word_embeddings=family != "qwen2", bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def generator(
    family: str = "llama",
    *,
    slots: int = 8,
    stops: tuple[int, ...] = (),
    mode: str = "keep",
    budget: int = 32,
    range_bytes: int = 1,
) -> TorchGenerator:
    """`range_bytes` 1: tiny models too attend in ranges of slots, sorted by length."""
    source = reference(family)
    model = AutoModelForCausalLM.from_config(deepcopy(source.config), attn_implementation=NAME)
    model.load_state_dict(source.state_dict())
    return TorchGenerator(
        model,
        config=TorchEngine(slots=slots, on_new_weights=mode),
        stop_ids=frozenset(stops),
        decode=lambda tokens: " ".join(map(str, tokens)),
        prefill_tokens=budget,
        range_bytes=range_bytes,
    )


def ticket(group: int, prompt: int, samples: int | list[int] = 1, *, fence: int = 0, **options) -> Ticket:
    """`prompt` tokens that are a function of the group; `options` of Sampling, and min_version and resume."""
    ids = np.random.default_rng(group).integers(1, VOCABULARY, prompt).astype(INT)
    outer = {name: options.pop(name) for name in ("min_version", "resume") if name in options}
    indices = list(range(samples)) if isinstance(samples, int) else samples
    return Ticket(group, indices, fence, ids, Sampling(**{"max_tokens": 12} | options), seed=1000 + group, **outer)


def finish(engine: TorchGenerator, limit: int = 2000) -> dict[tuple[int, int], Rollout]:
    done: dict[tuple[int, int], Rollout] = {}
    for _ in range(limit):
        if not engine.ready:
            return done
        done |= {(r.group, r.sample): r for r in engine.step()}
    raise AssertionError(f"not finished after {limit} steps, still held: {engine.held()}")


def fresh_logprobs(model: PreTrainedModel, item: Ticket, tokens: np.ndarray) -> np.ndarray:
    """Of the temperature-scaled softmax, by one forward pass over prompt and response."""
    ids = torch.from_numpy(np.concatenate([item.prompt, tokens]).astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(item.prompt) - 1 : -1]
    full = torch.log_softmax(logits.float() / item.sampling.temperature, -1)
    return full.gather(-1, ids[len(item.prompt) :, None])[:, 0].numpy()


TICKETS = [
    ticket(1, 20, 4, max_tokens=40),
    ticket(2, 1, 2, max_tokens=9),
    ticket(3, 150, 2, max_tokens=30, temperature=0.7),  # a prompt of several budgets
    ticket(4, 33, 3, max_tokens=17, top_p=0.6),
    ticket(5, 2, 1, max_tokens=21, top_k=5, temperature=1.5),
]


@cache
def alone(family: str = "llama") -> dict[tuple[int, int], list[int]]:
    """Every sample of TICKETS made by itself."""
    tokens = {}
    for item in TICKETS:
        for sample in item.samples:
            engine = generator(family, slots=1)
            engine.add(Ticket(item.group, [sample], 0, item.prompt, item.sampling, item.seed))
            tokens |= {key: rollout.tokens.tolist() for key, rollout in finish(engine).items()}
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_a_fresh_forward_pass(family: str) -> None:
    engine = generator(family)
    for item in TICKETS:
        engine.add(item)
    done = finish(engine)
    assert len(done) == sum(len(item.samples) for item in TICKETS)
    for item in TICKETS:
        for sample in item.samples:
            rollout = done[item.group, sample]
            assert len(rollout.tokens) == item.sampling.max_tokens
            expected = fresh_logprobs(reference(family), item, rollout.tokens)
            np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(family: str) -> None:
    engine = generator(family)
    item = ticket(9, 25, max_tokens=40, top_k=1)
    engine.add(item)
    prompt = torch.from_numpy(item.prompt.astype(np.int64))[None]
    expected = reference(family).generate(prompt, max_new_tokens=40, do_sample=False)[0, 25:]
    assert finish(engine)[9, 0].tokens.tolist() == expected.tolist()


def test_tokens_are_the_same_alone_and_in_a_mixed_batch() -> None:
    engine = generator()
    for item in TICKETS:
        engine.add(item)
        engine.step()
    assert {key: rollout.tokens.tolist() for key, rollout in finish(engine).items()} == alone()
    assert len(set(map(tuple, alone().values()))) == len(alone())


ROUND = st.tuples(
    st.integers(1, 9),  # slots
    st.sampled_from(["keep", "recompute"]),
    st.integers(1, 200),  # prompt tokens of a step
    st.integers(0, 9),  # steps after each ticket
    st.sampled_from([1, 1 << 20]),  # bytes that a range of slots costs
    st.booleans(),  # whether (equal) weights are loaded after each ticket
)


@settings(max_examples=25, deadline=None)
@given(st.lists(ROUND, max_size=4), st.permutations(range(len(TICKETS))))
def test_tokens_are_the_same_however_the_work_is_cut(rounds: list, order: list[int]) -> None:
    """Any arrival, slots and budget; handed back and continued elsewhere any number of times: nothing changes a token."""
    waiting = [TICKETS[i] for i in order]
    done: dict[tuple[int, int], Rollout] = {}
    for slots, mode, budget, steps, range_bytes, swap in rounds:
        engine = generator(slots=slots, mode=mode, budget=budget, range_bytes=range_bytes)
        for item in waiting:
            engine.add(item)
            for _ in range(steps):
                done |= {(r.group, r.sample): r for r in engine.step()}
            if swap:
                engine.load(named_weights(reference("llama")), version=0)
        waiting = [resumed(back) for back in engine.hand_back()]
        assert not engine.ready
        assert not engine.held()
    engine = generator()
    for item in waiting:
        engine.add(item)
    done |= finish(engine)
    assert {key: rollout.tokens.tolist() for key, rollout in done.items()} == alone()
    for (group, _), rollout in done.items():
        item = next(item for item in TICKETS if item.group == group)
        np.testing.assert_allclose(
            rollout.logprobs, fresh_logprobs(reference("llama"), item, rollout.tokens), atol=1e-4
        )
        assert rollout.versions == [(0, len(rollout.tokens))]


def resumed(back: HandBack) -> Ticket:
    """What a buffer issues after a hand-back."""
    item = next(item for item in TICKETS if item.group == back.group)
    return Ticket(
        back.group, back.samples, back.fence + 1, item.prompt, item.sampling, item.seed, resume=list(back.partials)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_recompute_continues_as_if_the_new_weights_had_always_been_there(family: str) -> None:
    engine, new = generator(family, mode="recompute"), reference(family, seed=1)
    items = [ticket(1, 40, 4, max_tokens=30), ticket(2, 7, 4, max_tokens=30)]
    for item in items:
        engine.add(item)
    before = [engine.step() for _ in range(14)]
    engine.load(named_weights(new), version=5)
    assert engine.version == 5
    done = finish(engine)
    assert not any(before)
    assert len(done) == 8
    for (group, _), rollout in done.items():
        (old_version, old), (new_version, rest) = rollout.versions
        assert (old_version, new_version, old + rest) == (0, 5, 30)
        assert 8 <= old <= 14
        item = items[group - 1]
        was = fresh_logprobs(reference(family), item, rollout.tokens)
        now = fresh_logprobs(new, item, rollout.tokens)
        np.testing.assert_allclose(rollout.logprobs, np.concatenate([was[:old], now[old:]]), atol=1e-4)
        assert np.abs(was - now).max() > 0.1  # the two are told apart


def test_keep_continues_on_the_old_keys_and_values() -> None:
    engine, new = generator(mode="keep"), reference("llama", seed=1)
    item = ticket(1, 20, 2, max_tokens=20)
    engine.add(item)
    for _ in range(8):
        engine.step()
    engine.load(named_weights(new), version=1)
    late = ticket(2, 20, 1, max_tokens=5)
    engine.add(late)
    done = finish(engine)
    np.testing.assert_allclose(done[2, 0].logprobs, fresh_logprobs(new, late, done[2, 0].tokens), atol=1e-4)
    for sample in (0, 1):
        rollout = done[1, sample]
        assert rollout.versions == [(0, 8), (1, 12)]
        ids = torch.from_numpy(np.concatenate([item.prompt, rollout.tokens]).astype(np.int64))[None]
        computed = 20 + 8 - 1  # the last token before the swap is the first input after it
        with torch.no_grad():
            cache = reference("llama")(ids[:, :computed], use_cache=True).past_key_values
            logits = new(ids[:, computed:-1], past_key_values=cache).logits[0]
        expected = torch.log_softmax(logits, -1).gather(-1, ids[0, computed + 1 :, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs[8:], expected, atol=1e-4)


def test_prompts_not_started_are_computed_under_the_new_weights() -> None:
    engine, new = generator(slots=2), reference("llama", seed=1)
    item = ticket(1, 30, 4, max_tokens=6)
    engine.add(item)
    for _ in range(3):
        engine.step()
    engine.load(named_weights(new), version=1)
    done = finish(engine)
    for sample in (2, 3):
        assert done[1, sample].versions == [(1, 6)]
        np.testing.assert_allclose(
            done[1, sample].logprobs, fresh_logprobs(new, item, done[1, sample].tokens), atol=1e-4
        )


def test_weights_that_do_not_fit_change_nothing() -> None:
    engine = generator()
    before = {name: tensor.clone() for name, tensor in named_weights(engine.model).items()}
    good = dict(named_weights(reference("llama", seed=1)))
    first = next(iter(good))
    for bad, says in [
        ({name: good[name] for name in good if name != first}, f"1 missing: {first}"),
        (good | {"model.ghost": torch.zeros(1)}, "1 unknown: model.ghost"),
        (good | {first: torch.zeros(3, 4)}, rf"1 of the wrong shape: {first} \[3, 4\] \(expected \[97, 48\]\)"),
    ]:
        with pytest.raises(WeightsRefused, match=says):
            engine.load(bad, version=3)
    assert engine.version == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_weights(engine.model).items())


def test_weights_that_are_not_numbers_stop_the_generator() -> None:
    engine = generator()
    engine.load({name: torch.full_like(t, torch.nan) for name, t in named_weights(engine.model).items()}, version=2)
    engine.add(ticket(1, 5))
    with pytest.raises(FloatingPointError, match="version 2"):
        finish(engine)


def test_a_ticket_for_newer_weights_waits_and_is_overtaken() -> None:
    engine = generator()
    engine.add(ticket(1, 5, min_version=2))
    assert not engine.ready
    engine.add(ticket(2, 5))
    assert {key[0] for key in finish(engine)} == {2}
    assert [held.group for held in engine.held()] == [1]
    engine.load(named_weights(reference("llama", seed=1)), version=2)
    assert finish(engine)[1, 0].versions == [(2, 12)]
    assert engine.held() == []


def test_a_group_larger_than_the_slots_computes_its_prompt_once() -> None:
    engine = generator(slots=3)
    engine.add(ticket(1, 31, 8))
    done = finish(engine)
    assert sorted(done) == [(1, sample) for sample in range(8)]
    assert engine.counters["prefill_tokens"] == 30
    assert engine.counters["prefill_saved_tokens"] == 7 * 30
    assert engine.counters["generated_tokens"] == 8 * 12
    assert engine.counters["finished"] == 8


def test_tickets_of_equal_prompts_share_its_computation_but_not_across_weights() -> None:
    engine, first = generator(), ticket(1, 31, [0, 1], max_tokens=30)
    engine.add(first)
    engine.step()
    engine.add(ticket(1, 31, [2, 3], fence=1, max_tokens=30))  # the rest of the group, issued when there was credit
    engine.step()
    assert engine.counters["prefill_tokens"] == 30
    assert engine.counters["prefill_saved_tokens"] == 3 * 30
    new = reference("llama", seed=1)
    engine.load(named_weights(new), version=1)
    engine.add(ticket(1, 31, [4], fence=2, max_tokens=30))
    done = finish(engine)
    assert engine.counters["prefill_tokens"] == 60
    np.testing.assert_allclose(done[1, 4].logprobs, fresh_logprobs(new, first, done[1, 4].tokens), atol=1e-4)
    assert len(done) == 5


def test_a_long_prompt_does_not_starve_running_sequences() -> None:
    engine = generator(budget=16)
    engine.add(ticket(1, 5, max_tokens=60))
    engine.step()
    engine.add(ticket(2, 200))
    for _ in range(12):  # 199 tokens at 16 a step
        before = dict(engine.counters)
        engine.step()
        assert engine.counters["prefill_tokens"] - before["prefill_tokens"] == 16
        assert engine.counters["generated_tokens"] - before["generated_tokens"] == 1
    assert finish(engine)[2, 0].tokens.tolist()


def test_stops_at_a_stop_token_at_max_tokens_and_at_the_end_of_the_context() -> None:
    free = alone()[1, 0]
    stop = next(token for token in free[5:] if token not in free[:5])
    engine = generator(stops=(stop, VOCABULARY + 7))  # ids beyond the model's vocabulary never come
    engine.add(ticket(1, 20, max_tokens=40))
    engine.add(ticket(2, CONTEXT - 4, max_tokens=40))
    engine.add(ticket(3, CONTEXT - 1, max_tokens=40))
    done = finish(engine)
    stopped = done[1, 0]
    assert (stopped.finish, stopped.tokens.tolist()) == ("stop", free[: free.index(stop) + 1])
    assert stopped.text == " ".join(map(str, stopped.tokens))
    assert (done[2, 0].finish, len(done[2, 0].tokens)) == ("length", 4)
    assert (done[3, 0].finish, len(done[3, 0].tokens)) == ("length", 1)
    assert 0 < stopped.started_at <= stopped.finished_at


def test_tickets_that_the_model_cannot_serve_are_refused() -> None:
    engine = generator()
    partial = engine_partial()
    for bad, says in [
        (ticket(1, CONTEXT), f"group 1 .*prompt has {CONTEXT} tokens, expected at most {CONTEXT - 1}"),
        (Ticket(2, [0], 0, np.array([5, VOCABULARY], INT), Sampling(max_tokens=3), 0), "token ids 5 to 97"),
        (ticket(1, 20, [3], resume=[partial]), "of sample 0 to continue"),
        (ticket(1, 20, [0], max_tokens=3, resume=[partial]), "got 3 tokens of sample 0 to continue, .*fewer than 3"),
    ]:
        with pytest.raises(TicketRefused, match=says):
            engine.add(bad)
    assert not engine.ready
    assert not engine.held()


def engine_partial():
    engine = generator()
    engine.add(ticket(1, 20))
    for _ in range(3):
        engine.step()
    return engine.hand_back()[0].partials[0]


def test_hand_back_names_every_unfinished_sample() -> None:
    engine = generator(slots=2)
    engine.add(ticket(1, 5, [4, 2, 9], fence=3))
    engine.add(ticket(2, 5, 2, fence=1))
    for _ in range(4):
        engine.step()
    engine.load(named_weights(reference("llama", seed=1)), version=1)
    engine.step()
    first, second = engine.hand_back()
    assert (first.group, first.fence, first.samples) == (1, 3, [2, 4, 9])
    assert [(p.sample, len(p.tokens), p.versions) for p in first.partials] == [
        (2, 5, [(0, 4), (1, 1)]),
        (4, 5, [(0, 4), (1, 1)]),
    ]
    assert (second.samples, second.partials) == ([0, 1], [])


def test_cancelled_and_superseded_samples_are_dropped() -> None:
    engine = generator(slots=3)
    engine.add(ticket(1, 5, 2, fence=1))
    engine.add(ticket(2, 5, 3, fence=1))
    engine.step()
    engine.cancel(2, 7)  # another fence: nothing happens
    engine.cancel(1, 1)
    engine.add(ticket(2, 5, [1, 2], fence=2))
    engine.add(ticket(2, 5, [1, 2], fence=2))  # said twice, done once
    engine.add(ticket(2, 5, [0, 1], fence=0))  # late: the samples are in hand under later fences
    assert [(held.group, held.fence) for held in engine.held()] == [(2, 1), (2, 2)]
    done = finish(engine)
    assert {(key, rollout.fence) for key, rollout in done.items()} == {((2, 0), 1), ((2, 1), 2), ((2, 2), 2)}
    assert engine.counters["finished"] == 3
    single = generator()
    single.add(ticket(2, 5, 3))
    assert [r.tokens.tolist() for _, r in sorted(finish(single).items())] == [
        r.tokens.tolist() for _, r in sorted(done.items())
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=70), st.integers(0, 3000))
def test_ranges_of_slots_cover_all_and_read_no_more_than_one_range(lengths: list[int], cost: int) -> None:
    each = np.array(lengths)
    ends = ranges(each, range_cost=cost)
    assert ends == sorted(set(ends))
    assert ends[-1] == len(each)
    assert tokens_read(each, ends, range_cost=cost) <= tokens_read(each, [len(each)], range_cost=cost)
    order = reorder(each, range_cost=cost, horizon=16)
    if order is not None:
        assert sorted(order) == list(range(len(each)))
        assert list(each[order]) == sorted(lengths, reverse=True)


def test_slots_are_sorted_only_when_that_pays() -> None:
    mixed = np.array([300, 5] * 32)
    order = reorder(mixed, range_cost=100, horizon=16)
    assert order is not None
    assert ranges(mixed[order], range_cost=100) == [32, 64]
    assert reorder(mixed, range_cost=100, horizon=1) is None  # moving costs more than one step saves
    assert reorder(mixed, range_cost=20_000, horizon=16) is None  # no second range, so no use in an order
    assert reorder(np.sort(mixed)[::-1], range_cost=100, horizon=16) is None
