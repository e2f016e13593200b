"""The model folder of a run that trains UTel: its encoder and word pieces from where the config says, and fresh heads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from engine.config import Config, ConfigError, UtelModel, UtelObjective, UtelTagObjective
from engine.documents.page_rows import ReadPage, page_in, tags_of_row
from engine.rows import Row
from engine.start_folder import start_folder
from engine.tasks import Source, page_tasks
from engine.utel.folder import from_bert, load_utel, read_config, save_folder
from engine.utel.habits import learn_habits
from engine.utel.model import Utel
from engine.utel.pretraining.heads import UtelPretraining
from engine.utel.tagging import UtelTagger, make_labels, save_tagger
from engine.utel.wordpiece import WordPiece, load_wordpiece, train_wordpiece

FIRST_PAGES = 400
"""So many training pages are read for word pieces, and for where and how fields are written."""


def create_utel(config: Config, folder: Path) -> None:
    """Writes `folder`, which must not exist; a function of the config (and of where it starts from). Raises `ConfigError`."""
    if not isinstance(config.model, UtelModel):
        raise ConfigError(f'{config.source}: model.type: expected "utel"')
    start = start_folder(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        pieces = train_wordpiece(_words(config), config.model.vocabulary) if start is None else load_wordpiece(start)
        encoder = _fresh(config.model, pieces) if start is None else _started(config, config.model, start, pieces)
        match config.objective:
            case UtelObjective():
                model: nn.Module = UtelPretraining(encoder, config.objective)
                save_folder(folder, model, encoder.config, pieces)
            case UtelTagObjective(fields=fields, scheme=scheme):
                habits = learn_habits(_tagged(config))
                save_tagger(folder, UtelTagger(encoder, make_labels(fields, scheme), habits), pieces)
            case _:
                raise ConfigError(f'{config.source}: objective.type: expected "utel" or "utel-tag" with a UTel')


def _fresh(model: UtelModel, pieces: WordPiece) -> Utel:
    try:
        return Utel(model.shape(pieces.size))
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def _started(config: Config, model: UtelModel, start: Path, pieces: WordPiece) -> Utel:
    """The encoder in `start`, with the config's own dropout and terms, which are no weights."""
    document = read_config(start)
    vocabulary = document.get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < pieces.size:
        raise ConfigError(f"{start}: vocab_size: got {vocabulary!r}, expected at least the {pieces.size} word pieces")
    shape = model.shape(vocabulary)
    if document.get("model_type") == "bert":
        return from_bert(start, shape, seed=config.seed)
    found = load_utel(start)
    table = ("max_position_embeddings",) if shape.sequence_term == "absolute" else ()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "sequence_term", *table)
    for name in sizes:
        if getattr(found.config, name) != getattr(shape, name):
            raise ConfigError(
                f"{start}: {name}: got {getattr(found.config, name)}, expected {getattr(shape, name)}, as in [model]"
            )
    encoder = Utel(shape)
    encoder.load_state_dict(found.state_dict())
    return encoder


def _words(config: Config) -> Iterator[str]:
    for row in _first_rows(config):
        yield from page_in(row).words


def _tagged(config: Config) -> Iterator[tuple[ReadPage, list[str]]]:
    for row in _first_rows(config):
        if (tags := tags_of_row(row)) is not None:
            yield page_in(row), tags


def _first_rows(config: Config) -> Iterator[Row]:
    """The first training pages, in the order of the run."""
    source = Source(page_tasks(config.tasks), config.seed)
    return (source[index] for index in range(FIRST_PAGES))
