"""What a page looks like to the model: which text and which boxes are hidden, and what is asked for.

All draws are a function of (seed, step, page, window), whatever else is in the batch, and each task has draws of its own,
so that leaving one out does not change another's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import xxhash

from engine.utel.config import SIZE
from engine.utel.encode import Row, Window, lay_out
from engine.utel.pretraining.config import CweConfig, MllmConfig, PretrainingConfig, SwpConfig
from engine.utel.pretraining.neighbours import NONE, nearest, neighbours
from engine.utel.wordpiece import WordPiece

NEAR = 10
"""Half of the "pair" reading's negatives are drawn from so many nearest words."""

_MLLM, _SWP, _CWE, _JITTER = range(4)


@dataclass(frozen=True)
class Mllm:
    """Places in the row [T] and the ids that stood there."""

    at: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Swp:
    """Questions [K]: the anchor's place in the row, what is asked, and the answer.

    "vocabulary": `asked` is a direction 0..3, labels are ids. "pair": `asked` is the other word's place, labels are 0 (no
    neighbour) or 1 + direction. `in_order` is what one would answer who knows only the reading order.
    """

    at: np.ndarray
    asked: np.ndarray
    labels: np.ndarray
    in_order: np.ndarray


@dataclass(frozen=True)
class Cwe:
    """Sampled words [K] of both views: their places in the row, whether they are hidden, whether their text is there twice."""

    at: np.ndarray
    hidden: np.ndarray
    repeated: np.ndarray


_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class View:
    row: Row
    mllm: Mllm = field(default_factory=lambda: Mllm(_NOTHING, _NOTHING))
    swp: Swp = field(default_factory=lambda: Swp(_NOTHING, _NOTHING, _NOTHING, _NOTHING))


@dataclass(frozen=True)
class Example:
    """A window as one view, or as two with what relates them. The views' rows have one length."""

    views: list[View]
    cwe: Cwe

    @property
    def length(self) -> int:
        return len(self.views[0].row.ids)


def make_example(window: Window, pieces: WordPiece, config: PretrainingConfig, *, seed: int, step: int) -> Example:
    """The views of a window at a step."""
    key = [seed, step, xxhash.xxh3_64_intdigest(window.page.id.encode()), window.first]
    row, starts = lay_out(window, pieces), window.starts
    words = np.arange(len(window))
    hidden, cwe = _NOTHING, Cwe(_NOTHING, _NOTHING.astype(bool), _NOTHING.astype(bool))
    if config.cwe.weight and len(window) > 1:
        sampled, hidden = _sample_blocks(len(window), config.cwe, np.random.default_rng([*key, _CWE]))
        cwe = Cwe(starts[sampled], np.isin(sampled, hidden), _repeated(window)[sampled])
    shown = np.setdiff1d(words, hidden)
    views = []
    for view in range(config.views):
        ids, boxes = row.ids.copy(), row.boxes.copy()
        if config.cwe.weight:
            _jitter(boxes, row.word, config.cwe, np.random.default_rng([*key, _JITTER, view]))
        at_hidden = np.isin(row.word, hidden)
        if view == 0:
            ids[at_hidden] = pieces.mask
        else:
            boxes[at_hidden] = 0
        found = View(Row(ids, boxes, row.word))
        if config.mllm.weight:
            found = _mask(found, shown, pieces, config.mllm, np.random.default_rng([*key, _MLLM, view]))
        if config.swp.weight:
            free = np.setdiff1d(shown, row.word[found.mllm.at])
            blind = hidden if view else _NOTHING
            found = _ask(found, window, free, blind, config.swp, np.random.default_rng([*key, _SWP, view]))
        views.append(found)
    return Example(views, cwe)


def _share(rate: float, of: int, at_most: int) -> int:
    """At least one where there is one: short pages are asked something too."""
    return min(max(1, round(rate * of)), at_most) if rate else 0


def _sample_blocks(words: int, config: CweConfig, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    sampled = random.permutation(words)[: config.blocks]
    return np.sort(sampled), np.sort(sampled[: int(config.hidden * len(sampled))])


def _repeated(window: Window) -> np.ndarray:
    """[words]: whether another word of the window has the same sub-tokens."""
    page = window.page
    texts = [page.tokens[page.starts[w] : page.starts[w + 1]].tobytes() for w in range(window.first, window.stop)]
    _, which, counts = np.unique(np.array(texts, dtype=object), return_inverse=True, return_counts=True)
    return counts[which] > 1


def _jitter(boxes: np.ndarray, word: np.ndarray, config: CweConfig, random: np.random.Generator) -> None:
    """Moves and scales the words' boxes, all alike; what leaves the page is cut off."""
    scale = random.uniform(1 - config.scale, 1 + config.scale)
    shift = random.uniform(-config.shift, config.shift, 2) * SIZE
    centre = SIZE / 2
    moved = (boxes - centre) * scale + centre + np.concatenate([shift, shift])
    inside = word >= 0
    boxes[inside] = moved[inside].round().clip(0, SIZE).astype(np.int64)


def _mask(view: View, shown: np.ndarray, pieces: WordPiece, config: MllmConfig, random: np.random.Generator) -> View:
    """BERT's 80/10/10 over word blocks, each as a whole, or over sub-tokens; among the words `shown`."""
    word, ids = view.row.word, view.row.ids.copy()
    by_word = config.unit == "word"
    places = np.flatnonzero(np.isin(word, shown))
    units = shown if by_word else places
    of = int(word.max(initial=-1)) + 1 if by_word else int((word >= 0).sum())
    chosen = random.permutation(units)[: _share(config.rate, of, len(units))]
    fate = np.full(len(word), np.nan)
    drawn = random.random(len(chosen))
    if by_word:
        of_word = np.full(of, np.nan)
        of_word[chosen] = drawn
        fate = np.where(word >= 0, of_word[word], np.nan) if of else fate
    else:
        fate[chosen] = drawn
    at = np.flatnonzero(~np.isnan(fate))
    labels = ids[at]
    ids[at[fate[at] < 0.8]] = pieces.mask
    replaced = at[(fate[at] >= 0.8) & (fate[at] < 0.9)]
    ids[replaced] = random.choice(pieces.ordinary, len(replaced))
    return View(Row(ids, view.row.boxes, word), Mllm(at, labels), view.swp)


def _ask(
    view: View, window: Window, free: np.ndarray, blind: np.ndarray, config: SwpConfig, random: np.random.Generator
) -> View:
    """Anchors among the words `free`. Neighbours are those on the whole page; one outside of the window, or whose box is out
    of sight (`blind`), is not asked for."""
    anchors = np.sort(random.permutation(free)[: _share(config.rate, len(window), len(free))])
    page = window.page
    around = neighbours(page.boxes, anchors + window.first, cutoff=config.cutoff)
    around = np.where((around >= window.first) & (around < window.stop), around - window.first, NONE)
    if config.reading == "pair":
        return _ask_pairs(view, window, anchors, around, blind, config, random)
    around[np.isin(around, blind)] = NONE
    which, direction = np.nonzero(around != NONE)
    first_tokens = page.first_tokens[window.first : window.stop]
    following = np.minimum(anchors[which] + 1, len(window) - 1)
    swp = Swp(window.starts[anchors[which]], direction, first_tokens[around[which, direction]], first_tokens[following])
    return View(view.row, view.mllm, swp)


def _ask_pairs(
    view: View, window: Window, anchors: np.ndarray, around: np.ndarray, blind: np.ndarray, config: SwpConfig,
    random: np.random.Generator,
) -> View:  # fmt: skip
    row = view.row
    if config.hide_anchor:
        boxes = row.boxes.copy()
        boxes[np.isin(row.word, anchors)] = 0
        row, blind = Row(row.ids, boxes, row.word), np.union1d(blind, anchors)
    seen = np.setdiff1d(np.arange(len(window)), blind)
    pairs: list[tuple[int, int, int]] = []
    for anchor, beside in zip(anchors.tolist(), around, strict=True):
        positives = [(int(other), direction + 1) for direction, other in enumerate(beside) if other in seen]
        others = np.setdiff1d(seen, [anchor, *beside])
        wanted = config.negatives * len(positives)
        near = random.permutation(nearest(window.boxes, anchor, others, NEAR))[: (wanted + 1) // 2]
        rest = random.permutation(np.setdiff1d(others, near))[: wanted - len(near)]
        pairs += [(anchor, other, label) for other, label in positives]
        pairs += [(anchor, int(other), 0) for other in (*near, *rest)]
    first, second, label = np.array(pairs, dtype=np.int64).reshape(-1, 3).T
    in_order = np.select([second == first - 1, second == first + 1], [1, 2], 0)
    return View(row, view.mllm, Swp(window.starts[first], window.starts[second], label, in_order))
