"""safetensors files from outside: their header proved before anything reads a tensor, and their numbers proved finite.

The format (huggingface/safetensors): eight bytes with the header's length, the header as a JSON object
``{name: {"dtype", "shape", "data_offsets"}}``, then the tensors' bytes without a gap.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from likely.errors import ModelError, first_line

# Real headers have about 150 bytes a tensor; the largest mixtures of experts have some 10,000 tensors a file.
MAX_HEADER_BYTES = 16 << 20
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
# All ones in the exponent is an infinity or NaN (IEEE 754; bfloat16 is the upper half of a float32).
EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80}
BLOCK = 1 << 22  # numbers looked at together; bounds the memory


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: its type, its shape and where its bytes stand, counted from the file's first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """Name -> tensor of a safetensors file. Only the header is read.

    Raises:
        ModelError: the file is cut, too long, or its header contradicts the format or itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _broken(path, f"a header of {length:,} bytes in a file of {size:,}")
            raw = file.read(length)
        header = json.loads(raw.decode(), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, first_line(error)) from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its metadata is not text")
    found = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise _broken(path, f"{name} starts at byte {tensor.start:,} and the one before ends at {end:,}")
        end = tensor.stop
    if end != size:
        raise _broken(path, f"its tensors end at byte {end:,} and the file at {size:,}")
    return found


def _entry(path: Path, name: str, fields: Any, start_of_data: int) -> Stored:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _broken(path, f"{name} has the unknown dtype {str(dtype)[:40]!r}")
    for what, numbers in (("shape", shape), ("offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise _broken(path, f"the {what} of {name} are no list of whole numbers")
    if len(offsets) != 2 or len(shape) > 16 or offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _broken(path, f"{name} of {dtype} and shape {shape[:16]} does not fit its bytes {offsets[:2]}")
    return Stored(path, dtype, tuple(shape), start_of_data + offsets[0], start_of_data + offsets[1])


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that has a key twice means two things at once.

    Raises:
        ValueError: a key stands twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:80]!r} stands twice")
        found[key] = value
    return found


def _broken(path: Path, message: str) -> ModelError:
    return ModelError(f"broken safetensors: {message}", place=str(path), way_out="copy or download the file again")


def check_finite(tensors: Mapping[str, Stored]) -> None:
    """One pass over the floating-point numbers of some tensors, in blocks.

    Raises:
        ModelError: one is NaN or infinite, or would be as a float32.
    """
    for name, tensor in tensors.items():
        if tensor.dtype in {"F16", "BF16", "F32", "F64"} and tensor.num_elements and not _is_finite(tensor):
            raise ModelError(
                f"the weight {name} has NaN or infinite numbers",
                place=str(tensor.file),
                way_out="take the weights from before they broke",
            )


def _is_finite(tensor: Stored) -> bool:
    kind = {"F32": "<f4", "F64": "<f8"}.get(tensor.dtype, "<u2")
    numbers = np.memmap(tensor.file, kind, "r", tensor.start, (tensor.num_elements,))
    for first in range(0, len(numbers), BLOCK):
        block = numbers[first : first + BLOCK]
        if exponent := EXPONENT.get(tensor.dtype):
            if ((block & exponent) == exponent).any():
                return False
            continue
        with np.errstate(over="ignore"):
            if not np.isfinite(block.astype(np.float32, copy=False)).all():
                return False
    return True


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 (hex) over the names and contents of some files; a file that has not changed is read once a process."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        status = file.stat()
        digest.update(f"{file.name} {_hash_file(file, status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _hash_file(file: Path, _size: int, _modified: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
