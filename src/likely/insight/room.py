"""What more data can bring at most, read off the rows that were trained on.

The NLL of the rows that a training has seen rises with their number, as they can't all be learnt by heart, and that of
held-out rows falls; both go to the same limit (Cortes, Jackel, Solla, Vapnik & Denker 1993). So held-out NLL can't fall
by more than what lies between the two. Where the NLL of seen rows still falls, as the training takes more steps with
more rows or has too few, held-out NLL may fall with it, by as much a doubling as the seen rows' did over the last
sizes. Nor can it fall below the entropy of held-out answers that differ at the same context.

Four held-out points alone can't show a floor that the last of them has just reached: a law through them goes
on falling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from likely.insight.power_law import Scores, moves_of_seeds, replicate, slope_per_doubling
from likely.types import FloatArray


@dataclass(frozen=True)
class Seen:
    """Rows that each training has seen, under the weights it is judged by: NLL in nats per token, and the standard
    error of that as an estimate of all its rows."""

    nll_KS: FloatArray
    error_KS: FloatArray

    @classmethod
    def of(cls, rows_KS: Sequence[Sequence[tuple[FloatArray, FloatArray]]]) -> Seen:
        """From the weighted NLL (nats) and the weight of each row that was looked at, for each size and seed."""
        pairs = np.array([[_ratio(nll_N, weight_N) for nll_N, weight_N in own] for own in rows_KS])
        return cls(pairs[:, :, 0], pairs[:, :, 1])


def _ratio(nll_N: FloatArray, weight_N: FloatArray) -> tuple[float, float]:
    """A ratio of sums and its standard error (linearised: Cochran 1977, Sampling Techniques, 6.3)."""
    total = weight_N.sum()
    ratio = float(nll_N.sum() / total)
    num = len(nll_N)
    apart = float(((nll_N - ratio * weight_N) ** 2).sum())
    return ratio, float(np.sqrt(apart * num / max(num - 1, 1)) / total)


def room_for_more(scores: Scores, seen: Seen, floor: float = 0.0) -> FloatArray:
    """By how many nats per token twice the data can lower held-out NLL at most, as it could have come out: one value a
    replicate, with the chance of seeds, held-out examples and seen rows.

    Args:
        floor: nats per token below which no model can be on these held-out examples.
    """
    rng = np.random.default_rng(1)
    held_out_BK = replicate(scores, seeds=False)
    num, num_seeds = len(held_out_BK), seen.nll_KS.shape[1]
    error_K = np.sqrt((seen.error_KS**2).sum(1)) / num_seeds
    seen_BK = seen.nll_KS.mean(1) + rng.standard_normal((num, len(error_K))) * error_K
    if num_seeds > 1:  # a seed moves both alike
        moves_BS = moves_of_seeds(rng, num, num_seeds)
        held_out_BK = held_out_BK + moves_BS @ _apart(scores.mean_KS).T
        seen_BK = seen_BK + moves_BS @ _apart(seen.nll_KS).T
    still_falling_B = np.maximum(slope_per_doubling(scores.size_K, seen_BK), 0)
    room: FloatArray = held_out_BK[:, -1] - seen_BK[:, -1] + still_falling_B
    return np.minimum(room, held_out_BK[:, -1] - floor)


def _apart(nll_KS: FloatArray) -> FloatArray:
    result: FloatArray = nll_KS - nll_KS.mean(1, keepdims=True)
    return result
