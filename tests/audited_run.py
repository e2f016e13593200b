"""A small run made by a real run state, in this process: two steps, groups of every fate, a restart, a last checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engine.config import Config, parse_config
from engine.models import create_model
from protocols import messages as m
from protocols.ledger import Decided, Issue, Score
from workers.run_state import RunState

SAMPLES = 4


def config_of(runs: Path, *, steps: int = 3) -> Config:
    rows = runs / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} =", "answer": str(i)}) + "\n" for i in range(40)))
    data = {
        "name": "trial", "runs": str(runs), "steps": steps, "objective": {"type": "dapo"},
        "model": {"type": "new", "alphabet": "0123456789= ", "hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1,
                  "intermediate": 32, "context": 32},
        "tasks": [{"type": "jsonl", "path": str(rows), "chat": False, "score": {"type": "exact"}, "held_out": 4}],
        "buffer": {"groups_per_step": 2, "samples_per_group": SAMPLES, "prompt_tokens": 16},
        "generator": {"sampling": {"max_tokens": 8}},
        "learner": {"lr": 1e-3, "token_budget": 64},
        "eval": {"prompts": 2, "every": 1},
    }  # fmt: skip
    return parse_config(data, "test")


class Served:
    """A run state with a generator, a reward and a learner that answer at once."""

    def __init__(self, config: Config, *, resume: bool = False) -> None:
        self.config, self.state, self.now = config, RunState(config, resume=resume), 0.0
        self.decisions: list[Issue | Score] = []
        for name, role in (("generator-0", "generator"), ("reward-0", "reward")):
            self.state.ledger.joined(name, role, 16)
            self.state.ledger.alive(name, [], 0.0, version=0)
            self.state.event("joined", name, f"{role} pid 1 on here")

    def turn(self) -> None:
        """What the buffer does in a turn, without a link: the answers to the last turn's decisions are its events."""
        self.now += 1.0
        for decision in self.decisions:
            match decision:
                case Issue():
                    for sample in decision.samples:
                        self.state.rollout(decision.worker, self._response(decision, sample))
                case Score():
                    self.state.grade(decision.worker, grade_of(decision))
        self.decisions.clear()
        self.state.admit()
        for decided in self.state.ledger.decide(self.now):
            match decided:
                case Decided():
                    self.state.decided(decided)
                case _:
                    self.decisions.append(decided)
        self.state.commit()

    def serve(self, *, until: int) -> None:
        """Trains up to step `until`, and on to the run's end when that is the last."""
        while self.state.ledger.committed < until or (until == self.config.steps and not self.state.finished):
            self.turn()
            step = self.state.ledger.committed + 1
            if step <= until and self.state.plan(step) is not None:
                self.state.commit()
                metrics = {"loss": 0.5 * step, "kl": float("nan"), "updates": 1.0}
                self.state.step(m.StepCommit(step, f"hash-{step}", "0.1.0+test", 1.0, 2.0, metrics, {"w": f"{step}"}))

    def _response(self, issue: Issue, sample: int) -> m.Rollout:
        tokens = np.arange(1, 4 + sample, dtype=m.INT)
        version = self.state.ledger.committed
        runs = [(version, len(tokens))] if version == 0 else [(version - 1, 1), (version, len(tokens) - 1)]
        return m.Rollout(
            issue.group, sample, issue.fence, tokens, np.full(len(tokens), -0.5, m.FLOAT), runs, "stop",
            "1", 1.0, 2.0,
        )  # fmt: skip


def grade_of(score: Score) -> m.Grade:
    """By the group's id: every fifth is all wrong, every seventh all right, number 5 fails, of the others sample 1
    sometimes cannot be graded and half are right."""
    group, sample = score.group, score.sample
    fails = (group == 5 and sample > 0) or (group % 4 == 2 and sample == 1)
    right = group % 7 == 6 or (group % 5 != 4 and sample % 2 == 0)
    if fails:
        return m.Grade(group, sample, score.attempt, "timeout", detail="10 s are over")
    return m.Grade(group, sample, score.attempt, "graded", correct=right, reward=1.0 if right else -1.0)


def make_run(runs: Path) -> Path:
    """The folder of a complete run of three steps, whose buffer was started anew after the first."""
    config = config_of(runs)
    create_model(config.model, config.run_dir / "model", 0)  # type: ignore[arg-type]
    first = Served(config)
    first.serve(until=1)
    first.turn()
    first.state.close()
    second = Served(config, resume=True)
    second.serve(until=config.steps)
    second.state.close()
    checkpoint = config.run_dir / "checkpoints" / "step-000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "headrace.json").write_text(json.dumps({"format": 1, "meta": {"step": 3, "weights_hash": "hash-3"}}))
    return config.run_dir
