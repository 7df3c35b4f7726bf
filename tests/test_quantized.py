"""Adapters on a base in four bits: what is trained, scored, saved and loaded again is the same model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import likely
import naive
from likely.data.packing import build_packs
from likely.errors import ConfigError
from likely.model import load, quantized
from likely.model.place import find_model
from likely.training.objective import nll_sum
from likely.types import Example, Source
from test_cli import write_rows

pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
# A stem, branches inside a chain and at its end, duplicates and weights.
FAMILY: list[naive.Row] = [
    ([5, 9, 3, 7, 2, 8, 11, 4, 6], [0, 0, 0, 1, 1, 1, 0, 1, 1]),
    ([5, 9, 3, 7, 2, 33, 12, 13], [0, 0, 0, 0, 0, 1, 1, 0.5]),
    ([5, 9, 3, 7, 2, 8, 11, 40], [0, 0, 0, 0, 0, 0, 0, 2]),
    ([5, 9, 3, 7, 2, 8, 11, 40], [0, 0, 0, 0, 0, 0, 0, 2]),
    ([50, 51, 52, 53], [0, 1, 1, 1]),
]
PAIRS = [("Capital of France?", "Paris."), ("And of Spain?", "Madrid."), ("Say hi.", "Hi there!"), ("2 + 2?", "4")]


@pytest.fixture(scope="module")
def plain_model(chat_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its rows hold a whole block of 64 numbers, which share one scale."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(plain_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("quantized")
    data = write_rows(folder / "d.jsonl", *[{"prompt": q, "completion": a} for q, a in PAIRS])
    run = likely.train(
        model=str(plain_model), data=str(data), eval_data=str(data), output=str(folder / "run"), tune="qlora",
        steps=12, batch_size=2, learning_rate=0.03, dtype="float32",
    )  # fmt: skip
    return run, data


def test_the_report_tells_of_the_model_that_is_loaded_again(trained: Any, plain_model: Path) -> None:
    run, data = trained
    found = likely.evaluate(model=str(run.folder), data=str(data))
    assert found["nll"] == pytest.approx(run.report["tuned"]["nll"], abs=1e-6)
    assert run.report["tuned"]["nll"] < run.report["base"]["nll"] - 0.5
    # The scored base is the quantised one, not that of the files.
    plain = likely.evaluate(model=str(plain_model), data=str(data))
    assert abs(run.report["base"]["nll"] - plain["nll"]) > 1e-4
    assert "on a base in four bits" in run.report["facts"]["trained"]
    identity = json.loads((run.folder / "model" / "likely.json").read_text(encoding="utf-8"))
    assert identity["quantization"] == "nf4"
    origins = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    whole = sum(p.numel() for p in load.load_model(str(plain_model)).network.parameters())
    assert origins["num_parameters"] == whole + origins["num_trainable"]


def test_the_code_of_the_card_loads_the_model_that_was_judged(trained: Any, plain_model: Path) -> None:
    run, data = trained
    [code] = re.findall(r"```python\n(.*?)```", (run.folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    if not (run.folder / "base").exists():
        (run.folder / "base").symlink_to(plain_model)
    scored = next(iter(likely.score(model=str(run.folder), data=str(data))))
    ids = [token["id"] for token in scored["tokens"]]
    lines = [
        "import os",
        f"os.chdir({str(run.folder)!r})",
        code.replace("max_new_tokens=64", "max_new_tokens=2"),
        f"ids = torch.tensor([{ids}])",
        "logits = model(input_ids=ids).logits[0, :-1].double()",
        "print(*torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0].tolist())",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [float(word) for word in done.stdout.split("\n")[-2].split()]
    wanted = [token["logprob"] for token in scored["tokens"][1:]]
    # bitsandbytes rounds its products to bfloat16 on some processors; the base of the files is further away.
    assert np.abs(np.subtract(found, wanted)).mean() < 0.08


@pytest.mark.parametrize("whose", ["ours", "transformers'"])
def test_likelihood_and_gradient_are_those_of_the_weights_that_four_bits_hold(plain_model: Path, whose: str) -> None:
    import bitsandbytes

    tuning = load.Tuning(lora_rank=4, quantized=True)
    model = load.load_for_training(str(plain_model), tuning, compute_dtype=torch.float32)
    assert model.decoder is not None
    if whose != "ours":
        model.decoder = None
    reference = load.load_for_training(str(plain_model), load.Tuning(lora_rank=4), compute_dtype=torch.float32)
    ours, theirs = dict(model.network.named_parameters()), dict(reference.network.named_parameters())
    assert quantized.is_quantized(model.network)
    assert not quantized.is_quantized(reference.network)
    num_narrow = 0
    with torch.no_grad():
        for name, parameter in ours.items():
            state = getattr(parameter, "quant_state", None)
            num_narrow += state is not None
            values = parameter if state is None else bitsandbytes.functional.dequantize_4bit(parameter.data, state)
            assert theirs[name].shape == values.shape
            assert quantized.shape_of(parameter) == values.shape
            theirs[name].copy_(values)
            if parameter.requires_grad and "lora_B" in name:  # or the first factor has no gradient
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.copy_(drawn)
                theirs[name].copy_(drawn)
    assert num_narrow == sum(name.endswith("base_layer.weight") for name in ours) > 0
    with reference.as_transformers_runs_it() as network:
        expected = naive.truth(network, FAMILY)
    loss = torch.zeros((), dtype=torch.float64)
    for pack in build_packs([example_of(row) for row in FAMILY], 10_000, share=model.shares):
        part = nll_sum(model, pack)
        part.backward()
        loss += part.detach()
    assert float(loss) == pytest.approx(expected.nll, rel=1e-5)
    for name, parameter in ours.items():
        wanted = expected.gradient[name]
        assert (parameter.grad is None) == (wanted is None) == (not parameter.requires_grad)
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5 * float(wanted.norm()))


def example_of(row: naive.Row) -> Example:
    token_ids, weights = row
    return Example(np.array(token_ids), np.array(weights, float), np.zeros(len(token_ids), np.int8), Source("a", 1))


def test_an_adapter_goes_on_as_it_began(trained: Any, tmp_path: Path, plain_model: Path) -> None:
    run, data = trained
    settings = {"model": str(run.folder), "data": str(data), "steps": 1, "batch_size": 2, "dtype": "float32"}
    with pytest.raises(ConfigError, match="tune is lora, and the adapter to go on with was trained with qlora"):
        likely.train(**settings, output=str(tmp_path / "a"))
    again = likely.train(**settings, output=str(tmp_path / "b"), tune="qlora", eval_data=str(data))
    assert again.report["base"]["nll"] == pytest.approx(run.report["tuned"]["nll"], abs=1e-6)
    assert load.trained_on_nf4(find_model(str(tmp_path / "b")))
    plain = likely.train(**settings | {"model": str(plain_model)}, output=str(tmp_path / "c"))
    with pytest.raises(ConfigError, match="tune is qlora, and the adapter to go on with was trained with lora"):
        likely.train(**settings | {"model": str(plain.folder)}, output=str(tmp_path / "d"), tune="qlora")


def test_without_the_extra_it_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plain_model: Path) -> None:
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda _: None)
    data = write_rows(tmp_path / "d.jsonl", *[{"prompt": q, "completion": a} for q, a in PAIRS])
    with pytest.raises(ConfigError, match=r"needs bitsandbytes; pip install 'likely\[qlora\]'"):
        likely.train(model=str(plain_model), data=str(data), output=str(tmp_path / "run"), tune="qlora", steps=1)
