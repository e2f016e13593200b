"""The command line. Each command imports what it needs, so that `headrace --help` is quick and the buffer's process
never loads torch. Its exit codes: `workers.exit_codes`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from engine.config import Config, ConfigError, load_config
from workers import cli_cluster, cli_critic, cli_log, cli_plan, cli_utel
from workers.exit_codes import exit_code_of
from workers.tether import die_with_parent

app = typer.Typer(
    name="headrace",
    help="Asynchronous RL post-training for language models. The log is the run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. learner.lr=1e-5.")
]
Join = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="The buffer, tcp://HOST:PORT; read from the run here if left out.")
]
Name = Annotated[str | None, typer.Option(help="This worker's name, unique in the run.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or its name under runs/.")]


@app.command()
def launch(
    config: ConfigPath,
    set: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that is there.")] = False,
    view: Annotated[bool, typer.Option("--view/--no-view", help="A live view, where there is a terminal.")] = True,
    on: Annotated[
        str, typer.Option(metavar="PLACE", help="here, slurm, ray, or allocation: the Slurm job this is in.")
    ] = "here",
) -> None:
    """Start every role of a run as a process of its own, watch over them, and print the closing table."""
    from workers.launch_on import launch_on
    from workers.report import report

    code = launch_on(on, str(config), set or [], resume=resume, live=view)
    if code == 0 and on != "slurm":  # the job has printed it
        report(load_config(config, set).run_dir, Console())
    raise typer.Exit(code)


@app.command()
def buffer(
    config: ConfigPath,
    set: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the log.")] = False,
    address: Annotated[str | None, typer.Option(help="Listen here instead of the config's address.")] = None,
) -> None:
    """Serve a run: the log, the ledger, and the address that every worker joins."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Some data sets of reasoning-gym iterate over sets of strings; a run continued must draw the same rows.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONHASHSEED": "0"})
    from workers.buffer import run

    raise typer.Exit(run(load_config(config, set), resume=resume, address=address))


@app.command()
def generator(config: ConfigPath, join: Join = None, name: Name = None, set: Overrides = None) -> None:
    """Sample responses for a run, from now until it ends or SIGTERM."""
    loaded = load_config(config, set)
    address = join or _address(loaded)
    from workers.generator import run

    raise typer.Exit(run(loaded, address, name))


@app.command()
def reward(config: ConfigPath, join: Join = None, name: Name = None, set: Overrides = None) -> None:
    """Score responses for a run, in processes that may be killed."""
    loaded = load_config(config, set)
    address = join or _address(loaded)
    from workers.reward import run

    raise typer.Exit(run(loaded, address, name))


@app.command()
def learner(config: ConfigPath, join: Join = None, set: Overrides = None) -> None:
    """Train on a run's groups; several ranks under torchrun."""
    if os.environ.get("HEADRACE_TETHERED") and "RANK" in os.environ:
        # torchrun starts its ranks in sessions of their own: one that is killed would leave them behind.
        die_with_parent(os.getppid(), signal.SIGKILL)
    loaded = load_config(config, set)
    address = join or _address(loaded)
    from workers.learner import run

    raise typer.Exit(run(loaded, address))


@app.command()
def model(config: ConfigPath, set: Overrides = None) -> None:
    """Make the folder of a config's new model (launch does this by itself)."""
    from engine.config import NewModel, UtelModel

    loaded = load_config(config, set)
    if isinstance(loaded.model, UtelModel):
        from engine.utel.start import create_utel

        create_utel(loaded, loaded.run_dir / "model")
    elif isinstance(loaded.model, NewModel):
        from engine.models import create_model

        create_model(loaded.model, loaded.run_dir / "model", loaded.seed)
    else:
        raise ConfigError(f'{config}: model.type: got "path", expected "new" or "utel"')


@app.command()
def keygen(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the keys.")]) -> None:
    """Make a run's keys: DIR/ROLE.key is all that a machine of that role needs; set buffer.keys = "DIR"."""
    from protocols.link_keys import make_keys

    for path in make_keys(folder):
        print(path)


@app.command()
def check(config: ConfigPath, set: Overrides = None) -> None:
    """Print the effective run in one unit system; refuse contradictions by name."""
    from workers.check import check

    raise typer.Exit(check(load_config(config, set)))


@app.command()
def show(
    run: Run,
    group: Annotated[int | None, typer.Option(help="What happened to this group.")] = None,
    step: Annotated[int | None, typer.Option(help="What happened in this step.")] = None,
) -> None:
    """Print a run's summary, or what happened to a group or a step."""
    from workers.inspect import show

    show(_run_dir(run), group=group, step=step)


@app.command()
def export(run: Run, out: Annotated[Path, typer.Argument(metavar="FILE", help=".parquet or .jsonl")]) -> None:
    """Write one row a rollout."""
    from workers.inspect import export

    rows = export(_run_dir(run), out)
    print(f"{rows} rows in {out}")


@app.command()
def status(
    run: Run, why: Annotated[bool, typer.Option("--why", help="Only what the run waits for, and who owes it.")] = False
) -> None:
    """How a run stands: who waits for what while it goes on, else what its log has."""
    from protocols.link import LinkTimeout
    from workers.view import ask_status, render

    folder = _run_dir(run)
    address = folder / "address"
    try:
        found = ask_status(folder) if address.exists() else None
    except LinkTimeout:
        found = None
    if why:
        from workers.why import cause, standstill

        named = cause(found, time.time()) if found else standstill(folder)
        print(f"{named.text}\nowed by: {named.owes}")
        return
    Console().print(render(found, {}, None, time.time()) if found else _standing(folder), soft_wrap=found is None)


@app.command()
def scale(
    run: Run,
    counts: Annotated[list[str], typer.Argument(metavar="ROLE=N", help="generator=4, reward=3, or both.")],
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds until all must have joined or left.")] = 300.0,
) -> None:
    """Change how many generators or reward workers a running launch keeps, and wait until they have joined or left."""
    from workers.scale import parse_counts, scale

    scale(_run_dir(run), parse_counts(counts), wait_s=wait, say=lambda text: print(text, flush=True))


@app.command()
def audit(run: Run) -> None:
    """Check a run's log against what it promises: one line a check, and every violation by name."""
    from workers.audit import print_audit

    raise typer.Exit(print_audit(run))


@app.command()
def report(run: Run) -> None:
    """Print a run's closing table and draw its curves."""
    from workers.report import report

    report(_run_dir(run), Console())


for command in (*cli_log.COMMANDS, *cli_critic.COMMANDS, *cli_plan.COMMANDS, *cli_utel.COMMANDS, *cli_cluster.COMMANDS):
    app.command()(command)


def _standing(run_dir: Path) -> str:
    """What is known of a run whose buffer does not answer on this machine."""
    from protocols.log import Log
    from workers.lines import eval_line, step_line
    from workers.metrics import read_metrics

    with Log.open(run_dir / "rollouts.db") as log:
        done, steps = log.last_step(), int(log.meta.config["steps"])
    history = read_metrics(run_dir)
    state = "complete" if done >= steps else "not complete; `headrace launch CONFIG --resume` continues it"
    lines = [f"{run_dir}: {done} of {steps} steps, {state}; no buffer answers here"]
    lines += [step_line(row, steps, history.steps) for row in history.steps[-1:]]
    lines += [eval_line(row) for row in history.evals[-1:]]
    return "\n".join(lines)


def _run_dir(run: str) -> Path:
    found = Path(run) if Path(run).is_dir() else Path("runs") / run
    if not found.is_dir():
        raise ConfigError(f"{run}: no such run, neither as a directory nor under runs/")
    return found


def _address(config: Config) -> str:
    path = config.run_dir / "address"
    if not path.exists():
        raise ConfigError(
            f"{path}: not there; is the buffer running here? Otherwise name it with --join tcp://HOST:PORT"
        )
    return path.read_text(encoding="utf-8").strip()


def main() -> None:
    """The console script. Known errors are one line on stderr; HEADRACE_TRACEBACK=1 shows where they came from."""
    code = _run()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a log file on a full disk takes nothing more
            stream.flush()
    # Not sys.exit: native threads of a process group that broke may abort in the interpreter's teardown, and would turn
    # the code that says what happened into that of a crash.
    os._exit(code)


def _run() -> int:
    """The command's exit code."""
    try:
        app()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return exit_code_of(error)
    return 0


if __name__ == "__main__":
    main()
