"""What holds a run up, decided from a buffer's status alone: a table of states, causes and who owes it."""

from __future__ import annotations

from typing import Any

import pytest

from protocols.link_messages import Status
from workers.why import cause

NOW = 1000.0
STANDING = {"groups_per_step": 4.0, "max_lag": 1.0, "room": 2.0, "ready": 1.0, "heartbeat_s": 0.5}
Worker = dict[str, Any]


def worker(role: str, state: str, owes: str = "", *, silent_s: float = 0.1) -> Worker:
    return {"name": f"{role}-0", "role": role, "state": state, "owes": owes, "since": NOW - 65, "silent_s": silent_s}


WAITS = worker("learner", "waits for the groups of step 3", "buffer")
TRAINS = worker("learner", "trains step 3")
DECODES = worker("generator", "decodes")
IDLES = worker("generator", "waits for tickets", "buffer")
SCORES = worker("reward", "scores")
LEFT = {"name": "generator-0", "role": "generator", "reason": "killed", "at": NOW - 30}

TABLE = [
    ("no learner has joined", [DECODES, SCORES], {}, "learner", "learner", "no learner is there; none has joined"),
    ("learner paused", [worker("learner", "trains", silent_s=9.0), DECODES], {}, "learner", "learner-0", "is silent for"),
    ("one rank of two paused", [TRAINS, {**worker("learner", "trains", silent_s=9.0), "name": "learner-1"}, DECODES], {},
     "learner", "learner-1", "step 3 waits for all ranks of the learner: learner-1 is silent for 0:09"),
    ("a peer in the weight group", [worker("learner", "waits for generator-0 to take version 2", "generator"), DECODES, SCORES], {},
     "weights", "generator", "waits for generator-0 to take version 2 (since 1:05)"),
    ("which peer in the weight group", [worker("learner", "waits for generator-0, generator-1 to take version 2", "generator"),
     {**worker("generator", "decodes", silent_s=9.0), "name": "generator-1"}, DECODES, SCORES], {}, "weights", "generator-1",
     "to take version 2 (since 1:05); generator-1 is silent for 0:09"),
    ("lag used up", [TRAINS, IDLES, SCORES], {"room": 0.0, "max_lag": 0.0}, "lag", "learner-0", "max_lag = 0 lets nothing more"),
    ("lag used up, but not idle", [TRAINS, DECODES, SCORES], {"room": 0.0}, "training", "learner-0", "nothing: learner-0 trains"),
    ("learner trains", [TRAINS, DECODES, SCORES], {}, "training", "learner-0", "nothing: learner-0 trains step 3"),
    ("generator dead", [WAITS, SCORES], {"to_generate": 8.0}, "generator", "generator", "generator-0 left 0:30 ago (killed)"),
    ("generator silent", [WAITS, worker("generator", "decodes", silent_s=9.0), SCORES], {}, "generator", "generator-0", "is silent for"),
    ("no reward", [WAITS, DECODES], {"to_grade": 5.0}, "reward", "reward", "5 responses of step 3 wait for a grade: no reward is there"),
    ("reward silent", [WAITS, DECODES, worker("reward", "scores", silent_s=9.0)], {"grading": 5.0}, "reward", "reward-0", "is silent for"),
    ("reward stuck", [WAITS, DECODES, SCORES], {"grading": 5.0, "last_grade_s": 64.0}, "reward", "reward-0",
     "reward-0 scores (since 1:05); the last grade came 1:04 ago"),
    ("no weights yet", [WAITS, worker("generator", "waits for version 2", "learner"), SCORES], {}, "weights", "learner",
     "no generator has the weights that it needs: generator-0 waits for version 2"),
    ("none informative", [WAITS, DECODES, SCORES], {"generating": 8.0, "fruitless": 1000.0},
     "uninformative", "data", "all right or all wrong"),
    ("responses are made", [WAITS, DECODES, SCORES], {"generating": 8.0, "last_response_s": 3.0}, "generator", "generator-0",
     "1 of 4 groups of step 3 are ready; 8 responses are being made; the last response came 0:03 ago"),
    ("one generator of two silent", [WAITS, DECODES, {**worker("generator", "decodes", silent_s=9.0), "name": "generator-1"}], {},
     "generator", "generator-0", "responses are being made; generator-1 is silent for 0:09"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("workers", "ledger", "kind", "owes", "text"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_the_cause_of_a_state(workers: list[Worker], ledger: dict[str, float], kind: str, owes: str, text: str) -> None:
    gone = [] if LEFT["name"] in [worker["name"] for worker in workers] else [LEFT]
    status = Status("trial", 2, 9, False, {**STANDING, **ledger}, workers, {}, [], gone)
    found = cause(status, NOW)
    assert (found.kind, found.owes) == (kind, owes)
    assert text in found.text


def test_a_rank_that_left_holds_up_the_other() -> None:
    left = {"name": "learner-1", "role": "learner", "reason": "silent for 10.0 s", "at": NOW - 4}
    found = cause(Status("trial", 2, 9, False, STANDING, [TRAINS, DECODES], {}, [], [left]), NOW)
    assert (found.kind, found.owes) == ("learner", "learner-1")
    assert found.text == "step 3 waits for all ranks of the learner: learner-1 left 0:04 ago (silent for 10.0 s)"


def test_a_run_that_is_done_waits_for_nothing() -> None:
    assert cause(Status("trial", 9, 9, True, {}, [], {}, []), NOW).kind == "done"


def test_the_order_of_causes_is_the_order_of_the_stream() -> None:
    """A learner that is gone holds everything up, whatever else is wrong; then what it waits for, nearest first."""
    gone = Status("trial", 2, 9, False, {**STANDING, "to_grade": 4.0}, [], {}, [])
    assert cause(gone, NOW).kind == "learner"
    assert cause(Status("trial", 2, 9, False, gone.ledger, [WAITS], {}, []), NOW).kind == "reward"
    assert cause(Status("trial", 2, 9, False, STANDING, [WAITS], {}, []), NOW).kind == "generator"
