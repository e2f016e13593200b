"""A trained tagger at work: pages in, entities and fields out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from engine.devices import resolve_device
from engine.documents.page import Page
from engine.utel.decoding import Entity, Field, best_fields, entities
from engine.utel.encode import encode_page
from engine.utel.tagging import load_tagger, predict_logits
from engine.utel.wordpiece import load_wordpiece

PAGES_AT_ONCE = 64


class Reader:
    """A tagger's folder, loaded once. `types` are the entity types that it knows."""

    def __init__(self, folder: str | Path, *, device: str = "auto") -> None:
        """Raises `ConfigError` for a folder that is not a tagger's."""
        self.model = load_tagger(folder).to(resolve_device(device))
        self.pieces = load_wordpiece(folder)
        self.types = sorted({label[2:] for label in self.model.labels if label != "O"})

    def entities(self, pages: Sequence[Page]) -> list[list[Entity]]:
        """Of each page, in the words' order."""
        return [entities(logits, self.model.labels) for logits in self._logits(pages)]

    def fields(self, pages: Sequence[Page], types: Sequence[str]) -> list[dict[str, Field]]:
        """Of each page, the fields of these types that are found."""
        return [
            best_fields(page, logits, self.model.labels, types, self.model.habits)
            for page, logits in zip(pages, self._logits(pages), strict=True)
        ]

    def each(self, pages: Iterable[Page], types: Sequence[str]) -> Iterator[tuple[Page, dict[str, Field]]]:
        """As `fields`, `PAGES_AT_ONCE` at a time, of as many pages as there are."""
        rest = iter(pages)
        while some := list(islice(rest, PAGES_AT_ONCE)):
            yield from zip(some, self.fields(some, types), strict=True)

    def _logits(self, pages: Sequence[Page]) -> list[np.ndarray]:
        """[words, labels] of each page."""
        encoded = [encode_page(self.pieces, page.words, page.boxes, id=page.id) for page in pages]
        return predict_logits(self.model, self.pieces, encoded)
