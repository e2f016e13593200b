"""Where a run's keys are, and who reads which: a config has the folder's path, never a key."""

from __future__ import annotations

from pathlib import Path

from engine.config import Config
from protocols.link import BufferKeys, WorkerKeys
from protocols.link_keys import is_local, make_keys, read_buffer_keys, read_worker_keys
from protocols.log import Log, LogError

FOLDER = "keys"
"""In a run's folder: the keys that `launch` makes by itself."""


def keys_folder(config: Config) -> Path | None:
    """The folder that the config names, else the run's own where there is one; None: this run has no keys."""
    if config.buffer.keys is not None:
        return Path(config.buffer.keys)
    own = config.run_dir / FOLDER
    return own if own.exists() else None


def buffer_keys(config: Config) -> BufferKeys | None:
    """Raises `KeysError` where there should be keys and none can be used."""
    folder = keys_folder(config)
    return None if folder is None else read_buffer_keys(folder)


def worker_keys(config: Config, role: str) -> WorkerKeys | None:
    """As `buffer_keys`, of a role."""
    folder = keys_folder(config)
    return None if folder is None else read_worker_keys(folder, role)


def observer_keys(run_dir: Path) -> WorkerKeys | None:
    """For who looks at a run by its folder alone; the log says which keys the run was started with."""
    folder: Path | str = run_dir / FOLDER
    if not (run_dir / FOLDER).exists():
        try:
            with Log.open(run_dir / "rollouts.db") as log:
                folder = log.meta.config["buffer"].get("keys") or ""
        except LogError:
            folder = ""
    return read_worker_keys(folder, "observer") if folder else None


def provide_keys(config: Config, address: str) -> Path | None:
    """Makes keys in the run's folder if a buffer at `address` needs some and has none; the folder of those made now."""
    if keys_folder(config) is not None or is_local(address):
        return None
    make_keys(config.run_dir / FOLDER)
    return config.run_dir / FOLDER
