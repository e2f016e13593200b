"""`headrace plan CONFIG`: what a run of a config would come to, and how to share GPUs between learner and generators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from engine.config import Config, ConfigError, apply_override, load_config
from workers.inspect import open_run
from workers.model_shape import ModelShape, model_shape, read_shape
from workers.plan import recorded
from workers.plan.costs import Costs, Lognormal, Recorded, Work
from workers.plan.figures import Forecast
from workers.plan.hardware import MODELS, Assumptions, gpu_costs, least_learner, machines, tensor_parallel
from workers.plan.split import Option, options, planned, reason, simulate

FIRST_STEPS = 2
"""Of a run that costs are taken from: its first step is not like the others."""


class Request(Struct, frozen=True):
    """The command line. `costs` and `lengths` are KEY=VALUE."""

    config: str
    overrides: list[str]
    gpus: str | None
    model: str | None
    run: str | None
    costs: list[str]
    lengths: list[str]
    learner: int | None
    steps: int | None
    seed: int
    json_path: Path | None


def plan(request: Request, console: Console) -> int:
    """Prints the forecast, and with `gpus` the splits. Raises `ConfigError`."""
    config = load_config(request.config, request.overrides)
    if config.generator is None or not config.samples:
        raise ConfigError(
            f"{config.source}: no generator samples for training in such a run, so there is nothing to plan"
        )
    try:
        if request.gpus is not None:
            found = _splits(request, config)
        elif request.run is not None:
            found = [_as_recorded(request, config)]
        else:
            raise ConfigError("plan: expected --gpus 64xh100, or --from RUN whose measured costs are taken, or both")
    except ValueError as error:
        raise ConfigError(f"plan: {error}") from error
    console.print(splits_table(found) if request.gpus else forecast_table(found[0].forecast))
    if request.gpus:
        console.print(forecast_table(found[0].forecast))
        console.print(f"proposed: {reason(found[0], found[1:])}", soft_wrap=True)
    console.print(_source(request), soft_wrap=True)
    if request.json_path is not None:
        text = msgspec.json.format(msgspec.json.encode(found)).decode()
        request.json_path.write_text(text + "\n", encoding="utf-8")
    return 0


def _splits(request: Request, config: Config) -> list[Option]:
    pool, setting = machines(request.gpus or ""), planned(config, request.steps)
    work = _work(request, config)
    if request.run is not None and pool.kind is None:
        measured = _measured(request)
        ranks = _ranks(request.run)

        def from_run(learner: int) -> Costs:
            token = measured.learner.token_seconds * ranks / learner
            fixed = measured.learner.fixed_seconds
            own = msgspec.structs.replace(measured.learner, token_seconds=token, fixed_seconds=fixed)
            count = pool.count - learner
            return msgspec.structs.replace(measured, generators=_fleet(measured, count), learner=own)

        learners = [request.learner] if request.learner else list(range(1, pool.count))
        return options(from_run, learners, setting, work, seed=request.seed)
    shape, gpu, given = _shape(request, config), pool.gpu, _assumptions(request)
    each, least = tensor_parallel(shape, gpu), least_learner(shape, gpu)
    learners = [request.learner] if request.learner else [n for n in range(least, pool.count) if pool.count - n >= each]
    learners = [n for n in learners if 0 < n <= pool.count - each and (request.learner or (pool.count - n) % each == 0)]

    def on_gpus(learner: int) -> Costs:
        return gpu_costs(shape, gpu, learner=learner, total=pool.count, config=config, work=work, given=given)

    return options(on_gpus, learners, setting, work, seed=request.seed)


def _as_recorded(request: Request, config: Config) -> Option:
    """The config's own counts, with a run's costs."""
    costs, setting, work = _measured(request), planned(config, request.steps), _work(request, config)
    count = config.generator.count if config.generator else 1
    costs = msgspec.structs.replace(costs, generators=_fleet(costs, count))
    return Option(0, count, 0, 0.0, 0.0, simulate(costs, setting, work, seed=request.seed))


def _fleet(measured: Costs, count: int) -> list[Any]:
    """As many generators, those of the run in turn."""
    return [measured.generators[i % len(measured.generators)] for i in range(count)]


# --- where things come from ----------------------------------------------------------------------------------------------


def _measured(request: Request) -> Costs:
    with open_run(request.run or "") as log:
        done = log.last_step()
        return recorded.costs(log, recorded.config_of(log), recorded.stretch(log, FIRST_STEPS, done - 1))


def _ranks(run: str) -> int:
    with open_run(run) as log:
        return recorded.config_of(log).learner.ranks


def _work(request: Request, config: Config) -> Work:
    """A run's groups, drawn by chance; or lengths by two numbers, which without `--lengths` are a guess from the longest."""
    if request.run is not None and not request.lengths:
        with open_run(request.run) as log:
            return Recorded(recorded.work(log).groups)
    longest = config.generator.sampling.max_tokens if config.generator else 1
    data: dict[str, Any] = {
        "median": max(1.0, longest / 8),
        "longest": longest,
        "prompt": config.buffer.prompt_tokens // 4,
    }
    data["keep"] = 0.5 if config.buffer.dynamic_sampling else 1.0
    return _given(data, request.lengths, Lognormal, "--lengths")


def _assumptions(request: Request) -> Assumptions:
    return _given({}, request.costs, Assumptions, "--cost")


def _given(data: dict[str, Any], texts: list[str], kind: type[Any], option: str) -> Any:
    for text in texts:
        apply_override(data, text)
    if unknown := data.keys() - set(kind.__struct_fields__):
        raise ConfigError(f"{option}: got {sorted(unknown)}, expected of {', '.join(kind.__struct_fields__)}")
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{option}: {error}") from error


def _shape(request: Request, config: Config) -> ModelShape:
    """A known size, a model's folder, or the config's own model."""
    if request.model is None:
        return model_shape(config)
    if request.model.lower() in MODELS:
        return MODELS[request.model.lower()]
    if not Path(request.model).is_dir():
        raise ConfigError(f"--model {request.model}: expected one of {', '.join(MODELS)}, or a model's folder")
    return read_shape(Path(request.model))


def _source(request: Request) -> str:
    if request.run is not None and (request.gpus is None or request.gpus.strip().isdigit()):
        return f"costs: measured in {request.run}; scaled by the counts alone"
    given = ", ".join(f"{name} {value:g}" for name, value in msgspec.to_builtins(_assumptions(request)).items())
    lengths = f"of {request.run}" if request.run and not request.lengths else "lognormal"
    return f"costs: formulas, not measured; assumed {given} (--cost KEY=VALUE); lengths: {lengths}"


# --- tables --------------------------------------------------------------------------------------------------------------


def splits_table(found: list[Option]) -> Table:
    """A line a split, the proposed one first."""
    table = Table(title="splits (GPUs); generate and train: each side alone; step: simulated")
    for column in ("learner", "generators", "generate", "train", "step", "learner idle", "gen. idle", "lag"):
        table.add_column(column, justify="right")
    for option in found:
        figures = option.forecast.figures
        table.add_row(
            str(option.learner), f"{option.generators} x {option.gpus_each}",
            f"{option.generate_seconds:,.4g} s", f"{option.train_seconds:,.4g} s", f"{figures.step_seconds:,.4g} s",
            f"{figures.learner_idle:.1%}", f"{figures.generator_idle:.1%}", f"{figures.lag_mean:.2f}",
        )  # fmt: skip
    return table


def forecast_table(found: Forecast) -> Table:
    """A line a figure."""
    figures, load = found.figures, found.load
    table = Table(title=f"predicted, the mean of {figures.steps} simulated steps", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("a step", f"{figures.step_seconds:.4g} s"),
        ("generated", f"{figures.tokens_per_second:,.0f} tokens/s"),
        ("learner idle", f"{figures.learner_idle:.1%}"),
        ("generators idle (no live sequence)", f"{figures.generator_idle:.1%}"),
        ("generators' slots filled", f"{found.slots_filled:.1%}"),
        ("lag: mean, p99, greatest", f"{figures.lag_mean:.2f}, {figures.lag_p99:.0f}, {figures.lag_max:.0f} versions"),
        ("weights on their way", f"{found.sync_seconds:.3g} s"),
        ("groups kept", f"{found.keep:.1%}"),
        ("buffer", f"{load.messages:,.0f} messages/s, {load.megabytes:,.2f} MB/s, {load.core:.1%} of a core"),
    ):
        table.add_row(name, value)
    return table
