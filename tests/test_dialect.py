"""One meaning, many spellings: thoughts, tool calls and roles render alike, or the row is refused; and on the golden
templates what is learnt is the assistant's words and their stop token, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from likely.data.formats import parse_row
from likely.data.render import Renderer
from likely.errors import DataError
from likely.types import Conversation, Message, Source
from test_golden import FAMILIES, call, tokenizer_of, turn
from test_render import build_tokenizer, spans

SOURCE = Source("rows.jsonl", 4)
OPEN, END = "'<|im_start|>' + m.role + '\n'", "'<|im_end|>\n'"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def template(body: str) -> str:
    return "{% for m in messages %}{{ " + f"{OPEN} + {body} + {END}" + " }}{% endfor %}" + PROMPT


def ids(source: str, *messages: dict[str, Any]) -> list[list[int]]:
    row = parse_row({"messages": [turn("user", "Hi"), *messages]}, SOURCE)
    return [e.token_ids_T.tolist() for e in Renderer(build_tokenizer(source)).render(row)]


BY_KEY = {
    "reasoning_content": template("('[' + m.reasoning_content + ']' if m.reasoning_content else '') + m.content"),
    "thinking": template("('[' + m.thinking + ']' if m.thinking else '') + m.content"),
}


@pytest.mark.parametrize("key", BY_KEY)
def test_a_template_that_reads_a_field_gets_the_thought_however_it_is_spelled(key: str) -> None:
    spellings = [turn("assistant", "x", **{name: "Hm"}) for name in ("reasoning_content", "thinking", "reasoning")]
    spellings.append(turn("assistant", "<think>\nHm\n</think>\n\nx"))
    found = [ids(BY_KEY[key], message) for message in spellings]
    assert all(other == found[0] for other in found)
    text = build_tokenizer(BY_KEY[key]).decode(found[0][0])
    assert text.endswith("assistant\n[Hm]x<|im_end|>\n")


def test_a_template_without_a_field_gets_it_as_text_and_that_is_said() -> None:
    source = template("m.content")
    assert ids(source, turn("assistant", "x", thinking="Hm")) == ids(
        source, turn("assistant", "<think>\nHm\n</think>\n\nx")
    )
    renderer = Renderer(build_tokenizer(source))
    renderer.render(parse_row({"messages": [turn("user", "Hi"), turn("assistant", "x", thinking="Hm")]}, SOURCE))
    assert "1 rows have a thought" in " ".join(renderer.told())


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (turn("assistant", "x", thinking="a", reasoning_content="b"), "different reasoning_content and thinking"),
        (turn("assistant", "<think>a</think>x", thinking="a"), "both in a field and in <think>"),
    ],
)
def test_two_thoughts_are_refused(message: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:4: .*{says}"):
        ids(BY_KEY["thinking"], message)


def test_a_thought_or_a_call_that_the_template_drops_is_refused() -> None:
    shy = template("('[' + m.thinking + ']' if m.thinking and m.content != 'shy' else '') + m.content")
    with pytest.raises(DataError, match=r"rows.jsonl:4: .*drops its thought"):
        ids(shy, turn("assistant", "shy", thinking="Hm"))
    with pytest.raises(DataError, match=r"rows.jsonl:4: .*drops its tool call 'weather'"):
        ids(template("(m.content or '')"), turn("assistant", None, tool_calls=call({})))


def test_a_template_that_would_write_an_object_as_python_gets_json() -> None:
    body = "((m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments) if m.tool_calls else m.content)"
    spelled = [turn("assistant", None, tool_calls=call(given)) for given in ({"city": "Paris"}, '{"city":"Paris"}')]
    one, other = (ids(template(body), message) for message in spelled)
    assert one == other
    assert 'weather{"city": "Paris"}<|im_end|>' in build_tokenizer(template(body)).decode(one[0])


def test_a_template_that_knows_developers_is_told_of_them() -> None:
    row = parse_row({"messages": [turn("developer", "x"), turn("user", "Hi"), turn("assistant", "y")]}, SOURCE)
    knows = template("('' if m.role == 'developer' else '') + m.content")
    for source, role in ((knows, "developer"), (template("m.content"), "system")):
        renderer = Renderer(build_tokenizer(source))
        (example,) = renderer.render(row)
        assert f"<|im_start|>{role}\nx<|im_end|>" in build_tokenizer(source).decode(example.token_ids_T)
        assert (role == "system") == ("developer" in " ".join(renderer.told()))


WORDS = st.lists(st.sampled_from(["Hi", "four", "\n", " ", "a", "{", "?", "know", "<", "|"]), max_size=5).map("".join)
FAMILIES_WITH_TEMPLATE = [family for family in FAMILIES if tokenizer_of(family).chat_template]


@pytest.mark.parametrize("family", FAMILIES_WITH_TEMPLATE)
@given(st.lists(st.tuples(WORDS, WORDS, st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate, Phase.shrink])
def test_what_is_learnt_is_the_answer_and_its_stop_token(family: str, turns: list[tuple[str, str, float]]) -> None:
    messages = [
        m
        for question, answer, weight in turns
        for m in (Message("user", question), Message("assistant", answer, weight))
    ]
    tokenizer = tokenizer_of(family)
    refused: list[DataError] = []
    try:
        examples = Renderer(tokenizer).render(Conversation(tuple(messages), SOURCE))
    except DataError as error:
        refused.append(error)
    if refused:
        assert "rows.jsonl:4: " in str(refused[0])
        assert "prefix" in refused[0].message  # white space that merges with the template's
        return
    learnt = []
    for example in examples:
        for start, stop in spans(example.weights_T.tolist()):
            assert example.token_ids_T[stop - 1] == tokenizer.eos_token_id
            pieces = [tokenizer.backend_tokenizer.id_to_token(int(i)) for i in example.token_ids_T[start : stop - 1]]
            (weight,) = set(np.unique(example.weights_T[start:stop]).tolist())
            learnt.append(("".join(pieces).removeprefix("<think>\n\n</think>\n\n").strip(), weight))
    assert learnt == [(answer.strip(), weight) for _, answer, weight in turns if weight]
