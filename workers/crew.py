"""The workers that a launch keeps: those of its config, and what `headrace scale` has asked for since."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from engine.config import Config, ConfigError
from workers.restarts import Restarts
from workers.roles import role_of, roles
from workers.scale import MOST, Answer, Request, answer_request, forget_requests, take_request
from workers.site import Keeper
from workers.supervise import Exit


class Crew:
    """Takes requests and asks workers to leave; whom it wants to be started it tells its owner."""

    def __init__(
        self,
        config: Config,
        supervisor: Keeper,
        restarts: Restarts,
        *,
        term_s: float,
        say: Callable[[str], None],
    ) -> None:
        """`term_s`: how long a worker may take to leave before it is killed."""
        self.config = config
        """With the counts that are wanted now."""
        self._supervisor, self._restarts, self._term_s, self._say = supervisor, restarts, term_s, say
        self._leaving: dict[str, float] = {}
        """When each that was asked to leave is to be killed, in monotonic seconds."""
        self._wanted_again: list[str] = []
        forget_requests(config.run_dir)

    def turn(self) -> list[str]:
        """Looks for a request and for workers that take too long to leave; returns those to be started now."""
        now = time.monotonic()
        late = [name for name, deadline in self._leaving.items() if deadline < now]
        for name in self._supervisor.stop(late, grace_s=0.0):
            self._say(f"{name} was killed: it had not left after {self._term_s:.0f} s")
        for name in late:
            self._gone(name)
        again, self._wanted_again = self._wanted_again, []
        try:
            request = take_request(self.config.run_dir)
        except ConfigError as error:
            self._say(str(error))
            request = None
        return again + (self._change(request) if request is not None else [])

    def left(self, exit: Exit) -> bool:
        """Whether a child that ended was one that had been asked to leave."""
        if exit.name not in self._leaving:
            return False
        how = "" if exit.code == 0 else f" with {exit.how}"
        self._say(f"{exit.name} left after {exit.lived_s:.0f} s{how}, as it was asked to")
        self._gone(exit.name)
        return True

    def _gone(self, name: str) -> None:
        del self._leaving[name]
        if name in roles(self.config):  # asked for anew while it was on its way out
            self._wanted_again.append(name)

    def _change(self, request: Request) -> list[str]:
        """Carries out a request as far as it is this process's to do; returns those to be started."""
        if refused := _refusal(self.config, request):
            answer_request(self.config.run_dir, Answer(request.id, refused=refused))
            return []
        self.config = resized(self.config, request.counts)
        wanted, running = roles(self.config), self._supervisor.running
        self._restarts.resize(wanted)
        ours = [name for name in running if role_of(name) in request.counts]
        stops = [name for name in ours if name not in wanted and name not in self._leaving]
        starts = [
            name
            for name in wanted
            if role_of(name) in request.counts and name not in running and not self._restarts.pending(name)
        ]
        for name in stops:
            self._leaving[name] = time.monotonic() + self._term_s
            self._supervisor.ask_to_end(name)
        asked = ", ".join(f"{role}={count}" for role, count in request.counts.items())
        moves = [f"starts {', '.join(starts)}"] * bool(starts) + [f"stops {', '.join(stops)}"] * bool(stops)
        self._say(f"asked for {asked}: {'; '.join(moves) or 'nothing to do'}")
        answer_request(self.config.run_dir, Answer(request.id, starts, stops))
        return starts


def resized(config: Config, counts: dict[str, int]) -> Config:
    """The config with these numbers of workers; a role that it has none of stays so."""
    generator, reward = config.generator, config.reward
    if generator is not None:
        generator = msgspec.structs.replace(generator, count=counts.get("generator", generator.count))
    reward = msgspec.structs.replace(reward, count=counts.get("reward", reward.count))
    return msgspec.structs.replace(config, generator=generator, reward=reward)


def _refusal(config: Config, request: Request) -> str | None:
    has = {role_of(name) for name in roles(config)}
    for role, count in request.counts.items():
        if role not in ("generator", "reward") or role not in has:
            return f"{config.name} has no {role} workers, and no use for any"
        if not 1 <= count <= MOST:
            return f"got {role}={count}, expected 1 to {MOST}"
    return None
