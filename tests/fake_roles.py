"""Stands in for `headrace ROLE CONFIG ...` in tests of the launcher: the same command line, address file, link, metrics
and exit codes, no model. What each start of a role does is a list in HEADRACE_FAKE, JSON by role name; the last entry
holds from then on:

    run     works until the buffer's goodbye or SIGTERM       crash   says boom, exit code 1
    refuse  one line on stderr, exit code 2                   leave   exit code 0 at once
    deaf    works on after goodbye and SIGTERM                parent  runs a deaf child in a session of its own

The buffer commits a step every 0.1 s from the time that every worker of `expect` has joined, and is done at the last.
Every start is a line in RUN_DIR/starts.jsonl.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from engine.config import Config, load_config
from protocols.link import Client, Joined, Received, Server
from protocols.link_messages import Goodbye, Hello, Status, StatusRequest
from workers.metrics import MetricsWriter, read_metrics

KEYS = ("--join", "--name", "--address", "--set")


def main() -> None:
    role, path, *rest = sys.argv[1:]
    options = {key: rest[i + 1] for i, key in enumerate(rest) if key in KEYS}
    overrides = [rest[i + 1] for i, key in enumerate(rest) if key == "--set"]
    config = load_config(path, overrides)
    name = options.get("--name", role)
    starts = config.run_dir / "starts.jsonl"
    nth = sum(json.loads(line)["name"] == name for line in starts.read_text().splitlines()) if starts.exists() else 0
    env = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
    with starts.open("a") as file:
        file.write(json.dumps({"name": name, "pid": os.getpid(), "arguments": rest, "env": env}) + "\n")
    fake = json.loads(os.environ.get("HEADRACE_FAKE", "{}"))
    script = fake.get(name, ["run"])
    act(script[min(nth, len(script) - 1)], role, name, config, options, fake)


def act(what: str, role: str, name: str, config: Config, options: dict[str, str], fake: dict) -> None:
    match what:
        case "crash":
            print("boom", file=sys.stderr)
            sys.exit(1)
        case "refuse":
            print(f"headrace: {name} cannot work like this", file=sys.stderr)
            sys.exit(2)
        case "leave":
            sys.exit(0)
        case "parent":
            child = subprocess.Popen([sys.executable, "-c", DEAF], start_new_session=True)
            (config.run_dir / "child.pid").write_text(str(child.pid))
    match role:
        case "model":
            (config.run_dir / "model").mkdir()
            (config.run_dir / "model" / "config.json").write_text("{}")
        case "buffer":
            buffer(config, options, fake)
        case _:
            worker(role, name, options["--join"], deaf=what == "deaf")
            if role == "learner":
                (config.run_dir / "checkpoints" / f"step-{config.steps:06d}").mkdir(parents=True, exist_ok=True)


DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def buffer(config: Config, options: dict[str, str], fake: dict) -> None:
    (config.run_dir / "rollouts.db").touch()
    server = Server(options.get("--address", config.buffer.address), heartbeat_s=0.2, peer_timeout_s=5.0)
    metrics = MetricsWriter(config.run_dir)
    (config.run_dir / "address").write_text(server.address)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    expect, joined = set(fake.get("expect", ["learner"])), {}
    step = len(read_metrics(config.run_dir).steps)
    while step < config.steps:
        for event in server.poll(0.1):
            match event:
                case Joined(worker, hello):
                    joined[worker] = hello.role
                case Received(worker, _, StatusRequest()):
                    server.send(worker, status(config, step, joined))
        if expect <= set(joined):
            step += 1
            metrics.step(step, {"accuracy": step / config.steps})
    for worker in joined:
        server.send(worker, Goodbye("complete"))
    time.sleep(0.3)
    server.close()


def status(config: Config, step: int, joined: dict[str, str]) -> Status:
    workers = [{"name": name, "role": role, "state": "fakes", "since": 0.0} for name, role in joined.items()]
    return Status(
        run=config.name, step=step, steps=config.steps, done=False, ledger={}, workers=workers, metrics={}, evals=[]
    )


def worker(role: str, name: str, join: str, *, deaf: bool) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else lambda *_: sys.exit(143))
    hello = Hello(role=role, name=name, host=socket.gethostname(), pid=os.getpid())  # type: ignore[arg-type]
    client = Client(join, hello, timeout_s=10.0)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if isinstance(client.receive(0.2), Goodbye) and not deaf:
            break
    client.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
