"""A few receipts in SROIE's form, and a tiny tagger that knows them by heart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from engine.documents.sroie import FIELDS, SroieReport, read_sroie_jsonl
from engine.utel.encode import encode_page
from engine.utel.habits import learn_habits
from engine.utel.model import Utel, UtelConfig
from engine.utel.tagging import Tagging, UtelTagger, make_labels, save_tagger
from engine.utel.wordpiece import train_wordpiece

COMPANIES = ("ACORN SUPPLY SDN BHD", "BIRCH & SONS", "CEDAR TRADING", "DOGWOOD MART ENTERPRISE")


def receipt(number: int) -> dict[str, Any]:
    """Receipt `number`; every field stands on it once."""
    company = COMPANIES[number % len(COMPANIES)]
    fields = {
        "company": company,
        "date": f"{10 + number}/03/2018",
        "address": f"{number + 1} JALAN MAWAR, 8120{number} JOHOR",
        "total": f"{20 + number}.50",
    }
    texts = [
        company,
        f"{number + 1} JALAN MAWAR,",
        f"8120{number} JOHOR",
        f"Date {fields['date']} 10:15",
        f"tea {number + 3}.10",
        f"bread {number + 4}.20",
        f"TOTAL {fields['total']}",
        "thank you",
    ]
    lines = [
        {"box": [40, 30 + 40 * row, 40 + 9 * len(text), 55 + 40 * row], "text": text} for row, text in enumerate(texts)
    ]
    return {"id": f"R{number}", "width": 400, "height": 600, "lines": lines, "fields": fields}


def write_receipts(path: Path, count: int = 4) -> list[dict[str, Any]]:
    rows = [receipt(number) for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def learn_tagger(folder: Path, source: Path) -> None:
    """Trains until every word of the receipts in `source` has its label, a few seconds."""
    torch.manual_seed(0)
    pages = list(read_sroie_jsonl(source, SroieReport()))
    pieces = train_wordpiece([" ".join(page.words) for page in pages], 400)
    config = UtelConfig(
        vocab_size=pieces.size, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    labels = make_labels(FIELDS)
    habits = learn_habits((page, page.tags or []) for page in pages)
    model, tagging = UtelTagger(Utel(config), labels, habits), Tagging(labels, pieces)
    prepared = tagging.prepare(
        [encode_page(pieces, page.words, page.boxes) for page in pages], [page.tags or [] for page in pages]
    )
    [batch] = tagging.micro_batches(prepared, token_budget=100_000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss, _ = tagging.loss(model, batch, prepared.counts)
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    save_tagger(folder, model, pieces)
