"""Answers, token by token, with the cache of transformers and none of a model's own settings for generation: greedy
ones in batches, and those of a conversation, which reuse what the last prompt has left in the cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from likely.model.forward import LanguageModel

BATCH = 16
Choose = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Generated:
    """A greedy answer as text without control tokens, how many tokens it has, whether it ended by itself, and the ids
    of its tokens with the one that ended it."""

    text: str
    num_tokens: int
    stopped: bool
    token_ids: tuple[int, ...] = ()


def greedy(logits_BV: Tensor) -> Tensor:
    """The most likely next tokens (B,)."""
    return logits_BV.argmax(-1)


def sampler(temperature: float, seed: int, device: torch.device) -> Choose:
    """Draws from softmax(logits / temperature), the same each time with the same seed; the most likely token at
    temperature 0."""
    if temperature == 0:
        return greedy
    generator = torch.Generator(device).manual_seed(seed)

    def draw(logits_BV: Tensor) -> Tensor:
        probabilities = torch.softmax(logits_BV.double() / temperature, -1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return draw


@torch.no_grad()
def decode(
    network: Any, ids_BT: Tensor, choose: Choose, *, mask_BT: Tensor | None = None, cache: Any = None
) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """The next tokens (B,), the log-probability of each (B,) in nats at temperature 1, and the cache, which holds all
    tokens but these; without an end.

    Args:
        ids_BT: the prompts, padded on the left behind ``mask_BT``; with a ``cache``, the tokens that it does not hold.
    """
    takes = inspect.signature(getattr(network, "get_base_model", lambda: network)().forward).parameters
    fixed: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    while True:
        given = dict(fixed)
        if mask_BT is not None:
            given["attention_mask"] = mask_BT
            if "position_ids" in takes:
                given["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        out = network(input_ids=ids_BT, past_key_values=cache, use_cache=True, **given)
        logits_BV, cache = out.logits[:, -1].float(), out.past_key_values
        chosen_B = choose(logits_BV)
        logprob_B = logits_BV.gather(1, chosen_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
        yield chosen_B, logprob_B, cache
        ids_BT = chosen_B[:, None]
        if mask_BT is not None:
            mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], 1)


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
    with model.as_transformers_runs_it() as network:
        for batch in track(batches, "answering", len(batches)) if track else batches:
            asked = [prompts[i] for i in batch]
            for i, own in zip(batch, _answer(network, asked, stop_id, max_new_tokens, model.device), strict=True):
                text, stopped = tokenizer.decode(own, skip_special_tokens=True), own[-1:] == [stop_id]
                answers[i] = Generated(text, len(own), stopped, tuple(own))
    return answers


def _answer(
    network: Any, prompts: Sequence[Sequence[int]], stop_id: int, max_new_tokens: int, device: torch.device
) -> list[list[int]]:
    """The tokens of each answer, ``stop_id`` included."""
    width = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), width), stop_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    answers: list[list[int]] = [[] for _ in prompts]
    steps = decode(network, ids_BT.to(device), greedy, mask_BT=mask_BT.to(device))
    for _, (chosen_B, _, _) in zip(range(max_new_tokens), steps, strict=False):
        for answer, token in zip(answers, chosen_B.tolist(), strict=True):
            if answer[-1:] != [stop_id]:
                answer.append(token)
        if all(answer[-1:] == [stop_id] for answer in answers):
            break
    return answers


@dataclass
class Speaker:
    """One model that answers prompt after prompt. ``network`` is a transformers model; what a prompt has in common with
    the last one and its answer is not computed again."""

    network: Any
    _ids: list[int] = field(default_factory=list)  # what the cache holds
    _cache: Any = None

    def answer(
        self, prompt: Sequence[int], choose: Choose, stop_ids: frozenset[int]
    ) -> Generator[tuple[int, float], None, None]:
        """Token ids and their log-probabilities in nats, up to and with one of ``stop_ids``; whoever has heard enough
        closes the iterator."""
        ids = list(prompt)
        cache, shared = self._shared(ids)
        given = torch.tensor([ids[shared:]], device=self.network.device)
        self._cache = None  # until this one can be trusted: a stop may come in the middle of a forward
        for chosen_B, logprob_B, after in decode(self.network, given, choose, cache=cache):
            token = int(chosen_B)
            self._cache, self._ids = after, list(ids)
            ids.append(token)
            yield token, float(logprob_B)
            if token in stop_ids:
                return
            self._cache = None

    def _shared(self, ids: Sequence[int]) -> tuple[Any, int]:
        """The cache cut to what ``ids`` begin with, and how many tokens that is; at least one token is left to feed."""
        pairs = zip(self._ids, ids[:-1], strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._ids), len(ids) - 1))
        if self._cache is None or not shared or not getattr(self._cache, "is_croppable", True):
            return None, 0
        try:
            self._cache.crop(shared - len(self._ids))
        except (
            RuntimeError,
            ValueError,
            AttributeError,
            NotImplementedError,
        ):  # windows and states can't be taken back
            return None, 0
        return self._cache, shared
