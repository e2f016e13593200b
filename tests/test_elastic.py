"""Workers that come and go while a run goes on: asked for by `headrace scale`, or joining by themselves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.config import ConfigError, parse_config
from protocols.log import Log
from workers.audit import audit
from workers.crew import resized
from workers.restarts import Patience, Restarts
from workers.roles import roles
from workers.scale import parse_counts, scale
from workers.supervise import Exit

ROOT = Path(__file__).parent.parent
CLI = (sys.executable, "-m", "workers.cli")
ALPHABET = "".join(map(chr, range(0x4E00, 0x4E00 + 1500))) + "0123456789= "
"""So many that random weights seldom draw the stop token: responses are still under way when somebody leaves."""
CONFIG = """
name = "elastic"
steps = {steps}
runs = "{folder}/runs"
model = {{ type = "new", alphabet = "{alphabet}", hidden = 32, layers = 1, heads = 2, kv_heads = 1, intermediate = 64, context = 512 }}
objective = {{ type = "dapo" }}
buffer = {{ groups_per_step = 2, samples_per_group = 4, prompt_tokens = 16, max_lag = 8, heartbeat_s = 0.3 }}
generator = {{ sampling = {{ max_tokens = 400 }}, engine = {{ type = "torch", slots = 8 }}, device = "cpu" }}
learner = {{ lr = 1e-5, token_budget = 8192, checkpoint_every = 1000, device = "cpu" }}

[[tasks]]
type = "jsonl"
path = "{folder}/rows.jsonl"
chat = false
held_out = 0
score = {{ type = "python", function = "tools.faults.coin:score" }}
"""


def configure(folder: Path, *, steps: int) -> Path:
    rows = "".join(json.dumps({"prompt": f"{n} =", "answer": "1"}) + "\n" for n in range(500))
    (folder / "rows.jsonl").write_text(rows)
    path = folder / "elastic.toml"
    path.write_text(CONFIG.format(folder=folder, alphabet=ALPHABET, steps=steps), encoding="utf-8")
    return path


@contextmanager
def launched(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (path.parent / "launch.out").open("wb") as out:
        process = subprocess.Popen([*CLI, "launch", "--no-view", str(path)], cwd=ROOT, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()


def asked(run_dir: Path, *counts: str) -> str:
    """What `headrace scale` says."""
    done = subprocess.run(
        [*CLI, "scale", str(run_dir), *counts, "--wait", "120"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def until(what: str, condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.1)


def query(run_dir: Path, sql: str, *values: object) -> list[tuple]:  # type: ignore[type-arg]
    if not (run_dir / "rollouts.db").exists():
        return []
    with Log.open(run_dir / "rollouts.db") as log:
        return log.query(sql, *values)


@pytest.mark.timeout(400)
def test_one_three_one_generators_and_no_group_is_lost(tmp_path: Path) -> None:
    path = configure(tmp_path, steps=100_000)
    run_dir = tmp_path / "runs" / "elastic"

    def workers_since(at: float) -> set[str]:
        return {name for (name,) in query(run_dir, "SELECT DISTINCT worker FROM rollouts WHERE started_at > ?", at)}

    with launched(path) as launcher:
        until("the first step", lambda: query(run_dir, "SELECT 1 FROM steps"))
        told = asked(run_dir, "generator=3", "reward=2")
        assert {line.split(" after ")[0] for line in told.splitlines()} == {
            "generator-1 serves", "generator-2 serves", "reward-1 serves",
        }  # fmt: skip
        at = time.time()
        names = {f"generator-{i}" for i in range(3)}
        until("responses of all three", lambda: workers_since(at) == names)
        told = asked(run_dir, "generator=1", "reward=1")
        assert told.count(" has left after ") == 3, told
        at, (step,) = time.time(), query(run_dir, "SELECT max(step) FROM steps")[0]
        until("what was handed back to be made, and steps", lambda: still_out(run_dir) == [] and query(
            run_dir, "SELECT 1 FROM steps WHERE step >= ?", step + 3))  # fmt: skip
        assert workers_since(at) == {"generator-0"}
        assert asked(run_dir, "generator=1").strip() == "nothing to do: generator=1"
    assert launcher.returncode == 143
    assert [(check.name, text) for check in audit(run_dir) for text in check.violations] == []
    continued(run_dir)
    left = query(
        run_dir, "SELECT DISTINCT worker FROM events WHERE kind = 'left' AND worker LIKE 'generator%' AND at < ?", at
    )
    assert {name for (name,) in left} == names - {"generator-0"}
    with pytest.raises(ConfigError, match="no launcher runs it here"):
        scale(run_dir, {"generator": 2}, wait_s=1.0, say=print)


def handed_back(run_dir: Path) -> list[tuple[str, int, int, list[tuple[int, int]]]]:
    """(who left, group, sample, runs of (version, tokens)) of everything that was handed back with tokens."""
    found = []
    for worker, detail in query(run_dir, "SELECT worker, detail FROM events WHERE kind = 'handed back' ORDER BY id"):
        group, samples, made = re.fullmatch(r"group (\d+): samples ([\d, ]+) with (.*) tokens", detail).groups()  # type: ignore[union-attr]
        each = re.findall(r"\d+ \([\d*,]*\)|\d+", made)
        for sample, text in zip(samples.split(", "), each, strict=True):
            runs = [(int(v), int(n)) for v, n in re.findall(r"(\d+)\*(\d+)", text)]
            if runs:
                found.append((worker, int(group), int(sample), runs))
    return found


def still_out(run_dir: Path) -> list[tuple[int, int]]:
    return [
        (group, sample)
        for _, group, sample, _ in handed_back(run_dir)
        if not query(run_dir, "SELECT 1 FROM rollouts WHERE group_id = ? AND sample = ?", group, sample)
    ]


def continued(run_dir: Path) -> None:
    """Each sample that was handed back was finished by another generator, from the tokens that there were: the versions
    under which they were sampled are those that its response begins with."""
    last = {(group, sample): (worker, runs) for worker, group, sample, runs in handed_back(run_dir)}
    made = 0
    for (group, sample), (worker, runs) in last.items():
        for other, versions in query(
            run_dir, "SELECT worker, versions FROM rollouts WHERE group_id = ? AND sample = ?", group, sample
        ):
            assert other != worker
            begin = [version for version, count in json.loads(versions) for _ in range(count)]
            brought = [version for version, count in runs for _ in range(count)]
            assert begin[: len(brought)] == brought, (group, sample)
            made += len(begin) > len(brought)
    assert made, "nobody who left had begun anything"


# --- what is decided, without processes ---------------------------------------------------------------------------------


def test_counts_are_read_and_refused_by_name() -> None:
    assert parse_counts(["generator=4", "reward=3"]) == {"generator": 4, "reward": 3}
    for text in ("generator", "generator=0", "generator=-1", "learner=2", "reward=1000", "reward=x"):
        with pytest.raises(ConfigError, match=r"scale: got .* expected generator=N or reward=N"):
            parse_counts([text])


def test_a_config_of_another_size_names_its_roles() -> None:
    config = parse_config(
        {
            "name": "trial", "steps": 1, "model": {"type": "path", "path": "m"}, "tasks": [], "objective": {"type": "dapo"},
            "buffer": {"groups_per_step": 1}, "learner": {"lr": 1.0}, "generator": {"sampling": {"max_tokens": 1}},
        },
        "test",
    )  # fmt: skip
    sized = resized(config, {"generator": 3, "reward": 2})
    assert roles(sized) == ["learner", "generator-0", "generator-1", "generator-2", "reward-0", "reward-1"]
    assert roles(resized(sized, {"generator": 1})) == ["learner", "generator-0", "reward-0", "reward-1"]


def test_who_was_asked_to_leave_is_not_started_anew_and_who_was_given_up_may_be() -> None:
    restarts = Restarts(["generator-0", "generator-1"], Patience(attempts=1, backoff_s=1.0))
    crashed = Exit("generator-1", 1, 1.0, "")
    restarts.ended(crashed, 0.0)
    assert restarts.pending("generator-1")
    restarts.resize(["generator-0"])
    assert not restarts.pending("generator-1")
    assert restarts.due(100.0) == []
    restarts.left("generator-1")
    restarts.resize(["generator-0"])
    restarts.ended(Exit("buffer", -9, 1.0, ""), 0.0)
    assert restarts.due(100.0) == ["buffer"], "a buffer that comes back brings back only who is wanted"
