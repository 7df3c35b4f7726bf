"""The examples of one step -> packs of at most ``pack_tokens`` trie tokens.

The split is a memory knob: edges carry weights and the loss is a sum, so no split changes the step's gradient. It only
decides how much of a shared prefix is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from likely.data.trie import build_pack, common_prefix, context_length, sort_by_prefix
from likely.errors import ConfigError
from likely.types import Example, Pack, Source

# Room for a long shared prefix and what branches off it.
DEFAULT_PACK_TOKENS = 16384
# Enough for matrix products at full speed; a larger pack only pays where it shares more.
ENOUGH_TOKENS = 2048


def choose_pack_tokens(wanted: int | None, longest: int, source: Source) -> int:
    """Trie tokens of a forward, with room for the longest example, which stands at ``source``.

    Raises:
        ConfigError: fewer are wanted than that has.
    """
    if wanted is not None and wanted < longest:
        raise ConfigError(
            f"pack_tokens {wanted} can't hold the longest example, {longest} tokens",
            place=str(source),
            way_out=f"use at least {longest}",
        )
    return wanted or default_pack_tokens(longest)


def build_packs(examples: Sequence[Example], pack_tokens: int, *, share: bool = True) -> list[Pack]:
    """Every example that supervises something, in packs that end where they are large enough and the next example
    would share less than half of its tokens with the one before.

    Args:
        examples: the examples of one step, in any order; the result's edges don't depend on it.
        pack_tokens: upper bound of trie tokens in one pack.
        share: False gives each example a pack of its own, for models whose layers can't follow a branch.

    Raises:
        ValueError: one example alone needs more than ``pack_tokens``.
    """
    return [build_pack(examples, chosen) for chosen in plan_packs(examples, pack_tokens, share=share)]


def plan_packs(examples: Sequence[Example], pack_tokens: int, *, share: bool = True) -> list[list[int]]:
    """Which examples each pack of :func:`build_packs` holds, so that packs can be built one by one."""
    plan: list[list[int]] = []
    chosen: list[int] = []
    num_nodes, path = 0, np.empty(0, np.int64)
    for i in sort_by_prefix(examples):
        context = examples[i].token_ids_T[: context_length(examples[i])]
        if len(context) > pack_tokens:
            raise ValueError(f"{examples[i].source}: {len(context)} context tokens in a pack of {pack_tokens}")
        added = len(context) - common_prefix(path, context)
        little_shared = num_nodes >= ENOUGH_TOKENS and 2 * added > len(context)
        if chosen and (not share or num_nodes + added > pack_tokens or little_shared):
            plan.append(chosen)
            chosen, num_nodes, added = [], 0, len(context)
        chosen.append(i)
        num_nodes += added
        if added:
            path = context
    if chosen:
        plan.append(chosen)
    return plan


def idle_pack() -> Pack:
    """One node that predicts nothing, for a process that only keeps the others company."""
    none = np.empty(0, np.int64)
    zero = np.zeros(1, np.int64)
    return Pack(zero, zero, zero + 1, none, none, np.empty(0), none, ())


def default_pack_tokens(longest: int) -> int:
    """Room for the longest example, of so many tokens, and for a prefix that many examples share."""
    return max(DEFAULT_PACK_TOKENS, longest)


def supervise_everything(example: Example) -> Example:
    """The example with weight 1 on every token that has a predecessor: the joint likelihood log P(x, y)."""
    weights_T = np.ones(len(example.token_ids_T))
    weights_T[:1] = 0.0
    return replace(example, weights_T=weights_T)


def normalize_per_example(example: Example) -> Example:
    """The example with its weights divided by their sum, so that a long answer counts as much as a short one."""
    total = float(example.weights_T.sum())
    return replace(example, weights_T=example.weights_T / total) if total else example
