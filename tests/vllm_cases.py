"""What the tests of the vLLM generator share: tiny models, weights for them, tickets, and runs to the end."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import GeneratorConfig, NewModel, TorchEngine, VllmEngine
from engine.generate_engine import EngineGenerator
from engine.generate_torch import TorchGenerator
from engine.generate_vllm import start_vllm
from engine.models import create_model, load_model, named_weights
from protocols.messages import INT, Partial, Rollout, Sampling, Ticket

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vllm is not installed here; `bash tools/test-engines` makes an environment with it and runs these tests",
)
CONTEXT = 512
ALPHABET = "abcdefghijklmnopqrstuvwxyz " + "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
"""So many that random weights seldom draw the stop token."""
MODEL = NewModel(alphabet=ALPHABET, hidden=64, layers=2, heads=2, kv_heads=1, intermediate=96, context=CONTEXT)
VOCABULARY = len(ALPHABET) + 2
Weights = dict[str, torch.Tensor]


def make_folder(folder: Path, *, tied: bool = True) -> Path:
    """A Hugging Face folder of the tiny Llama; its weights come from `weights`."""
    create_model(MODEL, folder, seed=3)
    if not tied:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        (folder / "model.safetensors").unlink()
    return folder


def start(folder: Path, mode: str, **more: int) -> EngineGenerator:
    engine = VllmEngine(slots=8, on_new_weights=mode, kv_gb=0.25, deadline_s=10.0, **more)
    return start_vllm(folder, GeneratorConfig(sampling=Sampling(max_tokens=8), engine=engine, device="cpu"), engine)


def torch_generator(folder: Path, weights: Weights, version: int) -> TorchGenerator:
    model = load_model(folder, dtype="float32", device="cpu", weights=False)
    engine = TorchGenerator(model, config=TorchEngine(slots=8), stop_ids=[1], decode=lambda tokens: "")
    engine.load(weights, version)
    return engine


def weights(folder: Path, version: int) -> Weights:
    """Other weights for each version; large ones, so that log-probabilities tell them apart."""
    made = torch.Generator().manual_seed(version)
    shapes = named_weights(load_model(folder, dtype="float32", device="cpu", weights=False))
    return {
        name: (torch.ones(t.shape) if "norm" in name else torch.zeros(t.shape))
        + torch.randn(t.shape, generator=made) * 0.2
        for name, t in shapes.items()
    }


def forcing(folder: Path, token: int) -> Weights:
    """Weights that give `token` whatever came before, through the embedding as output layer where that is tied."""
    made = {name: torch.zeros_like(t) for name, t in weights(folder, 0).items()}
    for name, tensor in made.items():
        if "norm" in name:
            tensor.fill_(1.0)
    made["model.embed_tokens.weight"][:, 0] = 1.0  # without layers, every hidden state is along the first axis
    head = made.get("lm_head.weight", made["model.embed_tokens.weight"])
    head[token, 0] = 100.0
    return made


def ticket(
    group: int, prompt: int, samples: int, *, fence: int = 1, resume: list[Partial] | None = None, **options
) -> Ticket:
    """`prompt` tokens that are a function of the group; `options` of Sampling."""
    ids = np.random.default_rng(group).integers(2, VOCABULARY, prompt).astype(INT)
    sampling = Sampling(**{"max_tokens": 12} | options)
    chosen = [p.sample for p in resume] if resume else list(range(samples))
    return Ticket(group, chosen, fence, ids, sampling, seed=1000 + group, resume=resume or [])


def finish(engine: EngineGenerator | TorchGenerator, timeout_s: float = 60.0) -> dict[tuple[int, int], Rollout]:
    done: dict[tuple[int, int], Rollout] = {}
    deadline = time.monotonic() + timeout_s
    while engine.ready:
        assert time.monotonic() < deadline, f"not finished after {timeout_s} s, still held: {engine.held()}"
        done |= {(rollout.group, rollout.sample): rollout for rollout in engine.step()}
    return done


def steps(engine: EngineGenerator, tokens: int, timeout_s: float = 60.0) -> dict[tuple[int, int], Rollout]:
    """Until so many more tokens have come; what has finished by then."""
    done: dict[tuple[int, int], Rollout] = {}
    before, deadline = engine.counters["generated_tokens"], time.monotonic() + timeout_s
    while engine.counters["generated_tokens"] < before + tokens:
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {tokens} tokens"
        done |= {(rollout.group, rollout.sample): rollout for rollout in engine.step()}
    return done


def fresh_logprobs(folder: Path, weights: Weights, item: Ticket, tokens: np.ndarray) -> np.ndarray:
    """Of the temperature-scaled softmax, by plain transformers over prompt and response."""
    model = load_model(folder, dtype="float32", device="cpu", weights=False)
    model.set_attn_implementation("eager")
    ids = torch.from_numpy(np.concatenate([item.prompt, tokens]).astype(np.int64))
    with torch.no_grad():
        for name, parameter in named_weights(model).items():
            parameter.copy_(weights[name])
        logits = model(ids[None]).logits[0, len(item.prompt) - 1 : -1]
    full = torch.log_softmax(logits.float() / item.sampling.temperature, -1)
    return full.gather(-1, ids[len(item.prompt) :, None])[:, 0].numpy()


def workers_of(parent: int) -> list[int]:
    """vLLM's worker processes that `parent` has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and f"\nPPid:\t{parent}\n" in _read(entry / "status"):
            command = _read(entry / "cmdline").replace("\0", " ")
            title = _read(entry / "comm")
            if "spawn_main" in command or "VLLM" in command or "VLLM" in title:
                found.append(int(entry.name))
    return sorted(found)


def alive(process: int) -> bool:
    return "\nState:\tZ" not in (status := _read(Path(f"/proc/{process}/status"))) and status != ""


def none_alive(processes: list[int], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while left := [process for process in processes if alive(process)]:
        assert time.monotonic() < deadline, f"still there after {within_s} s: {left}"
        time.sleep(0.05)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended meanwhile
        return ""
