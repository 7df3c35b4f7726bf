"""TRL: the YAML of ``trl sft --config``, or SFTConfig and TrainingArguments as JSON."""

from __future__ import annotations

from typing import Any

from likely.migration.foreign import Foreign
from likely.migration.huggingface import MEMORY_OR_SPEED, WHOLE_BATCH, carry_lora, read_training_arguments

MAX_LENGTH = 1024  # where nothing is said
PACKED = "packed blocks of max_length tokens there, each of several rows, and rows here"
EVERY_ROW = "there every row is trained on; here a share is held out, unless eval_share is 0"
LACKING = {
    "chat_template": "the template is the one that the tokenizer brings; save it with the model",
    "chat_template_path": "the template is the one that the tokenizer brings; save it with the model",
    "eos_token": "the end of a turn is found in the chat template",
    "pad_token": "there is no padding",
    "model_init_kwargs": "a model is loaded as its folder says",
    "model_revision": "name a local folder with that revision",
    "dataset_streaming": "rows are read in a stream and kept rendered in a cache",
    "dataset_kwargs": "rows are always prepared here",
    "shuffle_dataset": "rows are shuffled anew each epoch",
    "use_dora": "DoRA is not there; plain LoRA takes its place",
    "use_rslora": "rank-stabilised scaling is not there; set lora_alpha to alpha x the square root of the rank",
    "lora_modules_to_save": "modules beside the adapters are not trained; tune full trains all",
    "lora_target_parameters": "adapters stand on linear layers",
    "use_bnb_nested_quant": "tune qlora says how the base is held",
    "bnb_4bit_quant_type": "tune qlora says how the base is held",
    "bnb_4bit_quant_storage": "tune qlora says how the base is held",
    "load_in_8bit": "the base is held in four bits or as it is",
    "ignore_bias_buffers": "it is for models with masks among their buffers",
    "router_aux_loss_coef": "balancing losses are not added",
    "dataset_mixer": "name the data sets in data, separated by commas",
    "dataset_splits": "a split stands behind the name in data, as org/name:split",
    "dataset_configs": "a configuration stands behind the name in data, as org/name:config:split",
}
OF_OTHER_METHODS = (  # preferences, rewards, distillation
    "beta", "rpo_alpha", "simpo_gamma", "cpo_alpha", "desirable_weight", "undesirable_weight",
    "precompute_ref_log_probs", "ref_model_name_or_path", "max_prompt_length", "max_completion_length",
    "num_generations", "reward_funcs", "reward_model_name_or_path", "reward_model_path", "center_rewards_coefficient",
    "teacher_model_name_or_path", "lmbda",
)  # fmt: skip


def read(job: Foreign) -> None:
    """Fill the settings of a job; see :mod:`likely.migration.foreign`."""
    for key in OF_OTHER_METHODS:
        if job.value(key) is not None:
            raise job.wrong(key, "it is none of SFTConfig's, and only supervised fine-tuning can be carried over")
    job.carry("model", job.text("model_name_or_path", "CHANGE_ME"), "model_name_or_path")
    _data(job)
    job.carry("output", job.text("output_dir", "CHANGE_ME"), "output_dir")
    _loss(job)
    _length(job)
    packing = job.switch("packing")
    read_training_arguments(job, learning_rate=2e-5, batch=PACKED if packing else WHOLE_BATCH)
    if packing:
        job.differs("packing", "rows are always computed together here and never see each other; nothing is cut to fit")
        job.not_needed(["packing_strategy"], MEMORY_OR_SPEED)
    else:
        job.not_needed(["packing", "packing_strategy"], MEMORY_OR_SPEED)
    job.not_needed(["eval_packing"], MEMORY_OR_SPEED)
    _adapters(job)
    if job.value("env") is not None:
        job.lacks("env", "set environment variables in the shell")
    job.without_counterpart(LACKING, off=(False, 0, 1, "none", "main", "nf4"))


def _data(job: Foreign) -> None:
    mixture = job.value("datasets")
    if mixture is not None:
        _mixture(job, "datasets", mixture)
        _without_a_test_split(job, bool(job.value("test_split_size")))
        return
    mixture = job.value("dataset_mixture")  # of recipes for TRL
    if isinstance(mixture, dict):
        _mixture(job, "dataset_mixture.datasets", mixture.get("datasets"))
        for key in mixture.keys() - {"datasets"}:
            job.lacks(f"dataset_mixture.{key}", "rows are held out by eval_share, and shuffled by seed")
        _without_a_test_split(job, bool(mixture.get("test_split_size")))
        return
    name = job.text("dataset_name")
    if name is None:
        job.carry("data", "CHANGE_ME")
        job.differs("dataset_name", "nothing names the data: set data to a file or a data set of the hub")
        return
    config = job.text("dataset_config") or job.text("dataset_config_name")
    split = job.text("dataset_train_split", "train")
    job.carry("data", job.hub_name(name, config, split, "dataset_train_split", "dataset_name"), "dataset_name")
    if str(job.value("eval_strategy", "no")) != "no":
        test = job.text("dataset_test_split", "test")
        held_out = job.hub_name(name, config, test, "dataset_test_split", "dataset_name")
        job.carry("eval_data", held_out, "dataset_name")
    else:
        job.not_needed(["dataset_test_split"], "nothing is evaluated there; here a share of the rows is held out")
        job.differs("eval_strategy", EVERY_ROW)
    _text_column(job)


def _without_a_test_split(job: Foreign, held_out: bool) -> None:
    """Of data that are told in other keys than ``dataset_name``."""
    if not held_out and str(job.value("eval_strategy", "no")) == "no":
        job.differs("eval_strategy", EVERY_ROW)


def _mixture(job: Foreign, place: str, mixture: Any) -> None:
    if not isinstance(mixture, list) or not all(isinstance(part, dict) for part in mixture):
        raise job.wrong(place, "write a list of mappings with path")
    names = []
    for number, part in enumerate(mixture):
        files = part.get("data_files")
        path = files if isinstance(files, str) else part.get("path", part.get("id", "CHANGE_ME"))
        config = part.get("name", part.get("config"))
        here = f"{place}.{number}"
        names.append(job.hub_name(str(path), config, part.get("split"), f"{here}.split", here))
        for key in part:
            if key == "weight" and part[key] not in (None, 1):
                job.differs(
                    f"{here}.weight", "that share of its rows there, and all here: make a file of the rows meant"
                )
            elif key == "columns":
                job.differs(f"{here}.columns", "the columns that are kept there; here every row is looked at")
            elif key not in {"path", "id", "name", "config", "split", "data_files", "weight"}:
                job.lacks(f"{here}.{key}", "not known; see what it does there before you leave it out")
    job.carry("data", ",".join(names), place)
    _text_column(job)
    job.without_counterpart({"test_split_size": "set eval_share to it where it is a share"})


def _text_column(job: Foreign) -> None:
    column = job.text("dataset_text_field", "text")
    if column != "text":
        job.carry("columns", f"text={column}", "dataset_text_field")
        job.differs("dataset_text_field", "columns is for rows of text; remove it where rows are messages or prompts")


def _loss(job: Foreign) -> None:
    """Which tokens count: TRL's default depends on the shape of the rows, ours does not."""
    everything = job.value("completion_only_loss") is not None and not job.switch("completion_only_loss")
    answers = job.switch("assistant_only_loss") or job.switch("completion_only_loss")
    job.carry("train_on", "all" if everything and not answers else "assistant")
    if not answers and not everything:
        job.differs(
            "assistant_only_loss",
            "rows of messages are trained on every token there: train_on all does so, and train_on assistant learns the"
            " answers. Rows of prompt and completion are trained on the completion, there and here",
        )
    if job.switch("assistant_only_loss"):
        job.not_needed(["assistant_only_loss"], "train_on assistant is the same, and proved for every row")
    kind = job.text("loss_type", "chunked_nll")
    if kind not in {"nll", "chunked_nll"}:
        job.lacks("loss_type", f"{kind} is another objective than the likelihood")


def _length(job: Foreign) -> None:
    key = "max_seq_length" if job.line("max_seq_length") else "max_length"
    told = key in job.values
    if told and job.values[key] is None:
        job.value(key)
        return  # nothing is cut there; the model's context bounds both
    job.carry("max_length", job.count(key, MAX_LENGTH))
    end = job.text("truncation_mode", "keep_start") == "keep_end"
    job.carry("on_too_long", "truncate_left" if end else "truncate_right")
    default = "" if told else f"rows are cut at {MAX_LENGTH} tokens there unless told otherwise. "
    job.differs(key, f"{default}A row that is cut loses its end of turn: on_too_long error names such rows instead")


def _adapters(job: Foreign) -> None:
    targets = job.value("lora_target_modules")
    if not job.switch("use_peft"):
        job.carry("tune", "full")
        given = ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_task_type", "load_in_4bit"]
        job.not_needed(given, "use_peft is off there, so that all weights are trained")
        return
    four_bits = job.switch("load_in_4bit")
    job.carry("tune", "qlora" if four_bits else "lora")
    dropout = job.number("lora_dropout", 0.05) or 0.0
    carry_lora(job, job.count("lora_r", 16), job.number("lora_alpha", 32) or 32, "lora_dropout", dropout)
    job.not_needed(["lora_task_type"], "models are causal language models")
    if targets not in ("all-linear", ["all-linear"]):
        job.differs("lora_target_modules", "adapters stand on all linear layers here; there on those named, or a few")
