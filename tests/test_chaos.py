"""Faults survived without a person: real processes of a real run, killed and stopped one after the other, and all at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import zmq
from audited_run import config_of
from stored_run import new_log

from engine.gathered import Gathered
from engine.models import create_model
from engine.weights import Publisher, Terms
from protocols.codec import decode, encode
from protocols.link import Client, Received, Server
from protocols.link_messages import Ack, Announce, Goodbye, Hello
from protocols.messages import BOOL, FLOAT, INT, Batch, Message, Plan, PlanRequest, Pull
from tools.faults.campaign import Campaign
from tools.faults.drill import Fault, Outcome, Severed, possible
from tools.faults.result import Result, Run, Settings, read, write
from workers.learner import Learner, Over
from workers.restarts import Again, GivenUp, Patience, Restarts
from workers.run_folder import being_written
from workers.supervise import Exit
from workers.weight_feed import WeightFeed

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "tools" / "faults" / "chaos.toml"


@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="kills by /proc and SIGSTOP: needs Linux, as Headrace itself does")
def test_each_role_killed_once_and_the_run_is_whole(tmp_path: Path) -> None:
    """One of each: a generator, the reward, the learner and the buffer killed, a generator and the reward stopped for
    longer than a lease, and at last everything killed at once. Every log is audited and trained again afterwards. While
    the one generator, or the learner, is gone, no step is made: so few steps suffice."""
    report = tmp_path / "chaos.json"
    command = [
        sys.executable, "-m", "tools.faults", str(CONFIG), "--kills", "6", "--power-cuts", "1", "--seed", "7",
        "--pause", "0.2", "--stops", "5",
        "--out", str(tmp_path), "--json", str(report), "--limit", "600", "--recover", "240",
        "--set", "steps=80", "--set", "generator.count=1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["violations"] == []
    assert {name: row["faults"] for name, row in found["roles"].items()} == {
        "buffer, kill": 1, "everything, power": 1, "generator, kill": 1, "generator, stop": 1, "learner, kill": 1,
        "reward, kill": 1, "reward, stop": 1,
    }  # fmt: skip
    for run in found["result"]["runs"]:
        assert run["code"] == 0
        assert run["steps"] == 80
        assert "80 steps verified (1 to 80)" in run["verified"]
        assert run["checks"]["plans"].startswith("80 committed steps, 640 groups planned")


def test_every_fault_comes_once_and_the_ranks_stand_for_their_learner() -> None:
    names = ["buffer", "learner", "learner rank 0", "learner rank 1", "generator-0", "reward-0"]
    faults = possible(names, [5.0], Random(3))
    assert sorted((f.kind, f.target) for f in faults) == [
        ("kill", "buffer"), ("kill", "generator-0"), ("kill", "learner rank 0"), ("kill", "learner rank 1"),
        ("kill", "reward-0"), ("stop", "generator-0"), ("stop", "reward-0"),
    ]  # fmt: skip
    assert {f.stop_s for f in faults if f.kind == "stop"} == {5.0}
    assert {f.role for f in faults} == {"buffer", "generator", "learner rank", "reward"}


def test_a_campaign_that_was_stopped_goes_on_with_the_run_that_was_not_checked(tmp_path: Path) -> None:
    settings = Settings(
        config=str(CONFIG), overrides=[], out=tmp_path / "runs", kills=5, power_cuts=2, seed=3, recover_s=1.0, limit_s=1.0,
        pause_s=0.0, stops_s=[5.0], cuts=2,
    )  # fmt: skip
    severed = Severed(held=2, reissued=8, steps=3, step=7, current_s=1.5, connects=1, refused=8)
    faults = [Fault("kill", "buffer"), Fault("stop", "reward-0", 5.0), Fault("power", "everything")]
    outcomes = [Outcome("chaos-3-1", fault, 4, back_s=1.0, step_s=2.0) for fault in faults]
    outcomes.append(Outcome("chaos-3-2", Fault("cut", "generator-far", 30.0), 4, severed=severed))
    runs = [Run("chaos-3-1", 80, 0, 9.0, checked=True), Run("chaos-3-2", 0, None, 0.0)]
    write(tmp_path / "chaos.json", settings, Result(outcomes, runs), seconds=11.0)
    known, earlier = read(tmp_path / "chaos.json")
    assert (known, earlier) == (settings, Result(outcomes, runs))
    campaign = Campaign(known, print, tell=lambda: None, earlier=earlier)
    assert (campaign.kills_left, campaign.power_left, campaign.cuts_left) == (3, 1, 1)
    assert campaign.next_name() == "chaos-3-2"
    runs[1].checked = True
    assert Campaign(known, print, tell=lambda: None, earlier=Result(outcomes, runs)).next_name() == "chaos-3-3"


# --- what faults have brought to light -----------------------------------------------------------------------------------


def test_a_role_by_whose_work_the_run_got_further_has_its_attempts_back() -> None:
    restarts = Restarts(["buffer", "generator-0"], Patience(attempts=2, backoff_s=1.0))
    killed = Exit("generator-0", -9, 20.0, "")
    for _ in range(50):
        assert restarts.ended(killed, 0.0, worked=True) == Again(1.0, 1)
    assert restarts.ended(killed, 0.0) == Again(2.0, 2)
    assert restarts.ended(killed, 0.0) == GivenUp(3, [])


def next_version(feed: WeightFeed, timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (update := feed.poll()) is not None:
            with update:
                return update.version
        time.sleep(0.02)
    return None


@pytest.fixture
def feed() -> Iterator[WeightFeed]:
    feed = WeightFeed("g", device="cpu", peer_timeout_s=20.0)
    yield feed
    feed.close()


def test_a_learner_that_retrains_the_log_sets_no_generator_back(feed: WeightFeed) -> None:
    """It publishes its checkpoint's weights and each step's after that, which generators have had."""
    weights = {"weight": torch.arange(6.0)}
    first = Publisher("127.0.0.1", Terms(bucket_bytes=1 << 20, peer_timeout_s=10.0))
    first.publish(7, weights)
    feed.connect(Announce(*first.address))
    assert next_version(feed, 20.0) == 7
    first.close()
    second = Publisher("127.0.0.1", Terms(bucket_bytes=1 << 20, peer_timeout_s=10.0))
    try:
        second.publish(5, weights)
        feed.connect(Announce(*second.address))
        second.wait(20.0)
        assert next_version(feed, 0.5) is None
        second.publish(7, weights)
        second.wait(20.0)
        assert next_version(feed, 0.5) is None
        second.publish(8, weights)
        assert next_version(feed, 20.0) == 8
    finally:
        second.close()


def asked(server: Server, kind: type[Message], timeout_s: float = 30.0) -> str:
    """Waits for a question of this kind, acknowledges it without an answer, and says who asked."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for event in server.poll(0.1):
            if isinstance(event, Received) and event.id:
                server.ack(event.worker, event.id)
                if isinstance(event.message, kind):
                    server.poll(0.0)
                    return event.worker
    raise AssertionError(f"waited {timeout_s} s for a {kind.__name__}")


def test_a_learner_asks_the_buffer_that_comes_after_the_one_that_knew_what_it_waits_for(tmp_path: Path) -> None:
    """Plan and groups: a buffer that dies after it has acknowledged the question takes the answer with it."""
    config = config_of(tmp_path)
    create_model(config.model, config.run_dir / "model", 0)  # type: ignore[arg-type]
    empty = np.zeros(0, INT)
    group = np.array([4], INT)
    batch = Batch(
        step=1, groups=group, prompt_lengths=np.array([0], INT), prompts=empty, sizes=np.array([0], INT), lengths=empty,
        tokens=empty, logprobs=np.zeros(0, FLOAT), versions=empty, rewards=np.zeros(0, FLOAT), correct=np.zeros(0, BOOL),
        truncated=np.zeros(0, BOOL),
    )  # fmt: skip
    answers: dict[type[Message], Message] = {PlanRequest: Plan(1, []), Pull: batch}
    server = Server("tcp://127.0.0.1:0", heartbeat_s=0.2, peer_timeout_s=10.0)
    address = server.address
    hello = Hello(role="learner", name="learner-0", host="here", pid=1)
    with ThreadPoolExecutor(1) as pool:
        try:
            connecting = pool.submit(Client, address, hello, timeout_s=20.0)
            while not connecting.done():
                server.poll(0.05)
            learner = Learner(config, connecting.result(), address, rank=0, world=1, device="cpu")
            for question, ask in ((PlanRequest, lambda: learner.plan(1)), (Pull, lambda: learner.pull(1, [4]))):
                waiting = pool.submit(ask)
                asked(server, question)
                server.close()
                server = Server(address, heartbeat_s=0.2, peer_timeout_s=10.0)
                began = time.monotonic()
                server.send(asked(server, question), answers[question])
                while not waiting.done() and time.monotonic() < began + 20.0:
                    server.poll(0.05)
                assert waiting.result(timeout=0.0) is not None
                assert time.monotonic() - began < 20.0, "it waited until it asks again anyway"
            learner.client.close()
            if learner.publisher is not None:
                learner.publisher.close()
        finally:
            server.close()


class Deserted:
    """A keeper whose first rank is gone."""

    def keep(self, version: int, tensors: Gathered, *, fingerprints: dict[str, str] | None = None) -> None:
        raise ConnectionError("the first rank's store is lost")


@pytest.mark.parametrize("over", [True, False])
def test_a_rank_that_the_first_one_has_left_leaves_with_it_if_the_run_is_over(tmp_path: Path, over: bool) -> None:
    config = config_of(tmp_path)
    create_model(config.model, config.run_dir / "model", 0)  # type: ignore[arg-type]
    hello = Hello(role="learner", name="learner-0", host="here", pid=1)
    server = Server("tcp://127.0.0.1:0", heartbeat_s=0.2, peer_timeout_s=10.0)
    with ThreadPoolExecutor(1) as pool, closing(server):
        connecting = pool.submit(Client, server.address, hello, timeout_s=20.0)
        while not connecting.done():
            server.poll(0.05)
        learner = Learner(config, connecting.result(), server.address, rank=0, world=1, device="cpu")
        with closing(learner.client):
            assert learner.publisher is not None
            learner.publisher.close()
            if over:
                server.send("learner-0", Goodbye("complete"))
            keeping = pool.submit(learner._keep, Deserted(), 1, None)  # type: ignore[arg-type]
            while not keeping.done():
                server.poll(0.05)
            with pytest.raises(Over if over else ConnectionError):
                keeping.result()


def test_a_log_is_being_written_until_its_writer_is_gone(tmp_path: Path) -> None:
    """What a launcher waits for before it starts a buffer: the one of a launcher that was killed may be there still."""
    log = new_log(tmp_path / "run")
    assert being_written(log.path)
    log.close()
    assert not being_written(log.path)


def test_a_generator_that_the_buffer_refuses_is_not_started_anew(tmp_path: Path) -> None:
    options = ["--set", f'runs="{tmp_path}"', "--set", 'name="refused"']
    cli = [sys.executable, "-m", "workers.cli"]
    subprocess.run([*cli, "model", str(CONFIG), *options], cwd=ROOT, check=True, timeout=120)
    context = zmq.Context()
    buffer = context.socket(zmq.ROUTER)
    buffer.setsockopt(zmq.LINGER, 0)
    port = buffer.bind_to_random_port("tcp://127.0.0.1")
    command = [*cli, "generator", str(CONFIG), *options, "--join", f"tcp://127.0.0.1:{port}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert buffer.poll(120_000), "no hello came"
        identity, *frames = buffer.recv_multipart()
        id, _ = decode(frames)
        buffer.send_multipart([identity, *encode(Ack(id, "protocol: the buffer speaks 9"), 0)])
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
        context.destroy()
    assert process.returncode == 2, err
    assert "the buffer speaks 9" in err
