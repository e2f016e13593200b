"""vLLM as an engine that is stepped: the only module of this process that imports vLLM.

The scheduler runs here, between our own calls, so nothing happens while weights are exchanged; the model runs in one
worker process for each part and stage that it is cut into, which end when this one ends, even by SIGKILL. Whatever goes wrong in
vLLM becomes `EngineLost`, and an engine that was lost is not used again: after a call that was not answered in time the
next one would get its answer.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs.engine import tokens_input
from vllm.model_executor.models import ModelRegistry
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.llm_engine import LLMEngine

from engine.config import ConfigError, VllmEngine
from engine.generate_requests import DRAWS, Draws, EngineLost, Progress
from engine.generate_stage import Stage
from engine.models import DTYPES

WORKER = "engine.generate_vllm_worker.WorkerExtension"
BLOCK_TOKENS = 32
"""Tokens of a block that prefix caching shares. vLLM's own 128 on a CPU would share no prompt that is shorter."""


class Engine:
    """See `engine.generate_requests.Engine`; `attach` the stage once, and `apply` loads what lies there."""

    name = "vLLM"
    recomputes = True

    def __init__(
        self, folder: Path, config: VllmEngine, *, device: str, dtype: str, context: int, stop_ids: list[int]
    ) -> None:
        """Starts the workers; the weights are no numbers of use until `apply`. Raises `ConfigError` when the model, the
        config and this machine do not fit one another, else `EngineLost`."""
        self.config, self._stop_ids = config, stop_ids
        self.lost: str | None = None
        if current_platform.device_type != device:
            raise ConfigError(
                f"generator.device is {device}, but the vLLM here is built for {current_platform.device_type}"
            )
        arguments = _arguments(folder, config, device=device, dtype=dtype, context=context)
        with _deadline(config.start_s, "vLLM's workers to start"), self._guarded("start"):
            try:
                vllm_config = arguments.create_engine_config()
                _check_model(folder, vllm_config.model_config, dtype)
                self._engine = LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
            except (ValueError, NotImplementedError) as error:  # vLLM's refusals of configs, models and memory
                raise ConfigError(f"generator.engine: vLLM refuses {folder} with {config}: {error}") from error

    def attach(self, stage: Stage) -> None:
        """Let the workers map `stage` and load what is there. Raises `ConfigError` when its names or shapes are not what
        vLLM's model has."""
        try:
            self._call("headrace_attach", "its workers to take the weights' names", stage.description)
        except EngineLost as error:
            raise ConfigError(f"generator.engine: vLLM does not take this model's weights: {error}") from error

    def apply(self, version: int, *, recompute: bool) -> None:
        """All weights become what is staged; no step is under way. With `recompute` all keys and values are forgotten, and
        the next step begins to compute those of running requests anew. Raises `EngineLost`."""
        self._call("headrace_apply", f"its workers to load the weights of version {version}")
        if recompute:
            with self._guarded("drop its keys and values"):
                if not self._engine.reset_prefix_cache(reset_running_requests=True):
                    raise RuntimeError("the cache was not reset")

    def add(self, request: str, prompt: list[int], *, tokens: int, draws: Draws, share: str) -> None:
        """Continue `prompt` by at most `tokens`. Blocks of keys and values are shared among requests of equal `share`."""
        self._add(request, prompt, self._params(tokens, draws), share)

    def add_canary(self, request: str, prompt: list[int], *, draws: Draws, share: str) -> None:
        """One token, and the log-probabilities of the whole prompt."""
        params = self._params(1, draws)
        params.prompt_logprobs = 0
        self._add(request, prompt, params, share)

    def step(self) -> list[Progress]:
        """A pass over the running requests and, budget permitting, over waiting prompts. Raises `EngineLost`."""
        with self._guarded("compute a step"):
            return [_progress(output) for output in self._engine.step() if isinstance(output, RequestOutput)]

    def check(self) -> None:
        """Raises `EngineLost` when a worker has ended; costs nothing."""
        with self._guarded("go on"):
            if self._engine.model_executor.is_failed:
                raise RuntimeError("a worker process has ended")

    def abort(self, requests: list[str]) -> None:
        """Forget these. Nothing to do for an engine that is lost."""
        if self.lost is None and requests:
            with self._guarded("abort requests"):
                self._engine.abort_request(requests)

    def recall(self, requests: list[str]) -> list[Progress]:
        """As `abort`, once no batch is under way."""
        came = self._settle()
        self.abort(requests)
        return came

    def close(self) -> None:
        """End the workers; those that do not end by themselves are killed."""
        self.lost = self.lost or "it was closed"
        self._engine.engine_core.shutdown()

    def _settle(self) -> list[Progress]:
        """What the batches under way give: a pipeline has one at each of its stages, and may not get other weights before
        they have left it."""
        core = self._engine.engine_core.engine_core
        came: list[Progress] = []
        if core.batch_queue:
            core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
            with contextlib.suppress(EngineLost):  # as `lost` says from now on
                while core.batch_queue:
                    came += self.step()
            core.scheduler.set_pause_state(PauseState.UNPAUSED)
        return came

    def _params(self, tokens: int, draws: Draws) -> SamplingParams:
        return SamplingParams(
            max_tokens=tokens,
            stop_token_ids=self._stop_ids,
            ignore_eos=True,  # of vLLM's own reading; `stop_token_ids` has them
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={DRAWS: tuple(draws)},
        )

    def _add(self, request: str, prompt: list[int], params: SamplingParams, share: str) -> None:
        with self._guarded("take a request"):
            self._engine.add_request(request, tokens_input(prompt, cache_salt=share), params)

    def _call(self, method: str, what: str, *arguments: object) -> None:
        with self._guarded(f"wait for {what}"):
            self._engine.collective_rpc(method, timeout=self.config.deadline_s, args=arguments)

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        if self.lost is not None:
            raise EngineLost(f"vLLM cannot {what}: it is lost: {self.lost}")
        try:
            yield
        except (ConfigError, EngineLost):
            raise
        except TimeoutError as error:
            self.lost = f"no answer within {self.config.deadline_s:.0f} s"
            raise EngineLost(f"vLLM cannot {what}: {self.lost}") from error
        except Exception as error:  # the edge to another process and to a scheduler that is not ours
            self.lost = f"{type(error).__name__}: {_first_line(error)}"
            raise EngineLost(f"vLLM cannot {what}: {self.lost}") from error


def _arguments(folder: Path, config: VllmEngine, *, device: str, dtype: str, context: int) -> EngineArgs:
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=context,
        max_num_seqs=config.slots + 1,  # the canary always finds a place
        block_size=BLOCK_TOKENS,
        enable_prefix_caching=True,
        load_format="dummy",
        generation_config="vllm",  # nothing from the model's folder changes how tokens are drawn
        logprobs_mode="processed_logprobs",
        max_logprobs=1,
        tensor_parallel_size=config.tensor_parallel,
        pipeline_parallel_size=config.pipeline_parallel,
        distributed_executor_backend="mp",
        worker_extension_cls=WORKER,
        async_scheduling=False,  # no step may be under way while weights change
        gpu_memory_utilization=config.gpu_memory,
        kv_cache_memory_bytes=int(config.kv_gb * 2**30) if device == "cpu" else None,
        enforce_eager=device == "cpu",  # to compile takes minutes there
        disable_log_stats=True,
    )


def _check_model(folder: Path, model: ModelConfig, dtype: str) -> None:
    """vLLM serves models that it does not know through transformers, under other names; those are refused."""
    architecture = model.architecture
    if architecture not in ModelRegistry.get_supported_archs() or architecture.startswith("Transformers"):
        raise ConfigError(f"generator.engine: {folder} is a {architecture}, which vLLM has no implementation of")
    if model.dtype != DTYPES[dtype]:
        raise ConfigError(f"generator.dtype is {dtype}, but vLLM would serve {folder} in {model.dtype}")


def _progress(output: RequestOutput) -> Progress:
    (completion,) = output.outputs
    tokens = list(completion.token_ids)
    scores = completion.logprobs or []
    logprobs = [position[token].logprob for position, token in zip(scores, tokens, strict=True)]
    of_prompt = None
    if output.prompt_logprobs and output.prompt_token_ids:
        pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        of_prompt = np.array([position[token].logprob for position, token in pairs if position], dtype=np.float32)
    return Progress(
        output.request_id, tokens, logprobs, completion.finish_reason, output.num_cached_tokens or 0, of_prompt
    )


@contextlib.contextmanager
def _deadline(seconds: float, what: str) -> Iterator[None]:
    """vLLM waits for its workers to start without end. Signals reach the main thread only; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(_number: int, _frame: FrameType | None) -> None:
        raise EngineLost(f"waited {seconds:.0f} s for {what}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
