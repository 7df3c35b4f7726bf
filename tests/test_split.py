"""The split of held-out rows: families stay together, and only seed and content decide."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import likely
from likely.config import make_config, read_yaml
from likely.data.dataset import Request, load_dataset
from likely.data.families import families as families_of_keys
from likely.data.families import keys_of, split_groups
from likely.data.families import split_rows as split_keys
from likely.data.formats import parse_row
from likely.data.lengths import OnTooLong
from likely.data.render import Renderer, Supervision
from likely.data.split import groups_unasked, hold_out, share_unasked, told_of_split
from likely.errors import ConfigError, DataError
from likely.types import Conversation, IntArray, Source

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


def families(rows: list[Conversation]) -> IntArray:
    return families_of_keys(keys_of(rows))


def split_rows(rows: list[Conversation], share: float, seed: int) -> tuple[list[int], list[int]]:
    train, held_out = split_keys(keys_of(rows), share, seed)
    return train.tolist(), held_out.tolist()


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
    judging = Request(str(path), judge, 2000)
    whole = load_dataset(str(path), everything, 2000)
    train, held_out, share = hold_out(whole, 0.3, 1, judging)
    assert held_out is not None
    assert share == 0.3
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
        hold_out(load_dataset(str(path), judge, 2000), 0.3, 1, judging)


@pytest.mark.parametrize(("num_rows", "expected"), [(60, None), (130, (1, 20)), (12_000, (400, 620))])
def test_unasked_a_few_rows_are_held_out_of_many_and_none_of_few(
    num_rows: int, expected: tuple[int, int] | None, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    keys = keys_of([row(i, words(i, 6), words(10**6 + i, 6)) for i in range(num_rows)])
    groups = groups_unasked(keys)
    share = share_unasked(groups)
    if expected is None:
        assert share == 0
    else:
        assert 0 < share <= 0.05
        assert expected[0] <= len(split_groups(groups, keys, share, 0)[1]) <= expected[1]
    if num_rows > 1000:
        return
    path = tmp_path / "d.jsonl"
    texts = [{"prompt": words(i, 6), "completion": words(10**6 + i, 6)} for i in range(num_rows)]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    request = Request(str(path), Renderer(chat_tokenizer), 2000)
    whole = load_dataset(request.path, request.renderer, request.max_length)
    train, held_out, used = hold_out(whole, None, 0, request)
    assert used == share
    assert (held_out is None) == (expected is None)
    told = told_of_split(train, held_out, asked=False)
    if held_out is None:
        assert len(train.examples) == num_rows
        assert "no rows are held out, so the report will have no verdict; give --eval-data" in told
    else:
        assert len(train.examples) + len(held_out.examples) == num_rows
        assert f"{len(held_out.examples)} of {num_rows} rows are held out to score the model" in told
        assert "--eval-share 0 to train on all of them" in told


def test_rows_that_are_cut_are_judged_as_cut_and_dropped_ones_are_not_judged(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "d.jsonl"
    texts = [{"prompt": words(i, 4), "completion": words(100 + i, 4 if i % 3 else 60)} for i in range(60)]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    renderer = Renderer(chat_tokenizer)
    policies: list[OnTooLong] = ["drop", "truncate_right"]
    for policy in policies:
        request = Request(str(path), renderer, 200, on_too_long=policy)
        whole = load_dataset(str(path), renderer, 200, on_too_long=policy)
        _, held_out, _ = hold_out(whole, 0.5, 0, request)
        assert held_out is not None
        assert max(len(e.token_ids_T) for e in held_out.examples) <= 200
        long = [e for e in held_out.examples if (e.source.line - 1) % 3 == 0]
        assert bool(long) == (policy != "drop")


def test_eval_share_beside_eval_data_is_refused() -> None:
    settings = {"model": "m", "data": "d", "output": "o", "eval_share": 0.1}
    assert make_config(settings).eval_share == 0.1
    with pytest.raises(ConfigError, match="eval_share has no effect beside eval_data"):
        make_config({**settings, "eval_data": "e"})
    with pytest.raises(ConfigError, match="eval_share is 1"):
        make_config({**settings, "eval_share": 1})


def test_a_run_says_what_it_held_out_and_writes_it_down(tmp_path: Path, tiny_model_dir: Path) -> None:
    path = tmp_path / "d.jsonl"
    texts = [{"prompt": words(i, 3), "completion": words(500 + i, 2)} for i in range(120)]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    settings = {"model": str(tiny_model_dir), "data": str(path), "steps": 1, "batch_size": 2, "dtype": "float32"}
    run = likely.train(output=str(tmp_path / "run"), **settings)
    assert "is the training data" not in run.verdict
    assert run.report["base"]["num_examples"] < 20
    stored = read_yaml(run.folder / "config.yaml")
    assert stored["eval_share"] == 0.05
    again = likely.train(**{**stored, "output": str(tmp_path / "again")})
    assert again.report["base"] == run.report["base"]
    without = likely.train(output=str(tmp_path / "without"), eval_share=0, **settings)
    assert without.report["base"] is None
    path.write_text(path.read_text(encoding="utf-8")[:2000].rpartition("\n")[0], encoding="utf-8")
    with pytest.raises(ConfigError, match="eval_every has nothing to score: no rows are held out"):
        likely.train(output=str(tmp_path / "few"), eval_every=1, **settings)


def turns(i: int, last_weight: float, length: int = 3) -> str:
    said = [
        ("user", words(i, 4)),
        ("assistant", words(300 + i, 4)),
        ("user", "And?"),
        ("assistant", words(900 + i, length)),
    ]
    messages: list[dict[str, object]] = [{"role": role, "content": text} for role, text in said]
    messages[-1]["weight"] = last_weight
    return json.dumps({"messages": messages}) + "\n"


def test_a_held_out_row_that_is_too_long_is_refused_and_never_cut(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Training gives no weight to it, so that it may have any length there; judged it has some."""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(turns(i, float(i % 2), 3 if i % 2 else 90) for i in range(40)), encoding="utf-8")
    renderer = Renderer(chat_tokenizer, Supervision("last_assistant"))
    whole = load_dataset(str(path), renderer, 300)
    request = Request(str(path), Renderer(chat_tokenizer), 300)
    with pytest.raises(DataError, match=r"d\.jsonl:\d+: \d+ tokens, and \d+ of \d+ examples are over the limit of 300"):
        hold_out(whole, 0.5, 0, request)
    _, held_out, _ = hold_out(whole, 0.5, 0, replace(request, on_too_long="drop"))
    assert held_out is not None
    assert {e.source.line % 2 for e in held_out.examples} == {0}
    assert max(len(e.token_ids_T) for e in held_out.examples) <= 300
