"""Rendering many rows at once gives what rendering each of them gives, refusals too."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from likely.data.formats import parse_row
from likely.data.render import Renderer, Supervision
from likely.errors import DataError
from likely.types import Conversation, Source


def row(line: int, *texts: str, system: str = "", **more: Any) -> Conversation:
    roles = ["user", "assistant"] * len(texts)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    messages[-1].update(more)
    return parse_row({"messages": messages}, Source("f", line))


ROWS = [
    row(1, "Hi", "Hello!"),
    row(2, "Hi", "Hello!", "And?", "Bye.", system="Be kind."),
    row(3, "Hi", "Say <|im_end|> aloud"),  # spells a control token
    row(4, "<|im_start|>user", "What?"),
    row(5, "Hi", ""),  # refused
    row(6, "Hi", "  leading space"),
    row(7, "Où ? 東京 🙂", "Là — 東京 🙂.", weight=0.5),
    row(8, "no answer"),
    row(9, "Hi", "Hello!", "a last question"),
    row(10, "a" * 3000, "b" * 3000),
    row(11, "\n", "x\n\n"),
    parse_row({"prompt": "Once", "completion": " upon a time"}, Source("f", 12)),
    parse_row({"text": "bare text"}, Source("f", 13)),
    parse_row({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, Source("f", 14)),
]


def one_by_one(renderer: Renderer, rows: list[Conversation]) -> list[Any]:
    found: list[Any] = []
    for conversation in rows:
        try:
            found.append(renderer.render(conversation))
        except DataError as error:
            found.append(error)
    return found


def assert_same(many: list[Any], each: list[Any]) -> None:
    assert len(many) == len(each)
    for mine, theirs in zip(many, each, strict=True):
        assert type(mine) is type(theirs), (mine, theirs)
        if isinstance(mine, DataError):
            assert str(mine) == str(theirs)
            continue
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert a.source == b.source
            for name in ("token_ids_T", "weights_T", "role_T"):
                assert np.array_equal(getattr(a, name), getattr(b, name)), (a.source, name)


@pytest.mark.parametrize("supervision", [Supervision(), Supervision("last_assistant"), Supervision("all")])
def test_many_are_rendered_as_each(supervision: Supervision, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    each = one_by_one(Renderer(chat_tokenizer, supervision), ROWS)
    assert any(isinstance(found, DataError) for found in each)
    assert sum(isinstance(found, list) for found in each) >= 8
    assert_same(Renderer(chat_tokenizer, supervision).render_many(ROWS), each)
    assert Renderer(chat_tokenizer).render_many([]) == []


def test_many_without_a_template(base_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [ROWS[11], ROWS[12], ROWS[13]]
    assert_same(Renderer(base_tokenizer).render_many(rows), one_by_one(Renderer(base_tokenizer), rows))


# Writes history anew, glues turns together, ends a turn inside what stands between two control tokens, fails on a word.
TEMPLATES = [
    (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last or m.role == 'user' else 'gone' }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    (
        "{% for m in messages %}{% if m.role == 'assistant' %}Bot: {{ m.content }}<|im_end|>{% else %}"
        "Human: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Bot: {% endif %}"
    ),
    (
        "{% for m in messages %}{% if 'odd' in m.content %}{{ raise_exception('no odd words') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_many_with_other_templates(template: str, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [*ROWS, row(20, "an odd word", "Yes."), row(21, "x", "y", "z", "an odd word"), row(22, "fine", "Fine.")]
    before = chat_tokenizer.chat_template
    chat_tokenizer.chat_template = template
    try:
        each = one_by_one(Renderer(chat_tokenizer), rows)
        assert_same(Renderer(chat_tokenizer).render_many(rows), each)
        assert sum(isinstance(found, list) for found in each) >= 3
    finally:
        chat_tokenizer.chat_template = before


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.text(alphabet="ab <|>im_endstart\n\té東🙂", max_size=12), min_size=2, max_size=4), max_size=5
    )
)
def test_any_texts(texts: list[list[str]], chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row(i, *some) for i, some in enumerate(texts)]
    assert_same(Renderer(chat_tokenizer).render_many(rows), one_by_one(Renderer(chat_tokenizer), rows))


def test_coarse_places_are_exact_where_they_are_known(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Renderer(chat_tokenizer)._controls.encoder
    text = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nOui, là.<|im_end|>\n tail"
    exact, (coarse,) = encoder.encode(text), encoder.encode_many([text])
    assert coarse.coarse
    assert not exact.coarse
    assert np.array_equal(coarse.ids_T, exact.ids_T)
    assert (coarse.anchors, coarse.anchor_ends) == (exact.anchors, exact.anchor_ends)
    assert np.array_equal(coarse.start_T[coarse.anchors], exact.start_T[exact.anchors])
    known = [place for place in range(len(text) + 1) if coarse.knows([place])]
    assert len(known) == 2 + 2 * 4 - 1  # both ends of the text and of four control tokens, of which one begins the text
    for place in known:
        assert ((coarse.end_T <= place) == (exact.end_T <= place)).all()
