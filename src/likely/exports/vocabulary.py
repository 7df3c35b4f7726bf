"""A tokenizer as the keys of a GGUF file: what llama.cpp and all that build on it need to read text in the same tokens.

A GGUF file does not hold a tokenizer's program, only its tables and the name of a way to split text ("pre"). So the way
is recognised by its pattern, and an unknown one is refused. (llama.cpp: src/llama-vocab.cpp)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from likely.errors import ModelError

# The values of gguf.TokenType.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a text is split before merges -> llama.cpp's name for it.
_PATTERNS = {
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}": "tekken",
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_REST}": "gpt-4o",
}
# GPT-2's own pattern, alone and after each digit was set apart.
_PLAIN, _DIGITS_APART = "gpt-2", "smollm"


@dataclass(frozen=True)
class Vocabulary:
    """``model`` is ``gpt2`` (byte-level merges) or ``llama`` (SentencePiece's); ``tokens``, ``types`` and ``scores``
    stand in the order of ids."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] | None = None
    flags: dict[str, bool] = field(default_factory=dict)


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The tables of a fast tokenizer, padded with unused tokens to the model's vocabulary of ``size``.

    Raises:
        ModelError: GGUF has no name for the way in which it reads text.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = spec["model"]["type"]
    if kind != "BPE":
        raise _unknown(f"a tokenizer of the kind {kind}")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    tokens, types = _tokens(tokenizer, size)
    if _is_byte_level(spec):
        return Vocabulary("gpt2", _pre_of(spec["pre_tokenizer"]), tokens, types, merges)
    if spec["model"].get("byte_fallback") and _is_sentencepiece(spec):
        return _sentencepiece(spec, tokens, types, merges, tokenizer.unk_token)
    raise _unknown("a tokenizer that is neither byte-level nor SentencePiece's")


def _unknown(what: str) -> ModelError:
    return ModelError(f"GGUF has no words for {what}", place="the tokenizer", way_out="use --to merged")


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if max(names) >= size:
        raise ModelError(
            f"the tokenizer has the token id {max(names)}, and the model's vocabulary has {size} tokens",
            place="the tokenizer",
        )
    added = tokenizer.added_tokens_decoder
    named = set(tokenizer.all_special_tokens)
    tokens, types = [], []
    for token_id in range(size):
        name = names.get(token_id)
        tokens.append(f"[PAD{token_id}]" if name is None else name)
        if name is None:
            types.append(UNUSED)
        elif token_id in added:
            types.append(CONTROL if added[token_id].special or name in named else USER_DEFINED)
        else:
            types.append(NORMAL)
    return tokens, types


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part["pretokenizers"] if part["type"] == "Sequence" else [part])


def _is_byte_level(spec: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(spec["pre_tokenizer"]))


def _pre_of(part: dict[str, Any]) -> str:
    *before, last = _steps(part)
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise _unknown("white space put before every text")
    if last.get("use_regex", True):
        if not before:
            return _PLAIN
        if [step["type"] for step in before] == ["Digits"] and before[0]["individual_digits"]:
            return _DIGITS_APART
    elif [step["type"] for step in before] == ["Split"] and "Regex" in before[0]["pattern"]:
        pattern = before[0]["pattern"]["Regex"]
        if pattern in _PATTERNS:
            return _PATTERNS[pattern]
    raise _unknown("this way of splitting text before its merges")


def _is_sentencepiece(spec: dict[str, Any]) -> bool:
    normalizer = json.dumps(spec["normalizer"]) + json.dumps(spec["pre_tokenizer"])
    return json.dumps("\u2581")[1:-1] in normalizer


def _sentencepiece(
    spec: dict[str, Any], tokens: list[str], types: list[int], merges: list[str], unknown: str | None
) -> Vocabulary:
    """SentencePiece joins the two neighbours whose union has the best score, so a token's score is the rank of the
    first merge that makes it."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    scores = [-float(rank.get(token, 0)) for token in tokens]
    types = [BYTE if _is_byte(token) and kind == NORMAL else kind for token, kind in zip(tokens, types, strict=True)]
    types = [UNKNOWN if token == unknown else kind for token, kind in zip(tokens, types, strict=True)]
    prefix = any(step.get("type") == "Prepend" for step in (spec["normalizer"] or {}).get("normalizers", []))
    prefix |= (spec["pre_tokenizer"] or {}).get("prepend_scheme") in {"first", "always"}
    return Vocabulary("llama", "default", tokens, types, merges, scores, {"add_space_prefix": prefix})


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
