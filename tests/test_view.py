"""The view shows what the buffer says, and can neither hold up nor end a run."""

from __future__ import annotations

import io
import os
import pty
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from protocols.link import Joined, Received, Server
from protocols.link_messages import Status, StatusRequest
from workers.lines import duration, eta_s, figure_lines, step_line, waiting_line
from workers.metrics import MetricsWriter
from workers.view import View, render

STATUS = Status(
    run="trial", step=12, steps=50, done=False,
    ledger={"ready": 3, "undecided": 7, "keep_rate": 0.55, "total_dropped": 24, "total_dropped_tokens": 12_300},
    workers=[
        {"name": "learner-0", "role": "learner", "state": "waits for the groups of step 13", "since": 900.0, "version": 12},
        {"name": "generator-0", "role": "generator", "state": "decodes", "since": 990.0, "version": 11},
    ],
    metrics={"accuracy": 0.431, "lag_mean": 0.8, "lag_max": 1.0, "masked_fraction": 0.01, "train_s": 3.1, "wait_s": 0.2},
    evals=[{"eval_step": 0, "accuracy": 0.25}, {"eval_step": 10, "accuracy": 0.402}],
)  # fmt: skip


class Answering:
    """A buffer's end of the link that answers every status request with STATUS."""

    def __init__(self) -> None:
        self.server = Server("tcp://127.0.0.1:0", heartbeat_s=0.2, peer_timeout_s=5.0)
        self.observers: list[str] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while not self.over.is_set():
            for event in self.server.poll(0.05):
                match event:
                    case Joined(worker, hello):
                        self.observers.append(f"{hello.role} {worker}")
                    case Received(worker, _, StatusRequest()):
                        self.server.send(worker, STATUS)

    def close(self) -> None:
        self.over.set()
        self.thread.join()
        self.server.close()


@pytest.fixture
def buffer() -> Iterator[Answering]:
    answering = Answering()
    yield answering
    answering.close()


def test_the_live_table_shows_the_run_and_who_waits_for_what() -> None:
    out = io.StringIO()
    Console(file=out, width=140).print(render(STATUS, {"generator-0": 1234.0}, 95.0, 1000.0))
    for expected in (
        "trial · step 12 of 50 · about 1:35 left", "train 0.431 · held-out 0.250 (step 0) → 0.402 (step 10)",
        "keep rate 0.55 · 24 dropped (12,300 tokens)", "mean 0.80 · max 1 versions · masked 1.00%",
        "train 3.1 s · wait 0.2 s", "waits for the groups of step 13", "1:40", "1,234",
    ):  # fmt: skip
        assert expected in out.getvalue()


def test_rounds_that_bring_nothing_are_said() -> None:
    fruitless = Status("t", 1, 2, False, {"fruitless": 40}, [], {}, [])
    assert ("", "the last 40 groups were all right or all wrong; sampling goes on") in figure_lines(fruitless, {})


def test_a_step_as_a_line() -> None:
    history = [{"step": step, "time": 100.0 + 2 * step} for step in range(1, 6)]
    row = {"step": 5, "time": 110.0, "accuracy": 0.5, "lag_mean": 0.25, "train_s": 1.5, "entropy": None}
    assert step_line(row, 20, history) == "step 5/20  accuracy 0.500  lag 0.25  train 1.5 s  eta 0:30"


def test_a_line_for_a_run_that_does_not_move() -> None:
    line = waiting_line(STATUS, {}, 1000.0)
    assert line.startswith("after step 12/50: accuracy train 0.431")
    assert line.endswith("workers: learner-0 waits for the groups of step 13 (1:40), generator-0 decodes (0:10)")


def test_times_for_people() -> None:
    assert [duration(s) for s in (0, 7.4, 750, 11_100)] == ["0:00", "0:07", "12:30", "3:05:00"]
    assert eta_s([1.0], 5) is None
    assert eta_s([0.0, 2.0, 3.0, 30.0], 2) == 4.0


def test_plain_lines_come_once_each_and_only_new_ones(tmp_path: Path, buffer: Answering) -> None:
    writer = MetricsWriter(tmp_path)
    writer.step(1, {"accuracy": 0.1})
    out = io.StringIO()
    view = View(tmp_path, buffer.server.address, steps=3, live=True, console=Console(file=out))
    view.start()
    writer.step(2, {"accuracy": 0.2})
    writer.evaluation(2, {"accuracy": 0.3, "prompts": 4.0, "samples": 8.0})
    view.say("generator-0 ended")
    time.sleep(0.7)
    writer.step(3, {"accuracy": 0.4})
    writer.close()
    view.close()
    lines = out.getvalue().splitlines()
    lines.remove("generator-0 ended")
    assert [line.split("  ")[0] for line in lines] == [
        "step 2/3", "held-out after step 2: accuracy 0.300 (4 prompts, 8 samples)", "step 3/3",
    ]  # fmt: skip
    assert len(buffer.observers) == 1
    assert buffer.observers[0].startswith("observer view-")


def read_all(terminal: int, timeout_s: float) -> str:
    found = b""
    while select.select([terminal], [], [], timeout_s)[0]:
        try:
            found += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    return found.decode(errors="replace")


def test_on_a_terminal_the_table_is_drawn_in_place(tmp_path: Path, buffer: Answering) -> None:
    terminal, end = pty.openpty()
    with os.fdopen(end, "w") as file:
        console = Console(file=file, force_terminal=True, width=120, height=40)
        view = View(tmp_path, buffer.server.address, steps=50, live=True, console=console)
        view.start()
        time.sleep(0.8)
        view.close()
        shown = read_all(terminal, 0.1)
    os.close(terminal)
    assert "step 12 of 50" in shown
    assert "waits for the groups of step 13" in shown


def test_a_terminal_that_takes_nothing_holds_up_nobody(tmp_path: Path, buffer: Answering) -> None:
    terminal, end = pty.openpty()  # nobody reads: writing blocks once its few kilobytes are full, as after Ctrl-S
    with os.fdopen(end, "w") as file:
        console = Console(file=file, force_terminal=True, width=200, height=50)
        view = View(tmp_path, buffer.server.address, steps=50, live=True, console=console)
        view.start()
        for number in range(200):
            view.say(f"line {number} " + "x" * 100)
        time.sleep(0.8)
        began = time.monotonic()
        view.say("one more")
        view.close(timeout_s=0.5)
        assert time.monotonic() - began < 2.0
        read_all(terminal, 0.5)  # lets the thread go on to its end
    os.close(terminal)


def test_a_buffer_that_is_gone_does_not_end_the_view(tmp_path: Path) -> None:
    out = io.StringIO()
    view = View(tmp_path, "tcp://127.0.0.1:9", steps=3, live=False, console=Console(file=out))
    view.start()
    writer = MetricsWriter(tmp_path)
    writer.step(1, {})
    writer.close()
    view.close()
    assert out.getvalue() == "step 1/3\n"


def test_an_error_in_the_view_is_said_and_goes_no_further(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    view = View(tmp_path, "tcp://127.0.0.1:9", steps=3, live=False, console=Console(file=io.StringIO()))
    view.start()
    view.close()
    assert "the view ended, the run goes on" in capfd.readouterr().err
