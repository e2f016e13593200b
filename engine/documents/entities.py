"""Scores of predicted BIO tags, and the fields that tags say."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from msgspec import Struct

from engine.documents.tags import spans
from engine.documents.values import value_in

try:
    from seqeval.metrics import v1  # type: ignore[import-untyped]
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support  # type: ignore[import-untyped]
    from seqeval.scheme import IOB2  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        f"{error}: entity scores need the extra `documents` (pip install 'headrace[documents]')"
    ) from error


class TypeScore(Struct, frozen=True):
    """`support` counts the true entities."""

    precision: float
    recall: float
    f1: float
    support: int


class Scores(Struct, frozen=True):
    """Micro averages over all entities, and by type."""

    micro: TypeScore
    types: dict[str, TypeScore]


class EntityScores(Struct, frozen=True):
    """seqeval's two readings of the same tags. `default` is lenient (an entity may begin with "I-"), and is what papers
    quote; `strict` takes the tags as IOB2."""

    default: Scores
    strict: Scores
    missing_words: int
    """Words at the ends of pages that got no tag; they count as "O"."""


def score_tags(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> EntityScores:
    """Entity-level scores: exact span and type, one tag a word, a list for each page. A page's predicted tags may end early
    (the model read no further): the rest is "O", so what stands there is missed. Raises `ValueError` for other lengths, and
    for tags without a hyphen, whose type seqeval would misread."""
    if len(gold) != len(predicted):
        raise ValueError(f"predicted: got {len(predicted)} pages, expected {len(gold)}")
    padded: list[list[str]] = []
    for page, (true, tags) in enumerate(zip(gold, predicted, strict=True)):
        if len(tags) > len(true):
            raise ValueError(f"predicted[{page}]: got {len(tags)} tags, expected at most {len(true)}, one a word")
        for tag in (*true, *tags):
            if tag != "O" and tag[:2] not in ("B-", "I-"):
                raise ValueError(f"page {page}: got the tag {tag!r}, expected 'O', 'B-TYPE' or 'I-TYPE'")
        padded.append([*tags, *["O"] * (len(true) - len(tags))])
    true_tags = [list(tags) for tags in gold]
    return EntityScores(
        default=_scores(true_tags, padded, strict=False),
        strict=_scores(true_tags, padded, strict=True),
        missing_words=sum(len(true) - len(tags) for true, tags in zip(gold, predicted, strict=True)),
    )


def _scores(gold: list[list[str]], predicted: list[list[str]], *, strict: bool) -> Scores:
    """By seqeval; its lists by type hold the types that have an entity, by name. In IOB2 an entity has a "B-"."""
    begins = ("B-",) if strict else ("B-", "I-")
    types = sorted({tag[2:] for tags in (*gold, *predicted) for tag in tags if tag.startswith(begins)})
    if not types:
        return Scores(TypeScore(0.0, 0.0, 0.0, 0), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # types without a true or a predicted entity, which score 0 here
        if strict:
            by_type = v1.precision_recall_fscore_support(gold, predicted, average=None, zero_division=0, scheme=IOB2)
            micro = v1.precision_recall_fscore_support(gold, predicted, average="micro", zero_division=0, scheme=IOB2)
        else:
            by_type = precision_recall_fscore_support(gold, predicted, average=None, zero_division=0)
            micro = precision_recall_fscore_support(gold, predicted, average="micro", zero_division=0)
    support = [int(count) for count in by_type[3]]
    columns = [[float(figure) for figure in column] for column in by_type[:3]]
    scored = [TypeScore(*row) for row in zip(*columns, support, strict=True)]
    return Scores(
        TypeScore(float(micro[0]), float(micro[1]), float(micro[2]), sum(support)),
        dict(zip(types, scored, strict=True)),
    )


def fields_from_tags(words: Sequence[str], tags: Sequence[str]) -> dict[str, str]:
    """The fields that tagged words hold, to be graded by `fields.compare` as a model's answer is.

    Of several entities of one type the last is the total and the first is any other field, the rules by which labels are
    placed. The value is the date or the amount in an entity's words where the field is one and there is one
    ("DATE:01/02/2018"), else the words joined by spaces. Words past the end of `tags` are not in any entity.
    """
    chosen: dict[str, str] = {}
    for type_, start, stop in spans(tags[: len(words)]):
        text = " ".join(words[start:stop])
        if type_ not in chosen or type_ == "total":
            chosen[type_] = value_in(type_, text)
    return chosen
