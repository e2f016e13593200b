"""`headrace regrade`: every stored response through another reward, into a log of its own.

Groups, prompts and responses stay what they were; the grades are new, and dynamic sampling decides anew what each group
is good for. The plan keeps a group that is informative in its step. One that was dropped and is informative now goes to
the first step whose weights had made all of its tokens. The new log can be replayed, or be offline data.

The new run is built under a temporary name: a regrade that is killed leaves nothing with the name of a run.
"""

from __future__ import annotations

import os
import queue
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.console import Console

from engine.config import Config, JsonlTask, LogTask, PythonScore, SftObjective, Task, dump_config
from engine.tasks import named_tasks
from protocols.log import GroupRow, LogError, Status
from protocols.log_copy import CopyLog
from protocols.messages import Grade, GradeTask, Rollout
from workers.provenance import code_version
from workers.regrade_change import Changes
from workers.replay_out import origin_of
from workers.replay_progress import Progress
from workers.replay_source import ReplayError, StoredRun
from workers.reward_watch import RewardWatch
from workers.scorer import START_TIMEOUT_S
from workers.scorer_pool import BACKOFF_LIMIT_S, ScorerPool

AHEAD = 64
"""So many responses are with the scorers or wait for them, at least, so that none of them is idle."""
COMMIT_GROUPS = 64

_COMPLETE = """FROM groups AS g WHERE (SELECT count(*) FROM rollouts WHERE group_id = g.id) = g.samples"""


class Open(Struct):
    """A group whose responses are being graded."""

    row: GroupRow
    rollouts: dict[int, Rollout]
    grades: list[Grade] = []
    left: int = 0


def regrade(run: str, out: str, *, reward: str | None, overrides: list[str], console: Console) -> None:
    """Grades a run anew into the folder `out`, which must be new. Raises `ReplayError` or `ConfigError` for what cannot be
    graded, `ScorerError` when the reward cannot be started, `RewardsBroken` when it fails on everything."""
    folder = Path(out)
    part = folder.with_name(folder.name + ".part")
    if folder.exists():
        raise ReplayError(f"{folder}: exists already; expected a new folder")
    with StoredRun.open(run) as source:
        try:
            source.check()
            config = _config(source, folder, reward, overrides)
            tasks = _tasks(source, config, reward)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            settings = [*overrides, *([f"reward function {reward}"] if reward else [])]
            with _new_log(source, part, config, settings) as log:
                changes = Regrade(source, log, config, tasks).run()
            part.rename(folder)
        except LogError as error:
            raise ReplayError(str(error)) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    changes.show(console, folder)


class Regrade:
    """The scorers' work, and what becomes of each group."""

    def __init__(self, source: StoredRun, log: CopyLog, config: Config, tasks: dict[str, Task]) -> None:
        self.source, self.log, self.config = source, log, config
        self.grades: queue.SimpleQueue[Grade] = queue.SimpleQueue()
        scorers = min(max(1, config.reward.count * config.reward.scorers), os.cpu_count() or 1)
        settings = msgspec.structs.replace(config.reward, scorers=scorers)
        self.pool = ScorerPool(tasks, settings, self.grades.put)
        self.watch = RewardWatch(samples_per_group=config.buffer.samples_per_group, attempts=config.reward.attempts)
        self.patience_s = config.reward.timeout_s + 2 * START_TIMEOUT_S + 2 * BACKOFF_LIMIT_S
        self.open: dict[int, Open] = {}
        self.informative: dict[int, int] = {}
        """Groups to train on, with the newest weights that sampled one of their tokens."""
        self.changes = Changes()

    def run(self) -> Changes:
        """Grades everything, decides, plans; what changed. Raises `RewardsBroken` or `LogError`."""
        total = int(self.source.log.query(f"SELECT count(*) {_COMPLETE}")[0][0])
        self.pool.start()
        try:
            with Progress(0, total, "graded", unit="group") as progress:
                for done, group in enumerate(self._graded(), start=1):
                    self._settle(group)
                    self.watch.check()
                    if done % COMMIT_GROUPS == 0:
                        self.log.commit()
                    progress.step(done)
        finally:
            self.pool.close(0.0)
        self._plan()
        self.log.commit()
        self.changes.evaluations = (self.source.log.evaluations(), self.log.evaluations())
        return self.changes

    # --- grading -----------------------------------------------------------------------------------------------------

    def _graded(self) -> Iterator[Open]:
        """Groups as they come back from the scorers, which always have enough to do."""
        waiting = 0
        for row in self._groups():
            group = Open(
                row, {rollout.sample: rollout for rollout in self.source.log.rollouts(row.group)}, [], row.samples
            )
            self.open[row.group] = group
            for sample in group.rollouts:
                self._submit(group, sample, 0)
            waiting += row.samples
            while waiting >= AHEAD + row.samples:
                done, waiting = self._next(), waiting - 1
                if done is not None:
                    yield done
        while self.open:
            done = self._next()
            if done is not None:
                yield done

    def _groups(self) -> Iterator[GroupRow]:
        """Those that have all their responses."""
        last = -1
        while page := self.source.log.query(f"SELECT g.id {_COMPLETE} AND g.id > ? ORDER BY g.id LIMIT 256", last):
            last = page[-1][0]
            for (group,) in page:
                row = self.source.log.group(group)
                if row is not None:
                    yield row

    def _submit(self, group: Open, sample: int, attempt: int) -> None:
        row, rollout = group.row, group.rollouts[sample]
        self.pool.submit(
            GradeTask(
                group=row.group, sample=sample, attempt=attempt, task=row.task, prompt_text=row.prompt_text,
                text=rollout.text, answer=row.answer, response_tokens=rollout.tokens.shape[0], finish=rollout.finish,
            )
        )  # fmt: skip

    def _next(self) -> Open | None:
        """Waits until a response has its last attempt; its group, when that was the last response."""
        while True:
            try:
                grade = self.grades.get(timeout=self.patience_s)
            except queue.Empty:
                raise TimeoutError(f"regrade: waited {self.patience_s:.0f} s for a grade from the scorers") from None
            if problem := self.watch.saw(grade):
                print(f"regrade: {problem}", file=sys.stderr, flush=True)
            group = self.open[grade.group]
            group.grades.append(grade)
            if grade.verdict != "graded" and grade.attempt + 1 < self.config.reward.attempts:
                self._submit(group, grade.sample, grade.attempt + 1)
                continue
            group.left -= 1
            return self.open.pop(grade.group) if group.left == 0 else None

    # --- what follows ------------------------------------------------------------------------------------------------

    def _settle(self, group: Open) -> None:
        """Writes a group with its new grades and what becomes of it."""
        row, now = group.row, time.time()
        self.log.copy_groups([row.group], grades=False)
        for grade in sorted(group.grades, key=lambda grade: (grade.sample, grade.attempt)):
            self.log.add_grade("regrade", grade, now)
        status, reason = self._decide(group)
        if status == "waiting":
            self.informative[row.group] = max(version for r in group.rollouts.values() for version, _ in r.versions)
        else:
            self.log.set_group(row.group, status, reason=reason)
        self.changes.add(row, group.rollouts, self.source.log.grades(row.group), group.grades, status)

    def _decide(self, group: Open) -> tuple[Status, str | None]:
        """As the ledger does: raw accuracy decides, failed samples are left out, fewer than two left fail the group."""
        right = [grade.correct for grade in group.grades if grade.verdict == "graded"]
        samples = group.row.samples
        if group.row.kind == "eval":
            return "evaluated", None
        if len(right) < min(2, samples):
            return "failed", f"{samples - len(right)} of {samples} samples could not be graded"
        if self.config.buffer.dynamic_sampling and (all(right) or not any(right)):
            return "dropped", "all correct" if all(right) else "all wrong"
        return "waiting", None

    def _plan(self) -> None:
        """Informative groups in their steps, the others that are informative now behind them."""
        steps = {step: list(self.source.log.plan(step) or []) for step in range(1, self.source.planned + 1)}
        planned = {group for groups in steps.values() for group in groups}
        for group, version in sorted(self.informative.items()):
            if group not in planned and version + 1 in steps:
                steps[version + 1].append(group)
        for step, groups in steps.items():
            self.log.add_plan(step, [group for group in groups if group in self.informative])
        self.changes.planned(steps, planned, self.informative.keys())


# --- the new log -----------------------------------------------------------------------------------------------------


def _config(source: StoredRun, folder: Path, reward: str | None, overrides: list[str]) -> Config:
    """The run's newest config with the new reward. Raises `ConfigError` where that contradicts itself."""
    tasks = source.config(source.meta.config).tasks
    functions = [
        f'tasks.{index}.score={{type = "python", function = "{reward}"}}'
        for index, task in enumerate(tasks)
        if reward is not None and not isinstance(task, LogTask)
    ]
    config = source.config(source.meta.config, [*functions, *overrides], folder=folder)
    if isinstance(config.objective, SftObjective):
        raise ReplayError(f"{source.log.path}: the run trains on solutions (sft); there is nothing to grade")
    source.refuse(config)
    return config


def _tasks(source: StoredRun, config: Config, reward: str | None) -> dict[str, Task]:
    """How to score each task that the log has. Raises `ReplayError` for one that the config does not have."""
    tasks = named_tasks(config.tasks)
    names = {name for (name,) in source.log.query("SELECT DISTINCT task FROM groups")}
    if reward is not None:
        function = PythonScore(reward)
        return {name: tasks.get(name, JsonlTask(path=name, score=function)) for name in sorted(names)}
    if missing := sorted(names - tasks.keys()):
        raise ReplayError(
            f"{source.log.path}: it has groups of task {missing[0]}, the config has {', '.join(tasks) or 'none'}; "
            "--reward module:function scores every task"
        )
    return {name: tasks[name] for name in sorted(names)}


def _new_log(source: StoredRun, part: Path, config: Config, settings: list[str]) -> CopyLog:
    log = CopyLog.create(
        part / "rollouts.db",
        run=config.name,
        config=dump_config(config),
        code_version=code_version(),
        start=source.meta.start,
        critic=source.meta.critic,
        origin=origin_of(source, "regrade", settings),
    )
    log.attach(source.log)
    what = ", ".join(settings) or "no setting changed"
    log.add_event("regrade", "regrade", f"grades what {source.log.path} holds anew: {what}", time.time())
    return log
