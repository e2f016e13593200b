"""A Slurm of several nodes on one machine: each node has a network namespace of its own, joined by a bridge, so that nodes
reach one another by addresses beyond loopback and nothing else reaches them. As root, without systemd.

By hand: `python tests/slurm_cluster.py COMMAND...` runs a command on the first node of such a cluster.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

NEEDS = ("slurmctld", "slurmd", "sbatch", "munged")
HOW = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge (on Debian and Ubuntu)"
CONF = """
ClusterName=headrace
SlurmctldHost=localhost(10.77.0.1)
SlurmctldPort=17900
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=FOLDER/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=FOLDER/state
SlurmdSpoolDir=FOLDER/spool/%n
SlurmctldPidFile=FOLDER/slurmctld.pid
SlurmdPidFile=FOLDER/slurmd-%n.pid
SlurmctldLogFile=FOLDER/log/slurmctld.log
SlurmdLogFile=FOLDER/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
SlurmctldTimeout=10
SlurmdTimeout=30
ReturnToService=2
InactiveLimit=0
KillWait=3
MinJobAge=300
PartitionName=test Nodes=ALL Default=YES MaxTime=30 State=UP
"""


def missing() -> str | None:
    """Why there can be no such cluster here, and how to get one."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    if lacking := [name for name in NEEDS if shutil.which(name) is None]:
        return f"no {', '.join(lacking)} on this machine; get Slurm with: {HOW}"
    return no_namespaces()


def no_namespaces() -> str | None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and `ip` (package iproute2) for network namespaces of its own"
    name = f"hr{os.getpid()}t"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=30)
    if made.returncode != 0:
        return f"needs network namespaces: ip netns add: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True, timeout=30)
    return None


def run(*command: str, timeout_s: float = 60.0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
    return done.stdout


class Cluster:
    """Nodes n1, n2, ...; the controller is on the first."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, [f"n{k}" for k in range(1, nodes + 1)]
        self.prefix = f"hr{os.getpid()}"
        self.env = {"SLURM_CONF": str(folder / "slurm.conf"), "GLOO_SOCKET_IFNAME": "eth0"}

    def space(self, node: str) -> str:
        return self.prefix + node

    def on(self, node: str, *command: str) -> list[str]:
        """The command that runs there. Not `ip netns exec`: that mounts another /sys, in which slurmd finds no cgroups."""
        where = ["nsenter", f"--net=/run/netns/{self.space(node)}"]
        return [*where, "env", *(f"{key}={value}" for key, value in self.env.items()), *command]

    def up(self) -> None:
        folder = self.folder
        for name in ("state", "log", "spool", "munge"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        (folder / "munge").chmod(0o700)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        lines = [CONF.replace("FOLDER", str(folder))]
        for k, node in enumerate(self.nodes, 1):
            lines.append(
                f"NodeName={node} NodeHostname=localhost NodeAddr=10.77.0.{k} Port={17900 + k} CPUs=4 RealMemory=8000\n"
            )
        (folder / "slurm.conf").write_text("".join(lines))
        self._wire()
        munge = [f"--{name}={folder}/munge/{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file")]
        more = [f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed", "--num-threads=2"]
        run(*self.on("n1", "munged", "--force", *munge, *more))
        run(*self.on("n1", "slurmctld", "-i"))
        for node in self.nodes:
            run(*self.on(node, "slurmd", "-N", node))
        wait_for(
            "all nodes to be idle",
            lambda: self.slurm("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(self.nodes),
        )

    def slurm(self, *command: str) -> str:
        return run(*self.on("n1", *command))

    def _wire(self) -> None:
        switch = self.space("sw")
        run("ip", "netns", "add", switch)
        run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "br0", "up")
        for k, node in enumerate(self.nodes, 1):
            space, port = self.space(node), f"p{k}"
            run("ip", "netns", "add", space)
            run("ip", "link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", port, "netns", switch)
            run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
            run("ip", "-n", space, "addr", "add", f"10.77.0.{k}/24", "dev", "eth0")
            run("ip", "-n", space, "link", "set", "eth0", "up")
            run("ip", "-n", space, "link", "set", "lo", "up")

    def processes(self, node: str) -> list[psutil.Process]:
        found = subprocess.run(["ip", "netns", "pids", self.space(node)], capture_output=True, text=True, timeout=30)
        processes = []
        for pid in found.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                processes.append(psutil.Process(int(pid)))
        return processes

    def lose(self, node: str) -> None:
        """As if its power went: everything on it is killed, its daemon first; the controller is told, as it would find out."""
        for process in sorted(self.processes(node), key=lambda process: process.create_time()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def down(self) -> None:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.slurm("scancel", "--quiet", "--full", "--state=RUNNING")
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = [process for node in self.nodes for process in self.processes(node)]
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            psutil.wait_procs(left, timeout=10.0)
        for name in ("sw", *self.nodes):
            subprocess.run(["ip", "netns", "delete", self.space(name)], capture_output=True, timeout=30)


@contextlib.contextmanager
def cluster(folder: Path, nodes: int) -> Iterator[Cluster]:
    made = Cluster(folder, nodes)
    try:
        made.up()
        yield made
    finally:
        made.down()


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.1)


def main(command: Sequence[str]) -> int:
    if (why := missing()) is not None:
        raise SystemExit(why)
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder) / "slurm", 4) as made:
        return subprocess.run(made.on("n1", *command)).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
