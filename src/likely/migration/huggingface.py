"""What TRL, LLaMA-Factory and others share: the arguments of transformers' Trainer.

Meanings are those of transformers' ``training_args.py`` (docs/coming-over.md has the sources)."""

from __future__ import annotations

from typing import Any

from likely.migration.foreign import Foreign

WHOLE_BATCH = (
    "rows of one optimizer step: the rows of a device x the accumulated steps; multiply it by your number of devices"
)
MEMORY_OR_SPEED = "it decides memory or speed, which are decided here by themselves"
ABOUT_FILES = "it says where and how things are logged, cached or named; a run folder holds all of them"
TRACKERS = {"tensorboard", "wandb", "mlflow", "trackio"}
ADAMW = {"adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"}

NOT_NEEDED = {
    MEMORY_OR_SPEED: [
        "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
        "gradient_checkpointing_kwargs", "activation_offloading", "torch_compile", "torch_compile_backend",
        "torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "use_cache", "torch_empty_cache_steps", "tf32",
        "auto_find_batch_size", "per_device_eval_batch_size", "eval_accumulation_steps", "bf16_full_eval",
        "fp16_full_eval", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
        "preprocessing_num_workers", "dataset_num_proc", "attn_implementation", "flash_attn", "low_cpu_mem_usage",
        "group_by_length", "length_column_name", "eval_do_concat_batches", "batch_eval_metrics", "padding_free",
        "pad_to_multiple_of", "use_liger", "skip_memory_metrics", "device_map", "fp16_opt_level",
        "half_precision_backend",
    ],
    ABOUT_FILES: [
        "logging_strategy", "logging_steps", "logging_first_step", "logging_dir", "log_on_each_node", "log_level",
        "log_level_replica", "disable_tqdm", "include_num_input_tokens_seen", "run_name", "project",
        "overwrite_output_dir",
        "plot_loss", "overwrite_cache", "remove_unused_columns", "label_names",
        "prediction_loss_only", "save_only_model", "save_on_each_node", "save_safetensors", "debug",
        "include_for_metrics", "eval_on_start", "eval_use_gather_object", "include_tokens_per_second", "ddp_timeout",
        "restore_callback_states_from_checkpoint", "enable_jit_checkpoint", "local_rank", "log_loss_every",
    ],
    "likely train trains, and scores held-out rows before and after": ["do_train", "do_eval", "do_predict"],
    "a run is repeated bit for bit, and goes on with --resume": [
        "resume_from_checkpoint", "ignore_data_skip", "full_determinism",
    ],
    "here losses that are not finite stop the run, or are counted by skip_nonfinite": ["logging_nan_inf_filter"],
    "the token mean of a step is one number over all devices here too": ["average_tokens_across_devices"],
}  # fmt: skip
DEVICES = "see --help of likely train for how several devices are used"
LACKING = {
    "neftune_noise_alpha": "noise on the embeddings is another objective than the likelihood",
    "label_smoothing_factor": "smoothed labels are another objective than the likelihood",
    "optim_args": "AdamW with beta 0.9 and 0.999 is the only optimizer",
    "optim_target_modules": "AdamW with beta 0.9 and 0.999 is the only optimizer",
    "lr_scheduler_kwargs": "a schedule has no parameters besides warmup here",
    "push_to_hub": "nothing is uploaded by a training",
    "hub_model_id": "nothing is uploaded by a training",
    "hub_strategy": "nothing is uploaded by a training",
    "hub_token": "nothing is uploaded by a training, and no credential is copied",
    "hub_private_repo": "nothing is uploaded by a training",
    "hub_always_push": "nothing is uploaded by a training",
    "hub_revision": "nothing is uploaded by a training",
    "trackio_space_id": "metrics stay on this machine",
    "trackio_bucket_id": "metrics stay on this machine",
    "trackio_static_space_id": "metrics stay on this machine",
    "fsdp": DEVICES,
    "fsdp_config": DEVICES,
    "deepspeed": DEVICES,
    "parallelism_config": DEVICES,
    "accelerator_config": DEVICES,
    "ddp_backend": DEVICES,
    "ddp_bucket_cap_mb": DEVICES,
    "ddp_broadcast_buffers": DEVICES,
    "ddp_find_unused_parameters": DEVICES,
    "ddp_static_graph": DEVICES,
    "use_cpu": "the best device that is there is used; CUDA_VISIBLE_DEVICES= hides GPUs",
    "dataloader_drop_last": "the last rows of an epoch are never left out; the last step of an epoch is smaller",
    "data_seed": "one seed decides order and new adapters",
    "train_sampling_strategy": "rows are shuffled anew each epoch",
    "trust_remote_code": "code of a model folder is never run; its layers must be transformers' own",
    "greater_is_better": "the best model is the one with the lowest held-out NLL",
    "metric_for_best_model": "the best model is the one with the lowest held-out NLL",
    "eval_delay": "evaluations begin with the first multiple of eval_every",
    "early_stopping_steps": "give eval_every and patience",
}


BY_PREFIX = {"fsdp_": DEVICES, "dp_": DEVICES, "expert_parallel_": DEVICES, "ray_": DEVICES}


def read_training_arguments(job: Foreign, *, learning_rate: float, batch: str = WHOLE_BATCH) -> None:
    """Batch, length, schedule, optimizer, evaluations and checkpoints. ``learning_rate`` is the trainer's default."""
    _batch(job, batch)
    _length(job)
    job.carry("learning_rate", job.number("learning_rate", learning_rate))
    read_schedule(job, "lr_scheduler_type", default="linear")
    _warmup(job)
    read_optimizer(job, "optim", default="adamw_torch_fused")
    read_precision(job)
    _evaluations(job)
    _saving(job)
    _trackers(job)
    job.seed("the same number gives another order of rows and other adapters than there")
    for text, keys in NOT_NEEDED.items():
        job.not_needed(keys, text)
    job.without_counterpart(LACKING, off=(False, 0, 1, "none", "no", "every_save", "random", "default"))


def _batch(job: Foreign, text: str) -> None:
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    device, accumulated = job.count(keys[0], 8) or 8, job.count(keys[1], 1) or 1
    job.carry("batch_size", device * accumulated)
    job.differs(keys[0], f"batch_size {device * accumulated} counts {text}")
    if job.line(keys[1]):
        job.differs(keys[1], "part of batch_size; how a step is split never changes its gradient")


def _length(job: Foreign) -> None:
    steps = job.count("max_steps")
    epochs = job.number("num_train_epochs", 3.0) or 3.0
    if steps is not None:
        job.carry("steps", steps)
        job.not_needed(["num_train_epochs"], "max_steps goes over it there too")
    else:
        job.carry("epochs", epochs)


def read_schedule(job: Foreign, key: str, default: str) -> None:
    """The nearest schedule: ours are cosine and constant, both after a linear warm-up."""
    name = str(job.value(key, default))
    if name in {"constant", "constant_with_warmup"}:
        job.carry("schedule", "constant")
        if name == "constant":
            job.carry("warmup", 0.0)
            job.differs(key, "that schedule has no warm-up, whatever warmup says")
        return
    job.carry("schedule", "cosine")
    if name != "cosine":
        job.differs(key, f"{name} is not there; cosine takes its place, which falls from the peak to 0 as well")


def _warmup(job: Foreign) -> None:
    if "warmup" in job.settings:
        job.not_needed(["warmup_steps", "warmup_ratio"], "the constant schedule has no warm-up there")
        return
    steps, ratio = job.share("warmup_steps") or 0.0, job.share("warmup_ratio") or 0.0
    key = "warmup_steps" if steps else "warmup_ratio"
    if steps >= 1:
        read_warmup_steps(job, key, steps)
        return
    ratio = steps or ratio
    if ratio >= 1:
        raise job.wrong(key, "write a share below 1")
    job.carry("warmup", ratio)
    if ratio:
        job.differs(key, "the first step has a small rate here, where it has none there")


def read_warmup_steps(job: Foreign, key: str, steps: float) -> None:
    """Warm-up in steps: ours is a share of all steps, as theirs is below 1 since transformers 5."""
    if steps < 1:
        job.carry("warmup", steps)
        return
    total = job.settings.get("steps")
    if total and steps < total:
        job.carry("warmup", round(steps / total, 6))
        return
    job.differs(key, f"warmup is a share of all steps: set it to {steps:g} / the number of steps")


def read_optimizer(job: Foreign, key: str, default: str) -> None:
    """AdamW or what takes its place, decay and clipping."""
    name = str(job.value(key, default))
    if name not in ADAMW:
        job.lacks(key, f"{name} is not there; AdamW with 32-bit states takes its place")
    for beta, ours in (("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8)):
        if job.number(beta, ours) != ours:
            job.lacks(beta, f"it is {ours:g} here")
    decay = job.share("weight_decay")
    if decay is not None:
        job.carry("weight_decay", decay)
    clip = job.share("max_grad_norm")
    if clip == 0:
        job.carry("max_grad_norm", 1e9)
        job.differs("max_grad_norm", "0 turns clipping off there; here a bound that no gradient reaches does")
    elif clip is not None:
        job.carry("max_grad_norm", clip)


def read_precision(job: Foreign) -> None:
    """Precision of products: weights are float32 here in any case."""
    if job.switch("fp16"):
        job.lacks("fp16", "half precision with loss scaling is not there; bfloat16 where the device is fast at it")
    if job.value("bf16") == "auto":
        job.not_needed(["bf16"], "dtype auto is the same")
    elif job.value("bf16") is not None and not job.switch("fp16"):
        job.carry("dtype", "bfloat16" if job.switch("bf16") else "float32")
    for key in ("torch_dtype", "dtype"):
        if job.value(key) is not None:
            job.differs(key, "the type of the weights there; here they are float32, and only products may be bfloat16")


def _evaluations(job: Foreign) -> None:
    key = "evaluation_strategy" if job.line("evaluation_strategy") else "eval_strategy"
    strategy = str(job.value(key, "no"))
    every = job.number("eval_steps")
    if strategy == "steps":
        every = every if every is not None else job.number("logging_steps", 500)
        if every and every >= 1:
            job.carry("eval_every", int(every))
        else:
            job.differs("eval_steps", "a share of all steps there; eval_every is a number of steps")
    elif strategy == "epoch":
        job.differs(key, "eval_every is a number of steps: divide the rows by batch_size; the end is always scored")
    elif every is not None:
        job.not_needed(["eval_steps"], "nothing is evaluated on the way, there and here")
    if job.switch("load_best_model_at_end"):
        job.differs("load_best_model_at_end", "the best model is kept where patience is given, with eval_every")


def _saving(job: Foreign) -> None:
    strategy, every = str(job.value("save_strategy", "steps")), job.number("save_steps")
    if strategy == "steps" and every is not None:
        if every >= 1:
            job.carry("save_every", int(every))
        else:
            job.differs("save_steps", "a share of all steps there; save_every is a number of steps")
    elif strategy != "steps":
        job.differs("save_strategy", "a checkpoint is written every ten minutes, or each save_every steps")
        job.not_needed(["save_steps"], "save_strategy goes over it there")
    if job.count("save_total_limit") is not None:
        job.carry("keep_checkpoints", job.count("save_total_limit"))


def _trackers(job: Foreign) -> None:
    asked = job.value("report_to", [])
    names = [str(name) for name in (asked if isinstance(asked, list) else [asked])]
    carry_trackers(job, "report_to", [name for name in names if name not in {"none", "no"}])


def carry_trackers(job: Foreign, key: str, names: list[str]) -> None:
    known = [name for name in dict.fromkeys(names) if name in TRACKERS]
    if known:
        job.carry("track", ",".join(known))
    strange = [name for name in names if name not in TRACKERS]
    if strange:
        job.lacks(key, f"{', '.join(strange)} is no tracker here; {', '.join(sorted(TRACKERS))} are")


def carry_lora(job: Foreign, rank: Any, alpha: float, dropout_key: str, dropout: float) -> None:
    """Rank and scale of adapters, which stand on all linear layers here and have no dropout."""
    job.carry("lora_rank", int(rank))
    job.carry("lora_alpha", float(alpha))
    if dropout:
        job.lacks(dropout_key, f"adapters have no dropout here, and {dropout:g} there")
