"""OpenAI: a fine-tuning job as its API returns it or takes it, in JSON."""

from __future__ import annotations

from typing import Any

from likely.migration.foreign import Foreign

OF_THE_SERVER = [
    "id", "object", "created_at", "finished_at", "estimated_finish", "status", "error", "fine_tuned_model",
    "organization_id", "project_id", "result_files", "trained_tokens", "user_provided_suffix", "metadata",
    "shared_with_openai", "eval_id", "usage_metrics",
]  # fmt: skip


def read(job: Foreign) -> None:
    """Fill the settings of a job; see :mod:`likely.migration.foreign`."""
    if job.value("object", "fine_tuning.job") != "fine_tuning.job":
        raise job.wrong("object", "give the JSON of one fine_tuning.job")
    method = job.value("method", {})
    kind = method.get("type", "supervised") if isinstance(method, dict) else None
    if kind != "supervised":
        raise job.wrong("method", "only supervised fine-tuning can be carried over")
    _rest_of_method(job, method)
    job.carry("model", "CHANGE_ME")
    if job.value("model") is not None:
        job.differs("model", "its weights can't be had: set model to an open one, such as smollm2-135m to try it")
    for ours, theirs in (("data", "training_file"), ("eval_data", "validation_file")):
        _file(job, ours, theirs)
    suffix = job.text("suffix") or job.text("user_provided_suffix")
    job.carry(
        "output", f"runs/{suffix}" if suffix and "/" not in suffix and suffix.strip(".") else "runs/openai", "suffix"
    )
    job.carry("format", "messages")
    job.carry("train_on", "assistant")
    _hyperparameters(job)
    job.seed("the same number gives another order of rows")
    if job.value("integrations"):
        parts = job.value("integrations")
        if "wandb" in str(parts):
            job.carry("track", "wandb")
        job.differs("integrations", "a run is told to trackers by track; project and names stand in their own settings")
    job.not_needed(OF_THE_SERVER, "the server's own account of the job")


def _rest_of_method(job: Foreign, method: dict[str, Any]) -> None:
    """What stands in ``method`` beside its type and its hyper-parameters."""
    inner = method.get("supervised") or {}
    if not isinstance(inner, dict) or not isinstance(inner.get("hyperparameters") or {}, dict):
        raise job.wrong("method.supervised", "write a mapping with hyperparameters, as the API returns it")
    for prefix, part, known in (("method", method, {"type", "supervised"}),
                                ("method.supervised", inner, {"hyperparameters"})):  # fmt: skip
        for key in part:
            if key not in known and part[key] is not None:
                job.lacks(f"{prefix}.{key}", "not known; see what it does there before you leave it out")


def _file(job: Foreign, ours: str, theirs: str) -> None:
    name = job.text(theirs)
    if name is None:
        if ours == "data":
            job.carry("data", "CHANGE_ME")
        return
    if not name.startswith("file-"):
        job.carry(ours, name, theirs)
        return
    job.carry(ours, "CHANGE_ME")
    job.differs(theirs, f"a file of the server: download it (GET /v1/files/{name}/content) and set {ours} to it")


def _hyperparameters(job: Foreign) -> None:
    found: dict[str, tuple[str, Any]] = {}
    for prefix in ("hyperparameters", "method.supervised.hyperparameters"):
        inner: Any = job.values
        for part in prefix.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        for key, value in (inner if isinstance(inner, dict) else {}).items():
            if key in found and found[key][1] != value:
                job.differs(found[key][0], f"{prefix}.{key} says something else, and goes before it")
            found[key] = (f"{prefix}.{key}", value)
    if not isinstance(job.value("hyperparameters", {}), dict):
        raise job.wrong("hyperparameters", "write a mapping, as the API returns it")
    meant = {
        "n_epochs": ("epochs", "chosen by the server from the number of rows there; 3 here"),
        "batch_size": ("batch_size", "chosen by the server from the number of rows there; 8 here"),
    }
    for key, (place, value) in found.items():
        if key in meant and value not in ("auto", None):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
                raise job.wrong(place, "write a number of 1 or more, or auto")
            ours = meant[key][0]
            job.carry(ours, float(value) if ours == "epochs" else int(value))
        elif key in meant:
            job.differs(place, meant[key][1])
        elif key == "learning_rate_multiplier":
            job.lacks(place, "a multiple of a rate that the server keeps to itself; learning_rate is the rate itself")
        else:
            job.lacks(place, "not known; see what it does there before you leave it out")
