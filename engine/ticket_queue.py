"""The tickets that a generator has in hand, whatever computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from engine.responses import Job, check_ticket
from protocols.link_messages import Held
from protocols.messages import Ticket


class TicketQueue:
    """`jobs` are in the order in which they came; their owner removes those that are finished."""

    def __init__(self, *, context: int, vocabulary: int, drop: Callable[[Job, set[int]], None]) -> None:
        """`drop` takes samples of a job away from whatever works on them, and removes a job that has no others."""
        self.jobs: list[Job] = []
        self._context, self._vocabulary, self._drop = context, vocabulary, drop

    def add(self, ticket: Ticket) -> None:
        """Queue the ticket's samples. Those in hand already under this fence or a later one are left alone; those in
        hand under an earlier one are dropped, since their results would be refused. Raises `TicketRefused`."""
        check_ticket(ticket, context=self._context, vocabulary=self._vocabulary)
        samples = set(ticket.samples)
        for job in [job for job in self.jobs if job.ticket.group == ticket.group]:
            same = {response.sample for response in job.unfinished} & samples
            if job.ticket.fence >= ticket.fence:
                samples -= same
            else:
                self._drop(job, same)
        if samples:
            self.jobs.append(Job(ticket, [s for s in ticket.samples if s in samples], context=self._context))

    def cancel(self, group: int, fence: int) -> None:
        """Drop every unfinished sample that was issued under this fence, if any."""
        for job in [job for job in self.jobs if (job.ticket.group, job.ticket.fence) == (group, fence)]:
            self._drop(job, {response.sample for response in job.unfinished})

    def held(self) -> list[Held]:
        """The tickets with unfinished samples."""
        return [Held(job.ticket.group, job.ticket.fence) for job in self.jobs]

    def startable(self, version: int) -> Iterator[Job]:
        """The jobs with a sample that waits and may start on weights of this version."""
        return (job for job in self.jobs if job.waiting and job.ticket.min_version <= version)
