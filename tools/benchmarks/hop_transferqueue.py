"""TransferQueue's side of the rollout hop, in a namespace of its own where nothing but loopback exists.

Ray listens on every address that it finds, so this program is started inside `unshare --net`, and inside `--pid` too: when
its first process ends, the kernel ends all that Ray has started. Producer and consumer are two Ray drivers; between
them the queue's controller and one storage unit, each an actor in its process. It gets what serves it best: tensors
that are made before the clock starts, versions as runs (expanded by the consumer), the keys by a pipe. Getting and
clearing in several threads was no faster, measured.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import psutil

from tools.benchmarks.hop_rounds import POOL, RESPONSES, TIMEOUT_S, Pair, Round, pool

PARTITION = "rollouts"
STARTS_S = 120.0
ISOLATE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")


def unavailable() -> str | None:
    """Why this side cannot be measured here; None when it can."""
    if any(find_spec(name) is None for name in ("transfer_queue", "ray")):
        return "TransferQueue is not installed: pip install -e '.[bench]'"
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "no unshare or ip command (util-linux, iproute2): Ray would listen beyond this machine"
    tried = subprocess.run([*ISOLATE, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, timeout=30)
    if tried.returncode != 0:
        return f"no network namespace for Ray, which would listen beyond this machine: {tried.stderr.strip()}"
    return None


class TransferQueueHop:
    """The far end of `main` below."""

    name = "TransferQueue"

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hop", dir="/tmp", ignore_cleanup_errors=True)
        ours, theirs = socket.socketpair()
        command = [*ISOLATE, sys.executable, "-m", "tools.benchmarks.hop_transferqueue", str(theirs.fileno())]
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "HOP_FOLDER": self._folder.name,
        }
        self._log = Path(self._folder.name, "log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdout=log, stderr=log
            )
        theirs.close()
        self._socket, self._lines = ours, ours.makefile("r")
        try:
            self._answer(STARTS_S)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Everything in the namespace: both ends, the actors, Ray's own services and its idle workers."""
        return [process.pid for process in psutil.Process(self._process.pid).children(recursive=True)]

    def ask(self, what: str, round: Round) -> float:
        self._socket.sendall(json.dumps([what, *round]).encode() + b"\n")
        return self._answer(TIMEOUT_S)

    def close(self) -> None:
        self._socket.close()
        self._process.kill()  # --kill-child: and with it the first process of the namespace, and so all others
        self._process.wait()
        self._folder.cleanup()

    def _answer(self, timeout_s: float) -> float:
        self._socket.settimeout(timeout_s)
        try:
            line = self._lines.readline()
        except TimeoutError as error:
            raise TimeoutError(f"hop: no answer from TransferQueue within {timeout_s:.0f} s\n{self._tail()}") from error
        if not line:
            raise RuntimeError(f"hop: TransferQueue has ended\n{self._tail()}")
        return float(line)

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]


def main(descriptor: int) -> None:
    """Inside the namespace: starts Ray, the queue and both ends, then answers one line of seconds for each request."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    ray, transfer_queue = import_module("ray"), import_module("transfer_queue")
    node = ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 << 20,
        _temp_dir=os.environ["HOP_FOLDER"] + "/r",
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    storage = {"storage_backend": "SimpleStorage", "SimpleStorage": {"num_data_storage_units": 1}}
    transfer_queue.init({"backend": storage})
    pair = Pair(Producer, Consumer, node.address_info["gcs_address"])
    with socket.socket(fileno=descriptor) as driver:
        driver.sendall(b"0\n")
        for line in driver.makefile("r"):
            what, *numbers = json.loads(line)
            driver.sendall(f"{pair.ask(what, Round(*numbers))}\n".encode())


def keys(groups: list[int]) -> list[str]:
    return [f"{group}-{sample}" for group in groups for sample in range(RESPONSES)]


class _End:
    def __init__(self, credit: Semaphore, pipe: Connection, address: str) -> None:
        import torch

        ray, transfer_queue = import_module("ray"), import_module("transfer_queue")
        torch.set_num_threads(1)
        ray.init(address=address, log_to_driver=False)
        transfer_queue.init()
        self.queue, self.credit, self.pipe = transfer_queue, credit, pipe
        self.columns: list[dict[str, Any]] = []

    def prepare(self, round: Round) -> None:
        """Columns of a whole chunk, as its API takes them: [rows, T] each, jagged when the lengths differ."""
        import torch

        groups = pool(round)
        self.columns = []
        for start in range(POOL if round.chunk < POOL else 1):
            rows = [row for at in range(round.chunk) for row in groups[(start + at) % POOL]]
            self.columns.append(
                {
                    "tokens": _column([torch.from_numpy(row.tokens) for row in rows], round.ragged),
                    "logprobs": _column([torch.from_numpy(row.logprobs) for row in rows], round.ragged),
                    "versions": torch.tensor([row.versions for row in rows], dtype=torch.int32),
                    "outcome": torch.tensor([[row.reward, row.correct, row.truncated] for row in rows]),
                }
            )

    def check(self, round: Round) -> None:
        """The producer has nothing to check."""


def _column(rows: list[Any], ragged: bool) -> Any:
    import torch

    return torch.nested.as_nested_tensor(rows, layout=torch.jagged) if ragged else torch.stack(rows)


class Producer(_End):
    def go(self, round: Round) -> None:
        tensordict = import_module("tensordict")
        for number, groups in enumerate(round.chunks):
            for _ in groups:
                if not self.credit.acquire(timeout=TIMEOUT_S):
                    raise TimeoutError(f"hop: the consumer took nothing within {TIMEOUT_S:.0f} s")
            fields = tensordict.TensorDict(self.columns[number % len(self.columns)], batch_size=len(groups) * RESPONSES)
            self.queue.kv_batch_put(keys(groups), PARTITION, fields)
            self.pipe.send(number)


class Consumer(_End):
    def go(self, round: Round) -> None:
        for number, groups in enumerate(round.chunks):
            if not self.pipe.poll(TIMEOUT_S) or self.pipe.recv() != number:
                raise TimeoutError(f"hop: chunk {number} was not put within {TIMEOUT_S:.0f} s")
            names = keys(groups)
            self.got = self.queue.kv_batch_get(names, PARTITION)
            runs = self.got["versions"].values().reshape(-1, 2)
            self.versions = runs[:, 0].repeat_interleave(runs[:, 1])
            self.queue.kv_clear(names, PARTITION)
            for _ in groups:
                self.credit.release()

    def check(self, round: Round) -> None:
        import torch

        expected = self.columns[(len(round.chunks) - 1) % len(self.columns)]
        for name in ("tokens", "logprobs", "outcome", "versions"):
            for got, put in zip(self.got[name].unbind(), expected[name].unbind(), strict=True):
                if not torch.equal(got, put):
                    raise ValueError(f"hop: TransferQueue gave back other {name} than were put")
        if self.versions.numel() != self.got["tokens"].values().numel():
            raise ValueError(f"hop: got versions of {self.versions.numel()} tokens")


if __name__ == "__main__":
    main(int(sys.argv[1]))
