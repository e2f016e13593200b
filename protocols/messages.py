"""Everything that crosses a process boundary, as frozen structs: here the work, in `protocols.link_messages` what the link is
kept up with.

Every struct checks itself in `__post_init__`, which runs both when it is made and when it is decoded, so a bad
message cannot exist on either side. Arrays are numpy, little endian, and read-only after decoding.

Three shapes carry a rollout end to end: `Ticket` (buffer to generator), `Rollout` (generator to buffer) and
`Batch` (buffer to learner).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from msgspec import Struct

from protocols.link_messages import Ack, Announce, Goodbye, Heartbeat, Hello, Status, StatusRequest, Welcome
from protocols.message_checks import check, check_array

Finish = Literal["stop", "length"]
Verdict = Literal["graded", "timeout", "crash", "infra"]

INT = np.dtype("<i4")
FLOAT = np.dtype("<f4")
BOOL = np.dtype("|b1")


def _check_tokens(where: str, tokens: np.ndarray, logprobs: np.ndarray, versions: list[tuple[int, int]]) -> None:
    check_array(f"{where}.tokens", tokens, INT)
    check_array(f"{where}.logprobs", logprobs, FLOAT, tokens.shape[0])
    # Reduced without an array in between; the largest of values with a NaN among them is NaN, and fails too.
    check(not tokens.size or bool(tokens.min() >= 0), f"{where}.tokens", "a negative id", "ids >= 0")
    largest_fits = not logprobs.size or bool(logprobs.max() <= 1e-3)
    check(largest_fits, f"{where}.logprobs", "a positive or NaN value", "log-probabilities <= 0")
    runs = sum(count for _, count in versions)
    check(runs == tokens.shape[0], f"{where}.versions", f"runs over {runs} tokens", f"{tokens.shape[0]} tokens")
    check(
        all(count > 0 and 0 <= version < 1 << 31 for version, count in versions),
        f"{where}.versions",
        versions,
        "(version >= 0, count > 0) runs",
    )


class Sampling(Struct, frozen=True):
    """How to draw tokens. `top_k` 0 and `top_p` 1 switch truncation off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check(self.max_tokens >= 1, "sampling.max_tokens", self.max_tokens, "at least 1")
        check(0 < self.temperature < math.inf, "sampling.temperature", self.temperature, "a positive number")
        check(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "in (0, 1]")
        check(self.top_k >= 0, "sampling.top_k", self.top_k, "at least 0")


class Partial(Struct, frozen=True, eq=False):
    """An unfinished response: what a leaving generator hands back and another one continues from.

    `tokens` int32 [T]; `logprobs` float32 [T] under the weights that sampled each token; `versions` runs of
    (weights version, token count) that add up to T.
    """

    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    versions: list[tuple[int, int]]

    def __post_init__(self) -> None:
        check(self.sample >= 0, "partial.sample", self.sample, "at least 0")
        _check_tokens("partial", self.tokens, self.logprobs, self.versions)


class Ticket(Struct, frozen=True, tag="ticket", eq=False):
    """Buffer to generator: make these samples of this group.

    `prompt` int32 [P]. `fence` is the token under which results are accepted; a later ticket for the same sample
    carries a higher one. The response of sample i is a function of (weights, prompt, sampling, seed, i) alone.
    The generator starts only once it serves weights of at least `min_version`.
    """

    group: int
    samples: list[int]
    fence: int
    prompt: np.ndarray
    sampling: Sampling
    seed: int
    min_version: int = 0
    resume: list[Partial] = []

    def __post_init__(self) -> None:
        check(self.group >= 0 and self.fence >= 0, "ticket", (self.group, self.fence), "group and fence >= 0")
        check(
            len(self.samples) == len(set(self.samples)) > 0,
            "ticket.samples",
            self.samples,
            "distinct indices, at least one",
        )
        check_array("ticket.prompt", self.prompt, INT)
        check(self.prompt.shape[0] > 0, "ticket.prompt", 0, "at least one token")


class Rollout(Struct, frozen=True, tag="rollout", eq=False):
    """Generator to buffer: one finished response.

    `tokens` int32 [T] include the stop token when `finish` is "stop"; `logprobs` float32 [T] are of the
    temperature-scaled full softmax of the weights that sampled each token (the distribution that is trained);
    `versions` are runs (version, count) over the T tokens; times are Unix seconds.
    """

    group: int
    sample: int
    fence: int
    tokens: np.ndarray
    logprobs: np.ndarray
    versions: list[tuple[int, int]]
    finish: Finish
    text: str
    started_at: float
    finished_at: float

    def __post_init__(self) -> None:
        check(
            min(self.group, self.sample, self.fence) >= 0, "rollout", (self.group, self.sample, self.fence), "ids >= 0"
        )
        _check_tokens("rollout", self.tokens, self.logprobs, self.versions)
        check(self.tokens.shape[0] > 0, "rollout.tokens", 0, "at least one token")
        times = (self.started_at, self.finished_at)
        check(all(map(math.isfinite, times)), "rollout times", times, "finite numbers")


class HandBack(Struct, frozen=True, tag="hand_back", eq=False):
    """Generator to buffer: samples of a ticket that it will not finish, with what it has of each (possibly nothing)."""

    group: int
    fence: int
    samples: list[int]
    partials: list[Partial] = []

    def __post_init__(self) -> None:
        check(
            {p.sample for p in self.partials} <= set(self.samples),
            "hand_back.partials",
            [p.sample for p in self.partials],
            f"among {self.samples}",
        )


class GradeTask(Struct, frozen=True, tag="grade_task"):
    """Buffer to reward: score this response. `answer` is the data row's own JSON object, as text."""

    group: int
    sample: int
    attempt: int
    task: str
    prompt_text: str
    text: str
    answer: str
    response_tokens: int
    finish: Finish


class Grade(Struct, frozen=True, tag="grade"):
    """Reward to buffer. `correct` is raw accuracy; `reward` is what is trained on (shaped); `parts` say how it came about."""

    group: int
    sample: int
    attempt: int
    verdict: Verdict
    correct: bool = False
    reward: float = 0.0
    parts: dict[str, float] = {}
    detail: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        check(math.isfinite(self.reward), "grade.reward", self.reward, "a finite number")
        check(math.isfinite(self.seconds), "grade.seconds", self.seconds, "a finite number")
        check(all(math.isfinite(x) for x in self.parts.values()), "grade.parts", self.parts, "finite numbers")


class PlanRequest(Struct, frozen=True, tag="plan_request"):
    """Learner to buffer: which groups make step `step`? Asked by every rank; answered when the groups are ready."""

    step: int


class GroupSize(Struct, frozen=True):
    """What a rank needs to balance the work before it has the data: token counts of one group."""

    group: int
    prompt_tokens: int
    response_tokens: list[int]


class Plan(Struct, frozen=True, tag="plan"):
    """Buffer to learner: the groups of `step`, in training order.

    `weights_hash` is set when the log already holds this step's commit: the learner re-trains it and must come to
    the same hash. `last` says that no step follows. `metrics` are the buffer's own figures for the step.
    """

    step: int
    groups: list[GroupSize]
    weights_hash: str | None = None
    last: bool = False
    metrics: dict[str, float] = {}


class Pull(Struct, frozen=True, tag="pull"):
    """Learner rank to buffer: send me these groups."""

    step: int
    groups: list[int]


class Batch(Struct, frozen=True, tag="batch", eq=False):
    """Buffer to learner: whole groups, in columns.

    n groups, m responses, N response tokens, P prompt tokens in all:
    `groups` int32 [n]; `prompt_lengths` int32 [n]; `prompts` int32 [P]; `sizes` int32 [n] responses per group;
    `lengths` int32 [m]; `tokens` int32 [N]; `logprobs` float32 [N] (behaviour); `versions` int32 [N];
    `rewards` float32 [m] (shaped); `correct` bool [m]; `truncated` bool [m].
    """

    step: int
    groups: np.ndarray
    prompt_lengths: np.ndarray
    prompts: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    rewards: np.ndarray
    correct: np.ndarray
    truncated: np.ndarray

    def __post_init__(self) -> None:
        n, m = self.groups.shape[0], self.lengths.shape[0]
        total, prompt_total = int(self.lengths.sum()), int(self.prompt_lengths.sum())
        columns: list[tuple[str, np.dtype, int]] = [
            ("groups", INT, n), ("prompt_lengths", INT, n), ("prompts", INT, prompt_total), ("sizes", INT, n),
            ("lengths", INT, m), ("tokens", INT, total), ("logprobs", FLOAT, total), ("versions", INT, total),
            ("rewards", FLOAT, m), ("correct", BOOL, m), ("truncated", BOOL, m),
        ]  # fmt: skip
        for name, dtype, length in columns:
            check_array(f"batch.{name}", getattr(self, name), dtype, length)
        check(int(self.sizes.sum()) == m, "batch.sizes", int(self.sizes.sum()), f"{m} responses in all")


class StepCommit(Struct, frozen=True, tag="step_commit"):
    """Learner rank 0 to buffer: `step` is trained. It counts once the buffer has committed and acknowledged this.

    `fingerprints` are of every weight after the step by name (a critic's with the prefix `critic.`), and `weights_hash`
    is of all of them."""

    step: int
    weights_hash: str
    code_version: str
    started_at: float
    finished_at: float
    metrics: dict[str, float]
    fingerprints: dict[str, str] = {}


Message = (
    Ticket | Rollout | HandBack | GradeTask | Grade | PlanRequest | Plan | Pull | Batch | StepCommit | Announce | Heartbeat
    | Hello | Welcome | Ack | StatusRequest | Status | Goodbye
)  # fmt: skip
"""Every message, of both files."""
