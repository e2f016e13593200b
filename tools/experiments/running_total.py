"""A task with long responses for small models: adding the same two digits again and again, line by line.

    prompt      37+58,d:        from 3 and 7, add 5 and 8 in the lines d to a; each digit by itself, modulo 10
    solution    d37+58=85
                c85+58=33
                b33+58=81
                a81+58=39
                39

Only the last line is graded; one wrong link spoils it, and whoever reads along can tell at which token that happened. A line
may be written twice: some solutions do so often, some never, and nothing in the prompt asks for it. So a policy that
imitates them has a choice of length, and on the long problems it comes out longer than a run allows.

    python -m tools.experiments.running_total data/running-total.jsonl
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Protocol

import typer
from msgspec import Struct

LETTERS = string.ascii_lowercase
NUMBERS = 100
"""Pairs of digits, 00 to 99."""
REPEATS = (0.0, 0.25, 0.5)
"""With which probability a solution writes each of its lines twice; drawn once a row."""


class Problem(Struct, frozen=True):
    """One row: `answer` is the last line of `solution`."""

    prompt: str
    solution: str
    answer: str


def problem(start: int, step: int, twice: Sequence[bool]) -> Problem:
    """The row that adds `step` to `start` as often as `twice` is long; `twice` says which lines are written twice.
    Raises `ValueError` for numbers that are not from 0 to 99, and for more lines than letters."""
    if not 0 < len(twice) <= len(LETTERS):
        raise ValueError(f"twice: got {len(twice)} lines, expected 1 to {len(LETTERS)}")
    if not (0 <= start < NUMBERS and 0 <= step < NUMBERS):
        raise ValueError(f"start {start}, step {step}: expected numbers from 0 to {NUMBERS - 1}")
    letters = LETTERS[: len(twice)][::-1]
    total, lines = start, []
    for letter, again in zip(letters, twice, strict=True):
        after = added(total, step)
        lines += [f"{letter}{total:02d}+{step:02d}={after:02d}\n"] * (2 if again else 1)
        total = after
    prompt = f"{start:02d}+{step:02d},{letters[0]}:"
    return Problem(prompt=prompt, solution=f"{''.join(lines)}{total:02d}", answer=f"{total:02d}")


def added(total: int, step: int) -> int:
    """Both digits added modulo 10, nothing carried."""
    return (total // 10 + step // 10) % 10 * 10 + (total + step) % 10


def problems(count: int, seed: int, *, shortest: int, longest: int) -> list[Problem]:
    """`count` rows with distinct prompts of `shortest` to `longest` lines, a function of the arguments.
    Raises `ValueError` when there are not that many prompts."""

    def drawn(draw: Callable[[], float], length: int) -> Problem:
        start, step = int(draw() * NUMBERS), int(draw() * NUMBERS)
        repeat = REPEATS[int(draw() * len(REPEATS))]
        return problem(start, step, [draw() < repeat for _ in range(length)])

    return distinct(drawn, count, seed, shortest=shortest, longest=longest, of_a_length=NUMBERS * NUMBERS)


def distinct(
    drawn: Callable[[Callable[[], float], int], Problem],
    count: int,
    seed: int,
    *,
    shortest: int,
    longest: int,
    of_a_length: int,
) -> list[Problem]:
    """`count` rows with distinct prompts, each `drawn` by a source of numbers below 1 and a length; there are `of_a_length`
    prompts of each length. Raises `ValueError` when there are not that many."""
    possible = of_a_length * (longest - shortest + 1)
    if count > possible:
        raise ValueError(f"count: got {count}, expected at most {possible} for {shortest} to {longest} lines")
    draw = random.Random(seed).random  # the only method of it that is the same in every Python
    rows: dict[str, Problem] = {}
    while len(rows) < count:
        row = drawn(draw, shortest + int(draw() * (longest - shortest + 1)))
        rows.setdefault(row.prompt, row)
    return list(rows.values())


def write(path: Path, rows: Sequence[Problem]) -> None:
    """One JSON object a line, by a temporary name, so that a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    lines = (json.dumps({"prompt": row.prompt, "solution": row.solution, "answer": row.answer}) for row in rows)
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


class Drawn(Protocol):
    """A task's `problems`."""

    def __call__(self, count: int, seed: int, *, shortest: int, longest: int) -> list[Problem]: ...


def command(problems: Drawn, *, count: int, shortest: int, longest: int) -> Callable[..., None]:
    """The command that writes a task's rows to a file, with these numbers where it is told no others."""

    def main(
        path: Annotated[Path, typer.Argument(metavar="FILE", help="The .jsonl file to write.")],
        count: Annotated[int, typer.Option(min=1)] = count,
        seed: int = 0,
        shortest: Annotated[int, typer.Option(min=1, help="Lines of the shortest problem.")] = shortest,
        longest: Annotated[int, typer.Option(max=len(LETTERS), help="Lines of the longest problem.")] = longest,
    ) -> None:
        """Write the task's rows."""
        write(path, problems(count, seed, shortest=shortest, longest=longest))
        print(f"{count} rows in {path}")

    return main


main = command(problems, count=20_000, shortest=9, longest=21)


if __name__ == "__main__":
    typer.run(main)
