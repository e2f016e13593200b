"""The generator on the far side of a network that can be cut: a process of a run that its launcher knows nothing of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from msgspec import Struct

from engine.config import Config
from tools.faults.network import RUN, Network
from tools.faults.processes import roles_of

FAR = "generator-far"
LISTEN = f'buffer.address="tcp://{RUN}:0"'
"""The override with which a run's buffer is reached from the far side; `launch` makes keys for it."""
JOIN_S, LEAVE_S, LOOK_S = 180.0, 20.0, 0.1


class Far(Struct):
    """`process` is the generator of the launch under way."""

    network: Network
    process: psutil.Process

    @property
    def roles(self) -> dict[str, psutil.Process]:
        """By name, as `roles_of` has those of the launcher."""
        return {FAR: self.process}


@contextmanager
def joined(
    network: Network, config: Config, overrides: list[str], launcher: psutil.Process, over: Callable[[], bool]
) -> Iterator[Far | None]:
    """The generator as soon as the launcher's buffer listens; None when the launch is over before. It has left with the
    block: told to by the buffer or here, or killed where nobody is there to hand anything back to."""
    if not _listens(config, launcher, over):
        yield None
        return
    options = [part for override in overrides for part in ("--set", override)]
    address = (config.run_dir / "address").read_text(encoding="utf-8").strip()
    command = [sys.executable, "-m", "workers.cli", "generator", str(config.run_dir / "config.toml"), *options]
    with (config.run_dir / "far.out").open("ab") as output:
        process = subprocess.Popen(
            network.there([*command, "--join", address, "--name", FAR]),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HEADRACE_TETHERED": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )  # fmt: skip
    try:
        yield Far(network, psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGTERM if launcher.is_running() else signal.SIGKILL)
        try:
            process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(LEAVE_S)


def _listens(config: Config, launcher: psutil.Process, over: Callable[[], bool]) -> bool:
    """Waits for the buffer of this launch: the file of an earlier one is removed before it is started."""
    deadline, published = time.monotonic() + JOIN_S, Path(config.run_dir) / "address"
    while not over() and time.monotonic() < deadline:
        if "buffer" in roles_of(launcher) and published.exists():
            return True
        time.sleep(LOOK_S)
    return False
