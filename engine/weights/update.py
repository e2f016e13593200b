"""Where a subscriber keeps what it received: two flat buffers, of which its owner holds at most one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor


class Update:
    """Verified weights of one version. Copy what you need, then `release()`; the tensors are overwritten after it."""

    def __init__(
        self, version: int, tensors: dict[str, Tensor], *, hash: str, flat: Tensor, release: Callable[[Update], None]
    ) -> None:
        self.version = version
        self.tensors = tensors
        self.hash = hash
        """`weights_hash` of the tensors."""
        self.flat = flat
        self._release = release

    def release(self) -> None:
        """Give the buffer back. Copies on a GPU that were only started are waited for. Harmless when repeated."""
        if self.flat.is_cuda:
            torch.cuda.current_stream(self.flat.device).synchronize()
        self.tensors = {}
        self._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Shelf:
    """Two buffers: one may be out with the owner, the other holds the newest update or receives the next one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []
        self._ready: Update | None = None
        self._out: Update | None = None
        self._taken_version: int | None = None
        self._newest: tuple[int, Tensor] | None = None
        """The newest verified version whose bytes are still there, and the buffer that has them."""
        self.changed = threading.Condition()

    @property
    def version(self) -> int | None:
        """The newest version that the owner has taken or can take now."""
        with self.changed:
            return self._ready.version if self._ready is not None else self._taken_version

    def claim(self, nbytes: int) -> Tensor:
        """A buffer to receive into: uint8 [nbytes]. An update that waits in it unseen is withdrawn."""
        with self.changed:
            buffer = self._claim(nbytes)
            if self._newest is not None and not self._kept_beside(buffer, self._newest[1]):
                self._newest = None
            return buffer

    def holds(self, version: int) -> bool:
        """Whether the bytes of `version` are there to be changed into those of a later one."""
        with self.changed:
            return self._newest is not None and self._newest[0] == version

    def claim_filled(self, version: int) -> Tensor | None:
        """A buffer to change in place, with the bytes of `version` in it; None when it is not held. It is the one that held
        them, from which an update that waits there unseen is withdrawn, or a copy where its owner still has that one."""
        with self.changed:
            if self._newest is None or self._newest[0] != version:
                return None
            source = self._newest[1]
            if self._out is not None and self._out.flat is source:
                return self._claim(source.numel()).copy_(source)
            if self._ready is not None and self._ready.flat is source:
                self._ready = None
            self._newest = None
            return source

    def _kept_beside(self, claimed: Tensor, buffer: Tensor) -> bool:
        return claimed is not buffer and any(buffer is other for other in self._buffers)

    def _claim(self, nbytes: int) -> Tensor:
        with self.changed:
            newest = None if self._newest is None else self._newest[1]
            busy = [update.flat for update in (self._out, self._ready) if update is not None]
            free = [buffer for buffer in self._buffers if not any(buffer is other for other in busy)]
            free.sort(key=lambda buffer: buffer is newest)
            if not free and len(self._buffers) == 2 and self._ready is not None:
                free, self._ready = [self._ready.flat], None
            for buffer in free:
                if buffer.numel() == nbytes:
                    return buffer
            kept = [buffer for buffer in self._buffers if not any(buffer is other for other in free[:1])]
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            self._buffers = [*kept, buffer]
            return buffer

    def put(self, version: int, tensors: dict[str, Tensor], *, hash: str, flat: Tensor) -> None:
        """Offer verified tensors, views of `flat`, to the owner, in place of any that it has not taken."""
        with self.changed:
            self._ready = Update(version, tensors, hash=hash, flat=flat, release=self._put_back)
            self._newest = (version, flat)
            self.changed.notify_all()

    def take(self) -> Update | None:
        """The newest update, if there is one that was not taken. Raises `RuntimeError` while another is out."""
        with self.changed:
            if self._ready is None:
                return None
            if self._out is not None:
                raise RuntimeError(
                    f"weights: version {self._out.version} is still held; release it before taking {self._ready.version}"
                )
            self._out, self._ready = self._ready, None
            self._taken_version = self._out.version
            return self._out

    def _put_back(self, update: Update) -> None:
        with self.changed:
            if self._out is update:
                self._out = None
