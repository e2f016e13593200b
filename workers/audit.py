"""`headrace audit RUN`: does a run's log keep its promises? Everything is looked up, nothing is taken on trust.

Each check is a function of the log (some also read the run's other files) that counts what it looked at and names every
violation. The log is read in one transaction, so that a run may go on meanwhile. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from protocols.log import Log
from workers import audit_groups, audit_steps
from workers.audit_check import Audited, Check
from workers.inspect import open_run

CHECKS: dict[str, Callable[[Audited], Check]] = {
    "database": audit_steps.database,
    "plans": audit_steps.plans,
    "trained once": audit_steps.trained_once,
    "samples": audit_groups.samples,
    "responses": audit_groups.responses,
    "fences": audit_groups.fences,
    "versions": audit_groups.versions,
    "dropped": audit_groups.dropped,
    "informative": audit_groups.informative,
    "statuses": audit_groups.statuses,
    "prompts": audit_groups.prompts,
    "metrics": audit_steps.metrics,
    "checkpoints": audit_steps.checkpoints,
}
"""In the order in which they are printed."""
SHOWN = 20
"""So many violations of one check are printed; all are counted."""


def audit(run: str | Path) -> list[Check]:
    """Every check of a run, given as its folder, its name under `runs/`, or its log. Raises `InspectError` when there is
    no log to be read."""
    with open_run(run) as log:
        return _checks(log)


def _checks(log: Log) -> list[Check]:
    log.query("BEGIN")
    try:
        audited = Audited.of(log)
        found = []
        for name, check in CHECKS.items():
            result = check(audited)
            result.name = name
            found.append(result)
        return found
    finally:
        log.query("ROLLBACK")


def print_audit(run: str | Path) -> int:
    """Prints one line a check, and below it what is wrong; 0 when nothing is, else 1."""
    checks = audit(run)
    for check in checks:
        state = "ok" if not check.violations else f"{len(check.violations)} WRONG"
        print(f"{check.name:<13} {state:<9} {check.counted}")
        for text in check.violations[:SHOWN]:
            print(f"    {text}")
        if len(check.violations) > SHOWN:
            print(f"    and {len(check.violations) - SHOWN} more")
    wrong = sum(len(check.violations) for check in checks)
    print(f"{run}: {wrong} violations" if wrong else f"{run}: nothing is wrong")
    return 1 if wrong else 0
