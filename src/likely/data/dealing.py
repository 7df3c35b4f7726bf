"""Which examples of a step each of several processes computes.

Packs are dealt by what they will cost, the costly ones first, each to whoever is done soonest (longest processing time
first, Graham 1969). The examples that share most of their tokens stay together, unless that would leave the others
waiting: then they are cut into smaller runs of neighbours in the trie, and what they share is computed on as many
processes as the runs are dealt to. Every process finds the same answer by itself.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from likely.data.trie import common_prefix, context_length, sort_by_prefix
from likely.types import Example

# A finer cut must be worth it: it computes shared prefixes again, and predictions are only that.
GAIN, NEAR = 0.98, 1.02
EXCHANGES, CHOICES = 16, 300


@dataclass(frozen=True)
class Cost:
    """What a pack costs, in units of one node's linear layers: ``pair`` for each key that a node attends to,
    ``context`` for each supervised context at the output layer."""

    pair: float = 0.0
    context: float = 0.0


def deal(examples: Sequence[Example], num_ranks: int, cost: Cost, *, share: bool = True) -> list[list[int]]:
    """For each rank the examples that it computes, as indices; together all that supervise something, each once.

    Args:
        share: False for models whose layers can't follow a branch: then nothing is computed once for several.
    """
    if num_ranks == 1:
        return [list(range(len(examples)))]
    step = _Step(examples, cost, share)
    best: list[list[int]] = [[] for _ in range(num_ranks)]
    slowest, fair = np.inf, step.cost_of(range(step.num)) / num_ranks
    limit, finest = fair, False
    while not finest and slowest > NEAR * fair:
        runs = step.runs(limit)
        finest = len(runs) == step.num
        dealt = _longest_first(step, runs, num_ranks)
        _even_out(step, runs, dealt)
        dealt = [[i for r in mine for i in runs[r]] for mine in dealt]
        load = max(step.cost_of(one) for one in dealt)
        if load < GAIN * slowest:
            best, slowest = dealt, load
        limit /= 2
    return [[step.order[i] for i in one] for one in best]


class _Step:
    """The examples in the order of the trie: what follows counts them from 0 in this order."""

    def __init__(self, examples: Sequence[Example], cost: Cost, share: bool) -> None:
        self.order = sort_by_prefix(examples)
        self.num = len(self.order)
        self._cost = cost
        self._targets = [np.flatnonzero(examples[i].weights_T) for i in self.order]
        self._length = [context_length(examples[i]) for i in self.order]
        contexts = [examples[i].token_ids_T[:n] for i, n in zip(self.order, self._length, strict=True)]
        # Tokens that an example shares with the one before it.
        self._shared = np.zeros(self.num, np.int64)
        for i in range(1, self.num if share else 0):
            self._shared[i] = common_prefix(contexts[i - 1], contexts[i])

    def shared(self, a: int, b: int) -> int:
        """Tokens that two examples have in common, a before b."""
        return int(self._shared[a + 1 : b + 1].min())

    def cost_from(self, i: int, depth: int) -> float:
        """Of an example's nodes at ``depth`` and below."""
        length = self._length[i]
        depth = min(depth, length)
        pairs = (length * (length + 1) - depth * (depth + 1)) / 2
        contexts = len(self._targets[i]) - int(np.searchsorted(self._targets[i], depth, side="right"))
        return length - depth + self._cost.pair * pairs + self._cost.context * contexts

    def cost_of(self, chosen: Sequence[int]) -> float:
        """Of some examples together, in ascending order: each distinct node once."""
        before = [0, *(self.shared(a, b) for a, b in pairwise(chosen))]
        return sum(self.cost_from(i, depth) for i, depth in zip(chosen, before, strict=False))

    def runs(self, limit: float) -> list[range]:
        """Neighbours that share half of their tokens, in runs that cost at most ``limit`` or are one example."""
        found: list[range] = []
        start, total = 0, 0.0
        for i in range(self.num):
            added = self.cost_from(i, int(self._shared[i]))
            if i > start and (2 * self._shared[i] < self._length[i] or total + added > limit):
                found.append(range(start, i))
                start, total = i, 0.0
            total += added if i > start else self.cost_from(i, 0)
        return [*found, range(start, self.num)] if self.num else []


def _longest_first(step: _Step, runs: Sequence[range], num_ranks: int) -> list[list[int]]:
    """For each rank its runs, ascending. Each goes to the rank that is done soonest with it, the most costly first; a
    rank that holds a neighbour has part of it already."""
    costs = [step.cost_of(run) for run in runs]
    loads = [0.0] * num_ranks
    dealt: list[int] = []  # runs, in the order of the trie
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    rank_of: dict[int, int] = {}
    for r in sorted(range(len(runs)), key=lambda r: (-costs[r], r)):
        idlest = min(range(num_ranks), key=loads.__getitem__)
        choices = []
        for rank in sorted({idlest, *(rank_of[other] for other in _beside(dealt, r))}):
            depth = max((_common(step, runs, r, other) for other in _beside(held[rank], r)), default=0)
            first = runs[r][0]
            known = step.cost_from(first, 0) - step.cost_from(first, depth)
            choices.append((loads[rank] + costs[r] - known, rank))
        loads_then, rank = min(choices)
        loads[rank], rank_of[r] = loads_then, rank
        insort(dealt, r)
        insort(held[rank], r)
    return held


def _even_out(step: _Step, runs: Sequence[range], held: list[list[int]]) -> None:
    """Move or exchange runs between the slowest rank and the idlest, as long as that helps and the choices are few."""

    def load(mine: Sequence[int]) -> float:
        return step.cost_of([i for r in sorted(mine) for i in runs[r]])

    loads = [load(mine) for mine in held]
    for _ in range(EXCHANGES):
        slow, idle = loads.index(max(loads)), loads.index(min(loads))
        many = len(held[slow]) * (1 + len(held[idle])) > CHOICES
        if many or not held[slow] or loads[slow] < NEAR * sum(loads) / len(loads):
            return
        choices = []
        for mine, theirs in product(held[slow], [None, *held[idle]]):
            left = [r for r in held[slow] if r != mine] + ([] if theirs is None else [theirs])
            right = [r for r in held[idle] if r != theirs] + [mine]
            choices.append((max(load(left), load(right)), sorted(left), sorted(right)))
        slowest, left, right = min(choices)
        if slowest >= loads[slow]:
            return
        held[slow], held[idle] = left, right
        loads[slow], loads[idle] = load(left), load(right)


def _beside(ordered: Sequence[int], r: int) -> list[int]:
    """The nearest of some ascending numbers on both sides of another."""
    at = bisect(ordered, r)
    return [*ordered[max(0, at - 1) : at], *ordered[at : at + 1]]


def _common(step: _Step, runs: Sequence[range], r: int, other: int) -> int:
    low, high = sorted((r, other))
    return step.shared(runs[low][-1], runs[high][0])
