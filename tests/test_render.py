"""What is supervised, against texts written by hand: each template's output is spelled again in plain Python, piece by
piece with its weight, and the tokens' character offsets carry those weights over."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from chatml import CHATML
from likely.data.formats import parse_row, read_conversations
from likely.data.packing import build_packs
from likely.data.render import Renderer, Supervision, load_tokenizer
from likely.errors import DataError, LikelyError, ModelError
from likely.types import ROLES, Conversation, Example, Message, Source

SOURCE = Source("chats.jsonl", 7)
U, A = "user", "assistant"

# Splits as recent models do: line ends stick together and to the punctuation before them, so that text on both sides of
# a template's border may share a token.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    "system user assistant model tool\n\n",
    "assistant\nThe user\nThe assistant\nThe model\nThe tool\nThe\n a\n",
    "What is the capital of France?\n\n The capital of France is Paris.\n",
    "How do I reset my password? Open the settings, choose security and press reset.\n\n\n",
    "Où est la gare ? Naïve café, 東京, emoji 🙂.\n\n",
]


@cache
def build_tokenizer(
    template: str | None, control: tuple[str, ...] = ("<|im_start|>",), eos: str = "<|im_end|>", pattern: str = SPLIT
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with these control tokens; padding is the end of turn. Shared: don't change it."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [*control, eos]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    named = {"bos_token": control[0], "eos_token": eos, "pad_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


class Piece(NamedTuple):
    text: str
    weight: float
    role: str


@dataclass(frozen=True)
class Style:
    """A template, and the same text by hand: ``shells`` stand around what a role says, and an assistant turn is
    ``opening`` + (``lead`` + answer + ``end``) + ``tail`` where only the middle is the model's to say."""

    template: str
    shells: dict[str, tuple[str, str]]
    opening: str
    end: str = "<|im_end|>"
    lead: str = ""
    before_end: str = ""
    tail: str = "\n"
    start: str = ""
    finish: str = ""
    control: tuple[str, ...] = ("<|im_start|>",)
    trims: bool = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(self.template, self.control, self.end)

    def pieces(self, messages: Sequence[Message], other: float = 0.0) -> list[list[Piece]]:
        """The text of each message; ``other`` is the weight of what is not an answer."""
        written = []
        for message in messages:
            content = (message.content or "").strip() if self.trims else message.content or ""
            if message.role == A:
                said = Piece(self.lead + content + self.before_end + self.end, message.weight, A)
                written.append([Piece(self.opening, other, A), said, Piece(self.tail, other, A)])
            else:
                before, after = self.shells[message.role]
                written.append([Piece(before + content + after, other, message.role)])
        written[0].insert(0, Piece(self.start, other, messages[0].role))
        written[-1].append(Piece(self.finish, other, messages[-1].role))
        return written


def chatml_shells(*roles: str) -> dict[str, tuple[str, str]]:
    return {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in roles}


STYLES = {
    "chatml": Style(CHATML, chatml_shells("system", U, "tool"), "<|im_start|>assistant\n"),
    "trimming": Style(
        CHATML.replace("message['content']", "(message['content'] | trim)"),
        chatml_shells("system", U, "tool"),
        "<|im_start|>assistant\n",
        trims=True,
    ),
    "line-before-end": Style(
        CHATML.replace("+ '<|im_end|>'", "+ '\n<|im_end|>'"),
        {U: ("<|im_start|>user\n", "\n<|im_end|>\n")},
        "<|im_start|>assistant\n",
        before_end="\n",
    ),
    "llama-3": Style(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        {r: (f"<|start_header_id|>{r}<|end_header_id|>\n\n", "<|eot_id|>") for r in ("system", U, "tool")},
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        tail="",
        start="<|begin_of_text|>",
        control=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        trims=True,
    ),
    # No generation prompt at all: the answer's own leading space is the model's to say.
    "mistral": Style(
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        {U: ("[INST] ", " [/INST]")},
        "",
        end="</s>",
        lead=" ",
        tail="",
        start="<s>",
        control=("<s>",),
    ),
    "gemma": Style(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        {U: ("<start_of_turn>user\n", "<end_of_turn>\n")},
        "<start_of_turn>model\n",
        end="<end_of_turn>",
        start="<bos>",
        control=("<bos>", "<start_of_turn>"),
        trims=True,
    ),
    # The end-of-text token closes the whole conversation, and is not there before another turn.
    "phi-3": Style(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        {r: (f"<|{r}|>\n", "<|end|>\n") for r in ("system", U)},
        "<|assistant|>\n",
        end="<|end|>",
        finish="<|endoftext|>",
        control=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"),
    ),
    # Headers are plain text, and the end of a turn is the end of text.
    "zephyr": Style(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        {r: (f"<|{r}|>\n", "</s>\n") for r in ("system", U, "tool")},
        "<|assistant|>\n",
        end="</s>",
        control=("<s>",),
    ),
}
CHAT = STYLES["chatml"]


def said(*turns: tuple[str, str] | Message) -> tuple[Message, ...]:
    return tuple(turn if isinstance(turn, Message) else Message(turn[0], turn[1]) for turn in turns)  # type: ignore[arg-type]


def conversation_of(messages: Sequence[Message], tools: Sequence[Any] = ()) -> Conversation:
    return Conversation(tuple(messages), SOURCE, tuple(tools))


CONVERSATIONS = {
    "one turn": said((U, "What is the capital of France?"), (A, "Paris.")),
    "system": said(("system", "Be brief."), (U, "Hi"), (A, "Hello!")),
    "three turns": said((U, "Hi"), (A, "Hello!"), (U, "2 + 2?"), (A, "4"), (U, "Où ?"), (A, "東京 🙂, naïve\n\ncafé")),
    "tool": said((U, "Weather?"), (A, "Let me look."), ("tool", '{"t": 21}'), (A, "21 degrees")),
    "user last": said((U, "Hi"), (A, "Hello!"), (U, "Bye")),
    # A search for the answer's text in the conversation would find it in the wrong place.
    "echo": said((U, "Paris."), (A, "Paris."), (U, "assistant\nParis."), (A, "assistant\nParis.")),
    "empty answer": said((U, "Say nothing."), (A, ""), (U, "Thanks."), (A, "")),
    "trailing space": said((U, "Hi"), (A, "Hello! \n\n"), (U, "x "), (A, "```py\n  y\n```\n")),
}
CASES = [
    pytest.param(style, messages, id=f"{name}, {kind}")
    for name, style in STYLES.items()
    for kind, messages in CONVERSATIONS.items()
    if all(m.role == A or m.role in style.shells for m in messages)
    # Its empty answer begins with a line end, and that merges with the prompt's.
    and (name, kind) != ("line-before-end", "empty answer")
]


def flatten(pieces: Sequence[Sequence[Piece]]) -> list[Piece]:
    return [piece for message in pieces for piece in message]


def spell(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


def weigh(tokenizer: Any, pieces: Sequence[Piece]) -> tuple[list[int], list[float]]:
    """Tokens of the joined pieces, and for each the weight of the piece that it stands in."""
    text = "".join(p.text for p in pieces)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    char_weights = [p.weight for p in pieces for _ in p.text]
    weights = []
    for start, stop in encoding["offset_mapping"]:
        (weight,) = set(char_weights[start:stop])  # a token over a border would make the case itself pointless
        weights.append(weight)
    return encoding["input_ids"], [0.0, *weights[1:]]  # nothing predicts the first token


def assert_weights(tokenizer: Any, example: Example, pieces: Sequence[Piece]) -> None:
    ids, weights = weigh(tokenizer, pieces)
    assert spell(tokenizer, example.token_ids_T) == "".join(p.text for p in pieces)
    assert example.token_ids_T.tolist() == ids
    assert example.weights_T.tolist() == weights
    assert example.token_ids_T.dtype == np.int64
    assert example.weights_T.dtype == np.float64
    assert example.role_T.dtype == np.int8
    assert len(example.role_T) == len(ids)
    assert example.source == SOURCE


def spans(weights: Sequence[float]) -> list[tuple[int, int]]:
    """Where runs of supervised tokens start and stop."""
    edges = np.flatnonzero(np.diff([0, *(np.asarray(weights) > 0), 0])).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def until_last_answer(messages: Sequence[Message]) -> Sequence[Message]:
    return messages[: max(i for i, m in enumerate(messages) if m.role == A) + 1]


def refusal(renderer: Renderer, conversation: Conversation) -> DataError:
    """The one clear line of a row that is refused."""
    with pytest.raises(DataError) as caught:
        renderer.render(conversation)
    error = caught.value
    assert error.exit_code == 3
    assert error.place == str(conversation.source)
    assert error.way_out
    assert len(str(error).splitlines()) == 1
    return error


# --- what is supervised ---


@pytest.mark.parametrize(("style", "messages"), CASES)
def test_answers_and_their_end_are_supervised_and_nothing_else(style: Style, messages: tuple[Message, ...]) -> None:
    (example,) = Renderer(style.tokenizer).render(conversation_of(messages))
    assert_weights(style.tokenizer, example, flatten(style.pieces(until_last_answer(messages))))


@pytest.mark.parametrize(("style", "messages"), CASES)
def test_a_turn_stops_once_and_starts_where_inference_starts(style: Style, messages: tuple[Message, ...]) -> None:
    renderer = Renderer(style.tokenizer)
    (example,) = renderer.render(conversation_of(messages))
    ids = example.token_ids_T.tolist()
    turns = [i for i, m in enumerate(messages) if m.role == A]
    runs = spans(example.weights_T.tolist())
    assert len(runs) == len(turns)
    for turn, (start, stop) in zip(turns, runs, strict=True):
        # The stop token is the padding token here: a mask by token id would have hidden it.
        assert ids[start:stop].count(style.tokenizer.pad_token_id) == 1
        assert ids[stop - 1] == style.tokenizer.pad_token_id
        assert renderer.prompt_ids(messages[:turn]) == ids[:start]


@pytest.mark.parametrize(("style", "messages"), CASES)
def test_roles_follow_the_messages(style: Style, messages: tuple[Message, ...]) -> None:
    (example,) = Renderer(style.tokenizer).render(conversation_of(messages))
    pieces = flatten(style.pieces(until_last_answer(messages)))
    for i, role in enumerate(ROLES):
        expected = "".join(p.text for p in pieces if p.role == role)
        assert spell(style.tokenizer, example.token_ids_T[example.role_T == i]) == expected


NO_CONTROL = st.text(max_size=12).filter(lambda text: "<|" not in text and not text[:1].isspace())


@given(
    st.lists(st.tuples(st.sampled_from(["system", U, "tool", A]), NO_CONTROL), min_size=1, max_size=6),
    st.sampled_from(["chatml", "zephyr"]),
)
@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate, Phase.shrink])
def test_each_answer_can_be_read_off_the_tokens(turns: list[tuple[str, str]], name: str) -> None:
    messages = said((U, "Hi"), *turns)
    answers = [m.content for m in messages if m.role == A]
    assume(answers)
    style = STYLES[name]
    (example,) = Renderer(style.tokenizer).render(conversation_of(messages))
    runs = spans(example.weights_T.tolist())
    found = [spell(style.tokenizer, example.token_ids_T[start:stop]) for start, stop in runs]
    assert found == [f"{answer}{style.end}" for answer in answers]
    assert_weights(style.tokenizer, example, flatten(style.pieces(until_last_answer(messages))))


@pytest.mark.parametrize("pattern", [SPLIT, r"[\s\S]+"], ids=["words", "across words"])
@pytest.mark.parametrize("name", ["chatml", "line-before-end", "zephyr"])
@given(st.lists(st.sampled_from(["\n", "\n\n", " ", "\t", "The", "a", ".", "</"]), max_size=4), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate, Phase.shrink])
def test_white_space_at_the_border_is_exact_or_refused(name: str, pattern: str, parts: list[str], twice: bool) -> None:
    # Tokens such as "\n\n" may swallow the end of the generation prompt: then training and inference would differ.
    style = STYLES[name]
    tokenizer = build_tokenizer(style.template, style.control, style.end, pattern)
    messages = said((U, "a"), (A, "".join(parts)), *([(U, "\n"), (A, "".join(parts))] if twice else []))
    renderer = Renderer(tokenizer)
    try:
        (example,) = renderer.render(conversation_of(messages))
    except DataError:
        assert "prefix" in refusal(renderer, conversation_of(messages)).message
        return
    assert_weights(tokenizer, example, flatten(style.pieces(messages)))
    first, _ = spans(example.weights_T.tolist())[0]
    assert renderer.prompt_ids(messages[:1]) == example.token_ids_T[:first].tolist()


def test_white_space_that_merges_with_the_prompt_is_refused() -> None:
    # Beside the property above: both ways out really occur.
    renderer = Renderer(CHAT.tokenizer)
    newlines = CHAT.tokenizer.encode("\n\n", add_special_tokens=False)
    assert len(newlines) == 1, "the tokenizer lost the merge that this test needs"
    error = refusal(renderer, conversation_of(said((U, "Hi"), (A, "\nHello"))))
    assert "messages[1]" in error.message
    assert "white space" in error.way_out
    (example,) = renderer.render(conversation_of(said((U, "Hi"), (A, " Hello"))))
    assert spell(CHAT.tokenizer, example.token_ids_T[example.weights_T > 0]) == " Hello<|im_end|>"


def test_text_is_never_cut_or_padded(tmp_path: Path) -> None:
    # Some tokenizer files carry the truncation and padding of whatever they were used for before.
    tokenizer = build_tokenizer.__wrapped__(CHATML)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    messages = said((U, "Hi " * 30), (A, "Hello " * 30))
    (example,) = Renderer(loaded).render(conversation_of(messages))
    assert_weights(loaded, example, flatten(CHAT.pieces(messages)))


def test_a_first_token_of_template_and_tokenizer_stands_once() -> None:
    # The post-processor adds one to every text too, as Llama 3's does: the template's is the one that counts.
    style = STYLES["llama-3"]
    tokenizer = build_tokenizer.__wrapped__(style.template, style.control, style.end)
    named = [(style.start, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{style.start} $A", special_tokens=named
    )
    messages = CONVERSATIONS["three turns"]
    renderer = Renderer(tokenizer)
    (example,) = renderer.render(conversation_of(messages))
    assert_weights(tokenizer, example, flatten(style.pieces(messages)))
    assert renderer.prompt_ids(messages[:1]).count(tokenizer.bos_token_id) == 1


# --- weights ---

WEIGHED = (
    Message("system", "Be brief."),
    Message(U, "Hi"),
    Message(A, "Hello!", 0.5),
    Message(U, "2 + 2?"),
    Message(A, "5", 0.0),
    Message(U, "No."),
    Message(A, "4", 1.0),
    Message(U, "Bye"),
)


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25, 1.0])
def test_a_message_s_weight_is_that_of_its_tokens(prompt_weight: float) -> None:
    (example,) = Renderer(CHAT.tokenizer, Supervision("assistant", prompt_weight)).render(conversation_of(WEIGHED))
    assert_weights(CHAT.tokenizer, example, flatten(CHAT.pieces(WEIGHED[:-1], other=prompt_weight)))


@pytest.mark.parametrize("prompt_weight", [0.0, 1.0])
def test_train_on_all_is_the_joint_likelihood(prompt_weight: float) -> None:
    # With what follows the last answer too; a message's own weight still counts.
    for style in (CHAT, STYLES["phi-3"], STYLES["llama-3"]):
        (example,) = Renderer(style.tokenizer, Supervision("all", prompt_weight)).render(conversation_of(WEIGHED))
        assert_weights(style.tokenizer, example, flatten(style.pieces(WEIGHED, other=1.0)))


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25])
def test_train_on_the_last_assistant(prompt_weight: float) -> None:
    (example,) = Renderer(CHAT.tokenizer, Supervision("last_assistant", prompt_weight)).render(conversation_of(WEIGHED))
    pieces = CHAT.pieces(WEIGHED[:-1], other=prompt_weight)
    context = [p._replace(weight=prompt_weight) for p in flatten(pieces[:-1])]
    assert_weights(CHAT.tokenizer, example, context + pieces[-1])


def test_a_conversation_of_weight_zero_supervises_nothing() -> None:
    (example,) = Renderer(CHAT.tokenizer).render(conversation_of([Message(U, "Hi"), Message(A, "Hello!", 0.0)]))
    assert not example.weights_T.any()


def test_answers_in_a_prompt_list_are_context() -> None:
    turns = said((U, "Hi"), (A, "Hello!"), (U, "2 + 2?"), (A, "4"), (U, "And 3?"), (A, "5"))
    spelled = [{"role": m.role, "content": m.content} for m in turns]
    conversation = parse_row({"prompt": spelled[:3], "completion": spelled[3:]}, SOURCE)
    (example,) = Renderer(CHAT.tokenizer).render(conversation)
    pieces = CHAT.pieces(turns)
    context = [p._replace(weight=0.0) for p in flatten(pieces[:3])]
    assert_weights(CHAT.tokenizer, example, context + flatten(pieces[3:]))


@pytest.mark.parametrize("supervision", [Supervision("all"), Supervision("assistant", 0.5)])
def test_a_prompt_list_can_be_weighed_too(supervision: Supervision) -> None:
    # The row itself gives no weights, so there is nothing in it to complain about.
    row = {"prompt": [{"role": U, "content": "Hi"}], "completion": [{"role": A, "content": "Hello!"}]}
    (example,) = Renderer(CHAT.tokenizer, supervision).render(parse_row(row, SOURCE))
    other = 1.0 if supervision.train_on == "all" else supervision.prompt_weight
    assert_weights(CHAT.tokenizer, example, flatten(CHAT.pieces(said((U, "Hi"), (A, "Hello!")), other=other)))


def test_weights_on_prompts_are_refused_where_prompts_have_weight() -> None:
    conversation = conversation_of([Message(U, "Hi", 0.5), Message(A, "Hello!")])
    for supervision in (Supervision("all"), Supervision("assistant", 0.5)):
        error = refusal(Renderer(CHAT.tokenizer, supervision), conversation)
        assert "weight 0.5 on a user message" in error.message


# --- templates that rewrite history ---

# As Qwen3's: thoughts stay only after the last question, and the last turn always gets a block for them.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def thinking(answer: str, thought: str, *, inline: bool, weight: float = 1.0) -> Message:
    if inline:
        return Message(A, f"<think>\n{thought}\n</think>\n\n{answer}", weight)
    return Message(A, answer, weight, {"reasoning_content": thought})


def thought_out(answer: str, thought: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{answer}<|im_end|>"


def plain_turn(role: str, content: str) -> Piece:
    return Piece(f"<|im_start|>{role}\n{content}<|im_end|>\n", 0.0, role)


OPEN, CLOSE = Piece("<|im_start|>assistant\n", 0.0, A), Piece("\n", 0.0, A)


def think_thrice(*, inline: bool) -> tuple[list[Message], list[list[Piece]]]:
    """Three turns with thoughts, and the text of the example of each."""
    messages: list[Message] = []
    history: list[Piece] = []
    expected: list[list[Piece]] = []
    for question, answer, thought in [("1?", "2", "1 + 1"), ("2?", "4", "2 + 2"), ("3?", "6", "3 + 3")]:
        messages += [Message(U, question), thinking(answer, thought, inline=inline)]
        history.append(plain_turn(U, question))
        expected.append([*history, OPEN, Piece(thought_out(answer, thought), 1.0, A), CLOSE])
        history.append(plain_turn(A, answer))
    return messages, expected


@pytest.mark.parametrize("inline", [True, False])
def test_stripped_thoughts_give_one_example_per_assistant_turn(inline: bool) -> None:
    tokenizer = build_tokenizer(QWEN3)
    renderer = Renderer(tokenizer)
    messages, expected = think_thrice(inline=inline)
    examples = renderer.render(conversation_of(messages))
    assert len(examples) == 3
    for turn, (example, pieces) in enumerate(zip(examples, expected, strict=True)):
        assert_weights(tokenizer, example, pieces)
        ((start, _),) = spans(example.weights_T.tolist())
        assert renderer.prompt_ids(messages[: 2 * turn + 1]) == example.token_ids_T[:start].tolist()
    # They share their beginnings, and nothing of the supervision is lost by that.
    contexts = [int(np.flatnonzero(e.weights_T)[-1]) for e in examples]
    packs = build_packs(examples, sum(contexts))
    assert sum(p.num_nodes for p in packs) < sum(contexts)
    assert sum(p.weight_E.sum() for p in packs) == sum(e.weights_T.sum() for e in examples)


def test_roles_follow_the_messages_in_a_rewritten_history() -> None:
    tokenizer = build_tokenizer(QWEN3)
    messages, expected = think_thrice(inline=False)
    for example, pieces in zip(Renderer(tokenizer).render(conversation_of(messages)), expected, strict=True):
        for i, role in enumerate(ROLES):
            text = "".join(p.text for p in pieces if p.role == role)
            assert spell(tokenizer, example.token_ids_T[example.role_T == i]) == text


def test_thoughts_between_tool_calls_stay_so_one_pass_is_enough() -> None:
    tokenizer = build_tokenizer(QWEN3)
    messages = [
        Message(U, "Weather?"),
        thinking("Let me look.", "I must ask.", inline=False),
        Message("tool", "21"),
        thinking("21 degrees", "Done.", inline=False),
    ]
    (example,) = Renderer(tokenizer).render(conversation_of(messages))
    first, second = thought_out("Let me look.", "I must ask."), thought_out("21 degrees", "Done.")
    pieces = [plain_turn(U, "Weather?"), OPEN, Piece(first, 1.0, A), CLOSE, plain_turn("tool", "21")]
    assert_weights(tokenizer, example, [*pieces, OPEN, Piece(second, 1.0, A), CLOSE])


def test_a_last_turn_that_ends_in_its_own_way_gives_one_example_per_turn() -> None:
    # As in gpt-oss: what stops generation is another token than what stands in history.
    template = (
        "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
    )
    tokenizer = build_tokenizer(template, ("<|start|>", "<|message|>", "<|end|>"), "<|return|>")
    examples = Renderer(tokenizer).render(conversation_of(said((U, "Hi"), (A, "Hello!"), (U, "Bye"), (A, "See you"))))
    history = [Piece("<|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>", 0.0, U)]
    later = "Hello!<|end|><|start|>user<|message|>Bye<|end|><|start|>assistant<|message|>"
    assert len(examples) == 2
    assert_weights(tokenizer, examples[0], [*history, Piece("Hello!<|return|>", 1.0, A)])
    assert_weights(tokenizer, examples[1], [*history, Piece(later, 0.0, U), Piece("See you<|return|>", 1.0, A)])


def test_rewritten_history_keeps_each_turn_s_weight() -> None:
    tokenizer = build_tokenizer(QWEN3)
    messages = [Message(U, "a")]
    for weight in (0.5, 0.0, 1.0):
        messages += [thinking("b", "c", inline=False, weight=weight), Message(U, "d")]
    examples = Renderer(tokenizer).render(conversation_of(messages))
    assert [set(e.weights_T.tolist()) for e in examples] == [{0.0, 0.5}, {0.0}, {0.0, 1.0}]


@pytest.mark.parametrize("supervision", [Supervision("all"), Supervision("assistant", 0.5)])
def test_rewritten_history_has_no_joint_likelihood(supervision: Supervision) -> None:
    messages = [Message(U, "a"), thinking("b", "c", inline=False), Message(U, "d"), thinking("e", "f", inline=False)]
    renderer = Renderer(build_tokenizer(QWEN3), supervision)
    assert "rewrites earlier turns" in refusal(renderer, conversation_of(messages)).message
    (example,) = renderer.render(conversation_of(messages[:2]))
    assert (example.weights_T[1:] > 0).all()


def test_only_the_last_turn_of_a_rewritten_history() -> None:
    messages = [Message(U, "a"), thinking("b", "c", inline=False), Message(U, "d"), thinking("e", "f", inline=False)]
    tokenizer = build_tokenizer(QWEN3)
    (example,) = Renderer(tokenizer, Supervision("last_assistant")).render(conversation_of(messages))
    pieces = [plain_turn(U, "a"), plain_turn(A, "b"), plain_turn(U, "d"), OPEN, Piece(thought_out("e", "f"), 1.0, A)]
    assert_weights(tokenizer, example, [*pieces, CLOSE])


# --- templates and rows that can't be proved ---

TURN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
UNPROVABLE = {
    "prompt with a thought that answers lack": (TURN + PROMPT.replace("\n' }}", "\n<think>\n' }}"), "prefix"),
    "prompt of another role's name": (TURN + PROMPT.replace("assistant", "model"), "prefix"),
    "answer not shown": (TURN.replace("messages", "messages if m.role != 'assistant'") + PROMPT, "prefix"),
    "answer before the question": (TURN.replace("messages", "messages | reverse") + PROMPT, "prefix"),
    "end depends on the answer": (
        TURN.replace("'<|im_end|>\n'", "('<|im_start|>' if 'Hello' in m.content else '<|im_end|>')") + PROMPT,
        "it ends with",
    ),
    # Here the end of turn stands once and in its place, but more follows than after other answers.
    "text after the end depends on the answer": (
        TURN.replace("'<|im_end|>\n'", "'<|im_end|>' + ('!!\n' if 'Hello' in m.content else '\n')") + PROMPT,
        "it ends with",
    ),
    "end twice": (
        TURN.replace("m.content +", "m.content + ('<|im_end|>' if 'Hello' in m.content else '') +") + PROMPT,
        "more than once",
    ),
    "raises": ("{{ raise_exception('Speak\nFrench!') }}", "Speak French!"),
}


@pytest.mark.parametrize(("template", "says"), UNPROVABLE.values(), ids=UNPROVABLE.keys())
def test_templates_that_can_t_be_proved_are_refused_with_the_row(template: str, says: str) -> None:
    renderer = Renderer(build_tokenizer(template))
    assert says in refusal(renderer, conversation_of(said((U, "Hi"), (A, "Hello!")))).message


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "stop"),
        (
            TURN.replace("<|im_end|>\n'", "' + ('' if loop.last and m.role == 'assistant' else '<|im_end|>\n')")
            + PROMPT,
            "stop",
        ),
        ("{% for m in messages if m.role != 'assistant' %}{{ m.content + '<|im_end|>' }}{% endfor %}", "show"),
        (TURN.replace("'<|im_end|>\n'", "('<|im_end|>' if '.' in m.content else '<|im_start|>')") + PROMPT, "depends"),
    ],
    ids=["no end of turn", "no end of the last turn", "answer not shown, no generation prompt", "end depends"],
)
def test_templates_without_an_end_or_an_answer_are_refused(template: str, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        Renderer(build_tokenizer(template)).render(conversation_of(said((U, "Hi"), (A, " Hello!"))))
    assert caught.value.exit_code == 4
    assert caught.value.way_out


def test_a_thought_that_the_prompt_begins_and_the_answer_has_is_fine() -> None:
    tokenizer = build_tokenizer(TURN + PROMPT.replace("\n' }}", "\n<think>' }}"))
    (example,) = Renderer(tokenizer).render(conversation_of(said((U, "Hi"), (A, "<think>Hm</think>Hello!"))))
    opening = [plain_turn(U, "Hi"), OPEN, Piece("<think>", 0.0, A)]
    assert_weights(tokenizer, example, [*opening, Piece("Hm</think>Hello!<|im_end|>", 1.0, A), CLOSE])


def test_roles_that_a_template_refuses() -> None:
    gemma = Renderer(STYLES["gemma"].tokenizer)
    error = refusal(gemma, conversation_of(said(("system", "Be brief."), (U, "Hi"), (A, "Hello!"))))
    assert "System role not supported" in error.message
    assert "alternate" in refusal(gemma, conversation_of(said((U, "Hi"), (U, "Hi?"), (A, "Hello!")))).message


def test_rows_without_an_answer() -> None:
    assert "no assistant turn" in refusal(Renderer(CHAT.tokenizer), conversation_of(said((U, "Hi")))).message


def test_null_content_that_the_template_can_t_write() -> None:
    calling = Message(A, None, 1.0, {"tool_calls": [{"id": 1}]})
    assert "chat template" in refusal(Renderer(CHAT.tokenizer), conversation_of([Message(U, "Hi"), calling])).message


def test_an_answer_before_any_question_is_exact_or_refused() -> None:
    conversation = conversation_of(said((A, "Welcome!"), (U, "Hi"), (A, "Hello!")))
    renderer = Renderer(CHAT.tokenizer)
    try:
        (example,) = renderer.render(conversation)
    except DataError:
        refusal(renderer, conversation)
        return
    assert_weights(CHAT.tokenizer, example, flatten(CHAT.pieces(conversation.messages)))


def test_added_tokens_that_are_not_control_tokens_may_be_said() -> None:
    tokenizer = build_tokenizer.__wrapped__(CHATML)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    messages = said((U, "What does <think> mean?"), (A, "<think>\nHm\n</think>\n\nIt opens a thought."))
    (example,) = Renderer(tokenizer).render(conversation_of(messages))
    assert_weights(tokenizer, example, flatten(CHAT.pieces(messages)))
    assert tokenizer.convert_tokens_to_ids("<think>") in example.token_ids_T[example.weights_T > 0]


@pytest.mark.parametrize("role", [U, A])
def test_half_a_surrogate_pair_is_refused_and_not_a_crash(tmp_path: Path, role: str) -> None:
    # JSON can spell one, and no tokenizer takes it: whoever notices first must name the row.
    path = tmp_path / "data.jsonl"
    row = {"messages": [{"role": U, "content": "Hi"}, {"role": A, "content": "Hello!"}]}
    row["messages"][[U, A].index(role)]["content"] = "half: \ud83d"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")

    def read_and_render() -> None:
        for conversation in read_conversations(path):
            Renderer(CHAT.tokenizer).render(conversation)

    with pytest.raises(DataError) as caught:
        read_and_render()
    assert caught.value.place == f"{path}:1"


@pytest.mark.parametrize("depth", [100, 600])
def test_deep_tools_are_shown_or_refused_and_not_a_crash(tmp_path: Path, depth: int) -> None:
    # The JSON parser takes more levels than a function that calls itself may have.
    path = tmp_path / "data.jsonl"
    schema = '{"a":' * depth + "1" + "}" * depth
    path.write_text('{"prompt": "a", "completion": "b", "tools": [' + schema + "]}", encoding="utf-8")
    try:
        (example,) = (e for c in read_conversations(path) for e in Renderer(CHAT.tokenizer).render(c))
    except DataError as error:
        refused_at = error.place
    else:
        refused_at = f"{path}:1"
        assert spell(CHAT.tokenizer, example.token_ids_T[example.weights_T > 0]) == "b<|im_end|>"
    assert refused_at == f"{path}:1"


def test_nul_and_other_controls_are_text() -> None:
    messages = said((U, "\0\x1b\ufeff"), (A, "\0\x07\u202e\ufffd"))
    (example,) = Renderer(CHAT.tokenizer).render(conversation_of(messages))
    assert_weights(CHAT.tokenizer, example, flatten(CHAT.pieces(messages)))


def test_the_template_sees_tools_and_the_message_s_fields() -> None:
    template = (
        "{% if tools %}{{ tools[0].name + '\n' }}{% endif %}"
        + TURN.replace("m.role +", "m.role + (m.name or '') +")
        + PROMPT
    )
    tokenizer = build_tokenizer(template)
    conversation = conversation_of([Message(U, "Hi", 1.0, {"name": " Ann"}), Message(A, "Hello!")], [{"name": "clock"}])
    renderer = Renderer(tokenizer)
    (example,) = renderer.render(conversation)
    opening = Piece("clock\n<|im_start|>user Ann\nHi<|im_end|>\n<|im_start|>assistant\n", 0.0, U)
    assert_weights(tokenizer, example, [opening, Piece("Hello!<|im_end|>", 1.0, A), CLOSE])
    prompt = renderer.prompt_ids(conversation.messages[:1], conversation.tools)
    assert spell(tokenizer, prompt) == opening.text


# --- control tokens of odd makes ---


def test_control_tokens_that_swallow_the_white_space_after_them() -> None:
    # As Phi-3's: the line end behind each control token is part of it, so what follows the end of turn is no token.
    style = STYLES["phi-3"]
    tokenizer = build_tokenizer.__wrapped__(style.template, ("<s>",), "<|endoftext|>")
    names = ["<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_tokens([AddedToken(name, rstrip=True, normalized=False, special=True) for name in names])
    (example,) = Renderer(tokenizer).render(conversation_of(said((U, "Hi"), (A, "Hello!"), (U, "Bye"), (A, "See you"))))
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    runs = spans(example.weights_T.tolist())
    assert [example.token_ids_T[stop - 1] for _, stop in runs] == [end, end]
    supervised = [spell(tokenizer, example.token_ids_T[start:stop]) for start, stop in runs]
    assert supervised == ["Hello!<|end|>", "See you<|end|>"]


def build_metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer that marks the beginning of words, as SentencePiece does: with ``first`` only that of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "Hello! Bye See you <|user|>\n<|assistant|>\n"], trainer)
    template, named = STYLES["zephyr"].template, {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_tokenizers_that_mark_the_beginning_of_words(scheme: str) -> None:
    # What follows the end of turn is other tokens alone than in the middle of a text.
    tokenizer = build_metaspace(scheme)
    (example,) = Renderer(tokenizer).render(conversation_of(said((U, "Hi"), (A, "Hello!"), (U, "Bye"), (A, "See you"))))
    end = tokenizer.eos_token_id
    runs = spans(example.weights_T.tolist())
    supervised = [spell(tokenizer, example.token_ids_T[start : stop - 1]).strip() for start, stop in runs]
    assert supervised == ["Hello!", "See you"]
    assert [example.token_ids_T[stop - 1] for _, stop in runs] == [end, end]


def test_the_declared_end_of_text_is_a_control_token_even_if_not_flagged() -> None:
    # Some fine-tunes add their end of turn as an ordinary added token and only name it as eos_token.
    tokenizer = build_tokenizer.__wrapped__(None, ("<s>",), "<|endoftext|>")
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer.eos_token = "<|im_end|>"  # noqa: S105 - no password
    tokenizer.chat_template = CHATML
    messages = said((U, "Hi"), (A, "Hello!"))
    (example,) = Renderer(tokenizer).render(conversation_of(messages))
    assert_weights(tokenizer, example, flatten(CHAT.pieces(messages)))


# --- tokenizers without a template ---


def plain(prompt: str, completion: str) -> Conversation:
    return parse_row({"prompt": prompt, "completion": completion}, SOURCE)


def with_post_processor(single: str | None) -> PreTrainedTokenizerFast:
    """A base tokenizer that puts its own tokens around each text."""
    tokenizer = build_tokenizer.__wrapped__(None, ("<s>",), "</s>")
    if single:
        named = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    return tokenizer


@pytest.mark.parametrize(
    ("single", "start"), [(None, ""), ("<s> $A", "<s>"), ("$A </s>", ""), ("<s> $A </s>", "<s>"), ("</s> $A", "</s>")]
)
@pytest.mark.parametrize(
    ("prompt", "completion"), [("2 + 2 =", " 4"), ("Q: Où ?\nA:", " 東京 🙂\n\n"), ("Hi\n", "Hello!")]
)
def test_a_base_tokenizer_joins_prompt_and_completion(
    single: str | None, start: str, prompt: str, completion: str
) -> None:
    tokenizer = with_post_processor(single)
    renderer = Renderer(tokenizer)
    (example,) = renderer.render(plain(prompt, completion))
    pieces = [Piece(start, 0.0, U), Piece(prompt, 0.0, U), Piece(completion + "</s>", 1.0, A)]
    assert_weights(tokenizer, example, pieces)
    ((first, _),) = spans(example.weights_T.tolist())
    assert renderer.prompt_ids(said((U, prompt))) == example.token_ids_T[:first].tolist()
    assert [ROLES[i] for i in example.role_T] == [U] * first + [A] * (len(example.role_T) - first)


def test_an_empty_prompt_needs_a_first_token() -> None:
    (example,) = Renderer(with_post_processor("<s> $A")).render(plain("", "Once"))
    assert_weights(with_post_processor("<s> $A"), example, [Piece("<s>", 0.0, U), Piece("Once</s>", 1.0, A)])
    assert "no tokens" in refusal(Renderer(with_post_processor(None)), plain("", "Once")).message


@pytest.mark.parametrize(
    ("prompt", "completion"), [("The capital of Fr", "ance"), ("Hi ", "Paris"), ("Hi\n", "\n\nyou")]
)
def test_a_prompt_that_ends_inside_a_token_is_refused(base_prompt: str, prompt: str, completion: str) -> None:
    error = refusal(Renderer(with_post_processor(None)), plain(base_prompt + prompt, completion))
    assert "inside a token" in error.message


@pytest.fixture(params=["", "東京 🙂 "])
def base_prompt(request: pytest.FixtureRequest) -> str:
    return str(request.param)


PIECES = st.text(st.sampled_from(" \n.aeT🙂é") | st.characters(codec="utf-8"), max_size=8)


@given(PIECES, PIECES.filter(bool), st.sampled_from([None, "<s> $A", "<s> $A </s>"]))
@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate, Phase.shrink])
def test_joined_text_is_exact_or_refused(prompt: str, completion: str, single: str | None) -> None:
    tokenizer = with_post_processor(single)
    start = single.partition("$")[0].strip() if single else ""
    try:
        (example,) = Renderer(tokenizer).render(plain(prompt, completion))
    except DataError:
        refusal(Renderer(tokenizer), plain(prompt, completion))
        return
    pieces = [Piece(start, 0.0, U), Piece(prompt, 0.0, U), Piece(completion + "</s>", 1.0, A)]
    assert_weights(tokenizer, example, pieces)


def test_weights_of_prompts_without_a_template() -> None:
    tokenizer = with_post_processor("<s> $A")
    for supervision, other in ((Supervision("all"), 1.0), (Supervision("assistant", 0.25), 0.25)):
        (example,) = Renderer(tokenizer, supervision).render(plain("2 + 2 =", " 4"))
        assert_weights(tokenizer, example, [Piece("<s>2 + 2 =", other, U), Piece(" 4</s>", 1.0, A)])


def test_a_base_tokenizer_refuses_messages(base_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="no chat template") as caught:
        Renderer(base_tokenizer).render(conversation_of(said((U, "Hi"), (A, "Hello!"))))
    assert caught.value.exit_code == 4
    assert caught.value.place == str(SOURCE)
    assert caught.value.way_out


def test_a_base_tokenizer_without_an_end_of_text() -> None:
    tokenizer = with_post_processor(None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end-of-text") as caught:
        Renderer(tokenizer).render(plain("2 + 2 =", " 4"))
    assert caught.value.way_out


def test_strings_go_through_a_template_where_there_is_one(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = Renderer(chat_tokenizer).render(plain("2 + 2?", "4"))
    assert_weights(chat_tokenizer, example, flatten(CHAT.pieces(said((U, "2 + 2?"), (A, "4")))))


# --- loading ---


def test_a_saved_tokenizer_renders_alike(tmp_path: Path) -> None:
    style = STYLES["llama-3"]
    style.tokenizer.save_pretrained(tmp_path)
    messages = CONVERSATIONS["three turns"]
    (example,) = Renderer(load_tokenizer(tmp_path)).render(conversation_of(messages))
    assert_weights(style.tokenizer, example, flatten(style.pieces(messages)))


def test_no_tokenizer_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("not a tokenizer", encoding="utf-8")
    with pytest.raises(LikelyError) as caught:
        load_tokenizer(tmp_path)
    assert isinstance(caught.value, ModelError)
    assert caught.value.exit_code == 4
    assert caught.value.place == str(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_conversation_rendered_twice_is_the_same() -> None:
    renderer = Renderer(CHAT.tokenizer)
    examples = [renderer.render(conversation_of(CONVERSATIONS["three turns"]))[0] for _ in range(3)]
    for one, other in pairwise(examples):
        assert one.token_ids_T.tolist() == other.token_ids_T.tolist()
        assert one.weights_T.tolist() == other.weights_T.tolist()


def test_text_that_the_template_drops_beside_tool_calls_is_refused() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m.get('tool_calls') %}{{ m['tool_calls'] | tojson }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = copy.deepcopy(CHAT.tokenizer)
    tokenizer.chat_template = template
    calls = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}

    def row(content: str | None) -> Conversation:
        answer = Message("assistant", content, 1.0, calls)
        return Conversation((Message("user", "Hi"), answer), Source("rows.jsonl", 3))

    assert len(Renderer(tokenizer).render(row(None))) == 1
    with pytest.raises(DataError, match=r"rows.jsonl:3: .*drops its text"):
        Renderer(tokenizer).render(row("Let me look."))
