"""The command line as a person meets it: exit codes, one clear line, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from likely.cli import main

ROW = {"messages": [{"role": "user", "content": "What is the capital?"}, {"role": "assistant", "content": "Paris."}]}


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Likely = Callable[..., Said]


@pytest.fixture
def likely(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Likely:
    """Type a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["likely", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Said(int(stop.value.code or 0), *capsys.readouterr())

    return run


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def assert_refused(said: Said, code: int, *words: str) -> None:
    assert said.code == code, said.err
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, ("train.jsonl", "no such file")),
        ([ROW] * 16 + ['{"messages": ['], ("train.jsonl:17", "broken JSON")),
        ([ROW, {"messages": ROW["messages"][:1]}], ("train.jsonl:2", "no assistant turn")),
        ([{"question": "a", "answer": "b"}], ("train.jsonl:1", "'question', 'answer'", "completion")),
        ([], ("train.jsonl", "no rows")),
        (
            [ROW, {"messages": [{"role": "user", "content": "a " * 600}, ROW["messages"][1]]}],
            ("train.jsonl:2", "limit of"),
        ),
    ],
)
def test_data_that_cannot_be_trained_on(
    likely: Likely, tmp_path: Path, tiny_model_dir: Path, rows: list[object] | None, words: tuple[str, ...]
) -> None:
    if rows is not None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    said = likely("train", "--model", tiny_model_dir, "--data", "train.jsonl", "--output", "run")
    assert_refused(said, 3, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--batch-sze", "3"], ("--batch-sze", "--batch-size")),
        (["frobnicate"], ("frobnicate",)),
        (["train", "--model", "m"], ("--data",)),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--epochs", "0"], ("epochs", "greater than 0")),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--dtype", "int8"], ("int8", "bfloat16")),
        (["train", "missing.yaml"], ("missing.yaml", "check the path")),
        (["train", "typo.yaml"], ("typo.yaml", "'batchsize'", "batch_size")),
        (["train", "--model", "m", "--data", "d", "--output", "full"], ("full", "not empty")),
        (["score", "d", "--model", "m"], ("--output",)),
    ],
)
def test_usage(likely: Likely, tmp_path: Path, arguments: list[str], words: tuple[str, ...]) -> None:
    (tmp_path / "typo.yaml").write_text("model: m\nbatchsize: 3\n", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep", encoding="utf-8")
    assert_refused(likely(*arguments), 2, *words)
    assert (tmp_path / "full" / "mine.txt").read_text(encoding="utf-8") == "keep"


def test_models_that_cannot_be_used(likely: Likely, tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", ROW)
    (tmp_path / "empty").mkdir()
    for name in ("./nothing", "empty", "smollm3"):
        said = likely("train", "--model", name, "--data", "d.jsonl", "--output", "run")
        assert_refused(said, 4, name)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_pickled_or_missing(likely: Likely, tmp_path: Path, tiny_model_dir: Path) -> None:
    import shutil

    write_rows(tmp_path / "d.jsonl", ROW)
    for name in ("pickled", "none"):
        shutil.copytree(tiny_model_dir, tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        if name == "pickled":
            weights.rename(weights.with_name("pytorch_model.bin"))
        else:
            weights.unlink()
        assert_refused(likely("evaluate", "d.jsonl", "--model", name), 4, name)


def test_help_and_usage_errors_start_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['likely', {arguments}]\n"
        "from likely.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    for arguments in ("'--help'", "'train', '--help'", "'train', '--model', 'm'", "'init'"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments=arguments)], capture_output=True, text=True, check=True
        )
        assert done.stderr.endswith("False\n"), arguments


def test_help_shows_every_setting(likely: Likely) -> None:
    from likely.config import Config

    said = likely("train", "--help")
    assert said.code == 0
    for field in Config.model_fields:
        assert f"--{field.replace('_', '-')}" in said.out
    assert likely().out == likely("--help").out


def test_init_prints_settings_that_are_read_back(likely: Likely, tmp_path: Path) -> None:
    text = likely("init").out.replace("CHANGE_ME", "x")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert_refused(likely("train", "config.yaml"), 4, "x")  # all is understood; there is no model x


def test_env(likely: Likely) -> None:
    found = json.loads(likely("env", "--json").out)
    assert {"python", "torch", "transformers", "device", "dtype auto"} <= set(found)


def test_train_evaluate_and_score(likely: Likely, tmp_path: Path, tiny_model_dir: Path) -> None:
    write_rows(tmp_path / "d.jsonl", *[ROW] * 3)
    flags = ("--model", tiny_model_dir, "--data", "d.jsonl", "--eval-data", "d.jsonl", "--steps", 2)
    said = likely("train", *flags, "--output", "run", "--json")
    assert said.code == 0, said.err
    report = json.loads(said.out)  # one object, and nothing else on stdout
    assert report["run"] == "run"
    assert report["verdict"] in said.err
    said = likely("evaluate", "d.jsonl", "--model", "run", "--base", tiny_model_dir, "--json")
    figures = json.loads(said.out)
    assert {
        "nll", "ci95", "perplexity", "bits_per_byte", "num_examples", "num_tokens", "token_accuracy", "base", "delta",
    } <= set(figures)  # fmt: skip
    assert figures["nll"] == pytest.approx(report["tuned"]["nll"], abs=1e-6)  # float32 saved and read back
    assert figures["delta"]["nll"] == pytest.approx(report["delta"]["nll"], abs=1e-5)
    assert "change" in likely("evaluate", "d.jsonl", "--model", "run", "--base", tiny_model_dir).out
    said = likely("score", "d.jsonl", "--model", "run", "--base", tiny_model_dir, "--output", "scores.jsonl")
    assert (said.code, said.out) == (0, "")
    lines = (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    record = json.loads(lines[2])
    assert record["source"] == "d.jsonl:3"
    assert set(record["tokens"][0]) == {"id", "text", "role", "weight", "logprob", "rank", "entropy", "base_logprob"}
    assert record["tokens"][0]["logprob"] is None
    supervised = [t for t in record["tokens"] if t["weight"]]
    assert "".join(t["text"] for t in supervised) == "Paris.<|im_end|>"
    assert record["num_tokens"] == len(supervised)
    assert record["nll_nats"] == pytest.approx(-sum(t["logprob"] for t in supervised))


def test_a_learning_rate_that_explodes(likely: Likely, tmp_path: Path, tiny_model_dir: Path) -> None:
    write_rows(tmp_path / "d.jsonl", *[ROW] * 2)
    said = likely(
        "train", "--model", tiny_model_dir, "--data", "d.jsonl", "--output", "run", "--tune", "full",
        "--learning-rate", 1e30, "--steps", 30, "--warmup", 0, "--dtype", "float32",
    )  # fmt: skip
    assert said.code == 6
    assert said.err.splitlines()[-1].startswith("error: step ")
    assert "d.jsonl:" in said.err.splitlines()[-1]
    assert not (tmp_path / "run" / "model").exists()


def test_names_that_look_like_markup(likely: Likely, tmp_path: Path, tiny_model_dir: Path) -> None:
    write_rows(tmp_path / "[red] ü %s.jsonl", ROW)
    said = likely("evaluate", "[red] ü %s.jsonl", "--model", tiny_model_dir, "--json")
    assert said.code == 0, said.err
    assert_refused(likely("evaluate", "[bold]no.jsonl", "--model", tiny_model_dir), 3, "[bold]no.jsonl")


def test_broken_weights_are_no_perfect_score(likely: Likely, tmp_path: Path, tiny_model_dir: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    write_rows(tmp_path / "d.jsonl", ROW)
    shutil.copytree(tiny_model_dir, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    said = likely("evaluate", "d.jsonl", "--model", "broken", "--json")
    assert said.code in {4, 6}
    assert said.out == ""
    flags = ("--model", tiny_model_dir, "--data", "d.jsonl", "--dtype", "float32", "--warmup", 0, "--tune", "full")
    said = likely("train", *flags, "--steps", 1, "--learning-rate", 1e39, "--output", "run")
    assert said.code == 6, said.err
    assert not (tmp_path / "run" / "model").exists()


def test_scores_never_replace_the_data(likely: Likely, tmp_path: Path, tiny_model_dir: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", ROW)
    before = data.read_bytes()
    assert_refused(likely("score", "d.jsonl", "--model", tiny_model_dir, "--output", "./d.jsonl"), 2, "data itself")
    assert data.read_bytes() == before
