"""Greedy answers, by transformers' own generate with its cache and none of the model's own settings for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from likely.model.forward import LanguageModel

BATCH = 16


@dataclass(frozen=True)
class Generated:
    """A greedy answer as text without control tokens, how many tokens it has, whether it ended by itself, and the ids
    of its tokens with the one that ended it."""

    text: str
    num_tokens: int
    stopped: bool
    token_ids: tuple[int, ...] = ()


@torch.no_grad()
def greedy_answers(
    model: LanguageModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_id: int,
    max_new_tokens: int,
    track: Callable[[Iterable[Any], str, int], Iterable[Any]] | None = None,
) -> list[Generated]:
    """The most likely next token, again and again, until ``stop_id``, prompt left out. Prompts are answered in batches,
    padded on the left behind a mask: the answers are those of each prompt alone, rounding aside.

    Args:
        prompts: token ids of each prompt.
        track: shows progress: called with the batches, a title and their number.
    """
    # Neighbours of like length need little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    answers = [Generated("", 0, False)] * len(prompts)
    with model.as_transformers_runs_it() as network, _plain_generation(model.causal_lm):
        for batch in track(batches, "answering", len(batches)) if track else batches:
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), stop_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            out = network.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stop_id,
                pad_token_id=stop_id,
            )
            for row, i in enumerate(batch):
                ids_T = out[row, width:].tolist()
                stopped = stop_id in ids_T
                own = ids_T[: ids_T.index(stop_id) + 1] if stopped else ids_T
                answers[i] = Generated(tokenizer.decode(own, skip_special_tokens=True), len(own), stopped, tuple(own))
    return answers


@contextmanager
def _plain_generation(causal_lm: Any) -> Iterator[None]:
    """Without the model's generation_config.json, whose penalties and beams would fill what a call leaves open."""
    own = causal_lm.generation_config
    causal_lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal_lm.generation_config = own
