"""Weights from the generator into an SGLang server, by the server's own protocol: a small process group of its own, in
which the generator is rank 0 and the server's tensor-parallel ranks follow.

The group is of gloo, on GPUs too: NCCL refuses a second process on a card that the server computes on. PyTorch gives such a
group no timeout of ours on the server's side (its own is 30 minutes), so whoever gives up on an exchange must end the server.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from engine.generate_requests import EngineLost
from engine.generate_sglang_http import Api, Refused
from engine.weights import control
from engine.weights.transport import GlooTransport, Seat, TransportError

Result = TypeVar("Result")

GROUP = "headrace"
BUCKET_BYTES = 512 << 20
"""Sent with one request; the server has as much memory for them beside the weights in use."""


class _ServerSeat(Seat):
    """Rank 0 of a group whose other ranks are made by torch.distributed's own functions, which nest these prefixes."""

    @property
    def prefix(self) -> str:
        return f"{GROUP}/{GROUP}//cpu/"


class WeightGroup:
    """`send` broadcasts named tensors, the server loads them."""

    def __init__(self, api: Api, *, ranks: int, timeout_s: float, bucket_bytes: int = BUCKET_BYTES) -> None:
        """`ranks` are the server's. Raises `EngineLost` when it does not join within `timeout_s`."""
        self._api, self._timeout_s, self._bucket_bytes = api, timeout_s, bucket_bytes
        where = urlsplit(api.base)
        address = control.local_address(where.hostname or "", where.port or 80)
        with contextlib.suppress(Refused):  # there may be none of a generator before this one
            api.post("/destroy_weights_update_group", {"group_name": GROUP})
        self._store = control.serve_store(address, 0, timeout_s)
        joining = api.begin(
            "/init_weights_update_group",
            {
                "master_address": address,
                "master_port": self._store.port,
                "rank_offset": 1,
                "world_size": 1 + ranks,
                "group_name": GROUP,
                "backend": "gloo",
            },
        )
        seat = _ServerSeat(0, 0, 0, 1 + ranks, address, torch.device("cpu"), timeout_s)
        self._transport = _together(_aside(lambda: GlooTransport(self._store, seat)), joining, timeout_s)

    def send(self, tensors: Mapping[str, Tensor], label: str) -> None:
        """The server loads all of `tensors`, which lie in the host's memory, and labels tokens with `label` from then on.
        Raises `Refused` for its no, and `EngineLost`; its weights are then of no use."""
        buckets = list(_buckets(tensors, self._bucket_bytes))
        for number, bucket in enumerate(buckets):
            answer = self._api.begin(
                "/update_weights_from_distributed",
                {
                    "names": list(bucket),
                    "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()],
                    "shapes": [list(tensor.shape) for tensor in bucket.values()],
                    "group_name": GROUP,
                    "flush_cache": False,  # 0.5.20 ends when requests are there
                    "abort_all_requests": False,
                    "weight_version": label if number == len(buckets) - 1 else None,
                },
            )
            _together(_aside(partial(self._broadcast, bucket)), answer, self._timeout_s)

    def close(self) -> None:
        """The server, if it is still there, forgets the group."""
        self._transport.close()

    def _broadcast(self, bucket: Mapping[str, Tensor]) -> None:
        for arrived in [self._transport.broadcast(tensor.contiguous()) for tensor in bucket.values()]:
            arrived()


def _buckets(tensors: Mapping[str, Tensor], bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += tensor.nbytes
    yield bucket


def _aside(work: Callable[[], Result]) -> Future[Result]:
    """`work` in a thread of its own, which nobody waits for when the process ends."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except TransportError as error:
            done.set_exception(error)

    threading.Thread(target=run, name="sglang-weights", daemon=True).start()
    return done


def _together(ours: Future[Result], theirs: Future[dict[str, Any]], timeout_s: float) -> Result:
    """The result of our part, once the server has done its own. Raises `Refused` and `EngineLost`."""
    both: list[Future[Any]] = [ours, theirs]
    wait(both, timeout_s, FIRST_EXCEPTION)
    if theirs.done():
        theirs.result(0)
    try:
        if ours.done():
            result = ours.result(0)
            if theirs.done():
                return result
    except TransportError as error:
        raise EngineLost(f"weights for SGLang: {error}") from error
    slow = "the server" if ours.done() else "the broadcast"
    raise EngineLost(f"weights for SGLang: waited {timeout_s:.0f} s for {slow}")
