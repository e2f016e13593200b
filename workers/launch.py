"""`headrace launch`: whether a run can start, its cold start first, and then the run itself (`workers.launch_run`)."""

from __future__ import annotations

from engine.config import load_config
from workers.check import refuse
from workers.last_words import out_of_space
from workers.launch_errors import command_again, no_room
from workers.launch_run import Launch
from workers.restarts import Patience
from workers.roles import ROLE_COMMAND
from workers.run_folder import complete, log_path, own, refuse_taken, trained
from workers.site import HERE, Site


def launch(
    path: str,
    overrides: list[str],
    *,
    resume: bool = False,
    live: bool = True,
    command: tuple[str, ...] = ROLE_COMMAND,
    patience: Patience | None = None,
    site: Site = HERE,
) -> int:
    """Runs a config to its end, at a site; 0 when the run is complete, 130 after Ctrl-C (143 after SIGTERM, 129 after
    SIGHUP).

    Runs the config's cold start first where that is not done. Raises `ConfigError` for a config that cannot run or a
    run directory that is in use, `LaunchError` when a role cannot be kept alive.
    """
    config = load_config(path, overrides)
    refuse(config)
    refuse_taken(config, resume=resume)
    if config.cold_start and not trained(first := load_config(config.cold_start)):
        print(f"headrace: cold start first: {config.cold_start}", flush=True)
        code = launch(
            config.cold_start,
            [],
            resume=log_path(first).exists(),
            live=live,
            command=command,
            patience=patience,
            site=site,
        )
        if code != 0:
            return code
    if resume and complete(config):
        print(f"headrace: {config.run_dir} is complete: {config.steps} of {config.steps} steps", flush=True)
        return 0
    if resume and not log_path(config).exists():
        print(f"headrace: {config.run_dir} holds no run yet; it starts from the beginning", flush=True)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with (config.run_dir / "launch.lock").open("a+") as lock:
            own(lock, config.run_dir)
            run = Launch(
                config, path, overrides, command=command, patience=patience or Patience(), live=live, site=site
            )
            return run.run()
    except OSError as error:
        if not out_of_space(error):
            raise
        raise no_room(error, config.run_dir, command_again(path, overrides, site.option)) from error
