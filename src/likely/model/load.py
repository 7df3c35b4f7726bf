"""Names -> models, and models -> folders that transformers and peft load without us."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from likely.errors import ModelError, NonFiniteError, first_line
from likely.model.adapters import add_lora
from likely.model.forward import LanguageModel, connect
from likely.model.place import Place, find_model, quiet_transformers


def read_network(place: Place, *, dtype: torch.dtype, trainable: bool = False) -> Any:
    """The transformers model at a place, with its adapter if there is one.

    Raises:
        ModelError: the files can't be read, are not safetensors, or leave some weight without a value.
    """
    quiet_transformers()
    try:
        network, info = transformers.AutoModelForCausalLM.from_pretrained(
            place.weights, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise ModelError(f"can't be loaded: {first_line(error)}", place=place.weights) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))
        raise ModelError(
            f"{len(missing)} weights have no value in the files, the first is {missing[0]}",
            place=place.weights,
            way_out="name a folder with complete causal language model weights",
        )
    network.config.use_cache = True
    if place.adapter is None:
        return network
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft still uses names that transformers is leaving
            return PeftModel.from_pretrained(network, place.adapter, is_trainable=trainable)
    except Exception as error:
        raise ModelError(f"the adapter can't be loaded: {first_line(error)}", place=place.adapter) from error


def load_model(
    name: str, *, compute_dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> LanguageModel:
    """The model of a name in float32 weights, ready to be scored."""
    network = read_network(find_model(name), dtype=torch.float32).to(device or best_device())
    return connect(network, name, compute_dtype=compute_dtype)


@dataclass(frozen=True)
class Tuning:
    """What is trained: all weights (``lora_rank`` None), or adapters of that rank."""

    lora_rank: int | None = None
    lora_alpha: float | None = None
    seed: int = 0


def load_for_training(
    name: str, tuning: Tuning, *, compute_dtype: torch.dtype, device: torch.device | None = None
) -> LanguageModel:
    """The model of a name with float32 master weights and something to train.

    Raises:
        ModelError: full tuning of an adapter, which would leave its base behind.
    """
    place = find_model(name)
    network = read_network(place, dtype=torch.float32, trainable=True)
    if tuning.lora_rank is not None and place.adapter is None:
        network = add_lora(network, rank=tuning.lora_rank, alpha=tuning.lora_alpha, seed=tuning.seed)
    elif tuning.lora_rank is None and place.adapter is not None:
        raise ModelError(
            "this is an adapter, and full tuning trains all weights", place=name, way_out="use --tune lora"
        )
    network = network.to(device or best_device())
    return connect(network, name, compute_dtype=compute_dtype)


def load_for_resuming(
    name: str, saved: Path, *, compute_dtype: torch.dtype, device: torch.device | None = None
) -> LanguageModel:
    """The model that a training of ``name`` had saved in a folder, with float32 master weights and the same things to
    train."""
    place = Place(str(saved))
    if (saved / "adapter_config.json").is_file():
        place = Place(find_model(name).weights, str(saved))
    network = read_network(place, dtype=torch.float32, trainable=True).to(device or best_device())
    return connect(network, name, compute_dtype=compute_dtype)


def save_model(model: LanguageModel, tokenizer: Any, folder: Path) -> None:
    """The weights, or the adapter alone, with the tokenizer and its template, as files of transformers or peft.

    Raises:
        NonFiniteError: a weight is NaN or infinite; nothing is written.
    """
    broken = next((name for name, p in model.network.named_parameters() if not p.isfinite().all()), None)
    if broken:
        raise NonFiniteError(f"the weight {broken} is not finite", way_out="lower --learning-rate; nothing was saved")
    with model.as_transformers_runs_it() as network:
        if isinstance(network, PeftModel):
            # "auto" would ask the hub whether the base's vocabulary was resized.
            network.save_pretrained(folder, save_embedding_layers=False)
        else:
            network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bytes_to_save(model: LanguageModel) -> int:
    """Bytes on disk of one checkpoint (weights or adapter, and AdamW's two moments) and of the tuned model."""
    parameters = list(model.network.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    saved = trainable if isinstance(model.network, PeftModel) else sum(p.numel() for p in parameters)
    return int(4 * (2 * saved + 2 * trainable))


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies it in hardware, else float32."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32
