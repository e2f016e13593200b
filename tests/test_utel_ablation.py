"""`tools/experiments/utel_ablation`: what its arms change, a comparison through real processes, and the table of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs
from rich.console import Console
from safetensors.torch import load_file
from test_page_runs import make_page

from engine.config import UtelModel, UtelObjective, dump_config
from engine.documents.page import write_pages
from engine.documents.synthetic import synthetic_page
from tools.experiments.runs import Run
from tools.experiments.utel import main
from tools.experiments.utel_arms import ALL, CLIPS, ORDERS, SYNTHETIC_FIELDS, TABLES, TASKS, PageArm, PageExperiment
from tools.experiments.utel_figures import PagesMeasured, lengths_table, pages_table, summarize_pages
from workers.check import problems

pytest.importorskip("seqeval", reason="needs the extra `documents`: pip install -e '.[documents]'")
pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parent.parent
TINY = ("model.hidden=64", "model.layers=1", "model.heads=2", "model.intermediate=96", "model.vocabulary=120",
        "tasks.0.held_out=4", "eval.prompts=4", "buffer.groups_per_step=4", "learner.warmup_steps=0",
        'learner.device="cpu"', "objective.length=64")  # fmt: skip

SHEETS = ("objective.test_lengths=[128, 256]", "tasks.0.joined=3", "tasks.0.held_out=20", "eval.prompts=5")


@pytest.fixture(autouse=True)
def at_the_root() -> Iterator[None]:
    """Paths in configs are relative to the repository."""
    with contextlib.chdir(ROOT):
        yield


def arm_of(name: str) -> PageArm:
    return next(arm for arm in (*TASKS, *CLIPS, *ORDERS) if arm.name == name)


def runs_of(name: str, folder: Path, table: str = "receipts") -> list[Run]:
    return PageExperiment(TABLES[table], folder, "receipts.jsonl", 100, 150).runs(arm_of(name), 3)


def test_arms_differ_in_what_they_are_named_after(tmp_path: Path) -> None:
    weights = {
        "mllm": (1, 0, 0),
        "mllm-swp": (1, 1, 0),
        "mllm-cwe": (1, 0, 1),
        "all": (1, 1, 1),
        "text-only": (1, 0, 0),
    }
    for name, wanted in weights.items():
        pretraining, _ = runs_of(name, tmp_path)
        objective = pretraining.config.objective
        assert isinstance(objective, UtelObjective)
        assert tuple(objective.weights.values()) == wanted
    assert [run.config.steps for run in runs_of("mllm-twice", tmp_path)] == [200, 150]
    for run in runs_of("text-only", tmp_path):
        assert {task["boxes"] for task in dump_config(run.config)["tasks"]} == {"hidden"}
    for run in runs_of("clip-none", tmp_path, "clip"):
        assert isinstance(run.config.model, UtelModel)
        assert run.config.model.clip_distance == -1


def test_all_arms_of_a_seed_have_one_start(tmp_path: Path) -> None:
    fresh = f"{tmp_path}/all-s3/model"
    for arm in (*TASKS, *CLIPS):
        first, last = (runs := runs_of(arm.name, tmp_path))[0].config, runs[-1].config
        assert isinstance(first.model, UtelModel)
        assert isinstance(last.model, UtelModel)
        assert first.model.path == (None if arm == ALL else fresh)
        assert len(runs) == (1 if arm.settings is None else 2)
        if len(runs) == 2:
            assert last.model.path == f"{first.run_dir}/checkpoints/step-{first.steps:06d}"
        assert last.cold_start == ""
        assert [problem for run in runs for problem in problems(run.config)] == []


def test_arms_of_lengths_differ_in_the_order_s_term(tmp_path: Path) -> None:
    relative, absolute = ([run.config for run in runs_of(arm.name, tmp_path, "length")] for arm in ORDERS)
    for one, other in zip(relative, absolute, strict=True):
        assert isinstance(one.model, UtelModel)
        assert isinstance(other.model, UtelModel)
        assert (one.model.sequence, other.model.sequence, other.model.max_positions) == ("relative", "absolute", 1024)
        assert one.objective == other.objective
        assert (one.objective.length, one.objective.test_lengths) == (256, [512, 1024])  # type: ignore[union-attr]
        assert {task["joined"] for task in dump_config(one)["tasks"]} == {6}
        assert problems(one) == problems(other) == []
    assert absolute[0].model.path is None  # type: ignore[union-attr]
    [problem] = problems(structs.replace(absolute[0], model=structs.replace(absolute[0].model, max_positions=512)))
    assert "objective.test_lengths: got 1024, expected at most model.max_positions = 512" in problem


def test_synthetic_pages_have_no_other_fields() -> None:
    found = {name for index in range(40) for name in synthetic_page("train", index).fields}
    assert found <= set(SYNTHETIC_FIELDS)
    assert len(found) > len(SYNTHETIC_FIELDS) / 2


def test_arms_run_through_the_pipeline_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = tmp_path / "pages.jsonl"
    write_pages(pages, [make_page(number) for number in range(30)])
    sets = [part for setting in TINY for part in ("--set", setting)]
    call = ["receipts", "--receipts", str(pages), "--arms", "none", "--seeds", "0", "--steps", "2", "2"]
    assert main([*call, "--runs", str(tmp_path), *sets]) == 0
    said = capsys.readouterr().out
    assert said.count("done in") == 3
    assert main([*call, "--runs", str(tmp_path), *sets]) == 0
    assert "done in" not in capsys.readouterr().out
    figures = json.loads((tmp_path / "receipts.json").read_text(encoding="utf-8"))
    assert {name: len(runs) for name, runs in figures["arms"].items()} == {"none": 1, "all": 1}
    assert "fields_f1" in figures["arms"]["none"][0]["tagging"]
    assert "swp_accuracy_no_boxes" in figures["arms"]["all"][0]["pretraining"]
    fresh, start = (
        load_file(tmp_path / "receipts" / run / "model" / "model.safetensors")["utel.embeddings.word_embeddings.weight"]
        for run in ("all-s0", "none-tag-s0")
    )
    assert fresh.equal(start)


def test_lengths_are_compared_through_the_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = tmp_path / "pages.jsonl"
    write_pages(pages, [make_page(number) for number in range(60)])
    sets = [part for setting in (*TINY, *SHEETS) for part in ("--set", setting)]
    call = ["length", "--receipts", str(pages), "--seeds", "0", "--steps", "2", "2", "--runs", str(tmp_path), *sets]
    assert main(call) == 0
    assert capsys.readouterr().out.count("done in") == 4
    arms = json.loads((tmp_path / "length.json").read_text(encoding="utf-8"))["arms"]
    for arm in ("relative", "absolute"):
        [run] = arms[arm]
        assert {"f1", "at_128_f1", "at_256_f1"} <= run["tagging"].keys()
        assert {"mllm_accuracy", "at_128_mllm_accuracy", "at_256_mllm_accuracy"} <= run["pretraining"].keys()
        assert run["pretraining"]["positions_per_row"] < 65 < run["pretraining"]["at_128_positions_per_row"]
        assert "fields_f1" not in run["tagging"]  # the sheets' pages have a total each
    table = load_file(tmp_path / "sheets" / "absolute-tag-s0" / "checkpoints" / "step-000002" / "model.safetensors")
    fresh = load_file(tmp_path / "sheets" / "absolute-s0" / "model" / "model.safetensors")
    places, first = (of["utel.embeddings.position_embeddings.weight"] for of in (table, fresh))
    assert len(places) == 1024
    assert (places[:64] - first[:64]).abs().max() > 100 * (places[64:] - first[64:]).abs().max()


def test_gains_are_paired_by_seed() -> None:
    def run(seed: int, f1: float) -> PagesMeasured:
        return PagesMeasured(seed, [], {"f1": f1, "fields_f1": 0.7, "fields_f1_date": 0.8}, {}, 1.0)

    found = summarize_pages([("none", [run(0, 0.4), run(1, 0.6)]), ("all", [run(1, 0.7)]), ("mllm", [])])
    assert [arm.arm for arm in found] == ["none", "all"]
    assert found[0].figures["f1"].mean == pytest.approx(0.5)
    assert found[0].gain is None
    assert found[1].gain is not None
    assert found[1].gain.mean == pytest.approx(0.1)
    console = Console(width=150, record=True)
    console.print(pages_table("t", found))
    text = console.export_text()
    assert "50.0 ± 14.1" in text
    assert "+10.0" in text
    assert "80.0" in text


def test_a_row_for_each_length() -> None:
    run = PagesMeasured(0, [], {"f1": 0.4, "at_512_f1": 0.3}, {"mllm_accuracy": 0.25}, 1.0)
    console = Console(width=150, record=True)
    console.print(lengths_table("t", summarize_pages([("relative", [run])]), 256, (512,)))
    rows = [line.split() for line in console.export_text().splitlines() if "relative" in line]
    assert rows == [["relative", "256", "1", "25.0", "40.0"], ["relative", "512", "1", "30.0"]]


def test_what_is_not_there_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receipts", "--receipts", str(tmp_path / "no.jsonl"), "--runs", str(tmp_path)]) == 2
    assert "no.jsonl: no such file; expected receipts" in capsys.readouterr().err
    assert main(["clip", "--arms", "mllm", "--report", "--runs", str(tmp_path)]) == 2
    assert "--arms: clip has no mllm, expected some of clip-0" in capsys.readouterr().err
    assert main(["synthetic", "--report", "--runs", str(tmp_path)]) == 0
    assert "not run yet: none, mllm, " in capsys.readouterr().out
