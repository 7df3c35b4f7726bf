"""The shapes that config.json asks for, compared with those of the files without torch, for the classes whose layers
the package computes itself. Other classes, and files with other names, are judged when transformers builds the network.

What a setting is that config.json leaves out is transformers' to say, so its config class is asked, and the formulas
are those of its modules; tests/test_weight_shapes.py compares both with networks that it builds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from likely.errors import ModelError
from likely.model.headers import Stored

# What older versions of transformers wrote beside the weights and newer ones compute: frequencies, causal masks and the
# value under them (which is infinite in float16), positions. transformers itself knows only some of them.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|(attn|attention)\.(masked_)?bias$|position_ids$")

Axis = tuple[str, ...]  # a side of a tensor: the settings whose product it is
Axes = tuple[Axis, ...]

_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,8})\.")
_HIDDEN: Axis = ("hidden_size",)
_TABLE: Axes = (("vocab_size",), _HIDDEN)
_INNER: Axis = ("intermediate_size",)
_QUERIES: Axis = ("num_attention_heads", "head_dim")
_KEYS: Axis = ("num_key_value_heads", "head_dim")
_ENDS: dict[str, Axes] = {
    "model.embed_tokens.weight": _TABLE,
    "model.norm.weight": (_HIDDEN,),
    "lm_head.weight": _TABLE,
}
_NORMS: dict[str, Axes] = {"input_layernorm.weight": (_HIDDEN,), "post_attention_layernorm.weight": (_HIDDEN,)}
_HEAD_NORMS: dict[str, Axes] = {
    "self_attn.q_norm.weight": (("head_dim",),),
    "self_attn.k_norm.weight": (("head_dim",),),
}
_LINEAR: dict[str, tuple[Axis, Axis]] = {  # outputs, inputs
    "self_attn.q_proj": (_QUERIES, _HIDDEN),
    "self_attn.k_proj": (_KEYS, _HIDDEN),
    "self_attn.v_proj": (_KEYS, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _QUERIES),
    "mlp.gate_proj": (_INNER, _HIDDEN),
    "mlp.up_proj": (_INNER, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _INNER),
}
_ATTENTION, _MLP = list(_LINEAR)[:4], list(_LINEAR)[4:]


@dataclass(frozen=True)
class _Family:
    """``biases``: linear layer -> the setting that gives it a bias; None, it always has one."""

    biases: Mapping[str, str | None]
    head_norms: bool = False

    def parts(self) -> dict[str, Axes]:
        """Every tensor that a layer may have."""
        weights: dict[str, Axes] = {f"{name}.weight": axes for name, axes in _LINEAR.items()}
        biases: dict[str, Axes] = {f"{name}.bias": _LINEAR[name][:1] for name in self.biases}
        return _NORMS | weights | biases | (_HEAD_NORMS if self.head_norms else {})

    def switch_of(self, part: str) -> str | None:
        """The setting that decides whether layers have a part; None for what they always have."""
        return self.biases.get(part.removesuffix(".bias")) if part.endswith(".bias") else None


FAMILIES = {
    "llama": _Family(dict.fromkeys(_ATTENTION, "attention_bias") | dict.fromkeys(_MLP, "mlp_bias")),
    "mistral": _Family({}),
    "qwen2": _Family(dict.fromkeys(_ATTENTION[:3])),
    "qwen3": _Family(dict.fromkeys(_ATTENTION, "attention_bias"), head_norms=True),
}


_KNOWN = set[str]().union(*(family.parts() for family in FAMILIES.values()))


def check_shapes(config: Any, tensors: Mapping[str, Stored]) -> None:
    """Refuse a config that is not that of the weights.

    Args:
        config: as transformers reads config.json, so that its defaults are there.

    Raises:
        ModelError: a tensor has another shape than config.json asks for, is missing, or has no place.
    """
    family = FAMILIES.get(str(getattr(config, "model_type", "")))
    found = {name: tensor for name, tensor in tensors.items() if not HARMLESS.search(name)}
    # Fused or packed weights, or those of the bare backbone, have other names, and loading may know how to read them.
    if not family or not found or not all(name in _ENDS or _place_of(name)[1] in _KNOWN for name in found):
        return
    place = str(next(iter(found.values())).file.parent / "config.json")
    sizes = _sizes(config, place)
    num_layers = 1 + max(_place_of(name)[0] for name in found)
    wanted = dict(_wanted(family, config, num_layers))
    for name, axes in wanted.items():
        if name in found and found[name].shape != tuple(prod(sizes[key] for key in axis) for axis in axes):
            asked = ", ".join(" x ".join(f"{key} {sizes[key]}" for key in axis) for axis in axes)
            raise _refuse(f"{name} has shape {list(found[name].shape)}, and config.json asks for [{asked}]", place)
    either = {"model.embed_tokens.weight", "lm_head.weight"} if config.tie_word_embeddings else set[str]()
    for name in [*wanted, *found]:
        if (name in wanted) == (name in found) or name in either:
            continue
        number, part = _place_of(name)
        setting = family.switch_of(part) or ("tie_word_embeddings" if name == "lm_head.weight" else "model_type")
        if number >= min(num_layers, config.num_hidden_layers):
            setting = "num_hidden_layers"
        why = f"of config.json, where {setting} is {_written(getattr(config, setting))}"
        what = "is missing in the files for the model" if name in wanted else "has no place in the model"
        raise _refuse(f"{name} {what} {why}", place)


def _place_of(name: str) -> tuple[int, str]:
    """The number of a tensor's layer and its name there; -1 and nothing for those of no layer."""
    layer = _LAYER.match(name)
    return (int(layer[1]), name[layer.end() :]) if layer else (-1, "")


def _wanted(family: _Family, config: Any, num_stored: int) -> Iterator[tuple[str, Axes]]:
    yield from _ENDS.items()
    switches = [(part, axes, family.switch_of(part)) for part, axes in family.parts().items()]
    parts = {part: axes for part, axes, switch in switches if switch is None or getattr(config, switch)}
    # One layer more than the files have is enough to miss some.
    for number in range(min(config.num_hidden_layers, num_stored + 1)):
        yield from ((f"model.layers.{number}.{part}", axes) for part, axes in parts.items())


def _sizes(config: Any, place: str) -> dict[str, int]:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = {key: getattr(config, key) for key in keys}
    # As the attention modules read it: Mistral's takes 0 for none, and Qwen2's config has it only where a file sets it.
    missing = config.hidden_size // (config.num_attention_heads or 1)
    sizes["head_dim"] = getattr(config, "head_dim", missing)
    if config.model_type == "mistral":
        sizes["head_dim"] = sizes["head_dim"] or missing
    for key, size in sizes.items():
        if type(size) is not int or size < 0:
            raise _refuse(f"{key} is {_written(size)}", place)
    padding = config.pad_token_id
    if padding is not None and not -sizes["vocab_size"] <= padding < sizes["vocab_size"]:
        raise _refuse(f"pad_token_id is {padding}, outside the vocabulary of {sizes['vocab_size']}", place)
    return sizes


def _written(value: Any) -> str:
    """As it stands in config.json."""
    return json.dumps(value, default=str)[:40]


def _refuse(message: str, place: str) -> ModelError:
    return ModelError(message, place=place, way_out="use the config that belongs to the weights")
