"""Rows of the log as frozen structs."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from msgspec import Struct

Kind = Literal["train", "eval", "ready"]
Status = Literal["waiting", "trained", "dropped", "failed", "evaluated"]


class GroupRow(Struct, frozen=True, eq=False):
    """One prompt and its samples. `prompt` int32 [P]; `answer` is the data row's answer, JSON; `seed` is of its draws.

    `ready` groups come with their responses (supervised fine-tuning); an `eval` group's `min_version` is the step
    that it evaluates. The last three fields are what became of it.
    """

    group: int
    kind: Kind
    source_index: int
    task: str
    prompt_id: str
    prompt: np.ndarray
    prompt_text: str
    answer: str
    samples: int
    seed: int
    min_version: int
    issued_at: float
    status: Status = "waiting"
    reason: str | None = None
    step: int | None = None


class SampleState(Struct, frozen=True):
    """What the log has of one sample: its response, and the attempts at grading it as (attempt, verdict, correct)."""

    sample: int
    response_tokens: int
    attempts: list[tuple[int, str, bool]]


class OpenGroup(Struct, frozen=True, eq=False):
    """A group that no step has planned and nothing has ended; samples without a response are not listed."""

    row: GroupRow
    samples: list[SampleState]


class StepRow(Struct, frozen=True):
    """A committed training step. Metrics that were not finite are NaN."""

    step: int
    weights_hash: str
    code_version: str
    started_at: float
    finished_at: float
    committed_at: float
    config_id: str
    fingerprints: dict[str, str]
    metrics: dict[str, float]


class Event(Struct, frozen=True):
    """Something that happened to the run: who joined, left, was refused, and why."""

    at: float
    kind: str
    worker: str
    detail: str


class Start(Struct, frozen=True):
    """A model that step 1 starts from: its folder when the run began, and a digest of its weights' files."""

    folder: str
    digest: str


class Origin(Struct, frozen=True):
    """The log that this one was made from, `how` ("replay" or "regrade"), and the settings that were changed."""

    how: str
    log: str
    run: str
    created_at: float
    settings: list[str]


class Meta(Struct, frozen=True):
    """What the run is. `critic` is that of `critic.path`, where the config has one."""

    run: str
    config: dict[str, Any]
    code_version: str
    created_at: float
    schema: int
    start: Start | None = None
    critic: Start | None = None
    origin: Origin | None = None
