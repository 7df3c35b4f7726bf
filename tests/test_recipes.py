"""The recipes: their data are what their program writes, and every command of docs/recipes.md runs."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import likely
from likely import cli
from likely.data.dataset import load_dataset
from likely.data.render import Renderer
from likely.errors import DataError

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
DOC = ROOT / "docs" / "recipes.md"
COMMANDS = re.findall(r"^likely .+$", DOC.read_text(encoding="utf-8").replace("\\\n", ""), re.MULTILINE)
TRAININGS = [shlex.split(line)[2:] for line in COMMANDS if line.startswith("likely train")]
TURN = "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% set content = m.tool_calls[0].function | tojson if m.tool_calls else m.content %}"
    + TURN
    + "{% endfor %}"
    + OPEN
)
FORGETFUL = (  # of all thoughts but those of the last answer
    "{% for m in messages %}{% set content = m.content if loop.last else m.content.split('</think>')[-1] %}"
    + TURN
    + "{% endfor %}"
    + OPEN
)


@pytest.fixture(scope="module")
def small_model(chat_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that can hold a contract."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=len(chat_tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=32768,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


def rows_of(name: str, kind: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECIPES / name / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_data_are_what_the_program_writes(tmp_path: Path) -> None:
    place = tmp_path / "recipes"
    place.mkdir()
    for file in ("make.py", "texts.yaml"):
        (place / file).write_bytes((RECIPES / file).read_bytes())
    maths = tmp_path / "bench" / "data"
    maths.mkdir(parents=True)
    (maths / "gsm8k_200.jsonl").write_bytes((ROOT / "bench" / "data" / "gsm8k_200.jsonl").read_bytes())
    subprocess.run([sys.executable, place / "make.py"], check=True, timeout=60)
    written = {str(path.relative_to(place)): path.read_bytes() for path in place.glob("*/*.jsonl")}
    assert written == {str(path.relative_to(RECIPES)): path.read_bytes() for path in RECIPES.glob("*/*.jsonl")}
    licence = "LICENSE-gsm8k.txt"
    assert (RECIPES / "maths-tutor" / licence).read_bytes() == (ROOT / "bench" / "data" / licence).read_bytes()


@pytest.mark.parametrize("name", sorted({path.parent.name for path in RECIPES.glob("*/train.jsonl")} - {"duplicated"}))
def test_no_held_out_prompt_is_trained_on_and_no_row_comes_twice(name: str) -> None:
    def prompt(row: dict[str, Any]) -> str:
        return json.dumps(list(takewhile(lambda message: message["role"] != "assistant", row["messages"])))

    trained, held_out = rows_of(name, "train"), rows_of(name, "eval")
    assert not {prompt(row) for row in trained} & {prompt(row) for row in held_out}
    everything = [json.dumps(row) for row in trained + held_out]
    assert len(set(everything)) == len(everything)


def test_every_recipe_has_its_command() -> None:
    used = {word for command in TRAININGS for word in command}
    for folder in sorted(path for path in RECIPES.iterdir() if (path / "train.jsonl").is_file()):
        assert f"recipes/{folder.name}/train.jsonl" in used
    outputs = [command[command.index("--output") + 1] for command in TRAININGS]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("command", TRAININGS, ids=[command[command.index("--output") + 1] for command in TRAININGS])
def test_commands_run(command: list[str], small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    flags = dict(zip(command[::2], command[1::2], strict=True))
    assert flags["--model"] == "smollm2-135m"
    small = {"--model": str(small_model), "--output": str(tmp_path / "run"), "--steps": "2", "--batch-size": "2"}
    flags = {key: value for key, value in (flags | small).items() if key not in {"--epochs", "--num-answers"}}
    flags |= {"--eval-every": "1"} if "--eval-every" in flags else {}
    code = cli.app(["train", *(word for pair in flags.items() for word in pair)], standalone_mode=False)
    assert not code
    assert (tmp_path / "run" / "report.json").is_file()


def test_the_wrong_template_of_the_support_bot(small_model: Path) -> None:
    """The same questions and answers, in the chat template and without; rows of messages can't be joined without it."""
    files = [str(RECIPES / "support-bot" / name) for name in ("eval.jsonl", "eval-strings.jsonl")]
    questions = {row["prompt"].strip(): row["completion"] for row in rows_of("support-bot", "eval-strings")}
    assert questions == {
        row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows_of("support-bot", "eval")
    }
    asked = likely.evaluate(model=str(small_model), data=files[1], template="raw")
    assert asked["num_examples"] == len(questions)
    with pytest.raises(DataError, match="template raw joins strings"):
        likely.evaluate(model=str(small_model), data=files[0], template="raw")


def test_the_check_passes_the_good_recipes_and_sees_what_is_wrong_with_the_bad_one(small_model: Path) -> None:
    def checked(name: str) -> dict[str, dict[str, int]]:
        settings = {"eval_data": str(RECIPES / name / "eval.jsonl"), "processes": 1}
        told = likely.check(model=str(small_model), data=str(RECIPES / name / "train.jsonl"), **settings)
        assert told["ok"], told["verdict"]
        return told["audit"]

    good, bad = checked("translation"), checked("duplicated")
    wrong = {"exact duplicates": 80, "held-out row in training data": 10}
    assert {name: bad[name]["count"] for name in wrong} == wrong
    assert {name: good[name]["count"] for name in wrong} == dict.fromkeys(wrong, 0)


def test_rows_with_tools_are_for_templates_that_have_them(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """The small model's would drop the calls, and that is refused; one that writes them trains both answers."""
    file = str(RECIPES / "tool-calls" / "tools-openai.jsonl")
    with pytest.raises(DataError, match="tool"):
        load_dataset(file, Renderer(chat_tokenizer), 4096)
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = WITH_TOOLS
    dataset = load_dataset(file, Renderer(tokenizer), 4096)
    first = dataset.examples[0]
    trained = tokenizer.decode(first.token_ids_T[first.weights_T > 0])
    [call] = rows_of("tool-calls", "tools-openai")[0]["messages"][1]["tool_calls"]
    assert call["function"]["name"] in trained
    assert rows_of("tool-calls", "tools-openai")[0]["messages"][-1]["content"] in trained


def test_thoughts_are_trained_by_a_template_that_forgets_them(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = FORGETFUL
    dataset = load_dataset(str(RECIPES / "thinking" / "eval.jsonl"), Renderer(tokenizer), 4096)
    rows = rows_of("thinking", "eval")
    assert len(dataset.examples) == 2 * len(rows)
    trained = [tokenizer.decode(e.token_ids_T[e.weights_T > 0]) for e in dataset.examples]
    assert [text.partition("<|im_end|>")[0] for text in trained] == [
        row["messages"][i]["content"] for row in rows for i in (1, 3)
    ]
