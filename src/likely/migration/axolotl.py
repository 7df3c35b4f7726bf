"""Axolotl: the YAML of ``axolotl train``."""

from __future__ import annotations

from likely.migration.axolotl_data import read_data
from likely.migration.foreign import Foreign
from likely.migration.huggingface import (
    ABOUT_FILES,
    MEMORY_OR_SPEED,
    NOT_NEEDED,
    WHOLE_BATCH,
    carry_lora,
    carry_trackers,
    read_optimizer,
    read_precision,
    read_schedule,
    read_warmup_steps,
)
from likely.migration.huggingface import (
    BY_PREFIX as PREFIX_ANYWHERE,
)
from likely.migration.huggingface import (
    LACKING as LACKING_ANYWHERE,
)

OF_OTHER_METHODS = (
    "rl", "reward_model", "process_reward_model", "num_labels", "kd_trainer", "gkd_trainer", "block_diffusion",
    "diffusion",
)  # fmt: skip
SEQUENCE = 512  # where nothing is said
WARMUP = 0.03
EXCESS = {"drop": "drop", "truncate": "truncate_right", "raise": "error"}
OF_MEMORY = [
    "flash_attention", "sdp_attention", "xformers_attention", "flex_attention", "eager_attention", "s2_attention",
    "flash_attn_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_qkv", "flash_attn_fuse_mlp", "lora_mlp_kernel",
    "lora_qkv_kernel", "lora_o_kernel", "pad_to_sequence_len", "eval_batch_size", "dataset_processes", "gc_steps",
    "sample_packing_group_size", "sample_packing_bin_size", "sample_packing_sequentially", "eval_sample_packing",
    "batch_flattening", "multipack_real_batches", "gradient_checkpointing", "gpu_memory_limit", "max_memory",
    "lora_on_cpu", "cut_cross_entropy", "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm",
    "liger_fused_linear_cross_entropy", "chunked_cross_entropy", "dataset_keep_in_memory", "eval_sequence_len",
    "heads_k_stride", "embeddings_skip_upcast", "qlora_sharded_model_loading", "attention", "attn_implementation",
    "bfloat16", "use_kernels", "use_scattermoe", "use_sonicmoe", "tiled_mlp", "experts_implementation",
    "experimental_skip_move_to_device",
]  # fmt: skip
OF_THE_MODEL = [
    "model_type", "tokenizer_type", "is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model",
    "is_falcon_derived_model", "lora_fan_in_fan_out", "strict", "tokenizer_use_fast", "tokenizer_legacy",
]  # fmt: skip
OF_FILES = [
    "dataset_prepared_path", "wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_run_id",
    "wandb_log_model", "mlflow_experiment_name", "mlflow_run_name", "mlflow_tracking_uri", "use_mlflow", "use_wandb",
    "use_tensorboard", "auto_resume_from_checkpoints", "loss_watchdog_threshold",
    "loss_watchdog_patience", "eval_table_size", "profiler_steps", "save_first_step", "hf_mlflow_log_artifacts",
]  # fmt: skip
LACKING = {
    "special_tokens": "the vocabulary and its special tokens are the tokenizer's own",
    "tokens": "the vocabulary is not changed",
    "added_tokens_overrides": "the vocabulary is not changed",
    "eot_tokens": "the end of a turn is found in the chat template",
    "chat_template_jinja": "the template is the one that the tokenizer brings; save it with the model",
    "default_system_message": "the template is the one that the tokenizer brings",
    "lora_modules_to_save": "modules beside the adapters are not trained; tune full trains all",
    "lora_target_parameters": "adapters stand on linear layers",
    "peft_use_dora": "plain LoRA takes its place",
    "peft_use_rslora": "plain LoRA takes its place; set lora_alpha to alpha x the square root of the rank",
    "peft_layers_to_transform": "adapters stand in all layers",
    "lora_model_dir": "name a run folder or an adapter's folder as model to go on with it",
    "loraplus_lr_ratio": "one learning rate for all weights",
    "lr_groups": "one learning rate for all weights",
    "embedding_lr": "one learning rate for all weights",
    "relora": "plain LoRA takes its place",
    "unfrozen_parameters": "tune full trains all weights, and lora none of the model's own",
    "load_in_8bit": "the base is held in four bits or as it is",
    "model_quantization_config": "a quantised base can't be trained on",
    "qat": "weights are not rounded while they are trained",
    "float16": "half precision is not there; bfloat16 where the device is fast at it",
    "fp8": "products are float32 or bfloat16",
    "eval_max_new_tokens": "likely evaluate --generate has a bound of its own",
    "gptq": "a quantised base can't be trained on",
    "cosine_min_lr_ratio": "the rate falls to 0",
    "cosine_constant_lr_ratio": "the rate falls to 0",
    "curriculum_sampling": "rows are shuffled anew each epoch",
    "dataset_exact_deduplication": "likely check lists duplicates; each row counts as often as it is there",
    "min_sample_len": "every row counts",
    "plugins": "code that a file names is never run",
    "do_bench_eval": "likely evaluate tells other measures",
    "do_causal_lm_eval": "likely evaluate --generate compares answers",
    "eval_causal_lm_metrics": "likely evaluate --generate compares answers",
    "pretraining_dataset": "training on text from a stream is not there; rows of text in data are",
    "base_model_config": "the configuration is the model folder's own",
    "tokenizer_config": "the tokenizer is the model folder's own",
    "revision_of_model": "name a local folder with that revision",
    "overrides_of_model_config": "the configuration is the model folder's own",
    "rope_scaling": "the configuration is the model folder's own",
    "hf_use_auth_token": "no credential is copied; the hub library reads its own",
    "push_dataset_to_hub": "nothing is uploaded by a training",
    "use_dft_loss": "another objective than the likelihood",
    "use_eaft": "another objective than the likelihood",
    "use_comet": "no such tracker; --track names those there are",
    "processor_type": "rows are text",
    "skip_prepare_dataset": "rows are text, and always prepared",
    "cls_model_config": "the configuration is the model folder's own",
}
OF_ONE_ROW = dict.fromkeys(
    ("sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size"), "one row is computed on one device"
)
SHUFFLED = "rows are shuffled anew each epoch"
BY_PREFIX = {
    "eaft_": "another objective than the likelihood",
    "gptq_": "a quantised base can't be trained on",
    "image_": "rows are text",
}


def read(job: Foreign) -> None:
    """Fill the settings of a job; see :mod:`likely.migration.foreign`."""
    for key in OF_OTHER_METHODS:
        if job.value(key):
            raise job.wrong(key, "only supervised fine-tuning can be carried over")
    kind = str(job.value("model_type", ""))
    if kind.startswith("AutoModelFor") and kind != "AutoModelForCausalLM":
        raise job.wrong("model_type", "only causal language models can be trained")
    job.carry("model", job.text("base_model", "CHANGE_ME"), "base_model")
    read_data(job)
    job.carry("output", job.text("output_dir", "./model-out"), "output_dir")
    _long_rows(job)
    _steps(job)
    read_optimizer(job, "optimizer", default="adamw_torch_fused")
    read_precision(job)
    _adapters(job)
    _evaluations(job)
    asked = [name for name in ("wandb", "mlflow", "tensorboard") if _is_tracked(job, name)]
    carry_trackers(job, "wandb_project", asked)
    job.seed("the same number gives another order of rows and other adapters than there")
    if job.switch("shuffle_merged_datasets", default=True):
        job.not_needed(["shuffle_merged_datasets"], SHUFFLED)
    else:
        job.lacks("shuffle_merged_datasets", SHUFFLED)
    job.not_needed(OF_MEMORY, MEMORY_OR_SPEED)
    job.not_needed(OF_FILES, ABOUT_FILES)
    job.not_needed(OF_THE_MODEL, "the model folder says it, and unknown keys are refused here in any case")
    for text, keys in NOT_NEEDED.items():
        job.not_needed([key for key in keys if key not in {*OF_MEMORY, *OF_FILES}], text)
    lacking = LACKING_ANYWHERE | job.beginning(BY_PREFIX) | LACKING
    job.without_counterpart(lacking, off=(False, 0, "none", "no", "every_save"))
    job.without_counterpart(OF_ONE_ROW | job.beginning(PREFIX_ANYWHERE))


def _is_tracked(job: Foreign, name: str) -> bool:
    named = {"wandb": "wandb_project", "mlflow": "mlflow_experiment_name", "tensorboard": "use_tensorboard"}[name]
    return bool(job.values.get(named) or job.values.get(f"use_{name}"))


def _long_rows(job: Foreign) -> None:
    job.carry("max_length", job.count("sequence_len", SEQUENCE))
    if not job.line("sequence_len"):
        job.differs("sequence_len", f"{SEQUENCE} there unless told otherwise")
    strategy = job.text("excess_length_strategy", "drop") or "drop"
    if strategy not in EXCESS:
        raise job.wrong("excess_length_strategy", f"write {', '.join(EXCESS)}")
    job.carry("on_too_long", EXCESS[strategy])
    if job.line("excess_length_strategy") is None:
        job.differs("excess_length_strategy", "longer rows are left out there; on_too_long error names them instead")
    if job.switch("train_on_inputs"):
        job.carry("train_on", "all")
        job.differs("train_on_inputs", "all tokens of a row are trained, those of the template too")
    else:
        job.carry("train_on", "assistant")
        job.not_needed(["train_on_inputs"], "answers are trained, with their end of turn")
    if job.value("chat_template") not in (None, "tokenizer_default"):
        job.differs("chat_template", "the template is the one that the tokenizer brings")


def _steps(job: Foreign) -> None:
    micro, accumulated = job.count("micro_batch_size", 1) or 1, job.count("gradient_accumulation_steps", 1) or 1
    total = job.count("batch_size") or micro * accumulated
    key = "batch_size" if job.line("batch_size") else "micro_batch_size"
    job.carry("batch_size", total)
    packing = job.switch("sample_packing")
    packed = "packed blocks of sequence_len tokens there, each of several rows, and rows here"
    job.differs(key, f"batch_size {total} counts {packed if packing else WHOLE_BATCH}")
    if packing:
        job.differs("sample_packing", "rows are always computed together here and never see each other")
    else:
        job.not_needed(["sample_packing"], MEMORY_OR_SPEED)
    if job.line("gradient_accumulation_steps"):
        job.differs("gradient_accumulation_steps", "part of batch_size; how a step is split never changes its gradient")
    if job.count("max_steps") is not None:
        job.carry("steps", job.count("max_steps"))
        job.not_needed(["num_epochs"], "max_steps goes over it there too")
    else:
        job.carry("epochs", job.number("num_epochs", 1.0) or 1.0)
    rate = job.number("learning_rate")
    if rate is not None:
        job.carry("learning_rate", rate)
    read_schedule(job, "lr_scheduler", default="cosine")
    _warmup(job)


def _warmup(job: Foreign) -> None:
    if "warmup" in job.settings:
        job.not_needed(["warmup_steps", "warmup_ratio"], "the constant schedule has no warm-up there")
        return
    steps = job.share("warmup_steps")
    if steps:
        job.not_needed(["warmup_ratio"], "warmup_steps goes over it there too")
        read_warmup_steps(job, "warmup_steps", steps)
        return
    ratio = job.share("warmup_ratio")
    if ratio is not None and ratio >= 1:
        raise job.wrong("warmup_ratio", "write a share below 1")
    job.carry("warmup", ratio or WARMUP)
    if not ratio:
        job.differs("warmup_ratio", f"{WARMUP:g} of the steps there unless told otherwise, at most 100 of them")


def _adapters(job: Foreign) -> None:
    adapter = job.text("adapter")
    if adapter is None:
        job.carry("tune", "full")
        given = ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear"]
        job.not_needed(given, "adapter is not given there, so that all weights are trained")
    elif adapter in {"lora", "qlora"}:
        job.carry("tune", "qlora" if adapter == "qlora" or job.switch("load_in_4bit") else "lora")
        rank, dropout = job.count("lora_r", 8) or 8, job.number("lora_dropout", 0.0) or 0.0
        carry_lora(job, rank, job.number("lora_alpha") or rank, "lora_dropout", dropout)
        if not job.switch("lora_target_linear"):
            job.differs("lora_target_modules", "adapters stand on all linear layers here; there on those named")
        elif job.value("lora_target_modules"):
            job.not_needed(["lora_target_modules"], "adapters stand on all linear layers, there and here")
    else:
        job.carry("tune", "lora")
        job.lacks("adapter", f"{adapter} is not there; lora takes its place")
    job.value("load_in_4bit")


def _evaluations(job: Foreign) -> None:
    _how_often(job)
    for key in ("eval_strategy", "evaluation_strategy", "save_strategy"):
        if job.value(key) not in (None, "steps"):
            job.differs(key, "held-out rows are scored before and after in any case, and checkpoints written by time")
    if job.count("save_total_limit") is not None:
        job.carry("keep_checkpoints", job.count("save_total_limit"))
    patience = job.count("early_stopping_patience")
    if patience is not None and "eval_every" in job.settings:
        job.carry("patience", patience)
    elif patience is not None:
        job.differs("early_stopping_patience", "patience counts evaluations: give eval_every with it")
    if job.switch("load_best_model_at_end"):
        job.differs("load_best_model_at_end", "the best model is kept where patience is given, with eval_every")


def _how_often(job: Foreign) -> None:
    for word in ("eval", "save"):
        ours, steps, epochs = f"{word}_every", f"{word}_steps", f"{word}s_per_epoch"
        every = job.number(steps)
        if every is not None and every >= 1:
            if ours == "save_every" or job.settings.get("eval_share", 1) or "eval_data" in job.settings:
                job.carry(ours, int(every))
        elif every:
            job.differs(steps, f"a share of all steps there; {ours} is a number of steps")
        times = job.number(epochs)
        if times:
            job.differs(epochs, f"{ours} is a number of steps: rows / batch_size / {times:g}")
        elif ours == "eval_every":
            job.not_needed([epochs], "nothing is evaluated on the way, there and here")
        else:
            job.not_needed([epochs], "a checkpoint is written every ten minutes, or each save_every steps")
