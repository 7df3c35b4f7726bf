"""Files -> examples, what is left out and what is refused; the order of the steps; the two rewrites of weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from likely.data.dataset import load_dataset
from likely.data.order import Order, num_steps, prefix_families
from likely.data.packing import build_packs, normalize_per_example, supervise_everything
from likely.data.render import Renderer, Supervision
from likely.errors import DataError
from likely.types import Example, Source

thorough = settings(
    max_examples=60, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate, Phase.shrink]
)
NO_LIMIT = 10_000


def chat(*contents: str, weights: Iterable[float] = ()) -> dict[str, Any]:
    """Turns of user and assistant; ``weights`` are those of the assistant's."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    for message, weight in zip(messages[1::2], weights, strict=False):
        message["weight"] = weight
    return {"messages": messages}


def write(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def renderer(chat_tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return Renderer(chat_tokenizer)


@pytest.fixture
def rewriting(chat_tokenizer: PreTrainedTokenizerFast) -> Renderer:
    """With a template that marks the last answer, so that an earlier one changes when the conversation goes on."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=chat_tokenizer.backend_tokenizer, eos_token=chat_tokenizer.eos_token
    )
    tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "+ message['content']", "+ ('* ' if loop.last and message['role'] == 'assistant' else '') + message['content']"
    )
    return Renderer(tokenizer)


def length_of(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- reading ---


def test_rows_become_examples_in_the_order_of_the_file(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path, chat("Hi", "Hello!"), {"prompt": "2 + 2?", "completion": "4"}, chat("a", "b", "c", "d"))
    dataset = load_dataset(path, renderer, NO_LIMIT)
    assert dataset.path == path
    assert [e.source for e in dataset.examples] == [Source(path, line) for line in (1, 2, 3)]
    assert [c.source.line for c in dataset.conversations] == [1, 2, 3]
    assert dataset.row_N.tolist() == [0, 1, 2]
    assert dataset.num_unweighted == 0
    for conversation, example in zip(dataset.conversations, dataset.examples, strict=True):
        (alone,) = renderer.render(conversation)
        assert example.token_ids_T.tolist() == alone.token_ids_T.tolist()
        assert example.weights_T.tolist() == alone.weights_T.tolist()


def test_the_digest_is_that_of_the_file_s_bytes(tmp_path: Path, renderer: Renderer) -> None:
    path = Path(write(tmp_path, chat("Hi", "Où ?")))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\n\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_dataset(str(path), renderer, NO_LIMIT).sha256 == digest


def test_a_row_with_several_examples_is_named_by_each(tmp_path: Path, rewriting: Renderer) -> None:
    path = write(tmp_path, chat("Hi", "Hello!"), chat("a", "b", "c", "d", "e", "f"), chat("g", "h"))
    dataset = load_dataset(path, rewriting, NO_LIMIT)
    assert dataset.row_N.tolist() == [0, 1, 1, 1, 2]
    assert [e.source.line for e in dataset.examples] == [1, 2, 2, 2, 3]
    assert len(dataset.conversations) == 3


def test_examples_without_weight_are_left_out_and_counted(tmp_path: Path, renderer: Renderer) -> None:
    rows = [chat("a", "b", weights=[0]), chat("c", "d"), chat("e", "f", "g", "h", weights=[0, 0.5]), chat("i", "j")]
    dataset = load_dataset(write(tmp_path, *rows, chat("k", "l", weights=[0])), renderer, NO_LIMIT)
    assert dataset.num_unweighted == 2
    assert dataset.row_N.tolist() == [1, 2, 3]
    assert [e.source.line for e in dataset.examples] == [2, 3, 4]
    assert len(dataset.conversations) == 5


def test_turns_without_weight_are_left_out_one_by_one(tmp_path: Path, rewriting: Renderer) -> None:
    dataset = load_dataset(write(tmp_path, chat("a", "b", "c", "d", weights=[0, 1])), rewriting, NO_LIMIT)
    assert (len(dataset.examples), dataset.num_unweighted) == (1, 1)


def test_nothing_left_to_train_on(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path, chat("a", "b", weights=[0]), chat("c", "d", weights=[0]))
    with pytest.raises(DataError, match="nothing to train on") as caught:
        load_dataset(path, renderer, NO_LIMIT)
    assert caught.value.exit_code == 3
    assert caught.value.place == path
    assert caught.value.way_out


def test_rows_over_the_limit_are_refused_and_never_cut(tmp_path: Path, renderer: Renderer) -> None:
    rows = [chat("a", "b"), chat("a", "b " * 40), chat("a", "b"), chat("a", "b " * 50)]
    path = write(tmp_path, *rows)
    lengths = [len(e.token_ids_T) for e in load_dataset(path, renderer, NO_LIMIT).examples]
    assert len(load_dataset(path, renderer, max(lengths)).examples) == 4
    with pytest.raises(DataError) as caught:
        load_dataset(path, renderer, lengths[1] - 1)
    error = caught.value
    assert error.exit_code == 3
    assert error.place == f"{path}:2"
    assert f"{lengths[1]} tokens" in error.message
    assert "2 of 4 examples" in error.message
    assert f"limit of {lengths[1] - 1} tokens" in error.message
    assert f"the longest has {lengths[3]}" in error.message
    assert "--max-length" in error.way_out
    assert len(str(error).splitlines()) == 1
    with pytest.raises(DataError, match="1 of 4 examples") as caught:
        load_dataset(path, renderer, lengths[1])  # the limit itself is still allowed
    assert caught.value.place == f"{path}:4"


def test_a_row_that_is_refused_stops_the_reading(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path, chat("a", "b"), {"messages": chat("a", "b")["messages"][:1]})
    with pytest.raises(DataError) as caught:
        load_dataset(path, renderer, NO_LIMIT)
    assert caught.value.place == f"{path}:2"


def test_progress_sees_every_row_once(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path, chat("a", "b", weights=[0]), chat("c", "d"), *[chat("e", "f")] * 600)
    titles: list[str] = []
    seen: list[tuple[int, float]] = []

    @contextmanager
    def progress(title: str) -> Iterator[Callable[[int, float], None]]:
        titles.append(title)
        yield lambda number, share: seen.append((number, share))

    tracked = load_dataset(path, renderer, NO_LIMIT, progress)
    assert titles == ["reading"]
    assert [number for number, _ in seen] == [256, 256, 90]
    assert sorted(share for _, share in seen) == [share for _, share in seen]
    assert seen[-1][1] == 1
    assert tracked.row_N.tolist() == load_dataset(path, renderer, NO_LIMIT).row_N.tolist() == list(range(1, 602))


def test_tokens_per_role(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, *chat("Hi", "Hello!")["messages"]]},
        chat("2 + 2?", "4", "No?", "5", weights=[0.5, 0]),
    ]
    # Each turn begins and ends with a control token, so that it has the same tokens alone as in the conversation.
    shown = {
        "system": ["Be brief."],
        "user": ["Hi", "2 + 2?", "No?"],
        "assistant": ["Hello!", "4", "5"],
    }
    tokens = {
        role: sum(length_of(chat_tokenizer, f"<|im_start|>{role}\n{text}<|im_end|>\n") for text in texts)
        for role, texts in shown.items()
    }
    hello, four = (length_of(chat_tokenizer, f"{text}<|im_end|>") for text in ("Hello!", "4"))

    dataset = load_dataset(write(tmp_path, *rows), Renderer(chat_tokenizer), NO_LIMIT)
    assert dataset.tokens_per_role() == {
        "system": {"tokens": tokens["system"], "supervised": 0, "weight": 0.0},
        "user": {"tokens": tokens["user"], "supervised": 0, "weight": 0.0},
        "assistant": {"tokens": tokens["assistant"], "supervised": hello + four, "weight": hello + 0.5 * four},
    }

    joint = load_dataset(write(tmp_path, rows[0]), Renderer(chat_tokenizer, Supervision("all")), NO_LIMIT)
    counts = joint.tokens_per_role()
    assert counts["system"]["weight"] == counts["system"]["supervised"] == tokens["system"] - 1  # all but the first
    assert "tool" not in counts


# --- the order of the steps ---


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "epochs", "steps", "expected"),
    [
        (10, 5, 1.0, None, 2),
        (11, 5, 1.0, None, 3),  # the rest of an epoch is a step like any other
        (11, 5, 2.0, None, 6),
        (3, 8, 4.0, None, 4),
        (100, 10, 0.5, None, 5),
        (100, 10, 0.001, None, 1),  # never no training at all
        (100, 10, 2.0, 7, 7),
        (100, 10, 2.0, 70, 70),
        (1, 1, 1.0, None, 1),
    ],
)
def test_number_of_steps(num_examples: int, batch_size: int, epochs: float, steps: int | None, expected: int) -> None:
    assert num_steps(num_examples, batch_size, epochs, steps) == expected


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**63), st.integers(0, 5))
@thorough
def test_an_epoch_takes_each_example_once(num_examples: int, batch_size: int, seed: int, epoch: int) -> None:
    per_epoch = num_steps(num_examples, batch_size, 1, None)
    batches = [
        Order(num_examples, batch_size, seed).of_step(epoch * per_epoch + i).tolist() for i in range(1, per_epoch + 1)
    ]
    assert sorted(i for batch in batches for i in batch) == list(range(num_examples))
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert 1 <= len(batches[-1]) <= batch_size


def epoch_order(seed: int, epoch: int, batch_size: int = 7, num_examples: int = 50) -> list[int]:
    per_epoch = num_steps(num_examples, batch_size, 1, None)
    first = epoch * per_epoch + 1
    taken = [Order(num_examples, batch_size, seed).of_step(s) for s in range(first, first + per_epoch)]
    return [int(i) for i in np.concatenate(taken)]


def test_the_order_is_a_pure_function_of_seed_and_epoch() -> None:
    expected = [Order(50, 7, seed=3).of_step(step).tolist() for step in range(1, 25)]
    for step in (24, 1, 13, 13, 2, 24):  # as after a resume: no step needs those before it
        assert Order(50, 7, seed=3).of_step(step).tolist() == expected[step - 1]
    # The batch size cuts the same order into other pieces.
    assert epoch_order(3, 2, batch_size=7) == epoch_order(3, 2, batch_size=50) == epoch_order(3, 2, batch_size=1)


def test_families_stand_together_and_are_shuffled() -> None:
    rng = np.random.default_rng(0)
    family_N = rng.integers(0, 9, 40)
    orders = []
    for seed in range(3):
        order = Order(40, 40, seed, family_N).of_step(1)
        assert sorted(order.tolist()) == list(range(40))
        assert int((np.diff(family_N[order]) != 0).sum()) == len(set(family_N.tolist())) - 1
        orders.append(family_N[order].tolist())
    assert orders[0] != orders[1] != orders[2]


def test_families_have_a_prompt_in_common() -> None:
    def example(prompt: list[int], answer: list[int]) -> Example:
        ids = np.array(prompt + answer)
        return Example(
            ids, np.array([0.0] * len(prompt) + [1.0] * len(answer)), np.zeros(len(ids), np.int8), Source("a.jsonl", 1)
        )

    system, examples = [1, 2, 3, 4, 5, 6, 7, 8], []
    for question in (20, 21):
        examples += [example([*system, question, 9], [answer, 99]) for answer in (30, 31, 32)]
    turns = [50, 51, 9]
    for turn in range(3):  # each turn's prompt holds the turn before
        examples.append(example(turns, [60 + turn, 99]))
        turns = [*turns, 60 + turn, 99, 70 + turn, 9]
    shuffled = np.random.default_rng(1).permutation(len(examples))
    found = prefix_families([examples[i] for i in shuffled])
    groups = {frozenset(shuffled[found == family].tolist()) for family in set(found.tolist())}
    assert groups == {frozenset({0, 1, 2}), frozenset({3, 4, 5}), frozenset({6, 7, 8})}


def test_each_seed_and_each_epoch_has_its_own_order() -> None:
    # Also those with the same sum: else seed 1 would repeat seed 0, an epoch late.
    orders = {tuple(epoch_order(seed, epoch)) for seed, epoch in product(range(6), range(6))}
    assert len(orders) == 36
    assert tuple(range(50)) not in orders


# --- rewrites of weights ---

WEIGHTS = st.lists(st.sampled_from([0.0, 0.25, 1.0]) | st.floats(1e-3, 1), min_size=1, max_size=12)


def example_of(weights: list[float]) -> Example:
    length = len(weights)
    return Example(
        np.arange(length, dtype=np.int64),
        np.array([0.0, *weights[1:]]),
        np.full(length, 2, np.int8),
        Source("a.jsonl", 1),
    )


@given(WEIGHTS)
@thorough
def test_normalize_per_example_divides_by_the_sum(weights: list[float]) -> None:
    example = example_of(weights)
    before = example.weights_T.tolist()
    total = sum(before)
    normalized = normalize_per_example(example)
    expected = [w / total for w in before] if total else before
    np.testing.assert_allclose(normalized.weights_T, expected, rtol=1e-12)
    if total:
        np.testing.assert_allclose(normalized.weights_T.sum(), 1, rtol=1e-12)
    assert example.weights_T.tolist() == before
    assert normalized.token_ids_T.tolist() == example.token_ids_T.tolist()
    assert normalized.role_T.tolist() == example.role_T.tolist()
    assert normalized.source == example.source


@given(WEIGHTS)
@thorough
def test_supervise_everything_is_the_joint_likelihood(weights: list[float]) -> None:
    example = example_of(weights)
    before = example.weights_T.tolist()
    joint = supervise_everything(example)
    assert joint.weights_T.tolist() == [0.0] + [1.0] * (len(weights) - 1)
    assert joint.token_ids_T.tolist() == example.token_ids_T.tolist()
    assert example.weights_T.tolist() == before


def test_long_and_short_answers_count_alike_once_normalized(tmp_path: Path, renderer: Renderer) -> None:
    # Message weights shift weight inside an example; between examples each then counts 1.
    rows = [chat("a", "b"), chat("a", "c " * 30), chat("a", "d", "e", "f", weights=[0.5, 1])]
    examples = load_dataset(write(tmp_path, *rows), renderer, NO_LIMIT).examples
    normalized = [normalize_per_example(e) for e in examples]
    for example in normalized:
        np.testing.assert_allclose(example.weights_T.sum(), 1)
    half, whole = sorted(set(normalized[2].weights_T.tolist()) - {0.0})
    assert whole == 2 * half
    packs = build_packs(normalized, NO_LIMIT)
    np.testing.assert_allclose(sum(p.weight_E.sum() for p in packs), 3)
