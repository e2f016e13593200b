"""Runs of UTel through real processes: pretraining, then tagging from it, on pages of a file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from utel_pages import make_boxes, make_words

from engine.config import load_config
from engine.documents.page import Page, write_pages
from engine.documents.page_rows import PageText, ReadPage, page_of, page_row, tags_in, varied
from engine.fields import TaskError
from engine.tasks import Source, page_tasks
from engine.utel.encode import EncodedPage, cover
from engine.utel.folder import load_utel
from engine.utel.tagging import load_tagger
from protocols.log import Log
from workers.check import problems

pytest.importorskip("seqeval", reason="needs the extra `documents`: pip install -e '.[documents]'")
pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "workers.cli"]
CONFIG = """
name = "read"
steps = 4
model = {{ type = "utel", hidden = 64, layers = 1, heads = 2, intermediate = 96, vocabulary = 120, dropout = {dropout} }}
tasks = [{{ type = "pages", path = "{pages}", held_out = 4 }}]
objective = {objective}
buffer = {{ groups_per_step = 6, samples_per_group = 1, prompt_tokens = 50000 }}
learner = {{ lr = 3e-3, ranks = {ranks}, updates_per_step = 2, token_budget = 400, checkpoint_every = 2, device = "cpu" }}
eval = {{ prompts = 4, every = 2 }}
runs = "{runs}"
"""
PRETRAIN = '{ type = "utel", length = 64 }'
TAG = '{ type = "utel-tag", fields = ["total"], length = 64, vary = 0.0 }'


def make_page(number: int) -> Page:
    """The word after "aaaa" is the total."""
    words = make_words(24, number)
    tags = ["O"] * len(words)
    words[number % 20], tags[number % 20 + 1] = "aaaa", "B-total"
    fields = {"total": words[number % 20 + 1], "company": f"company {number % 9}"}
    return Page(id=f"page-{number}", words=words, boxes=make_boxes(24), tags=tags, fields=fields)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "pages.jsonl"
    write_pages(path, [make_page(number) for number in range(30)])
    return path


def config_of(
    folder: Path, pages: Path, objective: str = PRETRAIN, *, ranks: int = 1, dropout: float = 0.1, more: str = ""
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = CONFIG.format(pages=pages, runs=folder, objective=objective, ranks=ranks, dropout=dropout)
    path = folder / "config.toml"
    path.write_text(text + more, encoding="utf-8")
    return path


def headrace(*arguments: str | Path, code: int = 0) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, pages: Path) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    headrace("launch", config_of(folder, pages), "--no-view")
    return folder / "read"


def metrics_of(run: Path) -> list[dict[str, float]]:
    with Log.open(run / "rollouts.db") as log:
        return [json.loads(text) for (text,) in log.query("SELECT metrics FROM steps ORDER BY step")]


def test_pretraining_is_a_run_like_any_other(pretrained: Path) -> None:
    metrics = metrics_of(pretrained)
    assert len(metrics) == 4
    assert {"mllm_loss", "swp_loss", "cwe_loss", "grad_norm", "lr"} <= metrics[0].keys()
    assert metrics[0]["pages"] == 6
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert [any(name.startswith("held_out_") for name in step) for step in metrics] == [False, True, False, True]
    assert "held_out_swp_accuracy_no_boxes" in metrics[-1]
    headrace("audit", pretrained)
    assert "4 steps verified" in headrace("replay", pretrained, "--verify")
    encoder = load_utel(pretrained / "checkpoints" / "step-000004")
    fresh = load_utel(pretrained / "model")
    assert not torch.equal(*(model.embeddings.word_embeddings.weight for model in (encoder, fresh)))


def test_tagging_starts_from_it_and_learns(pretrained: Path, pages: Path, tmp_path: Path) -> None:
    start = f'model.path="{pretrained}/checkpoints/step-000004"'
    config = config_of(tmp_path, pages, TAG)
    headrace("launch", config, "--no-view", "--set", start, "--set", "steps=12", "--set", "learner.lr=1e-2")
    metrics = metrics_of(tmp_path / "read")
    assert metrics[-1]["tag_loss"] < 0.5 * metrics[0]["tag_loss"]
    assert {"held_out_f1", "held_out_f1_strict", "held_out_fields_f1", "held_out_fields_f1_total"} <= metrics[-1].keys()
    tagger = load_tagger(tmp_path / "read" / "checkpoints" / "step-000012")
    assert (tagger.labels[-1], tagger.habits.keys()) == (
        "S-total",
        {label[2:] for label in tagger.labels if label != "O"},
    )
    words = load_file(tmp_path / "read" / "model" / "model.safetensors")["utel.embeddings.word_embeddings.weight"]
    assert torch.equal(words, load_utel(pretrained / "checkpoints" / "step-000004").embeddings.word_embeddings.weight)


def test_two_ranks_are_one_and_a_run_that_was_stopped_goes_on(pages: Path, tmp_path: Path) -> None:
    weights, losses = [], []
    for ranks, dtype in ((1, "float32"), (2, "float32"), (2, "bfloat16")):
        folder = tmp_path / f"{ranks}-{dtype}"
        config = config_of(folder, pages, ranks=ranks, dropout=0.0)
        typed = ("--set", f'learner.dtype="{dtype}"')
        headrace("launch", config, "--no-view", *typed, "--set", "steps=2")
        headrace("launch", config, "--no-view", *typed, "--resume")
        assert "4 steps verified" in headrace("replay", folder / "read", "--verify")
        weights.append(load_file(folder / "read" / "checkpoints" / "step-000004" / "model.safetensors"))
        losses.append([step["loss"] for step in metrics_of(folder / "read")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=2e-3, rtol=1e-3)
        assert weights[2][name].dtype == torch.bfloat16
    assert losses[0] == pytest.approx(losses[2], rel=1e-2)
    assert load_utel(tmp_path / "2-bfloat16" / "read" / "checkpoints" / "step-000004").config.hidden_size == 64


@pytest.mark.parametrize("boxes", ["seen", "hidden", "shuffled"])
def test_a_page_travels_as_it_is_to_be_seen(boxes: str) -> None:
    page, text = make_page(3), PageText()
    row = page_row(page, "task", boxes, "here")
    read = page_of(text.encode_prompt(row.prompt, chat=False))
    assert (read.id, read.words) == (page.id, page.words)
    assert tags_in(text.encode(row.solution or "")) == page.tags
    kept = {"seen": page.boxes, "hidden": [(0, 0, 0, 0)] * 24}.get(boxes)
    assert read.boxes == kept if kept is not None else sorted(read.boxes) == sorted(page.boxes) != read.boxes
    assert tags_in(text.encode("")) is None
    with pytest.raises(TaskError, match="is no page"):
        page_of(text.encode("[]"))


def test_a_varied_page_keeps_what_is_equal_and_moves_as_a_whole() -> None:
    page = ReadPage(
        "p", ["RM9.00", "9.00", "abc", "17"], [(100, 100, 200, 120), (300, 100, 400, 120), *[(0, 0, 9, 9)] * 2]
    )
    seen = varied(page, 0.1, "a key")
    assert seen == varied(page, 0.1, "a key") != varied(page, 0.1, "another")
    assert seen.words[0] == f"RM{seen.words[1]}"
    assert seen.words[2] == "abc"
    assert len(set(seen.words[3])) == 2
    assert seen.boxes[1][0] - seen.boxes[0][0] == pytest.approx(200, abs=22)
    assert all(0 <= low <= high <= 1000 for low, _, high, _ in seen.boxes)
    assert varied(page, 0.0, "a key").boxes == page.boxes


def test_covered_words_keep_their_places() -> None:
    page = EncodedPage("p", np.array([11, 12, 13, 14]), np.array([0, 2, 3, 4]), np.zeros((3, 4), dtype=np.int64))
    seen = cover(page, np.array([True, False, True]), 4)
    assert seen.tokens.tolist() == [4, 4, 13, 4]
    assert page.tokens.tolist() == [11, 12, 13, 14]
    assert seen.starts.tolist() == page.starts.tolist()


def test_companies_that_are_held_out_are_never_trained_on(pages: Path, tmp_path: Path) -> None:
    source = Source(page_tasks(load_config(config_of(tmp_path, pages)).tasks), 0)

    def company(row: object) -> str:
        return json.loads(row.answer)["company"]  # type: ignore[attr-defined]

    held_out = {company(row) for row in source.held_out(4)}
    assert held_out
    assert held_out.isdisjoint({company(source[index]) for index in range(60)})


def test_what_does_not_fit_together_is_refused_by_name(pages: Path, tmp_path: Path) -> None:
    path = config_of(tmp_path, pages)

    def found(*overrides: str) -> str:
        return "\n".join(problems(load_config(path, list(overrides))))

    assert found() == ""
    assert 'model.type: got \'utel\', expected "path" or "new"' in found('objective={type="dapo"}')
    assert "tasks.0.type: got 'jsonl', expected \"pages\"" in found('tasks=[{type="jsonl", path="x"}]')
    assert "[generator]: a UTel run has none" in found("generator={sampling={max_tokens=4}}")
    assert "hidden_size: got 30" in found("model.hidden=30")
    assert "no task holds pages out" in found("tasks.0.held_out=0")
    missing = headrace("launch", path, "--no-view", "--set", "tasks.0.path=nowhere.jsonl", code=2)
    assert re.search(r"nowhere\.jsonl: .*(no such file|cannot be read)", missing, re.I)
    other = headrace("launch", path, "--no-view", "--set", f'model.path="{tmp_path}"', code=2)
    assert "no tokenizer.json" in other or "expected" in other
