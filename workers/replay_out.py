"""The run that a replay makes: a log with the replayed groups in it, metrics and checkpoints, like any other run's.

A step's groups and its commit are one transaction, so that a replay which is killed goes on after its last whole step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.config import Config, NewModel, dump_config
from protocols.log import LogError, Origin
from protocols.log_copy import CopyLog
from protocols.messages import StepCommit
from workers.metrics import MetricsWriter
from workers.provenance import code_version
from workers.replay_source import ReplayError, Segment, StoredRun
from workers.start import critic_of


def origin_of(source: StoredRun, how: str, settings: Sequence[str]) -> Origin:
    """What the new log says about where it comes from."""
    return Origin(how, str(source.log.path.resolve()), source.meta.run, source.meta.created_at, list(settings))


def prepare(source: StoredRun, out: Path, segment: Segment, overrides: Sequence[str], *, resume: bool) -> None:
    """Makes the folder and the log of the new run with the newest config, or finds those of one that goes on. Raises
    `ReplayError` for a folder that holds something else."""
    path, origin = out / "rollouts.db", origin_of(source, "replay", overrides)
    if not path.exists():
        if out.exists() and any(out.iterdir()) and not resume:
            raise ReplayError(f"{out}: exists already; expected a new folder")
        _begin(source, out, segment.config, origin)
        return
    if not resume:
        raise ReplayError(f"{out} holds a run already; continue it with --resume, or choose another folder")
    with CopyLog.open(path) as log:
        found = log.meta.origin
        if found is None or (found.how, found.run, found.created_at) != ("replay", origin.run, origin.created_at):
            raise ReplayError(f"{out}: --resume: the run there is no replay of {source.log.path}")
        if found.settings != origin.settings:
            raise ReplayError(
                f"{out}: --resume: it was made with --set {' '.join(found.settings) or 'nothing'}, got "
                f"{' '.join(origin.settings) or 'nothing'}; expected the same"
            )


def _begin(source: StoredRun, out: Path, config: Config, origin: Origin) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(config.model, NewModel) and not config.cold_start:
        shutil.copytree(source.start_folder(), out / "model", dirs_exist_ok=True)
    with CopyLog.create(
        out / "rollouts.db",
        run=out.name,
        config=dump_config(config),
        code_version=code_version(),
        start=source.meta.start,
        critic=critic_of(config),
        origin=origin,
    ) as log:
        changed = ", ".join(origin.settings) or "no setting changed"
        log.add_event("replay", "replay", f"trains what {source.log.path} holds anew: {changed}", time.time())
        log.commit()


class NewRun:
    """The new run's log and figures, open for writing."""

    def __init__(self, source: StoredRun, out: Path) -> None:
        """Raises `LogError` when another process writes there."""
        self.log = CopyLog.open(out / "rollouts.db", write=True)
        try:
            self.log.attach(source.log)
            self.metrics = MetricsWriter(out)
        except BaseException:
            self.log.close()
            raise
        for row in self.log.steps():  # a process that was killed may have left its last lines unwritten
            self.metrics.step(row.step, row.metrics, at=row.committed_at)

    def commit(self, commit: StepCommit, groups: Sequence[int], config: Config) -> None:
        """The step's groups and what became of the weights. Raises `LogError`; nothing of the step counts then."""
        if commit.step <= self.log.last_step():
            return
        data = msgspec.json.decode(msgspec.json.encode(dump_config(config)))
        try:
            if self.log.meta.config != data:
                self.log.set_config(data)
            self.log.copy_groups(groups, grades=True)
            self.log.add_plan(commit.step, list(groups))
            self.log.commit_step(commit, empty=not groups)
        except LogError:
            self.log.undo()
            raise
        self.log.commit()
        self.metrics.step(commit.step, commit.metrics)

    def close(self) -> None:
        self.metrics.close()
        self.log.close()
