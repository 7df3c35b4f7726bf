"""What a GPU does unlike a CPU: host arrays get there without a wait, and narrow numbers multiply into wide ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(array: Any, device: torch.device) -> Tensor:
    """A numpy array or a host tensor as a tensor on a device.

    A GPU copies from pinned memory while the host goes on; a copy from ordinary memory would wait until all that was
    queued before it is done. The pinned memory is torch's to use again once the copy is over. On a CPU nothing is
    copied.
    """
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32 from two matrices of bfloat16 or float16: no rounding but that of the factors."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
