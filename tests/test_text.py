"""Text goes to the same tokens as in `transformers`, and torch stays out of the processes that only handle text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from engine.characters import save_tokenizer
from engine.config import ConfigError
from engine.text import TextError, TextModel

SMOLLM2 = Path(__file__).parent.parent / "models" / "smollm2-135m-instruct"

CHATML = """{%- if tools %}{{ tools | tojson }}{% endif -%}
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a test.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {%- if message.role == 'system' and not loop.first %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content | trim }}{% endgeneration %}{{ eos_token + '\\n' }}
    {%- endif %}
{%- endfor %}
  {% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
  {%- endif %}
"""

QWEN = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
    "bos_token": None,
    "model_max_length": 64,
}


def write_bpe(folder: Path, config: dict, *, template: str | None = CHATML, bos: bool = False) -> Path:
    """A byte-level BPE tokenizer with ChatML's special tokens, as Qwen's."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("u", "s"), ("us", "er"), ("e", "r"), ("Ġ", "a")]
    vocabulary = {
        token: index for index, token in enumerate([*alphabet, "he", "ll", "hell", "hello", "us", "er", "user", "Ġa"])
    }
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [m for m in merges if "".join(m) in vocabulary and m[1] in vocabulary])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    if bos:
        index = tokenizer.token_to_id("<|endoftext|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="$A $B", special_tokens=[("<|endoftext|>", index)]
        )
    tokenizer.enable_truncation(4)  # left over from training in many published files; nobody wants it
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | ({"chat_template": template} if template else {}))
    )
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bpe(tmp_path_factory.mktemp("qwen"), QWEN)


MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=30)}),
    min_size=1,
    max_size=5,
)


@given(MESSAGES)
@settings(max_examples=150, deadline=None)
def test_chat_prompts_are_those_of_transformers(qwen: Path, messages: list[dict]) -> None:
    ours, theirs = _both(qwen)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokens = ours.encode_prompt(messages, chat=True)
    assert tokens.tolist() == expected
    assert tokens.dtype == np.dtype("<i4")


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_plain_text_is_that_of_transformers(qwen: Path, text: str) -> None:
    ours, theirs = _both(qwen)
    expected = theirs(text).input_ids
    assert ours.encode_prompt(text, chat=False).tolist() == expected
    assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)


_LOADED: dict[Path, tuple] = {}


def _both(folder: Path) -> tuple:
    if folder not in _LOADED:
        _LOADED[folder] = TextModel.load(folder), AutoTokenizer.from_pretrained(folder)
    return _LOADED[folder]


def test_a_text_prompt_is_one_user_message(qwen: Path) -> None:
    text = TextModel.load(qwen)
    assert text.has_chat_template
    as_message = text.encode_prompt([{"role": "user", "content": "hello"}], chat=True)
    assert text.encode_prompt("hello", chat=True).tolist() == as_message.tolist()
    assert text.render([{"role": "user", "content": "hello"}]).endswith(
        "user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "<|im_end|>" not in text.decode(as_message)


def test_bos_is_added_where_transformers_adds_it(tmp_path: Path) -> None:
    folder = write_bpe(tmp_path, QWEN, bos=True)
    text, theirs = TextModel.load(folder), AutoTokenizer.from_pretrained(folder)
    prompt = text.encode_prompt("hello", chat=False).tolist()
    assert prompt == theirs("hello").input_ids
    assert prompt[1:] == text.encode("hello").tolist()
    chat = text.encode_prompt("hello", chat=True).tolist()
    messages = [{"role": "user", "content": "hello"}]
    assert chat == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_template_file_and_named_templates(tmp_path: Path) -> None:
    named = write_bpe(tmp_path / "named", QWEN, template=None)
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "d{{ messages[0].content }}"}]
    config = json.loads((named / "tokenizer_config.json").read_text())
    (named / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": templates}))
    assert TextModel.load(named).render([{"role": "user", "content": "x"}]) == "dx"
    (named / "chat_template.jinja").write_text("f{{ messages[0].content }}{{ pad_token }}")
    assert TextModel.load(named).render([{"role": "user", "content": "x"}]) == "fx<|endoftext|>"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [({"eos_token_id": [3, 5]}, {"eos_token_id": 4}, {3, 4, 5}), ({}, {"eos_token_id": 4}, {4}), (None, None, set())],
)
def test_stop_ids_come_from_all_three_files(
    generation: dict | None, config: dict | None, expected: set[int], tmp_path: Path
) -> None:
    folder = write_bpe(tmp_path, QWEN)
    for name, data in (("generation_config.json", generation), ("config.json", config)):
        if data is not None:
            (folder / name).write_text(json.dumps(data))
    text = TextModel.load(folder)
    assert text.eos == Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<|im_end|>")
    assert text.stop_ids == expected | {text.eos}


# --- one token a character -----------------------------------------------------------------------------------------


@given(st.text(alphabet="01+= \nä🙂", max_size=40))
@settings(max_examples=100, deadline=None)
def test_characters_round_trip(characters: Path, text: str) -> None:
    ours, theirs = _both(characters)
    tokens = ours.encode_prompt(text, chat=False)
    assert tokens.shape == (len(text),)
    assert tokens.tolist() == theirs(text).input_ids
    assert ours.decode(tokens) == ours.decode([*tokens, ours.eos]) == text


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("characters")
    save_tokenizer("01+= \nä🙂", folder, context=64)
    return folder


def test_an_unknown_character_is_an_error(characters: Path) -> None:
    text = TextModel.load(characters)
    with pytest.raises(TextError, match=r"'1\+x\?'.*\['\?', 'x'\].*alphabet"):
        text.encode("1+x?")
    with pytest.raises(TextError, match="alphabet"):
        text.encode_prompt("2", chat=False)
    assert text.encode("1<eos>").tolist() == [text.encode("1")[0], text.eos]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_chat_without_a_template(characters: Path) -> None:
    text = TextModel.load(characters)
    assert not text.has_chat_template
    with pytest.raises(ConfigError, match=r"no chat template.*chat = false"):
        text.encode_prompt("1", chat=True)
    with pytest.raises(TextError, match="chat = false, expected a text"):
        text.encode_prompt([{"role": "user", "content": "1"}], chat=False)


def test_a_template_that_refuses_the_messages(qwen: Path) -> None:
    with pytest.raises(TextError, match="unknown role judge"):
        TextModel.load(qwen).encode_prompt([{"role": "judge", "content": "x"}], chat=True)


def test_a_template_cannot_reach_into_python(tmp_path: Path) -> None:
    folder = write_bpe(tmp_path, QWEN, template="{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(TextError, match="refuses"):
        TextModel.load(folder).encode_prompt("x", chat=True)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no tokenizer\.json"):
        TextModel.load(tmp_path / "nowhere")
    folder = write_bpe(tmp_path / "a", QWEN, template="{% if %}")
    with pytest.raises(ConfigError, match="chat template is broken"):
        TextModel.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: not JSON"):
        TextModel.load(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no eos_token_id"):
        TextModel.load(folder)
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer"):
        TextModel.load(folder)


def test_neither_torch_nor_transformers_is_loaded(qwen: Path) -> None:
    code = (
        "import sys; import engine.text, engine.tasks, engine.config;"
        "engine.text.TextModel.load(sys.argv[1]).encode_prompt('hello', chat=True);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(qwen)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs SmolLM2: run tools/smollm2")
def test_smollm2_is_tokenized_as_in_transformers() -> None:
    ours, theirs = _both(SMOLLM2)
    assert ours.stop_ids == {theirs.eos_token_id}
    for content in ("What is 12 + 30?", "  naïve\n\tcode: {x: 1}  ", "日本 🙂 1234567", "<|im_end|> and more"):
        for messages in (
            [{"role": "user", "content": content}],
            [{"role": "system", "content": "s"}, {"role": "user", "content": content}],
        ):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert ours.encode_prompt(messages, chat=True).tolist() == expected
        assert ours.encode_prompt(content, chat=False).tolist() == theirs(content).input_ids
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
