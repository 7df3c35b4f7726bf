"""Memory of a training: what is free, how much of it activations may take, and freed memory that is kept for the next
step."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from likely.model.forward import LanguageModel
from likely.model.load import Tuning, best_device
from likely.model.place import Place, local_folder
from likely.model.untrusted import check_model
from likely.training.objective import CHUNK_LOGITS

# Activations may take so much of what is free: the estimate is one, and other programs want memory too.
SHARE = 0.5
# Whole weights may take so much of it; the rest is for activations.
ROOM_SHARE = 0.8
# Of a chunk of logits on a GPU; and the most that one needs for matrix products at full speed.
CHUNK_SHARE, LARGEST_CHUNK = 0.05, 1 << 28
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken, within the limit of the control group; None where the system doesn't say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        found.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return min(found) if found else None


def fits(place: Place, tuning: Tuning, sharers: int) -> bool:
    """Whether a process has room for all weights of a model in float32, and the gradient and AdamW's two averages of
    what is trained, where so many processes share the host's memory."""
    device = best_device()
    free = free_bytes(device)
    if free is None:
        return True
    if device.type == "cpu":
        free //= sharers
    numbers = sum(t.num_elements for t in check_model(local_folder(place.weights, with_weights=True)).values())
    return (16 if tuning.lora_rank is None else 4) * numbers <= ROOM_SHARE * free


def choose_room(model: LanguageModel, checkpointing: Literal["auto", "none", "full"], sharers: int = 1) -> int | None:
    """Bytes that the activations of a model whose weights are loaded may take; None for no limit. ``auto`` is a share
    of what is free when the gradient, AdamW's two averages, casts of the weights and a chunk of logits have theirs."""
    free = free_bytes(model.device)
    if checkpointing != "auto" or free is None:
        return 0 if checkpointing == "full" else None
    if model.device.type == "cpu":
        free //= sharers
    parameters = list(model.network.parameters())
    shards = sharers if model.sharded else 1  # of the ranks on other hosts, nothing is known here
    trained = 12 * sum(p.numel() for p in parameters if p.requires_grad) // shards
    narrow = torch.finfo(model.compute_dtype).bits // 8
    casts = narrow * sum(p.numel() for p in parameters) if narrow < 4 and not model.sharded else 0
    chunk = 3 * 4 * (model.chunk_logits or CHUNK_LOGITS)
    return max(0, int(SHARE * (free - trained - casts - chunk)))


def choose_chunk(free: int) -> int:
    """Logits that the loss may hold at once on a GPU: few rows at a time leave a large one idle. The loss needs three
    float32 tensors of that many numbers, and they get a share of the ``free`` bytes."""
    return min(max(CHUNK_LOGITS, int(CHUNK_SHARE * free) // (3 * 4)), LARGEST_CHUNK)


def set_limits(model: LanguageModel, checkpointing: Literal["auto", "none", "full"], sharers: int = 1) -> None:
    """Tell a model whose weights are loaded how much its activations and its logits may take, where so many processes
    share the host's memory."""
    free = free_bytes(model.device)
    if model.device.type == "cuda" and free is not None:
        model.chunk_logits = choose_chunk(free)
    model.activation_room = choose_room(model, checkpointing, sharers)


def keep_freed_memory() -> None:
    """Ask the C library to keep what was freed: every step needs the same blocks again, and taking them anew from the
    system costs a tenth of a step on a CPU. Does nothing where the C library has no such setting."""
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        library: Any = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
