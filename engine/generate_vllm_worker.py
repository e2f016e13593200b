"""What runs inside vLLM's workers: new weights from the stage, and our own draws. Only vLLM imports this module.

`WorkerExtension` is mixed into vLLM's worker (`worker_extension_cls`); its methods are called by name on every worker.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler

from engine.generate_requests import DRAWS, Draws
from engine.generate_stage import Stage
from engine.sampling import draw, uniforms

PROBES = 8
"""Hidden dimensions of the output layer that are read back after an update."""


PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the generator's main thread ends. vLLM's workers watch a pipe for that, but when the
    generator was killed the loop that takes calls goes on, at 100 % of a core (vLLM 0.32)."""
    parent = multiprocessing.parent_process()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != parent.pid:
        os.kill(os.getpid(), signal.SIGKILL)


class WorkerExtension:
    """Attributes of the worker that this uses: `model_runner` and `vllm_config`."""

    model_runner: Any
    vllm_config: Any

    def headrace_attach(self, described: tuple[str, str]) -> None:
        """Map the stage, draw as `engine.sampling` does, and load what is staged once, to see that this model knows
        all of its names and shapes. Raises what vLLM's loader raises."""
        self._stage = Stage.attach(described)
        runner = self.model_runner
        runner.sampler = CounterSampler(runner)
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            # where the stage before puts hidden states; vLLM makes it as it warms up, which it leaves out on a CPU
            runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )
        self.headrace_apply()

    @torch.inference_mode()
    def headrace_apply(self) -> None:
        """Replace all weights by the staged ones, those of other stages left out, and read the output layer back.

        An error leaves the model between two versions: it must not be used any more.
        """
        model, tensors = self.model_runner.get_model(), self._stage.tensors
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            loaded = model.load_weights(tensors.items())
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            _repack_output_layer(model)
        missing = sorted({name for name, _ in model.named_parameters()} - set(loaded))
        if missing:
            raise ValueError(f"{len(missing)} of vLLM's weights got no value, the first is {missing[0]}")
        if get_pp_group().is_last_rank:
            _probe_output_layer(model, tensors)


def _repack_output_layer(model: torch.nn.Module) -> None:
    """A CPU's output layer works on a packed copy of its weight. With tied embeddings no weight has its name, so that the
    reload does not come by and the copy stays that of the weights before."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if hasattr(module, "cpu_linear") and isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(module)


def _probe_output_layer(model: Any, tensors: dict[str, Tensor]) -> None:
    """The logits of unit vectors are columns of the output weight, exactly so in any type: only zeros are added."""
    weight = tensors.get("lm_head.weight", tensors.get("model.embed_tokens.weight"))
    if weight is None:
        raise ValueError("neither lm_head.weight nor model.embed_tokens.weight is among the weights")
    dimensions = torch.linspace(0, weight.shape[1] - 1, PROBES).long().unique()
    units = torch.nn.functional.one_hot(dimensions, weight.shape[1])
    logits = model.compute_logits(units.to(next(model.parameters()).device, weight.dtype))
    if logits is not None and not torch.equal(logits.float().cpu(), weight[:, dimensions].T.float()):
        raise ValueError("the output layer still computes with the weights before the update")


class CounterSampler(Sampler):
    """Draws by `engine.sampling`: a token is a function of the logits, the ticket's seed, the sample and the position.

    vLLM's own sampler has a generator for each request that cannot be restored on a CPU (a seeded prompt that is computed
    in pieces ends the engine), continues nobody's draws, and gives log-probabilities after truncation, where the
    distribution that is trained is the whole temperature-scaled softmax.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self._runner = runner

    def forward(
        self,
        logits: Tensor,
        sampling_metadata: Any,
        predict_bonus_token: bool = False,
        logprobs_mode_override: Any = None,
    ) -> SamplerOutput:
        """`logits` [N, V], one row for each request of the batch."""
        requests = [self._runner.requests[name] for name in self._runner.input_batch.req_ids]
        draws = [Draws(*request.sampling_params.extra_args[DRAWS]) for request in requests]
        made = [how.made + len(request.output_token_ids) for how, request in zip(draws, requests, strict=True)]
        tokens, logprobs = draw(
            logits,
            uniforms(np.array([how.key for how in draws], dtype=np.uint64), np.array(made)),
            temperature=np.array([how.temperature for how in draws], dtype=np.float32),
            top_p=np.array([how.top_p for how in draws], dtype=np.float32),
            top_k=np.array([how.top_k for how in draws]),
        )
        chosen = tokens.to(torch.int32)[:, None]
        ranks = torch.zeros_like(tokens)
        return SamplerOutput(
            sampled_token_ids=chosen, logprobs_tensors=LogprobsTensors(chosen, logprobs[:, None], ranks)
        )

    @staticmethod
    def gather_logprobs(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        """Of the given tokens alone, `logprobs` [N, V] and `token_ids` [N], for a prompt's log-probabilities. vLLM's own
        also counts each token's rank, and compiles a kernel for that: 13 s at the first call on a CPU."""
        chosen = token_ids[:, None]
        return LogprobsTensors(chosen.to(torch.int32), logprobs.gather(-1, chosen), torch.zeros_like(token_ids))


die_with_parent()  # here, since vLLM imports this before anything that takes long, and calls nothing of it so early
