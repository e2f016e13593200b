"""A generator that joins holds nothing back: no prompt and no ticket before it has weights, which it then serves at once."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_elastic import CLI, ROOT, configure, query, until

from engine.config import load_config
from engine.models import load_model, named_weights
from engine.start_folder import policy_folder
from engine.weights import Publisher, Terms
from protocols.link import Client
from protocols.link_messages import Announce, Hello, Status
from workers.view import ask_status


@contextmanager
def role(path: Path, name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    with (path.parent / f"{name}.out").open("wb") as out:
        process = subprocess.Popen([*CLI, name, str(path), *options], cwd=ROOT, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30.0)


def worker(status: Status, name: str) -> dict[str, Any]:
    return next((w for w in status.workers if w["name"] == name), {})


@pytest.mark.timeout(240)
def test_no_ticket_goes_to_a_joiner_without_weights(tmp_path: Path) -> None:
    path = configure(tmp_path, steps=3)
    config = load_config(path)
    subprocess.run([*CLI, "model", str(path)], cwd=ROOT, check=True, timeout=120)
    with ExitStack() as parts:
        parts.enter_context(role(path, "buffer"))
        until("the buffer's address", (config.run_dir / "address").exists)
        address = (config.run_dir / "address").read_text(encoding="utf-8").strip()
        parts.enter_context(role(path, "generator", "--join", address, "--name", "joiner"))

        def said(state: str) -> bool:
            return bool(worker(ask_status(config.run_dir), "joiner").get("state") == state)

        until("the joiner, without weights", lambda: said("waits for a learner"))
        time.sleep(1.0)  # three heartbeats, fifty turns of the buffer
        status = ask_status(config.run_dir)
        assert worker(status, "joiner")["version"] is None
        assert worker(status, "joiner")["held"] == []
        assert status.ledger["in_system"] == 0
        assert query(config.run_dir, "SELECT * FROM groups") == []

        hello = Hello(role="learner", name="learner-0", host="here", pid=os.getpid())
        learner = parts.enter_context(closing(Client(address, hello, timeout_s=30.0)))
        publisher = parts.enter_context(Publisher("127.0.0.1", Terms(bucket_bytes=1 << 20, peer_timeout_s=20.0)))
        model = load_model(policy_folder(config), dtype="float32", device="cpu")
        publisher.publish(0, {name: tensor.detach() for name, tensor in named_weights(model).items()})
        learner.send(Announce(*publisher.address))
        until("its first responses", lambda: query(config.run_dir, "SELECT 1 FROM rollouts WHERE worker = 'joiner'"))
        assert worker(ask_status(config.run_dir), "joiner")["version"] == 0
