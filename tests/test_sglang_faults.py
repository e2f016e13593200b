"""The SGLang generator when its server fails, and what it refuses before anything starts; against the server of the tests."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import sglang_cases
import vllm_cases as cases
from sglang_cases import children
from vllm_cases import none_alive, steps, ticket, weights

from engine.config import ConfigError, SglangEngine
from engine.generate_engine import EngineGenerator
from engine.generate_requests import EngineLost
from engine.generate_sglang_stream import Stream
from protocols.messages import HandBack

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_folder(tmp_path_factory.mktemp("sglang") / "model")


def working(model: Path, *, fault: str = "", deadline_s: float = 20.0) -> tuple[EngineGenerator, list[int]]:
    """One with requests in flight, and its server's processes."""
    options = ("--fault", fault) if fault else ()
    generator = sglang_cases.start(model, sglang_cases.engine(model.parent, options=options, deadline_s=deadline_s))
    generator.load(weights(model, 1), 1)
    generator.add(ticket(1, 12, 2, max_tokens=400))
    steps(generator, 12)
    return generator, [sglang_cases.server_of(generator), *children(sglang_cases.server_of(generator))]


def lost_within(generator: EngineGenerator, seconds: float, match: str) -> None:
    """By stepping, as the role does."""
    deadline = time.monotonic() + seconds
    with pytest.raises(EngineLost, match=match):
        step_until(generator, deadline)


def step_until(generator: EngineGenerator, deadline: float) -> None:
    while time.monotonic() < deadline:
        generator.step()
        generator.check()


def all_handed_back(generator: EngineGenerator) -> None:
    (handed,) = generator.hand_back()
    assert isinstance(handed, HandBack)
    assert handed.samples == [0, 1]
    assert min(len(partial.tokens) for partial in handed.partials) >= 3
    assert {version for partial in handed.partials for version, _ in partial.versions} == {1}


def test_a_killed_server_is_noticed_and_its_tokens_are_handed_back(model: Path) -> None:
    generator, processes = working(model)
    os.kill(processes[-1], signal.SIGKILL)
    lost_within(generator, 5.0, "SGLang is lost: .*(has ended|closed the connection|RemoteProtocolError|ReadError)")
    with pytest.raises(EngineLost, match="SGLang is lost"):
        generator.step()
    all_handed_back(generator)
    with pytest.raises(EngineLost, match="is lost"):
        generator.load(weights(model, 2), 2)
    generator.close()
    none_alive(processes)


def test_a_stopped_server_is_lost_at_the_deadline(model: Path) -> None:
    generator, processes = working(model, deadline_s=4.0)
    os.kill(processes[-1], signal.SIGSTOP)
    lost_within(generator, 12.0, "no answer within 4 s")
    all_handed_back(generator)
    none_alive(processes)
    generator.close()


def test_an_update_that_is_not_answered_ends_the_server(model: Path) -> None:
    generator, processes = working(model, fault="hang:2", deadline_s=4.0)  # the first update was the trial
    new = weights(model, 2)
    began = time.monotonic()
    with pytest.raises(
        EngineLost, match=r"SGLang is lost: it cannot take new weights: .*(waited 4 s|no answer within 4 s)"
    ):
        generator.load(new, 2)
    assert time.monotonic() - began < 12.0
    all_handed_back(generator)
    none_alive(processes)
    generator.close()


def test_nothing_is_served_that_other_weights_than_those_that_came_have_sampled(model: Path) -> None:
    generator, processes = working(model, fault="stale:2")
    with pytest.raises(EngineLost, match=r"SGLang computes with other weights than those of version 2: .* differ by"):
        generator.load(weights(model, 2), 2)
    all_handed_back(generator)
    generator.close()
    none_alive(processes)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--fault", f"ignore:{Q_PROJ}"), f"does not know a weight of .*: 1 were not loaded: {Q_PROJ}"),
        (("--fault", f"shape:{Q_PROJ}"), f"does not take the weights of .*: 400: .*shapes of {Q_PROJ} differ"),
        (("--architectures", "Qwen3ForCausalLM"), r"serves \['Qwen3ForCausalLM'\], but .* is a LlamaForCausalLM"),
        (("--dtype", "float64"), "generator.dtype is float32, but SGLang at .* runs with dtype = 'float64'"),
        (("--version", "0.4.1"), r"got sglang 0\.4\.1 .*, expected version 0\.5\.20 or 0\.5\.23"),
        (("--port", "none"), "SGLang does not start: .* argument --port: invalid int value: 'none'"),
    ],
)  # fmt: skip
def test_what_the_server_refuses_is_one_error_before_anything_starts(
    model: Path, options: tuple[str, ...], error: str
) -> None:
    before = children(os.getpid())
    with pytest.raises(ConfigError, match=error):
        sglang_cases.start(model, sglang_cases.engine(model.parent, options=options))
    none_alive([process for process in children(os.getpid()) if process not in before])


@pytest.mark.parametrize(
    ("settings", "temperature", "error"),
    [
        ({"python": "/nowhere/python"}, 1.0, "/nowhere/python cannot be run"),
        ({"python": sys.executable}, 1.0, r"sglang is not installed for .*tools/test-engines sglang"),
        ({"version": "0.5.9"}, 1.0, r"got sglang 0\.5\.9 .*expected version 0\.5\.20 or 0\.5\.23"),
        ({"tensor_parallel": 3}, 1.0, "tensor_parallel = 3 does not divide the 2 attention heads"),
        ({}, 1e-7, "generator.sampling.temperature: got 1e-07, expected at least 1e-06"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_server_is_started(
    model: Path, settings: dict[str, object], temperature: float, error: str
) -> None:
    version = str(settings.pop("version", "0.5.20"))
    config = SglangEngine(**{"python": sglang_cases.interpreter(model.parent, version)} | settings)
    with pytest.raises(ConfigError, match=error):
        sglang_cases.start(model, config, temperature=temperature)


def event(tokens: list[int], pairs: list[int], total: int, version: int, **more: object) -> bytes:
    scored = [[-1.5, token, None] for token in pairs]
    meta = {"id": "a", "weight_version": str(version), "completion_tokens": total, "output_token_logprobs": scored}
    return json.dumps({"output_ids": tokens, "meta_info": meta | more}).encode()


def test_events_of_all_kinds_give_each_token_once() -> None:
    stream = Stream("1")
    assert stream.take(event([5], [5], 1, 3))[1:4] == ([5], [-1.5], None)
    assert stream.take(event([5, 6, 7], [5, 6, 7], 3, 3)).tokens == [6, 7]  # a server that sends all of them each time
    mixed = stream.take(event([8, 9], [8, 9], 5, 4))
    assert (mixed.tokens, mixed.versions) == ([8, 9], [(3, 5)])  # which of them are of version 4 is not said
    assert stream.take(event([1], [1], 6, 4)).versions == [(3, 5), (4, 1)]
    spans = [{"version": "3", "start": 0, "end": 4}, {"version": "4", "start": 4, "end": 6}]
    ended = {"finish_reason": {"type": "abort", "message": "Abort in waiting queue"}, "weight_versions": spans}
    last = stream.take(event([1], [5, 6, 7, 8, 9, 1], 6, 4, **ended))  # SGLang's word on an aborted request that waited
    assert (last.tokens, last.finish, last.versions) == ([], "abort", [(3, 4), (4, 2)])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (event([5, 6], [5, 7], 2, 1), "expected as many of each"),
        (event([5], [5], 2, 1), "expected as many of each"),
        (b'{"error":{"message":"no"}}', "event of no known form"),
        (event([5], [5], 1, 1, weight_version="default"), "'default', expected a number"),
        (event([5], [5], 1, 1, weight_versions=[{"version": "1", "start": 0, "end": 2}]), "expected spans over 1 tokens"),
    ],
)  # fmt: skip
def test_an_event_that_does_not_follow_is_the_engines_end(data: bytes, error: str) -> None:
    with pytest.raises(EngineLost, match=error):
        Stream("1").take(data)


def test_a_log_probability_that_is_no_number_is_nan() -> None:
    (found,) = Stream("1").take(event([5], [5], 1, 1).replace(b"-1.5", b"null")).logprobs
    assert found != found
