"""`headrace replay`: weights are a fold over the log, so the log is trained again.

`--verify` re-trains the committed steps of a run, in their order and with the settings that each had, and compares the
weights after every step with what the log says. `--set ... --out NEW` trains the same data in the same order with other
settings into a run of its own. Neither needs a generator, a reward or a network; the replayed run is only read.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from msgspec import Struct

from engine.checkpoint import latest_checkpoint
from engine.config import Config
from engine.devices import resolve_device
from protocols.log import Log, LogError
from workers.lines import duration
from workers.log_feed import LogFeed
from workers.ranks import ANSWER, SCRATCH, ranks_of, with_ranks
from workers.replay_difference import difference
from workers.replay_out import NewRun, prepare
from workers.replay_progress import Progress
from workers.replay_source import ReplayError, Segment, StoredRun
from workers.trainer import Trained, Trainer


class Request(Struct, frozen=True):
    """What is to be replayed: the steps after `start` (whose weights are in a checkpoint of the run, or 0) to `last`, None
    for all that there are. With `out` they are trained into a run there, with `overrides`; else they are verified."""

    run: str
    start: int = 0
    last: int | None = None
    overrides: list[str] = []
    out: str | None = None
    resume: bool = False


def replay(request: Request, arguments: Sequence[str]) -> int:
    """Exit code 0 when all steps are trained and, where verified, equal; 1 at the first difference.

    `arguments` are this command's own, for the ranks where the run has several. Raises `ReplayError`, `ConfigError` or
    `CheckpointError` for what cannot be replayed.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    with _log_errors_are_bad_input(), StoredRun.open(request.run) as source:
        segments = source.asked(request.start, request.last, request.overrides, out=request.out)
        learner, folder = segments[0].config.learner, _start(source, segments[0].config, request.start)
        if world == 1 and request.out is not None:
            prepare(source, Path(request.out), segments[-1], request.overrides, resume=request.resume)
        if world == 1 and learner.ranks > 1:
            return with_ranks(learner, arguments)
        with _scratch() as scratch, ranks_of(learner):
            code = Replay(source, segments, request, folder, scratch).run()
        if world == 1:
            return code
        if os.environ["RANK"] == "0":
            (scratch / ANSWER).write_text(str(code), encoding="utf-8")
        return 0  # of torchrun, which would print a failure's stack; the code is in the answer


def _start(source: StoredRun, config: Config, step: int) -> Path:
    """Where the models after `step` lie. Raises `ReplayError` where they are gone, or others now."""
    if step:
        return source.checkpoint(step)
    source.check_critic(config)
    return source.start_folder()


class Replay:
    """One rank of a replay that starts from `folder`. `scratch` is a folder that all ranks see."""

    def __init__(
        self, source: StoredRun, segments: list[Segment], request: Request, folder: Path, scratch: Path
    ) -> None:
        self.source, self.segments, self.start, self.scratch = source, segments, request.start, scratch
        self.folder = folder
        self.out = Path(request.out) if request.out is not None else None
        grouped = dist.is_initialized()
        self.rank: int = dist.get_rank() if grouped else 0
        self.world: int = dist.get_world_size() if grouped else 1
        self.last = segments[-1].last

    def run(self) -> int:
        """The exit code."""
        return self._verify() if self.out is None else self._into_run(self.out)

    def _verify(self) -> int:
        """0 when every step comes to the weights in the log, 1 at the first that does not, which is described."""
        logged_s, began, log = 0.0, time.monotonic(), self.source.log
        with Progress(self.start, self.last, "verified", quiet=self.rank > 0) as progress:
            for trainer, trained in self._steps(LogFeed(log, last=self.last), self.start):
                row = log.step(trained.plan.step)
                if row is None:
                    raise ReplayError(f"{log.path}: step {trained.plan.step} is not in the log any more")
                if row.weights_hash != trained.commit.weights_hash:
                    progress.end()
                    self._say(difference(self.source, row, trained.commit, trainer.config, start=self.start))
                    return 1
                logged_s += row.finished_at - row.started_at
                progress.step(row.step)
        took, count = time.monotonic() - began, self.last - self.start
        self._say(
            f"{self.source.folder}: {count} steps verified ({self.start + 1} to {self.last}): every one came to the weights in "
            f"the log; {duration(took)}, {count / took:.2f} steps/s, {took / max(logged_s, 1e-9):.2f} of the logged training "
            f"time of {duration(logged_s)}"
        )
        return 0

    def _into_run(self, out: Path) -> int:
        """Trains every step into the run at `out`; 0 when it has all of them."""
        with Log.open(out / "rollouts.db") as log:
            expected = {row.step: row.weights_hash for row in log.steps()}
        checkpoint = latest_checkpoint(out / "checkpoints", until=len(expected))
        start = int(checkpoint.name.removeprefix("step-")) if checkpoint is not None else 0
        feed = LogFeed(self.source.log, last=self.last, expected=expected)
        run, began = (NewRun(self.source, out) if self.rank == 0 else None), time.monotonic()
        try:
            with Progress(start, self.last, "trained", quiet=self.rank > 0) as progress:
                for trainer, trained in self._steps(feed, start):
                    self._keep(run, trainer, trained)
                    progress.step(trained.plan.step)
        finally:
            if run is not None:
                run.close()
        self._say(f"{out}: {self.last} of {self.last} steps, {duration(time.monotonic() - began)}; see it with: "
                  f"headrace compare {self.source.folder} {out}")  # fmt: skip
        return 0

    # --- steps -----------------------------------------------------------------------------------------------------

    def _steps(self, feed: LogFeed, start: int) -> Iterator[tuple[Trainer, Trained]]:
        """Trains from the weights after step `start` to the last step, and goes on with another config where the run did:
        by way of a checkpoint, as the run itself."""
        trained: Trained | None = None
        trainer: Trainer | None = None
        for segment in self.segments:
            if segment.last <= start:
                continue
            handed = None
            if trainer is not None and trained is not None:
                handed = self._hand_over(trainer, trained)
                trainer = None  # before the next one is made: two models at once may not fit
            trainer = self._trainer(segment.config, feed)
            self._load(trainer, handed, segment.first - 1 if handed is not None else start)
            for step in range(max(segment.first, start + 1), segment.last + 1):
                trained = self._train(trainer, step)
                yield trainer, trained

    def _trainer(self, config: Config, feed: LogFeed) -> Trainer:
        torch.set_num_threads(config.learner.threads)
        device = resolve_device(config.learner.device)
        return Trainer(config, feed, rank=self.rank, world=self.world, device=device, folder=self.folder)

    def _load(self, trainer: Trainer, handed: Path | None, step: int) -> None:
        """The weights and the optimizer after `step`. Raises `ReplayError` when the checkpoint is of another run."""
        if step == 0:
            return
        own = trainer.checkpoints
        trainer.checkpoints = handed or own
        found = trainer.resume(step)
        trainer.checkpoints = own
        if found != step:
            raise ReplayError(f"{handed or own}: got the checkpoint of step {found}, expected that of step {step}")

    def _hand_over(self, trainer: Trainer, trained: Trained) -> Path:
        """A checkpoint of the last trained step, for the next config's trainer on every rank."""
        own, trainer.checkpoints = trainer.checkpoints, self.scratch
        trainer.save(trained)
        trainer.checkpoints = own
        if self.world > 1:
            dist.barrier()
        return self.scratch

    def _train(self, trainer: Trainer, step: int) -> Trained:
        began = time.monotonic()
        try:
            plan, updates = trainer.pull(step)
            return trainer.train(plan, updates, wait_s=time.monotonic() - began)
        except (ValueError, IndexError) as error:  # tokens or versions that no run can have written
            raise ReplayError(f"{self.source.log.path}: step {step} cannot be trained: {error}") from error

    def _keep(self, run: NewRun | None, trainer: Trainer, trained: Trained) -> None:
        """Commits a step; its checkpoint in the learner's order: a run that is complete has its last one."""
        step = trained.plan.step
        if step == self.last:
            trainer.save(trained)
        if run is not None:
            run.commit(trained.commit, [group.group for group in trained.plan.groups], trainer.config)
        if step % trainer.config.learner.checkpoint_every == 0 and step != self.last:
            trainer.save(trained)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder that all ranks see."""
    shared = os.environ.get(SCRATCH)
    if shared is not None:
        yield Path(shared)
        return
    with tempfile.TemporaryDirectory(prefix="headrace-replay-") as folder:
        yield Path(folder)


@contextmanager
def _log_errors_are_bad_input() -> Iterator[None]:
    try:
        yield
    except LogError as error:
        raise ReplayError(str(error)) from error
