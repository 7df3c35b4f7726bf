"""What people do to a command's streams and names, and what that must not do to them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import likely
from likely.insight.pictures import visible
from likely.streams import Lasting

PROGRAM = [sys.executable, "-c", "from likely.cli import main; main()"]
ROW = {"messages": [{"role": "user", "content": "What is the capital?"}, {"role": "assistant", "content": "Paris."}]}
SILENT = {"messages": [ROW["messages"][0], {"role": "assistant", "content": "No.", "weight": 0}]}
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Typed = Callable[..., Said]


@pytest.fixture
def typed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Typed:
    """Type a command in an empty folder, in this process."""
    from likely.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["likely", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Said(int(stop.value.code or 0), *capfd.readouterr())

    return run


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shell(script: str, folder: Path, *arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run ``"$@"`` as a script does, with the program as its arguments."""
    command = ["bash", "-c", script, "bash", *PROGRAM, *map(str, arguments)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"} | more.pop("env", {})
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, **more)


@pytest.mark.parametrize(
    ("script", "codes"),
    [
        ('"$@" >&-', {0}),
        ('"$@" >&- 2>&-', {0}),
        ('"$@" <&-', {0}),
        ('"$@" 2>&-', {0}),
        ('"$@" | head -c 1 >/dev/null; exit "${PIPESTATUS[0]}"', {0, 141}),
        ('set -o pipefail; "$@" | true', {0, 141}),
        pytest.param('"$@" >/dev/full', {5}, marks=full),
        pytest.param('"$@" 2>/dev/full', {0}, marks=full),
    ],
)
@pytest.mark.parametrize("verb", ["init", "--help", "--version"])
def test_streams_that_go_away(tmp_path: Path, script: str, codes: set[int], verb: str) -> None:
    done = shell(script, tmp_path, verb)
    assert done.returncode in codes, done.stderr
    assert done.stderr.count("\n") == (5 in codes)
    assert "bug" not in done.stderr


@pytest.mark.parametrize(("script", "code"), [('"$@" >&- 2>&-', 0), ('"$@" 2>&1 | true; exit "${PIPESTATUS[0]}"', 141)])
def test_a_training_without_listeners(tmp_path: Path, tiny_model_dir: Path, script: str, code: int) -> None:
    """It trains, saves and reports; files it opens don't take the numbers of closed streams."""
    write_rows(tmp_path / "d.jsonl", ROW)
    flags = ["--model", tiny_model_dir, "--data", "d.jsonl", "--eval-data", "d.jsonl", "--output", "run", "--steps", 3]
    done = shell(script, tmp_path, "train", *flags)
    assert done.returncode == code
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines if "evaluation" not in line] == [1, 2, 3]
    for name in ("config.yaml", "run.json", "report.json", "report.html", "README.md", "model/adapter_config.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    assert "step 1/" not in "".join(p.read_text(errors="replace") for p in (tmp_path / "run").glob("*.json*"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_a_terminal_with_another_alphabet(tmp_path: Path, encoding: str) -> None:
    arguments = ["explain", "--distribution", "gold=0.5,東京=0.3"]
    command = [*PROGRAM, *arguments]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gold" in done.stdout.decode(encoding)


def test_a_stream_that_breaks_is_silent_from_then_on(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        lasting = Lasting(stream)
        for _ in range(3):
            assert lasting.write("x" * 100_000) == 100_000
            lasting.flush()
        assert lasting.fileno() == writer


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_file_names_that_are_not_utf8(typed: Typed, tmp_path: Path, tiny_model_dir: Path) -> None:
    data = str(write_rows(tmp_path / os.fsdecode(b"d\xff.jsonl"), ROW, ROW))
    output = str(tmp_path / "run")
    with pytest.raises(likely.ConfigError, match="output"):  # the libraries that write models can't
        likely.train(model=str(tiny_model_dir), data=data, output=os.fsdecode(b"run\xfe"))
    run = likely.train(model=str(tiny_model_dir), data=data, eval_data=data, output=output, steps=1)
    report = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
    assert report["title"].startswith("d\udcff.jsonl")
    assert "d\\udcff.jsonl" in (run.folder / "report.html").read_text(encoding="utf-8")
    assert "d\\udcff.jsonl" in (run.folder / "README.md").read_text(encoding="utf-8")
    assert json.loads((run.folder / "run.json").read_text(encoding="utf-8"))["data"]["path"] == data
    said = typed("score", data, "--model", output, "--output", "s.jsonl")
    assert said.code == 0, said.err
    lines = (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1])["source"] == f"{data}:2"


@pytest.mark.filterwarnings("error")
def test_what_no_font_can_draw_is_not_warned_of(tmp_path: Path, tiny_model_dir: Path) -> None:
    row = {"prompt": "Say \x0c 東京 \U0001f642", "completion": "\x07\u3042\U0001fae8"}
    data = str(write_rows(tmp_path / "d.jsonl", row, row))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        likely.train(model=str(tiny_model_dir), data=data, eval_data=data, output=str(tmp_path / "run"), steps=1)
    assert not [w for w in caught if "Glyph" in str(w.message)]


def test_what_cannot_be_seen_is_written_out() -> None:
    assert visible("a\n\x07\u200b") == "a\\n\\x07\\u200b"
    assert visible(" a") == "' a'"
    assert visible("東 \U0001f642") == "東 \U0001f642"


# --- verbs ---


@pytest.mark.parametrize(
    "output", [".", "", "folder", "missing/x.jsonl", "d.jsonl/x.jsonl", "x" * 300, "a\0b", "/dev/null"]
)
def test_score_to_a_place_that_cannot_be(typed: Typed, tmp_path: Path, tiny_model_dir: Path, output: str) -> None:
    write_rows(tmp_path / "d.jsonl", ROW)
    (tmp_path / "folder").mkdir()
    names = {p.name for p in tmp_path.iterdir()}
    said = typed("score", "d.jsonl", "--model", tiny_model_dir, "--output", output)
    assert (said.code, said.out) == (2, ""), said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == names


def test_score_writes_rows_without_weight_too(typed: Typed, tmp_path: Path, tiny_model_dir: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", SILENT, ROW)
    silent, row = likely.score(model=str(tiny_model_dir), data=str(data), base=str(tiny_model_dir))
    assert (silent["source"], silent["num_tokens"], silent["nll_nats"]) == (f"{data}:1", 0, 0)
    assert all(token["logprob"] < 0 for token in silent["tokens"][1:])
    assert row["num_tokens"] > 0
    said = typed("score", write_rows(tmp_path / "s.jsonl", SILENT), "--model", tiny_model_dir, "--output", "o")
    assert (said.code, said.err) == (0, "o: nothing has a weight over 0 tokens\n")


def test_version_and_debug_are_in_the_help(typed: Typed) -> None:
    assert typed("--version").out == f"likely {likely.__version__}\n"
    told = typed("--help").out
    assert "--version" in told
    assert "--debug" in told
    said = typed("--debug", "evaluate", "none.jsonl", "--model", "./none")
    assert said.code == 4
    assert "Traceback" in said.err
    assert said.err.splitlines()[-1].startswith("error: ./none: no such model")


def test_foreign_libraries_keep_quiet(typed: Typed, tmp_path: Path, tiny_model_dir: Path) -> None:
    """One line on stderr is ours alone, also before the first model is loaded: so in a new process first."""
    write_rows(tmp_path / "d.jsonl", ROW)
    odd = Path(shutil.copytree(tiny_model_dir, tmp_path / "odd"))
    config = json.loads((odd / "config.json").read_text(encoding="utf-8"))
    (odd / "config.json").write_text(json.dumps(config | {"model_type": "odd"}), encoding="utf-8")
    bad = Path(shutil.copytree(tiny_model_dir, tmp_path / "bad"))
    (bad / "tokenizer.json").write_text("{", encoding="utf-8")
    fresh = shell('"$@"', tmp_path, "evaluate", "d.jsonl", "--model", "odd")
    for name, said in (
        ("odd", Said(fresh.returncode, fresh.stdout, fresh.stderr)),
        ("bad", typed("evaluate", "d.jsonl", "--model", "bad")),
        ("likely-tests/none", typed("evaluate", "d.jsonl", "--model", "likely-tests/none")),
    ):
        assert (said.code, said.out) == (4, ""), said.err
        assert said.err.count("\n") == 1, said.err
        assert name in said.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "https://me:geheim@host/d.jsonl", "--model", "hf_" + "a" * 34],
        ["train", "--model", "https://me:geheim@host/m", "--data", "d", "--output", "o"],
        ["train", "--model", "m", "--data", "d", "--output", "o", "--tune", "hf_" + "a" * 34],
        ["train", "--model", "m", "--data", "d", "--output", "o", "--steps", "hf_" + "a" * 34],
    ],
)
def test_a_secret_is_not_repeated(typed: Typed, arguments: list[str]) -> None:
    said = typed(*arguments)
    assert said.code in {2, 3, 4}
    assert "geheim" not in said.err
    assert "hf_aaa" not in said.err


# --- what the figures are worth ---


def test_verdicts_say_how_little_they_rest_on(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_rows(tmp_path / "d.jsonl", ROW, ROW))
    one = str(write_rows(tmp_path / "one.jsonl", ROW))
    run = likely.train(model=str(tiny_model_dir), data=data, eval_data=data, output=str(tmp_path / "same"), steps=1)
    assert "So few examples" in run.verdict
    assert "The held-out data is the training data" in run.verdict
    told = capsys.readouterr().err
    assert told.count("is the training data itself") == 1
    run = likely.train(model=str(tiny_model_dir), data=data, eval_data=one, output=str(tmp_path / "one"), steps=1)
    assert run.verdict.startswith("One held-out example is too few")
    told = capsys.readouterr().err
    assert "nan" not in told
    assert "training data itself" not in told


def test_a_bar_in_a_terminal_comes_to_its_end() -> None:
    """A bar that redirects stderr to itself, while its console writes to stderr, would write for ever."""
    import pty

    program = (
        "from likely.training.log import Display\n"
        "display = Display()\n"
        "for item in display.track(range(3), 'reading', 3): display.say(f'row {item}')\n"
    )
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", program], stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
    text = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "row 2" in text
    assert "3/3" in text
