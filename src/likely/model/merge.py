"""A tuned model as one network: its adapter merged into the base, in float32, by peft."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers.pytorch_utils import Conv1D

from likely.errors import ModelError, first_line
from likely.model.load import read_network
from likely.model.place import Place
from likely.model.untrusted import check_model

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def merged_network(place: Place) -> Any:
    """The transformers model at a place with float32 weights, with no adapter beside them.

    Raises:
        ModelError: the adapter is of a kind that can't be merged, or what comes out is not finite.
    """
    network = read_network(place, dtype=torch.float32, expanded=True)
    if not isinstance(network, PeftModel):
        return network
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft still uses names that transformers is leaving
            merged = network.merge_and_unload(safe_merge=True)
    except Exception as error:  # each kind of adapter has its own reasons
        raise ModelError(
            f"the adapter can't be merged: {first_line(error)}", place=str(place.adapter), way_out="use --to adapter"
        ) from error
    _turn_back(merged)
    merged.name_or_path = merged.config.name_or_path = place.weights
    return merged


def _turn_back(network: Any) -> None:
    """GPT-2's layers keep (in, out). In four bits, and expanded from them, they are linear layers of (out, in), which
    no reader of this architecture expects."""
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(network.config, trust_remote_code=False)
    for name, wanted in skeleton.named_modules():
        found = network.get_submodule(name)
        if isinstance(wanted, Conv1D) and isinstance(found, torch.nn.Linear):
            turned = Conv1D(found.out_features, found.in_features)
            turned.weight = torch.nn.Parameter(found.weight.detach().T.contiguous())
            turned.bias = found.bias
            network.set_submodule(name, turned)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that most of a model folder's numbers are stored in."""
    counts: Counter[str] = Counter()
    for tensor in check_model(folder).values():
        counts[tensor.dtype] += tensor.num_elements
    return _DTYPES.get(max(counts, key=lambda name: counts[name]), torch.float32) if counts else torch.float32


def save_merged(network: Any, tokenizer: Any, folder: Path, *, dtype: torch.dtype, stop_ids: list[int]) -> None:
    """Write a Hugging Face folder. ``stop_ids`` are the tokens that generation stops at."""
    network = network.to(dtype)
    network.config.dtype = dtype
    network.generation_config.eos_token_id = stop_ids
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
