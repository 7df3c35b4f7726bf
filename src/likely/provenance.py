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
from likely.model.forward import LanguageModel
from likely.model.place import Place
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
    template = tokenizer.chat_template
    parameters = list(model.network.parameters())
    return {
        "base": asdict(place),
        "base_sha256": weights_hash(place),
        "data": _file(data),
        "eval_data": _file(eval_data) if eval_data else None,
        "template_sha256": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        "tokenizer_sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
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


def model_card(title: str, verdict: str, lines: dict[str, str]) -> str:
    """README.md of a run."""
    table = "\n".join(f"- {name}: {value}" for name, value in lines.items())
    text = f"# {title}\n\n{verdict}\n\nThe tuned model is in `model/`.\n\n{table}\n"
    return text.encode(errors="backslashreplace").decode()  # of a file name that is no UTF-8
