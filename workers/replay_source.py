"""A stored run as something that can be trained again: its log, the config of each step, the model it started from.

Nothing of the run is written, and what is still being written is read up to its last commit. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
from msgspec import Struct

from engine.config import Config, ConfigError, PathModel, apply_override, parse_config
from engine.start_folder import policy_folder
from protocols.log import Log, LogError
from workers.contradictions import errors
from workers.start import weights_digest


class ReplayError(ConfigError):
    """A stored run that cannot be replayed, compared or graded anew; says what was found and expected."""


class Segment(Struct, frozen=True):
    """Steps `first` to `last` have one config."""

    first: int
    last: int
    config: Config


class StoredRun:
    """A run's log, held as it was when it was opened: `committed` is its last trained step, `planned` the last one whose
    groups are known."""

    def __init__(self, log: Log) -> None:
        self.log, self.folder = log, log.path.parent
        self.meta = log.meta
        self.committed = log.last_step()
        self.planned = max(self.committed, int(log.query("SELECT coalesce(max(step), 0) FROM plan")[0][0]))

    @classmethod
    def open(cls, run: str | Path) -> Self:
        """The run in a folder, of a name under `runs/`, or of a log file. Raises `ReplayError`."""
        places = [Path(run), Path("runs") / run]
        files = [place if place.suffix == ".db" else place / "rollouts.db" for place in places]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise ReplayError(f"{run}: no such run: looked for {' and '.join(map(str, files))}")
        try:
            return cls(Log.open_still(found))
        except LogError as error:
            raise ReplayError(str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()

    # --- configs ---------------------------------------------------------------------------------------------------

    def config(self, data: dict[str, Any], overrides: Sequence[str] = (), *, folder: Path | None = None) -> Config:
        """A config that the log has, with what is overridden, for a run in `folder` (its own by default). Raises
        `ConfigError`."""
        data = msgspec.json.decode(msgspec.json.encode(data))  # a copy that overrides may write into
        for override in overrides:
            apply_override(data, override)
        folder = folder or self.folder
        return parse_config({**data, "name": folder.name, "runs": str(folder.parent)}, str(self.log.path))

    def segments(
        self, first: int, last: int, overrides: Sequence[str] = (), *, folder: Path | None = None
    ) -> list[Segment]:
        """The config of every step from `first` to `last`: a run that went on with another one has several, and steps that
        are not committed yet have the newest."""
        found: list[tuple[int, str | None]] = []
        for step, config_id in self.log.query(
            "SELECT step, config_id FROM steps WHERE step BETWEEN ? AND ? ORDER BY step", first, last
        ):
            if not found or found[-1][1] != config_id:
                found.append((step, config_id))
        if last > self.committed:
            found.append((max(first, self.committed + 1), None))
        ends = [step - 1 for step, _ in found[1:]] + [last]
        return [
            Segment(step, end, self.config(self.log.config(key) if key else self.meta.config, overrides, folder=folder))
            for (step, key), end in zip(found, ends, strict=True)
        ]

    def asked(self, start: int, last: int | None, overrides: Sequence[str], *, out: str | None) -> list[Segment]:
        """The configs of the steps after `start` to `last`: of those that are committed, to verify them; of the planned ones
        too, to train them into `out`. Raises `ReplayError` or `ConfigError` for what cannot be done."""
        self.check()
        end = self.planned if out is not None else self.committed
        if end == 0:
            more = f"; {self.planned} steps are planned: train them with --out" if self.planned else ""
            raise ReplayError(f"{self.log.path}: no step is committed{more}")
        last = end if last is None else last
        if not 0 <= start < last <= end:
            raise ReplayError(f"{self.log.path}: asked for steps {start + 1} to {last}, it has 1 to {end}")
        if start:
            self._same_run(self.checkpoint(start), start)
        segments = self.segments(start + 1, last, overrides, folder=Path(out) if out is not None else None)
        if out is not None:
            whole = [msgspec.structs.replace(s, config=msgspec.structs.replace(s.config, steps=last)) for s in segments]
            segments = whole
        if overrides:
            self.refuse(segments[-1].config)
        ranks = {segment.config.learner.ranks: segment for segment in segments}
        if len(ranks) > 1:
            raise ReplayError(
                f"{self.log.path}: learner.ranks changes from {segments[0].config.learner.ranks} to {segments[-1].config.learner.ranks} at "
                f"step {segments[-1].first}; replay the parts by themselves with --from and --to"
            )
        return segments

    def refuse(self, config: Config) -> None:
        """Raises `ConfigError` for settings that contradict each other; where the model comes from is no part of it."""
        problems = errors(msgspec.structs.replace(config, model=PathModel(""), cold_start=None))
        if problems:
            raise ConfigError("\n".join(f"{self.log.path}, with what was set: {problem}" for problem in problems))

    def _same_run(self, checkpoint: Path, step: int) -> None:
        """Raises `ReplayError` for a checkpoint with other weights than the log names."""
        try:
            got = json.loads((checkpoint / "headrace.json").read_text(encoding="utf-8"))["meta"]["weights_hash"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReplayError(f"{checkpoint}: headrace.json cannot be read: {error}") from error
        row = self.log.step(step)
        if row is None or row.weights_hash != got:
            expected = row.weights_hash if row is not None else "that step in the log"
            raise ReplayError(f"{checkpoint}: of another run: its weights are {got}, expected {expected}")

    # --- what must be there ----------------------------------------------------------------------------------------

    def start_folder(self) -> Path:
        """The model that step 1 started from. Raises `ReplayError` when it is gone or has other weights now."""
        start, problems = self.meta.start, []
        config = self.segments(1, 1)[0].config
        places = [Path(start.folder)] if start is not None else []
        try:
            places.append(policy_folder(config))
        except ConfigError as error:
            problems.append(str(error))
        for place in places:
            digest = weights_digest(place)
            if digest is not None and (start is None or digest == start.digest):
                return place
            problems.append(f"{place} has " + ("other weights now" if digest else "no weights"))
        raise ReplayError(
            f"{self.log.path}: the model that the run started from is gone: {'; '.join(problems)}. Expected "
            f"{start.folder if start else 'the weights of step 0'} as it was; --from STEP starts from a checkpoint of the run"
        )

    def check_critic(self, config: Config) -> None:
        """Raises `ReplayError` when the folder that step 1's critic started from, and starts from again under `config`, is
        gone or has other weights now."""
        critic, logged = self.meta.critic, self.segments(1, 1)[0].config.critic
        if critic is None or logged is None or config.critic is None or config.critic.path != logged.path:
            return  # a fresh critic, another one that was asked for, or a log that does not say which one it was
        digest = weights_digest(Path(config.critic.path or ""))
        if digest != critic.digest:
            raise ReplayError(
                f"{self.log.path}: the critic that the run started from is gone: {config.critic.path} has "
                f"{'other weights now' if digest else 'no weights'}. Expected {critic.folder} as it was; --from STEP starts from a "
                "checkpoint of the run"
            )

    def checkpoint(self, step: int) -> Path:
        """The run's own checkpoint of a step. Raises `ReplayError` without one."""
        root = self.folder / "checkpoints"
        path = root / f"step-{step:06d}"
        if not path.is_dir():
            there = sorted(int(other.name[5:]) for other in root.glob("step-*[0-9]"))
            raise ReplayError(f"{path}: no such checkpoint; the run has {', '.join(map(str, there)) or 'none'}")
        return path

    def check(self) -> None:
        """Raises `ReplayError` when steps, plans or groups are missing."""
        steps = [step for (step,) in self.log.query("SELECT step FROM steps ORDER BY step")]
        for expected, step in enumerate(steps, start=1):
            if step != expected:
                raise ReplayError(f"{self.log.path}: step {expected} is missing; the log goes on with step {step}")
        unplanned = self.log.query(
            """SELECT step FROM steps WHERE NOT EXISTS (SELECT 1 FROM plan WHERE plan.step = steps.step)
            AND coalesce(json_extract(metrics, '$.updates'), 1) > 0 ORDER BY step LIMIT 1"""
        )
        if unplanned:
            raise ReplayError(f"{self.log.path}: the plan of step {unplanned[0][0]} is missing, and it was trained")
        lost = self.log.query(
            """SELECT step, group_id FROM plan AS p WHERE NOT EXISTS (SELECT 1 FROM prompts WHERE group_id = p.group_id)
            OR NOT EXISTS (SELECT 1 FROM groups WHERE id = p.group_id)
            OR NOT EXISTS (SELECT 1 FROM rollouts WHERE group_id = p.group_id) ORDER BY step, position LIMIT 1"""
        )
        if lost:
            step, group = lost[0]
            raise ReplayError(f"{self.log.path}: group {group} of step {step}'s plan is missing or has no responses")
