"""Text to tokens and back, without torch or transformers: the buffer and the reward workers use it too.

Agrees token for token with `AutoTokenizer` of the same folder (`tokenizer(text)`, `apply_chat_template`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from engine.config import ConfigError
from protocols.messages import INT

Messages = list[dict[str, Any]]


class TextError(ValueError):
    """A text that this tokenizer or chat template cannot take."""


class TextModel:
    """The tokenizer, chat template and stop tokens of one Hugging Face folder."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], stop_ids: frozenset[int]) -> None:
        self.folder = folder
        self.stop_ids = stop_ids
        """Ids that end a response, any of them."""
        self.vocabulary = tokenizer.get_vocab_size()
        self._tokenizer = tokenizer
        self._alphabet = _alphabet(tokenizer)
        self._special = _special_tokens(settings)
        self._template = _template(folder, settings)
        self.eos = self._eos()

    @classmethod
    def load(cls, folder: str | Path) -> TextModel:
        """Read tokenizer.json and the small JSON files beside it. Raises `ConfigError` for what is missing or broken."""
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"model {folder}: no tokenizer.json there; expected a Hugging Face model folder")
        try:
            tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises this very class for a file that it cannot parse
            raise ConfigError(f"{file}: not a tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = _read_json(folder / "tokenizer_config.json")
        stop_ids = _stop_ids(folder, settings, tokenizer)
        if not stop_ids:
            raise ConfigError(f"model {folder}: no eos_token_id in generation_config.json or config.json, no eos_token")
        return cls(folder, tokenizer, settings, stop_ids)

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_prompt(..., chat=True)` works."""
        return self._template is not None

    def encode(self, text: str) -> np.ndarray:
        """int32 [N], nothing added. Raises `TextError` for a character outside a character tokenizer's alphabet."""
        return self._ids(text, special=False)

    def encode_prompt(self, prompt: str | Messages, *, chat: bool) -> np.ndarray:
        """int32 [N] of what the model continues: through the chat template, with the assistant's turn opened, when `chat`
        (a plain text is then one user message); else the text as `AutoTokenizer` would encode it (bos added where it does).

        Raises `TextError` for a text outside the alphabet and for messages that the template refuses, `ConfigError`
        for a folder without a template.
        """
        if chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return self._ids(self.render(messages), special=False)
        if not isinstance(prompt, str):
            raise TextError(f"model {self.folder}: got chat messages with chat = false, expected a text")
        return self._ids(prompt, special=True)

    def render(self, messages: Messages) -> str:
        """The chat template's text for these messages, with the assistant's turn opened."""
        if self._template is None:
            raise ConfigError(
                f"model {self.folder}: it has no chat template (tokenizer_config.json, chat_template.jinja); set chat = false"
            )
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except jinja2.TemplateError as error:
            raise TextError(f"model {self.folder}: the chat template refuses the messages: {error}") from error

    def decode(self, tokens: Iterable[int]) -> str:
        """The text, special tokens skipped."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def _ids(self, text: str, *, special: bool) -> np.ndarray:
        if self._alphabet is not None:
            unknown = sorted(set(self._without_special(text)) - self._alphabet)
            if unknown:
                raise TextError(f"model {self.folder}: {text!r} has {unknown}, which are not in the model's alphabet")
        return np.array(self._tokenizer.encode(text, add_special_tokens=special).ids, dtype=INT)

    def _without_special(self, text: str) -> str:
        for token in self._special.values():
            text = text.replace(token, "")
        return text

    def _eos(self) -> int:
        token = self._special.get("eos_token")
        index = self._tokenizer.token_to_id(token) if token is not None else None
        return min(self.stop_ids) if index is None else index


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: got {type(data).__name__}, expected an object")
    return data


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; a token stands as text or as {"content": text}."""
    tokens = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _stop_ids(folder: Path, settings: dict[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        found |= {int(index) for index in (value if isinstance(value, list) else [value]) if index is not None}
    token = _special_tokens(settings).get("eos_token")
    index = tokenizer.token_to_id(token) if token is not None else None
    return frozenset(found if index is None else found | {index})


def _alphabet(tokenizer: Tokenizer) -> frozenset[str] | None:
    """The characters of a tokenizer of `engine.characters`; None for any other, which can encode every text."""
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] != "WordLevel" or model["unk_token"] in model["vocab"]:
        return None
    return frozenset(token for token in model["vocab"] if len(token) == 1)


def _template(folder: Path, settings: dict[str, Any]) -> jinja2.Template | None:
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(source, list):  # named templates: the one a call without a name takes
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"model {folder}: its chat template is broken: {error}") from error


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text in some templates; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # jinja's own filter escapes HTML characters, which the models have never seen
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
