"""Tokenizers as GGUF knows them: recognised by how they split text, and proved by whoever reads the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.tokenization_llama import LlamaTokenizer

import likely
from chatml import SENTENCES
from likely.errors import ModelError
from likely.exports import readers
from likely.exports.gguf_file import write_gguf
from likely.exports.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary
from test_cli import write_rows

pytest.importorskip("gguf", reason="the extra gguf is not installed")

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
TEXT = "I'm 12345 years old, they've said:\n\n  über 3.14 東京!"


def byte_level(*before: Any, use_regex: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that splits text so, with merges that care: of digits, and across words."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, TEXT, "12345 12345", "123", "they've they've"], trainer)
    tokenizer.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")  # noqa: S106  (no password)


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


@pytest.mark.parametrize(
    ("before", "use_regex", "pre"),
    [
        ([], True, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True)], True, "smollm"),
        ([split(LLAMA_3)], False, "llama-bpe"),
        ([split(QWEN_2)], False, "qwen2"),
    ],
)
def test_ways_to_split_text(tmp_path: Path, before: list[Any], use_regex: bool, pre: str) -> None:
    tokenizer = byte_level(*before, use_regex=use_regex)
    size = len(tokenizer) + 2
    found = read_vocabulary(tokenizer, size)
    assert (found.model, found.pre) == ("gpt2", pre)
    assert found.types[0] == CONTROL
    assert found.types[-3:] == [USER_DEFINED, UNUSED, UNUSED]
    assert found.types[1] == NORMAL
    # And the reader of the file splits it so too.
    config = transformers.Qwen2Config(
        vocab_size=size, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(config)
    file = tmp_path / "model.gguf"
    write_gguf(file, network, tokenizer, kind="f32", name="x", stop_id=0, begins=False)
    encode = readers.read_gguf(file).encode
    for text in (TEXT, "12345", "a<think>b<|end|>c", "they've  \n"):
        assert encode(text) == tokenizer(text).input_ids, text


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(split(r"\w+|\s+"), use_regex=False),
        byte_level(pre_tokenizers.Digits(individual_digits=False), use_regex=True),
        byte_level(pre_tokenizers.Punctuation(), use_regex=True),
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))),  # noqa: S106
    ],
    ids=["pattern", "digits", "punctuation", "words"],
)
def test_what_gguf_has_no_words_for(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="GGUF has no words"):
        read_vocabulary(tokenizer, len(tokenizer))


def test_a_vocabulary_that_is_too_small() -> None:
    tokenizer = byte_level(use_regex=True)
    with pytest.raises(ModelError, match="vocabulary has 5 tokens"):
        read_vocabulary(tokenizer, 5)


@pytest.fixture(scope="module")
def sentencepiece() -> LlamaTokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([s.replace("\n", " ") for s in SENTENCES], trainer)
    spec = json.loads(tokenizer.to_str())["model"]
    made = LlamaTokenizer(vocab=spec["vocab"], merges=[tuple(pair) for pair in spec["merges"]])
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    return made


def test_sentencepiece(tmp_path: Path, sentencepiece: Any) -> None:
    config = transformers.LlamaConfig(
        vocab_size=len(sentencepiece), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    sentencepiece.save_pretrained(tmp_path / "base")
    rows = [("Capital of France?", "Paris."), ("2 + 2?", "It is 4, 東京 🙂")]
    data = str(write_rows(tmp_path / "d.jsonl", *[{"prompt": q, "completion": a} for q, a in rows]))
    run = likely.train(
        model=str(tmp_path / "base"), data=data, eval_data=data, output=str(tmp_path / "run"), steps=1, dtype="float32"
    )
    found = read_vocabulary(sentencepiece, len(sentencepiece))
    assert found.model == "llama"
    assert found.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    if readers.has_llama_cpp():
        pytest.skip("llama.cpp puts a blank behind a first token, where training puts none")
    report = likely.export(run=str(run.folder), to="gguf", output=str(tmp_path / "out"), type="f32")
    assert report["stop_tokens"] == ["</s>"]
    assert report["texts"] == 12
