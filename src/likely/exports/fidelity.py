"""Whether an export says what the run says: the same tokens for the same text, the same likelihood for the same tokens,
and an end to its answers.

The likelihood of answers is compared per token and in the mean, as a run reports it, and again without signs, so that
a change for the better here can't hide one for the worse there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from likely.data.template import Ask, ChatTemplate, Problem
from likely.errors import ModelError, quoted
from likely.exports.readers import Reading
from likely.exports.sample import Sample, Spoken
from likely.types import ExampleScore, FloatArray

# Nats per token that each format may change, by what its rounding does: float16 keeps 11 bits of a number, bfloat16 8,
# q8_0 gives 8 bits and a scale to each 32 numbers. A base in four bits (nf4) is exactly that of training, but
# bitsandbytes computes with it in bfloat16 on some processors.
BOUNDS = {
    "float32": 1e-4,
    "float16": 5e-3,
    "bfloat16": 2e-2,
    "nf4": 2e-2,
    "f32": 1e-4,
    "f16": 5e-3,
    "bf16": 2e-2,
    "q8_0": 2e-2,
}
# Single tokens change more than their mean does, and in both directions.
UNSIGNED = 4.0

# The same conversation for everybody: what tokenizers that look alike disagree about.
NASTY = (
    "1234567890 3.14 10,000 2026-11-24",
    "I'm sure they've don't WE'LL",
    "  two  spaces\n\n\nthree lines\t\ttabs   \n end ",
    "Où est la gare ? Naïve café, Straße, ÀÉÎ",
    "東京 こんにちは 안녕하세요 привет мир שלום",
    "emoji 🙂👩‍👩‍👧 ✓ … “quotes” — dash",
    "def f(x):\n    return {'a': [1, 2]}  # done\r\n",
    "http://example.org/a?b=c&d=e#f CamelCaseWord snake_case",
)


@dataclass(frozen=True)
class Likelihood:
    """Nats per token of the sample's answers, under the run and under the export. ``unsigned`` is the mean of the
    absolute differences per token, ``largest`` the largest of one token."""

    run: float
    export: float
    bound: float
    unsigned: float
    largest: float

    @property
    def difference(self) -> float:
        return self.export - self.run


def compare_likelihood(
    sample: Sample,
    scores: Sequence[ExampleScore],
    reading: Reading,
    bound: float,
    track: Callable[[Any, str, int], Any],
) -> Likelihood:
    """Score the sample by the export, and put it beside the run's ``scores``.

    Raises:
        ModelError: they differ by more than ``bound``, or the export gives no finite number.
    """
    own, other, weight = (np.zeros(0) for _ in range(3))
    for example, score in track(list(zip(sample.examples, scores, strict=True)), "verifying", len(scores)):
        chosen = example.weights_T[1:] > 0
        found: FloatArray = reading.logprobs(example.token_ids_T.tolist())
        own = np.append(own, score.logprob_T[1:][chosen])
        other = np.append(other, found[chosen])
        weight = np.append(weight, example.weights_T[1:][chosen])
    change = own - other
    total = float(weight.sum())
    found_likelihood = Likelihood(
        run=-float(own @ weight) / total,
        export=-float(other @ weight) / total,
        bound=bound,
        unsigned=float(np.abs(change) @ weight) / total,
        largest=float(np.abs(change).max()),
    )
    if not (abs(found_likelihood.difference) <= bound and found_likelihood.unsigned <= UNSIGNED * bound):
        raise ModelError(
            f"the export is another model than the run: NLL {found_likelihood.export:.6f} instead of"
            f" {found_likelihood.run:.6f} nats per token over {len(scores)} rows, single tokens"
            f" {found_likelihood.unsigned:.2g} apart in the mean, and {bound:g} is allowed ({reading.tool})",
        )
    return found_likelihood


def compare_stops(stop_id: int, reading: Reading, tokenizer: Any) -> None:
    """The token that ends a turn in training must end an answer.

    Raises:
        ModelError: it does not.
    """
    if stop_id not in reading.stop_ids:
        known = ", ".join(quoted(tokenizer.decode([i])) for i in sorted(reading.stop_ids)) or "nothing"
        raise ModelError(
            f"the export does not stop at {quoted(tokenizer.decode([stop_id]))}, which ends a turn in training, but at"
            f" {known}"
        )


def compare_special(reading: Reading, tokenizer: Any) -> None:
    """The tokens with a part of their own (beginning, end, padding ...) must be those of training.

    Raises:
        ModelError: one of them is another.
    """
    wanted, found = tokenizer.special_tokens_map, reading.variables
    for name in sorted({*wanted, *found}):
        if str(wanted.get(name)) != str(found.get(name)):
            one, other = (quoted(str(each.get(name))) for each in (found, wanted))
            raise ModelError(f"its {name} is {one}, and that of training {other}")


def compare_tokens(
    sample: Sample, reading: Reading, tokenizer: Any, date: str, prompt_of: Callable[[Spoken], str] | None = None
) -> int:
    """Tokenise the sample and a few nasty texts by the export; how many texts were the same.

    Args:
        tokenizer: the run's.
        date: what templates write that ask for the day.
        prompt_of: the prompt's text where it is not the export's chat template that writes it; then nothing else is
            compared, and a tool puts around it what it puts around any text.

    Raises:
        ModelError: some text has other tokens; the first is told.
    """
    template = _template_of(reading, date)
    num_same = 0
    for text in NASTY if prompt_of is None else ():
        wanted = list(tokenizer(text, add_special_tokens=False).input_ids)
        _same(wanted, reading.encode(text), f"the text {quoted(text)}", tokenizer)
        num_same += 1
    for row in sample.rows:
        if row.text is not None:
            _same(row.whole_ids, _closed(row, reading.encode_raw(row.text)), str(row.source), tokenizer)
            num_same += 1
            continue
        if prompt_of is not None:
            found = reading.encode_raw(prompt_of(row))
            _same(row.prompt_ids, found, f"the prompt of {row.source}", tokenizer)
            num_same += 1
            continue
        prompt, whole = _written(template, row)
        _same(row.prompt_ids, reading.encode(prompt), f"the prompt of {row.source}", tokenizer)
        _same(row.whole_ids, reading.encode(whole), str(row.source), tokenizer)
        num_same += 2
    return num_same


def _template_of(reading: Reading, date: str) -> ChatTemplate | None:
    if reading.template is None:
        return None
    sources = reading.template if isinstance(reading.template, Mapping) else {"default": reading.template}
    return ChatTemplate(sources, reading.variables, date)


def _written(template: ChatTemplate | None, row: Spoken) -> tuple[str, str]:
    if template is None:
        raise ModelError("the export has no chat template, and the run has one")
    number = len(row.messages)
    prompt, whole = template.texts(row.messages, row.tools, [Ask(number - 1, with_prompt=True), Ask(number)])
    for text in (prompt, whole):
        if isinstance(text, Problem):
            raise ModelError(f"the export's chat template can't write {row.source}: {text.message}")
    return str(prompt), str(whole)


def _closed(row: Spoken, ids: list[int]) -> list[int]:
    """Training ends bare text with a token of its own; some tokenizers have put it there already."""
    end = row.whole_ids[-1:]
    return ids if ids[-1:] == end else [*ids, *end]


def _same(wanted: Sequence[int], found: Sequence[int], what: str, tokenizer: Any) -> None:
    if list(wanted) == list(found):
        return
    place = next(
        (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), min(len(wanted), len(found))
    )
    trained, exported = (quoted(tokenizer.decode(list(ids[place : place + 4]))) for ids in (wanted, found))
    raise ModelError(
        f"{what} has other tokens in the export: from token {place} on {exported} where training has {trained}"
    )
