"""The launcher with real processes: everything is started, watched, started anew, and ended; nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from engine.config import parse_config
from workers.roles import is_refusal, place, role_command, roles
from workers.supervise import Exit

ROOT = Path(__file__).parent.parent
FAKE = ROOT / "tests" / "fake_roles.py"
DRIVER = """
import sys
from engine.config import ConfigError
from workers.launch import launch
from workers.launch_errors import LaunchError
from workers.restarts import Patience
patience = Patience(backoff_s=0.1, attempts=2, address_s=20.0, leave_s=1.0, term_s=1.0)
try:
    sys.exit(launch(sys.argv[1], sys.argv[3:], resume=sys.argv[2] == "resume", live=False,
                    command=(sys.executable, FAKE), patience=patience))
except (ConfigError, LaunchError) as error:
    print(f"headrace: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, ConfigError) else 1)
"""
CONFIG = """
name = "trial"
steps = 3
model = { type = "new", alphabet = "0123456789+= ", hidden = 16, layers = 1, heads = 2, kv_heads = 1, context = 64 }
objective = { type = "dapo" }
buffer = { groups_per_step = 2, samples_per_group = 2, prompt_tokens = 16 }
generator = { sampling = { max_tokens = 8 }, threads = 3 }
learner = { lr = 1e-3, token_budget = 64, threads = 2 }
tasks = [{ type = "jsonl", path = "rows.jsonl", chat = false, score = { type = "exact" }, held_out = 0 }]
"""


class Trial:
    """A folder with a config, and launches in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "runs" / "trial"
        self.started: list[subprocess.Popen[str]] = []
        (folder / "trial.toml").write_text(CONFIG)
        (folder / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 8)

    def start(
        self, fake: dict | None = None, *, resume: bool = False, overrides: tuple[str, ...] = ()
    ) -> subprocess.Popen:
        how = "resume" if resume else "fresh"
        process = subprocess.Popen(
            [sys.executable, "-c", f"FAKE = {str(FAKE)!r}\n{DRIVER}", "trial.toml", how, *overrides],
            cwd=self.folder, env={**os.environ, "PYTHONPATH": str(ROOT), "HEADRACE_FAKE": json.dumps(fake or {})},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def launch(self, fake: dict | None = None, **how: object) -> tuple[int, str, str]:
        process = self.start(fake, **how)  # type: ignore[arg-type]
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def starts(self, name: str | None = None) -> list[dict]:
        path = self.run_dir / "starts.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if name in (None, row["name"])]

    def alive(self) -> list[int]:
        pids = [row["pid"] for row in self.starts()]
        child = self.run_dir / "child.pid"
        pids += [int(child.read_text())] if child.exists() else []
        return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]

    def steps(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    trial = Trial(tmp_path)
    yield trial
    for process in trial.started:
        process.kill()
        process.communicate()
    for pid in trial.alive():
        os.kill(pid, signal.SIGKILL)


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def test_a_run_starts_every_role_prints_a_line_a_step_and_ends_with_nothing_left(trial: Trial) -> None:
    expect = ["learner", "generator-0", "reward-0"]
    code, out, err = trial.launch({"expect": expect})
    assert (code, err) == (0, "")
    assert [line.split("  ")[:2] for line in out.splitlines() if line.startswith("step")] == [
        ["step 1/3", "accuracy 0.333"], ["step 2/3", "accuracy 0.667"], ["step 3/3", "accuracy 1.000"],
    ]  # fmt: skip
    assert [row["name"] for row in trial.starts()][:2] == ["model", "buffer"]
    assert {row["name"] for row in trial.starts()[2:]} == set(expect)
    threads = {row["name"]: row["env"]["OMP_NUM_THREADS"] for row in trial.starts()}
    assert (threads["learner"], threads["generator-0"], threads["reward-0"]) == ("2", "3", "1")
    assert sorted(path.name for path in (trial.run_dir / "logs").iterdir()) == [
        "buffer.log", "generator-0.log", "launch.log", "learner.log", "model.log", "reward-0.log",
    ]  # fmt: skip
    assert trial.alive() == []


def test_a_run_directory_in_use_names_both_ways_out_and_resume_goes_on(trial: Trial) -> None:
    assert trial.launch()[0] == 0
    code, _, err = trial.launch()
    assert code == 2
    assert "--resume" in err
    assert "--set name=trial-2" in err
    code, out, _ = trial.launch(resume=True, overrides=("steps=5",))
    assert code == 0
    assert [line.split("  ")[0] for line in out.splitlines() if line.startswith("step")] == ["step 4/5", "step 5/5"]
    assert "--resume" in trial.starts("buffer")[-1]["arguments"]
    assert len(trial.starts("model")) == 1, "a model that was trained must not be made anew"
    code, out, _ = trial.launch(resume=True, overrides=("steps=5",))
    assert (code, out) == (0, "headrace: runs/trial is complete: 5 of 5 steps\n")


def test_a_worker_that_dies_is_started_anew_and_the_run_completes(trial: Trial) -> None:
    code, out, _ = trial.launch({"expect": ["learner", "generator-0"], "generator-0": ["crash", "crash", "run"]})
    assert code == 0
    assert len(trial.starts("generator-0")) == 3
    assert "generator-0 ended (exit code 1)" in out
    assert "(2 of 2)" in out


def test_a_worker_that_keeps_dying_ends_the_run_with_its_last_lines(trial: Trial) -> None:
    code, _, err = trial.launch({"expect": ["generator-0"], "generator-0": ["crash"]})
    assert code == 1
    assert "generator-0 ended 3 times" in err
    assert "| boom" in err
    assert "headrace launch trial.toml --resume" in err
    assert trial.alive() == []


def test_one_generator_of_two_may_be_lost(trial: Trial) -> None:
    fake = {"expect": ["learner", "generator-0"], "generator-1": ["crash"]}
    process = trial.start(fake, overrides=("generator.count=2", "steps=5000"))
    diary = trial.run_dir / "logs" / "launch.log"
    wait_for(
        "the loss of generator-1", lambda: diary.exists() and "goes on with generator-0" in diary.read_text(), 60.0
    )
    assert len(trial.starts("generator-1")) == 3
    steps = trial.steps()
    wait_for("steps after that", lambda: trial.steps() > steps)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "generator-1 ended 3 times; the run goes on with generator-0" in out


def test_a_role_that_refuses_its_config_is_not_started_again(trial: Trial) -> None:
    code, _, err = trial.launch({"learner": ["refuse"]})
    assert code == 1
    assert len(trial.starts("learner")) == 1
    assert "| headrace: learner cannot work like this" in err
    assert trial.alive() == []


def test_a_buffer_that_cannot_start_ends_the_launch_at_once(trial: Trial) -> None:
    code, _, err = trial.launch({"buffer": ["crash"]})
    assert code == 1
    assert "the buffer did not start (exit code 1)" in err
    assert "| boom" in err
    assert len(trial.starts("buffer")) == 1


def test_a_buffer_that_is_killed_comes_back_at_its_address_and_the_workers_stay(trial: Trial) -> None:
    process = trial.start({"expect": ["learner", "generator-0"]}, overrides=("steps=40",))
    wait_for("the fifth step", lambda: trial.steps() >= 5)
    address = (trial.run_dir / "address").read_text()
    os.kill(trial.starts("buffer")[0]["pid"], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "buffer ended (signal SIGKILL)" in out
    _, second = trial.starts("buffer")
    assert second["arguments"][-3:] == ["--address", address, "--resume"]
    assert len(trial.starts("learner")) == 1
    assert trial.steps() == 40


def test_ctrl_c_ends_everything_and_says_how_to_go_on(trial: Trial) -> None:
    process = trial.start({"expect": ["nobody"], "reward-0": ["deaf"]}, overrides=("seed=3",))
    wait_for("all roles", lambda: len(trial.starts()) == 5)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "killed after 1 s: reward-0" in out
    assert "continue with: headrace launch trial.toml --set seed=3 --resume" in out
    assert trial.alive() == []


def test_a_launcher_that_is_killed_leaves_no_process(trial: Trial) -> None:
    process = trial.start({"expect": ["nobody"]})
    wait_for("all roles", lambda: len(trial.starts()) == 5)
    process.kill()
    wait_for("the end of all roles", lambda: trial.alive() == [])


def test_what_a_role_started_itself_is_ended_with_it(trial: Trial) -> None:
    process = trial.start({"expect": ["nobody"], "learner": ["parent"]})
    wait_for("the learner's child", lambda: (trial.run_dir / "child.pid").exists() and len(trial.alive()) == 5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert trial.alive() == []


def test_workers_that_stay_after_the_end_are_ended(trial: Trial) -> None:
    code, out, _ = trial.launch({"expect": ["learner", "generator-0"], "generator-0": ["deaf"]})
    assert code == 0
    assert "still there 1 s after the end, ended now: generator-0" in out
    assert trial.alive() == []


def test_a_second_launcher_of_the_same_run_is_refused(trial: Trial) -> None:
    first = trial.start({"expect": ["nobody"]})
    wait_for("the buffer", lambda: len(trial.starts("buffer")) == 1)
    code, _, err = trial.launch(resume=True)
    assert code == 2
    assert f"is run by another launcher (pid {first.pid})" in err


def test_ranks_run_under_torchrun_and_die_with_the_run(trial: Trial) -> None:
    process = trial.start({"expect": ["learner", "generator-0"]}, overrides=("learner.ranks=2", "steps=200"))
    wait_for("two ranks", lambda: len(trial.starts("learner")) == 2, timeout_s=60.0)
    assert [row["env"]["WORLD_SIZE"] for row in trial.starts("learner")] == ["2", "2"]
    assert sorted(row["env"]["RANK"] for row in trial.starts("learner")) == ["0", "1"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    wait_for("the end of the ranks", lambda: trial.alive() == [], timeout_s=5.0)


def test_a_cold_start_runs_first_and_only_once(trial: Trial) -> None:
    (trial.folder / "first.toml").write_text(
        CONFIG.replace('"trial"', '"first"')
        .replace("dapo", "sft")
        .replace("chat = false,", 'chat = false, solution = "{answer}",')
    )
    overrides = ('cold_start="first.toml"',)
    code, out, err = trial.launch(overrides=overrides)
    assert code == 0, err
    assert out.splitlines()[0] == "headrace: cold start first: first.toml"
    starts = [json.loads(line) for line in (trial.folder / "runs" / "first" / "starts.jsonl").read_text().splitlines()]
    assert [row["name"] for row in starts] == ["model", "buffer", "learner"]
    assert trial.starts()[0]["name"] == "buffer", "the model comes from the cold start"
    code, out, _ = trial.launch(resume=True, overrides=(*overrides, "steps=4"))
    assert code == 0
    assert "cold start" not in out


def test_a_contradiction_is_refused_before_anything_starts(trial: Trial) -> None:
    code, _, err = trial.launch(overrides=("buffer.groups_per_step=0",))
    assert code == 2
    assert "buffer.groups_per_step" in err
    assert not trial.run_dir.exists()


def test_a_rank_that_refuses_is_named_above_torchruns_table(trial: Trial) -> None:
    code, _, err = trial.launch({"learner": ["refuse"]}, overrides=("learner.ranks=2",))
    assert code == 1
    assert "learner refused to run" in err
    assert "| headrace: learner cannot work like this" in err
    assert trial.alive() == []


# --- what is started where ---------------------------------------------------------------------------------------------

BASE = {
    "name": "trial", "steps": 1, "model": {"type": "path", "path": "m"}, "tasks": [], "objective": {"type": "dapo"},
    "buffer": {"groups_per_step": 1}, "learner": {"lr": 1.0}, "generator": {"sampling": {"max_tokens": 1}, "count": 3},
}  # fmt: skip


def test_supervised_runs_have_neither_generators_nor_rewards() -> None:
    assert roles(parse_config({**BASE, "objective": {"type": "sft"}}, "t")) == ["learner"]
    assert roles(parse_config(BASE, "t")) == ["learner", "generator-0", "generator-1", "generator-2", "reward-0"]


def test_ranks_and_generators_get_gpus_of_their_own_while_there_are_any() -> None:
    config = parse_config({**BASE, "learner": {"lr": 1.0, "ranks": 2}}, "t")
    seen = {name: env["CUDA_VISIBLE_DEVICES"] for name, env in place(config, ["0", "1", "2", "3"]).items()}
    assert seen == {"learner": "0,1", "generator-0": "2", "generator-1": "3", "generator-2": "0"}
    assert place(config, ["0"]) == {}
    engine = {"type": "vllm", "tensor_parallel": 2}
    sharded = parse_config({**BASE, "generator": {"sampling": {"max_tokens": 1}, "count": 2, "engine": engine}}, "t")
    seen = {name: env["CUDA_VISIBLE_DEVICES"] for name, env in place(sharded, ["0", "1", "2", "3", "4"]).items()}
    assert seen == {"learner": "0", "generator-0": "1,2", "generator-1": "3,4"}
    assert "learner" not in place(parse_config({**BASE, "learner": {"lr": 1.0, "device": "cuda:1"}}, "t"), ["0", "1"])


def test_two_ranks_are_started_by_torchrun() -> None:
    config = parse_config({**BASE, "learner": {"lr": 1.0, "ranks": 2}}, "t")
    command = role_command("learner", config, ["c.toml"], address="tcp://a:1", resume=False, command=("py", "-m", "w"))
    assert command[1:7] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    assert command[7:] == ["w", "learner", "c.toml", "--join", "tcp://a:1"]


@pytest.mark.parametrize(
    ("code", "tail", "refused"),
    [(2, "", True), (1, "", False), (1, "  exitcode  : 2 (pid: 7)", True), (1, "  exitcode  : 21 (pid: 7)", False)],
)
def test_a_refusal_shows_through_torchrun(code: int, tail: str, refused: bool) -> None:
    assert is_refusal(Exit("learner", code, 1.0, tail)) is refused
