"""A running total by a solver who guesses at times: long responses whose mistakes even a small critic can see.

    prompt      32+12,t:        from 3 and 2, add 1 and 2 in the lines t to a; each digit by itself, modulo 5
    solution    t32+12=44g
                s44+12?22h      a guess: two digits drawn at random
                r22+12=34e
                ...
                a10+12=22d
                22

Only the last line is graded, and a guess nearly always spoils it. Guesses are made in the first two lines alone, 110 tokens or
more before the reward; a policy that imitates such solutions has to learn from that reward to stop guessing. The letter at
a line's end is free: a choice like most in a text, without consequences, and noise to whoever shares the reward out.

A wrong line of `running_total` is no use for a comparison of critics: to see one, a critic of this size would have to learn the
sums once more, from one bit a response, and in thousands of responses it did not.

    python -m tools.experiments.guessed_total data/guessed-total.jsonl
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import typer
from msgspec import Struct

from tools.experiments.running_total import LETTERS, Problem, command, distinct

MODULUS = 5
EARLY = 2
"""Guesses are made in so many first lines."""
GUESS = 0.35
"""With this probability such a line is a guess."""
FREE = LETTERS[:8]
"""What a line may end with; it means nothing."""

Digits = tuple[int, int]


class Line(Struct, frozen=True):
    """What a solver does in a line: `guess` is what is guessed there, None where the line is computed; `free` its last letter."""

    guess: Digits | None
    free: str


def problem(start: Digits, step: Digits, plan: Sequence[Line]) -> Problem:
    """The row with a line for each of `plan`. `answer` is that of the computation without any guess."""
    if not 0 < len(plan) <= len(LETTERS):
        raise ValueError(f"plan: got {len(plan)} lines, expected 1 to {len(LETTERS)}")
    total = right = start
    lines = []
    for letter, line in zip(reversed(LETTERS[: len(plan)]), plan, strict=True):
        right = added(right, step)
        after = added(total, step) if line.guess is None else line.guess
        lines.append(
            f"{letter}{text(total)}+{text(step)}{'=' if line.guess is None else '?'}{text(after)}{line.free}\n"
        )
        total = after
    prompt = f"{text(start)}+{text(step)},{lines[0][0]}:"
    return Problem(prompt=prompt, solution=f"{''.join(lines)}{text(total)}", answer=text(right))


def added(total: Digits, step: Digits) -> Digits:
    """Each digit by itself, modulo `MODULUS`."""
    return (total[0] + step[0]) % MODULUS, (total[1] + step[1]) % MODULUS


def text(digits: Digits) -> str:
    return f"{digits[0]}{digits[1]}"


def problems(count: int, seed: int, *, shortest: int, longest: int) -> list[Problem]:
    """`count` rows with distinct prompts of `shortest` to `longest` lines, a function of the arguments.
    Raises `ValueError` when there are not that many prompts."""

    def drawn(draw: Callable[[], float], length: int) -> Problem:
        start, step = _digits(draw), _digits(draw)
        return problem(start, step, [_line(draw, early=line < EARLY) for line in range(length)])

    return distinct(drawn, count, seed, shortest=shortest, longest=longest, of_a_length=MODULUS**4)


def _line(draw: Callable[[], float], *, early: bool) -> Line:
    guess = _digits(draw) if early and draw() < GUESS else None
    return Line(guess, FREE[int(draw() * len(FREE))])


def _digits(draw: Callable[[], float]) -> Digits:
    return int(draw() * MODULUS), int(draw() * MODULUS)


main = command(problems, count=5000, shortest=13, longest=21)


if __name__ == "__main__":
    typer.run(main)
