"""Tokens per second of an answer: ours beside transformers' own generate, on the same network, turn about.

    python bench/chat.py [MODEL] [--tokens 64] [--rounds 5] [--threads 1] [--dtype float32]

Both answer the same prompt greedily with the same number of tokens, which must be equal. The second turn of a
conversation is timed too, where ours finds the first one in its cache and generate begins anew. Seconds are those of
the processor, which other programs on the machine disturb less than a clock; with one thread they are the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from likely.data.render import Renderer, load_tokenizer
from likely.model.generate import Speaker, greedy
from likely.model.merge import merged_network
from likely.model.place import find_model
from likely.types import Message

QUESTION = "Tell me the story of a lighthouse keeper who finds a letter in a bottle, in as much detail as you can."


def ours(speaker: Speaker, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    begun = time.process_time()
    said = [t for _, (t, _) in zip(range(tokens), speaker.answer(prompt, greedy, frozenset()), strict=False)]
    return time.process_time() - begun, said


@torch.no_grad()
def theirs(network: Any, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    ids = torch.tensor([prompt])
    begun = time.process_time()
    out = network.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return time.process_time() - begun, out[0, len(prompt) :].tolist()


def same(said: list[int], other: list[int]) -> None:
    if said != other:
        raise SystemExit(f"the answers differ: {said} and {other}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    place = find_model(asked.model)
    network = merged_network(place).to(getattr(torch, asked.dtype)).eval()
    renderer = Renderer(load_tokenizer(place.tokenizer))
    first = renderer.prompt_ids([Message("user", QUESTION)])
    times: dict[str, list[float]] = {"ours": [], "generate": [], "ours, second turn": [], "generate, second turn": []}
    for _ in range(asked.rounds):
        speaker = Speaker(network)
        seconds, said = ours(speaker, first, asked.tokens)
        times["ours"].append(seconds)
        seconds, other = theirs(network, first, asked.tokens)
        times["generate"].append(seconds)
        same(said, other)
        second = [*first, *said, *renderer.prompt_ids([Message("user", "And then?")])]
        seconds, said = ours(speaker, second, asked.tokens)
        times["ours, second turn"].append(seconds)
        seconds, other = theirs(network, second, asked.tokens)
        times["generate, second turn"].append(seconds)
        same(said, other)
    for name, taken in times.items():
        print(f"{name:>22}: {asked.tokens / statistics.median(taken):6.1f} tokens/s in the median of {asked.rounds}")
    for turn in ("", ", second turn"):
        ratios = [b / a for a, b in zip(times[f"ours{turn}"], times[f"generate{turn}"], strict=True)]
        print(f"ratio{turn}: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
