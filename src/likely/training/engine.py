"""The loop around the training step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from likely.data.dealing import Cost, deal
from likely.data.order import Order
from likely.data.packing import build_packs, idle_pack, normalize_per_example
from likely.data.trie import context_length
from likely.errors import NonFiniteError, ResourceError, first_line, is_out_of_memory
from likely.model.forward import LanguageModel
from likely.training.ahead import Ahead
from likely.training.optim import Schedule, learning_rate_at, set_learning_rate
from likely.training.parallel import ALONE, Ranks
from likely.training.step import apply_gradient, compute_gradient
from likely.types import Example, IntArray, Pack, StepMetrics


@dataclass(frozen=True)
class TrainingPlan:
    """What the loop needs to know. ``batch_size`` in examples per optimizer step, ``pack_tokens`` in trie tokens per
    forward; ``normalize`` as in the config; ``family_N`` as in :class:`likely.data.order.Order`."""

    num_steps: int
    batch_size: int
    pack_tokens: int
    peak_learning_rate: float
    warmup: float
    schedule: Schedule
    max_grad_norm: float
    normalize: str
    seed: int
    family_N: IntArray | None = None


class Observer(Protocol):
    """Who is told of the steps."""

    def updating(self) -> AbstractContextManager[None]:
        """Inside, the weights change and :meth:`updated` is called: both or neither, whatever happens."""

    def updated(self, metrics: StepMetrics) -> None:
        """The step's weights are there: note it, and be short, since signals wait."""

    def between_steps(self, step: int) -> bool | None:
        """After step ``step``, where there is time: evaluate, save. True ends the training here."""

    def short_of_memory(self, step: int, pack_tokens: int) -> None:
        """The step did not fit in memory and is tried again with smaller packs, which change nothing else."""

    def not_finite(self, step: int, error: NonFiniteError) -> None:
        """The step's gradient can't be used, and no weight was changed: raise, or return to leave the step out."""


def train(
    model: LanguageModel,
    examples: Sequence[Example],
    optimizer: torch.optim.Optimizer,
    plan: TrainingPlan,
    observer: Observer,
    *,
    steps_done: int = 0,
    ranks: Ranks = ALONE,
) -> None:
    """The steps of a plan after the ``steps_done`` first ones. Each rank is told all examples and computes its part.

    Raises:
        NonFiniteError: names the step and the examples in it; the weights are those of the step before.
        ResourceError: an example alone doesn't fit in memory.
    """
    order = Order(len(examples), plan.batch_size, plan.seed, plan.family_N)
    fitting = _Fitting(model, optimizer, plan.pack_tokens, plan.max_grad_norm, observer, ranks)
    cost = Cost() if ranks.alone else model.predicted_cost

    def prepare(key: tuple[int, int]) -> _Prepared:
        step, pack_tokens = key
        chosen = [examples[i] for i in order.of_step(step)]
        weighed = [normalize_per_example(e) for e in chosen] if plan.normalize == "example" else chosen
        own = [weighed[i] for i in deal(weighed, ranks.world_size, cost, share=model.shares)[ranks.rank]]
        return _Prepared(chosen, weighed, own, _packs_of(own, pack_tokens, share=model.shares))

    with Ahead(prepare) as ahead:
        for step in range(steps_done + 1, plan.num_steps + 1):
            started = time.perf_counter()
            following = (step + 1, fitting.pack_tokens) if step < plan.num_steps else None
            prepared = ahead.take((step, fitting.pack_tokens), following)
            _run_step(step, prepared, plan, fitting, started)
            if observer.between_steps(step):
                return


@dataclass(frozen=True)
class _Prepared:
    """What of a step doesn't depend on the weights: its examples, in the order of the data and as they are weighed,
    those of them that this rank computes, and the packs of these."""

    chosen: list[Example]
    weighed: list[Example]
    own: list[Example]
    packs: list[Pack]


def _packs_of(examples: Sequence[Example], pack_tokens: int, *, share: bool) -> list[Pack]:
    """A step's packs, larger than ``pack_tokens`` where an example alone is."""
    longest = max((context_length(example) for example in examples), default=0)
    return build_packs(examples, max(pack_tokens, longest), share=share)


def _run_step(step: int, prepared: _Prepared, plan: TrainingPlan, fitting: _Fitting, started: float) -> None:
    observer, optimizer, chosen = fitting.observer, fitting.optimizer, prepared.chosen
    learning_rate = learning_rate_at(
        step, peak=plan.peak_learning_rate, num_steps=plan.num_steps, warmup=plan.warmup, schedule=plan.schedule
    )
    set_learning_rate(optimizer, learning_rate)
    try:
        nll, grad_norm, distinct_tokens = fitting.compute_gradient(step, prepared)
    except NonFiniteError as error:
        observer.not_finite(step, _located(error, step, chosen))
        return
    with observer.updating():
        apply_gradient(optimizer)
        observer.updated(
            StepMetrics(
                step=step,
                nll=nll,
                tokens=sum(len(e.token_ids_T) for e in chosen),
                distinct_tokens=distinct_tokens,
                supervised_tokens=sum(int((e.weights_T > 0).sum()) for e in chosen),
                grad_norm=grad_norm,
                learning_rate=learning_rate,
                seconds=time.perf_counter() - started,
            )
        )


@dataclass
class _Fitting:
    """Gradients in packs that fit in memory: where one doesn't, activations are computed again rather than kept, and
    then the packs are halved, for good."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    pack_tokens: int
    max_grad_norm: float
    observer: Observer
    ranks: Ranks

    def compute_gradient(self, step: int, prepared: _Prepared) -> tuple[float, float, int]:
        """NLL per unit of weight, the gradient's norm, and the number of trie tokens that all ranks computed."""
        # All ranks know all examples, so nobody need ask for the sum.
        weight = None if self.ranks.alone else float(sum(e.weights_T.sum() for e in prepared.weighed))
        packs: Sequence[Pack] = prepared.packs
        idle = [idle_pack()] * (self._most(len(packs)) - len(packs))
        while True:
            try:
                nll, grad_norm = compute_gradient(
                    self.model, [*packs, *idle], self.optimizer, self.max_grad_norm, ranks=self.ranks, num_tokens=weight
                )
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.model.sharded:
                    raise
                failure = first_line(error)
            else:
                num_nodes = self.ranks.all_sum(np.array([float(sum(pack.num_nodes for pack in packs))]))
                return nll, grad_norm, int(num_nodes[0])
            # Nothing was exchanged yet: the others wait for this rank's part.
            self._make_smaller(step, max(pack.num_nodes for pack in packs), prepared.own, failure)
            packs = _packs_of(prepared.own, self.pack_tokens, share=self.model.shares)

    def _most(self, num_packs: int) -> int:
        """The packs of the rank that has most of them: with sharded weights, all make the same forwards."""
        counts = self.ranks.gather(np.array([float(num_packs)])) if self.model.sharded else [[num_packs]]
        return max(int(count[0]) for count in counts)

    def _make_smaller(self, step: int, largest: int, examples: Sequence[Example], failure: str) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        longest = max(examples, key=context_length)
        if self.model.activation_room != 0:
            self.model.activation_room = 0
        elif largest > context_length(longest):
            self.pack_tokens = max(context_length(longest), largest // 2)
        else:
            raise ResourceError(
                f"out of memory with an example of {largest} tokens alone ({failure})",
                place=str(longest.source),
                way_out="lower --max-length or use --tune lora",
            )
        self.observer.short_of_memory(step, self.pack_tokens)


def _located(error: NonFiniteError, step: int, chosen: Sequence[Example]) -> NonFiniteError:
    named = ", ".join(str(e.source) for e in chosen[:8])
    more = f" and {len(chosen) - 8} more" if len(chosen) > 8 else ""
    return NonFiniteError(
        error.message,
        place=f"step {step}",
        way_out=f"look at {named}{more}, lower --learning-rate, or leave such steps out with --skip-nonfinite",
    )
