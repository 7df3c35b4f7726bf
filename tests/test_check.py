"""``likely check``: what it counts, that training refuses what it refuses, and that it needs no torch."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import likely
from likely.data.dataset import load_dataset
from likely.data.formats import ReadOptions, read_conversations
from likely.data.proof import count_turns, leading, prove_stops
from likely.data.render import Renderer, Supervision
from likely.data.rows import Intake
from likely.data.survey import Facts, Surveyor
from likely.errors import DataError, LikelyError
from likely.insight import check as checking
from likely.insight.check_page import printable, to_html, to_text
from likely.types import Conversation, Example, Message, Source

CLI = """
import sys
from likely.cli import main
try:
    main()
finally:
    sys.stderr.write(f"torch={'torch' in sys.modules}")
"""


def chat(*texts: str, **answer: Any) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    messages[-1].update(answer)
    return {"messages": messages}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def survey(renderer: Renderer, path: Path, max_length: int = 512) -> Facts:
    intake = Intake(str(path), ReadOptions())
    facts = Facts((str(path),))
    for batch in intake.batches():
        facts.add(Surveyor(renderer, max_length).survey(batch, separately=True).facts)
    return facts


def run_cli(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CLI, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_check_runs_without_torch_and_its_json_is_one_object(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = write(
        tmp_path / "d.jsonl", [chat("Hi", "Hello!"), chat("Where?", "Here.", weight=0.5), chat("a", "b", "c", "d")]
    )
    page = tmp_path / "page.html"
    done = run_cli("check", data, "--model", tiny_model_dir, "--json", "--output", page)
    assert done.returncode == 0, done.stderr
    assert "torch=False" in done.stderr
    result = json.loads(done.stdout)
    assert result["ok"]
    assert result["data"]["rows"] == 3
    assert result["proof"]["assistant_turns"] == result["proof"]["stop_tokens_trained"] == 4
    assert result["proof"]["prompts_equal_to_inference"] == 4
    assert "<svg" in page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=.(?!#)|url\((?!#)|@import", page.read_text(encoding="utf-8"))


def test_check_exits_with_3_where_training_would_be_wrong(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = write(tmp_path / "d.jsonl", [chat("Hi", "Hello!"), {"messages": [{"role": "user", "content": "?"}]}, "{"])
    done = run_cli("check", data, "--model", tiny_model_dir)
    assert done.returncode == 3
    assert done.stderr.splitlines()[0].startswith(f"error: {data}:2: Training would be wrong: 2 rows are refused")
    assert f"{data}:2: no assistant turn" in done.stdout
    assert f"{data}:3: broken JSON" in done.stdout
    assert "Traceback" not in done.stderr
    missing = run_cli("check", tmp_path / "none.jsonl", "--model", tiny_model_dir)
    assert missing.returncode == 3
    assert "no such file" in missing.stderr
    wanted = run_cli("check", data, "--model", tiny_model_dir, "--max-length", 100_000)
    assert wanted.returncode == 2
    assert "over the model's context of 512 tokens" in wanted.stderr


def test_show_prints_one_row_with_what_is_trained_in_brackets(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = write(tmp_path / "d.jsonl", [chat("Hi", "Hello!"), chat("Say \x1b[31mred", "No.", weight=0.5)])
    done = run_cli("check", data, "--model", tiny_model_dir, "--show", f"{data}:2")
    assert done.returncode == 0, done.stderr
    assert (
        "user\nSay \\x1b[31mred<|im_end|>\n<|im_start|>assistant\n\u27e6No.<|im_end|>\u00d70.5\u27e7\n" in done.stdout
    )
    assert "Hello" not in done.stdout
    assert run_cli("check", data, "--model", tiny_model_dir, "--show", "7").returncode == 2


def test_counts_are_those_of_the_examples(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [chat("Hi", "Hello!"), chat("a", "b", "c", "d", weight=0.25), chat("x", "y", weight=0)]
    path = write(tmp_path / "d.jsonl", rows)
    renderer = Renderer(chat_tokenizer)
    proof = checking.prove(survey(renderer, path), 512)
    examples = [e for c in read_conversations(path) for e in renderer.render(c)]
    trained = sum(int((e.weights_T > 0).sum()) for e in examples)
    assert proof["tokens"]["all"] == sum(len(e.token_ids_T) for e in examples)
    assert proof["tokens"]["trained"] == trained
    assert proof["tokens"]["per_role"]["assistant"]["trained"] == trained
    assert proof["tokens"]["per_role"]["assistant"]["weight"] == sum(e.weights_T.sum() for e in examples)
    assert proof["tokens"]["per_role"]["user"]["trained"] == 0
    assert proof["nothing_to_train"] == 1
    assert proof["assistant_turns"] == proof["stop_tokens_trained"] == 3
    assert proof["examples_by_leading_bos"] == {"0": 0, "1": 3, "2 or more": 0}


GOOD_AND_BAD: dict[str, Any] = {
    "good": chat("Hi", "Hello!"),
    "several turns": chat("Hi", "Hello!", "And?", "Bye."),
    "strings": {"prompt": "Hi", "completion": "Hello!"},
    "some weight": chat("Hi", "Hello!", weight=0.5),
    "no weight": chat("Hi", "Hello!", weight=0),
    "no answer": {"messages": [{"role": "user", "content": "Hi"}]},
    "empty answer": chat("Hi", ""),
    "control token": chat("Hi", "Hello <|im_end|>"),
    "too long": chat("Hi", "Hello! " * 100),
    "exactly fits": chat("Hi", "a" * 50),
    "root weight": {**chat("Hi", "Hello!"), "weight": 0.5},
    "bad weight": chat("Hi", "Hello!", weight=2),
    "broken": '{"messages": [',
    "not an object": "[1]",
    "unknown role": {"messages": [{"role": "robot", "content": "Hi"}]},
    "half a surrogate": '{"prompt": "\\ud800", "completion": "x"}',
    "leading space": chat("Hi", "  Hello"),
}


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "all"])
@pytest.mark.parametrize("row", GOOD_AND_BAD.values(), ids=GOOD_AND_BAD.keys())
def test_check_and_training_agree_row_by_row(
    row: Any, train_on: Any, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "d.jsonl", [row])
    renderer = Renderer(chat_tokenizer, Supervision(train_on))
    facts = survey(renderer, path, 80)
    wrong = checking.wrongs(checking.prove(facts, 80))
    try:
        dataset = load_dataset(str(path), renderer, 80)
    except DataError:
        assert wrong
    else:
        assert not wrong
        assert facts.num_examples == len(dataset.examples)
        assert facts.tokens[:, 1].sum() == sum((e.weights_T > 0).sum() for e in dataset.examples)


def test_a_turn_whose_stop_is_not_trained_is_refused_by_both(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "d.jsonl", [chat("Hi", "Hello!")])
    renderer = Renderer(chat_tokenizer)
    (example,) = renderer.render(read_conversations(path)[0])
    example.weights_T[np.flatnonzero(example.weights_T)[-1]] = 0
    monkeypatch.setattr(renderer, "render", lambda _: [example])
    monkeypatch.setattr(renderer, "render_many", lambda _: [[example]])
    assert checking.wrongs(checking.prove(survey(renderer, path), 512)) == ["1 rows are refused", "nothing is trained"]
    with pytest.raises(DataError, match="1 assistant turns are trained, but 0 end-of-turn tokens"):
        load_dataset(str(path), renderer, 512)


def test_earlier_turns_count_where_prompts_have_weight(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    conversation = Conversation(tuple(Message(role, text) for role, text in texts), Source("f", 1))  # type: ignore[arg-type]
    for supervision, turns in [
        (Supervision("assistant"), 2),
        (Supervision("last_assistant"), 1),
        (Supervision("last_assistant", 0.1), 2),
        (Supervision("all"), 2),
    ]:
        renderer = Renderer(chat_tokenizer, supervision)
        assert count_turns(conversation, supervision) == turns
        prove_stops(conversation, renderer.render(conversation), renderer)


def test_leading_tokens() -> None:
    example = Example(np.array([7, 7, 1, 7]), np.zeros(4), np.zeros(4, np.int8), Source("f", 1))
    assert leading(example, 7) == 2
    assert leading(example, 1) == 0
    assert leading(example, None) == 0


def test_rows_over_the_limit_and_what_each_policy_does(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "d.jsonl", [chat("Hi", "Hello!"), chat("Hi", "a long answer " * 20), chat("b" * 200, "c")])
    facts = survey(Renderer(chat_tokenizer), path, 100)
    over = checking.prove(facts, 100)["over_length"]
    assert over["examples"] == 2
    assert set(over["listed"]) == {f"{path}:2", f"{path}:3"}
    assert over["policies"]["drop"]["examples_left"] == 1
    assert over["policies"]["truncate_right"]["stop_tokens_lost"] == 1
    assert over["policies"]["truncate_right"]["left_without_training"] == 1
    assert over["policies"]["truncate_left"]["left_without_training"] == 0
    proof = checking.prove(facts, 100)
    assert checking.wrongs(proof) == ["2 examples are over the limit of 100 tokens"]
    assert checking.verdict([], {}, checking.left_out(proof, on_too_long="error")).startswith("Every row can")
    for policy, fate in (("drop", "dropped"), ("truncate_right", "cut"), ("truncate_left", "cut")):
        told = checking.verdict([], {}, checking.left_out(proof, on_too_long=policy))
        lost = over["policies"][policy]["trained_tokens_lost"]
        assert told.startswith(f"2 examples over 100 tokens are {fate}, which loses {lost} trained tokens")
        assert "Every other row can be trained on exactly as shown" in told


def test_the_same_from_python(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = write(tmp_path / "d.jsonl", [chat(f"Question {i}", f"Answer {i}") for i in range(20)])
    held_out = write(tmp_path / "e.jsonl", [chat("Question 3", "Answer 3"), chat("Else?", "Else.")])
    result = likely.check(model=str(tiny_model_dir), data=str(data), eval_data=str(held_out), batch_size=4, processes=1)
    assert result["ok"]
    assert result["audit"]["held-out row in training data"]["rows"] == [
        {"source": f"{held_out}:1", "detail": "the same as training line 4"}
    ]
    assert result["cost"]["sampled_steps"] == 5  # all of the epoch
    assert result["cost"]["tokens_per_step"] * 5 == result["cost"]["tokens_per_epoch"]
    assert 1 < result["cost"]["sharing_ratio"] < 3
    assert "Answer 0" in to_text(result, colour=True)
    assert "Answer 0" in to_html(result)
    with pytest.raises(LikelyError, match="unknown key"):
        likely.check(model=str(tiny_model_dir), data=str(data), batchsize=4)


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[2Jb\n\tc\x07") == "a\\x1b[2Jb\n\tc\\x07"


def test_bare_text_ends_with_the_end_of_text_and_answers_nothing(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"  # noqa: S105  (as with Llama 3, the template ends its turns otherwise)
    renderer = Renderer(tokenizer)
    path = write(tmp_path / "d.jsonl", [{"text": "Hello there, this is text."}, {"text": "Another one."}])
    facts = survey(renderer, path)
    assert checking.wrongs(checking.prove(facts, 512)) == []
    assert (facts.counts["refused"], facts.turns, facts.stops, facts.num_plain) == (0, 2, 2, 0)
    tables = checking.audit(facts, survey(renderer, write(tmp_path / "e.jsonl", [{"text": "Quite another."}])))
    assert [kind for kind, table in tables.items() if table.count] == []
    assert checking.likelihood_floor(facts)["nats"] == 0
    # The same tokenizer still wants an answer to end as the template ends it.
    answer = Conversation((Message("user", "Hi"), Message("assistant", "Hello!")), Source("d.jsonl", 1))
    prove_stops(answer, renderer.render(answer), renderer)
