"""What an export stores, value by value, as digests: those of what was written must be those of what is read.

The bound on likelihoods is as wide as a number format rounds, and a small change hides in it. Nothing hides here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from likely import manifest
from likely.errors import ModelError

Digests = dict[str, str]
WEIGHTS = ".safetensors"  # whose values are compared one by one
_OF_THE_FILE = {"transformers_version", "dtype", "torch_dtype", "architectures"}


def of_network(network: Any) -> Digests:
    """Every weight of a transformers network by its name, whatever width its numbers are kept in."""
    return {f"the weight {name}": _of_tensor(tensor) for name, tensor in network.state_dict().items()}


def _of_tensor(tensor: Any) -> str:
    values = tensor.detach().cpu()
    return of_array((values.float() if values.is_floating_point() else values).numpy())


def of_array(values: npt.NDArray[Any], *about: object) -> str:
    """SHA-256 of an array's shape and bytes, and of what else there is to say ``about`` it."""
    sha256 = hashlib.sha256(repr((values.shape, values.dtype.str, *about)).encode())
    sha256.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def of_value(value: Any) -> str:
    """A number, a text or a list of them, as a GGUF file's header holds it: bytes are text, fractions have 32 bits."""
    return hashlib.sha256(repr(_plain(value)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (float, np.floating)):
        return float(np.float32(value))
    return int(value) if isinstance(value, (bool, int, np.integer)) else str(value)


def of_files(folder: Path, but: str = "") -> Digests:
    """Every file of a folder by its name, without those that end in ``but``."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.name != manifest.NAME)
    return {
        f"the file {path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not (but and path.name.endswith(but))
    }


def of_settings(network: Any) -> Digests:
    """What a transformers network says of itself and of its generation, but for where it came from and its width."""
    digests: Digests = {}
    for kind, settings in (("model", network.config), ("generation", network.generation_config)):
        told = {str(k): v for k, v in settings.to_dict().items() if k not in _OF_THE_FILE and not k.startswith("_")}
        digests |= {f"the {kind}'s {k}": of_text(json.dumps(v, default=str)) for k, v in told.items() if v is not None}
    return digests


def of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def of_tensor_files(folder: Path) -> Digests:
    """The names of all tensors in a folder's safetensors files: a reader passes over what it doesn't know."""
    names = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            names += list(file.keys())
    return {"the list of tensors": of_text(json.dumps(sorted(names)))}


def compare(written: Mapping[str, str], found: Mapping[str, str], within: str) -> None:
    """
    Args:
        within: what is said of the likelihood, which did not show it.

    Raises:
        ModelError: something that was written is read otherwise, or not at all, or something else is there.
    """
    wrong = sorted(name for name in {*written, *found} if written.get(name) != found.get(name))
    if wrong:
        kind = "is missing" if wrong[0] not in found else "is not what was written"
        raise ModelError(f"{wrong[0]} {kind}: {len(wrong)} of {len(written)} stored values differ, though {within}")
