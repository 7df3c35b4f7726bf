"""Text -> token ids: fast where texts share a beginning, and exact where content spells a control token.

A control token cuts a text: what stands before it is tokenised without regard to what follows. So the ids of a text
that begins like another one are those of the other up to their last common control token, and the ids of the rest.
"""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from likely.errors import ModelError, first_line
from likely.types import IntArray

# While a template works, a character of the Tangut script (and then a rare ideograph) stands for each control token
# that content spells: one that templates show as it is, also inside a Python literal. A private character then stands
# for each control token that the template writes. Rows that have such characters beside a control token are refused.
_TANGUT, _NUM_TANGUT, _IDEOGRAPHS = 0x17000, 6136, 0x20000
_WRITTEN = 0xF0000
_STAND_IN = re.compile("[\U00017000-\U000187f7\U00020000-\U0002a6df\U000f0000-\U0010ffff]")
MAX_CACHED_CHARS, MAX_CACHED = 200, 10_000
_KEEPING = {"ByteLevel", "Split", "Digits"}  # steps before a model that take no text away
# Thoughts are written with these by people and templates alike, so an answer may say them.
THOUGHT_MARKS = ("<think>", "</think>")


class MadeOfTextError(Exception):
    """A tokenizer makes a control token out of text that does not spell one: its normalizer lowers case, folds wide
    letters, or takes characters away."""


@dataclass(frozen=True)
class Encoded:
    """A text's tokens: ``ids_T``, and where each stands in the text (``start_T``, ``end_T``, in characters).

    ``anchors`` are the indices of the tokens that are control tokens and nothing more, ``anchor_ends`` where they end.
    With ``coarse`` the places of the tokens between two anchors are not known: each of them is said to reach from the
    one anchor to the other. ``made`` is the text of a control token that the text does not spell in its place.
    """

    text: str
    ids_T: IntArray
    start_T: IntArray
    end_T: IntArray
    anchors: list[int]
    anchor_ends: list[int]
    coarse: bool = False
    made: str | None = None

    def knows(self, places: Sequence[int]) -> bool:
        """Whether it is known which tokens stand before each of these places in the text."""
        return not self.coarse or {*places} <= {
            0,
            len(self.text),
            *self.start_T[self.anchors].tolist(),
            *self.anchor_ends,
        }


class TextEncoder:
    """A tokenizer without its own ideas of truncation, padding and tokens around a text.

    Args:
        controls: the control tokens by id; they come from text that spells them and from nothing else.
        anchors: those of them that a text may be cut at.
        table: the ids of the user's tokenizer, where ours has others.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        controls: Mapping[int, str],
        anchors: Mapping[int, str],
        table: IntArray | None = None,
    ) -> None:
        self._tokenizer, self._anchors, self._table = tokenizer, dict(anchors), table
        self._controls = {**controls, **anchors}
        size = max([tokenizer.get_vocab_size(with_added_tokens=True), *(i + 1 for i in self._controls)])
        self._is_anchor = np.zeros(size + 1, bool)  # ids may have gaps
        self._is_anchor[list(self._anchors)] = True
        self._is_control = np.zeros(size + 1, bool)
        self._is_control[list(self._controls)] = True
        self._cache: dict[str, Encoded] = {}
        # White space that a token takes in, or text that is normalized before it is looked for, stands elsewhere.
        added = tokenizer.get_added_tokens_decoder()
        simple = not any(added[i].lstrip or added[i].rstrip or added[i].normalized for i in self._anchors)
        texts = sorted(self._anchors.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)") if simple else None

    def encode(self, text: str) -> Encoded:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        ids_T = np.array(found.ids, np.int64)
        offsets = np.fromiter(itertools.chain.from_iterable(found.offsets), np.int64, 2 * len(ids_T)).reshape(-1, 2)
        anchors, made = [], None
        for i in np.flatnonzero(self._is_control.take(ids_T, mode="clip")).tolist():
            token_id, said = int(ids_T[i]), text[offsets[i, 0] : offsets[i, 1]]
            if said == self._anchors.get(token_id):
                anchors.append(i)
            elif said.strip() != self._controls[token_id].strip():  # a token may take in white space around it
                made = said
        if self._table is not None:
            ids_T = self._table[ids_T]
        ends = [int(offsets[i, 1]) for i in anchors]
        return Encoded(text, ids_T, offsets[:, 0], offsets[:, 1], anchors, ends, made=made)

    def encode_many(self, texts: Sequence[str]) -> list[Encoded]:
        """:meth:`encode` of each, faster and ``coarse``: the tokenizer need not follow where each token comes from. The
        anchors are found in the text and among the ids, and where these disagree the text is encoded by itself."""
        if self._table is not None or self._pattern is None:
            return [self.encode(text) for text in texts]
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            self._coarse(text, np.array(f.ids, np.int64)) or self.encode(text)
            for text, f in zip(texts, found, strict=True)
        ]

    def _coarse(self, text: str, ids_T: IntArray) -> Encoded | None:
        assert self._pattern is not None  # noqa: S101
        is_anchor_T = self._is_anchor.take(ids_T, mode="clip")
        anchors = np.flatnonzero(is_anchor_T)
        if len(anchors) != int(self._is_control.take(ids_T, mode="clip").sum()):
            return None
        matches = list(self._pattern.finditer(text))
        if [match[0] for match in matches] != [self._anchors.get(i) for i in ids_T[anchors].tolist()]:
            return None
        starts, ends = [match.start() for match in matches], [match.end() for match in matches]
        passed_T = np.cumsum(is_anchor_T)
        start_T = np.array([0, *ends], np.int64)[passed_T]
        end_T = np.array([*starts, len(text)], np.int64)[passed_T]
        start_T[anchors], end_T[anchors] = starts, ends
        return Encoded(text, ids_T, start_T, end_T, anchors.tolist(), ends, coarse=True)

    def ids(self, text: str, like: Encoded, *, strict: bool = False) -> IntArray:
        """``encode(text).ids_T`` of a text that begins as ``like`` does, mostly without the work.

        Raises:
            MadeOfTextError: with ``strict``, where a control token behind those that are shared is ``made``.
        """
        num_anchors = bisect_right(like.anchor_ends, common_length(text, like.text))
        if num_anchors:
            anchor = like.anchors[num_anchors - 1]
            rest = self._encode_short(text[int(like.start_T[anchor]) :])
            # The same control token stands there, and no longer one that begins alike.
            if rest.anchors[:1] == [0] and rest.ids_T[0] == like.ids_T[anchor]:
                return np.concatenate([like.ids_T[:anchor], _refuse_made(rest, strict).ids_T])
        return _refuse_made(self.encode(text), strict).ids_T

    def _encode_short(self, text: str) -> Encoded:
        """Headers of turns come again and again."""
        found = self._cache.get(text)
        if found is None:
            found = self.encode(text)
            if len(text) <= MAX_CACHED_CHARS and len(self._cache) < MAX_CACHED:
                self._cache[text] = found
        return found


def _refuse_made(encoded: Encoded, strict: bool) -> Encoded:
    if strict and encoded.made is not None:
        raise MadeOfTextError(encoded.made)
    return encoded


class ControlTokens:
    """The tokens of a tokenizer that are obeyed and not read: its special tokens and those it names (eos_token ...)."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # some files carry the settings of whatever they were used for before
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        if getattr(self._backend.model, "dropout", None):  # of merges, by chance
            self._backend.model.dropout = None
        added = tokenizer.added_tokens_decoder
        named = set(tokenizer.all_special_tokens)
        texts = {t.content for t in added.values() if t.special} | named
        self._texts = sorted(texts, key=len, reverse=True)
        self._added = {t.content: int(i) for i, t in added.items()}
        # One that stands inside another may be cut off by it, so it is no place to begin from.
        everything = "\0".join(self._added)
        whole = {
            self._added[t.content]: t.content
            for t in added.values()
            if t.content in texts and not t.single_word and everything.count(t.content) == 1
        }
        self._together, self._longest = "\0".join(self._texts), max(map(len, self._texts), default=0)
        self._beginnings = {text[:n] for text in self._texts for n in range(1, len(text))}
        self._ends = {text[n:] for text in self._texts for n in range(1, len(text))}
        self._first = {text[0] for text in self._ends}
        self._last = {text[-1] for text in self._beginnings}
        self.pattern = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")
        unthoughtful = [text for text in self._texts if text not in THOUGHT_MARKS]
        self._in_answers = re.compile("|".join(map(re.escape, unthoughtful)) or r"(?!)")
        self._control_ids = {self._added[text]: text for text in self._texts if text in self._added}
        # What can't be read is no order, unless the same token has another meaning too.
        meanings = [text for key, text in _named(tokenizer) if key != "unk_token"]
        unread = self._added.get(str(tokenizer.unk_token)) if str(tokenizer.unk_token) not in meanings else None
        obeyed = {i: text for i, text in self._control_ids.items() if i != unread}
        self.ids: IntArray = np.array(sorted(obeyed), np.int64)
        self.encoder = TextEncoder(self._backend, obeyed, {i: text for i, text in whole.items() if i != unread})
        self._literal: TextEncoder | None = None

    def may_join(self, text: str) -> bool:
        """Whether a text could be a part of a control token whose other parts stand before or behind it."""
        head, tail = text[: self._longest], text[-self._longest :]
        return (
            (head[:1] in self._first and any(head[:n] in self._ends for n in range(1, len(head) + 1)))
            or (tail[-1:] in self._last and any(tail[-n:] in self._beginnings for n in range(1, len(tail) + 1)))
            or (len(text) < self._longest and text in self._together)
        )

    def spelled(self, value: Any, *, in_answer: bool = False) -> Iterator[str]:
        """The control tokens that strings inside a JSON value spell."""
        pattern = self._in_answers if in_answer else self.pattern
        for text in strings(value):
            yield from pattern.findall(text)

    def hidden(self, value: Any, *, in_answer: bool = False) -> Any:
        """The value with one other character for each control token that its strings spell."""
        pattern = self._in_answers if in_answer else self.pattern

        return _with_strings(
            value, lambda text: pattern.sub(lambda match: _stand_in(self._texts.index(match[0])), text)
        )

    def shown(self, text: str) -> str:
        """A text in which the control tokens that are meant are private characters, and those that content spells are
        spelled again: the form that :attr:`literal` takes."""
        text = self.pattern.sub(lambda match: chr(_WRITTEN + self._texts.index(match[0])), text)
        return str(self.restored(text))

    def restored(self, value: Any) -> Any:
        """A text, or a JSON value, with what was :meth:`hidden` spelled again."""
        table = {ord(_stand_in(i)): spelled for i, spelled in enumerate(self._texts)}
        return _with_strings(value, lambda text: text.translate(table))

    @property
    def literal(self) -> TextEncoder:
        """The same tokenizer with its control tokens renamed, so that their old spelling is text like any other."""
        if self._literal is None:
            spec = json.loads(self._backend.to_str())
            names = {text: chr(_WRITTEN + i) for i, text in enumerate(self._texts)}
            normalizer = self._backend.normalizer
            for token in spec["added_tokens"]:
                name = names.get(token["content"])
                if name is not None:
                    # A normalizer that takes the name away must not see it.
                    kept = normalizer is None or normalizer.normalize_str(name) == name
                    token |= {"content": name, "normalized": token["normalized"] and kept}
            spec["post_processor"] = None
            _rename_words(spec["model"], names)
            try:
                renamed = Tokenizer.from_str(json.dumps(spec))
            except Exception as error:  # of the Rust library, without a class of its own
                raise ModelError(
                    f"a control token of the tokenizer is a part of its words too: {first_line(error)}",
                    way_out="give the control tokens spellings of their own",
                ) from error
            table = np.arange(renamed.get_vocab_size(with_added_tokens=True) + len(self._added) + 1)
            controls = {}
            for text, own in self._added.items():
                other = renamed.token_to_id(names.get(text, text))
                assert other is not None  # noqa: S101  (it was added under this name)
                table[other] = own
                if text in names:
                    controls[other] = names[text]
            # Control tokens that kept their old name, and would be found in mere text.
            kept = {i: "" for i, text in self._control_ids.items() if renamed.id_to_token(i) == text}
            self._literal = TextEncoder(renamed, kept | controls, controls, table)
        return self._literal

    def num_obeyed(self, ids: Sequence[int]) -> int:
        """How many of these tokens are control tokens."""
        return int(np.isin(ids, self.ids).sum())

    def has_all(self, encoded: Encoded) -> bool:
        """Whether each control token that a template wrote into a text for :attr:`literal` is among its tokens."""
        written = sum(_WRITTEN <= ord(c) < _WRITTEN + len(self._texts) for c in encoded.text)
        return int(np.isin(encoded.ids_T, list(self._control_ids)).sum()) == written


class FewestTokens:
    """A lower bound of the tokens of a text, from its bytes alone: a byte-level tokenizer gives each of them a place in
    a token, and no token has more than the longest. Other tokenizers may drop text, or take any length of it as one
    unknown token; for them the bound is 0."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _bound(self) -> tuple[int, bool]:
        """Bytes of the longest token, 0 where nothing is known; and whether that holds for ASCII alone."""
        spec = json.loads(self._tokenizer.to_str())
        steps = spec["pre_tokenizer"] or {}
        steps = steps.get("pretokenizers", [steps])
        vocab, added = spec["model"].get("vocab"), spec["added_tokens"]
        known = (
            (spec["normalizer"] or {"type": "NFC"}).get("type") == "NFC"
            and any(step.get("type") == "ByteLevel" for step in steps)
            and all(step.get("type") in _KEEPING and step.get("behavior") != "Removed" for step in steps)
            and isinstance(vocab, dict)
            and all(letter in vocab for letter in pre_tokenizers.ByteLevel.alphabet())
            and not any(token["lstrip"] or token["rstrip"] for token in added)  # which take in any white space
        )
        # In a byte-level vocabulary a character is a byte.
        longest = max([*map(len, vocab), *(len(token["content"].encode()) for token in added)]) if known else 0
        return longest, spec["normalizer"] is not None  # NFC makes fewer bytes of some texts

    def of(self, text: str) -> int:
        longest, ascii_only = self._bound
        if not longest or (ascii_only and not text.isascii()):
            return 0
        return len(text.encode()) // longest


def _named(tokenizer: Any) -> Iterator[tuple[str, str]]:
    """What a tokenizer calls its special tokens, one pair a token."""
    for key, value in tokenizer.special_tokens_map.items():
        for text in value if isinstance(value, (list, tuple)) else (value,):
            yield key, str(text)


def has_stand_in(value: Any) -> bool:
    """Whether a string uses the characters that stand for control tokens here."""
    return any(_STAND_IN.search(text) for text in strings(value))


def _rename_words(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Some models have their control tokens as words, and would find them in mere text."""
    vocab = model.get("vocab")
    merged = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model.get("merges") or ()}
    if isinstance(vocab, dict):
        model["vocab"] = {word if word in merged else names.get(word, word): i for word, i in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(word, word), score] for word, score in vocab]
    if model.get("unk_token") in names and model["unk_token"] not in merged:
        model["unk_token"] = names[model["unk_token"]]


def _with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_with_strings(key, change): _with_strings(v, change) for key, v in value.items()}
    return [_with_strings(v, change) for v in value] if isinstance(value, (list, tuple)) else value


def _stand_in(index: int) -> str:
    return chr(_TANGUT + index if index < _NUM_TANGUT else _IDEOGRAPHS + index - _NUM_TANGUT)


def strings(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, however deep."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += [*value, *value.values()]
        elif isinstance(value, Sequence):
            left += value


def common_length(a: str, b: str) -> int:
    """Length of the common prefix, by halving: slices compare many times faster than characters."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
