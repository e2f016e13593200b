"""Forms in FUNSD's format: `annotations/*.json` with form[] of words, label and linking, and `images/*.png`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct, field

from engine.documents.page import Box, Page, normalise_box
from engine.documents.sroie import image_size
from engine.documents.tags import Span, tags_of
from engine.fields import TaskError

LABELS = ("header", "question", "answer", "other")


class FunsdReport(Struct):
    """What an import met. `blank_words` are left out, and so are entities with nothing else; `links_left_out` have an end in
    one of those, or join other things than a question and an answer."""

    pages: int = 0
    words: int = 0
    blank_words: int = 0
    clipped_boxes: int = 0
    links: int = 0
    links_left_out: int = 0
    entities: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LABELS, 0))


class _Word(Struct):
    text: str
    box: tuple[float, float, float, float]


class _Entity(Struct):
    id: int
    label: str
    words: list[_Word]
    linking: list[tuple[int, int]] = []


class _Form(Struct):
    form: list[_Entity]


def read_funsd_folder(folder: Path, report: FunsdReport) -> Iterator[Page]:
    """Pages of a folder such as FUNSD's `training_data`, boxes of words (never of segments, which give the entities away).

    Words in the file's order; tags "B-question" and so on, "other" is "O". A question's linked answers, joined in reading
    order, are the field of the question's text. `linking` holds unordered pairs; the question is the key. Raises `TaskError`
    that names the file and place.
    """
    paths = sorted(folder.glob("annotations/*.json"))
    if not paths:
        raise TaskError(f"{folder}: no annotations/*.json, expected FUNSD's layout (annotations/ and images/)")
    for path in paths:
        try:
            form = msgspec.convert(json.loads(path.read_bytes()), _Form).form
        except OSError as error:
            raise TaskError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, msgspec.ValidationError) as error:
            raise TaskError(f"{path}: not a FUNSD form: {error}") from error
        yield _page(path, form, image_size(folder / "images" / f"{path.stem}.png"), report)


def _page(path: Path, form: list[_Entity], size: tuple[int, int], report: FunsdReport) -> Page:
    words: list[str] = []
    boxes: list[Box] = []
    placed: dict[int, Span] = {}
    for number, entity in enumerate(form):
        if entity.label not in LABELS:
            raise TaskError(f"{path}: form[{number}].label: got {entity.label!r}, expected one of {', '.join(LABELS)}")
        start = len(words)
        for word in entity.words:
            if not word.text.strip():
                report.blank_words += 1
                continue
            box, clipped = normalise_box(word.box, *size)
            report.clipped_boxes += clipped
            words.append(word.text.strip())
            boxes.append(box)
        if len(words) > start:
            placed[entity.id] = Span(entity.label, start, len(words))
            report.entities[entity.label] += 1
    pairs = _pairs(form, placed, report)
    report.pages += 1
    report.words += len(words)
    return Page(
        id=path.stem,
        words=words,
        boxes=boxes,
        tags=tags_of((span for span in placed.values() if span.type != "other"), len(words)),
        fields=_fields(pairs, words),
        links=[(key.start, value.start) for key, value in pairs],
        family="funsd",
    )


def _pairs(form: list[_Entity], placed: dict[int, Span], report: FunsdReport) -> list[tuple[Span, Span]]:
    """(question, answer) of every link, each once: the files name a link at both of its ends."""
    pairs: set[tuple[Span, Span]] = set()
    for link in {(min(link), max(link)) for entity in form for link in entity.linking}:
        ends = {placed[end].type: placed[end] for end in link if end in placed}
        if "question" in ends and "answer" in ends:
            pairs.add((ends["question"], ends["answer"]))
        else:
            report.links_left_out += 1
    report.links += len(pairs)
    return sorted(pairs, key=lambda pair: (pair[0].start, pair[1].start))


def _fields(pairs: list[tuple[Span, Span]], words: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for key, value in pairs:
        name = " ".join(words[key.start : key.stop]).rstrip(" :")
        text = " ".join(words[value.start : value.stop])
        fields[name] = f"{fields[name]} {text}" if name in fields else text
    return fields
