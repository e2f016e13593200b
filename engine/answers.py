"""From a response to the answer in it, and when two answers are the same text.

Every rule here is linear in the response's length: a response is made by a model that is paid for finding slow ones.
"""

from __future__ import annotations

import re
from typing import Any

from engine.config import Extract

ANSWER_WINDOW = 300
"""Characters at the end of a response in which DAPO's checker looks for its answer line (its `math_dapo` rule)."""

_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_GROUPED_NUMBER = re.compile(r"[-+]?\d[\d,]*,[\d,]*(\.\d+)?")


def extract(text: str, how: Extract) -> str | None:
    """The answer that `text` gives by the rule `how`, stripped; None where it gives none."""
    match how:
        case "whole":
            found: str | None = text
        case "first-line":
            found = next((line for line in text.splitlines() if line.strip()), None)
        case "last-line":
            found = next((line for line in reversed(text.splitlines()) if line.strip()), None)
        case "answer-line":
            lines = _ANSWER_LINE.findall(text[-ANSWER_WINDOW:])
            found = lines[-1] if lines else None
        case "boxed":
            found = _last_boxed(text)
        case "answer-tag":
            end = text.rfind("</answer>")
            start = text.rfind("<answer>", 0, end) if end >= 0 else -1
            found = text[start + len("<answer>") : end] if start >= 0 else None
        case "hashes":
            _, marker, rest = text.rpartition("####")
            found = rest.lstrip(" \t").partition("\n")[0] if marker else None
    return (found.strip() or None) if found is not None else None


def _last_boxed(text: str) -> str | None:
    """What stands in the `\\boxed{...}` that begins last and is closed; escaped braces do not count."""
    open_braces: list[int | None] = []
    best: tuple[int, int] | None = None
    for token in _BRACES.finditer(text):
        if token[0].startswith("\\boxed"):
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
    return text[best[0] : best[1]] if best else None


def reference(answer: str) -> str:
    """A data row's answer: what follows its last `####` (as GSM8K writes it), else all of it."""
    return extract(answer, "hashes") or answer.strip()


def plain_number(text: str) -> str:
    """`text` stripped, and without thousands separators where it is a number that has them."""
    text = text.strip()
    return text.replace(",", "") if _GROUPED_NUMBER.fullmatch(text) else text


def same_text(answer: str, expected: str) -> bool:
    """Equal after stripping white space; `1,234` equals `1234`."""
    return plain_number(answer) == plain_number(expected)


# --- DAPO's own checker --------------------------------------------------------------------------------------------

_SPACING = re.compile(r"\\[ ,;!]|\\\$|\{,\}|[\s$\"]")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|overline|boxed)\s*\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b(?:an?|the)\s", re.IGNORECASE)
_UNITS = re.compile(
    r"\^?\{?\\circ\}?|(?<=[\d}$])(?:\s*(?:degrees|dollars|cents|points|units|square|cm|km|gm|mph|inches|feet|meters|pounds"
    r"|hours|minutes|students|ways|integers|digits|edges|meals)\b)+"
)


def dapo_normal(answer: str) -> str:
    """An answer in the normal form under which DAPO's checker compares: right of the last `=`, units, white space,
    LaTeX wrappers and thousands separators gone. A final full stop or `.0` stays, and then is wrong."""
    answer = _ARTICLE.sub("", answer.rpartition("=")[2])
    answer = answer.replace(".$", "$")
    for _ in range(8):  # wrappers nest; each pass opens the innermost ones
        opened = _WRAPPER.sub(r"\1", answer)
        if opened == answer:
            break
        answer = opened
    answer = _SPACING.sub("", _UNITS.sub("", answer))
    digits = answer.replace(",", "")
    return digits if digits.isdecimal() else answer


def dapo(text: str, answer_row: dict[str, Any]) -> bool:
    """DAPO's rule-based checker as a scoring function (`score = {type = "python", function = "engine.answers:dapo"}`):
    the answer line within the last 300 characters equals the reference answer in normal form."""
    found = extract(text, "answer-line")
    return found is not None and dapo_normal(found) == dapo_normal(reference(str(answer_row["answer"])))
