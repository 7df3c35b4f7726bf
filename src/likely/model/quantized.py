"""A frozen base in four bits (QLoRA, Dettmers et al. 2023) by bitsandbytes.

The base that is trained on, scored and reported is the quantised one: its likelihood differs from that of the weights
in the files. So an adapter remembers what its base was in, and is loaded on the same again.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from likely.errors import ConfigError

NF4 = "nf4"  # 4-bit normal float, its scales quantised once more


def quantization_config() -> Any:
    """What transformers loads linear layers with, so that each is put into four bits as it is read.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("a base in four bits needs bitsandbytes", way_out="pip install 'likely[qlora]', or use lora")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=NF4,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,  # autocast narrows the products of a step, and those of no score
    )


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter's numbers lie two in a byte, beside their scales."""
    return hasattr(parameter, "quant_state")


def is_quantized(network: nn.Module) -> bool:
    return any(map(is_packed, network.parameters()))


def shape_of(parameter: Tensor) -> torch.Size:
    """Shape of the numbers that a parameter stands for."""
    return torch.Size(parameter.quant_state.shape) if is_packed(parameter) else parameter.shape  # type: ignore[attr-defined]


def numbers(packed: Any, dtype: torch.dtype) -> Tensor:
    """The numbers that four bits hold."""
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415  (an extra)

    return dequantize_4bit(packed.data, packed.quant_state).to(dtype)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer in four bits, and no other class that behaves otherwise."""
    return _is(module, "bitsandbytes.nn", "Linear4bit")


def has_adapter(module: nn.Module) -> bool:
    """The same with peft's adapter around it."""
    return _is(module, "peft.tuners.lora.bnb", "Linear4bit")


def _is(module: nn.Module, place: str, name: str) -> bool:
    home = sys.modules.get(place)  # without which there is none
    return home is not None and type(module) is getattr(home, name, None)


def keep_layout(network: nn.Module) -> None:
    """Forbid bitsandbytes to lay weights out anew for inference on a CPU, at the first input without gradient: products
    with that layout have no backward, and a model in evaluation mode is trained here."""
    for module in network.modules():
        if is_linear(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
