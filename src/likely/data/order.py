"""Which examples a step trains on: a pure function of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from likely.data.trie import common_prefix, sort_by_prefix
from likely.types import Example, IntArray


def num_steps(num_examples: int, batch_size: int, epochs: float, steps: int | None) -> int:
    """Optimizer steps of a run; the last, smaller batch of an epoch is a step like any other."""
    per_epoch = -(-num_examples // batch_size)
    return steps if steps is not None else max(1, round(per_epoch * epochs))


@dataclass(frozen=True, eq=False)
class Order:
    """An order of examples for each epoch, cut into batches. Where ``family_N`` is given, a family stands
    together, at the place that the shuffle gave to the first of its examples.

    Being a function of (seed, epoch) alone, it lets a run be resumed, repeated or spread over any number of processes
    without a change of order.
    """

    num_examples: int
    batch_size: int
    seed: int
    family_N: IntArray | None = None

    def of_step(self, step: int) -> IntArray:
        """Indices of the examples of 1-based ``step``."""
        per_epoch = -(-self.num_examples // self.batch_size)
        epoch, batch = divmod(step - 1, per_epoch)
        return _epoch(self, epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]


@lru_cache(maxsize=1)
def _epoch(order: Order, epoch: int) -> IntArray:
    """One epoch's; made once in it, since that takes a second for ten million examples."""
    shuffled = np.random.Generator(np.random.PCG64([order.seed, epoch])).permutation(order.num_examples)
    if order.family_N is not None:
        family = order.family_N[shuffled]
        _, first, member = np.unique(family, return_index=True, return_inverse=True)
        shuffled = shuffled[np.argsort(first[member], kind="stable")]
    shuffled.flags.writeable = False
    return shuffled


def prefix_families(examples: Sequence[Example]) -> IntArray:
    """A family's number for each example. Neighbours in the order of their tokens are of one family where they have the
    whole prompt of one of them in common (the tokens before the first supervised one): answers to one question, and
    the turns of one conversation, but not conversations behind one system prompt."""
    family_N = np.arange(len(examples), dtype=np.int64)
    previous: int | None = None
    for i in sort_by_prefix(examples):
        if previous is not None:
            a, b = examples[previous], examples[i]
            shared = common_prefix(a.token_ids_T, b.token_ids_T)
            if shared >= min(int(np.flatnonzero(e.weights_T)[0]) for e in (a, b)):
                family_N[i] = family_N[previous]
        previous = i
    return family_N
