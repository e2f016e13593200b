"""Which models a run started from, so that a later replay starts from the same ones or says which is gone. No torch here."""

from __future__ import annotations

from pathlib import Path

import xxhash

from engine.config import Config
from protocols.log import Start

BLOCKS, BLOCK_BYTES = 16, 1 << 16
"""Of each file this much is digested, evenly spread: training changes every weight, and a large model costs no time."""


def start_of(folder: Path) -> Start | None:
    """The folder with the digest of its weights; None where it has none."""
    digest = weights_digest(folder)
    return Start(str(folder.resolve()), digest) if digest is not None else None


def critic_of(config: Config) -> Start | None:
    """The same of the critic in `critic.path`; None where a run has none, or a fresh one."""
    path = config.critic.path if config.critic is not None else None
    return start_of(Path(path)) if path is not None else None


def weights_digest(folder: Path) -> str | None:
    """xxh3-128 of sizes and blocks of a Hugging Face folder's weight files, in the order of their names; None without any."""
    state = xxhash.xxh3_128()
    files = sorted(folder.glob("model*.safetensors"))
    for path in files:
        size = path.stat().st_size
        state.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for block in range(BLOCKS):
                file.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1))
                state.update(file.read(BLOCK_BYTES))
    return state.hexdigest() if files else None
