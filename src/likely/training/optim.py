"""AdamW, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["cosine", "constant"]


def build_optimizer(parameters: Iterable[Tensor], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over the trainable parameters, in one kernel per group where torch has it.

    Decay is for matrices only: biases and norm gains set a scale, and shrinking them is not a prior anybody wants.
    """
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in {"cpu", "cuda"} for p in trainable)
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.999), eps=1e-8, fused=fused)


def learning_rate_at(step: int, *, peak: float, num_steps: int, warmup: float, schedule: Schedule) -> float:
    """Learning rate of 1-based ``step``: linear warm-up over the first ``warmup`` share of the steps, then constant, or
    a half cosine that reaches zero one step after the last."""
    warmup_steps = math.ceil(warmup * num_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - 1 - warmup_steps) / (num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
