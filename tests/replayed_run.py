"""A stored run made in this process, with a real (tiny) model that a real trainer trained: no launch, no generator."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Config, dump_config, parse_config
from engine.models import create_model
from engine.text import TextModel
from protocols import messages as m
from protocols.log import GroupRow, Kind, Log
from workers.log_feed import LogFeed
from workers.metrics import MetricsWriter
from workers.start import critic_of, start_of
from workers.trainer import Trainer

LETTERS = "abcdefgh"
GROUPS, SAMPLES = 3, 4


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    """Steps of 3 groups of 4 samples; `sections` add to or replace keys of the config's sections."""
    data: dict[str, Any] = {
        "name": folder.name, "runs": str(folder.parent), "steps": 4, "objective": {"type": "dapo"},
        "model": {"type": "new", "alphabet": f" ={LETTERS}", "hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1,
                  "intermediate": 32, "context": 32},
        "tasks": [{"type": "jsonl", "path": "words.jsonl", "chat": False, "extract": "whole", "score": {"type": "exact"},
                   "held_out": 0}],
        "buffer": {"groups_per_step": GROUPS, "samples_per_group": SAMPLES, "prompt_tokens": 16},
        "generator": {"sampling": {"max_tokens": 8}},
        "learner": {"lr": 1e-2, "updates_per_step": 2, "token_budget": 64, "checkpoint_every": 2, "device": "cpu"},
    }  # fmt: skip
    for name, keys in sections.items():
        data[name] = {**data[name], **keys} if isinstance(data.get(name), dict) else keys
    return parse_config(data, "test")


class Maker:
    """Writes and trains a run, step by step."""

    def __init__(self, folder: Path, **sections: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        self.folder, self.config = folder, config_of(folder, **sections)
        create_model(self.config.model, folder / "model", 0)  # type: ignore[arg-type]
        self.text = TextModel.load(folder / "model")
        self.log = Log.create(
            folder / "rollouts.db", run=folder.name, config=dump_config(self.config), code_version="0.1.0+test",
            start=start_of(folder / "model"),
            critic=critic_of(self.config),
        )  # fmt: skip
        self.log.commit()
        self.metrics = MetricsWriter(folder)
        self.random = np.random.default_rng(0)
        self.next_group = 0
        self.feed = LogFeed(self.log, last=self.config.steps)
        self.trainer = Trainer(self.config, self.feed, rank=0, world=1, device="cpu")

    def group(self, rights: list[bool], *, version: int = 0, kind: Kind = "train", missing: int = 0) -> int:
        """A group whose responses, but `missing` ones, are there and graded: a right one is the prompt's word backward."""
        group, self.next_group = self.next_group, self.next_group + 1
        word = "".join(self.random.choice(list(LETTERS), 3))
        answer = json.dumps({"answer": word[::-1], "row": {"word": word}})
        self.log.add_group(
            GroupRow(
                group=group, kind=kind, source_index=group, task="words", prompt_id=f"words-{group}",
                prompt=self.text.encode(f"{word} ="), prompt_text=f"{word} =", answer=answer, samples=len(rights) + missing,
                seed=group,
                min_version=version, issued_at=1000.0 + group,
            )
        )  # fmt: skip
        for sample, right in enumerate(rights):
            text = word[::-1] if right else "".join(self.random.choice(list(LETTERS), 2 + sample % 3)) + word[0]
            tokens = np.append(self.text.encode(text), np.int32(self.text.eos)).astype(m.INT)
            rollout = m.Rollout(
                group=group, sample=sample, fence=1, tokens=tokens, versions=[(version, len(tokens))], finish="stop", text=text,
                logprobs=-self.random.random(len(tokens)).astype(m.FLOAT) - 1.5, started_at=1001.0, finished_at=1002.0,
            )  # fmt: skip
            self.log.add_rollout("gen", rollout, 1003.0)
            grade = m.Grade(group, sample, 0, "graded", correct=right, reward=1.0 if right else -1.0, seconds=0.01)
            self.log.add_grade("reward", grade, 1004.0)
        return group

    def drop(self, rights: list[bool], *, version: int = 0) -> int:
        group = self.group(rights, version=version)
        self.log.set_group(group, "dropped", reason="all correct" if all(rights) else "all wrong")
        return group

    def plan(self, step: int) -> list[int]:
        """A step's worth of informative groups, planned."""
        groups = [self.group([i % 2 == 0, i % 3 == 0, False, True], version=step - 1) for i in range(GROUPS)]
        self.log.add_plan(step, groups)
        return groups

    def step(self, step: int) -> None:
        """A step, trained and committed, with its checkpoint where one is due."""
        self.plan(step)
        plan, updates = self.trainer.pull(step)
        trained = self.trainer.train(plan, updates, wait_s=0.0)
        self.log.commit_step(trained.commit)
        self.log.commit()
        self.metrics.step(step, trained.commit.metrics)
        if step % self.config.learner.checkpoint_every == 0:
            self.trainer.save(trained)

    def go_on_with(self, after: int, **sections: dict[str, Any]) -> None:
        """The run is continued with another config, as by `launch --resume`: from its checkpoint of step `after`."""
        self.config = config_of(self.folder, **sections)
        self.log.set_config(dump_config(self.config))
        self.trainer = Trainer(self.config, self.feed, rank=0, world=1, device="cpu")
        assert self.trainer.resume(after) == after

    def close(self) -> Path:
        self.log.commit()
        self.log.close()
        self.metrics.close()
        return self.folder


def make_run(folder: Path, *, steps: int = 4) -> Path:
    """Trained steps, each with a group that was dropped, and an evaluation of the first weights. Step 1 has both kinds of
    dropped groups."""
    made = Maker(folder)
    evaluated = made.group([True, False], kind="eval")
    made.log.set_group(evaluated, "evaluated")
    made.drop([True] * SAMPLES)
    for step in range(1, steps + 1):
        made.drop([False] * SAMPLES, version=step - 1)
        made.step(step)
    return made.close()


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
