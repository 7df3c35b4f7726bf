"""The training step, all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from likely.errors import NonFiniteError
from likely.model.forward import LanguageModel
from likely.training.objective import nll_sum
from likely.training.parallel import ALONE, Ranks
from likely.training.sharding import local
from likely.types import Pack


def train_step(
    model: LanguageModel, packs: Sequence[Pack], optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> tuple[float, float]:
    """One update of the weights towards the gold tokens of all packs together; see :func:`compute_gradient`."""
    nll, grad_norm = compute_gradient(model, packs, optimizer, max_grad_norm)
    apply_gradient(optimizer)
    return nll, grad_norm


def compute_gradient(
    model: LanguageModel,
    packs: Sequence[Pack],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    *,
    ranks: Ranks = ALONE,
    num_tokens: float | None = None,
) -> tuple[float, float]:
    """The clipped gradient of the mean NLL over the step's tokens, left on the parameters. No weight changes.

    Each pack's sum is divided by the one number of supervised weight of the whole step, so the gradient is the same
    however the step was cut into packs, and however these were dealt to ranks.

    Args:
        num_tokens: supervised weight of the step's packs on all ranks [that of ``packs``].

    Returns:
        NLL per unit of weight (nats), and the gradient's global norm before clipping.

    Raises:
        NonFiniteError: the loss or the norm is not finite; the gradient is thrown away, on every rank.
    """
    if num_tokens is None:
        num_tokens = sum(float(pack.weight_E.sum()) for pack in packs)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    with model.autocast():
        for pack in packs:
            loss = nll_sum(model, pack)
            with torch.autocast(model.device.type, enabled=False):
                (loss / num_tokens).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
    if model.sharded:
        total, norm = _clip_shards(model, total, max_grad_norm, ranks)
    else:
        if not ranks.alone:
            total = _sum_over_ranks(model, total, ranks)
        trainable = [p for p in model.network.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm)
    # The one place of a step where the host waits for the device: until here it only queues work.
    loss_sum, grad_norm = torch.stack([total, norm.to(total)]).tolist()
    nll = loss_sum / num_tokens if num_tokens else 0.0
    if not (math.isfinite(nll) and math.isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(f"loss {nll} and gradient norm {grad_norm} before the update")
    return nll, grad_norm


def _sum_over_ranks(model: LanguageModel, total: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The step's loss; its gradient is on every rank then. A parameter that no rank has a gradient of has none."""
    trainable = [p for p in model.network.parameters() if p.requires_grad]
    summed = ranks.all_sum(np.array([float(total), *(p.grad is not None for p in trainable)]))
    used = [p for p, count in zip(trainable, summed[1:], strict=True) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.sum_gradients([p.grad for p in used if p.grad is not None])
    return torch.tensor(summed[0], device=total.device)


def _clip_shards(
    model: LanguageModel, total: torch.Tensor, max_grad_norm: float, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step's loss, and the norm of its gradient before each rank has clipped its rows."""
    rows = [local(p.grad) for p in model.network.parameters() if p.grad is not None]
    ranks.sum_gradients(rows, of_shard=True)
    square = sum(float(torch.linalg.vector_norm(r, dtype=torch.float64)) ** 2 for r in rows)
    loss, square = ranks.all_sum(np.array([float(total), square]))
    square /= ranks.world_size // ranks.shards  # each row was counted in every copy
    norm = math.sqrt(square) if square >= 0 else math.nan
    if norm > max_grad_norm:
        for gradient in rows:
            gradient.mul_(max_grad_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
    return torch.tensor(loss), torch.tensor(norm)


def apply_gradient(optimizer: torch.optim.Optimizer) -> None:
    """Update the weights, and forget the gradient."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
