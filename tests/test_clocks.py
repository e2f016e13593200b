"""No wait, lease or heartbeat looks at the wall clock: it may jump, and differ from machine to machine."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from test_elastic import CLI, ROOT, configure, query, until

from workers.audit import audit
from workers.view import ask_status

PACKAGES = ("protocols", "engine", "workers")
CALLS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
STAMPS = {
    "engine/generate_engine.py": (2, "a response's started_at and finished_at"),
    "engine/generate_torch.py": (2, "the same"),
    "engine/text.py": (1, "a chat template's date"),
    "protocols/link_client.py": (2, "since when a worker is in its state, for people"),
    "protocols/log.py": (2, "when a log was made, and a step committed"),
    "workers/buffer.py": (1, "when a worker left, for people"),
    "workers/cli.py": (2, "what `headrace status` shows durations against"),
    "workers/intake.py": (3, "when a group came in"),
    "workers/launch_run.py": (
        1,
        "which of the log's rows are a role's since its start; it decides about attempts, not when",
    ),
    "workers/metrics.py": (4, "a row's time, and TensorBoard's"),
    "workers/regrade.py": (2, "when a log was regraded"),
    "workers/replay_out.py": (1, "when a log was replayed"),
    "workers/run_state.py": (3, "when an event, a response, a grade came in"),
    "workers/trainer.py": (2, "a step's started_at and finished_at"),
    "workers/view.py": (4, "what is shown, and a part of the view's own name"),
}
"""Every look at the wall clock, and what for. None of these is compared with another, or added to, to end a wait."""
HOUR = 3600 * 10**9


def test_every_look_at_the_wall_clock_is_known_to_be_a_stamp() -> None:
    found: Counter[str] = Counter()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        found[str(path.relative_to(ROOT))] += sum(ast.unparse(call.func) in CALLS for call in calls)
    assert dict(+found) == {name: count for name, (count, _) in STAMPS.items()}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled from moved_clock.c, and shown to move this Python's clock."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler (`apt-get install gcc libc6-dev`) and LD_PRELOAD, for a wall clock that jumps")
    folder = tmp_path_factory.mktemp("clock")
    library, file = folder / "moved_clock.so", folder / "clock"
    source = Path(__file__).with_name("moved_clock.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True, timeout=60
    )
    move(file, HOUR)
    code = "import time; print(time.time(), time.monotonic())"
    told = subprocess.run(
        [sys.executable, "-c", code], env=moved_by(library, file), capture_output=True, text=True, timeout=60
    )
    wall, monotonic = map(float, told.stdout.split())
    assert 3590 < wall - time.time() < 3610
    assert abs(monotonic - time.monotonic()) < 60
    return library


def move(file: Path, nanoseconds: int) -> None:
    """Processes have the file mapped: it is written in place."""
    number = os.open(file, os.O_WRONLY | os.O_CREAT)
    os.pwrite(number, struct.pack("q", nanoseconds), 0)
    os.close(number)


def moved_by(library: Path, file: Path) -> dict[str, str]:
    return os.environ | {"LD_PRELOAD": str(library), "MOVED_CLOCK": str(file), "OMP_NUM_THREADS": "1"}


@pytest.mark.timeout(300)
def test_a_run_whose_clock_jumps_loses_no_lease_no_worker_and_no_time(tmp_path: Path, library: Path) -> None:
    """Every role of a launch, an hour forward and two back while it works, beside a generator of another machine that is a
    day behind. Leases are a minute, a worker is given up after ten seconds: a jump that counted would show."""
    path, clock, elsewhere = configure(tmp_path, steps=24), tmp_path / "clock", tmp_path / "elsewhere"
    move(clock, 0), move(elsewhere, -24 * HOUR)
    run_dir = tmp_path / "runs" / "elastic"

    def step() -> int:
        return int(rows[0][0]) if (rows := query(run_dir, "SELECT max(step) FROM steps")) and rows[0][0] else 0

    out = (tmp_path / "out").open("wb")
    command = [*CLI, "launch", "--no-view", str(path)]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=moved_by(library, clock))
    far = None
    try:
        until("the buffer's address", (run_dir / "address").exists)
        address = (run_dir / "address").read_text(encoding="utf-8").strip()
        joins = [*CLI, "generator", str(path), "--join", address, "--name", "elsewhere"]
        far = subprocess.Popen(joins, cwd=ROOT, stdout=out, stderr=out, env=moved_by(library, elsewhere))
        until("a response from elsewhere", lambda: query(run_dir, "SELECT 1 FROM rollouts WHERE worker = 'elsewhere'"))
        until("two steps", lambda: step() >= 2)  # a jump shows between steps
        for jump in (HOUR, -HOUR):
            move(clock, jump)
            wanted = step() + 3
            until("three more steps", lambda wanted=wanted: step() >= wanted)  # type: ignore[misc]
            status = ask_status(run_dir)
            assert status.ledger["total_reissued"] == status.ledger["total_refused"] == 0
            assert status.gone == []
        launcher.wait(120.0)
        far.wait(60.0)
    finally:
        for process in (launcher, far):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(60.0)
        out.close()
    said = (tmp_path / "out").read_text(encoding="utf-8")
    assert (launcher.returncode, far.returncode) == (0, 0), said
    assert " is started anew " not in said
    assert {kind for (kind,) in query(run_dir, "SELECT DISTINCT kind FROM events")} == {"started", "joined", "left"}
    reasons = {detail for (detail,) in query(run_dir, "SELECT DISTINCT detail FROM events WHERE kind = 'left'")}
    assert not [reason for reason in reasons if re.search("silent|lost|gone", reason)], reasons
    assert [(check.name, text) for check in audit(run_dir) for text in check.violations] == []
    times = [at for (at,) in query(run_dir, "SELECT committed_at FROM steps ORDER BY step")]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert max(gaps) > 3000, "the clock did not jump"
    assert min(gaps) < -6000
    assert json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
