"""Where prompts come from, and how answers are scored."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import field

from engine.config_section import Section

RECEIPT_FIELDS = ("company", "date", "address", "total")
"""The labels of SROIE's receipts."""


class ReasoningGymScore(Section, frozen=True, tag="reasoning-gym"):
    """The data set's own `score_answer`; correct at `threshold` or above."""

    threshold: float = 1.0


class MathVerifyScore(Section, frozen=True, tag="math-verify"):
    """`math_verify` equivalence of the extracted answer with the row's answer."""


class ExactScore(Section, frozen=True, tag="exact"):
    """String equality after stripping white space."""


class PythonScore(Section, frozen=True, tag="python"):
    """A function of yours, `module:function`, called as `function(text, answer_row) -> bool | float | {"correct", "reward", ...parts}`."""

    function: str


Extract = Literal["whole", "first-line", "last-line", "answer-line", "boxed", "answer-tag", "hashes"]


class ReasoningGymTask(Section, frozen=True, tag="reasoning-gym"):
    """A procedural data set of reasoning-gym: `params` go to its config, rows are drawn from `seed`."""

    dataset: str
    params: dict[str, Any] = field(default_factory=dict)
    size: int = 20_000
    seed: int = 1
    prompt: str = "{question}"
    solution: str = "{answer}"
    chat: bool = True
    system: str | None = None
    extract: Extract = "answer-line"
    score: ReasoningGymScore | ExactScore | PythonScore = ReasoningGymScore()
    held_out: int = 256
    weight: float = 1.0


class JsonlTask(Section, frozen=True, tag="jsonl"):
    """Rows of a .jsonl or .jsonl.gz file. `prompt`, `solution` and `answer` are format strings over a row's fields
    (dotted and indexed access allowed, as in `{reward_model[ground_truth]}`); `messages` names a field that already
    holds chat messages and then replaces `prompt`."""

    path: str
    prompt: str = "{prompt}"
    messages: str | None = None
    solution: str | None = None
    answer: str = "{answer}"
    chat: bool = True
    system: str | None = None
    extract: Extract = "answer-line"
    score: MathVerifyScore | ExactScore | PythonScore = MathVerifyScore()
    held_out_path: str | None = None
    held_out: int = 256
    weight: float = 1.0


class DocumentScore(Section, frozen=True, tag="document"):
    """The reward is the field F1 of the JSON object in a response, dates and amounts in their normal forms: against the page's
    labels where it has some, else against what the UTel tagger in the folder `utel` reads on the page. Where both are there
    the grade's parts have both. Right from an F1 of `threshold` on; `device` is the tagger's."""

    utel: str | None = None
    device: str = "cpu"
    threshold: float = 1.0


class DocumentsTask(Section, frozen=True, tag="documents"):
    """Documents to extract fields from. `path` is a .jsonl or .jsonl.gz file of receipts or of pages, or a folder in the
    official layout of SROIE, in that of FUNSD, or of PDFs (which have no labels).

    `fields` are wanted of every page; none at all stands for those that the page is labelled with (FUNSD). About `held_out`
    pages are held out, whole companies, templates or PDF files. The prompt is `question`, where `{fields}` stands for the
    names (None: a full one), and the page's rows after it or where it says `{page}`, with the places of their texts if
    `positions`: of at most the first
    `first_words` words (whole rows), then at most `max_characters` in all, for which the middle of the page gives way.
    """

    path: str
    fields: list[str] = field(default_factory=lambda: list(RECEIPT_FIELDS))
    first_words: int | None = None
    max_characters: int = 6000
    positions: bool = True
    question: str | None = None
    chat: bool = True
    system: str | None = None
    score: DocumentScore = DocumentScore()
    held_out: int = 100
    weight: float = 1.0


class LogTask(Section, frozen=True, tag="log"):
    """Rollouts of earlier runs as training data: `path` names one or more logs (`rollouts.db` or the folder of a run).

    Groups of one of `status` that have all their responses are drawn with them, their log-probabilities and grades; with
    `dynamic_sampling` only those that are neither all right nor all wrong. In a log that was graded anew, what waits is
    what no step has trained yet. Beside logs, tasks of other types give their held-out prompts alone.
    """

    path: str | list[str]
    status: list[Literal["trained", "dropped", "waiting"]] = field(
        default_factory=lambda: ["trained", "dropped", "waiting"]
    )
    dynamic_sampling: bool = True
    weight: float = 1.0


Task = ReasoningGymTask | JsonlTask | DocumentsTask
"""What has prompts and can be scored."""
