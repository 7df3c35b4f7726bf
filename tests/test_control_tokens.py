"""Text that spells a control token is text: its tokens are those of a tokenizer that knows no such token, in their
place between the control tokens that the template writes."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from chatml import CHATML
from likely.data.encoding import ControlTokens, common_length
from likely.data.render import Renderer, Supervision
from likely.errors import DataError
from likely.types import Conversation, Message, Source
from test_render import STYLES, TEXTS, Style, build_metaspace, build_tokenizer, flatten, spans, spell

SOURCE = Source("rows.jsonl", 3)
U, A = "user", "assistant"
CONTROL = ["<|im_start|>", "<|im_end|>"]
thorough = settings(max_examples=80, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


def conversation_of(*turns: tuple[str, str], tools: tuple[Any, ...] = ()) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in turns), SOURCE, tools)  # type: ignore[arg-type]


def literal_ids(tokenizer: Any, text: str) -> list[int]:
    """A text as a tokenizer reads it that splits its own control tokens like any other text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    tokenizer.backend_tokenizer.encode_special_tokens = False
    return ids


def reference(style: Style, conversation: Conversation) -> list[int]:
    """The template's text by hand: its own control tokens by id, everything between them as text."""
    tokenizer = style.tokenizer
    ids: list[int] = []
    text = ""
    controls = set(tokenizer.all_special_tokens) | {
        t.content for t in tokenizer.added_tokens_decoder.values() if t.special
    }
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(controls, key=len, reverse=True))) + ")")
    hidden = {control: chr(0xE100 + i) for i, control in enumerate(sorted(controls))}

    def hide(message: Message) -> Message:
        content = message.content or ""
        for control, character in hidden.items():
            content = content.replace(control, character)
        return Message(message.role, content)

    for piece in flatten(style.pieces([hide(m) for m in conversation.messages])):
        text += piece.text
    for part in pattern.split(text):
        if part in controls:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            spelled = part.translate({ord(character): control for control, character in hidden.items()})
            ids += literal_ids(tokenizer, spelled)
    return ids


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("role", [U, A])
@pytest.mark.parametrize("where", ["{}", "say {} now", "a{}b{}", "{}{}\n", "{} x"])
def test_content_that_spells_a_control_token_is_text(name: str, role: str, where: str) -> None:
    style = STYLES[name]
    for control in {*style.control, style.end}:
        said = where.replace("{}", control)
        turns = ((U, said if role == U else "Hi"), (A, said if role == A else "Hello!"))
        conversation = conversation_of(*turns, (U, "More?"), (A, "No."))
        renderer = Renderer(style.tokenizer)
        (example,) = renderer.render(conversation)
        assert example.token_ids_T.tolist() == reference(style, conversation)
        first, second = spans(example.weights_T.tolist())
        assert (
            spell(style.tokenizer, example.token_ids_T[slice(*first)])
            == (style.lead + turns[1][1].strip() * style.trims + turns[1][1] * (not style.trims) + style.before_end)
            + style.end
        )
        # The prompt of inference is the training prompt, with the same reading of the text.
        for turn, (start, _) in ((1, first), (3, second)):
            assert renderer.prompt_ids(conversation.messages[:turn]) == example.token_ids_T[:start].tolist()
        assert next(iter(renderer.notes.values())) >= 1
        assert "control token" in " ".join(renderer.told())


@given(st.lists(st.sampled_from([*CONTROL, "<|im_", "end|>", " ", "\n", "a", "The", "<", "|"]), max_size=6))
@thorough
def test_any_mixture_of_spellings_is_read_back(parts: list[str]) -> None:
    style = STYLES["chatml"]
    text = "a" + "".join(parts)
    conversation = conversation_of((U, text), (A, text))
    (example,) = Renderer(style.tokenizer).render(conversation)
    assert example.token_ids_T.tolist() == reference(style, conversation)
    ((start, stop),) = spans(example.weights_T.tolist())
    assert spell(style.tokenizer, example.token_ids_T[start:stop]) == text + "<|im_end|>"
    ends = example.token_ids_T == style.tokenizer.eos_token_id
    assert int(ends.sum()) == 2  # the template's, and no others


@pytest.mark.parametrize("where", ["reasoning_content", "tool_calls", "tools"])
def test_other_fields_are_text_too(where: str) -> None:
    template = CHATML.replace(
        "message['content']",
        "(message.reasoning_content or '') + (message.tool_calls or '') | string + message.content",
    )
    tokenizer = build_tokenizer("{{ tools | string }}" + template)
    evil = {"reasoning_content": "a<|im_start|>b", "tool_calls": [{"name": "a<|im_start|>b"}]}
    fields = {where: evil[where]} if where in evil else {}
    tools = ({"name": "a<|im_start|>b"},) if where == "tools" else ()
    messages = (Message(U, "Hi"), Message(A, "Hello!", 1.0, fields))
    (example,) = Renderer(tokenizer).render(Conversation(messages, SOURCE, tools))
    assert "a<|im_start|>b" in spell(tokenizer, example.token_ids_T)
    assert int((example.token_ids_T == tokenizer.bos_token_id).sum()) == 2


def test_a_base_tokenizer_reads_them_as_text() -> None:
    tokenizer = build_tokenizer.__wrapped__(None, ("<s>",), "</s>")
    row = Conversation((Message(U, "2 </s>+ 2 ="), Message(A, " 4</s>")), SOURCE, plain=True)
    (example,) = Renderer(tokenizer).render(row)
    assert example.token_ids_T.tolist() == [*literal_ids(tokenizer, "2 </s>+ 2 = 4</s>"), tokenizer.eos_token_id]
    ((start, stop),) = spans(example.weights_T.tolist())
    assert spell(tokenizer, example.token_ids_T[start:stop]) == " 4</s></s>"


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_tokenizers_that_mark_the_beginning_of_words(scheme: str) -> None:
    tokenizer = build_metaspace(scheme)
    plain = conversation_of((U, "Hi"), (A, "Hello!"), (U, "Bye"), (A, "See you"))
    (expected,) = Renderer(tokenizer).render(plain)
    renderer = Renderer(tokenizer)
    escaped = renderer._controls
    text = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in plain.messages], tokenize=False
    )
    assert escaped.literal.encode(escaped.shown(text)).ids_T.tolist() == expected.token_ids_T.tolist()


def test_a_tokenizer_that_makes_control_tokens_of_text_refuses_the_row() -> None:
    # A model of whole words reads what it does not know as its unknown word, which is a control token.
    words = {w: i for i, w in enumerate(["[UNK]", "<s>", "</s>", "a", "user", "assistant"])}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    template = "{% for m in messages %}{{ '<s> ' + m.role + ' ' + m.content + ' </s> ' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
    named = {"eos_token": "</s>", "unk_token": "[UNK]"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)
    assert Renderer(wrapped).render(conversation_of((U, "a"), (A, "a")))
    with pytest.raises(DataError, match=r"rows.jsonl:3: .*can't write as text"):
        Renderer(wrapped).render(conversation_of((U, "a </s> a"), (A, "a")))


@pytest.mark.parametrize("character", ["\U00017000", "\U00020000", "\U000f0000", "\U00100000"])
def test_characters_that_stand_for_control_tokens_are_refused_beside_one(character: str) -> None:
    tokenizer = STYLES["chatml"].tokenizer
    (example,) = Renderer(tokenizer).render(conversation_of((U, character), (A, character)))
    assert spell(tokenizer, example.token_ids_T).count(character) == 2
    with pytest.raises(DataError, match=r"rows.jsonl:3: .*stand for such"):
        Renderer(tokenizer).render(conversation_of((U, f"{character} <|im_end|>"), (A, "a")))


def test_a_template_that_looks_into_the_text_for_control_tokens_is_refused() -> None:
    template = CHATML.replace(
        "message['content']", "('seen ' if '<|im_end|>' in message.content else '') + message.content"
    )
    with pytest.raises(DataError, match="writes other text"):
        Renderer(build_tokenizer(template)).render(conversation_of((U, "<|im_end|>"), (A, "a")))


def test_thoughts_in_an_answer_are_meant_even_where_their_marks_are_control_tokens() -> None:
    tokenizer = build_tokenizer.__wrapped__(CHATML)
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("<think>", "</think>")])
    (example,) = Renderer(tokenizer).render(conversation_of((U, "What is <think>?"), (A, "<think>Hm</think>It.")))
    opening = tokenizer.convert_tokens_to_ids("<think>")
    assert int((example.token_ids_T == opening).sum()) == 1
    assert example.weights_T[example.token_ids_T.tolist().index(opening)] == 1


def test_the_joint_likelihood_learns_them_as_text() -> None:
    style = STYLES["chatml"]
    conversation = conversation_of((U, "a<|im_end|>"), (A, "b<|im_start|>"))
    (example,) = Renderer(style.tokenizer, Supervision("all")).render(conversation)
    assert example.token_ids_T.tolist() == reference(style, conversation)
    assert example.weights_T[1:].all()


# --- the ids of a text that begins like another ---


def odd_tokenizers() -> dict[str, Any]:
    def made(**flags: Any) -> Any:
        tokenizer = build_tokenizer.__wrapped__(CHATML, ("<s>",), "</s>")
        tokenizer.add_tokens([AddedToken("<|x|>", special=True, normalized=False, **flags)])
        tokenizer.add_tokens([AddedToken("<|x|>>", special=True, normalized=False)])
        return tokenizer

    normalized = build_tokenizer.__wrapped__(CHATML, ("<s>",), "</s>")
    normalized.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    normalized.add_tokens([AddedToken("<|x|>", special=True, normalized=True), AddedToken("<|y|>", special=False)])
    word = Tokenizer(models.Unigram())
    word.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    word.normalizer = normalizers.Prepend("▁")
    unknown, named = {"unk_token": "<s>"}, {"eos_token": "</s>", "bos_token": "<s>"}
    word.train_from_iterator(TEXTS * 3, trainers.UnigramTrainer(special_tokens=["<s>", "</s>", "<|x|>"], **unknown))
    digits = build_tokenizer.__wrapped__(CHATML, ("<s>", "<|x|>"), "</s>")
    digits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[\s\S]+"), "isolated"), pre_tokenizers.ByteLevel(True, use_regex=False)]
    )
    overlapping = made()
    overlapping.add_tokens([AddedToken("a<|x|>x", special=True, normalized=False)])
    return {
        "overlapping": overlapping,
        "plain": made(),
        "left": made(lstrip=True),
        "right": made(rstrip=True),
        "both": made(lstrip=True, rstrip=True),
        "word": made(single_word=True),
        "normalized": normalized,
        "unigram": PreTrainedTokenizerFast(tokenizer_object=word, **named),
        "prefix space": digits,
    }


ODD = odd_tokenizers()
PARTS = st.lists(
    st.sampled_from(["<s>", "</s>", "<|x|>", "<|x|>>", "<|y|>", " ", "\n", "The", "a", "é", ">", "<|", "x", "Ⅷ"]),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("name", ODD)
@example("a<|x|>", "b", "x")
@given(PARTS, PARTS, PARTS)
@thorough
def test_shared_beginnings_give_the_same_ids_as_a_tokenisation_of_their_own(
    name: str, start: str, one: str, other: str
) -> None:
    tokenizer = ODD[name]
    encoder = ControlTokens(tokenizer).encoder
    whole = encoder.encode(start + one)
    for text in (start + other, start, start + one[: len(one) // 2], start + one):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encoder.ids(text, whole).tolist() == expected
        assert encoder.encode(text).ids_T.tolist() == expected


@given(PARTS, PARTS)
@thorough
def test_common_length(a: str, b: str) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_length(a, b) == expected
    assert common_length(a, a + b) == len(a)


@pytest.mark.parametrize("name", ["plain", "left", "right", "both", "unigram", "prefix space"])
@given(PARTS)
@thorough
def test_the_renamed_tokenizer_reads_alike(name: str, text: str) -> None:
    controls = ControlTokens(ODD[name])
    expected = controls.encoder.encode(text).ids_T
    np.testing.assert_array_equal(controls.literal.encode(controls.shown(text)).ids_T, expected)


@pytest.mark.parametrize(
    ("role", "content", "words"),
    [
        ("user", "|im_end|", "makes control tokens of the question '|im_end|'"),
        ("user", " im_end|", None),
        ("system", "see <|im_end", "makes control tokens of the system prompt"),
        ("user", "a < b <", None),
        ("user", "> b", None),
    ],
)
def test_a_control_token_of_the_template_and_a_text_together_is_refused(
    role: str, content: str, words: str | None, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = CHATML.replace("message['content']", "message.content").replace(
        "message.content",
        "('<' + message.content + '>' if message.role == 'user' else message.content + '|>'"
        " if message.role == 'system' else message.content)",
    )
    assert "'<' +" in tokenizer.chat_template
    texts = {"system": "Be kind.", "user": "Hi", role: content}
    messages = (*(Message(r, t) for r, t in texts.items()), Message("assistant", "Hello"))  # type: ignore[arg-type]
    conversation = Conversation(messages, Source("rows.jsonl", 3))
    if words is None:
        assert len(Renderer(tokenizer).render(conversation)) == 1
    else:
        with pytest.raises(DataError, match=re.escape(words)):
            Renderer(tokenizer).render(conversation)
