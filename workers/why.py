"""`headrace status RUN --why`: what a run waits for, since when, and who owes it.

The decision is one pure function of the buffer's status: every role says in its heartbeat what it waits for and who owes
it, the ledger says which side its samples are on, and the first thing that holds up the learner is the cause.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from protocols.link_messages import Status
from workers.launch_errors import ENDED, LOW_BYTES
from workers.lines import FRUITLESS_GROUPS, duration

Kind = Literal["learner", "weights", "generator", "reward", "uninformative", "lag", "training", "done", "disk", "ended"]


class Cause(Struct, frozen=True):
    """`text` is a sentence for people; `owes` names the worker or role by whom the run goes on."""

    kind: Kind
    owes: str
    text: str


def cause(status: Status, now: float) -> Cause:
    """What holds a run up that a buffer serves. `now` in Unix seconds."""
    if status.done:
        return Cause("done", "nobody", "nothing: every step is committed and evaluated")
    learners, generators, rewards = (_of(status, role) for role in ("learner", "generator", "reward"))
    ledger, step = status.ledger, status.step + 1
    if gap := _gap(status, "learner", learners, now):
        return Cause("learner", _names(learners) or "learner", f"step {step} waits for a learner: {gap}")
    if absent := _absent(status, learners, now):
        text = f"step {step} waits for all ranks of the learner: {', '.join(absent.values())}"
        return Cause("learner", ", ".join(absent), text)
    learner = learners[0]
    if learner.get("owes") == "generator":
        return _weights(status, learner, generators, now)
    if learner.get("owes") != "buffer":
        return _training(ledger, learner, generators, now)
    graded = ledger.get("to_grade", 0) + ledger.get("grading", 0)
    made = ledger.get("to_generate", 0) + ledger.get("generating", 0)
    if graded and (gap := _gap(status, "reward", rewards, now)):
        return Cause(
            "reward", _names(rewards) or "reward", f"{graded:.0f} responses of step {step} wait for a grade: {gap}"
        )
    if gap := _gap(status, "generator", generators, now):
        return Cause("generator", _names(generators) or "generator", f"step {step} waits for responses: {gap}")
    without = [worker for worker in generators if worker.get("owes") == "learner"]
    if len(without) == len(generators):
        text = "; ".join(f"{worker['name']} {_since(worker, now)}" for worker in without)
        return Cause("weights", "learner", f"no generator has the weights that it needs: {text}")
    if ledger.get("fruitless", 0) >= FRUITLESS_GROUPS:
        said = (
            f"the last {ledger['fruitless']:.0f} groups were all right or all wrong, so dynamic sampling dropped them"
        )
        return Cause(
            "uninformative", "data", f"step {step} has {ledger.get('ready', 0):.0f} groups: {said}; sampling goes on"
        )
    if graded and not made:
        owing = "; ".join(f"{worker['name']} {_since(worker, now)}" for worker in rewards)
        text = f"{graded:.0f} responses of step {step} wait for a grade: {owing}{_last(ledger, 'grade')}"
        return Cause("reward", _names(rewards), text)
    needs = f"{ledger.get('ready', 0):.0f} of {ledger.get('groups_per_step', 0):.0f} groups of step {step} are ready"
    being = f"{made:.0f} responses are being made{_last(ledger, 'response')}"
    absent = _absent(status, generators, now)
    present = [worker for worker in generators if worker["name"] not in absent]
    return Cause("generator", _names(present), "; ".join([needs, being, *absent.values()]))


def standstill(run_dir: Path) -> Cause:
    """What ended a run whose buffer does not answer here: a full disk, or the error in its launcher's diary."""
    free = shutil.disk_usage(run_dir).free
    if free < LOW_BYTES:
        return Cause("disk", "disk", f"the file system of {run_dir} has {free / 2**20:.1f} MiB free; no buffer answers")
    diary = run_dir / "logs" / "launch.log"
    lines = diary.read_text(encoding="utf-8", errors="replace").splitlines() if diary.exists() else []
    last = lines[-1] if lines else ""
    at, found, error = last.partition(f" {ENDED}")
    if found:
        return Cause("ended", "whoever launched it", f"no buffer answers; the launch ended at {at}: {error}")
    return Cause(
        "ended", "whoever launched it", f"no buffer answers, and none said why; the latest: {last or 'nothing'}"
    )


def _weights(status: Status, learner: dict[str, Any], generators: Sequence[dict[str, Any]], now: float) -> Cause:
    """The learner waits for generators to take its weights; those that are not heard are whom it waits for."""
    awaited = learner["state"].replace(",", "").split()
    absent = {name: text for name, text in _absent(status, generators, now).items() if name in awaited}
    text = "; ".join([f"{learner['name']} {_since(learner, now)}", *absent.values()])
    return Cause("weights", ", ".join(absent) or "generator", text)


def _training(
    ledger: dict[str, float], learner: dict[str, Any], generators: Sequence[dict[str, Any]], now: float
) -> Cause:
    """The learner works; once the lag that is allowed is used up, and what is in the system made, generators wait for it."""
    if ledger.get("room", 1) > 0 or not generators or not all(worker.get("owes") for worker in generators):
        return Cause(
            "training", learner["name"], f"nothing: {learner['name']} {_since(learner, now)}, and groups come in"
        )
    lag = f"max_lag = {ledger.get('max_lag', 0):.0f} lets nothing more into the system meanwhile"
    return Cause("lag", learner["name"], f"generators wait for {learner['name']}, which {_since(learner, now)}; {lag}")


def _gap(status: Status, role: str, workers: Sequence[dict[str, Any]], now: float) -> str | None:
    """That no worker of a role is there that is heard, and since when; None when one is."""
    if not workers:
        gone = [worker for worker in status.gone if worker["role"] == role]
        left = [_leave(worker, now) for worker in gone]
        return f"no {role} is there" + (f"; {', '.join(left)}" if left else "; none has joined")
    if all(_silent(status, worker) for worker in workers):
        return ", ".join(_silence(worker) for worker in workers)
    return None


def _absent(status: Status, workers: Sequence[dict[str, Any]], now: float) -> dict[str, str]:
    """Of the role of these workers: who is not heard any more, or has left and not come back, by name."""
    silent = {str(worker["name"]): _silence(worker) for worker in workers if _silent(status, worker)}
    roles = {worker["role"] for worker in workers}
    return silent | {str(gone["name"]): _leave(gone, now) for gone in status.gone if gone["role"] in roles}


def _silent(status: Status, worker: dict[str, Any]) -> bool:
    return bool(worker.get("silent_s", 0.0) > 1.0 + 2 * status.ledger.get("heartbeat_s", 2.0))


def _silence(worker: dict[str, Any]) -> str:
    return f"{worker['name']} is silent for {duration(worker['silent_s'])} (killed, stopped, stuck or cut off)"


def _leave(worker: dict[str, Any], now: float) -> str:
    return f"{worker['name']} left {duration(now - worker['at'])} ago ({worker['reason']})"


def _last(ledger: dict[str, float], what: str) -> str:
    """When the last one came: who is stuck says that he works, and may have said so for hours before."""
    age_s = ledger.get(f"last_{what}_s")
    return "" if age_s is None else f"; the last {what} came {duration(age_s)} ago"


def _of(status: Status, role: str) -> list[dict[str, Any]]:
    return sorted((w for w in status.workers if w.get("role") == role), key=lambda w: str(w["name"]))


def _names(workers: Sequence[dict[str, Any]]) -> str:
    return ", ".join(str(worker["name"]) for worker in workers)


def _since(worker: dict[str, Any], now: float) -> str:
    since = float(worker.get("since") or 0.0)
    return str(worker.get("state", "")) + (f" (since {duration(now - since)})" if since else "")
