"""Coming over: files shaped like those in the trainers' example folders, what of them is carried, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from likely.config import Config, Launch, make_training
from likely.data.hub import is_hub_id
from likely.errors import ConfigError
from likely.migration.carry import TRAINERS, Carried, carry_over
from likely.migration.foreign import is_secret
from test_cli import Likely, assert_refused, likely

__all__ = ["likely"]  # the fixture

TRL = """\
# trl sft --config sft.yaml
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
eos_token: '<|im_end|>'
eval_strategy: steps
eval_steps: 100
use_peft: true
lora_r: 32
lora_alpha: 16
output_dir: Qwen2-0.5B-SFT
push_to_hub: true
hub_token: hf_abcdefghijklmnopqrstuvwxyz0123
report_to: [wandb, comet_ml]
my_own_key: 7
"""
AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
datasets:
  - path: cgato/SlimOrcaDedupCleaned
    type: chat_template
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
    shards: 10
val_set_size: 0.0
output_dir: ./outputs/out
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 2048
sample_packing: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 1
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
flash_attention: true
warmup_ratio: 0.1
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: <|end_of_text|>
"""
LLAMA_FACTORY = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 1024
max_samples: 1000
### output
output_dir: saves/llama3-8b/lora/sft
save_steps: 500
plot_loss: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
### eval
val_size: 0.1
"""
OPENAI = {
    "object": "fine_tuning.job",
    "id": "ftjob-abc123",
    "model": "gpt-4o-mini-2024-07-18",
    "created_at": 1721764800,
    "training_file": "file-abc123",
    "validation_file": "heldout.jsonl",
    "hyperparameters": {"n_epochs": "auto"},
    "method": {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 2, "learning_rate_multiplier": 1.8}},
    },
    "suffix": "tone",
    "seed": 42,
    "integrations": [{"type": "wandb", "wandb": {"project": "p"}}],
}
FILES = {"trl": TRL, "axolotl": AXOLOTL, "llamafactory": LLAMA_FACTORY, "openai": json.dumps(OPENAI, indent="\t")}


def carried(tmp_path: Path, trainer: Any, text: str) -> Carried:
    """What a file comes to; its YAML is what a training takes."""
    path = tmp_path / "theirs.yaml"
    path.write_text(text, encoding="utf-8")
    found = carry_over(trainer, path)
    loaded = yaml.safe_load(found.to_yaml())
    assert loaded == found.settings
    config, launch = make_training(loaded)
    assert isinstance(config, Config)
    assert isinstance(launch, Launch)
    return found


def told(found: Carried, key: str) -> str:
    """The only note about a key."""
    [note] = [note for note in found.notes if note.key == key]
    return str(note)


# --- TRL ---


def test_trl(tmp_path: Path) -> None:
    found = carried(tmp_path, "trl", TRL)
    assert found.settings == {
        "model": "Qwen/Qwen2.5-0.5B",
        "data": "trl-lib/Capybara",
        "eval_data": "trl-lib/Capybara:test",
        "output": "Qwen2-0.5B-SFT",
        "train_on": "assistant",
        "max_length": 1024,
        "on_too_long": "truncate_right",
        "batch_size": 16,
        "epochs": 1.0,
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "warmup": 0.0,
        "eval_every": 100,
        "track": "wandb",
        "tune": "lora",
        "lora_rank": 32,
        "lora_alpha": 16.0,
    }
    assert f"{tmp_path}/theirs.yaml:6: packing: true: differs" in told(found, "packing")
    assert "packed blocks" in told(found, "per_device_train_batch_size")
    assert "comet_ml" in told(found, "report_to")
    assert ":20: my_own_key: 7: no counterpart: not known" in told(found, "my_own_key")
    assert ":10: eos_token" in told(found, "eos_token")
    # Defaults of TRL that are not ours are told as well, of the file and no line of it.
    for key, words in (
        ("max_length", "1024"),
        ("assistant_only_loss", "every token"),
        ("lr_scheduler_type", "linear"),
        ("lora_dropout", "0.05"),
        ("lora_target_modules", "all linear"),
    ):
        assert told(found, key).startswith(f"{tmp_path}/theirs.yaml: {key} (not given): ")
        assert words in told(found, key)


def test_no_credential_is_copied_or_shown(tmp_path: Path) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyz0123"  # noqa: S105
    text = TRL.replace("Qwen2-0.5B-SFT", f"https://user:{secret}@host/out").replace(
        "my_own_key: 7", "wandb_api_key: k0123"
    )
    found = carried(tmp_path, "trl", text + f"note: {secret}\n")
    said = found.to_yaml() + "\n".join(map(str, found.notes))
    assert secret not in said
    assert "k0123" not in said
    assert found.settings["output"] == "CHANGE_ME"
    assert "set output without it" in told(found, "output_dir")
    assert "***" in told(found, "hub_token")
    assert not is_secret("eos_token")
    assert is_secret("hf_hub_token")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_credential_inside_of_a_value_is_shown(tmp_path: Path, trainer: Any) -> None:
    """Nested under a key that says what it is, in a mapping of environment variables, and cut in its middle."""
    long = "x" * 25
    values = {
        "mine": {"api_key": "k0123", "list": [{"password": "k0123"}]},
        "env": {"WANDB_API_KEY": "k0123"},
        "aws_access_key": "k0123",
        "basic_auth": "k0123",
        "cut": {"a": long, "b": "hf_abcdefghijklmnopqrstuvwxyz0123"},
        "hf_abcdefghijklmnopqrstuvwxyz0123": 1,
    }
    text = json.dumps({"datasets": []} | values if trainer == "axolotl" else values)
    said = "\n".join(map(str, carried(tmp_path, trainer, text).notes))
    assert "k0123" not in said
    assert "xyz0123" not in said
    assert "hf_" not in said
    assert all(key in said for key in ("mine", "env", "aws_access_key", "basic_auth", "cut"))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_character_of_a_file_steers_the_terminal_or_breaks_the_yaml(tmp_path: Path, trainer: Any) -> None:
    found = carried(tmp_path, trainer, '"\\e[31mred\\0": 1\n"two\\nlines": "\\a"\n"\\u2028": 2\nnull: 3\n')
    assert all(str(note).isprintable() for note in found.notes)
    assert yaml.safe_load(found.to_yaml()) == found.settings
    assert len(found.to_yaml().splitlines()) == len(found.notes) + len(found.settings)
    assert "null: 3: no counterpart" in told(found, "null")


def test_escaped_characters_of_json_are_whole(tmp_path: Path) -> None:
    found = carried(tmp_path, "openai", json.dumps({"training_file": "🙂.jsonl"}))
    assert found.settings["data"] == "🙂.jsonl"
    with pytest.raises(ConfigError, match="lone surrogate"):
        carried(tmp_path, "openai", '{"training_file": "\\ud83d"}')


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_seed_is_carried_to_its_last_digit_or_refused(tmp_path: Path, trainer: Any) -> None:
    assert carried(tmp_path, trainer, f'{{"seed": {2**53 + 1}}}').settings["seed"] == 2**53 + 1
    for wrong in ("1.5", "-1", "1" * 30, "true", str(2**64)):
        with pytest.raises(ConfigError, match="seed is"):
            carried(tmp_path, trainer, f'{{"seed": {wrong}}}')


@pytest.mark.parametrize(
    ("lines", "settings"),
    [
        ("assistant_only_loss: true", {"train_on": "assistant"}),
        ("completion_only_loss: false", {"train_on": "all"}),
        ("completion_only_loss: true", {"train_on": "assistant"}),
        ("max_length: null", {"max_length": None, "on_too_long": None}),
        ("max_length: 512\ntruncation_mode: keep_end", {"max_length": 512, "on_too_long": "truncate_left"}),
        ("max_seq_length: 256", {"max_length": 256}),
        ("max_steps: 200\nwarmup_steps: 20", {"steps": 200, "epochs": None, "warmup": 0.1}),
        ("max_steps: -1", {"steps": None, "epochs": 3.0}),
        ("warmup_steps: 0.03", {"warmup": 0.03}),
        ("warmup_ratio: 3e-2", {"warmup": 0.03}),
        ("warmup_steps: 50", {"warmup": None}),
        ("lr_scheduler_type: constant\nwarmup_ratio: 0.1", {"schedule": "constant", "warmup": 0.0}),
        ("lr_scheduler_type: constant_with_warmup\nwarmup_ratio: 0.1", {"schedule": "constant", "warmup": 0.1}),
        ("max_grad_norm: 0", {"max_grad_norm": 1e9}),
        ("bf16: false", {"dtype": "float32"}),
        ("bf16: true", {"dtype": "bfloat16"}),
        ("fp16: true", {"dtype": None}),
        ("use_peft: true\nload_in_4bit: true", {"tune": "qlora", "lora_rank": 16, "lora_alpha": 32.0}),
        ("lora_r: 8", {"tune": "full", "lora_rank": None}),
        ("save_strategy: steps\nsave_steps: 50\nsave_total_limit: 2", {"save_every": 50, "keep_checkpoints": 2}),
        ("save_strategy: epoch\nsave_steps: 50", {"save_every": None}),
        ("eval_strategy: steps", {"eval_every": 10, "eval_data": None}),
        ("dataset_name: org/name\ndataset_config: en\ndataset_train_split: sft", {"data": "org/name:en:sft"}),
        ("dataset_name: rows.jsonl\ndataset_text_field: body", {"data": "rows.jsonl", "columns": "text=body"}),
        (
            (
                "dataset_mixture:\n  datasets:\n    - id: org/a\n      config: default\n      split: train_sft\n"
                "    - id: org/b\n      config: en\n      weight: 0.5"
            ),
            {"data": "org/a:train_sft,org/b:en:train"},
        ),
        ("report_to: tensorboard\nseed: 3", {"track": "tensorboard", "seed": 3}),
        ("learning_rate: 1e-4", {"learning_rate": 1e-4}),
        ("output_dir: x", {"learning_rate": 2e-5, "batch_size": 8, "model": "CHANGE_ME"}),
    ],
)
def test_what_trl_means(tmp_path: Path, lines: str, settings: dict[str, Any]) -> None:
    eval_steps = "logging_steps: 10\n" if "eval_strategy" in lines else ""
    found = carried(tmp_path, "trl", f"{lines}\n{eval_steps}")
    assert {key: found.settings.get(key) for key in settings} == settings


def test_steps_of_warmup_without_a_number_of_steps_are_told(tmp_path: Path) -> None:
    assert "50 / the number of steps" in told(carried(tmp_path, "trl", "warmup_steps: 50\n"), "warmup_steps")


def test_all_of_transformers_own_arguments_are_known(tmp_path: Path) -> None:
    """A dump of TrainingArguments, as their to_json_string writes it: nothing in it is an unknown key."""
    from dataclasses import fields

    from transformers import TrainingArguments

    dump = {field.name: "steps" if field.name.endswith("_strategy") else 1 for field in fields(TrainingArguments)}
    dump |= {"output_dir": "x", "lr_scheduler_type": "linear", "optim": "adamw_torch", "report_to": "none"}
    dump |= dict.fromkeys(("bf16", "load_best_model_at_end"), True) | {"fp16": False, "warmup_steps": 0.5}
    dump |= {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    found = carried(tmp_path, "trl", json.dumps(dump, indent=1))
    assert [str(note) for note in found.notes if "not known" in note.text] == []


def test_a_mixture_says_what_is_held_out_and_taken(tmp_path: Path) -> None:
    parts = "  datasets:\n    - {id: o/a, weight: 1.0}\n    - {id: o/b, weight: 0.5, columns: [messages]}\n"
    found = carried(tmp_path, "trl", f"dataset_mixture:\n{parts}")
    assert "every row is trained on" in told(found, "eval_strategy")
    assert "that share of its rows" in told(found, "dataset_mixture.datasets.1.weight")
    assert "every row is looked at" in told(found, "dataset_mixture.datasets.1.columns")
    assert not [note for note in found.notes if note.key == "dataset_mixture.datasets.0.weight"]


# --- Axolotl ---


def test_axolotl(tmp_path: Path) -> None:
    found = carried(tmp_path, "axolotl", AXOLOTL)
    assert found.settings == {
        "model": "NousResearch/Llama-3.2-1B",
        "data": "cgato/SlimOrcaDedupCleaned",
        "format": "sharegpt",
        "eval_share": 0.0,
        "output": "./outputs/out",
        "max_length": 2048,
        "on_too_long": "drop",
        "train_on": "assistant",
        "batch_size": 4,
        "epochs": 4.0,
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "warmup": 0.1,
        "weight_decay": 0.0,
        "tune": "qlora",
        "lora_rank": 32,
        "lora_alpha": 16.0,
    }
    assert "adamw_bnb_8bit is not there" in told(found, "optimizer")
    assert ":10: datasets.0.shards: 10: no counterpart" in told(found, "datasets.0.shards")
    assert ":16: lora_dropout" in told(found, "lora_dropout")
    assert "left out there" in told(found, "excess_length_strategy")
    assert "rows / batch_size / 1" in told(found, "saves_per_epoch")
    assert "no counterpart" in told(found, "special_tokens")
    assert "packed blocks" in told(found, "micro_batch_size")
    assert not [note for note in found.notes if note.key == "wandb_project"]  # given and empty is not given


@pytest.mark.parametrize(
    ("lines", "settings"),
    [
        ("num_epochs: 2", {"tune": "full", "epochs": 2.0, "max_length": 512, "warmup": 0.03, "on_too_long": "drop"}),
        ("excess_length_strategy: raise", {"on_too_long": "error"}),
        ("excess_length_strategy: truncate", {"on_too_long": "truncate_right"}),
        ("train_on_inputs: true", {"train_on": "all"}),
        ("batch_size: 32\nmicro_batch_size: 4", {"batch_size": 32}),
        ("max_steps: 100\nwarmup_steps: 10", {"steps": 100, "warmup": 0.1}),
        ("max_steps: 50\nwarmup_steps: 0.1", {"steps": 50, "warmup": 0.1}),
        ("warmup_steps: 0.2", {"warmup": 0.2}),
        (
            "datasets:\n  - {path: a.jsonl, type: completion, field: body}\n  - {path: b.jsonl, type: completion}",
            {"data": "a.jsonl,b.jsonl", "format": "text", "columns": None},
        ),
        (
            "datasets:\n  - {path: org/name, data_files: [in/a.json]}\n  - {path: 's3://bucket/b.jsonl'}",
            {"data": "CHANGE_ME,CHANGE_ME"},
        ),
        (
            "datasets: [{path: a.jsonl, type: chat_template, message_field_role: from, field_messages: conversations}]",
            {"data": "a.jsonl", "format": "sharegpt", "columns": None},
        ),
        ("val_set_size: 0.05\neval_steps: 20\nearly_stopping_patience: 3", {"eval_share": 0.05, "patience": 3}),
        ("val_set_size: 0.0\neval_steps: 20", {"eval_share": 0.0, "eval_every": None}),
        ("wandb_project: p\nuse_tensorboard: true", {"track": "wandb,tensorboard"}),
        ("adapter: lora\nlora_r: 8", {"tune": "lora", "lora_rank": 8, "lora_alpha": 8.0}),
        (
            "datasets:\n  - path: json\n    data_files: [a.jsonl, b.jsonl]\n    type: alpaca",
            {"data": "a.jsonl,b.jsonl", "format": "alpaca"},
        ),
        (
            "datasets:\n  - path: org/name\n    name: en\n    split: train[:1%]\n    type: completion\n    field: body",
            {"data": "org/name:en:train", "format": "text", "columns": "text=body"},
        ),
        (
            (
                "datasets:\n  - path: a.jsonl\n    type: chat_template\n"
                "test_datasets:\n  - path: b.jsonl\n    type: chat_template\nval_set_size: 0.1"
            ),
            {"data": "a.jsonl", "eval_data": "b.jsonl", "eval_share": None, "format": "messages"},
        ),
    ],
)
def test_what_axolotl_means(tmp_path: Path, lines: str, settings: dict[str, Any]) -> None:
    found = carried(tmp_path, "axolotl", f"base_model: m\nlearning_rate: 1e-4\n{lines}\n")
    assert {key: found.settings.get(key) for key in settings} == settings


# --- LLaMA-Factory ---


def test_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    info = {"identity": {"file_name": "identity.json"}, "alpaca_en_demo": {"hf_hub_url": "org/demo", "subset": "en"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    found = carried(tmp_path, "llamafactory", LLAMA_FACTORY)
    assert found.settings == {
        "model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "data": f"{tmp_path}/data/identity.json,org/demo:en:train",
        "eval_share": 0.1,
        "output": "saves/llama3-8b/lora/sft",
        "train_on": "assistant",
        "max_length": 1024,
        "batch_size": 8,
        "epochs": 3.0,
        "learning_rate": 1e-4,
        "schedule": "cosine",
        "warmup": 0.1,
        "dtype": "bfloat16",
        "save_every": 500,
        "tune": "lora",
        "lora_rank": 8,
        "lora_alpha": 16.0,
    }
    assert "share of both prompt and answer" in told(found, "cutoff_len")
    assert ":8: lora_target" in told(found, "lora_target")
    assert "all rows are used" in told(found, "max_samples")
    assert "never run" in told(found, "trust_remote_code")
    assert "chat template" in told(found, "template")


def test_names_of_data_that_cannot_be_found_are_told(tmp_path: Path) -> None:
    found = carried(tmp_path, "llamafactory", "dataset: identity\nmodel_name_or_path: m\n")
    assert found.settings["data"] == "CHANGE_ME"
    assert "dataset_info.json" in told(found, "dataset")


@pytest.mark.parametrize(
    ("lines", "settings"),
    [
        ("output_dir: x", {"learning_rate": 5e-5, "lora_rank": 8, "lora_alpha": 16.0, "max_length": 2048}),
        ("train_on_prompt: true", {"train_on": "all"}),
        ("mask_history: true", {"train_on": "last_assistant"}),
        ("stage: pt", {"train_on": "all"}),
        ("do_train: true\ndo_predict: true", {"train_on": "assistant"}),
        ("finetuning_type: full", {"tune": "full", "lora_rank": None}),
        ("quantization_bit: 4", {"tune": "qlora"}),
        ("report_to: [mlflow]", {"track": "mlflow"}),
    ],
)
def test_what_llama_factory_means(tmp_path: Path, lines: str, settings: dict[str, Any]) -> None:
    found = carried(tmp_path, "llamafactory", f"{lines}\n")
    assert {key: found.settings.get(key) for key in settings} == settings


# --- OpenAI ---


def test_openai(tmp_path: Path) -> None:
    found = carried(tmp_path, "openai", FILES["openai"])
    assert found.settings == {
        "model": "CHANGE_ME",
        "data": "CHANGE_ME",
        "eval_data": "heldout.jsonl",
        "output": "runs/tone",
        "format": "messages",
        "train_on": "assistant",
        "epochs": 4.0,
        "batch_size": 2,
        "seed": 42,
        "track": "wandb",
    }
    assert "keeps to itself" in told(found, "method.supervised.hyperparameters.learning_rate_multiplier")
    assert "/v1/files/file-abc123/content" in told(found, "training_file")
    assert "not needed" in told(found, "created_at")


def test_what_the_server_chooses_is_told(tmp_path: Path) -> None:
    found = carried(tmp_path, "openai", '{"training_file": "a.jsonl", "hyperparameters": {"n_epochs": "auto"}}')
    assert "epochs" not in found.settings
    assert found.settings["data"] == "a.jsonl"
    assert "chosen by the server" in told(found, "hyperparameters.n_epochs")


def test_all_of_a_method_is_told(tmp_path: Path) -> None:
    inner = {"hyperparameters": {"n_epochs": 2}, "made_up": 1}
    job = {"method": {"type": "supervised", "supervised": inner, "other": 1}, "hyperparameters": {"n_epochs": 3}}
    found = carried(tmp_path, "openai", json.dumps(job))
    assert found.settings["epochs"] == 2.0
    assert "no counterpart" in told(found, "method.other")
    assert "no counterpart" in told(found, "method.supervised.made_up")
    assert "goes before it" in told(found, "hyperparameters.n_epochs")
    for wrong in ('{"method": {"supervised": 1}}', '{"hyperparameters": [1]}'):
        with pytest.raises(ConfigError, match="write a mapping"):
            carried(tmp_path, "openai", wrong)


# --- all ---


@pytest.mark.parametrize(
    ("trainer", "text", "data"),
    [  # a version in a name is no file's ending; a slice of a split has no name here
        ("trl", "dataset_name: org/airoboros-3.2\ndataset_train_split: train_sft\n", "org/airoboros-3.2:train_sft"),
        ("trl", "dataset_mixture:\n  datasets:\n    - {id: org/a-3.2, split: test_sft}\n", "org/a-3.2:test_sft"),
        ("trl", "dataset_name: org/a\ndataset_train_split: train[:10%]\n", "org/a"),
        ("trl", "datasets:\n  - {path: org/a, name: en, split: 'train[10:20]+test'}\n", "org/a:en:train"),
        ("axolotl", "datasets:\n  - {path: org/a-0.5, split: 'train_sft[:1%]'}\n", "org/a-0.5:train_sft"),
        ("axolotl", "datasets:\n  - {path: org/a, name: default}\n", "org/a"),
        ("axolotl", "datasets:\n  - {path: data/rows.csv, split: train}\n", "data/rows.csv"),
    ],
)
def test_names_of_data_sets_are_those_that_training_reads(tmp_path: Path, trainer: Any, text: str, data: str) -> None:
    found = carried(tmp_path, trainer, text)
    assert found.settings["data"] == data
    assert is_hub_id(data) or data.endswith(".csv")
    told_of = [note for note in found.notes if "a part of a split can't be named" in note.text]
    assert len(told_of) == ("[" in text)


@pytest.mark.parametrize(
    ("trainer", "line", "words"),
    [
        ("axolotl", "max_packed_sequence_len:", "not needed: nothing is set"),
        ("axolotl", 'evaluation_strategy: "no"', "held-out rows are scored before and after"),
        ("axolotl", "eaft_alpha: 1.0", "another objective"),
        ("axolotl", "skip_prepare_dataset: true", "rows are text"),
        ("axolotl", "evals_per_epoch: 0", "nothing is evaluated on the way"),
        ("axolotl", "tensor_parallel_size: 2", "one row is computed on one device"),
        ("axolotl", "dp_shard_size: 2", "several devices"),
        ("axolotl", "shuffle_merged_datasets: false", "no counterpart: rows are shuffled anew"),
        ("axolotl", "shuffle_merged_datasets: true", "not needed: rows are shuffled anew"),
        ("axolotl", "qat: {group_size: 32}", "not rounded"),
        ("trl", "dataset_mixer: {a/b: 1.0}", "name the data sets in data"),
        ("llamafactory", "use_muon: true", "AdamW is the only optimizer"),
        ("llamafactory", "use_dora: true", "plain LoRA takes its place"),
        ("llamafactory", "enable_thinking: false", "thoughts are written by"),
        ("llamafactory", "fp8: true", "float32 or bfloat16"),
        ("llamafactory", "freeze_trainable_layers: 2", "all weights are trained"),
        ("llamafactory", "oft_block_size: 32", "plain LoRA takes its place"),
        ("llamafactory", "badam_switch_interval: 50", "AdamW is the only optimizer"),
        ("llamafactory", "sequence_parallel_size: 4", "one row is computed on one device"),
        ("llamafactory", "disable_gradient_checkpointing: true", "not needed"),
        ("llamafactory", "use_v1_kernels: true", "not needed"),
    ],
)
def test_keys_of_their_examples_are_known(tmp_path: Path, trainer: Any, line: str, words: str) -> None:
    assert words in told(carried(tmp_path, trainer, line + "\n"), line.partition(":")[0])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_key_is_accounted_for(tmp_path: Path, trainer: Any) -> None:
    """Nothing is dropped: a made-up key and every key of a file are carried, told, or empty."""
    text = FILES[trainer]
    text = (
        text.replace('{\n\t"object"', '{\n\t"made_up": 1,\n\t"object"')
        if trainer == "openai"
        else text + "made_up: 1\n"
    )
    found = carried(tmp_path, trainer, text)
    assert "no counterpart: not known" in told(found, "made_up")
    places = [int(note.place.rpartition(":")[2]) for note in found.notes if note.value]
    assert places == sorted(places)
    lines = text.splitlines()
    for note in found.notes:
        if note.value:
            line = lines[int(note.place.rpartition(":")[2]) - 1]
            assert note.key.rpartition(".")[2] in line, (note, line)


@pytest.mark.parametrize(
    ("trainer", "text", "words"),
    [
        ("axolotl", "base_model: m\nrl: dpo\n", ":2: rl is dpo"),
        ("llamafactory", "stage: dpo\n", ":1: stage is dpo"),
        ("openai", '{"method": {"type": "dpo"}}', "only supervised"),
        ("openai", '{"object": "list", "data": []}', "one fine_tuning.job"),
        ("trl", "beta: 0.1\n", ":1: beta is 0.1; it is none of SFTConfig's"),
        ("trl", "num_generations: 7\n", "it is none of SFTConfig's"),
        ("axolotl", "gkd_trainer: true\n", "only supervised"),
        ("axolotl", "model_type: AutoModelForSequenceClassification\n", "causal"),
        ("axolotl", "datasets: [{path: json, data_files: {train: a}}]\n", ":1: datasets.0.data_files"),
        ("llamafactory", "stage: sft\ndo_predict: true\n", ":2: do_predict is true; nothing is trained there"),
        ("trl", "learning_rate: fast\n", ":1: learning_rate is fast"),
        ("trl", "max_steps: 1.5\n", ":1: max_steps is 1.5"),
        ("trl", "packing: perhaps\n", "true or false"),
        ("trl", "a: [1\n", "broken YAML"),
        ("trl", '{"a": }', "broken JSON"),
        ("trl", "- a\n", "not a mapping"),
        ("axolotl", "datasets: rows.jsonl\n", "list of mappings"),
        ("trl", "learning_rate: 0\n", "learning_rate is 0.0"),
        ("trl", "model_name_or_path: [a]\n", "write a text"),
    ],
)
def test_what_is_wrong_is_one_line(likely: Likely, tmp_path: Path, trainer: str, text: str, words: str) -> None:
    (tmp_path / "theirs.yaml").write_text(text, encoding="utf-8")
    assert_refused(likely("init", "--from", trainer, "theirs.yaml"), 2, "theirs.yaml", words)


def test_the_verb(likely: Likely, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(TRL, encoding="utf-8")
    said = likely("init", "--from", "trl", "theirs.yaml")
    assert said.code == 0, said.err
    assert make_training(yaml.safe_load(said.out))[0].lora_rank == 32
    assert "theirs.yaml:6: packing: true: differs: " in said.err
    assert "# theirs.yaml:6: packing: true: differs: " in said.out
    assert "settings; " in said.err.splitlines()[-1]
    assert_refused(likely("init", "--from", "trl"), 2, "go together")
    assert_refused(likely("init", "theirs.yaml"), 2, "go together")
    assert_refused(likely("init", "--from", "other", "theirs.yaml"), 2, "go together")
    assert_refused(likely("init", "--from", "trl", "missing.yaml"), 2, "missing.yaml")


def test_a_file_read_by_the_config_is_no_other_trainers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        carried(tmp_path, "trl", "a: 1\n" * 60_000)
