"""The end of a run for people: the closing table, `report.json` with the same numbers, and `report.png` with the curves."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from protocols.log import Log
from workers.curves import draw_curves
from workers.lines import duration
from workers.measure import Evaluation, Report, RoleTime, measure
from workers.measure_documents import document_line
from workers.measure_pages import page_line
from workers.metrics import read_metrics


def report(run_dir: Path, console: Console) -> Report:
    """Measures a run, writes `report.json` and `report.png` beside its log, and prints the table. Raises `LogError`."""
    with Log.open(run_dir / "rollouts.db") as log:
        found = measure(log)
    (run_dir / "report.json").write_text(json.dumps(msgspec.to_builtins(found), indent=2) + "\n", encoding="utf-8")
    picture = run_dir / "report.png"
    draw_curves(read_metrics(run_dir), found.run, picture)
    console.print(closing_table(found))
    console.print(Text(f"curves: {picture}\nnumbers: {run_dir / 'report.json'}"), soft_wrap=True)
    return found


def closing_table(found: Report) -> Table:
    """The report as a table of two columns."""
    table = Table(title=Text(f"{found.run}: {found.steps} of {found.of_steps} steps in {duration(found.seconds)}"))
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("measured")
    for what, text in closing_lines(found):
        table.add_row(Text(what), Text(text))
    return table


def closing_lines(found: Report) -> list[tuple[str, str]]:
    """What each line of the closing table says."""
    lines = [("read", reading) for reading in found.readings]
    if found.evaluations:
        before, after = found.evaluations[0], found.evaluations[-1]
        change = f" ({after.accuracy - before.accuracy:+.3f})" if after is not before else ""
        lines.append((f"held-out accuracy, step {before.step}", _accuracy(before)))
        if after is not before:
            lines.append((f"held-out accuracy, step {after.step}", _accuracy(after) + change))
    for figures in found.documents[:1] + found.documents[1:][-1:]:
        lines.append((f"held-out documents, step {figures.step}", document_line(figures)))
    for pages in found.pages[:1] + found.pages[1:][-1:]:
        lines.append((f"held-out pages, step {pages.step}", page_line(pages)))
    for status in ("trained", "dropped", "failed", "waiting"):
        if found.groups.get(status):
            text = (
                f"{found.groups[status]:,} groups, {found.samples[status]:,} samples, {found.tokens[status]:,} tokens"
            )
            lines.append((status, text))
    if found.tokens["evaluated"]:
        lines.append(("evaluated", f"{found.tokens['evaluated']:,} tokens"))
    if found.keep_rate is not None:
        lines.append(("keep rate", f"{found.keep_rate:.1%} of decided groups were informative"))
    if found.prompt_tokens_saved:
        text = (
            f"saves {found.prompt_tokens_saved:.1%} of the learner's input tokens: a prompt once for all its responses"
        )
        lines.append(("packing", text))
    if found.lag is not None:
        lag = found.lag
        text = f"mean {lag.mean:.2f}, p99 {lag.p99:.0f}, max {lag.max} versions; masked {lag.masked_fraction:.2%} of tokens"
        lines.append(("lag", text))
    if found.overlap is not None:
        text = (
            f"{found.overlap.sampled_while_training:.1%} of tokens were sampled while the learner trained; "
            f"{found.overlap.trained_while_sampling:.1%} of training time had sampling beside it"
        )
        lines.append(("overlap", text))
    lines += [(role.name, _role_text(role)) for role in found.roles]
    return lines


def _accuracy(evaluation: Evaluation) -> str:
    low, high = evaluation.version_min, evaluation.version_max
    weights = f"weights {low}" if low == high else f"weights {low} to {high}"
    return f"{evaluation.accuracy:.3f} on {evaluation.prompts} prompts, {evaluation.samples} samples, {weights}"


def _role_text(role: RoleTime) -> str:
    share = role.busy_s / role.online_s if role.online_s > 0 else 0.0
    if role.name.startswith("learner"):
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in role.parts.items())
    if role.tokens:
        idle = max(0.0, role.online_s - role.busy_s)
        rate = f", {role.tokens / role.busy_s:,.0f} tokens/s" if role.busy_s > 0 else ""
        return f"sampling {role.busy_s:.1f} s ({share:.0%}), idle {idle:.1f} s; {role.tokens:,} tokens{rate}"
    return f"scoring {role.busy_s:.1f} s ({share:.0%} of {role.online_s:.1f} s); {role.parts['scores']:,.0f} scores"
