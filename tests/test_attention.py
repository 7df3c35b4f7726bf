"""Which keys each query of a trie sees, block by block, against the definition: its ancestors and itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from likely.data.packing import build_packs
from likely.data.trie import subtree_ends
from likely.model import attention
from likely.types import Example, Pack, Source
from naive import families
from test_objective import moderate

VOCABULARY = 3  # so few that branches leave each other everywhere


def ancestors(pack: Pack, node: int, window: int | None) -> set[int]:
    """From the depths alone: walking back, each node that is one less deep than the last one found."""
    found, depth = {node}, int(pack.position_T[node])
    for other in range(node - 1, -1, -1):
        if pack.position_T[other] == depth - 1:
            depth -= 1
            if window is None or pack.position_T[node] - depth < window:
                found.add(other)
    return found


@pytest.mark.parametrize("window", [None, 1, 3])
@moderate(60)
@given(
    rows=families(VOCABULARY, max_rows=8, max_tail=9),
    merged=st.integers(0, 12),
    block=st.integers(1, 5),
    data=st.data(),
)
def test_each_query_sees_its_ancestors_and_itself(
    window: int | None, rows: list[tuple[list[int], list[float]]], merged: int, block: int, data: st.DataObject
) -> None:
    examples = [
        Example(np.array(ids), np.array([0.0, *[1.0] * (len(ids) - 1)]), np.zeros(len(ids), np.int8), Source("", i))
        for i, (ids, _) in enumerate(rows)
    ]
    for pack in build_packs(examples, 10_000):
        asked = np.array(sorted(data.draw(st.sets(st.integers(0, pack.num_nodes - 1)))), np.int64)
        plan = attention.TriePlan(pack.position_T, pack.last_T, torch.device("cpu"))
        seen: dict[int, set[int]] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "MERGED_QUERIES", merged)
            patch.setattr(attention, "BLOCK_QUERIES", block)
            blocks = plan.blocks_of(asked, window, torch.float32)
        for found in blocks:
            keys = [*found.path.tolist(), *range(found.own.start, found.own.stop)]
            assert len(keys) == found.num_keys
            assert len(found.bias) == found.num_queries
            bias = torch.zeros(len(found.bias), len(keys))
            bias[:, len(keys) - found.bias.shape[1] :] = found.bias
            for query, row in zip(asked[found.queries].tolist(), bias.tolist(), strict=True):
                assert query not in seen
                seen[query] = {key for key, hidden in zip(keys, row, strict=True) if hidden == 0}
        assert seen == {int(node): ancestors(pack, int(node), window) for node in asked}


@pytest.mark.parametrize("window", [None, 3])
@moderate(40)
@given(rows=families(VOCABULARY, max_rows=6, max_tail=9), round_to=st.integers(2, 9), data=st.data())
def test_empty_rows_change_nothing(
    window: int | None, rows: list[tuple[list[int], list[float]]], round_to: int, data: st.DataObject
) -> None:
    """Which rows are empty is chance here, and some are between others' where a block has a path before it."""
    examples = [
        Example(np.array(ids), np.array([0.0, *[1.0] * (len(ids) - 1)]), np.zeros(len(ids), np.int8), Source("", i))
        for i, (ids, _) in enumerate(rows)
    ]
    for pack in build_packs(examples, 10_000):
        asked = np.array(sorted(data.draw(st.sets(st.integers(0, pack.num_nodes - 1), min_size=1))), np.int64)
        draw = torch.Generator().manual_seed(len(asked))
        q = torch.randn(2, 3, len(asked), 4, generator=draw, dtype=torch.float64)
        k, v = torch.randn(2, 2, pack.num_nodes, 4, generator=draw, dtype=torch.float64)
        grad = torch.randn(len(asked), 2, 3, 4, generator=draw, dtype=torch.float64)
        results = []
        for step in (1, round_to):
            plan = attention.TriePlan(pack.position_T, pack.last_T, torch.device("cpu"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(attention, "MERGED_QUERIES", 5)
                patch.setattr(attention, "BLOCK_QUERIES", 4)
                patch.setattr(attention, "rounded_up", lambda _device, _dtype, step=step: step)
                blocks = plan.blocks_of(asked, window, torch.float64)
            assert isinstance(blocks, list)
            assert all(block.num_keys % step == 0 and len(block.bias) % step == 0 for block in blocks)
            out, kept = attention.attend(q, k, v, blocks)
            results.append([out, *attention.attend_backward(grad, q, k, v, blocks, kept)])
        for plain, rounded in zip(*results, strict=True):
            torch.testing.assert_close(rounded, plain, rtol=1e-12, atol=1e-12)


def test_narrow_products_of_a_processor_have_few_shapes() -> None:
    position_T = np.concatenate([np.arange(length) for length in range(100, 164)])
    plan = attention.TriePlan(position_T, subtree_ends(position_T), torch.device("cpu"))
    narrow, wide = (plan.blocks(None, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert isinstance(narrow, list)
    assert isinstance(wide, list)
    assert len({(len(block.bias), block.num_keys) for block in wide}) > 60
    assert len({(len(block.bias), block.num_keys) for block in narrow}) < 6
