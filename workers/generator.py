"""The generator role: takes tickets from the buffer, samples responses, adopts the learner's weights between decode steps.

It keeps nothing that others need: told to leave, it hands back what is unfinished with the tokens there are, and another
generator continues them; killed, its tickets' leases end and are issued anew.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from types import FrameType

import torch

from engine.adopt_weights import WeightsRefused
from engine.config import Config, ConfigError, SglangEngine, TorchEngine, VllmEngine
from engine.devices import resolve_device
from engine.generate_engine import EngineGenerator
from engine.generate_requests import EngineLost
from engine.generate_sglang import start_sglang
from engine.generate_torch import TicketRefused, TorchGenerator
from engine.generate_vllm import start_vllm
from engine.models import load_model
from engine.start_folder import policy_folder
from engine.text import TextModel
from engine.weights import Update
from protocols.link import Client, KeysError, LinkError, LinkRefused, LinkTimeout
from protocols.link_messages import Ack, Announce, Goodbye, Hello
from protocols.messages import HandBack, Ticket
from workers.credit import capacity
from workers.keys import worker_keys
from workers.weight_feed import LearnerLost, WeightFeed

JOIN_TIMEOUT_S = 60.0
GONE_S = 300.0
"""How long a buffer that this worker has joined may be silent: time to start it anew after a crash. Decoding goes on."""

FLUSH_S = 10.0
"""After SIGTERM: how long the buffer may take to have everything that is handed back."""

IDLE_S, STATUS_S = 0.02, 0.5


def run(config: Config, join: str, name: str | None = None, *, gone_s: float = GONE_S) -> int:
    """Generates until the buffer says goodbye or SIGTERM comes: 0 then; 1 when buffer, learner or engine are gone for good
    or the weights give no numbers; 2 when the buffer refuses this worker, or config, model and tickets do not fit, so that
    starting anew cannot help."""
    # Nothing is in hand yet, and an engine ends with this process. An exception would not do: in a destructor it is ignored.
    _on_signals(lambda *_: os._exit(0))
    name = name or f"generator-{socket.gethostname()}-{os.getpid()}"[:80]
    try:
        with ExitStack() as parts:
            engine = _engine(config)
            if isinstance(engine, EngineGenerator):
                parts.callback(engine.close)
            credit = capacity(engine.config.slots)
            hello = Hello(role="generator", name=name, host=socket.gethostname(), pid=os.getpid(), capacity=credit)
            keys = worker_keys(config, "generator")
            client = parts.enter_context(closing(Client(join, hello, timeout_s=JOIN_TIMEOUT_S, keys=keys)))
            weights = parts.enter_context(closing(_feed(config, name, engine)))
            stop = threading.Event()
            _on_signals(lambda *_: stop.set())
            Generator(client, engine, weights, stop, gone_s=gone_s).serve()
    except (KeysError, LinkRefused, ConfigError, WeightsRefused, TicketRefused) as error:
        return _fail(name, error, 2)
    except (LinkError, LearnerLost, EngineLost, FloatingPointError) as error:
        return _fail(name, error, 1)
    return 0


def _engine(config: Config) -> TorchGenerator | EngineGenerator:
    """The generator without weights. Raises `ConfigError`, or `EngineLost` when the engine does not start."""
    settings = config.generator
    if settings is None:
        raise ConfigError(f"{config.source}: it has no [generator] section, so this run has no use for a generator")
    torch.set_num_threads(settings.threads)
    folder = policy_folder(config)
    match settings.engine:
        case VllmEngine() as engine:
            return start_vllm(folder, settings, engine)
        case SglangEngine() as engine:
            return start_sglang(folder, settings, engine)
        case TorchEngine() as engine:
            text = TextModel.load(folder)
            model = load_model(folder, dtype=settings.dtype, device=resolve_device(settings.device), weights=False)
            return TorchGenerator(model, config=engine, stop_ids=text.stop_ids, decode=text.decode)


def _feed(config: Config, name: str, engine: TorchGenerator | EngineGenerator) -> WeightFeed:
    """Weights come where the engine takes them from: all but our own read the host's memory."""
    timeout_s = config.learner.peer_timeout_s
    if isinstance(engine, TorchGenerator):
        return WeightFeed(name, device=str(engine.model.device), peer_timeout_s=timeout_s)

    def prepare(update: Update) -> None:
        engine.stage(update.tensors, update.version)

    return WeightFeed(name, device="cpu", peer_timeout_s=timeout_s, prepare=prepare)


class Generator:
    """The loop of a generator; one thread does everything but receiving weights."""

    def __init__(
        self,
        client: Client,
        engine: TorchGenerator | EngineGenerator,
        weights: WeightFeed,
        stop: threading.Event,
        *,
        gone_s: float,
    ) -> None:
        self.client, self.engine, self.weights, self.stop, self.gone_s = client, engine, weights, stop, gone_s
        self.over = False
        self.has_weights = False
        self.counters = {"serves": 0.0, "busy_s": 0.0, "idle_s": 0.0, "refused": 0.0}
        self.status_due = 0.0

    def serve(self) -> None:
        """Returns when the run is over or this worker was told to stop. Raises `LinkTimeout` when the buffer is gone,
        `LearnerLost` when the learner is, `EngineLost` when the engine is, and `TicketRefused` or `WeightsRefused` when
        either does not fit the model."""
        # Only at first: later announcements come as messages, and what a welcome said then may be a learner that is gone.
        self.weights.connect(self.client.welcome.weights)
        try:
            while not self.over and not self.stop.is_set():
                self._turn()
        except EngineLost:  # the tokens there are lie on this side
            self._leave("its engine is lost")
            raise
        if not self.over:
            self._leave("stopped")

    def _turn(self) -> None:
        self._adopt()
        working = self.has_weights and self.engine.ready
        self._take(0.0 if working else IDLE_S)
        if working:
            self._step()
        if isinstance(self.engine, EngineGenerator):
            self.engine.check()
        self._report()
        if self.client.silent_s > self.gone_s:
            limit, where = self.gone_s, self.client.address
            raise LinkTimeout(f"waited {limit:.0f} s for a sign of life from the buffer at {where}")

    def _adopt(self) -> None:
        """The newest weights, if there are newer ones. None were loaded before the first: the model's are not numbers."""
        update = self.weights.poll()
        if update is not None:
            with update:
                self.engine.load(update.tensors, update.version)
            if not self.has_weights:
                self.has_weights, self.counters["serves"] = True, 1.0
                self.status_due = 0.0  # no tickets come before it is said

    def _take(self, timeout_s: float) -> None:
        """Everything that has arrived; waits for the first message only."""
        began = time.perf_counter()
        while not self.over and (message := self.client.receive(timeout_s)) is not None:
            timeout_s = 0.0
            match message:
                case Ticket():
                    self._add(message)
                case Announce():
                    self.weights.connect(message)
                case Goodbye(reason):
                    print(f"generator: the buffer says goodbye: {reason}", file=sys.stderr, flush=True)
                    self.over = True
                case Ack(refused=str()):  # its lease had ended: others have the sample
                    self.counters["refused"] += 1
                case _:
                    kind = type(message).__name__
                    print(f"generator: got {kind}, expected Ticket, Announce or Goodbye; ignored", file=sys.stderr)
        self.counters["idle_s"] += time.perf_counter() - began

    def _add(self, ticket: Ticket) -> None:
        """One ticket that does not fit means that none like it does on any generator of the run: leave, and say why."""
        try:
            self.engine.add(ticket)
        except TicketRefused:
            self.client.send(HandBack(ticket.group, ticket.fence, ticket.samples, ticket.resume))
            self._leave("a ticket does not fit the model")
            raise

    def _step(self) -> None:
        began = time.perf_counter()
        for rollout in self.engine.step():
            self.client.send(rollout)
        self.counters["busy_s"] += time.perf_counter() - began

    def _report(self) -> None:
        if time.monotonic() < self.status_due:
            return
        self.status_due = time.monotonic() + STATUS_S
        state, owes = self._state()
        self.client.status(
            state,
            owes=owes,
            version=self._version,
            held=self.engine.held(),
            counters={**self.engine.counters, **self.counters, **self.weights.counters},
        )

    @property
    def _version(self) -> int | None:
        """What it serves; the buffer sends no tickets before there is something."""
        return self.engine.version if self.has_weights else None

    def _state(self) -> tuple[str, str]:
        """What it does or waits for, and the role that owes it."""
        if not self.has_weights:
            return f"waits for {self.weights.waits_for}", "learner"
        if self.engine.ready:
            return "decodes", ""
        if self.engine.held():
            return f"waits for weights newer than version {self.engine.version}", "learner"
        return "waits for tickets", "buffer"

    def _leave(self, reason: str) -> None:
        self.client.status("leaves", version=self._version, held=[])
        for handed in self.engine.hand_back():
            self.client.send(handed)
        self.client.flush(FLUSH_S)
        self.client.send(Goodbye(reason))


def _on_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _fail(name: str, error: Exception, code: int) -> int:
    print(f"{name}: {error}", file=sys.stderr, flush=True)
    return code
