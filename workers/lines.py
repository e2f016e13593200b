"""The figures of a run as lines of text, for the live table, the plain log and `headrace status`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from protocols.link_messages import Status

FRUITLESS_GROUPS = 20
"""From this many groups in a row without an informative one, every view says so."""


def figure_lines(status: Status, rates: Mapping[str, float]) -> list[tuple[str, str]]:
    """Label and text of each line of figures; what is not known yet is left out."""
    ledger, metrics = status.ledger, status.metrics
    lines = []
    accuracy = [f"train {metrics['accuracy']:.3f}"] if _known(metrics, "accuracy") else []
    if status.evals:
        points = status.evals[:1] + status.evals[1:][-3:]
        accuracy.append("held-out " + " → ".join(f"{e['accuracy']:.3f} (step {e['eval_step']:.0f})" for e in points))
    if accuracy:
        lines.append(("accuracy", " · ".join(accuracy)))
    lines.append(
        (
            "groups",
            f"{ledger.get('ready', 0):.0f} ready · {ledger.get('undecided', 0):.0f} undecided · "
            f"keep rate {ledger.get('keep_rate', 1.0):.2f} · {ledger.get('total_dropped', 0):,.0f} dropped "
            f"({ledger.get('total_dropped_tokens', 0):,.0f} tokens) · {ledger.get('total_failed', 0):.0f} failed",
        )
    )
    if ledger.get("fruitless", 0) >= FRUITLESS_GROUPS:
        lines.append(("", f"the last {ledger['fruitless']:.0f} groups were all right or all wrong; sampling goes on"))
    if _known(metrics, "lag_mean"):
        masked = f" · masked {metrics['masked_fraction']:.2%}" if _known(metrics, "masked_fraction") else ""
        lines.append(("lag", f"mean {metrics['lag_mean']:.2f} · max {metrics.get('lag_max', 0):.0f} versions{masked}"))
    names = (("loss", ".4f"), ("grad_norm", ".3f"), ("entropy", ".3f"), ("length_mean", ".1f"), ("reward_mean", ".3f"))
    training = [f"{name.replace('_mean', '')} {metrics[name]:{form}}" for name, form in names if _known(metrics, name)]
    if training:
        lines.append(("training", " · ".join(training)))
    times = [
        f"{name[:-2]} {metrics[name]:.1f} s" for name in ("train_s", "wait_s", "publish_s") if _known(metrics, name)
    ]
    if times:
        lines.append(("last step", " · ".join(times)))
    if rates:
        lines.append(("sampling", f"{sum(rates.values()):,.0f} tokens/s"))
    return lines


def step_line(row: Mapping[str, Any], steps: int, history: Sequence[Mapping[str, Any]]) -> str:
    """`step 12/50  accuracy 0.431  keep 0.55  lag 0.80/1  ...  4.1 s  eta 2:31`"""
    at = row["step"]
    parts = [f"step {at}/{steps}"]
    fields = (
        ("accuracy", "accuracy", ".3f"), ("reward_mean", "reward", ".3f"), ("keep_rate", "keep", ".2f"),
        ("lag_mean", "lag", ".2f"), ("length_mean", "length", ".1f"), ("entropy", "entropy", ".3f"),
        ("loss", "loss", ".4f"), ("trained_tokens", "tokens", ",.0f"), ("train_s", "train", ".1f"),
        ("wait_s", "wait", ".1f"),
    )  # fmt: skip
    for name, label, form in fields:
        if _known(row, name):
            parts.append(f"{label} {row[name]:{form}}" + (" s" if name.endswith("_s") else ""))
    ends = [float(r["time"]) for r in history if r["step"] <= at][-11:]
    if eta := eta_s(ends, steps - at):
        parts.append(f"eta {duration(eta)}")
    return "  ".join(parts)


def eval_line(row: Mapping[str, Any]) -> str:
    """`held-out after step 10: accuracy 0.402 (256 prompts, 256 samples)`"""
    size = (
        f" ({row['prompts']:.0f} prompts, {row['samples']:.0f} samples)" if {"prompts", "samples"} <= row.keys() else ""
    )
    return f"held-out after step {row['eval_step']}: accuracy {row['accuracy']:.3f}{size}"


def waiting_line(status: Status, rates: Mapping[str, float], now: float) -> str:
    """Where a run that does not move stands: figures, and what each worker does and since when."""
    figures = "; ".join(f"{label} {text}".strip() for label, text in figure_lines(status, rates) if label != "training")
    workers = ", ".join(
        f"{w.get('name')} {w.get('state')}" + (f" ({duration(now - w['since'])})" if w.get("since") else "")
        for w in status.workers
    )
    return f"after step {status.step}/{status.steps}: {figures}; workers: {workers or 'none has joined'}"


def eta_s(ends: Sequence[float], left: int) -> float | None:
    """Seconds until `left` more steps are done, from the median time between the ends of recent ones."""
    if len(ends) < 2:
        return None
    return left * statistics.median(after - before for before, after in itertools.pairwise(ends))


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _known(row: Mapping[str, Any], name: str) -> bool:
    return isinstance(row.get(name), int | float)
