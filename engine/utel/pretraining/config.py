"""What UTel is pretrained on. The paper's abstract names three tasks; its text could not be had, so all rates, sizes, weights
and rules here are this project's own choices."""

from __future__ import annotations

from typing import Literal

from engine.config_section import Section

DIRECTIONS = ("left", "right", "up", "down")


class MllmConfig(Section, frozen=True):
    """Masked layout-language modelling: of `rate` of the word blocks (or of the sub-tokens, with `unit` "token") the text is
    to be told; 80 % are masked, 10 % replaced, 10 % left. Boxes stay."""

    weight: float = 1.0
    rate: float = 0.15
    unit: Literal["word", "token"] = "word"


class SwpConfig(Section, frozen=True):
    """Surrounding word prediction, for `rate` of the word blocks.

    `reading` "vocabulary": the first sub-token of the nearest word in each of four directions. "pair": for pairs of blocks,
    whether the second is the first's neighbour and where, with `negatives` others for each neighbour; with boxes in sight
    that is geometry alone, so `hide_anchor` puts the first one's box out of sight. Neighbours further away than `cutoff`
    thousandths of the page do not count.
    """

    weight: float = 1.0
    rate: float = 0.15
    reading: Literal["vocabulary", "pair"] = "vocabulary"
    cutoff: int = 250
    negatives: int = 3
    hide_anchor: bool = True


class CweConfig(Section, frozen=True):
    """Contrastive learning of word blocks: the same block of two views of a page is to be found among up to `blocks` of that
    page. The share `hidden` of them has its text masked in the first view and its box in the second. Each view is moved by
    up to `shift` and scaled by up to `scale` of the page."""

    weight: float = 1.0
    blocks: int = 128
    hidden: float = 0.5
    temperature: float = 0.05
    size: int = 128
    shift: float = 0.05
    scale: float = 0.1


class PretrainingConfig(Section, frozen=True):
    """A task of weight 0 is left out, its head too. Without the contrastive task a page has one view, as it is."""

    mllm: MllmConfig = MllmConfig()
    swp: SwpConfig = SwpConfig()
    cwe: CweConfig = CweConfig()
    length: int = 512
    """Of a row; a page that needs more is read in several windows."""

    def __post_init__(self) -> None:
        shares = {"mllm.rate": self.mllm.rate, "swp.rate": self.swp.rate, "cwe.hidden": self.cwe.hidden,
                  "cwe.shift": self.cwe.shift, "cwe.scale": self.cwe.scale}  # fmt: skip
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: got {share}, expected 0 to 1")
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"{name}.weight: got {weight}, expected 0 or more")
        if not any(self.weights.values()):
            raise ValueError("mllm.weight, swp.weight, cwe.weight: got 0 for each, expected a task")
        if self.cwe.temperature <= 0:
            raise ValueError(f"cwe.temperature: got {self.cwe.temperature}, expected more than 0")
        if self.cwe.blocks < 2:
            raise ValueError(f"cwe.blocks: got {self.cwe.blocks}, expected at least 2: one to tell from another")
        if self.length < 3:
            raise ValueError(f"length: got {self.length}, expected at least 3: [CLS], a sub-token, [SEP]")

    @property
    def weights(self) -> dict[str, float]:
        return {"mllm": self.mllm.weight, "swp": self.swp.weight, "cwe": self.cwe.weight}

    @property
    def views(self) -> int:
        return 2 if self.cwe.weight else 1
