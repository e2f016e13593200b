"""Is a response right, and what reward is trained on? Correctness and the shaped reward stay apart.

`score` may hang, eat memory or crash (it runs sympy and functions of the user's): call it in a process that can be
killed (`workers/score.py`). No clock is watched here, and no signal used, so that it works in any thread.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import numpy as np

from engine.answers import extract, reference, same_text
from engine.config import (
    DocumentScore,
    DocumentsTask,
    ExactScore,
    JsonlTask,
    MathVerifyScore,
    PythonScore,
    ReasoningGymScore,
    ReasoningGymTask,
    RewardConfig,
    Task,
)
from engine.documents.grading import grade_document
from engine.documents.grading import reference as document_reference
from engine.rows import reasoning_gym_data
from engine.scores import RewardError, Score
from engine.shaping import overlong_penalty

__all__ = ["RewardError", "Score", "equivalent", "extract", "prepare", "score", "shaped"]


def score(task: Task, text: str, answer: str) -> Score:
    """Score the response `text` to a row of `task`.

    `answer` is the row's JSON document: reasoning-gym's whole entry `{"question", "answer", "metadata"}`, or
    `{"answer", "row"}` of a jsonl row. `parts["extracted"]` is 0 where the response holds no answer by the task's
    `extract` rule, 1 where it does. A user's function gets the whole response, whatever `extract` says.
    A reasoning-gym scorer that raises on the answer, but not on the row's own, makes it wrong, with `parts["unreadable"]`
    = 1 and the exception in `detail`. Raises `RewardError`, and what a broken scorer raises.
    """
    document = _document(answer)
    if isinstance(task.score, PythonScore):
        return _python_score(task.score.function, text, document)
    if isinstance(task, DocumentsTask):
        return _document_score(task.score, text, document)
    found = extract(text, task.extract)
    if found is None:
        return Score(correct=False, value=0.0, parts={"extracted": 0.0})
    match task.score:
        case ReasoningGymScore(threshold):
            return _reasoning_gym_score(task, found, document, threshold)
        case MathVerifyScore():
            correct = equivalent(found, reference(str(document["answer"])))
            value = float(correct)
        case ExactScore():
            expected = str(document["answer"])
            correct = same_text(found, reference(expected) if isinstance(task, JsonlTask) else expected)
            value = float(correct)
    return Score(correct=correct, value=value, parts={"extracted": 1.0, "value": value})


def shaped(score: Score, config: RewardConfig, response_tokens: int) -> tuple[float, dict[str, float]]:
    """The reward that is trained on, and the parts that add up to it (`outcome`, `overlong`) beside the score's own.

    The outcome is the user function's own reward where it gave one, else `right` or `wrong` (DAPO eq. 7). The soft
    overlong punishment (eq. 13) comes on top where it is switched on.
    """
    outcome = score.reward if score.reward is not None else (config.right if score.correct else config.wrong)
    parts = {**score.parts, "outcome": outcome}
    reward = outcome
    if config.overlong is not None:
        penalty = overlong_penalty(response_tokens, max_length=config.overlong.max_length, cache=config.overlong.cache)
        parts["overlong"] = penalty
        reward += penalty
    return reward, parts


def prepare(task: Task) -> None:
    """Do what the first `score` of this task would pay for: import modules, build the data set, find the function.
    Raises `RewardError` or `TaskError` where that fails, so that a bad setting shows before any response is scored."""
    match task.score:
        case PythonScore(function):
            _function(function)
        case MathVerifyScore():
            equivalent("\\frac{1}{2}", "0.5")
        case ReasoningGymScore():
            _data_set(task)
        case ExactScore() | DocumentScore():
            pass


def _document(answer: str) -> dict[str, Any]:
    try:
        document = json.loads(answer)
    except json.JSONDecodeError as error:
        raise RewardError(f"the row's answer: not JSON ({error}): got {answer[:80]!r}") from error
    if not isinstance(document, dict) or "answer" not in document:
        raise RewardError(f'the row\'s answer: got {answer[:80]!r}, expected a JSON object with "answer"')
    return document


def _document_score(score: DocumentScore, text: str, document: dict[str, Any]) -> Score:
    if score.utel is not None:
        raise RewardError(f"score.utel = {score.utel!r}: only a scorer that has loaded the tagger can score this task")
    return grade_document(text, document_reference(document), None, score.threshold)


# --- reasoning-gym -------------------------------------------------------------------------------------------------

_TUPLE_BOARDS = frozenset({"arc_agi", "rearc"})
"""Data sets that compare the answer with tuples of their metadata, which JSON has turned into lists."""


def _reasoning_gym_score(task: Task, found: str, document: dict[str, Any], threshold: float) -> Score:
    data_set = _data_set(task)
    if isinstance(task, ReasoningGymTask) and task.dataset in _TUPLE_BOARDS:
        board = tuple(tuple(row) for row in document["metadata"]["output"])
        document = {**document, "metadata": {**document["metadata"], "output": board}}
    try:
        value = float(data_set.score_answer(found, document))
    except MemoryError:  # over the budget of this process, which says nothing about the text
        raise
    except Exception as error:  # foreign code; some data sets read numbers or Python out of the text and let that fail
        try:
            data_set.score_answer(document["answer"], document)
        except Exception:
            raise error from None  # also on its own answer: the scorer is broken
        return Score(
            correct=False,
            value=0.0,
            parts={"extracted": 1.0, "value": 0.0, "unreadable": 1.0},
            detail=f"the data set's scorer raised {type(error).__name__} on this answer: {error}",
        )
    return Score(correct=value >= threshold, value=value, parts={"extracted": 1.0, "value": value})


def _data_set(task: Task) -> Any:
    if not isinstance(task, ReasoningGymTask):
        raise RewardError(f"score.type reasoning-gym: got a {type(task).__name__}, expected a reasoning-gym task")
    return _build_data_set(msgspec.json.encode(task, order="deterministic"))


@cache
def _build_data_set(task: bytes) -> Any:
    return reasoning_gym_data(msgspec.json.decode(task, type=ReasoningGymTask))


# --- math-verify ---------------------------------------------------------------------------------------------------

_DELIMITERS = ("$", "\\boxed", "\\(", "\\[")
_PROSE = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|max|min|gcd|lcm|mod)\b)[A-Za-z]{3,}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]{3,}")


def equivalent(found: str, expected: str) -> bool:
    """`math_verify`'s verdict on two answers, its own timeouts off. It can hang inside sympy.
    Raises `RewardError` where the expected answer is nothing that it can read."""
    from math_verify import verify

    if _WORDS.fullmatch(expected):  # as formulas, words would be products of letters, and anagrams equal
        return found.casefold() == expected.casefold()
    gold = _formulas(expected)
    if not gold:
        raise RewardError(f"math-verify: the reference answer {expected[:80]!r} is not a formula it can read")
    return bool(verify(gold, _formulas(found), timeout_seconds=None))


def _formulas(text: str) -> list[Any]:
    """What `math_verify` reads in an answer. It reads LaTeX only between delimiters, and plain text by picking its last
    number (so `2x+3` would be 3): a bare formula is read as LaTeX first, a text with words in it as prose first."""
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # warns that its timeouts are off; the process is killable
    text = text.strip().strip("*").replace("\\$", "").strip()
    if any(delimiter in text for delimiter in _DELIMITERS):
        return list(parse(text, parsing_timeout=None))
    readings = (text, f"${text}$") if _PROSE.search(text) else (f"${text}$", text)
    for reading in readings:
        if found := parse(reading, parsing_timeout=None):
            return list(found)
    return []


# --- a function of the user's --------------------------------------------------------------------------------------


@cache
def _function(path: str) -> Callable[[str, dict[str, Any]], object]:
    module, separator, name = path.partition(":")
    if not (separator and module and name):
        raise RewardError(f"score.function: got {path!r}, expected module:function")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, SyntaxError, AttributeError) as error:
        raise RewardError(f"score.function {path!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise RewardError(f"score.function {path!r}: got a {type(function).__name__}, expected a function")
    return function


def _python_score(path: str, text: str, document: dict[str, Any]) -> Score:
    """A bool is correctness. A number is the reward, and right from 1 on. A dict says `correct`, may say `reward`, and
    its other numbers are parts."""
    result = _function(path)(text, document)
    if isinstance(result, bool | np.bool_):
        return Score(correct=bool(result), value=float(result))
    if isinstance(result, int | float | np.integer | np.floating):
        value = _finite(result, path, "its result")
        return Score(correct=value >= 1.0, value=value, reward=value)
    if not isinstance(result, dict):
        raise RewardError(
            f"score.function {path!r}: returned a {type(result).__name__}, expected bool, float or a dict with 'correct'"
        )
    correct = result.get("correct")
    if not isinstance(correct, bool | np.bool_):
        raise RewardError(f"score.function {path!r}: 'correct' is {correct!r}, expected True or False")
    figures = {str(key): _finite(value, path, repr(key)) for key, value in result.items() if key != "correct"}
    reward = figures.pop("reward", None)
    return Score(correct=bool(correct), value=float(correct), parts=figures, reward=reward)


def _finite(value: object, path: str, what: str) -> float:
    try:
        if isinstance(value, int | float | np.integer | np.floating | np.bool_) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an int beyond the range of floats
        pass
    raise RewardError(f"score.function {path!r}: {what} is {value!r:.80}, expected a finite number")
