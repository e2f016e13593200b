"""The scorer of document tasks that name a UTel tagger: as `workers/score.py`, with the tagger loaded once.

    python -m workers.score_documents        (started by `workers/scorer_pool.py`, never by hand)

A message brings several responses; pages that no response has brought before are read together, and a page's reading is
kept for the responses to come. It scores other tasks too, where a run has both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from engine.config import DocumentScore, DocumentsTask
from engine.config_section import ConfigError
from engine.documents.grading import Reference, grade_document, reference
from engine.documents.page import Page
from engine.rewards import Score
from engine.scores import RewardError
from engine.utel.reading import Reader
from workers.score import Job, Scoring, Setup, one_by_one, serve

KEPT_READINGS = 4096
"""Pages whose reading is kept, the newest; a reading is a few short texts."""


class Readings:
    """What one tagger reads on pages, by their words and places."""

    def __init__(self, score: DocumentScore, wanted: Sequence[str]) -> None:
        """Raises `ConfigError` for a folder that is not a tagger's, and for fields that it does not know."""
        self.reader = Reader(score.utel or "", device=score.device)
        if missing := [name for name in wanted if name not in self.reader.types]:
            raise ConfigError(
                f"{score.utel}: this tagger knows {', '.join(self.reader.types) or 'no entity types'}, expected the task's "
                f"fields {', '.join(missing)} too"
            )
        self.wanted, self._known = list(wanted), dict[str, dict[str, str]]()
        self.pages_read = 0

    def of(self, references: Sequence[Reference]) -> list[dict[str, str]]:
        """One for each; all pages that are new are read together."""
        keys = [json.dumps([one.words, one.boxes]) for one in references]
        new: dict[str, Page] = {
            key: one.page for key, one in zip(keys, references, strict=True) if key not in self._known
        }
        self.pages_read += len(new)
        for key, found in zip(new, self.reader.fields(list(new.values()), self.wanted), strict=True):
            self._known[key] = {name: field.value for name, field in found.items()}
        readings = [self._known[key] for key in keys]
        while len(self._known) > KEPT_READINGS:
            del self._known[next(iter(self._known))]
        return readings


def load(setup: Setup) -> Scoring:
    """Loads each task's tagger, and prepares the other tasks."""
    tasks = {name: task for name, task in setup.tasks.items() if isinstance(task, DocumentsTask) and task.score.utel}
    others = {name: task for name, task in setup.tasks.items() if name not in tasks}
    plain = one_by_one(Setup(tasks=others, memory_mb=setup.memory_mb, parent=setup.parent))
    readings = {name: Readings(task.score, task.fields) for name, task in tasks.items()}

    def scores(jobs: Sequence[Job]) -> list[Score | BaseException]:
        task = tasks.get(jobs[0].task)
        return plain(jobs) if task is None else _score(jobs, task, readings[jobs[0].task])

    return scores


def _score(jobs: Sequence[Job], task: DocumentsTask, readings: Readings) -> list[Score | BaseException]:
    references = [_reference(job.answer) for job in jobs]
    whole = [one for one in references if isinstance(one, Reference)]
    read = iter(readings.of(whole))
    return [
        one if isinstance(one, RewardError) else grade_document(job.text, one, next(read), task.score.threshold)
        for job, one in zip(jobs, references, strict=True)
    ]


def _reference(answer: str) -> Reference | RewardError:
    try:
        return reference(json.loads(answer))
    except RewardError as error:
        return error
    except ValueError as error:
        return RewardError(f"the row's answer: not JSON ({error}): got {answer[:80]!r}")


if __name__ == "__main__":
    serve(load, model=True)
