"""The generator on a real SGLang server: what every engine promises, refusals, and a clean end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import sglang_cases
import vllm_cases as cases
from engine_contract import CachingEngineContract
from sglang_cases import children
from vllm_cases import steps, ticket, weights

from engine.config import ConfigError, SglangEngine
from engine.generate_engine import EngineGenerator
from engine.generate_requests import EngineLost
from protocols.messages import HandBack

pytestmark = [sglang_cases.needs_sglang, pytest.mark.timeout(1200)]


def start(folder: Path, mode: str) -> EngineGenerator:
    """Tokens come one at a time from one of the two, and three at a time from the other."""
    interval = 1 if mode == "keep" else 3
    settings = {"on_new_weights": mode, "stream_interval": interval} | sglang_cases.REAL
    return sglang_cases.start(folder, SglangEngine(slots=8, deadline_s=20.0, **settings))


class TestSglang(CachingEngineContract):
    start = staticmethod(start)
    long, stepped = 400, False

    def test_prompts_are_shared(self, keeping: EngineGenerator, tied: Path) -> None:
        keeping.load(weights(tied, 11), 11)
        saved = keeping.counters["prefill_saved_tokens"]
        for _ in range(2):
            keeping.add(ticket(20, 70, 4))
            cases.finish(keeping)
        assert keeping.counters["prefill_saved_tokens"] - saved >= 4 * 60

    def test_a_model_that_sglang_does_not_know_is_refused(self, tied: Path) -> None:
        """Its folder says so; ours reads the same weights by another class."""
        other = tied.parent / "unknown"
        other.mkdir()
        for file in tied.iterdir():
            text = file.read_bytes()
            (other / file.name).write_bytes(text.replace(b'"LlamaForCausalLM"', b'"NowhereForCausalLM"'))
        with pytest.raises(ConfigError, match=r"SGLang does not start: .*NowhereForCausalLM"):
            sglang_cases.start(other, SglangEngine(slots=8, **sglang_cases.REAL))

    def test_a_killed_scheduler_is_noticed_and_what_there_is_is_handed_back(
        self, engine: EngineGenerator, folder: Path
    ) -> None:
        """The process that computes, or the one that answers."""
        engine.load(weights(folder, 15), 15)
        engine.add(ticket(16, 12, 80, max_tokens=self.long))  # some are under way whatever the machine does
        steps(engine, 30)
        leash = sglang_cases.server_of(engine)
        processes = [leash, *children(leash)]
        titles = {process: Path(f"/proc/{process}/cmdline").read_text() for process in processes}
        scheduler = next(process for process, title in titles.items() if "scheduler" in title)
        os.kill(scheduler if engine.config.on_new_weights == "keep" else processes[1], signal.SIGKILL)
        with pytest.raises(EngineLost, match="SGLang is lost"):
            steps(engine, 10**9, timeout_s=10.0)
        (handed,) = [each for each in engine.hand_back() if isinstance(each, HandBack)]
        assert handed.partials
        cases.none_alive(processes)
