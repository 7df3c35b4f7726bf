"""A network and its tokenizer as one GGUF file, tensor by tensor, by the library ``gguf``.

Names, keys and the order of rows are llama.cpp's (its convert_hf_to_gguf.py). Only families that are known are written;
that a file means the same model is not believed but scored (:mod:`likely.exports.fidelity`).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from likely.errors import ModelError
from likely.exports.stored import Digests, of_array, of_value
from likely.exports.vocabulary import Vocabulary, read_vocabulary

Array = npt.NDArray[Any]
KINDS = ("f32", "f16", "bf16", "q8_0")
INSTALL = "pip install 'likely[gguf]'"


@dataclass(frozen=True)
class _Family:
    """``architecture`` is GGUF's name. ``interleaved``: rotary embeddings turn neighbours, where transformers turns the
    halves of a head, so that the rows of queries and keys stand in another order. ``transposed``: names of weights that
    transformers keeps as (in, out)."""

    architecture: str
    interleaved: bool = False
    transposed: tuple[str, ...] = ()


FAMILIES = {
    "llama": _Family("llama", interleaved=True),
    "mistral": _Family("llama", interleaved=True),
    "qwen2": _Family("qwen2"),
    "qwen3": _Family("qwen3"),
    "gpt2": _Family("gpt2", transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight")),
}


def check_family(config: Any) -> _Family:
    """The family of a transformers config.

    Raises:
        ModelError: no such file can be written, or not by us; ``gguf`` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("GGUF files need the package gguf", way_out=INSTALL)
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"no GGUF file can be written of the architecture {config.model_type}",
            way_out=f"use --to merged (known here: {known})",
        )
    windows = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if windows or (config.model_type == "mistral" and config.sliding_window):
        raise ModelError(
            f"GGUF's {family.architecture} has no sliding window, and this model has one",
            way_out="use --to merged",
        )
    return family


def write_gguf(
    file: Path, network: Any, tokenizer: Any, *, kind: str, name: str, stop_id: int, begins: bool
) -> Digests:
    """Write a network with float32 weights; the digests of all that the file is to hold, as :func:`digests` reads it.

    Args:
        kind: how matrices are stored, one of :data:`KINDS`; vectors are float32 in any case.
        stop_id: the token that ends a turn; the file names it beside the end-of-text token.
        begins: whether text begins with the tokenizer's first token.

    Raises:
        ModelError: an architecture or a tokenizer that GGUF, or we, have no words for.
    """
    import gguf  # noqa: PLC0415  (an extra)

    config = network.config
    family = check_family(config)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)
    types = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
    wanted = gguf.GGMLQuantizationType[types[kind]]
    files = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer = gguf.GGUFWriter(None, family.architecture)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[files[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_vocabulary(writer, vocabulary, tokenizer, stop_id, begins)
    plan = list(_plan(network, family, wanted))
    for title, _, shape, stored in plan:
        size = gguf.quants.quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(title, size, np.dtype(np.uint8), math.prod(size), raw_dtype=stored)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        told = {f"the key {key}": value.value for part in writer.kv_data for key, value in part.items()}
        digests = {key: of_value(value) for key, value in told.items()}
        for title, values, shape, stored in plan:
            rows = np.ascontiguousarray(gguf.quants.quantize(np.ascontiguousarray(values(), np.float32), stored))
            writer.write_tensor_data(rows)
            digests[f"the tensor {title}"] = _of_tensor(rows, shape, stored)
    finally:
        writer.close()
    return digests


def read_digests(file: Path) -> Digests:
    """What a GGUF file holds, by the library that the format comes with."""
    import gguf  # noqa: PLC0415  (an extra)

    reader = gguf.GGUFReader(file)
    found = {
        f"the key {name}": of_value(field.contents())
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")  # the reader's own words for version and counts
    }
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found[f"the tensor {tensor.name}"] = _of_tensor(tensor.data, shape, tensor.tensor_type)
    return found


def _of_tensor(rows: Array, shape: tuple[int, ...], stored: Any) -> str:
    return of_array(np.ascontiguousarray(rows).view(np.uint8).reshape(-1), shape, stored.name)


def _plan(network: Any, family: _Family, wanted: Any) -> Iterator[tuple[str, Any, tuple[int, ...], Any]]:
    """``(name, how to get its values, shape, type)`` of every tensor; the values are made when they are written."""
    import gguf  # noqa: PLC0415  (an extra)

    config = network.config
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[family.architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    float32, half = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
    factors = rope_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", lambda: factors, factors.shape, float32
    for own, parameter in network.named_parameters():
        title = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if title is None:
            raise ModelError(f"GGUF has no name for the weight {own} of {config.model_type}", way_out="use --to merged")
        turned = own.endswith(family.transposed) if family.transposed else False
        shape = tuple(parameter.shape)[::-1] if turned else tuple(parameter.shape)
        stored = wanted if len(shape) > 1 else float32
        if shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
            stored = half
        # Positions are added to tokens, and llama.cpp adds no narrow numbers.
        stored = float32 if title.startswith("position_embd") else stored
        yield title, lambda p=parameter, o=own, t=turned: _values(p, o, t, family, config), shape, stored


def _values(parameter: Any, own: str, turned: bool, family: _Family, config: Any) -> Array:
    values: Array = parameter.detach().float().cpu().numpy()
    if turned:
        return values.T
    if family.interleaved and (".q_proj." in own or ".k_proj." in own):
        heads = config.num_attention_heads if ".q_proj." in own else config.num_key_value_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    return values


def _add_shape(writer: Any, config: Any) -> None:
    """Everything of the config that the file states."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope_parameters(config)["rope_theta"])


def rope_parameters(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def rope_factors(config: Any) -> Array | None:
    """By what each frequency of Llama 3's rotary embeddings is divided, (head / 2,); None of plain ones.

    Source: Llama 3.1's ``apply_scaling``, as in transformers' ``_compute_llama3_parameters``.

    Raises:
        ModelError: rotary embeddings scaled in another way.
    """
    rope = rope_parameters(config)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"no GGUF file can be written of rotary embeddings of type {kind}", way_out="use --to merged")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head, 2) / head)
    turns = rope["original_max_position_embeddings"] / lengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clip(0, 1)
    factors: Array = (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)
    return factors


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: Any, stop_id: int, begins: bool) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    else:
        writer.add_token_merges(vocabulary.merges)
    for key, value in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    for add, token_id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id if tokenizer.eos_token_id is not None else stop_id),
        (writer.add_eot_token_id, stop_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template is not None:
        writer.add_chat_template(template)
