"""What a person sees while a run goes on: a live table on a terminal, one readable line a step elsewhere.

It runs in a thread of its own and only ever asks: nothing of the run waits for it, and an error in it ends the view
and nothing else. All of its output leaves from that thread, so a terminal that is held (Ctrl-S) holds nothing else.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from protocols.link import Client, LinkError
from protocols.link_messages import Hello, Status, StatusRequest
from workers.keys import observer_keys
from workers.lines import duration, eta_s, eval_line, figure_lines, step_line, waiting_line
from workers.metrics import FILE, read_metrics

REFRESH_S = 0.5
ASK_TIMEOUT_S = 2.0
QUIET_S = 30.0
"""Without a new step for this long, the plain log says what everybody waits for."""


class View:
    """Shows a run until it is closed: `live` draws a table in place where there is a terminal, otherwise lines are
    printed."""

    def __init__(self, run_dir: Path, address: str, *, steps: int, live: bool, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._over = threading.Event()
        self._feed = Feed(address, self._over, run_dir)
        self._screen: Screen = (
            LiveScreen(self._console)
            if live and self._console.is_terminal
            else PlainScreen(self._console, run_dir, steps)
        )
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="view", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def say(self, text: str) -> None:
        """Shows a line of the launcher's; never waits."""
        self._said.put(text)

    def buffer_left(self) -> None:
        """Nobody is there to ask any more."""
        self._over.set()

    def close(self, timeout_s: float = 5.0) -> None:
        """Shows what there is and ends; waits at most `timeout_s` for a terminal that takes nothing."""
        self._over.set()
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            with self._screen:
                self._turn()
                while not self._closing.wait(REFRESH_S):
                    self._turn()
                self._turn()
        except Exception as error:  # the edge of this thread: a broken terminal must not reach the run
            print(f"headrace: the view ended, the run goes on: {error!r}", file=sys.stderr, flush=True)
        finally:
            self._feed.close()

    def _turn(self) -> None:
        while not self._said.empty():
            self._console.print(Text(self._said.get()), soft_wrap=True)
        self._screen.show(self._feed.latest(), self._feed.rates)


class Screen(Protocol):
    def __enter__(self) -> Screen: ...
    def __exit__(self, *error: object) -> None: ...
    def show(self, status: Status | None, rates: Mapping[str, float]) -> None: ...


class Feed:
    """The buffer's Status, asked for over the link as an observer, and rates from one to the next. Stops asking when
    `over` is set."""

    def __init__(self, address: str, over: threading.Event, run_dir: Path) -> None:
        self._address, self._over, self._run_dir = address, over, run_dir
        self._client: Client | None = None
        self._samples: dict[str, deque[tuple[float, float]]] = {}
        self.status: Status | None = None
        self.rates: dict[str, float] = {}

    def latest(self) -> Status | None:
        """The newest status; the last known one while the buffer does not answer; None before the first."""
        try:
            status = None if self._over.is_set() else self._ask()
        except (LinkError, OSError):
            self.close()
            return self.status
        if status is not None:
            self.status = status
            self._measure(status)
        return self.status

    def _ask(self) -> Status | None:
        if self._client is None:
            self._client = Client(self._address, _hello(), timeout_s=ASK_TIMEOUT_S, keys=observer_keys(self._run_dir))
        self._client.send(StatusRequest())
        deadline = time.monotonic() + ASK_TIMEOUT_S
        while time.monotonic() < deadline and not self._over.is_set():
            answer = self._client.receive(0.1)
            if isinstance(answer, Status):
                return answer
        if not self._over.is_set():
            self.close()
        return None

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None

    def _measure(self, status: Status) -> None:
        """Tokens per second of each generator, over the last 20 statuses."""
        now = time.monotonic()
        for worker in status.workers:
            tokens = worker.get("counters", {}).get("generated_tokens")
            if worker.get("role") == "generator" and tokens is not None:
                seen = self._samples.setdefault(worker["name"], deque(maxlen=20))
                if seen and tokens < seen[-1][1]:  # it started anew
                    seen.clear()
                seen.append((now, tokens))
                span = seen[-1][0] - seen[0][0]
                self.rates[worker["name"]] = (seen[-1][1] - seen[0][1]) / span if span > 0 else 0.0


def ask_status(run_dir: Path) -> Status:
    """The status of the run in this folder, once. Raises `LinkError` when its buffer does not answer, `OSError` when it
    has published no address."""
    address = (run_dir / "address").read_text(encoding="utf-8").strip()
    client = Client(address, _hello(), timeout_s=ASK_TIMEOUT_S, keys=observer_keys(run_dir))
    try:
        return client.ask(StatusRequest(), Status, ASK_TIMEOUT_S)
    finally:
        client.close()


def _hello() -> Hello:
    host = socket.gethostname()
    return Hello(
        role="observer", name=f"view-{host[:40]}-{os.getpid()}-{time.time_ns() % 10**9}", host=host, pid=os.getpid()
    )


# --- the live table --------------------------------------------------------------------------------------------------


class LiveScreen:
    """Redraws in place; lines that are printed meanwhile stay above."""

    def __init__(self, console: Console) -> None:
        # Nothing is redirected: what others print must not have to wait for this thread.
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._ends: deque[tuple[int, float]] = deque(maxlen=11)

    def __enter__(self) -> LiveScreen:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, status: Status | None, rates: Mapping[str, float]) -> None:
        if status is None:
            return
        if not self._ends or self._ends[-1][0] != status.step:
            self._ends.append((status.step, time.monotonic()))
        ends = [end for _, end in self._ends]
        self._live.update(render(status, rates, eta_s(ends, status.steps - status.step), time.time()), refresh=True)


def render(status: Status, rates: Mapping[str, float], eta: float | None, now: float) -> RenderableType:
    """The live view of one status. `now` in Unix seconds, `rates` in tokens per second by generator."""
    figures = Table.grid(padding=(0, 2))
    for label, text in figure_lines(status, rates):
        figures.add_row(Text(label, style="bold"), Text(text))
    workers = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("worker", "does", "for", "weights", "tokens/s"):
        workers.add_column(column, justify="left" if column in ("worker", "does") else "right")
    for worker in sorted(status.workers, key=lambda w: (str(w.get("role")), str(w.get("name")))):
        name = str(worker.get("name"))
        since = float(worker.get("since") or 0.0)
        workers.add_row(
            Text(name),
            Text(str(worker.get("state", ""))),
            duration(now - since) if since else "",
            "" if (version := worker.get("version")) is None else str(version),
            f"{rates[name]:,.0f}" if name in rates else "",
        )
    left = "done" if status.done else f"about {duration(eta)} left" if eta is not None else ""
    title = f" {status.run} · step {status.step} of {status.steps} {'· ' + left if left else ''} "
    return Panel(Group(figures, Text(), workers), title=Text(title), title_align="left")


# --- the plain log ---------------------------------------------------------------------------------------------------


class PlainScreen:
    """One line for each step and evaluation, and one now and then when nothing moves."""

    def __init__(self, console: Console, run_dir: Path, steps: int) -> None:
        self._console, self._run_dir, self._of = console, run_dir, steps
        self._since, self._shown = time.time(), 0
        self._size = -1
        self._moved = time.monotonic()

    def __enter__(self) -> PlainScreen:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def show(self, status: Status | None, rates: Mapping[str, float]) -> None:
        path = self._run_dir / FILE
        size = path.stat().st_size if path.exists() else 0
        if size != self._size:
            self._show_new()
            self._size, self._moved = size, time.monotonic()
        elif status and not status.done and time.monotonic() - self._moved > QUIET_S:
            self._print(waiting_line(status, rates, time.time()))
            self._moved = time.monotonic()

    def _show_new(self) -> None:
        history = read_metrics(self._run_dir)
        # What a run that goes on had before is not shown again.
        rows = [row for row in history.evals + history.steps if float(row["time"]) >= self._since]
        rows.sort(key=lambda row: float(row["time"]))
        for row in rows[self._shown :]:
            self._print(eval_line(row) if "eval_step" in row else step_line(row, self._of, history.steps))
        self._shown = len(rows)

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)
