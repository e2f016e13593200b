"""A command on stored data that runs on several ranks: the same command once more under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine.config import ConfigError, LearnerConfig
from engine.devices import collective_backend, use_device
from workers.roles import torchrun
from workers.supervise import TETHER

SCRATCH = "HEADRACE_RANKS_SCRATCH"
"""Where ranks find the folder in which rank 0 leaves the exit code; it is set in ranks only."""
ANSWER = "exit-code"


def with_ranks(learner: LearnerConfig, arguments: Sequence[str]) -> int:
    """Runs `headrace ARGUMENTS` on `learner.ranks` ranks; the exit code that rank 0 left."""
    with tempfile.TemporaryDirectory(prefix="headrace-ranks-") as scratch:
        tether = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid())]
        command = [*tether, *torchrun(learner.ranks), "-m", "workers.cli", *arguments]
        env = {"OMP_NUM_THREADS": str(learner.threads), "HEADRACE_TETHERED": "1", SCRATCH: scratch}
        code = subprocess.run(command, env=os.environ | env).returncode
        answer = Path(scratch) / ANSWER
        return int(answer.read_text(encoding="utf-8")) if answer.exists() else (code or 1)


@contextmanager
def ranks_of(learner: LearnerConfig) -> Iterator[tuple[int, int, str]]:
    """(rank, world, device) of this process; a process group where there are several ranks."""
    torch.set_num_threads(learner.threads)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = use_device(learner.device)
    if world == 1:
        yield rank, world, device
        return
    timeout = timedelta(seconds=learner.peer_timeout_s)
    dist.init_process_group(collective_backend(device), timeout=timeout)
    scratch = os.environ.get(SCRATCH)
    try:
        yield rank, world, device
    except ConfigError:
        if rank == 0 and scratch is not None:
            (Path(scratch) / ANSWER).write_text("2", encoding="utf-8")
        raise
    finally:
        dist.destroy_process_group()
    if rank == 0 and scratch is not None:
        (Path(scratch) / ANSWER).write_text("0", encoding="utf-8")
