"""`headrace pretrain-critic`: a critic learns whole returns from the log of a fixed policy, before any run trains with it.

VC-PPO's value pretraining (arXiv 2503.01491): only the critic is updated, with lambda 1, so that every token's target is
its response's reward, until the value loss and the explained variance have levelled off on groups that are held out. The
log is only read, and a page of it at a time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from engine.backends import load_place, reads_weights, versions
from engine.checkpoint import save_critic
from engine.config import CollectObjective, Config, ConfigError, CriticConfig, LevelOff, PpoObjective, load_config
from engine.critic import FOLDER, load_critic
from engine.learn_torch import TorchLearner
from engine.level_off import Levelling
from engine.objectives.values import VALUE_SUMS, value_figures, value_sums
from engine.packing import assign
from engine.rank_versions import check_same_versions
from engine.trained_model import Ranks
from protocols.log import LogError
from workers.contradictions import errors
from workers.lines import duration
from workers.no_data import empty_batch
from workers.pretrain_data import HELD_OUT, StoredGroups
from workers.pretrain_picture import draw_curve
from workers.ranks import ranks_of, with_ranks
from workers.replay_source import ReplayError, StoredRun

CURVE, PICTURE = "curve.jsonl", "curve.png"
EPOCHS = 20
"""A critic that has not levelled off after so many passes over the log never will."""


class Request(Struct, frozen=True):
    """`run` is a folder, a name under `runs/` or a log; `config` a file whose [critic], [learner] and [objective] are taken in
    place of the run's. `every` steps the critic is measured on the held-out groups."""

    run: str
    config: str | None = None
    overrides: list[str] = []
    out: str | None = None
    every: int = 5


def pretrain(request: Request, arguments: list[str]) -> int:
    """Exit code 0 when the critic is written. `arguments` are this command's own, for the ranks where there are several.
    Raises `ConfigError` for a run or settings that cannot be used, `CheckpointError` when the disk takes no more."""
    with _log_errors_are_bad_input(), StoredRun.open(request.run) as source:
        config, critic = settings(source, request)
        out = Path(request.out) if request.out is not None else source.folder / FOLDER
        if out.exists():
            raise ConfigError(f"{out}: exists already; name another folder with --out")
        if request.every < 1:
            raise ConfigError(f"--every: got {request.every}, expected at least 1")
        data = StoredGroups(source)
        with ranks_of(config.learner) as (rank, world, device):
            if world == 1 and config.learner.ranks > 1:
                return with_ranks(config.learner, arguments)
            folder = source.start_folder()
            check_same_versions(Ranks(rank, world), device, versions(config.learner))
            place = load_place(config.learner, device)
            reads = reads_weights(config.learner, rank)
            model = load_critic(critic.path, folder, dtype=config.learner.dtype, device=place, weights=reads)
            learner = TorchLearner(config, None, critic=model, rank=rank, world=world)
            work = Pretraining(config, critic, data, learner, every=request.every)
            work.run()
            weights = learner.critic.weights() if learner.critic is not None else None
            if rank > 0 and weights is not None:
                weights.take_part()
            if rank == 0:
                start = Path(critic.path) if critic.path is not None else folder
                save_critic(out, model, start, work.write, weights)
                print(f"{out}: the critic, {CURVE} and {PICTURE}; start a run from it with critic.path = {str(out)!r}")
    return 0


def settings(source: StoredRun, request: Request) -> tuple[Config, CriticConfig]:
    """The run's config with the [critic], [learner] and [objective] to use, and its [critic]. Raises `ConfigError`."""
    config = source.config(source.meta.config, request.overrides if request.config is None else ())
    if request.config is not None:
        other = load_config(request.config, request.overrides)
        config = msgspec.structs.replace(
            config, critic=other.critic, learner=other.learner, objective=other.objective, source=request.config
        )
    critic = config.critic
    if critic is None:
        raise ConfigError(
            f"{config.source}: no [critic]; name a config that has one with --config, or set critic.lr with --set"
        )
    collecting = msgspec.structs.replace(config, objective=CollectObjective())  # no rule on the length of a run applies
    problems = [text for text in errors(collecting) if text.startswith(("critic.", "learner."))]
    if problems:
        raise ConfigError("\n".join(f"{config.source}: {problem}" for problem in problems))
    endless = msgspec.structs.replace(critic, pretrain_steps=1 << 62, level_off=None)
    return _as_ppo(config, endless), critic


class Pretraining:
    """One rank. Trains steps of the log's groups, epoch after epoch, and measures as it goes."""

    def __init__(
        self, config: Config, critic: CriticConfig, data: StoredGroups, learner: TorchLearner, *, every: int
    ) -> None:
        self.config, self.critic, self.data, self.learner, self.every = config, critic, data, learner, every
        self.rank, self.world = learner.ranks.rank, learner.ranks.world
        self.rule = critic.level_off or LevelOff()
        self.levelling = Levelling(self.rule)
        self.curve: list[dict[str, float]] = []

    def run(self) -> None:
        """Until the critic has levelled off, or `pretrain_steps` are made."""
        data, limit, began = self.data, self.critic.pretrain_steps, time.monotonic()
        self._say(
            f"{data.log.path}: {len(data.groups)} groups to learn from; {len(data.held_out)} held out (one in {HELD_OUT}, by a hash "
            f"of the group), {len(data.measured)} of them measured every {self.every} steps"
        )
        rule = f"the means of two windows of {self.rule.window} measurements differ by at most {self.rule.loss:.3g} of the value"
        rule += f" loss and {self.rule.explained_variance:.3g} of the explained variance"
        until = f", at most {limit} steps" if limit else f", at most {EPOCHS} epochs"
        self._say(f"until it levels off: {rule}{until}")
        self._measure(0, 0.0, math.nan)
        step, why = 0, f"{EPOCHS} epochs are over"
        for epoch, groups in self._steps():
            step += 1
            metrics = self._train(step, groups)
            last = step == limit
            if step % self.every == 0 or last:
                self._measure(step, epoch + 1, metrics["value_loss"])
            if last or self.levelling.level:
                why = "it has levelled off" if self.levelling.level else f"{limit} steps are made"
                break
        first, end = self.curve[0], self.curve[-1]
        self._say(
            f"{why} after {step} steps, {duration(time.monotonic() - began)}: value loss {first['value_loss']:.4f} -> "
            f"{end['value_loss']:.4f}, explained variance {first['explained_variance']:.3f} -> {end['explained_variance']:.3f}"
        )

    def write(self, folder: Path) -> None:
        """The curve, as numbers and as a picture, into the critic's folder."""
        lines = [json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) for row in self.curve]
        (folder / CURVE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        draw_curve(self.curve, f"value pretraining on {self.data.log.path.parent}", folder / PICTURE)

    def _steps(self) -> Iterator[tuple[int, list[int]]]:
        for epoch in range(EPOCHS if not self.critic.pretrain_steps else 1 << 31):
            for groups in self.data.steps_of(epoch, self.config.seed):
                yield epoch, groups

    def _train(self, step: int, groups: list[int]) -> dict[str, float]:
        updates = min(self.config.learner.updates_per_step, len(groups))
        shares = [share[self.rank] for share in assign(self.data.sizes(groups), updates=updates, ranks=self.world)]
        batches = [self.data.log.batch(step, share) if share else empty_batch(step) for share in shares]
        return self.learner.step(step, batches)

    def _measure(self, step: int, epoch: float, trained_loss: float) -> None:
        """Value loss and explained variance on the held-out groups, from sums over all of them and all ranks."""
        sums, tokens = np.zeros(len(VALUE_SUMS)), 0
        for batch in self.data.pages(self.data.measured, rank=self.rank, world=self.world):
            (packs,) = self.learner.paced([self.learner.packs(batch)])
            found = value_sums(self.learner.values(batch, packs), np.repeat(batch.rewards, batch.lengths))
            sums += np.array([found[name][0] for name in VALUE_SUMS])
            tokens += len(batch.tokens)
        total = self.learner.ranks.sum(np.append(sums, tokens), self.learner.device)
        figures = value_figures({name: total[i : i + 1] for i, name in enumerate(VALUE_SUMS)}, float(total[-1]))
        loss, explained = figures["value_error"], figures["explained_variance"]
        row = {"step": step, "epoch": epoch, "value_loss": loss, "explained_variance": explained,
               "trained_value_loss": trained_loss, "value_mean": figures["value_mean"], "return_mean": figures["return_mean"]}  # fmt: skip
        self.curve.append(row)
        if step:
            self.levelling.add(loss, explained)
        trained = f"  (trained on {trained_loss:.4f})" if math.isfinite(trained_loss) else ""
        self._say(
            f"step {step}  epoch {epoch:.0f}  held-out value loss {loss:.4f}  explained variance {explained:.3f}{trained}"
        )

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def _as_ppo(config: Config, critic: CriticConfig) -> Config:
    """A config whose objective has a critic: what a collecting run has is for this command only."""
    objective = config.objective if isinstance(config.objective, PpoObjective) else PpoObjective(loss="token")
    return msgspec.structs.replace(config, objective=objective, critic=critic)


@contextmanager
def _log_errors_are_bad_input() -> Iterator[None]:
    try:
        yield
    except LogError as error:
        raise ReplayError(str(error)) from error
