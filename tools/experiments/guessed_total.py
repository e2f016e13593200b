"""A running total by a solver who guesses at times: long responses whose mistakes even a small critic can see.

    prompt      32+12,t:        from 3 and 2, add 1 and 2 in the lines t to a; each digit by itself, modulo 5
    solution    t32+12=44
                s44+12?20       a guess: two digits drawn at random
                r20+12=32
                ...
                a01+12=13
                13

Only the last line is graded, and a guess nearly always spoils it. Guesses are made in the first lines alone, 100 tokens or
more before the reward; a policy that imitates such solutions has to learn from that reward to stop guessing. A wrong line of
`running_total` is worse for this comparison: to see one a critic of this size would have to learn the sums once more, from one bit
a response, and in thousands of responses it did not.

    python -m tools.experiments.guessed_total data/guessed-total.jsonl
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import typer

from tools.experiments.running_total import LETTERS, Problem, write

MODULUS = 5
EARLY = 8
"""Guesses are made in so many first lines."""
GUESS = 0.12
"""With this probability such a line is a guess."""

Digits = tuple[int, int]


def problem(start: Digits, step: Digits, guesses: list[Digits | None]) -> Problem:
    """The row with a line for each of `guesses`: the digits that are guessed there, or None where the line is computed.
    `answer` is that of the computation without any guess."""
    if not 0 < len(guesses) <= len(LETTERS):
        raise ValueError(f"guesses: got {len(guesses)} lines, expected 1 to {len(LETTERS)}")
    total = right = start
    lines = []
    for letter, guess in zip(reversed(LETTERS[: len(guesses)]), guesses, strict=True):
        right = added(right, step)
        after = added(total, step) if guess is None else guess
        lines.append(f"{letter}{text(total)}+{text(step)}{'=' if guess is None else '?'}{text(after)}\n")
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
    possible = MODULUS**4 * (longest - shortest + 1)
    if count > possible:
        raise ValueError(f"count: got {count}, expected at most {possible} for {shortest} to {longest} lines")
    draw = random.Random(seed).random  # the only method of it that is the same in every Python
    rows: dict[str, Problem] = {}
    while len(rows) < count:
        length = shortest + int(draw() * (longest - shortest + 1))
        start, step, *drawn = ((int(draw() * MODULUS), int(draw() * MODULUS)) for _ in range(length + 2))
        guesses = [digits if line < EARLY and draw() < GUESS else None for line, digits in enumerate(drawn)]
        row = problem(start, step, guesses)
        rows.setdefault(row.prompt, row)
    return list(rows.values())


def main(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The .jsonl file to write.")],
    count: Annotated[int, typer.Option(min=1)] = 5000,
    seed: int = 0,
    shortest: Annotated[int, typer.Option(min=1, help="Lines of the shortest problem.")] = 13,
    longest: Annotated[int, typer.Option(max=len(LETTERS), help="Lines of the longest problem.")] = 21,
) -> None:
    """Write the task's rows."""
    write(path, problems(count, seed, shortest=shortest, longest=longest))
    print(f"{count} rows in {path}")


if __name__ == "__main__":
    typer.run(main)
