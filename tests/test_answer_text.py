"""The text of every answer that is learnt is the row's own: what a template drops, cuts or repeats is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from likely.data.render import Renderer
from likely.errors import DataError, ModelError
from likely.types import Conversation, Message, Source

QWEN3 = (Path(__file__).parent / "templates" / "qwen3.jinja").read_text(encoding="utf-8")
SHELL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHANGING = {
    "cut": SHELL.replace("CONTENT", "m['content'][:40]"),
    "twice": SHELL.replace("CONTENT", "m['content'] + ' ' + m['content']"),
    "a word replaced": SHELL.replace("CONTENT", "m['content'].replace('plan', 'idea')"),
    "only the thought's rest": SHELL.replace("CONTENT", "m['content'].split('</think>')[-1]"),
}
LONG = "<think>why</think>Write your plan first, then go on with all that the plan says."


def row(*answers: str, **fields: object) -> Conversation:
    messages = [m for a in answers for m in (Message("user", "Say it"), Message("assistant", a, 1.0, fields))]
    return Conversation(tuple(messages), Source("rows.jsonl", 3))


def renderer_of(template: str, chat_tokenizer: PreTrainedTokenizerFast) -> Renderer:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = template
    return Renderer(tokenizer)


@pytest.mark.parametrize(
    "answer",
    [
        "Write your plan first. Then end it with the tag </think> and go on.",
        "Sure, here it is: <think>hm</think> done.",
        "</think>",
        "<think>a</think>b</think>c",
        "<think>a<think>b</think>c",
        "<think>a</think><think>b</think>c",
    ],
)
def test_an_answer_that_the_template_takes_for_a_thought_is_refused(
    answer: str, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    renderer = renderer_of(QWEN3, chat_tokenizer)
    for conversation, turn in ((row(answer), 1), (row("Fine.", answer), 3), (row(answer, "Fine."), 1)):
        with pytest.raises(DataError, match=rf"rows.jsonl:3: .*messages\[{turn}\].*drops or changes.*; ") as caught:
            renderer.render(conversation)
        assert caught.value.exit_code == 3
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("answer", ["Fine.", " Fine. ", "<think>a</think>b", "<think>\na\n</think>\n\nb\n", "<think>"])
def test_answers_that_the_template_keeps_are_learnt(answer: str, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    assert renderer_of(QWEN3, chat_tokenizer).render(row(answer))
    assert renderer_of(QWEN3, chat_tokenizer).render(row(answer, "Fine."))
    assert renderer_of(SHELL.replace("CONTENT", "m['content'] | trim"), chat_tokenizer).render(row(answer))


def test_a_thought_in_a_field_leaves_the_answer_as_it_is(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = renderer_of(QWEN3, chat_tokenizer)
    assert renderer.render(row("4 </think> 5", reasoning_content="2 + 2"))
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    assert renderer.render(row("Let me add.", tool_calls=[call]))
    assert renderer.render(row("<think>2 + 2</think>Let me add.", tool_calls=[call]))
    with pytest.raises(DataError, match="drops its text because of its tool calls"):
        renderer.render(row("Let me </think> add.", tool_calls=[call]))


@pytest.mark.parametrize("template", CHANGING.values(), ids=CHANGING.keys())
def test_a_template_that_changes_answers_is_refused(template: str, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:3: .*messages\[1\].*drops or changes"):
        renderer_of(template, chat_tokenizer).render(row(LONG))


HEADLESS = {
    "ignored": SHELL.replace("CONTENT", "m['content']").replace("if add_generation_prompt", "if false"),
    "plain text": ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|im_end|>\n{% endfor %}"),
}


@pytest.mark.parametrize("template", HEADLESS.values(), ids=HEADLESS.keys())
def test_a_template_without_its_generation_prompt_is_refused(
    template: str, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        ModelError, match=r"writes no generation prompt, but .*assistant.*add_generation_prompt"
    ) as caught:
        renderer_of(template, chat_tokenizer).render(row("Fine."))
    assert caught.value.exit_code == 4


def test_a_generation_prompt_from_inside_the_loop_is_missed_in_the_first_turn(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    header = "<|im_start|>assistant\n"
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% if loop.last and add_generation_prompt %}" + header + "{% endif %}{% endfor %}"
    )
    renderer = renderer_of(template, chat_tokenizer)
    assert renderer.render(row("Fine."))
    first = Conversation((Message("assistant", "Hello!"), *row("Fine.").messages), Source("rows.jsonl", 3))
    with pytest.raises(DataError, match=r"messages\[0\]: the chat template writes no generation prompt here"):
        renderer.render(first)
