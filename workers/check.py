"""`headrace check`: the effective run (`workers.effective`), and what is wrong with it."""

from __future__ import annotations

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.config import Config, ConfigError, PathModel, PpoObjective
from workers import contradictions, remarks
from workers.contradictions_backend import missing_backend
from workers.contradictions_critic import missing_critic
from workers.effective import effective, size_text
from workers.memory import memory
from workers.model_shape import model_shape
from workers.roles import visible_gpus


def check(config: Config, console: Console | None = None) -> int:
    """Prints the effective run, notes and contradictions; 0 when it can run, 2 when not."""
    console = console or Console(highlight=False, soft_wrap=True)
    wrong = problems(config)
    if not wrong:
        for section in effective(config):
            table = Table.grid(padding=(0, 2))
            table.add_column(style="bold", min_width=18)
            for name, value in section.lines:
                table.add_row(f"  {name}", Text(value))
            console.print(Text(section.title, style="bold cyan"))
            console.print(table)
        for note in notes(config):
            console.print(Text(f"note: {note}"))
    for problem in wrong:
        console.print(Text(f"error: {problem}", style="red"))
    console.print(
        Text(f"{config.source}: " + (f"{len(wrong)} contradiction" + "s" * (len(wrong) > 1) if wrong else "can run"))
    )
    return 2 if wrong else 0


def problems(config: Config) -> list[str]:
    """Contradictions: with any of them the run is refused."""
    return contradictions.errors(config)


def notes(config: Config) -> list[str]:
    """What is allowed and perhaps not meant, and what this machine lacks."""
    found = remarks.notes(config)
    if (absent := missing_backend(config)) is not None:
        found.append(f"{absent}; the run would be refused")
    if config.reads_pages:
        return found
    missing = contradictions.missing_model(config)
    if missing is not None:
        found.append(f"{missing}; here its memory and context cannot be checked, and the run would be refused")
    if (lost := missing_critic(config)) is not None:
        found.append(f"{lost}; the run would be refused")
    if missing is None and not visible_gpus():
        total = sum(role.processes * role.bytes for role in memory(config, model_shape(config)))
        here = psutil.virtual_memory().total
        if total > here:
            found.append(f"all roles together may take {size_text(total)}, this machine has {size_text(here)}")
    return found


def refuse(config: Config) -> None:
    """Raises `ConfigError` with every contradiction, and for a model that is not there; otherwise does nothing."""
    found = problems(config)
    if isinstance(config.model, PathModel) and not config.cold_start:
        found += filter(None, [contradictions.missing_model(config)])
    if isinstance(config.objective, PpoObjective):
        found += filter(None, [missing_critic(config)])
    found += filter(None, [missing_backend(config)])
    if found:
        raise ConfigError("\n".join(f"{config.source}: {problem}" for problem in found))
