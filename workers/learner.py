"""The learner: one process per rank. Ask for a step's plan, pull this rank's share, train, commit, publish.

The log is the authority: a learner that starts anew loads its newest checkpoint and re-trains what the log holds
beyond it (the same groups in the same order, to the same hash) before it trains anything new. Rank 0 talks: it
commits, says when weights are published and writes checkpoints; every rank pulls its own data and sends its share of the
weights.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from engine.config import Config, DeepSpeedBackend, LearnerConfig
from engine.devices import collective_backend, use_device
from engine.trained_model import Ranks
from engine.weights import Keeper, Publisher, Terms
from protocols import messages as m
from protocols.link import Client
from protocols.link_messages import Ack, Announce, Goodbye, Hello, Welcome
from workers.keys import keys_folder, worker_keys
from workers.trainer import Trained, Trainer

ASK_AGAIN_S = 30.0
"""What has not come is asked for again, and at once after a new welcome."""
DATA_TIMEOUT_S = 6 * 3600.0
"""A step whose groups do not become ready for this long is an error."""


PULL_TIMEOUT_S = 300.0
COMMIT_TIMEOUT_S = 60.0
GOODBYE_S = 15.0
"""For the buffer's goodbye to a rank, once the first one is gone."""
ELSEWHERE = "192.0.2.1"
"""An address that is nobody's (RFC 5737): the way to it shows which of its own this machine uses towards others."""

T = TypeVar("T", bound=m.Message)


class Over(Exception):
    """The buffer said goodbye; the run is complete or was stopped."""


class Refused(RuntimeError):
    """The buffer refused something this learner said; nothing was counted."""


def run(config: Config, join: str) -> int:
    """Trains until the last step is committed. Exit code 0 when the buffer says the run is complete or stopped."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(config.learner.threads)
    device = use_device(config.learner.device)
    if world > 1:
        # The first rank may wait for a generator that hangs, and for the buffer, while the others wait for it.
        timeout = timedelta(seconds=3 * config.learner.peer_timeout_s + COMMIT_TIMEOUT_S)
        dist.init_process_group(collective_backend(device), timeout=timeout)
    hello = Hello(role="learner", name=f"learner-{rank}", host=socket.gethostname(), pid=os.getpid())
    client = Client(join, hello, timeout_s=60.0, keys=worker_keys(config, "learner"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        Learner(config, client, join, rank=rank, world=world, device=device).train()
    except Over as over:
        print(f"learner-{rank}: {over}", file=sys.stderr, flush=True)
    except SystemExit:
        client.send(Goodbye("stopped"))  # else the buffer would take its silence for a stall, and wait
        raise
    finally:
        client.close()
        if world > 1:
            dist.destroy_process_group()
    return 0


class Learner:
    """See the module's docstring; `train()` is the one finite loop of the system."""

    def __init__(self, config: Config, client: Client, address: str, *, rank: int, world: int, device: str) -> None:
        self.config, self.client, self.address, self.rank = config, client, address, rank
        self.trainer = Trainer(config, self, rank=rank, world=world, device=device)
        self.start = self.trainer.resume(client.welcome.step)
        self.publisher: Publisher | None = None
        self.keeper: Keeper | None = None
        self.token = ""
        self.published_s = 0.0
        self.over: Over | None = None
        self.announced_to: Welcome | None = None
        if config.generator is not None:
            self._share_weights(device, Ranks(rank, world))
            self._publish(self.start, None)

    def train(self) -> None:
        """Steps `start + 1` to the last, then stays until the buffer has seen the run through. Raises `Over`."""
        for step in range(self.start + 1, self.config.steps + 1):
            waited = time.monotonic()
            plan, updates = self.trainer.pull(step)
            wait_s = time.monotonic() - waited
            self.client.status(f"trains step {step}", version=step - 1)
            self._finish(self.trainer.train(plan, updates, wait_s=wait_s))
        if self.rank == 0 or self.keeper is not None:
            self.client.status("waits for the closing evaluation", version=self.config.steps, owes="buffer")
            self._wait(Goodbye, "the end of the run", DATA_TIMEOUT_S)

    # --- one step --------------------------------------------------------------------------------------------------

    def plan(self, step: int) -> m.Plan:
        """Of the trainer's feed: waits until the buffer has the step's groups."""
        self.client.status(f"waits for the groups of step {step}", version=step - 1, owes="buffer")
        what = f"the plan of step {step}"
        return self._ask(m.PlanRequest(step), m.Plan, lambda plan: plan.step == step, what, DATA_TIMEOUT_S)

    def pull(self, step: int, groups: list[int]) -> m.Batch:
        """Of the trainer's feed."""

        def asked(batch: m.Batch) -> bool:
            return batch.step == step and batch.groups.tolist() == groups

        return self._ask(m.Pull(step, groups), m.Batch, asked, f"groups of step {step}", PULL_TIMEOUT_S)

    def _finish(self, trained: Trained) -> None:
        """Commit, then publish, then checkpoint: what generators or a restart see is never ahead of the log. All ranks give
        the parts of the weights that they hold."""
        step = trained.plan.step
        last = step == self.config.steps
        if self.rank == 0:
            self._measure(trained)
        if last:  # before the commit that ends the run: a run that is complete has its last checkpoint
            self.trainer.save(trained)
        if self.rank == 0 and trained.plan.weights_hash is None:
            self.client.send(trained.commit)
            self.client.flush(COMMIT_TIMEOUT_S)
            self._hear_refusal()
        self._publish(step, trained.policy)
        if step % self.config.learner.checkpoint_every == 0 and not last:
            self.trainer.save(trained)

    def _measure(self, trained: Trained) -> None:
        """What a step's metrics say beyond its training."""
        plan, metrics = trained.plan, trained.commit.metrics
        if self.publisher is not None:
            spent = self.publisher.counters["publish_wait_s"] + self.publisher.counters["copy_s"]
            metrics["publish_s"], self.published_s = spent - self.published_s, spent
            if sends_changes(self.config.learner) and self.publisher.counters["published"] > 1:
                metrics["published_changed"] = self.publisher.counters["changed"]  # by the step before this one
        if figures := self.trainer.evaluate(plan.step):
            metrics |= figures
            print(f"learner: step {plan.step}: {_listed(figures)}", file=sys.stderr, flush=True)

    def _publish(self, step: int, fingerprints: dict[str, str] | None) -> None:
        """The weights after a step, to the generators where there are any."""
        if self.keeper is not None:
            self._keep(self.keeper, step, fingerprints)
        if self.publisher is None:
            return
        behind = sorted(name for name, version in self.publisher.members.items() if version != step - 1)
        if behind:
            what = f"waits for {', '.join(behind)} to take version {step - 1} (at most {self.config.learner.peer_timeout_s:.0f} s)"
            self.client.status(what, version=step, owes="generator")
        self.publisher.publish(step, self.trainer.learner.weights(), fingerprints=fingerprints)

    def _keep(self, keeper: Keeper, step: int, fingerprints: dict[str, str] | None) -> None:
        """The first rank may be gone when the run is over, which the buffer says to every rank: raises `Over` then."""
        try:
            keeper.keep(step, self.trainer.learner.weights(), fingerprints=fingerprints)
        except ConnectionError:
            self._poll(Goodbye, GOODBYE_S)
            raise

    def _ask(self, question: m.Message, kind: type[T], answers: Callable[[T], bool], what: str, timeout_s: float) -> T:
        """The buffer's answer to a question, asked again of every buffer: one that was started anew has forgotten who asked.
        What answers an earlier asking is passed over. Raises as `_wait` does."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            welcome = self.client.welcome
            self.client.send(question)
            again = time.monotonic() + min(left, ASK_AGAIN_S)
            while time.monotonic() < again and self.client.welcome is welcome:
                found = self._poll(kind, 1.0)
                if found is not None and answers(found):
                    return found
        raise TimeoutError(f"learner-{self.rank}: waited {timeout_s:.0f} s for {what} from {self.address}")

    def _wait(self, kind: type[T], what: str, timeout_s: float) -> T:
        """The next message of this kind. Raises `Over` at the buffer's goodbye, TimeoutError naming what it waited for."""
        found = self._poll(kind, timeout_s)
        if found is None:
            raise TimeoutError(f"learner-{self.rank}: waited {timeout_s:.0f} s for {what} from {self.address}")
        return found

    def _hear_refusal(self) -> None:
        """Raises `Refused` if the buffer refused the commit. A goodbye that is here already is kept for later: the step
        counts, so its checkpoint must still be written."""
        try:
            self._poll(m.Plan, 0.0)
        except Over as over:
            self.over = over

    def _poll(self, kind: type[T], timeout_s: float) -> T | None:
        if self.over is not None:
            raise self.over
        deadline = time.monotonic() + timeout_s
        while True:
            self._announce()
            left = max(0.0, deadline - time.monotonic())
            match self.client.receive(min(left, 1.0)):
                case None if left == 0.0:
                    return None
                case Goodbye(reason):
                    raise Over(reason)
                case Ack(refused=str(reason)):
                    raise Refused(f"learner-{self.rank}: the buffer refused: {reason}")
                case message if isinstance(message, kind):
                    return message

    # --- start -----------------------------------------------------------------------------------------------------

    def _share_weights(self, device: str, ranks: Ranks) -> None:
        """Each rank keeps a share of the weights for the generators; the first one serves them, and says where."""
        settings = self.config.learner
        terms = Terms(
            device=device,
            bucket_bytes=settings.bucket_mb << 20,
            peer_timeout_s=settings.peer_timeout_s,
            sparse=sends_changes(settings),
            in_host_memory=isinstance(settings.backend, DeepSpeedBackend),
            ranks=ranks.world,
        )
        where = ""
        if ranks.rank == 0:
            # Handed out over the authenticated link and among the ranks alone; without keys all of the run is on one machine.
            self.token = secrets.token_hex(32) if keys_folder(self.config) is not None else ""
            self.publisher = Publisher(reachable_host(self.address), terms, token=self.token)
            self._announce()
            where = " ".join([*map(str, self.publisher.address), self.token])
        host, port, token = ranks.texts(where, device)[0].split(" ")
        if ranks.rank > 0:
            self.keeper = Keeper(host, int(port), rank=ranks.rank, terms=terms, token=token)

    def _announce(self) -> None:
        """Once to every buffer: one that was started anew has forgotten where the weights are."""
        if self.publisher is not None and self.client.welcome is not self.announced_to:
            self.announced_to = self.client.welcome
            self.client.send(Announce(*self.publisher.address, self.token))


def _listed(figures: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items())


def sends_changes(config: LearnerConfig) -> bool:
    """Whether generators get what a step changed instead of all weights."""
    return config.weight_updates == "sparse" or (config.weight_updates == "auto" and config.dtype == "bfloat16")


def reachable_host(address: str) -> str:
    """The address of this machine by which the buffer's machine, and so every generator, reaches it."""
    host, port = urlsplit(address).hostname, urlsplit(address).port
    if host in ("0.0.0.0", "::"):  # every address of this machine: others need one that leads here
        host = ELSEWHERE
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing: it only makes the kernel choose the outgoing interface
        return str(probe.getsockname()[0])
