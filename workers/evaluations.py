"""A run's evaluations: after which steps there is one, which groups it waits for, and what each came to. No torch here."""

from __future__ import annotations

from collections.abc import Iterable

from engine.config import Config


def evaluation_steps(config: Config) -> list[int]:
    """After how many steps the weights are evaluated: before the first, every `eval.every`, and after the last; sorted."""
    every = config.eval.every
    return sorted({0, config.steps} | (set(range(0, config.steps, every)) if every else set()))


class Evaluations:
    """`figures` are those of the evaluations that are complete, each with its `eval_step`."""

    def __init__(self, config: Config, *, held_out: bool) -> None:
        """`held_out`: whether there are prompts to evaluate with."""
        self.figures: list[dict[str, float]] = []
        self._steps = evaluation_steps(config) if held_out else []
        self._waiting: dict[int, set[int]] = {}

    def due(self, committed: int) -> list[int]:
        """Steps whose weights are to be evaluated now, after so many steps, and are not yet."""
        done = {int(figures["eval_step"]) for figures in self.figures}
        # A resumed run may have passed several; only the newest of those still measures the weights it names.
        passed = [step for step in self._steps if step <= committed and step not in done]
        return [step for step in passed[-1:] if step not in self._waiting]

    def complete(self, committed: int) -> bool:
        """Whether none is under way or due."""
        return not self._waiting and not self.due(committed)

    def begin(self, step: int, groups: Iterable[int]) -> None:
        """The evaluation after `step` steps waits for these groups too."""
        self._waiting.setdefault(step, set()).update(groups)

    def graded(self, step: int, group: int) -> None:
        """One of its groups has all its grades."""
        self._waiting[step].discard(group)

    def take_graded(self) -> list[int]:
        """Those that wait for no group any more; nothing here remembers them then but their figures."""
        graded = [step for step, groups in self._waiting.items() if not groups]
        for step in graded:
            del self._waiting[step]
        return graded
