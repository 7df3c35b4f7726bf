"""The split of held-out rows: families stay together, and only seed and content decide."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from likely.config import make_config
from likely.data.dataset import load_dataset
from likely.data.formats import parse_row
from likely.data.render import Renderer, Supervision
from likely.data.split import families, hold_out, split_rows
from likely.errors import ConfigError, DataError
from likely.types import Conversation, Source

WORDS = [
    "river",
    "stone",
    "garden",
    "window",
    "paper",
    "silver",
    "morning",
    "market",
    "yellow",
    "summer",
    "letter",
    "bridge",
]


def words(seed: int, number: int = 30) -> str:
    choice = random.Random(seed)  # noqa: S311
    return " ".join(f"{choice.choice(WORDS)}{choice.randrange(50)}" for _ in range(number))


def row(line: int, *texts: str, system: str = "") -> Conversation:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return parse_row({"messages": messages}, Source("f", line))


def make_rows() -> list[Conversation]:
    """120 rows of 40 families: an answer, another answer to the same question, and a near copy."""
    rows = []
    for i in range(40):
        question, answer = words(i), words(1000 + i)
        rows.append(row(3 * i, question, answer, system="You are kind."))
        rows.append(row(3 * i + 1, question, words(2000 + i), system="You are kind."))
        rows.append(row(3 * i + 2, question + " please", answer))
    return rows


def test_families_are_near_copies_and_rows_that_begin_alike() -> None:
    groups = families(make_rows())
    assert len(set(groups.tolist())) == 40
    assert all(len(set(groups[i : i + 3].tolist())) == 1 for i in range(0, 120, 3))


def test_a_system_prompt_alone_joins_nothing_and_a_first_turn_does() -> None:
    rows = [
        row(1, words(1), words(2), system="S"),
        row(2, words(3), words(4), system="S"),
        row(3, words(1), words(2), words(5), words(6)),
    ]
    groups = families(rows)
    assert groups[0] == groups[2] != groups[1]
    texts = [parse_row({"text": words(i)}, Source("f", i)) for i in (1, 2, 1)]
    assert families(texts).tolist()[0] == families(texts).tolist()[2] != families(texts).tolist()[1]
    ready = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in ([1, 2, 3], [4, 5, 6])]
    tokens = [parse_row(values, Source("f", 1)) for values in ready]
    assert len(set(families(tokens).tolist())) == 2


@pytest.mark.parametrize("seed", range(5))
def test_no_family_is_on_both_sides(seed: int) -> None:
    rows = make_rows()
    train, held_out = split_rows(rows, 0.25, seed)
    assert sorted([*train, *held_out]) == list(range(120))
    assert not {i // 3 for i in train} & {i // 3 for i in held_out}
    assert 3 <= len(held_out) <= 60


def test_the_share_is_met_over_many_groups_and_seeds_differ() -> None:
    rows = [row(i, words(i), words(5000 + i)) for i in range(600)]
    splits = [split_rows(rows, 0.1, seed)[1] for seed in (1, 2)]
    # Five standard deviations of 600 draws.
    assert all(abs(len(held_out) - 60) < 5 * (600 * 0.1 * 0.9) ** 0.5 for held_out in splits)
    assert splits[0] != splits[1]


def test_neither_order_nor_line_numbers_matter() -> None:
    rows = make_rows()
    held_out = {repr(rows[i].messages) for i in split_rows(rows, 0.2, 7)[1]}
    mixed = random.Random(3).sample(rows, len(rows))  # noqa: S311
    shuffled = [replace(c, source=Source("g", i)) for i, c in enumerate(mixed)]
    assert {repr(shuffled[i].messages) for i in split_rows(shuffled, 0.2, 7)[1]} == held_out
    # Rows of other families change nothing for these.
    more = [*rows, row(1, words(70), words(71))]
    assert {repr(more[i].messages) for i in split_rows(more, 0.2, 7)[1]} - {repr(more[-1].messages)} == held_out


def test_neither_side_is_ever_empty() -> None:
    rows = [row(i, words(i), words(100 + i)) for i in range(4)]
    for share in (1e-9, 1 - 1e-9):
        train, held_out = split_rows(rows, share, 0)
        assert train
        assert held_out
    with pytest.raises(ValueError, match="all rows belong together"):
        split_rows(rows[:1] * 3, 0.5, 0)


def test_a_share_is_held_out_and_judged_by_its_answers(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": words(i), "completion": words(100 + i, 6)}) + "\n" for i in range(30)),
        encoding="utf-8",
    )
    everything = Renderer(chat_tokenizer, Supervision("all"))
    judge = Renderer(chat_tokenizer)
    whole = load_dataset(str(path), everything, 2000)
    train, held_out = hold_out(whole, 0.3, 1, judge)
    lines = [[e.source.line for e in side.examples] for side in (train, held_out)]
    assert sorted(lines[0] + lines[1]) == list(range(1, 31))
    assert 0 < len(held_out.examples) < 20
    for side, renderer in ((train, everything), (held_out, judge)):
        for example, row_number in zip(side.examples, side.row_N, strict=True):
            (expected,) = renderer.render(side.conversations[row_number])
            assert (example.token_ids_T == expected.token_ids_T).all()
            assert (example.weights_T == expected.weights_T).all()
    path.write_text(path.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no rows can be held out: all rows belong together"):
        hold_out(load_dataset(str(path), judge, 2000), 0.3, 1, judge)


def test_eval_share_beside_eval_data_is_refused() -> None:
    settings = {"model": "m", "data": "d", "output": "o", "eval_share": 0.1}
    assert make_config(settings).eval_share == 0.1
    with pytest.raises(ConfigError, match="eval_share has no effect beside eval_data"):
        make_config({**settings, "eval_data": "e"})
    with pytest.raises(ConfigError, match="eval_share is 1"):
        make_config({**settings, "eval_share": 1})
