"""Faults survived without a person: real processes of a real run, killed and stopped one after the other, and all at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
import zmq

from engine.weights import Publisher
from protocols.codec import decode, encode
from protocols.messages import Ack, Announce
from tools.faults.drill import possible
from workers.restarts import Again, GivenUp, Patience, Restarts
from workers.supervise import Exit
from workers.weight_feed import WeightFeed

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "tools" / "faults" / "chaos.toml"


@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="kills by /proc and SIGSTOP: needs Linux, as Headrace itself does")
def test_each_role_killed_once_and_the_run_is_whole(tmp_path: Path) -> None:
    """One of each: a generator, the reward, the learner and the buffer killed, a generator and the reward stopped for
    longer than a lease. Every log is audited and trained again afterwards."""
    report = tmp_path / "chaos.json"
    command = [
        sys.executable, "-m", "tools.faults", str(CONFIG), "--kills", "6", "--seed", "7", "--pause", "0.2", "--stops", "5",
        "--out", str(tmp_path), "--json", str(report), "--limit", "600", "--recover", "240",
        "--set", "steps=240", "--set", "generator.count=1", "--set", "buffer.groups_per_step=16",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["violations"] == []
    assert {name: row["faults"] for name, row in found["roles"].items()} == {
        "buffer, kill": 1, "generator, kill": 1, "generator, stop": 1, "learner, kill": 1, "reward, kill": 1, "reward, stop": 1,
    }  # fmt: skip
    for run in found["result"]["runs"]:
        assert run["code"] == 0
        assert run["steps"] == 240
        assert "240 steps verified (1 to 240)" in run["verified"]
        assert run["checks"]["plans"].startswith("240 committed steps, 3840 groups planned")


def test_every_fault_comes_once_and_the_ranks_stand_for_their_learner() -> None:
    names = ["buffer", "learner", "learner rank 0", "learner rank 1", "generator-0", "reward-0"]
    faults = possible(names, [5.0], Random(3))
    assert sorted((f.kind, f.target) for f in faults) == [
        ("kill", "buffer"), ("kill", "generator-0"), ("kill", "learner rank 0"), ("kill", "learner rank 1"),
        ("kill", "reward-0"), ("stop", "generator-0"), ("stop", "reward-0"),
    ]  # fmt: skip
    assert {f.stop_s for f in faults if f.kind == "stop"} == {5.0}
    assert {f.role for f in faults} == {"buffer", "generator", "learner rank", "reward"}


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
    first = Publisher("127.0.0.1", device="cpu", bucket_bytes=1 << 20, peer_timeout_s=10.0)
    first.publish(7, weights)
    feed.connect(Announce(*first.address))
    assert next_version(feed, 20.0) == 7
    first.close()
    second = Publisher("127.0.0.1", device="cpu", bucket_bytes=1 << 20, peer_timeout_s=10.0)
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
