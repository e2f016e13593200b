"""An SGLang server as a child process: it listens on 127.0.0.1, ends with the generator, and what it says is kept."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from engine.config import ConfigError
from engine.generate_requests import EngineLost
from engine.generate_sglang_http import Api, Refused

LEASH = Path(__file__).with_name("leash.py")
HOST = "127.0.0.1"
END_S = 10.0
READY_POLL_S = 0.25
REFUSALS = re.compile(r"^(\[rank\d+\]: )?(\w+\.)*(ValueError|NotImplementedError|KeyError): |: error: ")
"""Last words of a server that cannot run with what it was given, so that starting it anew cannot help."""
ERRORS = re.compile(r"(\[rank\d+\]: )?(\w+\.)*\w*(Error|Exception): |.*: error: ")
TAIL_BYTES = 65_536


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """The process. `said` is what it wrote since some place of its output, `mark` the place now."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        """Starts it. Raises `ConfigError` when there is no such program."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), *command],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a signal to the generator's group is not for the server
            )
        except OSError as error:
            raise ConfigError(f"generator.engine: {command[0]} cannot be run: {error}") from error
        self.pid = self._process.pid

    @property
    def mark(self) -> int:
        return os.fstat(self._log.fileno()).st_size

    def said(self, since: int = 0) -> str:
        """Its output from there on, at most the last 64 KiB."""
        start = max(since, self.mark - TAIL_BYTES)
        return os.pread(self._log.fileno(), TAIL_BYTES, start).decode(errors="replace")

    @property
    def end(self) -> str | None:
        """How it ended and its last words about why; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        return f"the server has ended with exit code {code}; it said last: {self.last_words}"

    def kill(self) -> None:
        """The end of all of its processes, whatever state they are in."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)  # the leash kills the rest
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(END_S)
        self._log.close()

    @property
    def error(self) -> str:
        """The last line of its output that names an error; empty when there is none."""
        errors = [line for line in self._lines() if ERRORS.match(line)]
        return errors[-1][:1000] if errors else ""

    def _lines(self) -> list[str]:
        return [line.strip() for line in self.said().splitlines() if line.strip()]

    @property
    def last_words(self) -> str:
        return self.error or (self._lines() or ["nothing"])[-1][:1000]


def wait_ready(api: Api, server: Server | None, timeout_s: float) -> None:
    """Until the server takes requests, ours or one that somebody else starts. Raises `ConfigError` when ours ended because it
    cannot run with what it was given, and `EngineLost` when it ended otherwise or takes too long."""
    deadline = time.monotonic() + timeout_s
    answer = "none"
    if server is None:
        print(f"generator: waits for SGLang at {api.base}", file=sys.stderr, flush=True)
    while time.monotonic() < deadline:
        if server is not None and (end := server.end) is not None:
            refused = REFUSALS.search(server.error)
            raise (ConfigError if refused else EngineLost)(f"generator.engine: SGLang does not start: {end}")
        try:
            api.get("/ready", timeout_s=END_S)
            return
        except (Refused, EngineLost) as error:
            answer = str(error)
        time.sleep(READY_POLL_S)
    said = "" if server is None else f"; it said last: {server.last_words}"
    raise EngineLost(f"waited {timeout_s:.0f} s for SGLang at {api.base} to take requests: {answer}{said}")
