"""What check says of the rendered data: the floor by its definition, and rows that are one and the same to a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from likely.data.formats import ReadOptions
from likely.data.render import Renderer, Supervision
from likely.data.rows import Intake
from likely.data.survey import Facts, Surveyor
from likely.data.taught import OPEN_TOKENS, Taught
from likely.insight import check as checking
from likely.types import Example, Source
from naive import entropy_of_next_tokens
from test_golden import tokenizer_of

USER = {"role": "user", "content": "2 + 2"}
STOP, OTHER_STOP = 1, 2


def calling(call_id: str, city: str = "Paris") -> dict[str, Any]:
    call = {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}


def answered(*answers: Any) -> list[dict[str, Any]]:
    said = [answer if isinstance(answer, dict) else {"content": answer} for answer in answers]
    return [{"messages": [USER, {"role": "assistant", **answer}]} for answer in said]


THOUGHT = answered(
    "<think>\nI know\n</think>\n\nfour",
    {"content": "four", "reasoning_content": "I know"},
    {"content": "four", "thinking": "I know"},
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "ids of calls": [calling("a"), calling("b"), calling("c"), calling("d", "Where")],
    "spellings of a thought": [*THOUGHT, *answered("five")],
    "both and weights": [
        *THOUGHT,
        calling("a"),
        *answered({"content": "five", "weight": 0.5}, {"content": "Hi", "weight": 0}),
    ],
    "answers that begin alike": answered("Hello", "Hello Hello", "Hello Hi", "Hello"),
    "turns": [
        {"messages": [USER, {"role": "assistant", "content": said}, USER, {"role": "assistant", "content": again}]}
        for said, again in (("four", "four"), ("four", "five"), ("five", "four"), ("four", "four"))
    ],
    "bare text": [{"text": text} for text in ("Hi Hello", "Hi Bye", "Hi", "four")],
    "prompts that begin alike": [
        {"prompt": a, "completion": b} for a, b in (("Hi", "four"), ("Hi Hello", "five"), ("Hi", "five"))
    ],
}


def survey(renderer: Renderer, path: Path, rows: list[Any]) -> tuple[Facts, list[Example]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    facts, examples = Facts((str(path),)), []
    surveyor = Surveyor(renderer, 10_000)
    for batch in Intake(str(path), ReadOptions()).batches():
        facts.add(surveyor.survey(batch, separately=True).facts)
        examples += [example for row in surveyor.render(batch) for example in row]
    assert not facts.refused
    return facts, examples


def floor_of(examples: list[Example]) -> float:
    return entropy_of_next_tokens([(e.token_ids_T.tolist(), e.weights_T.tolist()) for e in examples])


@pytest.mark.parametrize("supervision", [Supervision(), Supervision("last_assistant"), Supervision("all")])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_the_floor_is_the_entropy_of_the_next_tokens_of_what_is_trained(
    rows: list[Any], supervision: Supervision, tmp_path: Path
) -> None:
    family = "chatml" if supervision.weighs_prompts else "qwen3"  # which rewrites history
    facts, examples = survey(Renderer(tokenizer_of(family), supervision), tmp_path / "d.jsonl", rows)
    floor, truth = checking.likelihood_floor(facts)["nats"], floor_of(examples)
    if supervision.weighs_prompts and rows is ROWS["both and weights"]:
        assert 1 < floor < truth  # answers of other weights than their prompts are not counted together with the rest
    else:
        assert floor == pytest.approx(truth, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["prompts that begin alike", "bare text"])
@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_without_a_template_too(weight: float, name: str, tmp_path: Path) -> None:
    renderer = Renderer(tokenizer_of("base"), Supervision("assistant", weight))
    facts, examples = survey(renderer, tmp_path / "d", ROWS[name])
    floor, truth = checking.likelihood_floor(facts)["nats"], floor_of(examples)
    if weight and name.startswith("prompts"):  # here a prompt has no end of its own
        assert 0 < floor <= truth + 1e-12
    else:
        assert floor == pytest.approx(truth, rel=1e-12)


def facts_of(examples: list[tuple[list[int], list[float]]]) -> Facts:
    taught = Taught()
    for row, (ids, weights) in enumerate(examples):
        roles = np.full(len(ids), 2, np.int8)
        example = Example(np.array(ids), np.array(weights), roles, Source("f", row))
        taught.add(row, [example], np.array([STOP, OTHER_STOP]))
    return Facts(("f",), arrays={name: [column] for name, column in taught.arrays().items()})


TOKENS = st.lists(st.integers(0, 4), min_size=2, max_size=9)


@settings(max_examples=100, deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=6), st.data())
def test_of_any_tokens_the_floor_is_never_too_high(rows: list[list[int]], data: st.DataObject) -> None:
    weights = [
        [0.0, *data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(r) - 1, max_size=len(r) - 1))]
        for r in rows
    ]
    drawn = list(zip(rows, weights, strict=True))
    assert checking._next_token_entropy(facts_of(drawn)) <= entropy_of_next_tokens(drawn) + 1e-9
    # Rows that end with a stop token and are weighed alike behind a shared prompt: the very entropy.
    usual = [([9, *row, STOP], [0.0, *([1.0] * (len(row) + 1))]) for row in rows]
    assert checking._next_token_entropy(facts_of(usual)) == pytest.approx(entropy_of_next_tokens(usual), abs=1e-9)
    # Without a stop token as well, as long as they are short.
    bare = [([9, *(token + 3 for token in row)], [0.0, *([1.0] * len(row))]) for row in rows]
    assert len(bare[0][0]) <= OPEN_TOKENS
    assert checking._next_token_entropy(facts_of(bare)) == pytest.approx(entropy_of_next_tokens(bare), abs=1e-9)


def test_rows_that_a_model_can_t_tell_apart_are_one(tmp_path: Path) -> None:
    renderer = Renderer(tokenizer_of("qwen3"))
    facts, _ = survey(renderer, tmp_path / "d.jsonl", [*THOUGHT, calling("a"), calling("b"), *answered("five")])
    held_out, _ = survey(renderer, tmp_path / "e.jsonl", [calling("other"), THOUGHT[1], calling("a", "Where")])
    tables = checking.audit(facts, held_out)
    lines = {kind: [int(source.rpartition(":")[2]) for source, _ in table.rows] for kind, table in tables.items()}
    assert lines["exact duplicates"] == [2, 3, 5]
    assert sorted(lines["same prompt, different answers"]) == [1, 2, 3, 4, 5, 6]
    assert tables["same prompt, different answers"].rows[0][1] == "one of 3 answers to this context"
    assert lines["held-out row in training data"] == [1, 2]
    assert lines["held-out answer in training data"] == [1, 2]


def test_a_held_out_row_is_found_whatever_the_training_gives_weight_to(tmp_path: Path) -> None:
    """With this template a conversation of several turns is several examples, or one where only the last is trained."""
    rows = ROWS["turns"]
    facts, _ = survey(Renderer(tokenizer_of("qwen3"), Supervision("last_assistant")), tmp_path / "d.jsonl", rows)
    held_out, _ = survey(Renderer(tokenizer_of("qwen3")), tmp_path / "e.jsonl", rows[1:3])
    assert checking.audit(facts, held_out)["held-out row in training data"].count == 2


def test_the_split_does_not_depend_on_the_model(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": f"{i} + {i}", "completion": f"{i} {i}"} for i in range(20)]
    keys = [
        survey(Renderer(tokenizer), tmp_path / "d.jsonl", rows)[0].rows_rendered()[1].contents
        for tokenizer in (tokenizer_of("qwen3"), chat_tokenizer)
    ]
    assert np.array_equal(*keys)
