"""A run's log, opened to write: a new one, or that of the run that goes on. No torch here."""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.config import Config, ConfigError, dump_config
from engine.start_folder import policy_folder
from protocols.log import Log
from workers.continuity import same_run
from workers.provenance import code_version
from workers.start import critic_of, start_of


def open_log(config: Config, *, resume: bool) -> Log:
    """With `resume` the log that is there, where there is one. Raises `ConfigError` for an old run that is not to be resumed or
    was made with other prompts, `LogError` for a log that cannot be used."""
    path = config.run_dir / "rollouts.db"
    if resume and path.exists():
        return _continued(path, config)
    if path.exists():
        raise ConfigError(f"{path}: exists already; continue it with --resume or choose another name")
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return Log.create(
        path,
        run=config.name,
        config=dump_config(config),
        code_version=code_version(),
        start=start_of(policy_folder(config)),
        critic=critic_of(config),
    )


def _continued(path: Path, config: Config) -> Log:
    """The log of a run that goes on, with the config that it goes on with."""
    now = msgspec.json.decode(msgspec.json.encode(dump_config(config)))
    log = Log.open(path, write=True)
    try:
        same_run(log.meta.config, now)
        log.set_config(now)
    except BaseException:
        log.close()
        raise
    return log
