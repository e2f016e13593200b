"""`launch --on slurm`: the script as text, and the real thing on a Slurm of four nodes with addresses of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, cluster, missing, wait_for

from engine.config import Config, ConfigError, load_config
from protocols.log import Log
from workers.contradictions_placement import refuse_placement
from workers.roles import Rendezvous, torchrun
from workers.site import TOKEN, in_same_folder, write_token
from workers.slurm_script import job_script, parts

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.toml"
SHORT = [
    "cold_start=", "eval.prompts=0", "buffer.dynamic_sampling=false", "buffer.groups_per_step=8",
    "generator.count=2", "placement.generator.nodes=2", "learner.ranks=2", "placement.learner.nodes=2",
]  # fmt: skip
LARGE = [
    "name=large", "runs=r r", "generator.count=16", "generator.device=cuda", "learner.device=cuda", "learner.ranks=64",
    "placement={learner={nodes=8,gpus=1,cpus=4,memory_gb=100.5},generator={nodes=9,gpus=1,cpus=2,memory_gb=60},"
    "buffer={cpus=3,memory_gb=10},reward={cpus=8,memory_gb=16},"
    'slurm={partition="gpu",account="rl",time="2-00:00:00",extra=["--qos=high"],role_extra={learner=["--switches=1"]}}}',
]  # fmt: skip


def config_of(*overrides: str) -> Config:
    return load_config(QUICKSTART, list(overrides))


# --- text ------------------------------------------------------------------------------------------------------------


def test_the_script_of_a_large_run() -> None:
    """Two generators a node beside the buffer and the reward; 8 ranks a node; the order of the parts is what a lost node needs."""
    script = job_script(
        config_of(*LARGE), file=Path("/f s/c.toml"), overrides=["a=1"], resume=True, directory=Path("/w d"), python="py"
    )
    head, _, tail = script.partition("#SBATCH hetjob\n")
    log = (Path("r r") / "large" / "logs" / "slurm-%j.log").absolute()
    assert head.splitlines() == [
        "#!/bin/bash", "# Written by `headrace launch --on slurm`.", "#SBATCH --job-name=large", f'#SBATCH --output="{log}"',
        "#SBATCH --open-mode=append", "#SBATCH --signal=B:TERM@120", "#SBATCH --requeue",
        "#SBATCH --no-kill", "#SBATCH --partition=gpu", "#SBATCH --account=rl", "#SBATCH --time=2-00:00:00",
        "#SBATCH --nodes=9", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=15", "#SBATCH --gpus-per-node=2",
        "#SBATCH --mem=149504M", "#SBATCH --qos=high",
    ]  # fmt: skip
    assert tail.splitlines() == [
        "#SBATCH --no-kill", "#SBATCH --partition=gpu", "#SBATCH --account=rl", "#SBATCH --time=2-00:00:00",
        "#SBATCH --nodes=8", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=32", "#SBATCH --gpus-per-node=8",
        "#SBATCH --mem=823296M", "#SBATCH --qos=high", "#SBATCH --switches=1",
        "cd '/w d' || exit 1", "resume=--resume",
        "if [ -e 'r r/large/rollouts.db' ]; then resume=--resume; fi",
        "exec py -m workers.cli launch '/f s/c.toml' --on allocation --no-view --set a=1 $resume",
    ]  # fmt: skip
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=30).returncode == 0


def test_a_run_without_generators_is_one_part_with_the_buffer() -> None:
    (part,) = parts(load_config(ROOT / "configs" / "quickstart-sft.toml", ["placement.buffer.cpus=2"]))
    assert (part.role, part.nodes, part.cpus) == ("learner", 1, 3)


def test_ranks_on_several_machines_meet_at_one() -> None:
    assert torchrun(16, Rendezvous(2, "n3:29400", "run-7"))[3:] == [
        "--nnodes", "2", "--rdzv-backend", "static", "--master-addr", "n3", "--master-port", "29400", "--rdzv-id", "run-7",
        "--nproc-per-node", "8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "sides"),
    [
        (["learner.ranks=6", "placement.learner.nodes=4"], ("placement.learner.nodes = 4", "learner.ranks = 6")),
        (["generator.device=cuda"], ('generator.device = "cuda"', "placement.generator.gpus = 0")),
        (["learner.device=cpu", "placement.learner.gpus=1"], ('learner.device = "cpu"', "placement.learner.gpus = 1")),
        (["generator.threads=4"], ("generator.threads = 4", "placement.generator.cpus = 1")),
        (["generator.engine={type='vllm',tensor_parallel=4}", "placement.generator.gpus=2"],
         ("placement.generator.gpus = 2", "generator.engine.tensor_parallel x pipeline_parallel = 4")),
        (["placement.generator.nodes=0"], ("placement.generator.nodes: got 0", "expected at least 1")),
        (["placement.slurm.extra=['qos=high']"], ("placement.slurm.extra: got 'qos=high'", "options of sbatch")),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_refused_with_both_sides(overrides: list[str], sides: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_placement(config_of("cold_start=", *overrides), "slurm")
    assert all(side in str(refused.value) for side in sides), refused.value


def test_a_machine_with_another_folder_says_so_and_runs_nothing(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        write_token(folder)
    command = in_same_folder(run, ["echo", "started"])
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "started\n"
    write_token(run)  # as if the folder at that path were another one there
    for removed, why in ((False, "another run's folder"), (True, "No such file")):
        if removed:
            (run / TOKEN).unlink()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"SLURMD_NODENAME": "n7"})
        assert done.returncode == 3
        assert "headrace: n7 does not see the folder of the run that" in done.stdout
        assert str(run) in done.stdout
        assert why in done.stdout


# --- a cluster ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (why := missing()) is not None:
        pytest.skip(why)
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster", 4) as made:
        yield made


class Launched:
    """`headrace launch --on slurm` of the quickstart, typed on the first node."""

    def __init__(self, slurm: Cluster, folder: Path, *options: str, steps: int) -> None:
        self.run = folder / "quickstart"
        sets = [word for each in [f"runs={folder}", f"steps={steps}", *SHORT] for word in ("--set", each)]
        command = [sys.executable, "-m", "workers.cli", "launch", str(QUICKSTART), "--on", "slurm", *sets, *options]
        self.process = subprocess.Popen(
            slurm.on("n1", *command), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def steps(self) -> int:
        metrics = self.run / "metrics.jsonl"
        assert self.process.poll() is None, self.process.communicate()
        return metrics.read_text().count('"step":') if metrics.exists() else 0

    def end(self) -> str:
        try:
            output, _ = self.process.communicate(timeout=240)
        finally:
            self.process.kill()
            self.process.wait(30.0)
        return output


def test_a_run_is_cancelled_continued_and_loses_a_generators_node(slurm: Cluster, tmp_path: Path) -> None:
    """Two generators on two nodes, two ranks on two others, with keys, for their addresses lie beyond loopback."""
    first = Launched(slurm, tmp_path, steps=2000)
    try:
        wait_for("a step", lambda: first.steps() > 0, 180.0)
    finally:
        first.process.send_signal(signal.SIGINT)
        output = first.end()
    assert first.process.returncode == 130, output
    assert "made keys in" in output
    assert "--on slurm" in output.partition("continue with: ")[2], output
    assert slurm.slurm("squeue", "--noheader").split() == []
    with Log.open(first.run / "rollouts.db") as log:
        before = log.last_step()

    second = Launched(slurm, tmp_path, "--resume", steps=before + 40)
    try:
        wait_for("a step more", lambda: second.steps() > before, 180.0)
        lost = slurm.slurm("squeue", "--steps", "--noheader", "--format=%j %N")
        nodes = dict(line.split() for line in lost.splitlines())
        assert {nodes["generator-0"], nodes["generator-1"], nodes["learner"]} == {"n1", "n2", "n[3-4]"}
        slurm.lose("n2")
    finally:
        output = second.end()
    assert second.process.returncode == 0, output
    assert "generator-1 ended (exit code 1)" in output
    with Log.open(second.run / "rollouts.db") as log:
        assert log.last_step() == before + 40
        joined = log.query("SELECT 1 FROM events WHERE kind = 'joined' AND worker = 'generator-1'")
    assert len(joined) >= 3, "it came back after the loss"
    audit = subprocess.run(
        [sys.executable, "-m", "workers.cli", "audit", str(second.run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert audit.returncode == 0, audit.stdout
