"""The receiving process of the weights benchmarks, and how the measuring one talks to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.distributed import TCPStore

from engine.weights import Subscriber

HOST = "127.0.0.1"
TIMEOUT_S = 60.0


def shapes() -> dict[str, tuple[int, ...]]:
    """The parameters of SmolLM2-135M (tied output): 272 tensors, 134,515,008 numbers."""
    hidden, inner, keys, vocabulary, layers = 576, 1536, 192, 49_152, 30
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        found |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
            }.items()
        }  # fmt: skip
    return found


@contextmanager
def receiver() -> Iterator[Connection]:
    """The other process, and the two of them as a gloo group of rank 0 (here) and 1."""
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    process = context.Process(target=receive, args=[theirs, store.port], daemon=True)
    process.start()
    try:
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=2)
        yield ours
        ours.send(("end", None))
        process.join(TIMEOUT_S)
    finally:
        process.kill()
        torch.distributed.destroy_process_group()


def ask(receiver: Connection, what: str, argument: Any) -> Any:
    receiver.send((what, argument))
    return answer(receiver)


def answer(receiver: Connection) -> Any:
    if not receiver.poll(TIMEOUT_S):
        raise TimeoutError(f"benchmark: no answer from the receiving process within {TIMEOUT_S} s")
    return receiver.recv()


def receive(learner: Connection, port: int) -> None:
    """The other process: does what the first one asks, and says when it was done (both read one monotonic clock)."""
    torch.set_num_threads(1)
    store = TCPStore(HOST, port, is_master=False, wait_for_workers=False)
    torch.distributed.init_process_group("gloo", store=store, rank=1, world_size=2)
    parameters = {name: torch.zeros(shape) for name, shape in shapes().items()}
    flat = torch.zeros(0, dtype=torch.uint8)
    subscriber: Subscriber | None = None
    while (request := learner.recv())[0] != "end":
        match request:
            case ("raw", size):
                flat = flat if flat.numel() == size else torch.zeros(size, dtype=torch.uint8)
                torch.distributed.barrier()
                torch.distributed.broadcast(flat, 0)
                learner.send(time.monotonic())
            case ("join", address):
                subscriber = Subscriber(HOST, address, name="receiver", timeout_s=TIMEOUT_S)
                learner.send(None)
            case ("take", version) if subscriber is not None:
                learner.send(take(subscriber, version, parameters))
            case ("leave", _) if subscriber is not None:
                subscriber.close()
                learner.send(None)
    torch.distributed.destroy_process_group()


def take(subscriber: Subscriber, version: int, parameters: dict[str, Tensor]) -> tuple[float, float]:
    """(when the verified update was there, seconds to copy it into the parameters)."""
    with subscriber.wait(TIMEOUT_S) as update:
        arrived = time.monotonic()
        if update.version != version:
            raise ValueError(f"benchmark: got version {update.version}, expected {version}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(update.tensors[name])
        return arrived, time.monotonic() - arrived
