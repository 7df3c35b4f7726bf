"""A config.json that is not that of the weights is refused before torch is there; one that is, never."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import likely
from likely.errors import ModelError
from likely.model.decoder import KNOWN
from likely.model.place import find_model, read_context_length
from likely.model.untrusted import WEIGHTS, read_tensors
from likely.model.weight_shapes import FAMILIES, HARMLESS, check_shapes

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

SOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama, as many keys as queries": ("LlamaConfig", {"num_key_value_heads": None, "pad_token_id": -1}),
    "mistral": ("MistralConfig", {}),
    "mistral tied": ("MistralConfig", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2 with heads of its own": ("Qwen2Config", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3 with biases": ("Qwen3Config", {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
    "no layer": ("LlamaConfig", {"num_hidden_layers": 0}),
}
NUMBERS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "num_hidden_layers", "pad_token_id",
)  # fmt: skip
SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings")
UP = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Saved:
    """A model folder, whose config a test may change, and its config as it was."""

    folder: Path
    config: dict[str, Any]

    def change(self, **values: Any) -> Saved:
        changed = {key: value for key, value in (self.config | values).items() if value is not ...}
        (self.folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        return self

    def judge(self) -> None:
        """As ``likely check`` does, but for what :mod:`likely.model.untrusted` refuses by itself."""
        config = AutoConfig.from_pretrained(self.folder)
        check_shapes(config, read_tensors(self.folder))


def save(folder: Path, kind: str, **more: Any) -> Saved:
    config_class, arguments = SOUND[kind]
    network = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**SHAPE | arguments))
    network.save_pretrained(folder, **more)
    return Saved(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))


def rename(folder: Path, start: str, other: str | None) -> None:
    """Give the tensors that begin so another beginning; None takes them away."""
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if name.startswith(start)]:
        tensor = tensors.pop(name)
        if other is not None:
            tensors[other + name.removeprefix(start)] = tensor
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_the_classes_are_those_that_the_package_computes() -> None:
    assert {f"{transformers.CONFIG_MAPPING[key].__name__[:-6]}ForCausalLM" for key in FAMILIES} == KNOWN


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20kB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", SOUND)
def test_what_transformers_saved_is_sound(tmp_path: Path, kind: str, shards: dict[str, Any]) -> None:
    saved = save(tmp_path, kind, **shards)
    saved.judge()
    find_model(str(tmp_path))
    # It was compared at all: the same with a wider layer is refused.
    with pytest.raises(ModelError, match="asks for"):
        saved.change(vocab_size=SHAPE["vocab_size"] + 1).judge()


def changes(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key in NUMBERS:
        now = config.get(key) or 8
        for value in (now + 1, now // 2, 0, -now, 10**9, None, float(now), ...):
            if key != "num_hidden_layers" or (type(value) is int and value < 10):  # see untrusted.py
                yield {key: value}
    for key in SWITCHES:
        yield from ({key: value} for value in (True, False, ...))
    yield {"num_attention_heads": -4, "num_key_value_heads": -2, "head_dim": -8}
    yield {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    yield from ({"model_type": other} for other in FAMILIES)


def fits(folder: Path) -> bool:
    """Whether the network that transformers builds from a config takes the tensors of the folder."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    stored = {name: tensor.shape for name, tensor in read_tensors(folder).items()}
    if network.config.tie_word_embeddings and "lm_head.weight" not in stored:
        wanted.pop("lm_head.weight")
    return wanted == stored


@pytest.mark.parametrize("kind", ["llama tied", "llama with biases", "mistral", "qwen2", "qwen3 with biases"])
def test_what_is_refused_is_what_the_network_of_transformers_does_not_take(tmp_path: Path, kind: str) -> None:
    saved = save(tmp_path, kind)
    verdicts = {True: 0, False: 0}
    for change in changes(saved.config):
        try:
            config = AutoConfig.from_pretrained(saved.change(**change).folder)
        except Exception:  # noqa: S112 - refused already, as no config that can be read
            continue
        if config.model_type not in FAMILIES:  # Mistral's with a list of layers is another class
            continue
        try:
            taken = fits(tmp_path)
        except Exception:
            taken = False
        try:
            saved.judge()
            judged = True
        except ModelError:
            judged = False
        assert judged == taken, change
        verdicts[taken] += 1
    assert min(verdicts.values()) >= 5, verdicts


Q_PROJ = "model.layers.0.self_attn.q_proj.weight has shape [32, 32], and config.json asks for "
MISSING = "is missing in the files for the model of config.json, where "
MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "head_dim": ({"head_dim": 10**9}, Q_PROJ + "[num_attention_heads 4 x head_dim 1000000000, hidden_size 32]"),
    "below zero": ({"hidden_size": -32}, "hidden_size is -32"),
    "a layer more": ({"num_hidden_layers": 3}, MISSING + "num_hidden_layers is 3"),
    "a layer less": (
        {"num_hidden_layers": 1},
        "norm.weight has no place in the model of config.json, where num_hidden_layers is 1",
    ),
    "biases": ({"mlp_bias": True}, "gate_proj.bias " + MISSING + "mlp_bias is true"),
    "another class": ({"model_type": "qwen3"}, "q_norm.weight " + MISSING + 'model_type is "qwen3"'),
    "padding": ({"pad_token_id": 67}, "pad_token_id is 67, outside the vocabulary of 67"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_line_names_the_tensor_and_the_setting(tmp_path: Path, name: str) -> None:
    change, words = MESSAGES[name]
    saved = save(tmp_path, "llama").change(**change)
    with pytest.raises(ModelError) as caught:
        read_context_length(find_model(str(saved.folder)))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert words in str(caught.value)
    assert caught.value.exit_code == 4
    assert caught.value.way_out
    assert len(str(caught.value).splitlines()) == 1


def test_files_with_other_names_are_not_judged(tmp_path: Path) -> None:
    """Loading knows how to read some of them, and refuses the rest itself."""
    wrong = {"intermediate_size": 96}
    backbone = save(tmp_path / "backbone", "llama tied")
    rename(backbone.folder, "model.", "")
    backbone.change(**wrong).judge()
    fused = save(tmp_path / "fused", "llama")
    rename(fused.folder, UP, "model.layers.0.mlp.gate_up_proj.weight")
    fused.change(**wrong).judge()
    other = save(tmp_path / "other", "llama")
    other.change(model_type="gemma", **wrong).judge()
    with pytest.raises(ModelError, match="intermediate_size 96"):
        save(tmp_path / "plain", "llama").change(**wrong).judge()


def test_tensors_of_old_files_are_let_through(tmp_path: Path) -> None:
    saved = save(tmp_path, "llama")
    tensors = load_file(tmp_path / WEIGHTS) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert any(HARMLESS.search(name) for name in tensors)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    saved.judge()


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    saved = save(tmp_path, "llama")
    rename(saved.folder, UP, None)
    with pytest.raises(ModelError, match=rf"{UP} is missing in the files"):
        saved.judge()


def test_check_and_train_refuse_with_one_line(tmp_path: Path, tiny_model_dir: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    (tmp_path / "d.jsonl").write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": 10**9}), encoding="utf-8")
    lines = []
    for run in (
        lambda: likely.check(data=str(tmp_path / "d.jsonl"), model=str(folder), processes=1),
        lambda: likely.train(data=str(tmp_path / "d.jsonl"), model=str(folder), output=str(tmp_path / "run")),
    ):
        with pytest.raises(ModelError, match="head_dim 1000000000") as caught:
            run()
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert not (tmp_path / "run").exists()
