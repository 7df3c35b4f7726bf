"""LLaMA-Factory: the YAML of ``llamafactory-cli train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from likely.errors import ConfigError
from likely.migration.foreign import Foreign
from likely.migration.huggingface import BY_PREFIX as PREFIX_ANYWHERE
from likely.migration.huggingface import MEMORY_OR_SPEED, carry_lora, read_training_arguments

CUTOFF = 2048  # where nothing is said
NO_LORA_VARIANT = "plain LoRA takes its place"
OF_MEMORY = [
    "preprocessing_batch_size", "use_unsloth", "enable_liger_kernel", "use_unsloth_gc", "pure_bf16", "upcast_layernorm",
    "buffer_size", "disable_gradient_checkpointing", "use_reentrant_gc", "use_v1_kernels", "use_kv_cache",
    "offload_folder", "use_fast_tokenizer", "print_param_status", "data_shared_file_system", "attn",
]  # fmt: skip
LACKING = {
    "adapter_name_or_path": "name a run folder or an adapter's folder as model to go on with it",
    "tool_format": "tool calls are written by the tokenizer's chat template",
    "max_samples": "all rows are used; make a file of the rows that are meant",
    "streaming": "rows are read in a stream and kept rendered in a cache",
    "mix_strategy": "name shares as data: a.jsonl:0.7,b.jsonl:0.3",
    "interleave_probs": "name shares as data: a.jsonl:0.7,b.jsonl:0.3",
    "media_dir": "rows are text",
    "tokenized_path": "rendered rows are kept in a cache, under a hash of all that made them",
    "use_dora": NO_LORA_VARIANT,
    "use_rslora": "plain LoRA takes its place; set lora_alpha to alpha x the square root of the rank",
    "pissa_init": NO_LORA_VARIANT,
    "loraplus_lr_ratio": NO_LORA_VARIANT,
    "additional_target": "modules beside the adapters are not trained; tune full trains all",
    "create_new_adapter": NO_LORA_VARIANT,
    "use_galore": "AdamW is the only optimizer",
    "use_apollo": "AdamW is the only optimizer",
    "use_badam": "AdamW is the only optimizer",
    "use_muon": "AdamW is the only optimizer",
    "use_adam_mini": "AdamW is the only optimizer",
    "use_dft_loss": "another objective than the likelihood",
    "use_asft_loss": "another objective than the likelihood",
    "use_eaft_loss": "another objective than the likelihood",
    "use_llama_pro": "layers are not added",
    "rope_scaling": "positions are those of the model's own configuration",
    "shift_attn": "attention is the model's own",
    "mixture_of_depths": "layers are the model's own",
    "resize_vocab": "the vocabulary is not changed",
    "add_tokens": "the vocabulary is not changed",
    "add_special_tokens": "the vocabulary is not changed",
    "init_special_tokens": "the vocabulary is not changed",
    "new_special_tokens_config": "the vocabulary is not changed",
    "predict_with_generate": "likely evaluate --generate answers held-out prompts",
    "compute_accuracy": "likely evaluate tells accuracy and more",
    "eval_on_each_dataset": "likely evaluate tells slices by file",
    "use_swanlab": "no such tracker; --track names those there are",
    "swanlab_api_key": "no credential is copied",
    "model_revision": "name a local folder with that revision",
    "hf_hub_token": "no credential is copied; the hub library reads its own",
    "ms_hub_token": "no credential is copied",
    "quantization_method": "tune qlora says how the base is held",
    "ray_run_name": "a training is one command on one machine",
    "module_dropout": "adapters have no dropout here",
}
ON_UNLESS_TOLD = {
    "enable_thinking": "thoughts are written by the tokenizer's chat template",
    "ignore_pad_token_for_loss": "there is no padding",
    "double_quantization": "tune qlora says how the base is held",
}
BY_PREFIX = {
    "apollo_": "AdamW is the only optimizer",
    "badam_": "AdamW is the only optimizer",
    "galore_": "AdamW is the only optimizer",
    "asft_": "another objective than the likelihood",
    "eaft_": "another objective than the likelihood",
    "oft_": NO_LORA_VARIANT,
    "pissa_": NO_LORA_VARIANT,
    "loraplus_": NO_LORA_VARIANT,
    "sequence_parallel_": "one row is computed on one device",
    "alst_": "one row is computed on one device",
    "swanlab_": "no such tracker; --track names those there are",
    "image_": "rows are text",
    "video_": "rows are text",
    "audio_": "rows are text",
    "export_": "likely export writes a model for other tools",
    "freeze_": "all weights are trained, or adapters",
    "fp8": "products are float32 or bfloat16",
    "infer_": "likely chat and likely evaluate --generate answer",
    "vllm_": "likely chat and likely evaluate --generate answer",
    "sglang_": "likely chat and likely evaluate --generate answer",
}


def read(job: Foreign) -> None:
    """Fill the settings of a job; see :mod:`likely.migration.foreign`."""
    stage = job.text("stage", "sft")
    if stage not in {"sft", "pt"}:
        raise job.wrong("stage", "only supervised fine-tuning (sft) and training on text (pt) can be carried over")
    _what_is_done(job)
    job.carry("model", job.text("model_name_or_path", "CHANGE_ME"), "model_name_or_path")
    _data(job)
    job.carry("output", job.text("output_dir", "CHANGE_ME"), "output_dir")
    _loss(job)
    job.carry("max_length", job.count("cutoff_len", CUTOFF))
    told = "" if job.line("cutoff_len") else f"{CUTOFF} there unless told otherwise; "
    job.differs(
        "cutoff_len",
        f"{told}longer rows lose a share of both prompt and answer there, and stop the run here; see on_too_long",
    )
    packing = job.switch("packing", default=stage == "pt") or job.switch("neat_packing")
    batch = "packed blocks of cutoff_len tokens there, each of several rows, and rows here" if packing else None
    read_training_arguments(job, learning_rate=5e-5, **({"batch": batch} if batch else {}))
    if packing and not job.switch("neat_packing"):
        job.differs("packing", "rows of a block see each other there, and never here")
    job.not_needed(["packing", "neat_packing"] if not packing else ["neat_packing"], MEMORY_OR_SPEED)
    _tuning(job)
    if job.text("template") is not None:
        job.differs("template", "a template of its own there; here the chat template that the tokenizer brings is used")
    job.not_needed(OF_MEMORY, MEMORY_OR_SPEED)
    lacking = job.beginning(PREFIX_ANYWHERE | BY_PREFIX) | LACKING
    job.without_counterpart(lacking, off=(False, 0, "none", "no", "concat", "main", "bnb"))
    job.without_counterpart(ON_UNLESS_TOLD, off=(True,))


def _what_is_done(job: Foreign) -> None:
    """Their command does what these keys say, ours trains."""
    if job.switch("do_train"):
        return
    for key, verb in (("do_predict", "evaluate --generate"), ("do_eval", "evaluate")):
        if job.switch(key):
            raise job.wrong(key, f"nothing is trained there without do_train: likely {verb} looks at a model")
    job.differs("do_train", "nothing is trained there without it, and likely train trains")


def _loss(job: Foreign) -> None:
    if job.text("stage") == "pt":
        job.carry("train_on", "all")
        job.differs("stage", "every token is trained there; rows of text are, here as well")
    elif job.switch("train_on_prompt"):
        job.carry("train_on", "all")
        job.differs("train_on_prompt", "all tokens of a conversation are trained, those of the template too")
    else:
        job.carry("train_on", "last_assistant" if job.switch("mask_history") else "assistant")
    job.not_needed(["train_on_prompt"] if not job.switch("train_on_prompt") else [], "only answers are trained")
    job.value("mask_history")


def _tuning(job: Foreign) -> None:
    kind = job.text("finetuning_type", "lora")
    if kind not in {"lora", "full"}:
        job.lacks("finetuning_type", f"{kind} is not there; lora takes its place")
    if kind == "full":
        job.carry("tune", "full")
        job.not_needed(["lora_rank", "lora_alpha", "lora_dropout", "lora_target"], "all weights are trained")
        return
    bits = job.count("quantization_bit")
    job.carry("tune", "qlora" if bits == 4 else "lora")
    if bits not in (None, 4):
        job.lacks("quantization_bit", "the base is held in four bits or as it is")
    rank = job.count("lora_rank", 8) or 8
    carry_lora(job, rank, job.number("lora_alpha") or 2 * rank, "lora_dropout", job.number("lora_dropout", 0.0) or 0.0)
    if job.text("lora_target", "all") != "all":
        job.differs("lora_target", "adapters stand on all linear layers here")


def _data(job: Foreign) -> None:
    known = _known_datasets(job)
    names = _names(job.value("dataset"))
    parts = [_data_of(job, name, known) for name in names]
    job.carry("data", ",".join(parts) if parts else "CHANGE_ME", "dataset")
    if not parts:
        job.differs("dataset", "nothing names the data: set data to a file or a data set of the hub")
    held_out, share = _names(job.value("eval_dataset")), job.number("val_size", 0.0) or 0.0
    if held_out:
        job.carry(
            "eval_data", ",".join(_data_of(job, name, known, "eval_dataset") for name in held_out), "eval_dataset"
        )
    elif 0 < share < 1:
        job.carry("eval_share", share)
        job.differs("val_size", "families of like rows stay together on one side of the split here")
    elif share:
        job.differs("val_size", "a number of rows there; eval_share is a share of them")
    else:
        job.differs("val_size", "there every row is trained on; here a share is held out, unless eval_share is 0")


def _names(value: Any) -> list[str]:
    parts = value if isinstance(value, list) else str(value).split(",") if value is not None else []
    return [str(part).strip() for part in parts if str(part).strip()]


def _known_datasets(job: Foreign) -> dict[str, Any]:
    """What ``dataset_info.json`` says, where it is found; nothing where it isn't."""
    folder = Path(str(job.value("dataset_dir", "data")))
    for place in (folder, job.path.parent / folder):
        try:
            with (place / "dataset_info.json").open("rb") as file:
                known = json.loads(file.read(1 << 24))
        except OSError:
            continue
        except (ValueError, RecursionError) as error:
            where = str(place / "dataset_info.json")
            raise ConfigError(f"broken JSON: {error}", place=where, way_out="mend it") from error
        return {"": place, **known} if isinstance(known, dict) else {}
    return {}


def _data_of(job: Foreign, name: str, known: dict[str, Any], key: str = "dataset") -> str:
    """The file or the hub's name behind a registered name."""
    about = known.get(name)
    if not isinstance(about, dict):
        reason = f"{name} is a name in dataset_info.json, which was not found" if not known else f"{name} is not in it"
        job.differs(key, f"{reason}; set data to its file or to its name on the hub")
        return "CHANGE_ME"
    columns = about.get("columns")
    if columns or about.get("tags"):
        job.differs(key, f"dataset_info.json maps the columns of {name}; say so with columns where rows are refused")
    if isinstance(about.get("file_name"), str):
        return str(known[""] / about["file_name"])
    if isinstance(about.get("hf_hub_url"), str):
        parts = [about["hf_hub_url"], about.get("subset"), about.get("split", "train")]
        return ":".join(str(part) for part in parts if part) if parts[1] or parts[2] != "train" else str(parts[0])
    job.lacks(key, f"{name} is neither a file nor a data set of the hub")
    return "CHANGE_ME"
