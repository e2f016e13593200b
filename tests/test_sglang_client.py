"""The SGLang generator against a server that speaks SGLang's interface: numbers, versions, exchanges, and what is handed back."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sglang_cases
import torch
import vllm_cases as cases
from sglang_cases import steps
from vllm_cases import finish, forcing, fresh_logprobs, ticket, torch_generator, weights

from engine.config import SglangEngine
from engine.generate_engine import EngineGenerator
from engine.generate_sglang_http import Api
from engine.generate_sglang_server import free_port
from engine.generate_sglang_weights import WeightGroup
from engine.generate_torch import WeightsRefused
from protocols.messages import HandBack, Sampling, Ticket

FORCED, STOP = 77, 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_folder(tmp_path_factory.mktemp("sglang") / "model")


@pytest.fixture(scope="module")
def keeping(model: Path) -> Iterator[EngineGenerator]:
    generator = sglang_cases.start(model, sglang_cases.engine(model.parent))
    yield generator
    generator.close()


@pytest.fixture(scope="module")
def recomputing(model: Path) -> Iterator[EngineGenerator]:
    """The other protocol, and tokens three at a time."""
    config = sglang_cases.engine(model.parent, version="0.5.23", on_new_weights="recompute", stream_interval=3)
    generator = sglang_cases.start(model, config)
    yield generator
    generator.close()


def test_log_probabilities_and_finishes(keeping: EngineGenerator, model: Path) -> None:
    items = [ticket(1, 20, 3, max_tokens=12), ticket(2, 5, 2, max_tokens=9, temperature=0.7), ticket(3, 8, 2, top_k=4)]
    new = weights(model, 1)
    keeping.load(new, 1)
    for item in items:
        keeping.add(item)
    done = finish(keeping)
    assert keeping.held() == []
    assert not keeping.ready
    for item in items:
        for sample in item.samples:
            rollout = done[item.group, sample]
            np.testing.assert_allclose(rollout.logprobs, fresh_logprobs(model, new, item, rollout.tokens), atol=1e-4)
            assert rollout.versions == [(1, len(rollout.tokens))]
            assert rollout.finish == "length"
    keeping.load(forcing(model, STOP), 2)
    keeping.add(ticket(4, 8, 1))
    rollout = finish(keeping)[4, 0]
    assert (rollout.tokens.tolist(), rollout.finish) == ([STOP], "stop")


@pytest.mark.parametrize("fixture", ["keeping", "recomputing"])
def test_after_an_exchange_in_flight_tokens_come_from_the_new_weights(
    request: pytest.FixtureRequest, fixture: str, model: Path
) -> None:
    engine: EngineGenerator = request.getfixturevalue(fixture)
    old, new, item = weights(model, 2), forcing(model, FORCED), ticket(6, 20, 4, max_tokens=200)
    engine.load(old, 2)
    engine.stage(new, 3)
    engine.add(item)
    steps(engine, 20)
    engine.load(new, 3)
    late = ticket(7, 20, 2, max_tokens=5)
    engine.add(late)
    done = finish(engine)
    for sample in item.samples:
        rollout = done[6, sample]
        assert [version for version, _ in rollout.versions] == [2, 3]
        made = rollout.versions[0][1]
        assert rollout.tokens[made:].tolist() == [FORCED] * (200 - made)
        expected = fresh_logprobs(model, old, item, rollout.tokens)[:made]
        np.testing.assert_allclose(rollout.logprobs[:made], expected, atol=1e-4)
    for sample in late.samples:
        assert (done[7, sample].tokens.tolist(), done[7, sample].versions) == ([FORCED] * 5, [(3, 5)])
    engine.load(weights(model, 4), 4)


@pytest.mark.parametrize("fixture", ["keeping", "recomputing"])
def test_what_is_handed_back_goes_on_here_and_on_our_own_generator(
    request: pytest.FixtureRequest, fixture: str, model: Path
) -> None:
    engine: EngineGenerator = request.getfixturevalue(fixture)
    new, item = weights(model, 7), ticket(10, 20, 4, max_tokens=200)
    engine.load(new, 7)
    engine.add(item)
    steps(engine, 40)
    (handed,) = engine.hand_back()
    assert isinstance(handed, HandBack), handed
    assert (handed.group, handed.fence, sorted(handed.samples), engine.ready) == (10, 1, [0, 1, 2, 3], False)
    again = ticket(10, 20, 4, fence=2, max_tokens=100, resume=list(handed.partials))
    engine.add(again)
    other = torch_generator(model, new, 8)
    other.add(again)
    for done, version in [(finish(engine), 7), (finish(other), 8)]:
        for partial in handed.partials:
            rollout, size = done[10, partial.sample], len(partial.tokens)
            assert rollout.tokens[:size].tolist() == partial.tokens.tolist()
            np.testing.assert_array_equal(rollout.logprobs[:size], partial.logprobs)
            np.testing.assert_allclose(rollout.logprobs, fresh_logprobs(model, new, again, rollout.tokens), atol=1e-4)
            assert sum(count for number, count in rollout.versions if number == 7) >= size
            assert rollout.versions[-1][0] == version
            assert rollout.fence == 2


def test_what_is_cancelled_or_issued_anew_is_dropped(keeping: EngineGenerator, model: Path) -> None:
    keeping.load(weights(model, 8), 8)
    keeping.add(ticket(11, 20, 8, max_tokens=400))  # every slot
    keeping.add(ticket(12, 20, 2, max_tokens=10))
    steps(keeping, 30)
    keeping.cancel(11, fence=2)
    assert [(held.group, held.fence) for held in keeping.held()] == [(11, 1), (12, 1)]
    keeping.add(Ticket(11, [0, 1], 2, ticket(11, 20, 1).prompt, Sampling(max_tokens=3), 5))
    assert [(held.group, held.fence) for held in keeping.held()] == [(11, 1), (12, 1), (11, 2)]
    keeping.cancel(11, fence=1)
    done = finish(keeping)
    assert {(r.group, r.fence, len(r.tokens)) for r in done.values()} == {(12, 1, 10), (11, 2, 3)}


def test_weights_that_are_not_the_models_change_nothing(keeping: EngineGenerator, model: Path) -> None:
    new, item = weights(model, 9), ticket(13, 12, 1)
    keeping.load(new, 9)
    wrong = {name: tensor for name, tensor in weights(model, 10).items() if name != "model.norm.weight"}
    with pytest.raises(WeightsRefused, match=r"version 10.*1 missing: model.norm.weight"):
        keeping.load(wrong, 10)
    with pytest.raises(FloatingPointError, match="version 10 give logits that are not finite"):
        keeping.load({name: tensor * torch.nan for name, tensor in new.items()}, 10)
    assert keeping.version == 9
    keeping.add(item)
    rollout = finish(keeping)[13, 0]
    np.testing.assert_allclose(rollout.logprobs, fresh_logprobs(model, new, item, rollout.tokens), atol=1e-4)


def test_a_server_given_by_its_address_outlives_its_generators(model: Path) -> None:
    port = free_port()
    arguments = {
        "model-path": model, "host": "127.0.0.1", "port": port, "dtype": "float32", "tp-size": 1, "context-length": 512,
        "stream-interval": 1, "version": "0.5.23",
    }  # fmt: skip
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    command = [sglang_cases.interpreter(model.parent), sglang_cases.FAKE, *flags, "--session"]
    server = subprocess.Popen([*command, "--disable-overlap-schedule"])
    config = SglangEngine(slots=4, address=f"http://127.0.0.1:{port}", start_s=60.0, deadline_s=20.0)
    try:
        for version in (1, 2):  # the second takes the weights' group over
            generator = sglang_cases.start(model, config)
            new, item = weights(model, version), ticket(1, 5, 2, max_tokens=5)
            generator.load(new, version)
            generator.add(item)
            for (_, _), rollout in finish(generator).items():
                expected = fresh_logprobs(model, new, item, rollout.tokens)
                np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)
            generator.close()
            assert server.poll() is None
        check_buckets(Api(config.address or "", deadline_s=20.0), weights(model, 3))
    finally:
        server.kill()
        server.wait(20)


def check_buckets(api: Api, new: cases.Weights) -> None:
    """Weights that do not fit into one request are sent with several, and count as new with the last of them."""
    group = WeightGroup(api, ranks=1, timeout_s=20.0, bucket_bytes=1000)
    api.post("/begin_weight_update", {})
    group.send(new, "3")
    api.post("/end_weight_update", {})
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        if name in new:
            read = api.post("/get_weights_by_name", {"name": name, "truncate_size": 2})["value"]
            np.testing.assert_array_equal(np.array(read), new[name][:2].numpy())
    group.close()
    api.close()


def test_a_leash_ends_a_command_and_its_children_with_the_process_that_holds_it() -> None:
    """The holder is killed; the command's child has left a trace of its pid."""
    leash = str(sglang_cases.ROOT / "engine/leash.py")
    code = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-I', '-S', {leash!r}, str(os.getpid()), 'sh', '-c', "
        "'sleep 600 & sleep 600'], start_new_session=True)\n"
        "print('started', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "started\n"
    deadline = time.monotonic() + 20
    while len(below := sglang_cases.children(holder.pid)) < 4:  # leash, shell, two sleeps
        assert time.monotonic() < deadline
    holder.kill()
    holder.wait(20)
    while any(map(cases.alive, below)):
        assert time.monotonic() < deadline, below
        time.sleep(0.05)
