"""Named tensors of which the ranks may hold parts: they are made whole one after another, never all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gathered:
    """`like` has the tensors' names, shapes and types, perhaps without their data. `items()` yields (name, tensor) in the
    same order; a tensor is good until the next one is asked for. With `parts`, ranks hold parts of them, and all ranks
    must go through `items()` at the same time, to its end."""

    like: Mapping[str, Tensor]
    items: Callable[[], Iterable[tuple[str, Tensor]]]
    parts: bool = False

    def take_part(self) -> None:
        """On a rank that has no use for the tensors, while another one goes through them."""
        if self.parts:
            for _ in self.items():
                pass


def held(tensors: Mapping[str, Tensor]) -> Gathered:
    """Tensors that are whole on every rank."""
    return Gathered(tensors, tensors.items)
