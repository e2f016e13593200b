"""`launch --on ray` on a cluster of two nodes in a network namespace of their own, one of which is lost."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from slurm_cluster import no_namespaces, run, wait_for

from protocols.log import Log

ROOT = Path(__file__).resolve().parent.parent
RAY = Path(sys.executable).with_name("ray")
SHORT = [
    "cold_start=", "eval.prompts=0", "buffer.dynamic_sampling=false", "buffer.groups_per_step=8", "generator.count=2",
    "placement.ray.resources={learner={home=1},reward={home=1}}", "steps=100",
]  # fmt: skip


class RayNodes:
    """Everything in the namespace is ours to end."""

    def __init__(self, folder: Path) -> None:
        self.space = f"hr{os.getpid()}ray"
        self.folder = folder
        self.env = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []

    def command(self, *command: str) -> list[str]:
        where = ["nsenter", f"--net=/run/netns/{self.space}"]
        return [*where, "env", *(f"{key}={value}" for key, value in self.env.items()), *command]

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        common = ["--block", "--object-store-memory=80000000", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
        with (self.folder / "ray.log").open("ab") as log:
            process = subprocess.Popen(
                self.command(str(RAY), "start", *options, *common),
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
            )
        self.processes.append(process)
        return process

    def nodes(self) -> int:
        code = "import ray; ray.init('auto', log_to_driver=False, logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
        asked = subprocess.run(self.command(sys.executable, "-c", code), capture_output=True, text=True, timeout=60)
        return int(asked.stdout.split()[-1]) if asked.returncode == 0 and asked.stdout.split() else 0

    def newest_node(self) -> psutil.Process:
        """The daemon of the node that was started last; below it are its workers, and what they started."""
        listed = run("ip", "netns", "pids", self.space).split()
        daemons = [process for process in map(psutil.Process, map(int, listed)) if process.name() == "raylet"]
        return max(daemons, key=lambda process: process.create_time())

    def close(self) -> None:
        for _ in range(2):
            listed = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True, timeout=30)
            processes = []
            for pid in listed.stdout.split():
                try:
                    processes.append(psutil.Process(int(pid)))
                    processes[-1].kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(processes, timeout=10.0)
        for process in self.processes:
            process.wait(30.0)
        subprocess.run(["ip", "netns", "delete", self.space], capture_output=True, timeout=30)


@pytest.fixture
def cluster() -> Iterator[RayNodes]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("no Ray here; get it with: pip install -e '.[ray]'")
    if (why := no_namespaces()) is not None:
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="hr") as folder:
        nodes = RayNodes(Path(folder))
        run("ip", "netns", "add", nodes.space)
        run("ip", "-n", nodes.space, "link", "set", "lo", "up")
        try:
            nodes.start("--head", "--port=6379", "--num-cpus=4", '--resources={"home":4}', "--include-dashboard=false")
            wait_for("Ray's head", lambda: nodes.nodes() == 1, 120.0)
            yield nodes
        finally:
            nodes.close()


def launch(runs: Path, *more: str) -> list[str]:
    sets = [word for each in [f"runs={runs}", *SHORT, *more] for word in ("--set", each)]
    return [sys.executable, "-m", "workers.cli", "launch", "configs/quickstart.toml", "--on", "ray", "--no-view", *sets]


def test_a_learner_over_two_nodes(cluster: RayNodes, tmp_path: Path) -> None:
    cluster.start("--address=127.0.0.1:6379", "--num-cpus=1")
    wait_for("the second node", lambda: cluster.nodes() == 2, 120.0)
    second, log = cluster.newest_node(), tmp_path / "launched.log"
    spread = ["learner.ranks=2", "placement.learner.nodes=2", "generator.count=1", "placement.ray.resources={}"]
    command = launch(tmp_path, *spread, "steps=30")
    with log.open("wb") as out:
        launched = subprocess.Popen(cluster.command(*command), cwd=ROOT, stdout=out, stderr=out)
    try:
        wait_for("a rank there", lambda: holds(second, "learner") or launched.poll() is not None, 180.0)
        assert launched.poll() is None, log.read_text()
        launched.wait(timeout=240)
    finally:
        launched.kill()
        launched.wait(30.0)
    assert launched.returncode == 0, log.read_text()
    with Log.open(tmp_path / "quickstart" / "rollouts.db") as read:
        assert read.last_step() == 30


def holds(node: psutil.Process, role: str) -> bool:
    """Whether a process of this role runs below a node's daemon."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(role in process.cmdline() for process in node.children(recursive=True))
    return False


def test_a_run_on_ray_survives_the_loss_of_a_generators_node(cluster: RayNodes, tmp_path: Path) -> None:
    command = launch(tmp_path)
    small = subprocess.run(
        cluster.command(*command, "--set", "placement.generator.cpus=9"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert small.returncode == 2, small.stderr
    assert "need 21 CPU, the Ray cluster has 4" in small.stderr

    cluster.start("--address=127.0.0.1:6379", "--num-cpus=1")
    wait_for("the second node", lambda: cluster.nodes() == 2, 120.0)
    second = cluster.newest_node()  # the head has room for one generator
    log, metrics = tmp_path / "launched.log", tmp_path / "quickstart" / "metrics.jsonl"
    with log.open("wb") as out:
        launched = subprocess.Popen(cluster.command(*command), cwd=ROOT, stdout=out, stderr=out)
    try:
        wait_for("a step", lambda: metrics.exists() or launched.poll() is not None, 180.0)
        assert launched.poll() is None, log.read_text()
        cluster.start("--address=127.0.0.1:6379", "--num-cpus=1")
        wait_for("the third node", lambda: cluster.nodes() == 3, 120.0)
        node = [second, *second.children(recursive=True)]
        assert any("generator" in process.cmdline() for process in node), [p.cmdline()[-12:] for p in node]
        for process in node:
            process.kill()
        launched.wait(timeout=240)
    finally:
        launched.kill()
        launched.wait(30.0)
    text = log.read_text()
    assert launched.returncode == 0, text
    assert "it is started anew" in text
    with Log.open(tmp_path / "quickstart" / "rollouts.db") as read:
        assert read.last_step() == 100
    assert "says goodbye" in (tmp_path / "quickstart" / "logs" / "generator-0.log").read_text()
