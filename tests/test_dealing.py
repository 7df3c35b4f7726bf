"""Examples are dealt to ranks evenly by cost, each once; what they share is computed no more often than needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from likely.data.dealing import Cost, deal
from likely.data.packing import build_packs
from likely.types import Example

COST = Cost(1 / 4000, 0.3)
Row = tuple[list[int], list[float]]
Make = Callable[[list[Row]], list[Example]]


def row(rng: np.random.Generator, prompt: list[int], length: int) -> Row:
    answer = rng.integers(0, 1000, length).tolist()
    return [*prompt, *answer], [0.0] * max(1, len(prompt)) + [1.0] * (len(prompt) + length - max(1, len(prompt)))


def nodes(examples: list[Example], chosen: list[int]) -> int:
    return sum(pack.num_nodes for pack in build_packs([examples[i] for i in chosen], 1 << 40))


def cost_of(examples: list[Example], chosen: list[int]) -> float:
    """From the packs themselves, not from the lengths."""
    packs = build_packs([examples[i] for i in chosen], 1 << 40)
    pairs = sum(int((pack.position_T + 1).sum()) for pack in packs)
    contexts = sum(len(np.unique(pack.source_E)) for pack in packs)
    return sum(pack.num_nodes for pack in packs) + COST.pair * pairs + COST.context * contexts


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_mixed_lengths_are_even(make_examples: Make, num_ranks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # No row costs more than a rank's share, or nothing could be even.
    lengths = np.clip(rng.lognormal(5, 0.8, 8 * num_ranks), 4, 900).astype(int)
    shared = rng.integers(0, 1000, 60).tolist()
    examples = make_examples([row(rng, shared if i % 3 else [], int(n)) for i, n in enumerate(lengths)])
    dealt = deal(examples, num_ranks, COST)
    assert sorted(i for mine in dealt for i in mine) == list(range(len(examples)))
    loads = [cost_of(examples, mine) for mine in dealt]
    assert max(loads) <= 1.1 * np.mean(loads)
    assert dealt == deal(examples, num_ranks, COST)


def test_without_common_prefixes_a_rank_computes_what_it_was_dealt(make_examples: Make) -> None:
    rng = np.random.default_rng(0)
    examples = make_examples([row(rng, [1, 2, 3], 5) for _ in range(8)])
    assert sorted(map(len, deal(examples, 4, COST, share=False))) == [2, 2, 2, 2]


def families(rng: np.random.Generator, sizes: list[int], prompt: int, answer: int) -> list[Row]:
    rows = []
    for size in sizes:
        start = rng.integers(0, 1000, prompt).tolist()
        rows += [row(rng, start, answer) for _ in range(size)]
    return rows


def test_families_stay_whole_where_that_is_even(make_examples: Make) -> None:
    rng = np.random.default_rng(1)
    examples = make_examples(families(rng, [8] * 8, 500, 10))
    dealt = deal(examples, 4, COST)
    assert sum(nodes(examples, mine) for mine in dealt) == nodes(examples, list(range(64)))
    loads = [cost_of(examples, mine) for mine in dealt]
    assert max(loads) <= 1.02 * np.mean(loads)


def test_a_large_family_is_cut_and_the_others_are_not(make_examples: Make) -> None:
    """Its prompt is computed once on each rank that has some of it, and no other's more than once."""
    rng = np.random.default_rng(2)
    examples = make_examples(families(rng, [40, 4, 4, 4, 4], 200, 50))
    dealt = deal(examples, 4, COST)
    families_of = [{0 if i < 40 else 1 + (i - 40) // 4 for i in mine} for mine in dealt]
    again = sum(nodes(examples, mine) for mine in dealt) - nodes(examples, list(range(56)))
    holders = sum(0 in family for family in families_of)
    assert again == 200 * (holders - 1)
    loads = [cost_of(examples, mine) for mine in dealt]
    assert max(loads) <= 1.1 * np.mean(loads)


def test_one_long_row_among_short_ones(make_examples: Make) -> None:
    rng = np.random.default_rng(3)
    examples = make_examples([row(rng, [], n) for n in [4000, *[30] * 60]])
    dealt = deal(examples, 4, COST)
    long = next(mine for mine in dealt if 0 in mine)
    assert long == [0]
    others = [cost_of(examples, mine) for mine in dealt if 0 not in mine]
    assert max(others) <= 1.1 * np.mean(others)


@pytest.mark.parametrize("num", [0, 1, 3])
def test_fewer_examples_than_ranks(make_examples: Make, num: int) -> None:
    rng = np.random.default_rng(4)
    silent: Any = ([5, 6, 7], [0.0, 0.0, 0.0])
    examples = make_examples([silent, *(row(rng, [9], 5) for _ in range(num))])
    dealt = deal(examples, 4, COST)
    assert sorted(i for mine in dealt for i in mine) == list(range(1, num + 1))
    assert max(map(len, dealt)) <= 1


def test_one_process_computes_everything_as_before(make_examples: Make) -> None:
    examples = make_examples([([1, 2], [0.0, 1.0]), ([3, 4], [0.0, 1.0])])
    assert deal(examples, 1, COST) == [[0, 1]]
