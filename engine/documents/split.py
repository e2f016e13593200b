"""Splitting pages by whom they come from, so that nothing of a company in test was seen in training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

import xxhash

from engine.documents.page import Page
from engine.documents.values import alphanumeric

SAME_NAME = 0.9
"""Names that are at least this similar (difflib's ratio) are one company: misread letters ("TAII ORING", "TAIL ORING")."""

_BRACKETS = re.compile(r"\([^()]*\)?")
_LEGAL_FORM = re.compile(r"(?:sendirian|berhad|sdnbhd|sdn|bhd|sb|plt|llp|llc|ltd|limited|inc|gmbh|company|co)$")


def company_key(name: str) -> str:
    """A company's name without what varies on its papers: case, punctuation, spacing, bracketed branches and legal forms
    at its end ("MR. D. I. Y. (M) SDN BHD" is "mrdiy"). A name of nothing else keeps it all."""
    words = [alphanumeric(word) for word in re.split(r"\s+", _BRACKETS.sub(" ", name).replace("/", ""))]
    words = [word for word in words if word]
    while len(words) > 1 and _LEGAL_FORM.fullmatch(words[-1]):
        words.pop()
    return "".join(words) or alphanumeric(name)


def company_groups(names: Sequence[str]) -> dict[str, str]:
    """Each name's group: the first, by alphabet, of the keys that are one company. Keys are one company when they are
    equal, nearly equal (`SAME_NAME`), or when one of at least eight letters stands in the other."""
    keys = sorted({company_key(name) for name in names})
    leader = {key: key for key in keys}

    def root(key: str) -> str:
        while leader[key] != key:
            key = leader[key]
        return key

    for place, first in enumerate(keys):
        matcher = SequenceMatcher(None, "", first, autojunk=False)
        for second in keys[place + 1 :]:
            matcher.set_seq1(second)
            near = matcher.real_quick_ratio() >= SAME_NAME and matcher.quick_ratio() >= SAME_NAME
            if _within(first, second) or (near and matcher.ratio() >= SAME_NAME):
                low, high = sorted((root(first), root(second)))
                leader[high] = low
    return {name: root(company_key(name)) for name in names}


def _within(first: str, second: str) -> bool:
    short, long = sorted((first, second), key=len)
    return len(short) >= 8 and short in long


def split_by_company(pages: Sequence[Page], fraction: float, *, seed: int = 0) -> tuple[list[Page], list[Page]]:
    """(the rest, about `fraction` of the pages), with no company on both sides, each in the pages' own order.

    Companies are taken in the order of a hash of their group and the seed until the fraction is reached, so the split
    depends on neither the pages' order nor the process. A company that would overshoot by more than it adds is passed
    over. Pages without a company go by their template where they have one (a PDF's pages by their file), else alone.
    Raises `ValueError` for a fraction outside 0..1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, expected 0 to 1")
    groups = company_groups([page.fields["company"] for page in pages if page.fields.get("company")])
    of_page = [
        groups[company] if (company := page.fields.get("company")) else f"page:{page.template or page.id}"
        for page in pages
    ]
    sizes: dict[str, int] = {}
    for group in of_page:
        sizes[group] = sizes.get(group, 0) + 1
    wanted = fraction * len(pages)
    chosen: set[str] = set()
    taken = 0
    for group in sorted(sizes, key=lambda group: (xxhash.xxh3_64_intdigest(f"{seed}\0{group}".encode()), group)):
        if abs(taken + sizes[group] - wanted) < abs(taken - wanted):
            chosen.add(group)
            taken += sizes[group]
    sides = list(zip(pages, of_page, strict=True))
    return [page for page, group in sides if group not in chosen], [page for page, group in sides if group in chosen]
