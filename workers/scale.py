"""`headrace scale RUN generator=4`: asks a run's launcher for another number of workers, and waits until they are there.

A request is a file in the run's folder, written whole, which the launcher looks for in every turn, takes by renaming it,
and answers in another file. So no port is open for it, and whoever may write the folder may ask.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from engine.config import ConfigError
from protocols.link import LinkError
from workers.launch_errors import LaunchError
from workers.run_folder import launcher_of
from workers.view import ask_status

REQUEST, TAKEN, ANSWER = "scale.json", "scale.taken.json", "scale.answer.json"
MOST = 256
"""Workers of a role that one launcher may be asked for."""
TAKE_S = 20.0
"""How long a launcher that watches its run may take to see a request; one that still starts the buffer sees none."""
LOOK_S = 0.25


class Request(Struct, frozen=True):
    """The counts that are wanted, by role (`generator`, `reward`)."""

    id: str
    counts: dict[str, int]


class Answer(Struct, frozen=True):
    """What the launcher does about the request with this id: whom it starts and stops, or why it does not."""

    id: str
    starts: list[str] = []
    stops: list[str] = []
    refused: str | None = None


# --- the launcher's side ---------------------------------------------------------------------------------------------


def forget_requests(run_dir: Path) -> None:
    """What an earlier launch was asked for is over with it."""
    for name in (REQUEST, TAKEN, ANSWER):
        (run_dir / name).unlink(missing_ok=True)


def take_request(run_dir: Path) -> Request | None:
    """The request that is there, which nobody else sees after that. Raises `ConfigError` for a file that is none."""
    taken = run_dir / TAKEN
    try:
        (run_dir / REQUEST).replace(taken)
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(taken.read_bytes(), type=Request)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{run_dir / REQUEST}: not a request to scale: {error}") from error


def answer_request(run_dir: Path, answer: Answer) -> None:
    _write(run_dir / ANSWER, answer)


# --- the side that asks ------------------------------------------------------------------------------------------------


def parse_counts(texts: Sequence[str]) -> dict[str, int]:
    """`["generator=4"]` as `{"generator": 4}`. Raises `ConfigError`."""
    counts = {}
    for text in texts:
        role, _, number = text.partition("=")
        if role not in ("generator", "reward") or not number.isdigit() or not 1 <= int(number) <= MOST:
            raise ConfigError(f"scale: got {text!r}, expected generator=N or reward=N with N from 1 to {MOST}")
        counts[role] = int(number)
    if not counts:
        raise ConfigError("scale: got no counts, expected generator=N or reward=N")
    return counts


def scale(run_dir: Path, counts: dict[str, int], *, wait_s: float, say: Callable[[str], None]) -> None:
    """Returns when those who were to join serve, and those who were to leave have left.

    Raises `ConfigError` when no launcher runs the run here, or it refuses; `LaunchError` when it does not answer, ends
    meanwhile, or somebody has not joined or left after `wait_s`.
    """
    pid = launcher_of(run_dir)
    if pid is None:
        raise ConfigError(
            f"{run_dir}: no launcher runs it here, so nobody could start or stop its workers; start one with `headrace "
            "launch CONFIG --resume`, or a worker by itself with `headrace generator CONFIG --join tcp://HOST:PORT`"
        )
    began = time.monotonic()
    answer = _ask(run_dir, Request(uuid.uuid4().hex, counts), pid)
    if answer.refused is not None:
        raise ConfigError(f"scale: {answer.refused}")
    if not answer.starts and not answer.stops:
        say("nothing to do: " + ", ".join(f"{role}={count}" for role, count in counts.items()))
    waiting = dict.fromkeys(answer.starts, "serve") | dict.fromkeys(answer.stops, "leave")
    while waiting:
        workers = _workers(run_dir)
        for name, wanted in list(waiting.items()):
            if workers is not None and _done(wanted, workers.get(name)):
                del waiting[name]
                verb = "serves" if wanted == "serve" else "has left"
                say(f"{name} {verb} after {time.monotonic() - began:.1f} s")
        left = ", ".join(f"{name} to {wanted}" for name, wanted in waiting.items())
        if waiting and launcher_of(run_dir) != pid:
            raise LaunchError(f"scale: the launcher (pid {pid}) ended while this waited for {left}")
        if waiting and time.monotonic() - began > wait_s:
            raise LaunchError(f"scale: waited {wait_s:.0f} s for {left}; their logs are in {run_dir / 'logs'}")
        time.sleep(LOOK_S if waiting else 0.0)


def _ask(run_dir: Path, request: Request, pid: int) -> Answer:
    """The launcher's answer. Raises `LaunchError` when none comes."""
    _write(run_dir / REQUEST, request)
    deadline = time.monotonic() + TAKE_S
    while time.monotonic() < deadline and launcher_of(run_dir) == pid:
        try:
            answer = msgspec.json.decode((run_dir / ANSWER).read_bytes(), type=Answer)
            if answer.id == request.id:
                return answer
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    (run_dir / REQUEST).unlink(missing_ok=True)
    raise LaunchError(
        f"scale: waited {TAKE_S:.0f} s for the launcher (pid {pid}) to take the request; does the run still start, "
        "or end, or did somebody else ask at the same time?"
    )


def _workers(run_dir: Path) -> dict[str, dict[str, Any]] | None:
    """What the buffer knows of each worker, by name; None when it does not answer."""
    try:
        status = ask_status(run_dir)
    except (LinkError, OSError):
        return None
    return {str(worker["name"]): worker for worker in status.workers}


def _done(wanted: str, worker: dict[str, Any] | None) -> bool:
    if wanted == "leave" or worker is None:
        return wanted == "leave" and worker is None
    if worker["role"] == "generator":
        return worker.get("counters", {}).get("serves", 0.0) > 0.0
    return "counters" in worker and worker["state"] != "starts"


def _write(path: Path, content: Request | Answer) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_bytes(msgspec.json.encode(content))
    temporary.replace(path)
