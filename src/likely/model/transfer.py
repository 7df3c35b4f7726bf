"""What devices do each in their way: take in host arrays without a wait, and multiply narrow numbers into wide ones."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

_ONE_AT_A_TIME = threading.Lock()


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


def multiplies_narrow(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`wide_product` is faster in that dtype than in float32."""
    if device.type == "cuda":
        return dtype in {torch.bfloat16, torch.float16}
    return dtype == torch.bfloat16 and device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def wide_product(left: Tensor, right: Tensor, narrow_right: Tensor) -> Tensor:
    """``left @ right`` in float32, of matrices rounded to the dtype of ``narrow_right``, which is the second one in it:
    no other rounding is there. On a CPU that is a mode of the whole process while it takes: what other threads multiply
    in float32 meanwhile has such factors too."""
    if left.device.type == "cuda":
        return torch.mm(left.to(narrow_right.dtype), narrow_right, out_dtype=torch.float32)
    onednn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _ONE_AT_A_TIME:  # or the second thread would take the first one's mode for the user's
        before = onednn.fp32_precision
        try:
            onednn.fp32_precision = "bf16"
            return left.float() @ right.float()
        finally:
            # Ctrl-C during the product raises as soon as Python code runs again, which is that of the next line.
            try:
                onednn.fp32_precision = before
            finally:
                onednn.fp32_precision = before
