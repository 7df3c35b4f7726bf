"""The layers of Llama, Mistral, Qwen2 and Qwen3 models, run by :mod:`likely.model.layer` on transformers' parameters.

What is recognised is exactly what the named classes of transformers do with linear layers and, over them, plain
adapters of peft. Whatever else a model has (quantised layers, other adapters, other classes, hooks) is left to
transformers' own code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from likely.model import quantized
from likely.model.attention import TriePlan
from likely.model.layer import Angles, AttentionHalf, MlpHalf, Norm, Sight, parameters
from likely.model.linear import Casts, Linear
from likely.model.transfer import to_device
from likely.types import IntArray

# Runs a function of which only the arguments are kept for the backward, where it is run once more.
computed_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
KNOWN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
SILU = {nn.SiLU, type(ACT2FN["silu"])}


class NotRecognisedError(Exception):
    """Some part of a model is not what :mod:`likely.model.layer` computes; the text names it."""


@dataclass(frozen=True)
class Decoder:
    """The layers of one model as its modules were when it was read."""

    backbone: Any
    layers: list[tuple[AttentionHalf, MlpHalf]]

    def same_parameters(self, other: Decoder) -> bool:
        """Whether both compute with the same parameters."""
        return list(map(id, self._parameters())) == list(map(id, other._parameters()))

    def _parameters(self) -> list[Tensor]:
        return parameters(list(chain.from_iterable(half.parts for layer in self.layers for half in layer)))

    def hidden_at(
        self, token_ids_T: Tensor, plan: TriePlan, node_S: IntArray, narrow: Casts, room: int | None
    ) -> Tensor:
        """Final hidden states (S, D) at some nodes, which ascend. The last layer's queries and everything after them
        are computed at these nodes only.

        Args:
            room: bytes that activations may take where a backward is to come; what does not fit is computed again in
                the backward, from the first layer on (activation checkpointing, Chen et al. 2016). None: no limit.
        """
        x = self.backbone.embed_tokens(token_ids_T)
        positions = to_device(plan.position_T, x.device)[None]
        cos, sin = self.backbone.rotary_emb(x[None, :, :1], position_ids=positions)
        angles = Angles(cos[0], sin[0])
        pruned = len(node_S) < len(plan.position_T)
        num_again = self._num_computed_again(plan, narrow.dtype, room) if torch.is_grad_enabled() else 0
        for number, (attention, _) in enumerate(self.layers, start=1):
            if pruned and number == len(self.layers):
                blocks = plan.blocks_of(node_S, attention.window, narrow.dtype)
                sight = Sight(blocks, angles, to_device(node_S, x.device), narrow)
            else:
                sight = Sight(plan.blocks(attention.window, narrow.dtype), angles, None, narrow)
            x = self.layer(number - 1, x, sight, again=number <= num_again)
        hidden: Tensor = self.backbone.norm(x)
        return hidden

    def layer(self, index: int, x_TD: Tensor, sight: Sight, *, again: bool) -> Tensor:
        """The residual stream (S, D) after one layer; with ``again``, only its entry is kept for the backward."""
        return through_layer(*self.layers[index], x_TD, sight, again=again)

    def _num_computed_again(self, plan: TriePlan, dtype: torch.dtype, room: int | None) -> int:
        if room is None:
            return 0
        num_layers, num_nodes = len(self.layers), len(plan.position_T)
        # Layers are alike but for their windows, and those with few keys keep more.
        alike = {attention.window: (attention, mlp) for attention, mlp in self.layers}
        kept = max(
            attention.bytes_kept(num_nodes, plan.blocks(window, dtype), dtype) + mlp.bytes_kept(num_nodes, dtype)
            for window, (attention, mlp) in alike.items()
        )
        entry = self.layers[0][0].bytes_of_entry(num_nodes)
        # Two layers' worth is needed at any time, and the entry of each layer is there in any case.
        fitting = (room - 2 * kept - num_layers * entry) // max(1, kept - entry)
        return num_layers - int(min(max(fitting, 0), num_layers))


def through_layer(attention: AttentionHalf, mlp: MlpHalf, x_TD: Tensor, sight: Sight, *, again: bool) -> Tensor:
    """Both halves of a layer; with ``again``, only the entry is kept for the backward."""

    def run(x: Tensor) -> Tensor:
        return mlp(attention(x, sight), sight)

    out: Tensor = computed_again(run, x_TD) if again else run(x_TD)
    return out


def read_decoder(causal_lm: Any) -> Decoder:
    """Find the parts of a model.

    Raises:
        NotRecognisedError: it has parts that are not exactly those of the known classes.
    """
    name, module = type(causal_lm).__name__, type(causal_lm).__module__
    if name not in KNOWN or not module.startswith("transformers.models."):
        raise NotRecognisedError(f"{name} is not one of {', '.join(sorted(KNOWN))}")
    family = _Family(module, name.removesuffix("ForCausalLM"), causal_lm.config)
    backbone = family.plain(causal_lm.model, "Model")
    return Decoder(
        backbone, [_read_layer(layer, family) for layer in backbone.layers[: family.config.num_hidden_layers]]
    )


@dataclass(frozen=True)
class _Family:
    """The classes that one module of transformers has for a model."""

    module: str
    prefix: str
    config: Any

    def plain(self, module: Any, kind: str) -> Any:
        """The module, if it is of the family's class of that kind and to call it would be to run the class's own code.

        Raises:
            NotRecognisedError: it would not.
        """
        if (type(module).__module__, type(module).__name__) != (self.module, self.prefix + kind):
            raise NotRecognisedError(f"it has a {type(module).__name__}")
        return _unwatched(module)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody else's code runs when the module is called, or when its gradient is."""
    return any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in module.__dict__


def _unwatched(module: Any) -> Any:
    own = type(module).forward.__module__ == type(module).__module__
    if not own or has_hooks(module):
        raise NotRecognisedError(f"its {type(module).__name__} has hooks or another forward")
    return module


def _read_layer(layer: Any, family: _Family) -> tuple[AttentionHalf, MlpHalf]:
    family.plain(layer, "DecoderLayer")
    return _read_halves(layer, family)


def reader_of_layers(causal_lm: Any) -> Callable[[Any], tuple[AttentionHalf, MlpHalf]]:
    """Reads the halves of a layer of a model that :func:`read_decoder` knows, and that was sharded since then: its
    parameters are others each time that they are gathered."""
    name = type(causal_lm).__name__
    family = _Family(type(causal_lm).__module__, name.removesuffix("ForCausalLM"), causal_lm.config)
    return partial(_read_halves, family=family)


def _read_halves(layer: Any, family: _Family) -> tuple[AttentionHalf, MlpHalf]:
    attention, mlp = family.plain(layer.self_attn, "Attention"), family.plain(layer.mlp, "MLP")
    if type(mlp.act_fn) not in SILU or has_hooks(mlp.act_fn):
        raise NotRecognisedError(f"its activation is {type(mlp.act_fn).__name__}")
    if attention.training and attention.attention_dropout:
        raise NotRecognisedError("its attention has dropout")
    own_window = getattr(family.config, "sliding_window", None) if family.prefix == "Mistral" else None
    window = getattr(attention, "sliding_window", own_window)
    q, k, v, o = (_read_linear(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    gate, up, down = (_read_linear(getattr(mlp, name)) for name in ("gate_proj", "up_proj", "down_proj"))
    q_norm, k_norm = (
        _read_norm(getattr(attention, name), family) if hasattr(attention, name) else None
        for name in ("q_norm", "k_norm")
    )
    return (
        AttentionHalf(
            _read_norm(layer.input_layernorm, family),
            *(q, k, v, o),
            attention.head_dim,
            attention.scaling,
            window,
            q_norm,
            k_norm,
        ),
        MlpHalf(_read_norm(layer.post_attention_layernorm, family), gate, up, down),
    )


def _read_norm(module: Any, family: _Family) -> Norm:
    family.plain(module, "RMSNorm")
    return Norm(_in_memory(module.weight), module.variance_epsilon)


def _read_linear(module: Any) -> Linear:
    if type(module) is nn.Linear or quantized.is_linear(module):
        return Linear(*_read_plain(module))
    if type(module) is not LoraLinear and not quantized.has_adapter(module):
        raise NotRecognisedError(f"it has a {type(module).__name__}")
    weight, bias = _read_plain(_unwatched(module).base_layer)
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged or module.disable_adapters or not active:
        return Linear(weight, bias)
    if len(active) > 1 or module.lora_variant or module.lora_bias.get(active[0]):
        raise NotRecognisedError("it has adapters of another kind than plain LoRA")
    if has_hooks(dropout := module.lora_dropout[active[0]]) or (dropout.training and getattr(dropout, "p", 0)):
        raise NotRecognisedError("its adapters have dropout")
    (a, _), (b, _) = (_read_plain(factors[active[0]]) for factors in (module.lora_A, module.lora_B))
    return Linear(weight, bias, a, b, module.scaling[active[0]])


def _read_plain(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a plain linear layer."""
    if type(module) is not nn.Linear and not quantized.is_linear(module):
        raise NotRecognisedError(f"it has a {type(module).__name__}")
    _unwatched(module)
    return _in_memory(module.weight), None if module.bias is None else _in_memory(module.bias)


def _in_memory(weight: Tensor) -> Tensor:
    """The weight, if it is no distributed one, or quantised in another way, that only looks like a tensor."""
    if type(weight) not in {nn.Parameter, Tensor} and not quantized.is_packed(weight):
        raise NotRecognisedError(f"it has a weight that is a {type(weight).__name__}")
    return weight
