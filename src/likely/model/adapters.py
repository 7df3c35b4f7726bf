"""Low-rank adapters (LoRA, Hu et al. 2021) by peft."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model


def add_lora(network: Any, *, rank: int, alpha: float | None, seed: int) -> Any:
    """The network with trainable adapters on every linear layer but the head; it still computes what it did before.

    Args:
        alpha: the adapters' product is scaled by alpha / rank; 2 x rank where None.
        seed: of the adapters' first factor; the second one starts at zero.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,
        # Dropout would break the sharing of prefixes: the same context would have several hidden states.
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=type(network).__name__.startswith("GPT2"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still uses names that transformers is leaving
        return get_peft_model(network, config)


def draw_lora_again(network: Any, *, seed: int) -> None:
    """New adapters in the place of those of :func:`add_lora`, as that draws them with this seed."""
    (name,) = network.peft_config
    settings = network.peft_config[name]
    torch.manual_seed(seed)
    network.delete_adapter(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as above
        network.add_adapter(name, settings)
    network.set_adapter(name)
    network.eval()
