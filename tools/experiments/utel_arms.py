"""What UTel's pretraining is worth: each arm is a pretraining and a tagging run of `configs/utel-receipts*.toml`, as data.

All arms of a seed share word pieces, starting weights, pages, steps and rates; an arm's settings are all that differs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from msgspec import Struct

from engine.config import load_config
from tools.experiments.runs import Run

PRETRAINING, TAGGING = "configs/utel-receipts-pretrain.toml", "configs/utel-receipts.toml"
SYNTHETIC_FIELDS = ["address", "birth_date", "buyer", "company", "date", "due_date", "email", "invoice_number", "name",
                    "occupation", "phone", "subtotal", "tax", "total"]  # fmt: skip
HELD_OUT = 100
"""Pages of held-out companies (receipts) or templates (synthetic pages), the same for every seed and arm (but for 2)."""
HIDE = 0.1
"""The share of words that are covered in tagging, which the config may choose anew without changing the tables."""


class PageArm(Struct, frozen=True):
    """`settings` are the pretraining's `--set` texts, None without pretraining, which takes `times` as many steps as those
    of the other arms; `boxes`, the model's `clip` distance and its term of the `sequence` are those of both runs."""

    name: str
    settings: tuple[str, ...] | None = ()
    times: int = 1
    boxes: Literal["seen", "hidden", "shuffled"] = "seen"
    clip: int = 50
    sequence: Literal["relative", "absolute"] = "relative"


class PageTable(Struct, frozen=True):
    """The arms' pages are receipts, synthetic pages, or sheets of receipts. `start` is the arm whose fresh model is the start of
    the others with its seed (not of those with other weights: a table of places is one)."""

    data: Literal["receipts", "synthetic", "sheets"]
    arms: tuple[PageArm, ...]
    start: PageArm


NO_SWP, NO_CWE = "objective.swp.weight=0", "objective.cwe.weight=0"
ALL = PageArm("all")
TASKS = (
    PageArm("none", None),
    PageArm("mllm", (NO_SWP, NO_CWE)),
    PageArm("mllm-twice", (NO_SWP, NO_CWE), times=2),  # as often as the contrastive task sees a page
    PageArm("mllm-swp", (NO_CWE,)),
    PageArm("mllm-cwe", (NO_SWP,)),
    ALL,
    PageArm("text-only", (NO_SWP, NO_CWE), boxes="hidden"),  # without places no words are surrounding ones
    PageArm("shuffled", (NO_SWP, NO_CWE), boxes="shuffled"),
)
CLIPS = tuple(PageArm(f"clip-{distance}", clip=distance) for distance in (0, 10, 25))
CLIPS = (*CLIPS, ALL, PageArm("clip-100", clip=100), PageArm("clip-none", clip=-1))
ORDERS = (PageArm("relative"), PageArm("absolute", sequence="absolute"))
TABLES = {
    "receipts": PageTable("receipts", TASKS, ALL),
    "synthetic": PageTable("synthetic", TASKS, ALL),
    "clip": PageTable("receipts", CLIPS, ALL),
    "length": PageTable("sheets", ORDERS, ORDERS[0]),
}
"""By the names that the command line uses."""

TRAINED, TESTED = 256, (512, 1024)
"""Lengths of rows of the table `length`. Receipts have about 200 sub-tokens, so `JOINED` of them make a sheet that fills a row
of 1024; sheets are trained on and tested on alike, so that nothing but the length of the rows is new in a test."""
JOINED = 6
SHEETS = 1
"""In a step: about as many receipts as the other tables' steps have pages."""


class PageExperiment(Struct, frozen=True):
    """Where the runs of a table lie and what they have in common; `extra` are settings of all of them."""

    table: PageTable
    folder: Path
    receipts: str
    pretraining_steps: int
    tagging_steps: int
    extra: tuple[str, ...] = ()

    def runs(self, arm: PageArm, seed: int) -> list[Run]:
        """The arm's pretraining, if any, and its tagging, which is the last."""
        before = [] if arm.settings is None else [self._pretraining(arm, seed)]
        policy = f"{before[0].config.run_dir}/checkpoints/step-{before[0].config.steps:06d}" if before else ""
        start = f'model.path="{policy}"' if policy else self._fresh(seed)
        fields = [f"objective.fields={json.dumps(SYNTHETIC_FIELDS)}"] if self.table.data == "synthetic" else []
        settings = ["cold_start=", start, *fields, f"objective.hide={HIDE}", f"eval.prompts={self._held_out}"]
        name = f"{arm.name}-tag-s{seed}"
        return [*before, self._run(TAGGING, name, arm, seed=seed, steps=self.tagging_steps, settings=settings)]

    def _pretraining(self, arm: PageArm, seed: int) -> Run:
        own = arm == self.table.start or arm.sequence != self.table.start.sequence
        settings = [*(arm.settings or ()), *([] if own else [self._fresh(seed)])]
        steps = self.pretraining_steps * arm.times
        return self._run(PRETRAINING, f"{arm.name}-s{seed}", arm, seed=seed, steps=steps, settings=settings)

    def _fresh(self, seed: int) -> str:
        return f'model.path="{self.folder}/{self.table.start.name}-s{seed}/model"'

    def _run(self, path: str, name: str, arm: PageArm, *, seed: int, steps: int, settings: list[str]) -> Run:
        if self.table.data == "synthetic":
            own = [f'tasks=[{{type = "pages", synthetic = 4000, held_out = {HELD_OUT}}}]']
        else:
            own = [f'tasks.0.path="{self.receipts}"']
        if self.table.data == "sheets":
            own += self._rows(path)
        own += [f"seed={seed}", f"steps={steps}", f"eval.every={steps}"]
        own += [f"learner.decay_steps={steps}"] if load_config(path).learner.decay_steps else []
        own += [] if arm.clip == ALL.clip else [f"model.clip_distance={arm.clip}"]
        if arm.sequence == "absolute":
            own += ['model.sequence="absolute"', f"model.max_positions={TESTED[-1]}"]
        if arm.boxes != "seen":
            tasks = len(load_config(path, own).tasks)
            own += [f'tasks.{index}.boxes="{arm.boxes}"' for index in range(tasks)]
        settings = [f'runs="{self.folder}"', f'name="{name}"', *own, *settings, *self.extra]
        return Run(path=path, settings=tuple(settings), config=load_config(path, settings))

    def _rows(self, path: str) -> list[str]:
        """The settings of sheets and of their rows' lengths."""
        joined = [f"tasks.{index}.joined={JOINED}" for index in range(len(load_config(path).tasks))]
        lengths = [f"objective.length={TRAINED}", f"objective.test_lengths={list(TESTED)}"]
        return [*joined, *lengths, f"buffer.groups_per_step={SHEETS}", f"eval.prompts={self._held_out}"]

    @property
    def _held_out(self) -> int:
        return HELD_OUT // JOINED if self.table.data == "sheets" else HELD_OUT
