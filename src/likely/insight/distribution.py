"""What maximum likelihood does to a distribution given by hand: no model needed.

With gold token g the loss of a position is -log p[g], and its gradient on the logits is p - onehot(g).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from likely.errors import ConfigError

REST = "everything else"


def parse(text: str) -> dict[str, float]:
    """``"Paris=0.25,London=0.1"`` -> ``{"Paris": 0.25, "London": 0.1}``, in this order.

    Raises:
        ConfigError: no such pairs, a token twice, or numbers that are no probabilities.
    """
    found: dict[str, float] = {}
    for pair in text.split(","):
        name, _, number = pair.rpartition("=")
        try:
            probability = float(number)
        except ValueError:
            probability = math.nan
        if not name.strip() or not 0 <= probability <= 1:
            raise ConfigError(f"{pair!r} is no token=probability", way_out="write gold=0.25,rival=0.35")
        if name.strip() in found:
            raise ConfigError(f"the token {name.strip()!r} stands twice", way_out="name each token once")
        if name.strip() == REST:
            raise ConfigError(f"{REST!r} is what the listed tokens leave of 1", way_out="leave it out")
        found[name.strip()] = probability
    total = sum(found.values())
    if total > 1 + 1e-9:
        raise ConfigError(f"the probabilities sum to {total:.12g}", way_out="let them sum to at most 1")
    return found


@dataclass(frozen=True)
class Pull:
    """What an update does to one token of a distribution. ``gradient`` is its entry of p - onehot; after a step of size
    ``rate`` on the logits, ``probability`` becomes ``after``."""

    text: str
    gold: bool
    probability: float
    gradient: float
    after: float


def pulls(distribution: Mapping[str, float], gold: str, rate: float) -> list[Pull]:
    """One gradient step on the logits of a distribution given by hand: ``z - rate * (p - onehot(gold))``.

    Mass that is not listed, "everything else", is taken as spread thinly over many tokens: the gradient on each of
    their logits is about zero, so only the normalisation moves them.
    """
    total = sum(distribution.values())
    named = dict(distribution) | ({REST: 1 - total} if total < 1 - 1e-9 else {})
    gradient = {text: p - (text == gold) for text, p in named.items()}
    # With the largest logit at 0, so that no step size is too large.
    logit = {text: math.log(p) - (0 if text == REST else rate * gradient[text]) for text, p in named.items() if p > 0}
    highest = max(logit.values())
    lifted = {text: math.exp(logit[text] - highest) if text in logit else 0.0 for text in named}
    mass = sum(lifted.values())
    return [Pull(text, text == gold, p, gradient[text], lifted[text] / mass) for text, p in named.items()]


def which_is_better(gold: str, a: float, b: float) -> str:
    """The answer to "which of two distributions is better", by the objective."""
    if a == b:
        return f"Neither is better: both give the gold token {gold!r} {a:.4g}, so both lose {-math.log(a):.4f} nats."
    name, worse = ("B", "A") if b > a else ("A", "B")
    high, low = max(a, b), min(a, b)
    return (
        f"{name} is better, by {math.log(high / low):.4f} nats: it gives the gold token {gold!r} {high:.4g} and loses"
        f" {-math.log(high):.4f} nats there, {worse} gives it {low:.4g} and loses {-math.log(low):.4f}."
        " How the rest is spread over other tokens does not enter the loss of this position."
    )


def explain_distribution(text: str, against: str | None, rate: float) -> dict[str, Any]:
    """What one step on the logits does to a distribution, and which of two is better.

    Returns:
        ``{"gold", "nll", "pulls": [...], "words": sentence, "better": sentence or null}``

    Raises:
        ConfigError: see :func:`parse`, or one of them has no probability for the gold token, the first of ``text``.
    """
    distribution = parse(text)
    gold = next(iter(distribution))
    if distribution[gold] == 0:
        raise ConfigError("the gold token, the first one, has probability 0", way_out="no finite step changes that")
    found = pulls(distribution, gold, rate)
    better = None
    if against is not None:
        other = parse(against)
        if not other.get(gold):
            raise ConfigError(f"the second distribution gives the gold token {gold!r} nothing", way_out="name it there")
        better = which_is_better(gold, distribution[gold], other[gold])
    own = found[0]
    rivals = max((p for p in found[1:] if p.text != REST), key=lambda p: p.probability, default=None)
    words = (
        f"The update raises the logit of the gold token {gold!r} by {abs(own.gradient):.4g} times the step size"
        f" (1 - {own.probability:.4g}) and lowers each other logit by its own probability times the step size"
    )
    if rivals is not None:
        words += (
            f": {rivals.text!r} by {rivals.gradient:.4g}. With step size {rate:g}, {gold!r} goes"
            f" {own.probability:.4g} -> {own.after:.4g} and {rivals.text!r}"
            f" {rivals.probability:.4g} -> {rivals.after:.4g}"
        )
    return {
        "gold": gold,
        "nll": -math.log(own.probability),
        "pulls": [asdict(p) for p in found],
        "words": words + ". The entries of p - onehot sum to zero.",
        "better": better,
    }
