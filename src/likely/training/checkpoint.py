"""A checkpoint: everything that decides the next step, as safetensors and JSON.

step-000010/MANIFEST.json          SHA-256 of every other file
step-000010/model/                 the weights or the adapter, as transformers or peft load them
step-000010/optimizer.safetensors  AdamW's moments by parameter name
step-000010/state.json             the step; order and learning rate are pure functions of it
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from likely.errors import ResourceError


def save_checkpoint(
    folder: Path,
    step: int,
    network: Any,
    optimizer: torch.optim.Optimizer,
    save_model: Callable[[Path], None],
) -> Path:
    """Write ``folder/step-N`` under another name and rename it when it is whole.

    Raises:
        ResourceError: the disk refuses.
    """
    final = folder / f"step-{step:06d}"
    unfinished = folder / f".{final.name}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_model(unfinished / "model")
        save_file(_optimizer_tensors(network, optimizer), unfinished / "optimizer.safetensors")
        (unfinished / "state.json").write_text(json.dumps({"step": step}, indent=2) + "\n", encoding="utf-8")
        manifest = {
            str(path.relative_to(unfinished)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(unfinished.rglob("*"))
            if path.is_file()
        }
        (unfinished / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(final)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ResourceError(
            f"the checkpoint can't be written: {error.strerror or error}", place=str(final), way_out="free some disk"
        ) from error
    return final


def _optimizer_tensors(network: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in network.named_parameters()}
    return {
        f"{names[id(p)]}.{key}": value.contiguous()
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
