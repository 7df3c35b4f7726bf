"""A data file -> examples, and the order in which steps take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from likely.data.formats import Reading
from likely.data.render import Renderer
from likely.errors import DataError
from likely.types import ROLES, Conversation, Example, IntArray

Track = Callable[[Iterable[Conversation], str, int], Iterable[Conversation]]


@dataclass(frozen=True)
class Dataset:
    """Examples of a file. ``row_N`` is the index of each example's conversation: a conversation whose template rewrites
    history gives several. ``num_unweighted`` counts the examples left out since all their weights are 0."""

    path: str
    sha256: str
    conversations: tuple[Conversation, ...]
    examples: tuple[Example, ...]
    row_N: tuple[int, ...]
    num_unweighted: int

    def tokens_per_role(self) -> dict[str, dict[str, float]]:
        """``{role: {"tokens": count, "supervised": count, "weight": sum}}`` over all examples."""
        counts = np.zeros((len(ROLES), 3))
        for example in self.examples:
            for column, values in enumerate(
                (np.ones(len(example.weights_T)), example.weights_T > 0, example.weights_T)
            ):
                counts[:, column] += np.bincount(example.role_T, weights=values, minlength=len(ROLES))
        return {
            role: {"tokens": int(tokens), "supervised": int(supervised), "weight": float(weight)}
            for role, (tokens, supervised, weight) in zip(ROLES, counts, strict=True)
            if tokens
        }


def load_dataset(
    path: str, renderer: Renderer, max_length: int, track: Track | None = None, *, keep_unweighted: bool = False
) -> Dataset:
    """Read and render a file.

    Args:
        path: a data file; see :mod:`likely.data.reading`.
        max_length: the longest example allowed, in tokens.
        track: shows progress: called with the rows, a title and their number.
        keep_unweighted: keep examples whose weights are all 0, to look at them.

    Raises:
        DataError: a row can't be read, rendered or proved; rows over ``max_length``; nothing left to train on.
    """
    reading = Reading(path)
    conversations = list(reading)
    examples: list[Example] = []
    row_N: list[int] = []
    num_unweighted = 0
    for row, conversation in enumerate(track(conversations, "reading", len(conversations)) if track else conversations):
        for example in renderer.render(conversation):
            if keep_unweighted or example.weights_T.any():
                examples.append(example)
                row_N.append(row)
            else:
                num_unweighted += 1
    too_long = [e for e in examples if len(e.token_ids_T) > max_length]
    if too_long:
        first = too_long[0]
        raise DataError(
            f"{len(first.token_ids_T)} tokens, and {len(too_long)} of {len(examples)} examples are over the limit of"
            f" {max_length} tokens (the longest has {max(len(e.token_ids_T) for e in too_long)})",
            place=str(first.source),
            way_out="raise --max-length if the model's context allows it, or shorten or remove the rows",
        )
    if not examples:
        raise DataError("every weight is 0, so nothing to train on", place=path, way_out="give some message a weight")
    return Dataset(path, reading.sha256, tuple(conversations), tuple(examples), tuple(row_N), num_unweighted)


def num_steps(num_examples: int, batch_size: int, epochs: float, steps: int | None) -> int:
    """Optimizer steps of a run; the last, smaller batch of an epoch is a step like any other."""
    per_epoch = -(-num_examples // batch_size)
    return steps if steps is not None else max(1, round(per_epoch * epochs))


def examples_of_step(step: int, num_examples: int, batch_size: int, seed: int) -> IntArray:
    """Indices of the examples of 1-based ``step``: a pure function of (seed, epoch), so that a run can be resumed,
    repeated or spread over any number of processes without a change of order."""
    per_epoch = -(-num_examples // batch_size)
    epoch, batch = divmod(step - 1, per_epoch)
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_examples)
    return order[batch * batch_size : (batch + 1) * batch_size]
