"""The facts and the verdict of a run: what its report says, without the way it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from likely.insight.evaluate import Delta, Evaluation
from likely.insight.lens import Lens
from likely.insight.movement import RowMove
from likely.types import StepMetrics

LIMITS = (
    "The loss judges the gold answers token by token. Whether a freely written answer is good or true is unknown.",
    "The intervals speak of examples like the held-out ones, and not of other prompts, languages or uses.",
    "One training with one seed was run: how much another seed would differ is not known.",
)
FEW_EXAMPLES = 20  # below, a percentile bootstrap covers clearly less than it says


@dataclass(frozen=True)
class Answer:
    """One greedy answer of each model beside the wanted one."""

    prompt: str
    gold: str
    before: str
    after: str


@dataclass(frozen=True)
class Report:
    """All that the page shows. ``entropy_floor`` is the least training NLL any model can reach; ``eval_is_data``
    says that the held-out data is the training data; ``sources``, ``weights``, ``nll_before`` and ``nll_after`` are of
    each held-out example: where it stands, its supervised weight, nats per token; ``evaluations`` are
    ``{"step", "nll", "ci95"}`` of the held-out data in the order of steps, the base's at 0 and the tuned model's;
    ``ends`` and ``moved`` are of :mod:`likely.insight.movement`, ``lengths`` of :mod:`likely.insight.lengths`, and
    ``counted`` and ``hashes`` say what was counted, and of what data it was; ``notes`` what was told about the data."""

    title: str
    facts: dict[str, str]
    steps: Sequence[StepMetrics]
    entropy_floor: float | None
    base: Evaluation | None = None
    tuned: Evaluation | None = None
    delta: Delta | None = None
    eval_is_data: bool = False
    sources: Sequence[str] = ()
    weights: Sequence[float] = ()
    nll_before: Sequence[float] = ()
    nll_after: Sequence[float] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    lens: Lens | None = None
    moved: Sequence[RowMove] = ()
    ends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lengths: dict[str, Any] | None = None
    answers: Sequence[Answer] = ()
    held_out: dict[str, Any] | None = None
    retain: dict[str, Any] | None = None
    guard: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    counted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    hashes: Mapping[str, str | None] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def exact_match(self) -> tuple[int, int] | None:
        """How many greedy answers equal the gold one, before and after."""
        if not self.answers:
            return None
        return sum(a.before == a.gold for a in self.answers), sum(a.after == a.gold for a in self.answers)

    @property
    def effect(self) -> str:
        """``better``, ``worse`` or ``unclear``: what the interval of the change supports; ``unknown`` without one."""
        if self.delta is None or self.delta.ci95 is None:
            return "unknown"
        low, high = self.delta.ci95
        return "better" if high < 0 else "worse" if low > 0 else "unclear"

    @property
    def verdict(self) -> str:
        """What the figures support, and no more: a sentence on held-out text, and one each where text that should be
        retained was forgotten beyond chance or a guard's bound was passed."""
        return " ".join([self._gain, *self._harm])

    @property
    def _harm(self) -> list[str]:
        found = []
        change = self.retain["change_ci95"] if self.retain else None
        if self.retain and change and change[0] > 0:
            found.append(
                f"Retained text became less likely, by {self.retain['change']:.4f} nats per token"
                f" (95% interval [{change[0]:+.4f}, {change[1]:+.4f}])."
            )
        if self.guard and self.guard["passed"] is False:
            broken = sum(bool(row["broken"]) for row in self.guard["rows"])
            found.append(
                f"{broken} of {self.guard['num_rows']} unwanted responses gained more than the bound of"
                f" {self.guard['max_gain']:g} nats."
            )
        return found

    @property
    def _gain(self) -> str:
        if self.base is None or self.tuned is None or self.delta is None:
            return (
                "No held-out data was given, so nothing can be said about new examples; "
                f"the last step's training NLL was {self.steps[-1].nll:.4f} nats per token."
            )
        change = f"held-out NLL {self.base.nll:.4f} -> {self.tuned.nll:.4f} nats per token"
        if self.delta.ci95 is None:
            return f"One held-out example is too few for a verdict: {change}."
        low, high = self.delta.ci95
        effect = {"better": "Training helped", "worse": "Training hurt", "unclear": "No clear change"}[self.effect]
        few = self.tuned.num_examples < FEW_EXAMPLES
        return (
            f"{effect}: {change} (change {self.delta.nll:+.4f}, 95% interval [{low:+.4f}, {high:+.4f}]), "
            f"better on {self.delta.share_better:.0%} of {self.tuned.num_examples} examples."
            + (" So few examples make such an interval too narrow." if few else "")
            + (
                " The held-out data is the training data, so this says nothing about new examples."
                if self.eval_is_data
                else ""
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json. What there is one of for each step or example stands in the CSV files."""
        before_after = self.exact_match
        apart = {"steps", "sources", "weights", "nll_before", "nll_after"}
        return {
            "verdict": self.verdict,
            **{k: v for k, v in asdict(self).items() if k not in apart},
            "exact_match": before_after
            and {"base": before_after[0], "tuned": before_after[1], "of": len(self.answers)},
            "last_step": asdict(self.steps[-1]) if self.steps else None,
        }
