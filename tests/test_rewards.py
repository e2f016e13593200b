"""Answers out of responses, correctness by every scorer, and the shaped reward beside it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.answers import ANSWER_WINDOW, dapo, dapo_normal, extract, plain_number, reference, same_text
from engine.config import (
    ExactScore,
    Extract,
    JsonlTask,
    MathVerifyScore,
    Overlong,
    PythonScore,
    ReasoningGymTask,
    RewardConfig,
)
from engine.fields import TaskError
from engine.rewards import RewardError, Score, equivalent, prepare, score, shaped
from engine.rows import plain, reasoning_gym_data


def row(answer: object) -> str:
    return json.dumps({"answer": answer, "row": {"answer": answer}})


def jsonl(extract_by: Extract = "answer-line", scorer: Any = None) -> JsonlTask:
    return JsonlTask(path="none.jsonl", extract=extract_by, score=scorer or MathVerifyScore())


# --- extract -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "text", "found"),
    [
        ("whole", "  two\nlines \n", "two\nlines"),
        ("whole", " \n ", None),
        ("first-line", "\n 7 \n8", "7"),
        ("last-line", "7\n 8 \n\n", "8"),
        ("last-line", "", None),
        ("answer-line", "so\nAnswer: 42", "42"),
        ("answer-line", "ANSWER  :42 \nbye", "42"),
        ("answer-line", "Answer: 1\nAnswer: 2\n", "2"),
        ("answer-line", "Answer:\n42", "42"),
        ("answer-line", "Answer: 1\nAnswer:", "1"),
        ("answer-line", "The answer is 42", None),
        ("answer-line", "the final answer: 3 apples", "3 apples"),
        ("answer-line", "Answer: 42" + "x" * ANSWER_WINDOW, None),
        ("answer-line", "Answer: 42\n" + "x" * (ANSWER_WINDOW - 11), "42"),
        ("boxed", r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} then \boxed{2}", "2"),
        ("boxed", r"\boxed{1} then \boxed{2", "1"),
        ("boxed", r"\boxed{\{1, 2)}", r"\{1, 2)"),
        ("boxed", r"\boxed{\boxed{5}}", "5"),
        ("boxed", "}{ } boxed{5}", None),
        ("boxed", r"\boxed{}", None),
        ("answer-tag", "<answer> 5\n6 </answer> bye", "5\n6"),
        ("answer-tag", "<answer>1</answer><answer>2</answer>", "2"),
        ("answer-tag", "<answer>1", None),
        ("answer-tag", "1</answer>", None),
        ("hashes", "48/2 = 24\n#### 72\n", "72"),
        ("hashes", "#### 1\n#### 2", "2"),
        ("hashes", "72", None),
        ("hashes", "####", None),
    ],
)
def test_extract(how: Extract, text: str, found: str | None) -> None:
    assert extract(text, how) == found


@given(text=st.text(), how=st.sampled_from(Extract.__args__))
def test_extract_is_total_and_gives_stripped_text_or_nothing(text: str, how: Extract) -> None:
    found = extract(text, how)
    assert found is None or (found == found.strip() != "" and found in text)


@pytest.mark.parametrize("how", Extract.__args__)
@pytest.mark.parametrize(
    "piece", ["\\boxed{", "<answer>", "answer:", "####", "\\boxed   ", "answer \t", "</answer>", "{"]
)
@pytest.mark.timeout(20)
def test_extract_takes_linear_time(how: Extract, piece: str) -> None:
    extract(piece * 200_000, how)


def test_reference_answers_and_numbers() -> None:
    assert reference("She sold 48/2 = <<48/2=24>>24.\n#### 72") == "72"
    assert reference(" 72 ") == "72"
    assert plain_number(" 1,234,567.50 ") == "1234567.50"
    assert plain_number("a,b") == "a,b"
    assert same_text(" 1,234", "1234")
    assert not same_text("1.0", "1")


# --- DAPO's checker: what its published form accepts and refuses ----------------------------------------------------


@pytest.mark.parametrize(
    "line", ["Answer: $540$", r"Answer: \boxed{540}", "Answer: x = 540", "answer : 540", r"Answer: $\boxed{540}$",
             r"Answer: 540^\circ", r"Answer: 540\text{ cm}", "Answer: 540 dollars", "Answer:\n540"],
)  # fmt: skip
def test_dapo_accepts(line: str) -> None:
    assert dapo(f"Thinking.\n{line}", {"answer": "540"})


@pytest.mark.parametrize(
    "text", ["**Answer:** 540", "Answer: 540.", "Answer: 540.0", r"\boxed{540}", "540", "Answer: 540" + " so it is." * 40,
             "Answer: 540\nAnswer: 541", "Answer: five hundred forty"],
)  # fmt: skip
def test_dapo_refuses(text: str) -> None:
    assert not dapo(text, {"answer": "540"})


def test_dapo_thousands_and_normal_form() -> None:
    assert dapo("Answer: 1,234", {"answer": "1234"})
    assert dapo_normal(r"the area is = \text{ 5 }\, \textbf{x}") == "5x"


def test_dapo_runs_as_a_task() -> None:
    task = jsonl(scorer=PythonScore("engine.answers:dapo"))
    assert score(task, r"Answer: \boxed{540}", row("540")).correct
    assert not score(task, "Answer: 540.0", row("540")).correct


# --- math-verify and exact -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected"),
    [(r"\frac{1}{2}", "0.5"), ("540.", "540"), ("$540$", "540"), ("x = 540", "540"), ("1,234", "1234"), ("**18**", "18"),
     ("$18", "18"), (r"\$18", "18"), ("18 dollars per day.", "18"), ("x^2 + 1", "1+x^2"), ("(1,2)", "(1, 2)"),
     (r"\sqrt{2}", "sqrt(2)"), ("East", r"east")],
)  # fmt: skip
def test_equivalent(found: str, expected: str) -> None:
    assert equivalent(found, expected)


@pytest.mark.parametrize(
    ("found", "expected"),
    [("11", "1"), ("2x+3", "3"), ("sin(3)", "3"), ("-3", "3"), ("(2,1)", "(1,2)"), ("0.33", "1/3"), ("nothing", "5"),
     ("12,34", "1234"), ("seat", "east"), (r"\frac{1}{2}", "2")],
)  # fmt: skip
def test_not_equivalent(found: str, expected: str) -> None:
    assert not equivalent(found, expected)


def test_math_verify_scores_gsm8k_rows() -> None:
    gold = row("48+24 = <<48+24=72>>72 clips.\n#### 1,072")
    task = jsonl()
    assert score(task, "Answer: $1072", gold) == Score(True, 1.0, {"extracted": 1.0, "value": 1.0})
    assert score(task, "Answer: 1073", gold) == Score(False, 0.0, {"extracted": 1.0, "value": 0.0})
    assert score(task, "I do not know", gold) == Score(False, 0.0, {"extracted": 0.0})
    assert score(jsonl("boxed"), r"so \boxed{1,072}", gold).correct


def test_math_verify_works_outside_the_main_thread() -> None:
    verdicts: list[bool] = []

    def grade() -> None:
        verdicts.extend(score(jsonl(), f"Answer: {text}", row("0.5")).correct for text in ("1/2", r"$\frac12$", "1"))

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join(30)
    assert verdicts == [True, True, False]


def test_exact() -> None:
    task = jsonl("whole", ExactScore())
    assert score(task, " 1,234\n", row("#### 1234")).correct
    assert not score(task, "1234.0", row("1234")).correct


@pytest.mark.parametrize("answer", ["{", "[]", "{}", '"x"'])
def test_a_broken_answer_document_is_an_error_not_a_wrong_answer(answer: str) -> None:
    with pytest.raises(RewardError, match="the row's answer"):
        score(jsonl(), "Answer: 1", answer)


# --- reasoning-gym -------------------------------------------------------------------------------------------------

NO_ORACLE = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Data sets whose own `answer` is empty or not one of many right ones."""


def test_reasoning_gym_grades_as_the_data_set_itself_after_a_trip_through_json() -> None:
    from reasoning_gym.factory import DATASETS

    wrong = []
    for name in sorted(DATASETS.keys() - {"composite"} - NO_ORACLE):
        task = ReasoningGymTask(dataset=name, size=3, seed=1, extract="whole")
        entry = reasoning_gym_data(task)[0]
        result = score(task, entry["answer"], json.dumps(plain(entry)))
        if not (result.correct and result.value == 1.0):
            wrong.append((name, result))
    assert wrong == []


def test_reasoning_gym_partial_scores_and_threshold() -> None:
    entry = {"question": "?", "answer": "42", "metadata": {}}
    task = ReasoningGymTask(dataset="chain_sum", extract="answer-line")
    assert score(task, "Answer: 42", json.dumps(entry)).correct
    half = score(task, "Answer: it is 42", json.dumps(entry))
    assert not half.correct
    assert 0 < half.value < 1
    assert half.parts == {"extracted": 1.0, "value": half.value}


GARBAGE = ["x", "1 2 3", "[[", "None", "{}", "1/0", "9" * 50_000, "x" * 50_000]


def test_no_text_makes_a_reasoning_gym_scorer_fail() -> None:
    from reasoning_gym.factory import DATASETS

    unreadable = set()
    for name in sorted(DATASETS.keys() - {"composite"}):
        task = ReasoningGymTask(dataset=name, size=3, seed=1, extract="whole")
        entry = json.dumps(plain(reasoning_gym_data(task)[0]))
        for text in GARBAGE:
            result = score(task, text, entry)
            if "unreadable" in result.parts:
                unreadable.add(name)
                assert (result.correct, result.value) == (False, 0.0)
                assert "the data set's scorer raised " in result.detail
    assert "prime_factorization" in unreadable


def test_a_text_that_a_scorer_raises_on_is_wrong_and_the_exception_is_named() -> None:
    task = ReasoningGymTask(dataset="prime_factorization", size=3, extract="whole")
    entry = plain(reasoning_gym_data(task)[0])
    assert score(task, entry["answer"], json.dumps(entry)).correct
    result = score(task, "seven", json.dumps(entry))
    assert result.parts == {"extracted": 1.0, "value": 0.0, "unreadable": 1.0}
    assert result.detail.startswith("the data set's scorer raised ValueError on this answer: invalid literal")


def test_a_scorer_that_raises_on_the_row_too_is_broken() -> None:
    task = ReasoningGymTask(dataset="prime_factorization", size=3, extract="whole")
    broken = json.dumps({"question": "?", "answer": "six", "metadata": {}})
    for text in ("2 × 3", "seven"):
        with pytest.raises(ValueError, match=r"invalid literal.*six"):
            score(task, text, broken)


def test_a_bad_data_set_is_named_when_the_task_is_prepared() -> None:
    with pytest.raises(TaskError, match="no_such_set"):
        prepare(ReasoningGymTask(dataset="no_such_set"))


# --- a function of the user's --------------------------------------------------------------------------------------


def from_dict(text: str, answer_row: dict[str, Any]) -> Any:
    return answer_row["row"]["returns"]


def not_finite(text: str, answer_row: dict[str, Any]) -> float:
    return float("nan")


def run_python(returns: object, function: str = "from_dict") -> Score:
    task = jsonl(scorer=PythonScore(f"{__name__}:{function}"))
    return score(task, "text", json.dumps({"answer": "", "row": {"returns": returns}}))


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        (True, Score(True, 1.0)),
        (False, Score(False, 0.0)),
        (1.0, Score(True, 1.0, reward=1.0)),
        (1, Score(True, 1.0, reward=1.0)),
        (0.5, Score(False, 0.5, reward=0.5)),
        (-1.0, Score(False, -1.0, reward=-1.0)),
        ({"correct": True}, Score(True, 1.0)),
        ({"correct": False, "reward": 0.25, "style": 3}, Score(False, 0.0, {"style": 3.0}, 0.25)),
    ],
)
def test_what_a_function_may_return(returns: object, expected: Score) -> None:
    assert run_python(returns) == expected


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (None, "returned a NoneType"),
        ("yes", "returned a str"),
        ({}, "'correct' is None"),
        ({"correct": 1}, "'correct' is 1"),
        ({"correct": True, "reward": "much"}, "'reward' is 'much'"),
        ({"correct": True, "style": None}, "'style' is None"),
        (10**400, "expected a finite number"),
    ],
)
def test_what_a_function_may_not_return(returns: object, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        run_python(returns)
    assert "from_dict" in str(caught.value)


def test_not_a_number_is_no_reward() -> None:
    with pytest.raises(RewardError, match="finite"):
        run_python(None, "not_finite")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module:f", "ModuleNotFoundError"),
        (f"{__name__}:no_such_function", "no_such_function"),
        (f"{__name__}:NO_ORACLE", "expected a function"),
        ("just_a_name", "expected module:function"),
    ],
)
def test_a_function_that_is_not_there_is_named_when_the_task_is_prepared(function: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        prepare(jsonl(scorer=PythonScore(function)))


# --- the shaped reward ---------------------------------------------------------------------------------------------


def test_shaped_reward_keeps_correctness_apart_from_the_length_penalty() -> None:
    config = RewardConfig(right=1.0, wrong=-1.0, overlong=Overlong(max_length=20480, cache=4096))
    right, wrong = Score(True, 1.0, {"value": 1.0}), Score(False, 0.0)
    assert shaped(right, config, 16384) == (1.0, {"value": 1.0, "outcome": 1.0, "overlong": 0.0})
    assert shaped(right, config, 18432) == (0.5, {"value": 1.0, "outcome": 1.0, "overlong": -0.5})
    assert shaped(right, config, 20480)[0] == 0.0
    assert shaped(wrong, config, 20480)[0] == -2.0
    assert shaped(wrong, RewardConfig(), 20480) == (-1.0, {"outcome": -1.0})


def test_a_function_that_says_its_own_reward_keeps_it() -> None:
    own = Score(False, 0.0, {"style": 2.0}, reward=0.3)
    assert shaped(own, RewardConfig(right=5.0, wrong=-5.0), 10) == (0.3, {"style": 2.0, "outcome": 0.3})


def test_scoring_needs_no_torch() -> None:
    code = "import sys, engine.rewards, workers.score, workers.scorer_pool; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
