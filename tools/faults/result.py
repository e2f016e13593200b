"""What a campaign is asked for, and what has come of it so far."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tools.faults.drill import Outcome
from workers.provenance import code_version


class Settings(Struct, frozen=True):
    """`kills`, `cuts` and `power_cuts` are numbers of faults; times in seconds."""

    config: str
    overrides: list[str]
    out: Path
    kills: int
    power_cuts: int
    seed: int
    recover_s: float
    limit_s: float
    pause_s: float
    stops_s: list[float]
    cuts: int = 0
    cut_s: float = 30.0


class Run(Struct):
    """One run's end: the launcher's exit code, what the audit counted, and whether its weights were reproduced. `checked`:
    it is over, audited and replayed; a campaign that goes on later goes on with a run that is not."""

    name: str
    steps: int
    code: int | None
    seconds: float
    checks: dict[str, str] = {}
    verified: str = ""
    violations: list[str] = []
    checked: bool = False


class Result(Struct):
    outcomes: list[Outcome] = []
    runs: list[Run] = []
    unmade: int = 0

    @property
    def violations(self) -> list[str]:
        faults = [
            f"{o.run} step {o.step}, {o.fault.kind} {o.fault.target}: {text}"
            for o in self.outcomes
            for text in o.violations
        ]
        return faults + [f"{run.name}: {text}" for run in self.runs for text in run.violations]


def figures(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float | int | None]]:
    """By role and kind of fault: how many, and the seconds until it worked again and until the next step."""
    found = {}
    for key in sorted({(o.fault.role, o.fault.kind) for o in outcomes}):
        these = [o for o in outcomes if (o.fault.role, o.fault.kind) == key]
        back, step = ([s for o in these if (s := getattr(o, name)) is not None] for name in ("back_s", "step_s"))
        found[f"{key[0]}, {key[1]}"] = {
            "faults": len(these),
            "back_median_s": statistics.median(back) if back else None,
            "back_worst_s": max(back, default=None),
            "step_median_s": statistics.median(step) if step else None,
            "step_worst_s": max(step, default=None),
            "violations": sum(len(o.violations) for o in these),
        }
    return found


def write(path: Path, settings: Settings, result: Result, *, seconds: float) -> None:
    """All figures so far, whole or not at all."""
    facts = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "code": code_version(), "seconds": seconds,
        "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg(), "python": platform.python_version(),
    }  # fmt: skip
    document = {"machine": facts, "settings": settings, "roles": figures(result.outcomes), "result": result}
    data: dict[str, Any] = {**msgspec.to_builtins(document, enc_hook=str), "violations": result.violations}
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=1))
    temporary.replace(path)


def read(path: Path) -> tuple[Settings, Result]:
    """What `write` wrote. Raises `OSError`, `msgspec.MsgspecError`."""
    data = msgspec.json.decode(path.read_bytes())
    settings = msgspec.convert(data.get("settings"), Settings, dec_hook=lambda kind, value: kind(value))
    return settings, msgspec.convert(data.get("result"), Result)
