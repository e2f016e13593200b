"""The data plane: process groups of a learner's rank (rank 0 in them) and some members, beside anybody's default group.

`GlooTransport` moves bytes between CPUs, `NcclTransport` between GPUs, one process a GPU (NCCL refuses two). A test
or another fabric passes a `Connect` of its own to publisher and subscriber.

After an error a group is of no further use: close it and build another under a new epoch. Its destructor waits for
operations that are still queued, which fail at once after a reset and at their timeout otherwise; so every group
carries the peer timeout. A Python thread that is inside native code when the interpreter ends aborts the process:
publisher and subscriber therefore close themselves at exit, and one whose thread could not be waited for (it says so
in the log) should end by `os._exit`.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, Store

IN_FLIGHT = 3
"""Buckets under way at once: one on the wire, one behind it, one being hashed."""
THREADS = 2
POLL_S = 0.0005


class TransportError(RuntimeError):
    """A group could not be built, or it broke; says which, where, and in what."""


@dataclass(frozen=True)
class Seat:
    """A process's place in the group that sends a share. `address` is this machine's, as the other ranks reach it."""

    epoch: int
    share: int
    rank: int
    size: int
    address: str
    device: torch.device
    timeout_s: float

    def __str__(self) -> str:
        return f"weight group {self.epoch} of share {self.share}, rank {self.rank} of {self.size} at {self.address}"

    @property
    def prefix(self) -> str:
        """Under which the store holds what the group's ranks tell each other."""
        return f"group/{self.epoch}/{self.share}"


class Transport(Protocol):
    def broadcast(self, bucket: Tensor) -> Callable[[], None]:
        """Start to send `bucket` (rank 0) or to fill it (others); the call returned waits for the end of that.
        Both raise `TransportError`. Sizes were agreed on before: gloo ends the process when they differ."""

    def close(self) -> None:
        """Give the connections back; the other ranks' pending operations fail."""


Moving = tuple[Tensor, Callable[[], None]]
"""A bucket on its way, and what waits for its end."""
Connect = Callable[[Store, Seat], Transport]
"""Builds the transport of a seat; blocks until all ranks are there. Raises `TransportError`."""


def connect(store: Store, seat: Seat) -> Transport:
    """gloo for a seat on the CPU, NCCL for one on a GPU."""
    return NcclTransport(store, seat) if seat.device.type == "cuda" else GlooTransport(store, seat)


def transfer(transport: Transport, flat: Tensor, bucket_bytes: int) -> Iterator[Tensor]:
    """Move `flat` (uint8 [n]) bucket by bucket, from the call on; yields each bucket once it is through, while the next ones
    move."""
    buckets = iter(flat.split(bucket_bytes))
    started = deque((bucket, transport.broadcast(bucket)) for bucket in islice(buckets, IN_FLIGHT))
    return _through(transport, started, buckets)


def _through(transport: Transport, started: deque[Moving], buckets: Iterator[Tensor]) -> Iterator[Tensor]:
    while started:
        bucket, wait = started.popleft()
        wait()
        if (following := next(buckets, None)) is not None:
            started.append((following, transport.broadcast(following)))
        yield bucket


def side_by_side(transfers: Iterable[Iterator[Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """The buckets of several transfers that move at once, in turns, and which transfer each is of. Ranks that take part in the
    same transfers go on with them in the same order, which NCCL asks for."""
    running = deque(enumerate(transfers))
    while running:
        number, buckets = running.popleft()
        if (bucket := next(buckets, None)) is not None:
            yield number, bucket
            running.append((number, buckets))


class GlooTransport:
    """Over TCP between the CPUs of the seat's addresses, or of the interface that GLOO_SOCKET_IFNAME names."""

    def __init__(self, store: Store, seat: Seat) -> None:
        self._seat = seat
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
        with _explained(f"{seat}: cannot be built"):
            where = {"interface": interface} if interface else {"hostname": seat.address}
            options = ProcessGroupGloo._Options()
            options._devices = [ProcessGroupGloo.create_device(**where)]
            options._threads = THREADS
            options._timeout = timedelta(seconds=seat.timeout_s)
            self._group = ProcessGroupGloo(PrefixStore(seat.prefix, store), seat.rank, seat.size, options)

    def broadcast(self, bucket: Tensor) -> Callable[[], None]:
        """A bucket on a GPU goes by way of the host's memory."""
        host = (
            bucket
            if not bucket.is_cuda
            else bucket.cpu()
            if self._seat.rank == 0
            else torch.empty_like(bucket, device="cpu")
        )
        with _explained(f"{self._seat}: broadcast"):
            work = self._group.broadcast([host], _from_learner())

        def wait() -> None:
            with _explained(f"{self._seat}: broadcast of {bucket.numel()} bytes"):
                work.wait()
            if host is not bucket and self._seat.rank != 0:
                bucket.copy_(host)

        return wait

    def close(self) -> None:
        self._group = None


class NcclTransport:
    """Between GPUs, each process on one of its own. Waits poll for completion on the host, so that a silent peer costs a timeout
    and not the process."""

    def __init__(self, store: Store, seat: Seat) -> None:
        if not torch.distributed.is_nccl_available():
            raise TransportError(f"{seat}: device {seat.device}, but this PyTorch is built without NCCL; use cpu")
        self._seat = seat
        with _explained(f"{seat}: cannot be built"), _watchdog_that_only_cleans_up():
            self._meet(store)
            from torch.distributed import ProcessGroupNCCL  # absent from builds without NCCL

            options = ProcessGroupNCCL.Options()
            options._timeout = timedelta(days=1)  # the watchdog's own; ours is the one in `_wait`
            torch.cuda.set_device(seat.device)
            self._group = ProcessGroupNCCL(PrefixStore(seat.prefix, store), seat.rank, seat.size, options)

    def broadcast(self, bucket: Tensor) -> Callable[[], None]:
        """A bucket in the host's memory, which only a sender has, goes by way of the GPU."""
        with _explained(f"{self._seat}: broadcast"):
            sent = bucket.to(self._seat.device)
            work = self._group.broadcast([sent], _from_learner())
        return lambda: self._wait(work, sent)

    def close(self) -> None:
        if self._group is not None:
            with _explained(f"{self._seat}: abort"):
                self._group.abort()
            self._group = None

    def _wait(self, work: Any, sent: Tensor) -> None:
        """`sent` lives until it is there."""
        deadline = time.monotonic() + self._seat.timeout_s
        with _explained(f"{self._seat}: broadcast of {sent.numel()} bytes"):
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise TransportError(f"no end within {self._seat.timeout_s} s")
                time.sleep(POLL_S)
            work.wait()

    def _meet(self, store: Store) -> None:
        """All ranks are here and now: NCCL itself would wait for a missing one without end."""
        names = [f"{self._seat.prefix}/here/{rank}" for rank in range(self._seat.size)]
        store.set(names[self._seat.rank], "")
        store.wait(names, timedelta(seconds=self._seat.timeout_s))


def _from_learner() -> Any:
    options = BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return options


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TransportError(f"{what}: {str(error).partition(chr(10))[0]}") from error


@contextmanager
def _watchdog_that_only_cleans_up() -> Iterator[None]:
    """NCCL's watchdog ends the whole process when a peer fails, unless told so in the environment when the group is
    made (2: abort the communicator only). Set for that moment alone: the learner's own groups keep their setting."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "2"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
