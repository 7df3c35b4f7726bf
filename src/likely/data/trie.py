"""Examples -> one trie of their common token prefixes, in plain numpy.

    examples          a b X          nodes (preorder)   a  b  c      edges   b -> X
                      a b Y          position_T         0  1  2              b -> Y
                      a b c Z        last_T             3  3  3              c -> Z

The trie is the sufficient statistic of a step: the likelihood only needs, for each distinct context, how much weight
each next token has there. The last supervised token of an example predicts nothing, so it is an edge's target and not
a node, unless another example goes on from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from likely.types import Example, FloatArray, IntArray, Pack


def context_length(example: Example) -> int:
    """How many leading tokens of the example are context of a supervised token (0: nothing is supervised)."""
    supervised = np.flatnonzero(example.weights_T)
    return int(supervised[-1]) if len(supervised) else 0


def common_prefix(a_T: IntArray, b_T: IntArray) -> int:
    """Length of the common prefix of two token sequences."""
    length = min(len(a_T), len(b_T))
    differs = np.flatnonzero(a_T[:length] != b_T[:length])
    return int(differs[0]) if len(differs) else length


def sort_by_prefix(examples: Sequence[Example]) -> list[int]:
    """Indices of the examples that supervise something, in lexicographic order of their tokens, so that examples with a
    common prefix are neighbours, and in an order that does not depend on the given one."""
    # Big-endian bytes compare as the numbers do.
    keys = {
        i: (e.token_ids_T.astype(">u4").tobytes(), context_length(e))
        for i, e in enumerate(examples)
        if context_length(e)
    }
    return sorted(keys, key=keys.__getitem__)


def build_pack(examples: Sequence[Example], chosen: Sequence[int]) -> Pack:
    """The trie of ``examples[i] for i in chosen``; ``chosen`` is in the order of :func:`sort_by_prefix`."""
    tokens: list[IntArray] = []
    positions: list[IntArray] = []
    nodes_of: list[IntArray] = []
    path = np.empty(0, np.int64)
    path_tokens = np.empty(0, np.int64)
    num_nodes = 0
    for i in chosen:
        context = examples[i].token_ids_T[: context_length(examples[i])]
        shared = common_prefix(path_tokens, context)
        added = len(context) - shared
        if added:
            path = np.concatenate([path[:shared], np.arange(num_nodes, num_nodes + added)])
            path_tokens = context
            tokens.append(context[shared:])
            positions.append(np.arange(shared, len(context)))
            num_nodes += added
        nodes_of.append(path[: len(context)])
    token_T = np.concatenate([*tokens, np.empty(0, np.int64)]).astype(np.int64)
    position_T = np.concatenate([*positions, np.empty(0, np.int64)]).astype(np.int64)
    source_E, target_E, weight_E, edge_of_N = _merge_edges([examples[i] for i in chosen], nodes_of)
    return Pack(
        token_T,
        position_T,
        subtree_ends(position_T),
        source_E,
        target_E,
        weight_E,
        np.array(chosen, np.int64),
        edge_of_N,
    )


def _merge_edges(
    examples: Sequence[Example], nodes_of: Sequence[IntArray]
) -> tuple[IntArray, IntArray, FloatArray, tuple[IntArray, ...]]:
    """Supervised (node, gold token) pairs, each once with its summed weight, and where each example's tokens went."""
    supervised = [np.flatnonzero(e.weights_T) for e in examples]
    counts = [len(s) for s in supervised]
    if not sum(counts):
        empty = np.empty(0, np.int64)
        return empty, empty, np.empty(0, np.float64), tuple(empty for _ in examples)
    source = np.concatenate([nodes[s - 1] for nodes, s in zip(nodes_of, supervised, strict=True)])
    target = np.concatenate([e.token_ids_T[s] for e, s in zip(examples, supervised, strict=True)])
    weight = np.concatenate([e.weights_T[s] for e, s in zip(examples, supervised, strict=True)])
    width = int(target.max()) + 1
    pair_E, edge = np.unique(source * width + target, return_inverse=True)
    weight_E = np.bincount(edge, weights=weight, minlength=len(pair_E)).astype(np.float64)
    edge_of_N = tuple(np.split(edge, np.cumsum(counts)[:-1]))
    return pair_E // width, pair_E % width, weight_E, edge_of_N


def runs(position_T: IntArray) -> Iterator[tuple[int, int, IntArray]]:
    """The chains a preorder trie is made of, from its depths alone: ``(start, end, path)`` where each of the nodes
    ``start..end-1`` is the child of the one before it, and ``path`` holds the nodes from the root to the chain's
    parent."""
    if not len(position_T):
        return
    starts = np.union1d(0, np.flatnonzero(np.diff(position_T, prepend=-1) != 1))
    path = np.empty(int(position_T.max(initial=-1)) + 1, np.int64)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(position_T)], strict=True):
        depth = int(position_T[start])
        yield start, end, path[:depth].copy()
        path[depth : depth + end - start] = np.arange(start, end)


def subtree_ends(position_T: IntArray) -> IntArray:
    """``last_T`` from depths in preorder: a node's subtree ends where the next chain leaves the node's path."""
    last_T = np.full(len(position_T), len(position_T), np.int64)
    previous = np.empty(0, np.int64)
    for start, end, path in runs(position_T):
        last_T[previous[len(path) :]] = start
        previous = np.concatenate([path, np.arange(start, end)])
    return last_T


def entropy_floor(examples: Sequence[Example]) -> float:
    """The least NLL per unit of weight (nats) that any model can reach on these examples.

    At a context whose next tokens hold weights w_e, W in all, the best distribution is w_e / W, and its loss there is
    the entropy of it: ``sum_e w_e log(W / w_e)`` (Gibbs' inequality). It is zero where no context has two answers.
    """
    pack = build_pack(examples, sort_by_prefix(examples))
    total_T = np.bincount(pack.source_E, weights=pack.weight_E, minlength=pack.num_nodes)
    return float((pack.weight_E * np.log(total_T[pack.source_E] / pack.weight_E)).sum() / pack.weight_E.sum())
