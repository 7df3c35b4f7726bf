"""One training of a learning curve, judged: by held-out rows, and by some of those that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from likely.errors import ModelError
from likely.insight import evaluate as evaluation
from likely.model.forward import LanguageModel
from likely.training.checkpoint import State
from likely.training.parallel import Ranks
from likely.types import Example, ExampleScore, FloatArray


@dataclass(frozen=True)
class Judged:
    """The weighted NLL (nats) of each held-out example, and after how many steps; and that of some examples that were
    trained on, with their weights."""

    nll_N: FloatArray
    step: int
    seen_nll_M: FloatArray
    seen_weight_M: FloatArray

    def to_json(self) -> dict[str, Any]:
        seen = {"nll_nats": self.seen_nll_M.tolist(), "weights": self.seen_weight_M.tolist()}
        return {"step": self.step, "nll_nats": self.nll_N.tolist(), "seen": seen}

    @classmethod
    def from_json(cls, content: Any, place: str = "") -> Judged:
        """What :meth:`to_json` gave.

        Raises:
            ModelError: it is something else, such as what an older version wrote.
        """
        try:
            seen = content["seen"]
            numbers = [np.array(kept, np.float64) for kept in (content["nll_nats"], seen["nll_nats"], seen["weights"])]
            return cls(numbers[0], content["step"], *numbers[1:])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError("is not of this version", place=place, way_out="the point is made again") from error

    @property
    def seen_nll(self) -> float:
        """Nats per token of the examples that were trained on."""
        return float(self.seen_nll_M.sum() / self.seen_weight_M.sum())


@dataclass
class Judge:
    """Judges a model as its training goes on; ``best`` is what the best evaluation gave."""

    model: LanguageModel
    tokenizer: Any
    held_out: Sequence[Example]
    trained_on: Sequence[Example]
    pack_tokens: int
    ranks: Ranks
    best: Judged | None = None
    _nll_N: FloatArray | None = None  # of the held-out examples, with the weights of the latest evaluation

    def judge(self, step: int) -> Judged:
        """With the weights of now."""
        self._nll_N, _ = evaluation.nll_per_example(self.held_out, self._score(self.held_out))
        return self._with_seen(step)

    def evaluate(self) -> evaluation.Evaluation:
        scores = self._score(self.held_out)
        self._nll_N, _ = evaluation.nll_per_example(self.held_out, scores)
        return evaluation.summarize(self.held_out, scores, self.tokenizer)

    def keep(self, state: State) -> None:
        """Told of a state worth saving, after its evaluation."""
        if state.best and state.best[0] == state.step:
            self.best = self._with_seen(state.step)

    def _with_seen(self, step: int) -> Judged:
        assert self._nll_N is not None, "nothing was evaluated"  # noqa: S101
        scores = self._score(self.trained_on) if self.trained_on else []
        return Judged(self._nll_N, step, *evaluation.nll_per_example(self.trained_on, scores))

    def _score(self, examples: Sequence[Example]) -> list[ExampleScore]:
        return evaluation.score_examples(self.model, examples, self.pack_tokens, ranks=self.ranks)


def some_of(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    """All examples that something is learnt of, or ``most`` that the seed draws, in their order."""
    drawn = np.random.default_rng(seed).permutation(len(examples)).tolist()
    taught = islice((i for i in drawn if examples[i].weights_T.sum() > 0), most)
    return [examples[i] for i in sorted(taught)]
