"""The trie and its packs, against the definition: dictionaries of prefixes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from likely.data.packing import build_packs, normalize_per_example, supervise_everything
from likely.data.trie import build_pack, common_prefix, context_length, runs, sort_by_prefix, subtree_ends
from likely.types import Example, Pack
from naive import Row, families

MakeExamples = Callable[[list[Row]], list[Example]]
Context = tuple[int, ...]

# Sums of a few weights near 1 in another order: a few ulp of float64.
ROUNDING = 1e-12

# A vocabulary of 4 makes chance prefixes common, beside those that the strategy builds on purpose.
FAMILIES = families(vocabulary=4, max_rows=8, max_tail=8)
thorough = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],  # to explain a failure takes longer than to shrink it
)


def context_of(row: Row) -> Context:
    """The tokens before the last supervised one."""
    token_ids, weights = row
    return tuple(token_ids[: max((t for t, w in enumerate(weights) if w), default=0)])


def weight_of_edges(rows: list[Row]) -> dict[tuple[Context, int], float]:
    """For each context and next token the summed weight: all that the likelihood needs."""
    total: dict[tuple[Context, int], float] = defaultdict(float)
    for token_ids, weights in rows:
        for t, weight in enumerate(weights):
            if weight:
                total[tuple(token_ids[:t]), token_ids[t]] += weight
    return dict(total)


def contexts_of_nodes(pack: Pack) -> list[Context]:
    """The tokens from the root to each node, from tokens and depths alone: a parent is the last node one level up."""
    contexts: list[Context] = []
    latest: list[int] = []
    for token, depth in zip(pack.token_T.tolist(), pack.position_T.tolist(), strict=True):
        parent = contexts[latest[depth - 1]] if depth else ()
        latest[depth:] = [len(contexts)]
        contexts.append((*parent, token))
    return contexts


def edges_of(pack: Pack) -> dict[tuple[Context, int], float]:
    contexts = contexts_of_nodes(pack)
    keys = [(contexts[s], t) for s, t in zip(pack.source_E.tolist(), pack.target_E.tolist(), strict=True)]
    assert len(set(keys)) == len(keys), "an edge stands twice"
    return dict(zip(keys, pack.weight_E.tolist(), strict=True))


def longest_context(rows: list[Row]) -> int:
    return max((len(context_of(row)) for row in rows), default=0)


def packs_of(rows: list[Row], examples: list[Example], room: int = 10_000, *, share: bool = True) -> list[Pack]:
    return build_packs(examples, max(1, longest_context(rows) + room), share=share)


def one_example(token_ids: str, weights: list[float], make: MakeExamples) -> Example:
    return make([([ord(c) for c in token_ids], weights)])[0]


@thorough
@given(rows=FAMILIES)
def test_round_trip(make_examples: MakeExamples, rows: list[Row]) -> None:
    found = [edges_of(pack) for pack in packs_of(rows, make_examples(rows))]
    expected = weight_of_edges(rows)
    assert len(found) == bool(expected)
    assert (found or [{}])[0] == pytest.approx(expected, rel=ROUNDING)


@thorough
@given(rows=FAMILIES)
def test_each_distinct_context_is_one_node(make_examples: MakeExamples, rows: list[Row]) -> None:
    contexts = {context_of(row) for row in rows}
    prefixes = {context[:n] for context in contexts for n in range(1, len(context) + 1)}
    nodes = [node for pack in packs_of(rows, make_examples(rows)) for node in contexts_of_nodes(pack)]
    assert len(nodes) == len(prefixes)
    assert set(nodes) == prefixes


@thorough
@given(rows=FAMILIES, room=st.integers(0, 12))
def test_who_sees_whom(make_examples: MakeExamples, rows: list[Row], room: int) -> None:
    for pack in packs_of(rows, make_examples(rows), room):
        contexts = contexts_of_nodes(pack)
        assert pack.position_T.tolist() == [len(context) - 1 for context in contexts]
        for q, own in enumerate(contexts):
            for k, other in enumerate(contexts):
                assert (k <= q < pack.last_T[k]) == (own[: len(other)] == other), (k, q)


@thorough
@given(rows=FAMILIES, room=st.integers(0, 12))
def test_what_predicts_nothing_is_not_computed(make_examples: MakeExamples, rows: list[Row], room: int) -> None:
    for pack in packs_of(rows, make_examples(rows), room):
        leaves = np.flatnonzero(pack.last_T == np.arange(pack.num_nodes) + 1)
        assert set(leaves.tolist()) <= set(pack.source_E.tolist())


@thorough
@given(rows=FAMILIES, room=st.integers(0, 12), share=st.booleans())
def test_packs_hold_everything_once(make_examples: MakeExamples, rows: list[Row], room: int, share: bool) -> None:
    packs = packs_of(rows, make_examples(rows), room, share=share)
    for pack in packs:
        assert 0 < pack.num_nodes <= longest_context(rows) + room
    found: dict[tuple[Context, int], float] = defaultdict(float)
    for pack in packs:
        for edge, weight in edges_of(pack).items():
            found[edge] += weight
    assert dict(found) == pytest.approx(weight_of_edges(rows), rel=ROUNDING)
    total = sum(sum(weights) for _, weights in rows)
    assert sum(pack.weight_E.sum() for pack in packs) == pytest.approx(total, rel=ROUNDING)
    supervising = [i for i, (_, weights) in enumerate(rows) if any(weights)]
    assert sorted(i for pack in packs for i in pack.example_N.tolist()) == supervising


@thorough
@given(rows=FAMILIES, room=st.integers(0, 12), share=st.booleans())
def test_edge_of_each_supervised_token(make_examples: MakeExamples, rows: list[Row], room: int, share: bool) -> None:
    for pack in packs_of(rows, make_examples(rows), room, share=share):
        contexts = contexts_of_nodes(pack)
        for i, edge_of in zip(pack.example_N.tolist(), pack.edge_of_N, strict=True):
            token_ids, weights = rows[i]
            supervised = [t for t, weight in enumerate(weights) if weight]
            assert [contexts[s] for s in pack.source_E[edge_of]] == [tuple(token_ids[:t]) for t in supervised]
            assert pack.target_E[edge_of].tolist() == [token_ids[t] for t in supervised]


@thorough
@given(rows=FAMILIES, room=st.integers(0, 12), data=st.data())
def test_order_of_examples_changes_no_pack(
    make_examples: MakeExamples, rows: list[Row], room: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rows))
    given_order = packs_of(rows, make_examples(rows), room)
    other_order = packs_of(rows, make_examples(shuffled), room)
    assert len(given_order) == len(other_order)
    for a, b in zip(given_order, other_order, strict=True):
        assert contexts_of_nodes(a) == contexts_of_nodes(b)
        assert edges_of(a) == pytest.approx(edges_of(b), rel=ROUNDING)


@thorough
@given(rows=FAMILIES)
def test_without_sharing_each_example_is_a_chain(make_examples: MakeExamples, rows: list[Row]) -> None:
    packs = packs_of(rows, make_examples(rows), share=False)
    assert len(packs) == sum(any(weights) for _, weights in rows)
    for pack in packs:
        assert len(pack.example_N) == 1
        assert tuple(pack.token_T.tolist()) == context_of(rows[int(pack.example_N[0])])
        assert pack.position_T.tolist() == list(range(pack.num_nodes))
        assert pack.last_T.tolist() == [pack.num_nodes] * pack.num_nodes


@thorough
@given(rows=FAMILIES, room=st.integers(0, 12))
def test_runs_are_chains_with_their_paths(make_examples: MakeExamples, rows: list[Row], room: int) -> None:
    for pack in packs_of(rows, make_examples(rows), room):
        contexts = contexts_of_nodes(pack)
        covered: list[int] = []
        for start, end, path in runs(pack.position_T):
            nodes = [*path.tolist(), *range(start, end)]
            assert [contexts[node] for node in nodes] == [contexts[end - 1][: n + 1] for n in range(len(nodes))]
            covered += range(start, end)
        assert covered == list(range(pack.num_nodes))


@thorough
@given(rows=FAMILIES)
def test_sorting_keeps_what_supervises(make_examples: MakeExamples, rows: list[Row]) -> None:
    order = sort_by_prefix(make_examples(rows))
    assert sorted(order) == [i for i, (_, weights) in enumerate(rows) if any(weights)]
    assert [rows[i][0] for i in order] == sorted(rows[i][0] for i in order)


def test_sorting_compares_numbers_not_bytes(make_examples: MakeExamples) -> None:
    # 256 is 00 01 and 1 is 01 00 in little-endian bytes; the largest has all four bytes in use.
    first_tokens = [256, 1, 2**31 - 1, 255, 65536]
    examples = make_examples([([token, 7], [0.0, 1.0]) for token in first_tokens])
    assert [first_tokens[i] for i in sort_by_prefix(examples)] == sorted(first_tokens)


def test_the_example_of_the_docstring(make_examples: MakeExamples) -> None:
    answers = [0.0, 0.0, 1.0]
    examples = [
        one_example("abX", answers, make_examples),
        one_example("abY", answers, make_examples),
        one_example("abcZ", [0.0, 0.0, 0.0, 1.0], make_examples),
    ]
    [pack] = build_packs(examples, 3)
    assert "".join(map(chr, pack.token_T)) == "abc"
    assert pack.position_T.tolist() == [0, 1, 2]
    assert pack.last_T.tolist() == [3, 3, 3]
    edges = [(chr(pack.token_T[s]), chr(t)) for s, t in zip(pack.source_E, pack.target_E, strict=True)]
    assert edges == [("b", "X"), ("b", "Y"), ("c", "Z")]
    assert pack.weight_E.tolist() == [1, 1, 1]


def test_a_branch_ends_the_subtree(make_examples: MakeExamples) -> None:
    rows: list[Row] = [([1, 2, 3, 9], [0, 0, 0, 1]), ([1, 2, 4, 9], [0, 0, 0, 1]), ([1, 5, 9], [0, 0, 1])]
    [pack] = build_packs(make_examples(rows), 8)
    assert pack.token_T.tolist() == [1, 2, 3, 4, 5]
    assert pack.position_T.tolist() == [0, 1, 2, 2, 1]
    assert pack.last_T.tolist() == [5, 4, 3, 4, 5]


def test_duplicates_keep_their_weight(make_examples: MakeExamples) -> None:
    rows: list[Row] = [([1, 2, 3], [0, 0, 1])] * 3 + [([1, 2, 3], [0, 0, 0.5])]
    [pack] = build_packs(make_examples(rows), 2)
    assert pack.num_nodes == 2
    assert pack.weight_E.tolist() == [3.5]
    assert Counter(edge for edge_of in pack.edge_of_N for edge in edge_of.tolist()) == {0: 4}


@pytest.mark.parametrize("weights", [[], [0.0], [0.0, 0.0, 0.0]])
def test_nothing_supervised_gives_no_pack(make_examples: MakeExamples, weights: list[float]) -> None:
    examples = make_examples([(list(range(len(weights))), weights)])
    assert context_length(examples[0]) == 0
    assert build_packs(examples, 4) == []
    assert build_packs(examples, 4, share=False) == []
    assert build_packs([], 4) == []


def test_an_example_longer_than_a_pack_is_refused_by_place(make_examples: MakeExamples) -> None:
    rows: list[Row] = [([1, 2, 3], [0, 0, 1]), ([1, 2, 3, 4, 5], [0, 0, 0, 0, 1])]
    with pytest.raises(ValueError, match=re.escape("family.jsonl:2: 4 context tokens in a pack of 3")):
        build_packs(make_examples(rows), 3)
    # Only context is computed: the unsupervised tail takes no room.
    assert build_packs(make_examples([([1, 2, 3, 4, 5], [0, 0, 1, 0, 0])]), 2)[0].num_nodes == 2


def test_a_split_computes_the_prefix_again(make_examples: MakeExamples) -> None:
    rows: list[Row] = [([1, 2, 3, 9], [0, 0, 0, 1]), ([1, 2, 4, 9], [0, 0, 0, 1])]
    assert [pack.token_T.tolist() for pack in build_packs(make_examples(rows), 4)] == [[1, 2, 3, 4]]
    assert [pack.token_T.tolist() for pack in build_packs(make_examples(rows), 3)] == [[1, 2, 3], [1, 2, 4]]


@thorough
@given(rows=FAMILIES)
def test_weights_of_the_joint_likelihood(make_examples: MakeExamples, rows: list[Row]) -> None:
    for example in map(supervise_everything, make_examples(rows)):
        assert example.weights_T.tolist() == [0.0, *[1.0] * (len(example.token_ids_T) - 1)]


@thorough
@given(rows=FAMILIES)
def test_weights_per_example_sum_to_one(make_examples: MakeExamples, rows: list[Row]) -> None:
    for (_, weights), example in zip(rows, map(normalize_per_example, make_examples(rows)), strict=True):
        total = sum(weights)
        expected = [weight / total if total else 0.0 for weight in weights]
        assert example.weights_T.tolist() == pytest.approx(expected, rel=ROUNDING)


@thorough
@given(a=st.lists(st.integers(0, 1), max_size=6), b=st.lists(st.integers(0, 1), max_size=6))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    length = common_prefix(np.array(a, np.int64), np.array(b, np.int64))
    assert a[:length] == b[:length]
    assert length in {len(a), len(b)} or a[length] != b[length]


def test_an_empty_pack_is_a_pack(make_examples: MakeExamples) -> None:
    pack = build_pack(make_examples([([1, 2], [0.0, 0.0])]), [0])
    assert (pack.num_nodes, len(pack.source_E)) == (0, 0)
    assert subtree_ends(np.empty(0, np.int64)).tolist() == []
