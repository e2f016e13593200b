"""What is said of the first step that a replay does not reproduce."""

from __future__ import annotations

import platform

from engine.config import Config
from protocols.log import StepRow
from protocols.messages import StepCommit
from workers.provenance import code_version
from workers.replay_source import StoredRun


def difference(source: StoredRun, row: StepRow, got: StepCommit, config: Config, *, start: int) -> str:
    """The step, the weights that differ, and what may explain it. `start` is the step that the replay began after."""
    names = sorted({*row.fingerprints, *got.fingerprints})
    odd = [name for name in names if row.fingerprints.get(name) != got.fingerprints.get(name)]
    lines = [
        f"{source.folder}: step {row.step} differs: re-trained to {got.weights_hash}, the log has {row.weights_hash}",
        f"  weights: {len(odd)} of {len(names)} differ, by name the first is {odd[0]}"
        if odd
        else "  weights: the log has no fingerprints of this step",
        f"  before it: steps {start + 1} to {row.step - 1} came to the weights in the log"
        if row.step > start + 1
        else f"  before it: nothing, the replay began with the weights of step {start}",
        "  what may explain it:",
    ]
    return "\n".join([*lines, *(f"  - {reason}" for reason in _reasons(source, row, config, start=start))])


def _reasons(source: StoredRun, row: StepRow, config: Config, *, start: int) -> list[str]:
    here = code_version()
    reasons = []
    if row.code_version != here:
        reasons.append(f"another code version: the step was trained by {row.code_version}, this is {here}")
    trained_by = source.log.query(
        "SELECT detail FROM events WHERE kind = 'joined' AND detail LIKE 'learner%' AND at <= ? ORDER BY id DESC LIMIT 1",
        row.started_at,
    )
    if trained_by:
        host = str(trained_by[0][0]).rpartition(" on ")[2]
        if host != platform.node():
            reasons.append(f"another machine: it was trained on {host}, this is {platform.node()}")
    learner = config.learner
    reasons.append(
        f"threads, device or library versions: the config says learner.threads = {learner.threads}, learner.device = "
        f"{learner.device}, {learner.ranks} ranks, and so it is here"
    )
    if row.step == 1 and source.meta.start is None:
        reasons.append("another starting model: the log does not say which one it was")
    if config.critic is not None and config.critic.path is not None and source.meta.critic is None:
        reasons.append(f"another critic in {config.critic.path}: the log does not say which one it was")
    reasons.append(f"data that changed since: see `headrace show {source.folder} --step {row.step}`")
    return reasons
