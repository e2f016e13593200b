"""The stream of prompts is a function of (tasks, seed, index), held-out prompts stay out of it, bad rows are named."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import JsonlTask, ReasoningGymTask
from engine.rewards import score
from engine.rows import ReasoningGymRows, plain
from engine.tasks import Row, Source, TaskError, held_out, named_tasks

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def write(path: Path, rows: list[object]) -> str:
    """Rows as JSON lines; a str is written as it stands."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def numbers(path: Path, n: int, **extra: object) -> str:
    return write(path, [{"q": f"{i}?", "a": str(i), **extra} for i in range(n)])


def task(path: str, **settings: object) -> JsonlTask:
    return JsonlTask(**{"path": path, "prompt": "{q}", "answer": "{a}", "held_out": 0, **settings})  # type: ignore[arg-type]


def texts(rows: list[Row]) -> list[str]:
    return [str(row.prompt) for row in rows]


# --- the stream ------------------------------------------------------------------------------------------------------


@given(rows=st.integers(2, 40), held=st.integers(0, 20), seed=st.integers(-5, 2**63), epochs=st.integers(1, 3))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_epoch_holds_every_training_prompt_once(
    tmp_path: Path, rows: int, held: int, seed: int, epochs: int
) -> None:
    held = min(held, rows - 1)
    tasks = [task(numbers(tmp_path / "n.jsonl", rows), held_out=held)]
    source, size = Source(tasks, seed), rows - held
    out = set(texts(source.held_out(held)))
    assert len(out) == held
    for epoch in range(epochs):
        prompts = texts([source[epoch * size + i] for i in range(size)])
        assert sorted(prompts) == sorted({f"{i}?" for i in range(rows)} - out)
    later = Source(tasks, seed)
    assert [later[i] for i in reversed(range(size))] == [source[i] for i in reversed(range(size))]


def test_seeds_and_epochs_give_other_orders(tmp_path: Path) -> None:
    tasks = [task(numbers(tmp_path / "n.jsonl", 100))]
    one, two = Source(tasks, 1), Source(tasks, 2)
    first, second = texts([one[i] for i in range(100)]), texts([one[100 + i] for i in range(100)])
    assert first != second
    assert first != texts([two[i] for i in range(100)])
    assert first != [f"{i}?" for i in range(100)]


def test_the_order_is_the_same_everywhere_and_for_ever(tmp_path: Path) -> None:
    """Resuming a run on another machine or release must not reshuffle it: these rows are written down."""
    tasks = [task(numbers(tmp_path / "a.jsonl", 10)), task(numbers(tmp_path / "b.jsonl", 50), weight=0.5)]
    source = Source(tasks, 7)
    got = [(source[i].task, source[i].prompt) for i in (0, 1, 2, 3, 5_000, 123_456_789)]
    assert got == [("a", "6?"), ("a", "3?"), ("a", "4?"), ("b", "26?"), ("a", "8?"), ("a", "6?")]


def test_far_rows_cost_no_more_than_near_ones(tmp_path: Path) -> None:
    tasks = [task(numbers(tmp_path / "a.jsonl", 500)), ReasoningGymTask("chain_sum", weight=0.3)]
    source = Source(tasks, 1)
    start = time.perf_counter()
    far = [source[10**12 + i] for i in range(200)]
    assert time.perf_counter() - start < 10  # one by one it would take weeks
    assert [row.index for row in far] == [10**12 + i for i in range(200)]
    with pytest.raises(IndexError, match="-1"):
        source[-1]


@given(weights=st.lists(st.floats(0.001, 100), min_size=2, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tasks_are_mixed_by_weight(tmp_path: Path, weights: list[float], seed: int) -> None:
    tasks = [task(numbers(tmp_path / f"{i}.jsonl", 7, t=i), prompt="{t}: {q}", weight=w) for i, w in enumerate(weights)]
    source = Source(tasks, seed)
    rows = [source[1000 + i] for i in range(1000)]  # one block
    counts = Counter(row.task for row in rows)
    for index, weight in enumerate(weights):
        assert counts[str(index)] == pytest.approx(1000 * weight / sum(weights), abs=1 + len(weights))
    for index in range(len(weights)):  # within its share each task runs through its epochs
        own = [row.prompt for row in rows if row.task == str(index)]
        per_prompt = Counter(own)
        assert max(per_prompt.values()) - min(per_prompt.values() if len(per_prompt) == 7 else [0]) <= 2


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weights_are_positive(weight: float, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"tasks\[0\]\.weight"):
        Source([task(numbers(tmp_path / "n.jsonl", 3), weight=weight)], 0)
    with pytest.raises(TaskError, match="tasks: got none"):
        Source([], 0)


def test_names(tmp_path: Path) -> None:
    tasks = [
        task("x/train.jsonl.gz"), task("y/train.jsonl"), ReasoningGymTask("gcd"), ReasoningGymTask("gcd"), task("gcd.jsonl")
    ]  # fmt: skip
    assert list(named_tasks(tasks)) == ["train", "train#2", "gcd", "gcd#2", "gcd#3"]
    assert list(named_tasks(tasks).values()) == tasks


# --- held out --------------------------------------------------------------------------------------------------------


def test_the_held_out_pool_depends_on_prompts_alone(tmp_path: Path) -> None:
    forwards = numbers(tmp_path / "f.jsonl", 60)
    backwards = write(tmp_path / "b.jsonl", [{"q": f"{i}?", "a": "x"} for i in reversed(range(60))])
    pools = [
        set(texts(held_out([task(path, held_out=20)], 20, seed))) for path in (forwards, backwards) for seed in (1, 2)
    ]
    assert pools[0] == pools[1] == pools[2] == pools[3]
    some = texts(held_out([task(forwards, held_out=20)], 5, 1))
    assert len(set(some)) == 5
    assert set(some) < pools[0]
    assert (
        some
        == texts(held_out([task(forwards, held_out=20)], 5, 1))
        != texts(held_out([task(forwards, held_out=20)], 5, 2))
    )


def test_a_held_out_file_keeps_its_prompts_out_of_all_tasks(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", [{"q": "3?", "a": "3"}, {"q": "new?", "a": "0"}])
    first = task(numbers(tmp_path / "a.jsonl", 5), held_out_path=test, held_out=99)
    second = task(numbers(tmp_path / "b.jsonl", 8), weight=2.0)
    source = Source([first, second], 0)
    assert sorted(texts(source.held_out(2))) == ["3?", "new?"]
    assert {str(source[i].prompt) for i in range(1000)} == {f"{i}?" for i in range(8) if i != 3}
    with pytest.raises(TaskError, match=r"eval\.prompts: got 3, expected at most 2"):
        source.held_out(3)


def test_held_out_rows_are_shared_by_weight(tmp_path: Path) -> None:
    heavy = task(numbers(tmp_path / "h.jsonl", 60, t="h"), prompt="{t}{q}", held_out=40, weight=3.0)
    light = task(numbers(tmp_path / "l.jsonl", 60, t="l"), prompt="{t}{q}", held_out=40, weight=1.0)
    rows = held_out([heavy, light], 40, 0)
    assert Counter(row.task for row in rows) == {"h": 30, "l": 10}
    assert [row.index for row in rows] == list(range(40))
    assert Counter(row.task for row in held_out([heavy, light], 70, 0)) == {"h": 40, "l": 30}


def test_nothing_left_to_train(tmp_path: Path) -> None:
    path = numbers(tmp_path / "n.jsonl", 5)
    with pytest.raises(TaskError, match=r"n\.jsonl: each of its prompts is held out \(held_out = 5\)"):
        Source([task(path, held_out=5)], 0)
    narrow = ReasoningGymTask("chain_sum", params=SUMS, size=3000, held_out=400)
    with pytest.raises(TaskError, match="held_out = 400, but its 3000 rows have 200 distinct prompts"):
        Source([narrow], 0)
    with pytest.raises(TaskError, match="all 3000 rows repeat a held-out prompt"):
        Source([ReasoningGymTask("chain_sum", params=SUMS, size=3000, held_out=200)], 0)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_rows_of_the_dapo_schema_without_their_repeats(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def row(i: int) -> dict:
        messages = [{"content": f"Solve {i}", "role": "user"}]
        return {"data_source": "math_dapo", "prompt": messages, "reward_model": {"ground_truth": str(i)}, "extra": [i]}

    path = write(tmp_path / name, [row(i % 4) for i in range(400)])
    with caplog.at_level(logging.WARNING):
        source = Source([JsonlTask(path, messages="prompt", answer="{reward_model[ground_truth]}", held_out=1)], 0)
    assert f"{name}: 396 rows repeat an earlier prompt and are left out, 4 remain" in caplog.text
    first = source[0]
    number = str(first.prompt[0]["content"]).split()[1]  # type: ignore[index]
    assert json.loads(first.answer) == {"answer": number, "row": row(int(number))}
    assert first.where == f"{path}:{int(number) + 1}"
    assert first.solution is None
    assert first.chat


def test_formats_reach_into_rows(tmp_path: Path) -> None:
    row = {"q": "x", "n": {"m": [1, {"k": "deep"}]}, "f": 0.5, "a": "A"}
    path = write(tmp_path / "r.jsonl", [row])
    settings = {"prompt": "{{{q}}} {n.m[1].k} {n[m][0]:03d} {f:.2f} {n.m}", "solution": "{a}!", "chat": False}
    (only,) = {Source([task(path, **settings)], 0)[i].prompt for i in range(3)}
    assert only == '{x} deep 001 0.50 [1, {"k": "deep"}]'
    assert Source([task(path, **settings)], 0)[0].solution == "A!"


def test_a_system_message_goes_first_unless_there_is_one(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "u"}]
    path = write(tmp_path / "m.jsonl", [{"m": own, "q": "q", "a": ""}])
    assert Source([task(path, system="S")], 0)[0].prompt == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
    ]
    assert Source([task(path, system="S", messages="m")], 0)[0].prompt == own


@pytest.mark.parametrize(
    ("line", "settings", "why"),
    [
        ('{"q": "x"', {}, r"n\.jsonl:4: not JSON: .*got '\{\"q\": \"x\"'"),
        ('{"q": "\xff"}'.encode("latin-1"), {}, r"n\.jsonl:4: not JSON"),
        ("[1]", {}, r"n\.jsonl:4: got \[1\], expected a JSON object"),
        ('{"q": "x"}', {}, r"n\.jsonl:4: no field 'a': got the fields q, expected 'a'"),
        ('{"q": "x", "a": null}', {}, r"n\.jsonl:4: a: got null"),
        ('{"q": "x", "a": "1"}', {"solution": "{s[0]}"}, r"n\.jsonl:4: no field 's\[0\]'"),
        ('{"q": "  ", "a": "1"}', {}, r"n\.jsonl:4: prompt: got an empty text"),
        ('{"q": "x", "a": "1"}', {"answer": "{a:03d}"}, r"n\.jsonl:4: task n: answer = '\{a:03d\}': a is \"1\""),
        ('{"q": "x", "a": "1"}', {"messages": "q"}, r"n\.jsonl:1: q: got \"0\?\", expected a list"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line: str | bytes, settings: dict, why: str, tmp_path: Path) -> None:
    path = Path(write(tmp_path / "n.jsonl", [{"q": f"{i}?", "a": i, "s": ["s"]} for i in range(2)] + [""]))
    path.write_bytes(path.read_bytes() + (line.encode() if isinstance(line, str) else line) + b"\n")
    with pytest.raises(TaskError, match=why):
        Source([task(str(path), **settings)], 0)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none\.jsonl: cannot be read: No such file"):
        Source([task(str(tmp_path / "none.jsonl"))], 0)
    with pytest.raises(TaskError, match=r"e\.jsonl: got no row"):
        Source([task(write(tmp_path / "e.jsonl", ["", "  "]))], 0)
    cut = tmp_path / "c.jsonl.gz"
    cut.write_bytes(Path(numbers(tmp_path / "w.jsonl.gz", 1000)).read_bytes()[:-20])
    with pytest.raises(TaskError, match=r"c\.jsonl\.gz:\d+: broken gzip data"):
        Source([task(str(cut))], 0)
    plain_text = tmp_path / "p.jsonl.gz"
    plain_text.write_text('{"q": 1}\n')
    with pytest.raises(TaskError, match=r"p\.jsonl\.gz: cannot be read: Not a gzipped file"):
        Source([task(str(plain_text))], 0)


@pytest.mark.parametrize("text", ["{a", "a}", "{}", "{a!r}"])
def test_broken_format_strings(text: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="task n: prompt = "):
        Source([task(numbers(tmp_path / "n.jsonl", 2), prompt=text)], 0)


# --- reasoning-gym ---------------------------------------------------------------------------------------------------


def test_reasoning_gym_rows(tmp_path: Path) -> None:
    sums = ReasoningGymTask(
        "chain_sum", params=SUMS, size=500, held_out=50, prompt="{question} So:", solution=" {answer}"
    )
    source = Source([sums], 3)
    out = {row.prompt for row in source.held_out(50)}
    rows = [source[i] for i in range(1500)]
    assert len(out) == 50
    assert not out & {row.prompt for row in rows}
    for row in rows[:20]:
        entry = json.loads(row.answer)
        assert row.prompt == entry["question"] + " So:"
        assert row.solution == " " + entry["answer"]
        assert row.task == "chain_sum"
    assert [Source([sums], 3)[i] for i in (0, 700)] == [rows[0], rows[700]]


@pytest.mark.parametrize(
    "name",
    ["arc_agi", "complex_arithmetic", "countdown", "family_relationships", "game_of_life_halting", "graph_color",
     "knights_knaves", "letter_counting", "maze", "n_queens", "rearc", "rotten_oranges", "spell_backward",
     "string_splitting", "time_intervals", "word_sorting"],
)  # fmt: skip
def test_entries_are_scored_the_same_after_their_trip_through_json(name: str) -> None:
    gym = ReasoningGymTask(name, size=3, held_out=1, extract="whole")
    rows = ReasoningGymRows(gym, name)
    for index in range(3):
        entry = rows._data[index]
        right = entry["answer"] if entry["answer"] is not None else str(entry["metadata"].get("possible_answer", "x"))
        for text in (str(right), "zz 7"):
            assert score(gym, text, rows._make(index).answer).value == rows._data.score_answer(text, entry)


def test_rows_without_an_answer_have_no_solution() -> None:
    assert Source([ReasoningGymTask("graph_color", size=5, held_out=0)], 0)[0].solution is None


def test_plain_values() -> None:
    value = {1: (np.int64(2), np.array([0.5])), "s": {"b", "a"}, "o": complex(1, 2), "n": None, "b": np.bool_(True)}
    assert plain(value) == {"1": [2, [0.5]], "s": ["a", "b"], "o": "(1+2j)", "n": None, "b": True}
    assert json.loads(json.dumps(plain(value))) == plain(value)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"dataset": "chainsum"}, "'chainsum': there is none of that name; expected one of chain_sum"),
        (
            {"dataset": "chain_sum", "params": {"terms": 3}},
            "params {'terms': 3}: .*unexpected keyword argument 'terms'",
        ),
        ({"dataset": "chain_sum", "params": {"min_terms": 0}}, "params {'min_terms': 0}: min_terms must be positive"),
        ({"dataset": "chain_sum", "params": {"seed": 3}}, r"params\.seed: set seed beside `dataset`"),
        ({"dataset": "composite", "params": {"datasets": [{"name": "gcd"}]}}, "data set 'composite'"),
    ],
)
def test_data_sets_and_parameters_that_do_not_exist(settings: dict, why: str) -> None:
    with pytest.raises(TaskError, match=why):
        Source([ReasoningGymTask(**settings)], 0)


def test_prompt_ids_are_the_same_in_every_process_and_imports_say_nothing(tmp_path: Path) -> None:
    path = numbers(tmp_path / "n.jsonl", 9)
    code = (
        "import sys; from engine.config import *; from engine.tasks import Source;"
        "s = Source([JsonlTask(sys.argv[1], prompt='{q}', answer='{a}', held_out=2), ReasoningGymTask('chain_sum')], 4);"
        "print([s[i].prompt_id for i in range(9)])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, path],
            capture_output=True, text=True, timeout=60, check=True, env={"PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stderr == ""
    ids = json.loads(runs[0].stdout.replace("'", '"'))
    assert all(len(prompt_id) == 16 for prompt_id in ids)
