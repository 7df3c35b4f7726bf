"""``likely score``: exact whatever the order, resumable, in two formats; and the rows that it puts on top."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import likely
from chatml import CHATML
from likely.insight import score_log
from likely.insight.ranking import Ranking
from likely.look import score as look_score
from likely.training.log import Display
from likely.verb_settings import LookSettings
from test_cli import Likely
from test_cli import likely as likely_cli  # noqa: F401

WORDS = ["Paris", "London", "reset it", "4", "Hi there!", "a b c", "Open the settings, choose security."]


def rows(number: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(3)
    return [{"prompt": f"Question {i % 23}: what?", "completion": str(rng.choice(WORDS))} for i in range(number)]


def write(path: Path, content: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return str(path)


def test_scores_are_those_of_independent_code(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = write(tmp_path / "d.jsonl", rows(9))
    network = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for row, record in zip(rows(9), likely.score(model=str(tiny_model_dir), data=data), strict=True):
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        asked = tokenizer(prompt).input_ids
        ids = torch.tensor([asked + tokenizer(row["completion"] + "<|im_end|>").input_ids])
        with torch.no_grad():
            logp_TV = torch.log_softmax(network(input_ids=ids).logits[0, :-1].double(), -1)
        gold = logp_TV.gather(1, ids[0, 1:, None])[:, 0]
        best = logp_TV.max(-1).values
        answer = slice(len(asked) - 1, None)
        assert record["nll_nats"] == pytest.approx(-float(gold[answer].sum()), abs=1e-4)  # float32
        joint = -float(gold.sum())
        assert record["joint_nll_nats"] == pytest.approx(joint + _tail(record, len(ids[0])), abs=1e-4)
        assert record["shortfall_nats"] == pytest.approx(float((best - gold)[answer].sum()), abs=1e-4)
        worst = record["contradiction"]
        assert worst["position"] == len(asked) + int((best - gold)[answer].argmax())
        assert worst["rival"] == tokenizer.decode([int(logp_TV[worst["position"] - 1].argmax())])


def _tail(record: dict[str, Any], length: int) -> float:
    """What the template writes after the end of the turn belongs to the joint likelihood too."""
    return -sum(token["logprob"] for token in record["tokens"][length:])


def test_neither_order_nor_neighbours_change_a_score(tmp_path: Path, tiny_model_dir: Path) -> None:
    content = rows(40)
    shuffled = [content[i] for i in np.random.default_rng(1).permutation(40)]
    found = {}
    for name, chosen in (("straight", content), ("shuffled", shuffled), ("few", content[:3])):
        records = likely.score(model=str(tiny_model_dir), data=write(tmp_path / f"{name}.jsonl", chosen))
        found[name] = {json.dumps(row): r["nll_nats"] for row, r in zip(chosen, records, strict=True)}
    for row, nats in found["straight"].items():
        assert found["shuffled"][row] == pytest.approx(nats, abs=1e-5)  # float32 in packs of another shape
    for row, nats in found["few"].items():
        assert found["straight"][row] == pytest.approx(nats, abs=1e-5)


class Killed(BaseException):
    """What ends a process in the middle."""


def test_a_killed_score_goes_on_and_gives_the_same_file(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "d.jsonl", rows(300))
    asked = LookSettings(model=str(tiny_model_dir), base=str(tiny_model_dir))

    def run(name: str) -> list[str]:
        records = look_score(data, asked, Display(quiet=True), beside=tmp_path / name)
        return [json.dumps(record) for record in records]

    undisturbed = run("a.jsonl")
    packs = []
    real = score_log.score_together
    monkeypatch.setattr(score_log, "score_together", lambda *a: packs.append(1) or real(*a))
    monkeypatch.setattr("likely.look.default_pack_tokens", lambda _: 128)
    whole = run("b.jsonl")
    num_packs = len(packs)
    assert num_packs > 8
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    for row, other in zip(undisturbed, whole, strict=True):  # packs of another size: another order of float32 sums
        assert json.loads(row)["nll_nats"] == pytest.approx(json.loads(other)["nll_nats"], abs=1e-5)

    def die(*arguments: Any) -> Any:
        packs.append(1)
        if len(packs) == num_packs // 2 + 2:
            raise Killed
        return real(*arguments)

    for torn in (b"", b"\0" * 7, b"torn" * 50):
        packs.clear()
        monkeypatch.setattr(score_log, "score_together", die)
        with pytest.raises(Killed):
            run("c.jsonl")
        (log,) = [p for p in tmp_path.iterdir() if p.name == ".c.jsonl.base-scores"]
        with log.open("ab") as file:
            file.write(torn)
        monkeypatch.setattr(score_log, "score_together", lambda *a: packs.append(1) or real(*a))
        packs.clear()
        assert run("c.jsonl") == whole
        assert len(packs) == num_packs - (num_packs // 2 + 1)  # none of them twice


def test_scores_of_other_data_or_weights_are_not_gone_on_with(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".log"
    examples: list[Any] = []

    class Model:
        shares = True

    def log(key: bytes) -> None:
        with score_log.logged_scores(
            path,
            key,
            Model(),
            examples,
            64,
            display=Display(quiet=True),
        ):
            pass

    log(b"a" * 32)
    path.write_bytes(b"a" * 32 + b"rest")
    log(b"b" * 32)
    assert path.read_bytes() == b"b" * 32


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    import fcntl

    path = tmp_path / ".s"
    with path.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            pytest.raises(likely.LockedError, match="another process"),
            score_log.logged_scores(path, b"k" * 32, _shares(), [], 64, display=Display(quiet=True)),
        ):
            pass


def _shares() -> Any:
    return type("Model", (), {"shares": True})()


def test_parquet_holds_what_jsonl_holds(likely_cli: Likely, tmp_path: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    write(tmp_path / "d.jsonl", [*rows(3), {"prompt": "é", "completion": "東京\n"}])
    for name in ("s.jsonl", "s.parquet"):
        said = likely_cli("score", "d.jsonl", "--model", tiny_model_dir, "--base", tiny_model_dir, "--output", name)
        assert said.code == 0, said.err
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()]
    assert pyarrow.parquet.read_table(tmp_path / "s.parquet").to_pylist() == lines
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl", "s.jsonl", "s.parquet"]


def record(
    source: str, nats: float, base: float | None = None, margin: float = 0.0, num: float = 2.0
) -> dict[str, Any]:
    own = {"position": 1, "text": "a", "logprob": -margin - 0.1, "rival": " b", "rival_logprob": -0.1}
    return {
        "source": source, "nll_nats": nats, "num_tokens": num, "base_nll_nats": base, "shortfall_nats": margin,
        "prompt_explains": None,
        "contradiction": own if margin else None, "tokens": [],
    }  # fmt: skip


def test_the_three_lists() -> None:
    ranking = Ranking(2)
    for made in (
        record("d:1", 1.0, 2.0), record("d:2", 6.0, 2.0, margin=4.0), record("d:3", 3.0, 2.5, margin=0.9),
        record("d:4", 5.0, 9.0, margin=5.0), record("d:5", 0.0, 0.0, num=0.0), record("d:6", 6.0, 5.8),
    ):  # fmt: skip
        ranking.add(made)
    tops = {name: [row.record["source"] for row in ranking.top(name)] for name in ("suspect", "worse", "surprising")}
    assert tops == {"suspect": ["d:2", "d:4"], "worse": ["d:2", "d:3"], "surprising": ["d:2", "d:6"]}
    text = ranking.to_text()
    assert f"gold a has {math.exp(-5.1):.2%}, the model says ' b' with {math.exp(-0.1):.2%}" in text
    assert "NLL 2.100000 nats per token over 10 tokens" in ranking.summary
    alone = Ranking(1)
    alone.add(record("d:1", 1.0))
    assert "no base was given" in alone.to_text()
    assert "no gold token lies far below" in alone.to_text()


def test_rank_needs_no_output(likely_cli: Likely, tmp_path: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    write(tmp_path / "d.jsonl", rows(30))
    said = likely_cli("score", "d.jsonl", "--model", tiny_model_dir, "--rank")
    assert said.code == 0, said.err
    assert said.out.count("d.jsonl:") == 40  # twenty of two lists
    said = likely_cli("score", "d.jsonl", "--rank", 3, "--model", tiny_model_dir)
    assert said.out.count("d.jsonl:") == 6
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]
    assert np.isfinite(float(said.err.split("NLL ")[1].split()[0]))


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
DEMO = Path(likely.__file__).parent / "demo" / "train.jsonl"


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can learn the demo's capitals from nothing in a few seconds: whole words, two layers."""
    text = DEMO.read_text(encoding="utf-8") + "user assistant\n"
    split = pre_tokenizers.Split(Regex(r" ?\w+|\W"), "isolated")
    words = sorted({piece for piece, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate(["<|unk|>", "<|im_start|>", "<|im_end|>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))  # noqa: S106
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<|unk|>", eos_token="<|im_end|>", bos_token="<|im_start|>",  # noqa: S106
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=CHATML, model_max_length=128,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=len(fast), **SMALL, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    ).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_planted_wrong_answers_are_on_top_of_the_suspects(tmp_path: Path, small_model: Path) -> None:
    """The demo's capitals, each asked for six times; 5% of the answers are swapped for others, and a model is tuned on
    what that gives. At least 80% of as many rows on top of the list are those. (docs/log.md has the embedded model on
    the demo's own rows.)"""
    answers = sorted({json.loads(line)["messages"][1]["content"] for line in DEMO.read_text("utf-8").splitlines()})
    pairs = [re.fullmatch(r"(.+)( is the capital of (.+)\.)", answer) for answer in answers]
    content = [
        {"prompt": f"What is the capital of {pair[3]}?", "completion": pair[0]}
        for pair in pairs
        if pair
        for _ in range(6)
    ]
    rng = np.random.default_rng(5)
    planted = set(map(int, rng.choice(len(content), round(0.05 * len(content)), replace=False)))
    for i in planted:
        right = pairs[i // 6]
        others = [pair[1] for pair in pairs if pair and right and pair[1] != right[1]]
        content[i]["completion"] = str(rng.choice(others)) + str(right and right[2])
    data = write(tmp_path / "planted.jsonl", content)
    settings = {"tune": "full", "epochs": 12.0, "batch_size": 24, "learning_rate": 5e-3, "dtype": "float32"}
    run = likely.train(model=str(small_model), data=data, output=str(tmp_path / "run"), **settings)
    ranking = Ranking(len(planted))
    for made in likely.score(model=str(run.folder), data=data, with_prompts=True):
        ranking.add(made)
    top = {int(row.record["source"].rpartition(":")[2]) - 1 for row in ranking.top("suspect")}
    assert len(top & planted) >= 0.8 * len(planted), (top, planted)
