"""The generator role as a process of its own, with the link's real server as buffer and a real publisher as learner."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.attention import NAME
from engine.config import Config, NewModel, parse_config
from engine.models import create_model, load_model, named_weights
from engine.start_folder import policy_folder
from engine.text import TextModel
from engine.weights import Publisher, Terms
from protocols.link import Joined, Left, Received, Server
from protocols.link_messages import Announce, Goodbye, Heartbeat, Welcome
from protocols.messages import INT, HandBack, Message, Rollout, Sampling, Ticket

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import json, os, sys
from pathlib import Path
from engine.config import parse_config
from workers.generator import run
code = run(parse_config(json.loads(Path(sys.argv[1]).read_text()), "test"), sys.argv[2], sys.argv[3], gone_s=6.0)
sys.stderr.flush()
os._exit(code)
"""
CONTEXT = 4096
ALPHABET = "abcdefghijklmnopqrstuvwxyz " + "".join(map(chr, range(0x4E00, 0x4E00 + 4000)))
"""So many that random weights seldom draw the stop token: long responses are still under way when a test acts."""
LONG = 2000


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with a tiny new model, which lies ready."""
    folder = tmp_path_factory.mktemp("runs")
    model = NewModel(alphabet=ALPHABET, hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, context=CONTEXT)
    data = {
        "name": "test", "runs": str(folder), "steps": 1, "tasks": [], "objective": {"type": "dapo"},
        "model": {"type": "new", "alphabet": ALPHABET, "hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1,
                  "intermediate": 64, "context": CONTEXT},
        "buffer": {"groups_per_step": 1}, "learner": {"lr": 1e-6, "peer_timeout_s": 10.0},
        "generator": {"sampling": {"max_tokens": 8}, "engine": {"type": "torch", "slots": 8}, "device": "cpu"},
    }  # fmt: skip
    found = parse_config(data, "test")
    create_model(model, policy_folder(found), seed=3)
    (folder / "config.json").write_text(json.dumps(data))
    return found


def weights(config: Config, version: int) -> dict[str, torch.Tensor]:
    """Other weights for each version; large ones, so that log-probabilities tell them apart."""
    made = torch.Generator().manual_seed(version)
    shapes = named_weights(load_model(policy_folder(config), dtype="float32", device="cpu"))
    return {name: t.detach() + torch.randn(t.shape, generator=made) * 0.2 for name, t in shapes.items()}


class Buffer:
    """What the buffer does with generators: acknowledge results, note everything else."""

    def __init__(self) -> None:
        self.server = Server("tcp://127.0.0.1:0", heartbeat_s=0.2, peer_timeout_s=10.0)
        self.hellos: dict[str, Joined] = {}
        self.left: set[str] = set()
        self.rollouts: dict[tuple[int, int], Rollout] = {}
        self.handed: list[HandBack] = []
        self.beats: dict[str, Heartbeat] = {}

    def announce(self, learner: Publisher) -> None:
        where = Announce(*learner.address)
        self.server.welcome = Welcome(run="test", heartbeat_s=0.2, step=0, weights=where)
        for name in self.hellos:
            self.send(name, where)

    def send(self, name: str, *messages: Message) -> None:
        for message in messages:
            assert self.server.send(name, message)

    def tokens(self, name: str) -> float:
        """How many the worker says that it has generated."""
        return self.beats[name].counters.get("generated_tokens", 0.0) if name in self.beats else 0.0

    def until(self, condition: Callable[[], object], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:
            for event in self.server.poll(0.02):
                match event:
                    case Joined(worker):
                        self.hellos[worker] = event
                    case Left(worker):
                        self.left.add(worker)
                    case Received(worker, _, Heartbeat() as beat):
                        self.beats[worker] = beat
                    case Received(worker, id, Rollout() as rollout):
                        self.rollouts[rollout.group, rollout.sample] = rollout
                        self.server.ack(worker, id)
                    case Received(worker, id, HandBack() as handed):
                        self.handed.append(handed)
                        self.server.ack(worker, id)
                    case Received(worker, id, _):
                        self.server.ack(worker, id)
        assert condition(), (self.hellos, self.left, self.handed, self.beats)


class Worker:
    """The role's process, for `with`: killed at the end if it is still there."""

    def __init__(self, config: Config, address: str, name: str) -> None:
        command = [sys.executable, "-c", CODE, str(Path(config.runs) / "config.json"), address, name]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def handles_sigterm(self, timeout_s: float = 60.0) -> None:
        """Waits until the process has got as far as to catch the signal."""
        deadline = time.monotonic() + timeout_s
        status = Path(f"/proc/{self.process.pid}/status")
        while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
            assert time.monotonic() < deadline, f"waited {timeout_s} s for the worker to catch SIGTERM"
            time.sleep(0.05)

    def ended(self, timeout_s: float = 40.0) -> tuple[int, str]:
        """Exit code and standard error."""
        _, errors = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, errors


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    buffer = Buffer()
    yield buffer
    buffer.server.close()


@pytest.fixture
def learner(config: Config) -> Iterator[Publisher]:
    with Publisher("127.0.0.1", Terms(bucket_bytes=1 << 20, peer_timeout_s=10.0)) as publisher:
        yield publisher


def ticket(config: Config, group: int, samples: int, max_tokens: int, **options) -> Ticket:
    prompt = TextModel.load(policy_folder(config)).encode(f"group {'abcdefgh'[group]} says")
    return Ticket(group, list(range(samples)), group + 1, prompt, Sampling(max_tokens=max_tokens), group, **options)


def fresh_logprobs(config: Config, version: int, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    model = load_model(policy_folder(config), dtype="float32", device="cpu")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in named_weights(model).items():
            parameter.copy_(weights(config, version)[name])
        ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))
        full = torch.log_softmax(model(ids[None]).logits[0, len(prompt) - 1 : -1], -1)
    return full.gather(-1, ids[len(prompt) :, None])[:, 0].numpy()


def test_it_serves_verified_weights_only_adopts_new_ones_in_flight_and_ends_with_the_run(
    config: Config, buffer: Buffer, learner: Publisher
) -> None:
    with Worker(config, buffer.server.address, "g") as worker:
        buffer.until(lambda: "g" in buffer.hellos)
        hello = buffer.hellos["g"].hello
        assert (hello.role, hello.capacity, hello.pid) == ("generator", 8 + 2, worker.process.pid)
        short = ticket(config, 1, 3, 20)
        buffer.send("g", short)
        buffer.until(lambda: buffer.beats.get("g") and buffer.beats["g"].held)
        assert buffer.beats["g"].state == "waits for a learner"
        assert buffer.beats["g"].version is None
        assert [(held.group, held.fence) for held in buffer.beats["g"].held] == [(1, 2)]
        assert not buffer.rollouts

        learner.publish(4, weights(config, 4))
        buffer.announce(learner)
        buffer.until(lambda: len(buffer.rollouts) == 3)
        for rollout in buffer.rollouts.values():
            assert (rollout.group, rollout.fence) == (1, 2)
            assert rollout.versions == [(4, len(rollout.tokens))]
            assert rollout.text == TextModel.load(policy_folder(config)).decode(rollout.tokens)
            assert rollout.started_at < rollout.finished_at <= time.time()
            expected = fresh_logprobs(config, 4, short.prompt, rollout.tokens)
            np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)

        waiting = ticket(config, 2, 1, 5, min_version=5)
        buffer.send("g", waiting, *(ticket(config, group, 2, LONG) for group in (3, 4)))
        buffer.until(lambda: buffer.tokens("g") > 100)
        learner.publish(5, weights(config, 5))
        buffer.until(lambda: len(buffer.rollouts) == 3 + 5)
        assert buffer.rollouts[2, 0].versions == [(5, len(buffer.rollouts[2, 0].tokens))]
        across = [r for r in buffer.rollouts.values() if [version for version, _ in r.versions] == [4, 5]]
        assert across
        buffer.until(lambda: buffer.beats["g"].state == "waits for tickets" and buffer.beats["g"].version == 5)
        counters = buffer.beats["g"].counters
        assert (counters["finished"], counters["swaps"], buffer.beats["g"].held) == (8, 2, [])
        assert counters["busy_s"] > 0
        assert counters["idle_s"] > 0

        buffer.send("g", Goodbye("complete"))
        buffer.until(lambda: "g" in buffer.left)
        code, errors = worker.ended()
        assert (code, "complete" in errors) == (0, True)


def test_told_to_leave_it_hands_back_what_another_continues(config: Config, buffer: Buffer, learner: Publisher) -> None:
    learner.publish(0, weights(config, 0))
    buffer.announce(learner)
    long = ticket(config, 5, 4, LONG)
    with (
        Worker(config, buffer.server.address, "first") as first,
        Worker(config, buffer.server.address, "second") as second,
    ):
        buffer.until(lambda: len(buffer.hellos) == 2)
        buffer.send("first", long)
        buffer.until(lambda: buffer.tokens("first") > 40)
        first.process.send_signal(signal.SIGTERM)
        buffer.until(lambda: "first" in buffer.left)
        assert first.ended() == (0, "")
        (handed,) = buffer.handed
        assert (handed.group, handed.fence) == (5, 6)
        assert set(handed.samples) | {sample for _, sample in buffer.rollouts} == {0, 1, 2, 3}
        assert handed.partials
        again = Ticket(5, handed.samples, 7, long.prompt, long.sampling, long.seed, resume=list(handed.partials))
        buffer.send("second", again)
        buffer.until(lambda: len(buffer.rollouts) == 4)
        second.process.send_signal(signal.SIGTERM)
        buffer.until(lambda: "second" in buffer.left)
        assert second.ended() == (0, "")
    for partial in handed.partials:  # that the draws go on exactly is a matter of the engine's own tests
        whole, size = buffer.rollouts[5, partial.sample], len(partial.tokens)
        assert 0 < size < len(whole.tokens)
        np.testing.assert_array_equal(whole.tokens[:size], partial.tokens)
        np.testing.assert_array_equal(whole.logprobs[:size], partial.logprobs)


def test_it_ends_with_one_clear_error_when_going_on_cannot_help(
    config: Config, buffer: Buffer, learner: Publisher
) -> None:
    """A ticket that the model cannot serve; a buffer that is gone; and SIGTERM while nobody is there to join."""
    learner.publish(0, weights(config, 0))
    buffer.announce(learner)
    lost = Buffer()
    with (
        Worker(config, buffer.server.address, "misfit") as misfit,
        Worker(config, lost.server.address, "lost") as left_alone,
        Worker(config, "tcp://127.0.0.1:9", "early") as early,
    ):
        lost.until(lambda: "lost" in lost.beats)  # it has its welcome, then
        lost.server.close()
        buffer.until(lambda: "misfit" in buffer.hellos)
        large = Ticket(6, [0, 1], 3, np.ones(CONTEXT, INT), Sampling(max_tokens=5), 0)
        buffer.send("misfit", ticket(config, 5, 1, LONG), large)
        buffer.until(lambda: "misfit" in buffer.left)
        assert {(back.group, back.fence, tuple(back.samples)) for back in buffer.handed} == {
            (5, 6, (0,)),
            (6, 3, (0, 1)),
        }
        code, errors = misfit.ended()
        assert (code, errors.count("\n")) == (2, 1)
        assert f"group 6 (fence 3): the prompt has {CONTEXT} tokens, expected at most {CONTEXT - 1}" in errors
        early.handles_sigterm()
        early.process.send_signal(signal.SIGTERM)
        assert early.ended() == (0, "")
        code, errors = left_alone.ended()
        assert (code, errors.count("\n")) == (1, 1)
        assert "waited 6 s for a sign of life from the buffer at tcp://" in errors


def test_weights_of_another_model_are_refused(config: Config, buffer: Buffer, learner: Publisher) -> None:
    learner.publish(0, {"model.norm.weight": torch.ones(7)})
    buffer.announce(learner)
    with Worker(config, buffer.server.address, "g") as worker:
        buffer.until(lambda: "g" in buffer.left)
        code, errors = worker.ended()
    assert code == 2
    assert "model.norm.weight [7] (expected [32])" in errors


def test_the_hooked_model_is_what_is_tested(config: Config) -> None:
    model = load_model(policy_folder(config), dtype="float32", device="cpu", weights=False)
    assert model.config._attn_implementation == NAME
    assert all(torch.isnan(parameter).all() for parameter in model.parameters())
