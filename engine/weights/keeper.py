"""The end of the learner's other ranks: each keeps a share of every version aside, so that no rank holds all weights twice.

The first rank's `Publisher` decides who is served when; a keeper does as it says, in a thread of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
from collections.abc import Mapping

import msgspec
from torch import Tensor

from engine.gathered import Gathered, held
from engine.weights import control
from engine.weights.gate import Entrance
from engine.weights.layout import share_out
from engine.weights.messages import TO_KEEPER, Kept, Moved, Renew, Send, Sent, Stop
from engine.weights.share import Share
from engine.weights.terms import Terms
from engine.weights.transport import Connect, TransportError, connect
from protocols.closable import Closable

log = logging.getLogger(__name__)

TELL_S = 1.0
"""Between two words that bytes move."""
PUBLISH_S = 3600.0
"""How long the first rank may take until it publishes: it commits before, and may have a checkpoint to write. That it is gone
shows at once."""


class Keeper(Closable):
    """Keeps share `rank` of each version, on that rank."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        rank: int,
        terms: Terms,
        token: str = "",
        publish_s: float = PUBLISH_S,
        connect: Connect = connect,
    ) -> None:
        """Of the publisher at `host:port`, which has the same `terms`. Raises `ConnectionError` when it does not answer within
        their `peer_timeout_s`."""
        self._rank, self._ranks, self._timeout_s = rank, terms.ranks, terms.peer_timeout_s
        self._publish_s = publish_s
        self._entrance = Entrance(host, port, token, timeout_s=self._timeout_s, given_up=threading.Event())
        self._store = self._entrance.store
        self._waker = self._store.clone()
        self._store.set_timeout(control.FOREVER)
        self._share = Share(rank, self._store, connect, address=control.local_address(host, port), terms=terms)
        self._renewed = -1
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="weights-keeper", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread in native code while the interpreter ends would abort the process

    @property
    def nbytes(self) -> int:
        """What lies aside on this rank, in bytes."""
        with self._changed:
            return self._share.nbytes

    def keep(
        self,
        version: int,
        tensors: Mapping[str, Tensor] | Gathered,
        *,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        """Copy this rank's share of `tensors` aside, while the first rank publishes the same ones as `version`, and return. Waits
        for a broadcast that is under way. Raises `TimeoutError` when the first rank does not publish, `ConnectionError` when it
        is gone."""
        gathered = tensors if isinstance(tensors, Gathered) else held(tensors)
        shares = share_out(gathered.like, self._ranks)
        if self._rank >= len(shares):  # fewer tensors than ranks
            gathered.take_part()
            return
        staged = self._share.staging.plan(version, shares[self._rank], fingerprints)
        with self._changed:
            self._wait_for_turn(version)
            self._share.staged = self._share.staging.copy(staged, gathered.items())
            self._changed.notify_all()

    def close(self) -> None:
        """Send nothing any more. Waits for a broadcast under way, up to its timeout."""
        atexit.unregister(self.close)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # torch's error of a lost store, which the thread has too
                control.send(self._waker, control.share_queue(self._rank), Stop())
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            log.error("weights: the keeper's thread still waits for a transport; left behind")
        self._entrance.close()

    def _wait_for_turn(self, version: int) -> None:
        deadline = time.monotonic() + self._publish_s
        while self._renewed != version:
            if not self._thread.is_alive():
                raise ConnectionError(f"weights: learner rank {self._rank}: the first rank's store is lost")
            if (left := deadline - time.monotonic()) <= 0:
                what = f"for the first rank to publish version {version}"
                raise TimeoutError(f"weights: learner rank {self._rank} waited {self._publish_s} s {what}")
            self._changed.wait(min(left, 1.0))

    # --- the background thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        queue = control.share_queue(self._rank)
        try:
            while not self._closing:
                match control.receive(self._store, queue, TO_KEEPER):
                    case Renew(version):
                        self._renew(version)
                    case Send() as order:
                        self._send(order)
        except (RuntimeError, msgspec.DecodeError) as error:  # torch's errors of a lost store; a foreign message
            if not self._closing:
                log.info("weights: learner rank %d: %s", self._rank, str(error).partition("\n")[0])
        finally:
            self._share.close()
            with self._changed:
                self._changed.notify_all()

    def _renew(self, version: int) -> None:
        """Wait until the version lies aside, find what changed, and say so."""
        with self._changed:
            self._renewed = version
            self._changed.notify_all()
            while (staged := self._share.staged) is None or staged.version != version:
                if self._closing:
                    return
                self._changed.wait(1.0)
        staged.make_patch()
        kept = Kept(self._rank, version, self._share.card)
        if (patch := staged.patch) is not None:
            kept = Kept(self._rank, version, self._share.card, patch.layout, patch.changed, patch.entries)
        self._say(kept)

    def _send(self, order: Send) -> None:
        told = time.monotonic()

        def moved() -> None:
            nonlocal told
            if (now := time.monotonic()) - told > TELL_S:
                told = now
                self._say(Moved(self._rank))

        try:
            sent = Sent(self._rank, order.number, self._share.send(order, moved))
        except TransportError as error:
            sent = Sent(self._rank, order.number, error=str(error))
        self._say(sent)

    def _say(self, message: Kept | Moved | Sent) -> None:
        control.send(self._store, control.KEEPERS, message)
