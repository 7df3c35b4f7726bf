"""``likely check`` and ``likely train`` refuse the same data under the same settings, with the same code and reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from likely import examine, inputs
from likely.config import make_config, make_settings
from likely.errors import LikelyError
from likely.training.log import Display
from likely.verb_settings import CheckSettings

WORDS = ["red", "green", "blue", "cyan", "pink", "gold", "grey", "teal", "plum", "lime"]
LIMIT = 120


class Here:
    """Workers without processes."""

    def __init__(self, _: int | None) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return map(work, items)


def chat(i: int, *answers: str, weight: float = 1.0, **more: Any) -> dict[str, Any]:
    words = [WORDS[(i * k) % 10] for k in (1, 3, 7)]
    messages: list[dict[str, Any]] = []
    for answer in answers or (f"{words[0]} {words[1]} {i}",):
        messages += [{"role": "user", "content": f"{i}: {words[2]}?"}, {"role": "assistant", "content": answer}]
    messages[-1]["weight"] = weight
    return {"messages": messages, **more}


GOOD = [chat(i) for i in range(12)]
LONG = chat(50, "red " * 100)
NO_ANSWER = {"messages": [{"role": "user", "content": "?"}]}
SPACE = chat(51, "<|im_end|>")
FILES: dict[str, list[Any]] = {
    "good": GOOD,
    "a bad row": [*GOOD, "{", chat(40)],
    "a row without an answer": [*GOOD[:3], NO_ANSWER],
    "bad rows alone": ["{", "[1]"],
    "rows without an answer alone": [NO_ANSWER, NO_ANSWER],
    "a long row": [*GOOD, LONG],
    "a huge row": [*GOOD, chat(50, "red " * 40_000)],
    "a huge row of no weight": [*GOOD, chat(50, "red " * 9_000, weight=0)],
    "long rows alone": [LONG, chat(52, "blue " * 100)],
    "no weight": [chat(i, weight=0) for i in range(4)],
    "no weight but for one": [chat(0), *[chat(i, weight=0) for i in range(1, 12)]],
    "a last turn without weight, too long": [chat(i, "red", "blue " * 90, weight=i % 2) for i in range(12)],
    "rows that belong together": [chat(1)] * 5,
    "strings": [{"prompt": f"{i}?", "completion": f"{WORDS[i]}"} for i in range(9)],
    "text": [{"text": f"{WORDS[i]} {WORDS[i - 1]}"} for i in range(9)],
    "tokens": [{"input_ids": [5, 6, 7 + i], "labels": [-100, 6, 7 + i]} for i in range(9)],
    "tokens of another model": [{"input_ids": [5, 99999], "labels": [5, 99999]}],
    "a weight on a row": [*GOOD, chat(60, weight=1, id=1) | {"weight": 0.5}],
    "control tokens": [*GOOD, SPACE],
    "empty": [],
    "two shapes": [*GOOD, {"text": "red"}],
    "null": [*GOOD, {"messages": None}],
    "rows inside": [{"data": GOOD}],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "skip": {"on_bad_row": "skip"},
    "drop": {"on_too_long": "drop"},
    "skip and drop": {"on_bad_row": "skip", "on_too_long": "drop"},
    "cut the end": {"on_too_long": "truncate_right"},
    "cut the start": {"on_too_long": "truncate_left", "on_bad_row": "skip"},
    "last": {"train_on": "last_assistant"},
    "last, a share": {"train_on": "last_assistant", "eval_share": 0.4},
    "last, a share, cut": {"train_on": "last_assistant", "eval_share": 0.4, "on_too_long": "truncate_right"},
    "all, a share, skip": {"train_on": "all", "eval_share": 0.4, "on_bad_row": "skip"},
    "a share": {"eval_share": 0.3},
    "prompts": {"prompt_weight": 0.5},
    "small packs": {"pack_tokens": 30},
    "raw": {"template": "raw"},
    "as text": {"format": "text"},
    "held-out bad": {"eval_data": "a bad row"},
    "held-out long": {"eval_data": "a long row"},
    "held-out long, dropped": {"eval_data": "long rows alone", "on_too_long": "drop"},
    "held-out good": {"eval_data": "good", "pack_tokens": 30},
    "a share beside held-out data": {"eval_data": "good", "eval_share": 0.2},
    "two lengths": {"steps": 1, "epochs": 1.0},
    "idle weight": {"train_on": "all", "prompt_weight": 0.5},
    "longer than the context": {"max_length": 100_000},
    "columns": {"columns": "prompt=question,completion=answer"},
    "columns of no shape": {"columns": "p=q"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in FILES.items():
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def is_told(result: dict[str, Any], error: LikelyError) -> bool:
    """Whether the check names the row and the reason that a training stops at."""
    for proof in filter(None, (result["proof"], result["eval_proof"])):
        if proof["refused"]["listed"].get(error.place) == f"{error.message}; {error.way_out}":
            return True
        over = proof["over_length"]["listed"].get(error.place)
        if over and error.message.startswith(over):
            return True
    reasons = [reason.removeprefix("held-out data: ").split(" of /")[0] for reason in result["wrong"]]
    same = {"nothing is trained": "so nothing to train on"}
    return any(same.get(reason, reason) in error.message for reason in reasons)


def attempt(what: Callable[[], Any]) -> tuple[Any, LikelyError | None]:
    try:
        return what(), None
    except LikelyError as error:
        return None, error


def compare(model: Path, data: str, settings: dict[str, Any], folder: Path) -> str | None:
    """What both say; None where both would go on."""
    given = {"max_length": LIMIT, **settings, "model": str(model), "data": data}
    given |= {"eval_data": str(folder / given["eval_data"])} if "eval_data" in given else {}
    asked = {key: value for key, value in given.items() if key != "data"}
    _, trained = attempt(lambda: inputs.read_inputs(make_config({**given, "output": str(folder / "run")}), Display()))
    result, checked = attempt(lambda: examine.check(data, make_settings(CheckSettings, asked), Display()))
    if checked is not None:
        assert trained is not None, f"check alone refuses: {checked}"
        assert (checked.exit_code, str(checked)) == (trained.exit_code, str(trained))
        return str(checked)
    if trained is None:
        assert result["ok"], result["wrong"]
        return None
    assert not result["ok"], f"training alone refuses: {trained}"
    assert bool(result["cost"]) == bool(result["data"]["examples"]), (
        "what the good rows would cost is told all the same"
    )
    assert trained.exit_code == 3
    assert is_told(result, trained), (str(trained), result["wrong"])
    return str(trained)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_same_is_refused(
    settings: dict[str, Any], folder: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "Workers", Here)
    monkeypatch.setattr(examine.estimating, "measure_rate", lambda _: 1e9)
    said = {name: compare(tiny_model_dir, str(folder / name), settings, folder) for name in FILES}
    if not settings:
        assert [name for name in FILES if said[name] is None] == [
            *("good", "a huge row of no weight", "no weight but for one"),
            *("rows that belong together", "strings", "text", "tokens", "control tokens", "two shapes"),
        ]


def test_the_same_tokens_are_counted_by_role(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the template drops earlier thoughts a row becomes an example a turn, some of which teach nothing."""
    monkeypatch.setattr(examine, "Workers", Here)
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    shutil.copy(Path(__file__).parent / "templates" / "qwen3.jinja", tmp_path / "model" / "chat_template.jinja")
    rows = [chat(i, f"red {i}", f"blue {i}", "gold") for i in range(3)]
    for i, row in enumerate(rows):
        row["messages"][1] |= {"reasoning_content": "cyan?", "weight": i / 2}
        row["messages"][3] |= {"reasoning_content": "teal?"}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, chat(7, weight=0)]), encoding="utf-8")
    given = {"model": str(tmp_path / "model"), "eval_share": 0.0}
    trained = inputs.read_inputs(make_config({**given, "data": str(data), "output": str(tmp_path / "run")}), Display())
    tokens = examine.check(str(data), make_settings(CheckSettings, given), Display())["proof"]["tokens"]
    assert {
        role: {"tokens": own["tokens"], "supervised": own["trained"], "weight": own["weight"]}
        for role, own in tokens["per_role"].items()
    } == trained.data.tokens_per_role()
    taken = sum(len(example.token_ids_T) for example in trained.data.examples)
    assert tokens["left_out"] > 0
    assert tokens["all"] == taken + tokens["left_out"]


@pytest.mark.parametrize(
    "data", ["missing.jsonl", "{0}", "{0}/good,,x", "{0}/good:0.5,{0}/text:0", "{0}/good:1,{0}/text:1"]
)
def test_names_of_files(data: str, folder: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "Workers", Here)
    said = compare(tiny_model_dir, data.format(folder), {}, folder)
    assert (said is None) == (data.count(":1") == 2)


def test_a_tokenizer_of_another_model(
    folder: Path, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "Workers", Here)
    monkeypatch.setattr("likely.model.place.vocabulary_size", lambda _: 50)
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    said = compare(tmp_path / "model", str(folder / "good"), {}, folder)
    assert said is not None
    assert "the vocabulary of the model has 50 tokens" in said
