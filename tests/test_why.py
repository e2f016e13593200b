"""`headrace status RUN --why` names what holds a run up: eight faults of real processes, each by its name and by who owes it.

What is done, and what must be said, is `tools/why`'s; the decision from a status alone is in `test_why_table.py`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.faults.ended import NoSmallDisk, fill_disk
from tools.faults.standing import Standing
from tools.faults.why import ENDED, FAULTS, INJECTED, Fault, named, names

ROOT = Path(__file__).parent.parent
BY_NAME = {fault.name: fault for fault in FAULTS}


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    try:
        answer = fill_disk(tmp_path)
    except NoSmallDisk as error:
        pytest.skip(f"no small disk: {error}")
    assert names(BY_NAME["full-disk"], answer), answer


def test_data_that_are_exhausted_and_the_command_that_shows_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.faults.why", "data", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("named after "), done.stdout
    assert done.stdout.endswith("owed by: whoever launched it\n1 of 1 causes named\n"), done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    """A pipeline that works: buffer, learner, generator and reward, each a process of its own."""
    with Standing(tmp_path_factory.mktemp("why")) as run:
        run.until_it_goes_on()
        yield run


@pytest.mark.timeout(400)  # the first of them starts the pipeline
@pytest.mark.parametrize("fault", [BY_NAME[name] for name in INJECTED], ids=lambda fault: fault.name)
def test_a_fault_of_a_pipeline_that_runs(fault: Fault, run: Standing) -> None:
    answer = named(fault, run)
    assert names(fault, answer), answer


def test_every_fault_is_made_in_one_way() -> None:
    assert list(BY_NAME) == [*INJECTED, *ENDED]
