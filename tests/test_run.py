"""A training from end to end: what it writes, and that independent code finds the same likelihood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import likely

PAIRS = [("Capital of France?", "Paris."), ("And of Spain?", "Madrid."), ("Say hi.", "Hi there!"), ("2 + 2?", "4")]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    for name, pairs in (("train", PAIRS), ("held_out", [("Capital of Spain?", "Madrid."), ("3 + 3?", "It is 6.")])):
        rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(tmp_path / "train.jsonl"), str(tmp_path / "held_out.jsonl")


def train(files: tuple[str, str], model: Path, output: Path, **settings: Any) -> Any:
    settings = {"steps": 3, "batch_size": 2, "dtype": "float32", "learning_rate": 1e-2} | settings
    return likely.train(model=str(model), data=files[0], eval_data=files[1], output=str(output), **settings)


def independent_nll(model: Any, tokenizer: Any, path: str) -> float:
    """Nats per token of the answers, row by row, with a mask found in the text: nothing of the package."""
    nats, count = 0.0, 0
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        question, answer = (m["content"] for m in json.loads(line)["messages"])
        prompt = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
        ids = torch.tensor([prompt + tokenizer(f"{answer}<|im_end|>").input_ids])
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        gold = logp[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        nats, count = nats - float(gold.sum()), count + len(gold)
    return nats / count


def load(folder: Path, base: Path) -> Any:
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_saved_models_have_the_reported_likelihood(
    tmp_path: Path, files: tuple[str, str], tiny_model_dir: Path, tune: str
) -> None:
    run = train(files, tiny_model_dir, tmp_path / "run", tune=tune, save_every=2)
    folder = tmp_path / "run" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    # float32 on both sides; the bound is 1e-4
    tuned = independent_nll(load(folder, tiny_model_dir), tokenizer, files[1])
    assert run.report["tuned"]["nll"] == pytest.approx(tuned, abs=1e-5)
    base = independent_nll(AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval(), tokenizer, files[1])
    assert run.report["base"]["nll"] == pytest.approx(base, abs=1e-5)
    assert run.report["delta"]["nll"] == pytest.approx(tuned - base, abs=2e-5)
    assert tuned < base
    step = load(tmp_path / "run" / "checkpoints" / "step-000002" / "model", tiny_model_dir)
    figures = likely.evaluate(model=f"{tmp_path / 'run'}@step-2", data=files[1])
    assert figures["nll"] == pytest.approx(independent_nll(step, tokenizer, files[1]), abs=1e-5)
    assert figures["nll"] != pytest.approx(tuned, abs=1e-4)


def test_the_run_folder(tmp_path: Path, files: tuple[str, str], tiny_model_dir: Path) -> None:
    run = train(files, tiny_model_dir, tmp_path / "run", eval_every=1, epochs=2.0, steps=None)
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "run.json", "metrics.jsonl", "model", "report.json", "report.html", "report", "README.md",
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "nll" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]  # 4 rows, 2 a step, 2 epochs
    wanted = {"step", "nll", "tokens", "distinct_tokens", "supervised_tokens", "grad_norm", "learning_rate", "seconds"}
    assert all(wanted <= set(line) for line in steps)
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 1, 2, 3, 4]
    origins = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert origins["data"]["rows"] == 4
    assert origins["supervised"]["assistant"]["supervised"] > 0
    assert origins["supervised"]["user"]["supervised"] == 0
    assert origins["base_sha256"]
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["verdict"] == run.verdict
    assert run.verdict in (folder / "README.md").read_text(encoding="utf-8")
    assert not [p for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_a_run_repeats_bit_for_bit_from_its_own_config(
    tmp_path: Path, files: tuple[str, str], tiny_model_dir: Path
) -> None:
    train(files, tiny_model_dir, tmp_path / "first")
    settings = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text(encoding="utf-8"))
    likely.train(**settings | {"output": str(tmp_path / "second")})
    first, second = (tmp_path / name / "model" / "adapter_model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_what_was_trained_can_be_evaluated_and_scored_with_the_same_settings(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    rows = ["q,a,other", *(f"{q} {q},{a},x" for q, a in PAIRS), "too,few", "long?," + " so" * 60 + ",x"]
    (tmp_path / "d.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    data = str(tmp_path / "d.csv")
    settings: dict[str, Any] = {
        "columns": "prompt=q,completion=a", "template": "raw", "on_bad_row": "skip", "on_too_long": "truncate_right",
        "max_length": 40,
    }  # fmt: skip
    run = train((data, data), tiny_model_dir, tmp_path / "run", **settings)
    figures = likely.evaluate(model=str(run.folder), data=data, base=str(tiny_model_dir), **settings)
    assert figures["nll"] == pytest.approx(run.report["tuned"]["nll"], abs=1e-6)  # float32 saved and read back
    assert figures["num_examples"] == run.report["tuned"]["num_examples"] == 5
    records = list(likely.score(model=str(run.folder), data=data, **settings))
    assert max(len(record["tokens"]) for record in records) == 40
    nats, tokens = (sum(record[key] for record in records) for key in ("nll_nats", "num_tokens"))
    assert nats / tokens == pytest.approx(figures["nll"], abs=1e-9)
    for key in settings:  # each of them matters here
        less = {k: v for k, v in settings.items() if k != key}
        if key in {"template", "max_length"}:
            other = likely.evaluate(model=str(run.folder), data=data, **less)
            assert other["nll"] != pytest.approx(figures["nll"], abs=1e-4)
        else:
            with pytest.raises(likely.DataError):
                likely.evaluate(model=str(run.folder), data=data, **less)
    with pytest.raises(likely.ConfigError, match=r"unknown key 'colums'; did you mean columns\?"):
        likely.score(model=str(run.folder), data=data, colums="prompt=q")


def test_pack_tokens_changes_no_figure(tmp_path: Path, files: tuple[str, str], tiny_model_dir: Path) -> None:
    reports = [train(files, tiny_model_dir, tmp_path / str(n), pack_tokens=n).report for n in (40, 4096)]
    for state in ("base", "tuned"):
        # float32: another order of sums; the tuned one has been through three steps of it
        assert reports[0][state]["nll"] == pytest.approx(reports[1][state]["nll"], abs=2e-5)


def test_without_held_out_data(tmp_path: Path, files: tuple[str, str], tiny_model_dir: Path) -> None:
    run = likely.train(model=str(tiny_model_dir), data=files[0], output=str(tmp_path / "run"), steps=1)
    assert "nothing can be said about new examples" in run.verdict
    assert (tmp_path / "run" / "report.html").exists()


def test_what_is_weighed(tmp_path: Path, files: tuple[str, str], tiny_model_dir: Path) -> None:
    """The first step's NLL of each objective, against the scores of the untrained model."""
    records = list(likely.score(model=str(tiny_model_dir), data=files[0]))
    tokens = [[t for t in record["tokens"] if t["logprob"] is not None] for record in records]

    def expected(prompt_weight: float) -> float:
        weigh = [(1.0 if t["weight"] else prompt_weight, t["logprob"]) for row in tokens for t in row]
        return -sum(w * lp for w, lp in weigh) / sum(w for w, _ in weigh)

    per_row = [[t["logprob"] for t in row if t["weight"]] for row in tokens]
    cases: list[tuple[dict[str, Any], float]] = [
        ({}, expected(0.0)),
        ({"train_on": "all"}, expected(1.0)),
        ({"prompt_weight": 0.25}, expected(0.25)),
        ({"normalize": "example"}, -sum(sum(row) / len(row) for row in per_row) / len(per_row)),
    ]
    for number, (settings, nll) in enumerate(cases):
        folder = tmp_path / str(number)
        train(files, tiny_model_dir, folder, steps=1, batch_size=4, **settings)
        first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert first["nll"] == pytest.approx(nll, rel=1e-5)  # float32


def test_greedy_answers_are_those_of_transformers(tiny_model_dir: Path) -> None:
    from likely.model.generate import greedy_answers
    from likely.model.load import load_model

    model, tokenizer = load_model(str(tiny_model_dir)), AutoTokenizer.from_pretrained(tiny_model_dir)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    prompts = [tokenizer(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n").input_ids for q, _ in PAIRS]
    answers = greedy_answers(model, tokenizer, prompts, stop_id=tokenizer.eos_token_id, max_new_tokens=8)
    alone = [greedy_answers(model, tokenizer, [p], stop_id=tokenizer.eos_token_id, max_new_tokens=8) for p in prompts]
    assert [[answer] for answer in answers] == alone
    for ids, answer in zip(prompts, answers, strict=True):
        out = plain.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=2)
        assert answer.text == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    # whatever generation_config.json asks for: the most likely token is the most likely token
    model.causal_lm.generation_config.update(repetition_penalty=2.5, num_beams=3, no_repeat_ngram_size=1)
    again = greedy_answers(model, tokenizer, prompts, stop_id=tokenizer.eos_token_id, max_new_tokens=8)
    assert again == answers
    assert model.causal_lm.generation_config.num_beams == 3
    # and the model still follows the trie afterwards
    assert next(iter(likely.score(model=str(tiny_model_dir), data=str(_one_row(tiny_model_dir)))))["nll_nats"] > 0


def _one_row(near: Path) -> Path:
    path = near.parent / "one.jsonl"
    path.write_text('{"prompt": "Hi", "completion": "Hello"}\n', encoding="utf-8")
    return path
