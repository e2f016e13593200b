"""`headrace drift`: what critics say along the responses of a stored run.

A critic that was started from something trained at the ends of responses values their beginnings too low; the advantages
of early tokens are then too high, and the policy learns to be short (VC-PPO, arXiv 2503.01491, section 3.1 and figure 2).
The picture shows the mean value and the mean advantage of each token position, a line a critic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from engine.config import ConfigError, LengthAdaptive, PpoObjective, VcppoObjective
from engine.critic import FOLDER, load_critic, token_values
from engine.devices import resolve_device
from engine.objectives.ppo import gae_columns
from engine.objectives.values import VALUE_SUMS, value_figures, value_sums
from engine.packing import pack
from protocols.log import LogError
from workers.pretrain_data import StoredGroups
from workers.replay_source import ReplayError, StoredRun

PAIRED_LAMBDA = 0.95
"""VC-PPO's figure is drawn with this lambda; the run's own is drawn beside it."""
FEWEST = 16
"""Positions that fewer responses reach are not drawn."""
GROUPS = 512
"""Groups of the log that are looked at, at most: spread over all of its steps."""


class Drift(Struct, frozen=True, eq=False):
    """Means by token position, each [longest response]: `count` responses reach it, `value`, and the advantages with
    lambda 0.95 and with the run's own. `figures` are those of `value_figures`, against whole returns."""

    name: str
    count: np.ndarray
    value: np.ndarray
    paired: np.ndarray
    own: np.ndarray
    figures: dict[str, float]


def drift(run: str, critics: Sequence[str], out: str | None, console: Console) -> list[Drift]:
    """Prints a table and writes a picture (RUN/drift.png by default). Raises `ConfigError` for a run or a critic that
    cannot be used."""
    try:
        with StoredRun.open(run) as source:
            folders = [Path(critic) for critic in critics] or _critics_of(source.folder)
            data = StoredGroups(source)
            everything = np.sort(np.concatenate([data.groups, data.held_out]))
            chosen = everything[np.linspace(0, len(everything) - 1, min(GROUPS, len(everything))).round().astype(int)]
            objective = source.config(source.meta.config).objective
            objective = objective if isinstance(objective, PpoObjective) else VcppoObjective()
            found = [_along(folder, source, data, chosen, objective) for folder in folders]
            path = Path(out) if out is not None else source.folder / "drift.png"
            _draw(found, f"{source.folder}: {len(chosen)} groups", objective, path)
    except LogError as error:
        raise ReplayError(str(error)) from error
    console.print(_table(found, objective))
    console.print(f"picture: {path}", soft_wrap=True)
    return found


def _critics_of(folder: Path) -> list[Path]:
    """The critics that lie in a run: a pretrained one, and those of its first and its last checkpoint."""
    checkpoints = sorted((folder / "checkpoints").glob(f"step-*[0-9]/{FOLDER}"))
    places = [folder / FOLDER, *dict.fromkeys([*checkpoints[:1], *checkpoints[-1:]])]
    found = [place for place in places if (place / "config.json").is_file()]
    if not found:
        raise ConfigError(
            f"{folder}: no critic there ({FOLDER}/ or checkpoints/step-*/{FOLDER}/); name critics with --critic"
        )
    return found


def _along(folder: Path, source: StoredRun, data: StoredGroups, groups: np.ndarray, objective: PpoObjective) -> Drift:
    """One critic on the responses of `groups`."""
    learner = source.config(source.meta.config).learner
    critic = load_critic(folder, source.start_folder(), dtype=learner.dtype, device=resolve_device(learner.device))
    paired = VcppoObjective(lam_actor=PAIRED_LAMBDA)
    sums, totals, tokens = np.zeros((4, 0)), dict.fromkeys(VALUE_SUMS, 0.0), 0
    for batch in data.pages(groups):
        values = np.zeros(len(batch.tokens), np.float32)
        with torch.no_grad():
            for micro_batch in pack(batch, token_budget=learner.token_budget, device=next(critic.parameters()).device):
                values[micro_batch.tokens] = token_values(critic, micro_batch).cpu().numpy()
        columns = [np.ones_like(values), values, *(gae_columns(batch, values, o)[0] for o in (paired, objective))]
        position = np.arange(len(values)) - np.repeat(np.cumsum(batch.lengths) - batch.lengths, batch.lengths)
        sums = _padded(sums, int(batch.lengths.max()))
        for row, column in zip(sums, columns, strict=True):
            row += np.bincount(position, weights=column, minlength=sums.shape[1])
        for name, value in value_sums(values, np.repeat(batch.rewards, batch.lengths)).items():
            totals[name] += float(value[0])
        tokens += len(values)
    count = sums[0]
    value, early, own = sums[1:] / np.maximum(count, 1)
    figures = value_figures({name: np.array([total]) for name, total in totals.items()}, tokens)
    return Drift(str(folder), count, value, early, own, figures)


def _padded(sums: np.ndarray, length: int) -> np.ndarray:
    return np.pad(sums, ((0, 0), (0, max(0, length - sums.shape[1]))))


def _positions(count: np.ndarray) -> list[int]:
    """The first, a quarter, the middle, three quarters and the last of the positions that are drawn."""
    last = max(0, int((count >= min(FEWEST, count[0])).sum()) - 1)
    return sorted({0, last // 4, last // 2, 3 * last // 4, last})


def _table(found: Sequence[Drift], objective: PpoObjective) -> Table:
    table = Table(title="mean value V and mean advantage A (lambda) by token position")
    for name in ("critic", "position", "responses", "V", "A (0.95)", f"A ({_lambda(objective)})"):
        table.add_column(name, justify="left" if name == "critic" else "right", overflow="fold")
    for one in found:
        loss, explained = one.figures["value_error"], one.figures["explained_variance"]
        figures = f"{one.name}\nvalue loss {loss:.4f}\nexplained variance {_number(explained)}"
        rows = [
            (f"{at}", f"{one.count[at]:.0f}", *(_number(column[at]) for column in (one.value, one.paired, one.own)))
            for at in _positions(one.count)
        ]
        table.add_row(figures, *("\n".join(column) for column in zip(*rows, strict=True)), end_section=True)
    return table


def _draw(found: Sequence[Drift], title: str, objective: PpoObjective, path: Path) -> None:
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(1, 3)
    for axes, subject, name in zip(
        panels,
        ("mean value", "mean advantage, lambda 0.95", f"mean advantage, lambda {_lambda(objective)}"),
        ("value", "paired", "own"),
        strict=True,
    ):
        for one in found:
            _line(axes, one, getattr(one, name))
        axes.axhline(0.0, color="black", linewidth=0.6)
        axes.set_title(subject)
        axes.set_xlabel("token position in the response")
        axes.grid(alpha=0.3)
    panels[0].legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=110)


def _line(axes: Axes, one: Drift, column: np.ndarray) -> None:
    drawn = np.flatnonzero(one.count >= min(FEWEST, one.count[0]))
    axes.plot(drawn, column[drawn], label=one.name, linewidth=1.5)


def _lambda(objective: PpoObjective) -> str:
    lam = objective.lam_actor
    return f"1 - 1 / ({lam.alpha:g} l)" if isinstance(lam, LengthAdaptive) else f"{lam:g}"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
