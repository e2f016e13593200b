"""A process that receives (or publishes) weights, for test_weights.py: it reports on stdout, one JSON object a line,
and leaves when its stdin is closed.

    python weights_peer.py subscribe PORT NAME [FAULT]      python weights_peer.py publish

FAULT is what happens to the first update on its way in: flip, swap, skip (a transport that corrupts), die, stall (the
process gets SIGKILL or SIGSTOP in the middle of the payload).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from engine.weights import GlooTransport, Publisher, Seat, Subscriber, Terms, Transport, fingerprints, weights_hash

TIMEOUT_S = 3.0
BUCKET_BYTES = 1 << 20
ROWS = 1 << 20  # two tensors of 4 MiB follow each other bucket by bucket
LEFT, RIGHT, MIDDLE = 2, 6, 5


def weights(version: int) -> dict[str, Tensor]:
    """Many dtypes, an empty tensor, a scalar, an odd length, and more bytes than sockets buffer."""
    generator = torch.Generator().manual_seed(version)
    small = {
        "z.bf16": torch.randn(33, 7, generator=generator).to(torch.bfloat16),
        "z.bool": torch.tensor([True, False, version % 2 == 0]),
        "z.empty": torch.zeros(0, 4),
        "z.int64": torch.arange(11) + version,
        "z.scalar": torch.tensor(float(version)),
        "z.transposed": torch.randn(5, 9, generator=generator).T,
    }
    large = {f"a.{i}": torch.arange(ROWS, dtype=torch.float32) * (version + 1) + i for i in range(6)}
    return {**large, **small}


def equal_bits(one: Tensor, other: Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.contiguous().view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


class FaultyTransport:
    """gloo, with something wrong in the buckets that arrive: `fault(number of the bucket, bucket)`."""

    def __init__(self, store: Store, seat: Seat, fault: Callable[[int, Tensor], None]) -> None:
        self._inner = GlooTransport(store, seat)
        self._fault = fault
        self._started = 0

    def broadcast(self, bucket: Tensor) -> Callable[[], None]:
        number, wait = self._started, self._inner.broadcast(bucket)
        self._started += 1

        def arrive() -> None:
            wait()
            self._fault(number, bucket)

        return arrive

    def close(self) -> None:
        self._inner.close()


def fault_named(name: str) -> Callable[[int, Tensor], None]:
    kept: dict[int, Tensor] = {}

    def fault(number: int, bucket: Tensor) -> None:
        if name == "flip" and number == MIDDLE:
            bucket[77] ^= 1
        elif name == "skip" and number == MIDDLE:
            bucket.zero_()
        elif name == "swap" and number == LEFT:
            kept[number] = bucket
        elif name == "swap" and number == RIGHT:
            bucket[:], kept[LEFT][:] = kept[LEFT].clone(), bucket.clone()
        elif name == "die" and number == MIDDLE:
            os.kill(os.getpid(), signal.SIGKILL)
        elif name == "stall" and number == MIDDLE:
            os.kill(os.getpid(), signal.SIGSTOP)

    return fault


class FaultyOnce:
    """Builds a `FaultyTransport` the first time, plain ones afterwards."""

    def __init__(self, fault: str) -> None:
        self._faults = [fault] if fault else []

    def __call__(self, store: Store, seat: Seat) -> Transport:
        if self._faults:
            return FaultyTransport(store, seat, fault_named(self._faults.pop()))
        return GlooTransport(store, seat)


def say(**facts: Any) -> None:
    print(json.dumps({"at": time.time(), **facts}), flush=True)


def subscribe(port: int, name: str, fault: str, leave: threading.Event) -> None:
    with Subscriber("127.0.0.1", port, name=name, timeout_s=TIMEOUT_S, connect=FaultyOnce(fault)) as subscriber:
        say(joined=name)
        while not leave.is_set() and subscriber.alive:
            update = subscriber.poll()
            if update is None:
                leave.wait(0.01)
                continue
            with update:
                expected = weights(update.version)
                equal = [equal_bits(tensor, update.tensors[key]) for key, tensor in expected.items()]
                true_hash = weights_hash(fingerprints(expected)) == update.hash
            say(version=update.version, equal=all(equal), hash=true_hash, **subscriber.counters)
        say(alive=subscriber.alive, error=subscriber.error)


def publish(leave: threading.Event) -> None:
    with Publisher("127.0.0.1", Terms(bucket_bytes=BUCKET_BYTES, peer_timeout_s=TIMEOUT_S)) as publisher:
        publisher.publish(0, weights(0))
        say(port=publisher.address[1])
        leave.wait()


def main() -> None:
    leave = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), leave.set()), daemon=True).start()
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["subscribe", port, name, *fault]:
            subscribe(int(port), name, "".join(fault), leave)
        case ["publish"]:
            publish(leave)
    sys.stdout.flush()
    os._exit(0)  # the thread that reads stdin may still be at it


if __name__ == "__main__":
    main()
