"""Tiny models and tokenizers, built in place from seeds: no test reads the network or a file it did not write."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import browser as browsing
from chatml import CHATML, SENTENCES
from likely.model.forward import LanguageModel, connect
from likely.types import ROLES, Example, Source
from naive import Row
from reported import Finished, train_and_look

torch.set_num_threads(1)  # the models are too small for a second thread to pay for itself

VOCABULARY = 67
MAX_LENGTH = 64

# Weights far from zero: with the usual 0.02 attention is nearly uniform and a wrong mask would hardly show.
SPREAD = 0.2

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": SPREAD,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_GPT_SHAPE = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": MAX_LENGTH,
    "initializer_range": SPREAD,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_BLOOM_SHAPE = {k: _GPT_SHAPE[k] for k in ("vocab_size", "n_layer", "n_head", "initializer_range")}
_ROPE = {"rope_theta": 10000.0, "factor": 4.0}
_GEMMA2 = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    # Low enough that both caps bend the scores of these weights.
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    # sdpa has no soft cap, so transformers' own eager attention is the reference.
    "attn_implementation": "eager",
}

_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "first_k_dense_replace": 2,  # of two layers, so that there are no experts
}

# name -> (transformers config class, its arguments)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SHAPE),
    "llama-tied": ("LlamaConfig", _SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _SHAPE | {"head_dim": 8}),
    "gpt2": ("GPT2Config", _GPT_SHAPE),
    "mistral-window": ("MistralConfig", _SHAPE | {"sliding_window": 4}),
    # One layer with full attention and one with a window.
    "qwen2-window": ("Qwen2Config", _SHAPE | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "gemma2": ("Gemma2Config", _SHAPE | _GEMMA2),
    # A head with a bias, one that multiplies its logits and one that divides them.
    "phi-head-bias": ("PhiConfig", _SHAPE | {"num_key_value_heads": 4}),
    "cohere-logit-scale": ("CohereConfig", _SHAPE | {"logit_scale": 0.25}),
    "granite-logits-scaling": ("GraniteConfig", _SHAPE | {"logits_scaling": 3.0, "attention_multiplier": 0.2}),
    # Values that are narrower, or wider, than keys.
    "deepseek3-narrow-values": ("DeepseekV3Config", _SHAPE | _LATENT | {"v_head_dim": 7}),
    "deepseek3-wide-values": ("DeepseekV3Config", _SHAPE | _LATENT | {"v_head_dim": 14}),
    # Frequencies that depend on the longest sequence of a forward, once that is longer than 16.
    "llama-dynamic-rope": (
        "LlamaConfig",
        _SHAPE | {"max_position_embeddings": 16, "rope_parameters": _ROPE | {"rope_type": "dynamic"}},
    ),
    "phi3-longrope": (
        "Phi3Config",
        _SHAPE
        | {"original_max_position_embeddings": 16}
        | {"rope_parameters": _ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}},
    ),
    # A window that stands in the mask only: the attention function is not told. Its experts need float32, so none here.
    "qwen2moe-window-in-mask": (
        "Qwen2MoeConfig",
        _SHAPE | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "mlp_only_layers": [0, 1]},
    ),
    # Positions that don't come from position_ids, so that branches can't be shared.
    "bloom": ("BloomConfig", _BLOOM_SHAPE | {"hidden_size": 32, "bos_token_id": 0, "eos_token_id": 1}),
}


@dataclass(frozen=True)
class Twin:
    """A model of the package, and a plain transformers copy of it in float64 made before anything was plugged in."""

    name: str
    model: LanguageModel
    reference: Any


def build_network(name: str) -> Any:
    """A transformers model of one of the ARCHITECTURES, in float32; the same weights each time."""
    config_class, arguments = ARCHITECTURES[name]
    torch.manual_seed(20)
    network = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments)).eval()
    for parameter in network.parameters():
        # Biases start at zero and norm gains at one, where a mistake in them would not show.
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


@cache
def _twin(name: str, dtype: torch.dtype) -> Twin:
    network = build_network(name)
    reference = copy.deepcopy(network).double()
    model = connect(network.to(dtype), name, compute_dtype=dtype)
    return Twin(name, model, reference)


def _make_examples(rows: list[Row]) -> list[Example]:
    return [
        Example(
            np.array(ids, np.int64),
            np.array(weights, np.float64),
            np.full(len(ids), ROLES.index("assistant"), np.int8),
            Source("family.jsonl", line),
        )
        for line, (ids, weights) in enumerate(rows, start=1)
    ]


@pytest.fixture(scope="session")
def twin_of() -> Callable[[str, torch.dtype], Twin]:
    """``twin_of(name, dtype)``: the model of that architecture and its reference; the same object each time."""
    return _twin


@pytest.fixture(scope="session")
def make_network() -> Callable[[str], Any]:
    """``make_network(name)``: a fresh transformers model for tests that change it."""
    return build_network


@pytest.fixture(scope="session")
def make_examples() -> Callable[[list[Row]], list[Example]]:
    """Plain lists of token ids and weights -> examples."""
    return _make_examples


def _build_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that every string has tokens and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",  # noqa: S106 - no password
        bos_token="<|im_start|>",  # noqa: S106
        # The end of a turn doubles as padding, as in many chat models: a mask by token id would hide it from the loss.
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|im_end|>",  # noqa: S106
        chat_template=chat_template,
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A ChatML tokenizer whose padding token is its end of turn."""
    return _build_tokenizer(CHATML)


@pytest.fixture(scope="session")
def base_tokenizer() -> PreTrainedTokenizerFast:
    """The same vocabulary without a chat template."""
    return _build_tokenizer(None)


def _make_model_dir(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = _SHAPE | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    torch.manual_seed(21)
    AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PreTrainedTokenizerFast], Path]:
    """``make_model_dir(tokenizer)``: a new Hugging Face folder with a tiny Llama of that vocabulary."""
    return lambda tokenizer: _make_model_dir(tokenizer, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_model_dir(
    make_model_dir: Callable[[PreTrainedTokenizerFast], Path], chat_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A Hugging Face folder with a tiny Llama and the chat tokenizer. All tests share it: read it, don't write it."""
    return make_model_dir(chat_tokenizer)


@pytest.fixture(scope="module")
def chromium() -> Iterator[browsing.Browser]:
    """One process for the tests of a file."""
    if browsing.CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with browsing.running() as running:
        yield running


@pytest.fixture
def browser(chromium: browsing.Browser) -> Iterator[browsing.Browser]:
    """``browser.visit(file or URL)``: a page in a fresh profile, closed after the test."""
    yield chromium
    chromium.close_pages()


@pytest.fixture(scope="session")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run with everything in its report. All tests share it: read it, don't write it."""
    return train_and_look(tiny_model_dir, tmp_path_factory.mktemp("reported"))
