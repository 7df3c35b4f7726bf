"""How held-out NLL falls with the number of training rows, and how sure that is.

Two descriptions of the mean NLL over seeds at sizes n, both by least squares:

- a power law ``a + b (n / N)^-c`` with N all rows (Hestness et al. 2017). Doubling N lowers it by ``b (1 - 2^-c)``. For
  a given c it is linear, so c is looked for on a line (variable projection, Golub & Pereyra 1973). Where the points are
  level, b is near 0 and c is unknown; where they fall by as much with every doubling, c goes to 0, a to minus infinity
  and the law to a line in log n. What a doubling brings stays defined in both.
- a straight line in ``log2 n`` through the last three sizes: what the last doublings brought. Where the law flattens,
  the next one brings less.

Intervals count two sources of chance. Held-out examples are resampled (bootstrap, the same draw for every training).
Seeds are few and know little of their own spread: an interval of three resampled seeds is less than half as wide as it
should be. So the mean over seeds moves by Student's distribution with one degree of freedom fewer than there are seeds,
and with the covariance between sizes that the seeds' curves have (a multiplier bootstrap of whole curves).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from likely.types import FloatArray

EXPONENTS = np.geomspace(0.02, 3.0, 101)  # of c; at the lower end the law can't be told from a line in log n
REPLICATES = 2000
CELLS = 4_000_000  # of the resampled counts that are held at once
LAST_SIZES = 3  # that the straight line goes through


@dataclass(frozen=True)
class Scores:
    """Held-out NLL of every training: ``size_K`` numbers of training rows, ascending; ``nll_KSN`` weighted NLL (nats)
    of each held-out example after training with each size and seed; ``weight_N`` the examples' weights."""

    size_K: FloatArray
    nll_KSN: FloatArray
    weight_N: FloatArray

    @property
    def mean_KS(self) -> FloatArray:  # noqa: N802  (a shape)
        """Nats per token of each training."""
        result: FloatArray = self.nll_KSN.sum(-1) / self.weight_N.sum()
        return result

    @property
    def mean_K(self) -> FloatArray:  # noqa: N802
        """Nats per token of each size, over the seeds."""
        result: FloatArray = self.mean_KS.mean(-1)
        return result


@dataclass(frozen=True)
class Law:
    """Fitted power laws, one a replicate: ``a + b (n / N)^-c``. ``c`` is one of the ends of EXPONENTS where the points
    leave it open."""

    a: FloatArray
    b: FloatArray
    c: FloatArray

    @property
    def doubling(self) -> FloatArray:
        """By how many nats per token twice as many rows lower the NLL."""
        result: FloatArray = self.b * (1 - 2.0**-self.c)
        return result

    def at(self, relative: FloatArray) -> FloatArray:
        """NLL at sizes relative to all rows, of the first law."""
        result: FloatArray = self.a[0] + self.b[0] * relative ** -self.c[0]
        return result


def fit_power_law(size_K: FloatArray, nll_BK: FloatArray, *, refine: bool = False) -> Law:
    """The law nearest to each row of ``nll_BK``, by least squares; of sizes that don't differ, c means nothing.

    Args:
        refine: look for the best c between the grid's values too (of the first row only, which must be the only one).
    """
    c_B = _best_exponents(size_K, nll_BK)
    if refine:
        step = EXPONENTS[1] / EXPONENTS[0]
        low, high = max(c_B[0] / step, EXPONENTS[0]), min(c_B[0] * step, EXPONENTS[-1])

        def misfit(c: float) -> float:
            return -float(_explained(size_K, nll_BK, np.array([c]))[0, 0])

        found = minimize_scalar(misfit, bounds=(low, high), method="bounded", options={"xatol": 1e-10})
        if -found.fun > _explained(size_K, nll_BK, c_B)[0, 0]:
            c_B = np.array([found.x])
    x_BK = (size_K / size_K[-1])[None, :] ** -c_B[:, None]
    apart_BK = x_BK - x_BK.mean(-1, keepdims=True)
    b_B = (apart_BK * nll_BK).sum(-1) / (apart_BK**2).sum(-1)
    return Law(nll_BK.mean(-1) - b_B * x_BK.mean(-1), b_B, c_B)


def _explained(size_K: FloatArray, nll_BK: FloatArray, c_C: FloatArray) -> FloatArray:
    """Sum of squares that the law with each exponent explains, (B, C)."""
    x_CK = (size_K / size_K[-1])[None, :] ** -c_C[:, None]
    unit_CK = x_CK - x_CK.mean(-1, keepdims=True)
    unit_CK /= np.sqrt((unit_CK**2).sum(-1, keepdims=True))
    result: FloatArray = (nll_BK @ unit_CK.T) ** 2
    return result


def _best_exponents(size_K: FloatArray, nll_BK: FloatArray) -> FloatArray:
    """The best of EXPONENTS for each row, and between it and its neighbours by the parabola through the three."""
    explained_BC = _explained(size_K, nll_BK, EXPONENTS)
    best_B = explained_BC.argmax(-1)
    inner_B = np.clip(best_B, 1, len(EXPONENTS) - 2)
    before, here, after = (np.take_along_axis(explained_BC, inner_B[:, None] + i, 1)[:, 0] for i in (-1, 0, 1))
    bend = before - 2 * here + after
    peak = (best_B == inner_B) & (bend < 0)
    shift = np.where(peak, 0.5 * (before - after) / np.where(peak, bend, 1.0), 0.0)
    result: FloatArray = EXPONENTS[best_B] * (EXPONENTS[1] / EXPONENTS[0]) ** shift
    return result


def slope_per_doubling(size_K: FloatArray, nll_BK: FloatArray) -> FloatArray:
    """By how many nats per token a doubling lowered the NLL over the last sizes: a straight line in log2 n."""
    x_K = np.log2(size_K[-LAST_SIZES:])
    x_K = x_K - x_K.mean()
    result: FloatArray = -(nll_BK[:, -LAST_SIZES:] @ x_K) / (x_K**2).sum()
    return result


def replicate(scores: Scores, *, seeds: bool = True, examples: bool = True, num: int = REPLICATES) -> FloatArray:
    """Mean NLL of each size as it could have come out, (num, K): with other seeds, other held-out examples or both.

    Raises:
        ValueError: one seed, whose chance nothing tells of.
    """
    rng = np.random.default_rng(0)
    mean_BK = _other_examples(scores, rng, num) if examples else np.repeat(scores.mean_K[None], num, 0)
    if not seeds:
        return mean_BK
    num_seeds = scores.nll_KSN.shape[1]
    if num_seeds < 2:
        raise ValueError("one seed has no spread")
    apart_KS = scores.mean_KS - scores.mean_K[:, None]
    moved: FloatArray = mean_BK + moves_of_seeds(rng, num, num_seeds) @ apart_KS.T
    return moved


def moves_of_seeds(rng: np.random.Generator, num: int, num_seeds: int) -> FloatArray:
    """Factors of the seeds' distances from their mean, (num, seeds), by which other seeds could have moved it."""
    moves_BS: FloatArray = rng.standard_normal((num, num_seeds)) / np.sqrt(num_seeds * (num_seeds - 1))
    # Student's: the spread itself is known from few curves.
    moves_BS /= np.sqrt(rng.chisquare(num_seeds - 1, (num, 1)) / (num_seeds - 1))
    return moves_BS


def _other_examples(scores: Scores, rng: np.random.Generator, num: int) -> FloatArray:
    size = len(scores.weight_N)
    over_seeds_KN = scores.nll_KSN.mean(1)
    parts = []
    for first in range(0, num, max(1, CELLS // size)):
        draws = min(max(1, CELLS // size), num - first)
        count_BN = rng.multinomial(size, np.full(size, 1 / size), draws).astype(np.float64)
        parts.append((count_BN @ over_seeds_KN.T) / (count_BN @ scores.weight_N)[:, None])
    return np.concatenate(parts)


def interval(values_B: FloatArray, level: float = 0.95) -> tuple[float, float]:
    """The middle ``level`` of some values."""
    low, high = np.quantile(values_B, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def spread(scores: Scores, statistic: Callable[[FloatArray], FloatArray]) -> dict[str, float]:
    """Half of the 95% interval of a statistic from each source of chance alone: ``{"seeds", "examples"}``, nats."""

    def half(**sources: bool) -> float:
        low, high = interval(statistic(replicate(scores, **sources)))
        return (high - low) / 2

    return {"seeds": half(examples=False), "examples": half(seeds=False)}
