"""`headrace plan --check RUN`: a recorded run predicted from its parts, beside what it really came to.

From the run come the time of each part by itself, measured over its first steps, and the work: how many tokens every
response had, and which were right. How long a step takes, who waits and how old tokens get comes from the simulation, and
is compared over the steps after those.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from engine.config import Config, ConfigError
from protocols.log import LogReader
from workers.inspect import open_run
from workers.pace import pace_of
from workers.plan import recorded
from workers.plan.costs import Costs
from workers.plan.figures import Figures, forecast
from workers.plan.notes import Evaluations, Setting
from workers.plan.simulation import Simulation

JUDGED = ("step_seconds", "tokens_per_second", "learner_idle", "lag_mean")
SHARES = ("learner_idle", "generator_idle")
LEAST_LAG = 0.1
"""A mean lag is compared in parts of itself, or of this many versions where it is smaller."""


class Comparison(Struct, frozen=True):
    """A run and its prediction; `errors` as parts of what was recorded, those of shares see `error`."""

    run: str
    calibrated: tuple[int, int]
    compared: tuple[int, int]
    recorded: Figures
    predicted: Figures
    errors: dict[str, float]
    costs: Costs

    @property
    def worst(self) -> float:
        """The largest error of the figures that are judged."""
        return max(self.errors[name] for name in JUDGED)


def setting_of(config: Config) -> Setting:
    """What the ledger of a run of this config is set to."""
    evaluation = config.eval
    return Setting(
        pace_of(config),
        config.buffer.samples_per_group,
        Evaluations(evaluation.prompts, evaluation.samples, evaluation.every),
    )


def compare(log: LogReader, *, part: float, seed: int = 0) -> Comparison:
    """`part` of the steps give the costs, and the others are compared; with 1 all steps do both. Raises `ConfigError` for a run
    that is too short."""
    config, done = recorded.config_of(log), log.last_step()
    if done < 8:
        raise ConfigError(f"{log.path}: got {done} steps, expected at least 8 to measure some and predict the others")
    until = done - 1 if part == 1 else min(done - 3, max(4, round(part * done)))
    first = 2 if part == 1 else until + 1
    measured, wanted = recorded.stretch(log, 2, until), recorded.stretch(log, first, done - 1)
    costs = recorded.costs(log, config, measured)
    run = Simulation(setting_of(config), costs, recorded.work(log), seed=seed).run()
    predicted = forecast(run, first=first, last=done - 1, sync_seconds=costs.sync_seconds).figures
    real = recorded.figures(log, wanted)
    errors = {
        name: error(name, getattr(real, name), getattr(predicted, name)) for name in Figures.__struct_fields__[1:]
    }
    return Comparison(log.meta.run, (2, until), (first, done - 1), real, predicted, errors, costs)


def error(name: str, real: float, predicted: float) -> float:
    """The difference as a part of the recorded figure. A share is a part of the time already: its difference counts as it is
    where that is less than three times (0.02 against 0.03 is an error of 0.03, three times the difference, not of 0.5)."""
    difference = abs(predicted - real)
    if name in SHARES:
        return min(difference / real if real > 0 else 3 * difference, 3 * difference)
    least = LEAST_LAG if name.startswith("lag") else 1e-9
    return difference / max(abs(real), least)


def check(run: str, *, part: float, limit: float, seed: int, json_path: Path | None, console: Console) -> int:
    """Prints the comparison; 0 when every judged figure is within `limit`, else 1."""
    with open_run(run) as log:
        found = compare(log, part=part, seed=seed)
    console.print(table(found))
    console.print(
        f"from the run: the time of each part in steps {found.calibrated[0]} to {found.calibrated[1]}, every response's length and "
        "verdict; simulated: all of the above"
    )
    if json_path is not None:
        json_path.write_text(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n", encoding="utf-8")
    within = found.worst <= limit
    console.print(f"{found.run}: the largest error of {', '.join(JUDGED)} is {found.worst:.1%}, the limit {limit:.0%}")
    return 0 if within else 1


def table(found: Comparison) -> Table:
    """A line a figure."""
    shown = Table(title=f"{found.run}: steps {found.compared[0]} to {found.compared[1]}, recorded and predicted")
    for column in ("figure", "recorded", "predicted", "error"):
        shown.add_column(column, justify="left" if column == "figure" else "right")
    for name, mistake in found.errors.items():
        form = ".1%" if name in SHARES else ",.4g"
        real, predicted = (format(getattr(figures, name), form) for figures in (found.recorded, found.predicted))
        shown.add_row(
            name.replace("_", " "), real, predicted, f"{mistake:.1%}" + ("" if name in JUDGED else " (not judged)")
        )
    return shown
