"""Every knob of a training, once: the YAML file, the flags and the JSON Schema derive from this tree."""

from __future__ import annotations

import datetime
import difflib
import itertools
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from likely.complaints import of_setting
from likely.credentials import has_credential, redact
from likely.errors import ConfigError
from likely.strict_yaml import MAX_CHARACTERS, Settings, YamlError, read_settings

PositiveInt = Annotated[int, Field(gt=0)]


def _not_a_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is meant, not a switch (YAML reads yes, no, on and off as true and false)")
    return value


# YAML 1.1 reads 2e-4 as text, so numbers with an exponent must be let through as such.
Number = Annotated[float, Field(strict=False), BeforeValidator(_not_a_switch)]


def _a_name(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError("a name is meant, and this is empty or has a NUL")
    if has_credential(value):
        raise ValueError("this holds a credential, which would be written to the run folder")
    return value


def a_folder(value: str) -> str:
    if not value.isascii() and value.encode(errors="replace").decode() != value:
        raise ValueError("the libraries that write models can only write to names in UTF-8")
    return value


Name = Annotated[str, AfterValidator(_a_name)]


def _joined(value: Any) -> Any:
    """A YAML list of files is what --data separates by commas."""
    return ",".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _a_day(value: str) -> str:
    with suppress(ValueError):
        if datetime.date.fromisoformat(value).isoformat() == value:
            return value
    raise ValueError("no such day; write it as YYYY-MM-DD, such as 2024-07-26")


def _trackers(value: str) -> str:
    names = [name.strip() for name in value.split(",")]
    strange = next((name for name in names if name not in TRACKERS or names.count(name) > 1), None)
    if strange is not None:
        raise ValueError(f"name one or more of {', '.join(TRACKERS)}, each once, separated by commas")
    return ",".join(names)


TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
DataFiles = Annotated[str, BeforeValidator(_joined), AfterValidator(_a_name)]
Trackers = Annotated[str, BeforeValidator(_joined), AfterValidator(_trackers)]
Day = Annotated[str, AfterValidator(_a_day)]


def refuse_idle_data_options(settings: Any) -> None:
    """Of settings that ``likely check`` has too.

    Raises:
        ValueError: one has no effect beside another one.
    """
    if settings.train_on == "all" and settings.prompt_weight not in (0.0, 1.0):
        raise ValueError("train_on all already gives prompts weight 1; use train_on assistant with prompt_weight")
    if settings.eval_share and settings.eval_data is not None:
        raise ValueError("eval_share has no effect beside eval_data; remove one of them")
    if settings.steps is not None and "epochs" in settings.model_fields_set:
        raise ValueError("steps and epochs both say how long to train; give one of them")


class Config(BaseModel):
    """What one training does. Field ``batch_size`` is the flag ``--batch-size`` and the YAML key ``batch_size``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: Name = Field(description="Hugging Face folder, hub id, run folder, RUN@step-N or smollm2-135m")
    data: DataFiles = Field(
        description="training data: a file, a.jsonl,b.csv, a mix as a.jsonl:0.7,b.csv:0.3, or org/name:split of the hub"
    )
    eval_data: DataFiles | None = Field(None, description="held-out data, scored before and after")
    eval_share: Number | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of the training rows to hold out where no eval_data is given, by families; 0 for none"
        " [0.05, but about 500 rows at most, and none of fewer than 100]",
    )
    retain: DataFiles | None = Field(
        None, description="text the model should not forget, scored before and after; bundled is a small one of ours"
    )
    guard: DataFiles | None = Field(
        None, description="rows of prompt, unwanted response and, if known, wanted one, scored before and after"
    )
    guard_max_gain: Number | None = Field(
        None, ge=0, description="exit with 8 if an unwanted response gains more nats, or gains them on the wanted one"
    )
    output: Annotated[Name, AfterValidator(a_folder)] = Field(description="run folder to create")

    format: Literal["auto", "messages", "prompt_completion", "sharegpt", "alpaca", "text", "tokens"] = Field(
        "auto", description="shape of the rows; auto looks at every row"
    )
    columns: str | None = Field(
        None, description="map of columns, as prompt=question,completion=answer [the keys as they are]"
    )
    template: Literal["auto", "chat", "raw"] = Field(
        "auto",
        description="prompt and completion strings go through the chat template if there is one, always, or never",
    )
    template_date: Day = Field("2024-07-26", description="date that a chat template writes, if it does")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="stop at a row that is wrong, or leave it out and list it in rejected.jsonl"
    )
    on_too_long: Literal["error", "drop", "truncate_left", "truncate_right"] = Field(
        "error", description="examples over max_length: stop, leave out, or cut at the start or the end"
    )

    epochs: Number = Field(3.0, gt=0, description="passes over the training data")
    steps: PositiveInt | None = Field(None, description="optimizer steps, instead of epochs")
    batch_size: PositiveInt = Field(8, description="examples per optimizer step, over all processes")
    order: Literal["examples", "families"] = Field(
        "examples", description="shuffle examples, or whole families of common prompts, which share more of a step"
    )
    learning_rate: Number | None = Field(None, gt=0, description="peak learning rate [2e-5 full, 2e-4 lora]")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning rate after the warm-up")
    warmup: Number = Field(0.05, ge=0, lt=1, description="share of the steps spent warming up")
    weight_decay: Number = Field(0.0, ge=0, description="AdamW decay of matrices; 0 minimises the likelihood itself")
    max_grad_norm: Number = Field(1.0, gt=0, description="clip the gradient to this global norm")

    tune: Literal["full", "lora", "qlora"] = Field(
        "lora", description="train all weights, low-rank adapters, or those on a base in four bits"
    )
    lora_rank: PositiveInt = Field(16, description="rank of the adapters")
    lora_alpha: Number | None = Field(None, gt=0, description="scale of the adapters times their rank [2 x rank]")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of matrix products in training; weights stay float32"
    )

    max_length: PositiveInt | None = Field(None, description="longest example in tokens [the model's context]")
    pack_tokens: PositiveInt | None = Field(
        None, description="trie tokens per forward: memory only, never the result [16384, or the longest example]"
    )
    activation_checkpointing: Literal["auto", "none", "full"] = Field(
        "auto",
        description="compute layers twice rather than keep their activations: where memory is short, never, always",
    )
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        "assistant", description="which turns are supervised"
    )
    prompt_weight: Number = Field(0.0, ge=0, le=1, description="weight of the tokens that are not an answer")
    normalize: Literal["token", "example"] = Field("token", description="every token, or every example, counts alike")

    seed: int = Field(0, ge=0, lt=2**64, description="seed of the order of examples and of new adapters")
    eval_every: PositiveInt | None = Field(None, description="score the held-out data every so many steps [at the end]")
    patience: PositiveInt | None = Field(
        None, description="keep the best model by held-out NLL; stop after so many evaluations without a better one"
    )
    num_answers: int = Field(0, ge=0, description="held-out prompts that both models answer greedily, for the report")
    save_every: PositiveInt | None = Field(
        None, description="write a checkpoint every so many steps, and after the last [every ten minutes]"
    )
    keep_checkpoints: PositiveInt = Field(3, description="checkpoints to keep: the newest, and the best one besides")
    skip_nonfinite: int = Field(
        0, ge=0, description="leave out up to so many steps whose loss or gradient is not finite; one more ends the run"
    )

    @model_validator(mode="after")
    def _no_idle_options(self) -> Config:
        refuse_idle_data_options(self)
        if self.tune == "full" and self.lora_alpha is not None:
            raise ValueError("lora_alpha has no effect with tune full; remove it")
        if self.eval_every is not None and self.eval_data is None and self.eval_share == 0:
            raise ValueError("eval_every has nothing to score without eval_data or eval_share; give one or remove it")
        if self.patience is not None and self.eval_every is None:
            raise ValueError("patience counts evaluations, and there are none without eval_every; give that too")
        if self.guard_max_gain is not None and self.guard is None:
            raise ValueError("guard_max_gain bounds nothing without guard; give that too")
        return self

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate if self.learning_rate is not None else 2e-5 if self.tune == "full" else 2e-4


class Launch(BaseModel):
    """How a training is carried out: nothing here has a say in its result, so it is no part of what a run stores."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    resume: str | None = Field(
        None,
        pattern=r"^(newest|step-\d{1,12})$",
        description="go on with the run in --output from its newest valid checkpoint, or from the one named: step-N",
    )
    nproc: PositiveInt | None = Field(
        None, description="processes on this machine that share the work [1; torchrun starts them on several]"
    )
    shard: Literal["auto", "none", "full", "hybrid"] = Field(
        "auto",
        description="keep on each process the whole model, or some rows of every weight: full over all, hybrid over"
        " those of one host; auto shards what does not fit",
    )
    track: Trackers | None = Field(
        None, description="tell the metrics to tensorboard, wandb, mlflow or trackio too; several separated by commas"
    )

    @property
    def trackers(self) -> list[str]:
        return self.track.split(",") if self.track else []


SETTINGS_OF_TRAINING = {**Config.model_fields, **Launch.model_fields}
Kind = TypeVar("Kind", bound=BaseModel)


def make_config(values: dict[str, Any], place: str = "") -> Config:
    """A validated training config; see :func:`make_settings`."""
    return make_settings(Config, values, place)


def make_training(values: dict[str, Any], place: str = "") -> tuple[Config, Launch]:
    """What to train and how to carry it out, from the flags or the keys of one YAML file; see :func:`make_settings`."""
    launch = {key: values[key] for key in Launch.model_fields if key in values}
    config = {key: value for key, value in values.items() if key not in launch}
    known = list(SETTINGS_OF_TRAINING)
    return make_settings(Config, config, place, known), make_settings(Launch, launch, place)


def make_settings(
    kind: type[Kind], values: dict[str, Any], place: str = "", known: Sequence[str] | None = None
) -> Kind:
    """Validated settings of a kind.

    Args:
        place: the YAML file that some values are from; errors then say where in it.
        known: the keys to name where one is unknown [those of the kind].

    Raises:
        ConfigError: an unknown key, with the nearest known one, or a value out of its range.
    """
    for key in values:
        if key not in kind.model_fields:
            near = difflib.get_close_matches(str(key), known or kind.model_fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known or kind.model_fields)}"
            raise ConfigError(f"unknown key {_shown(key)}", place=_place_of_key(place, key), way_out=hint)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        message = of_setting(kind, key, first)
        if first["type"] == "missing":
            raise ConfigError(f"{key} is missing", place=place, way_out=f"give --{key.replace('_', '-')}") from error
        shown = f"{key} is {_shown(first['input'])}: {message}" if key else message
        where = _place_of_value(place, key, values[key]) if key in values else place
        raise ConfigError(shown, place=where) from error


def _shown(value: Any) -> str:
    """A value of the user in a message: short, and without credentials."""
    text = redact(repr(value))
    return text if len(text) <= 120 else text[:117] + "..."


def _place_of_key(place: str, key: Any) -> str:
    found = _settings_of(place)
    return _at(place, found.key_places[key]) if found and key in found.key_places else place


def _place_of_value(place: str, key: str, value: Any) -> str:
    """Where in a file a value stands; the flag, where one has gone over the file."""
    found = _settings_of(place)
    if found is None:
        return place
    own = found.values.get(key)
    from_file = key in found.values and (own is value or own == value)
    return _at(place, found.value_places[key]) if from_file else f"--{key.replace('_', '-')}"


def _settings_of(place: str) -> Settings | None:
    try:
        return read_settings(_read_text(place)) if place else None
    except (OSError, ValueError):
        return None


def _at(path: str | Path, where: tuple[int, int]) -> str:
    return f"{path}:{where[0]}:{where[1]}"


def _read_text(path: str | Path) -> str:
    """The text of a small file; of a larger one no more than shows that it is too large."""
    path = Path(path)
    if path.is_fifo() and not path.is_relative_to("/dev") and not path.is_relative_to("/proc"):
        raise OSError("a pipe, which may never end")
    with path.open("rb") as file:
        return file.read(4 * MAX_CHARACTERS + 4).decode("utf-8-sig")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; see :mod:`likely.strict_yaml` for what is refused.

    Raises:
        ConfigError: no such file, broken YAML with its line and column, or not a mapping.
    """
    try:
        return read_settings(_read_text(path)).values
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            getattr(error, "strerror", None) or str(error), place=str(path), way_out="check the path"
        ) from error
    except YamlError as error:
        where = _at(path, (error.line, error.column)) if error.line else str(path)
        raise ConfigError(redact(str(error)), place=where, way_out="write one key: value a line") from error


def over_file(file_values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Settings of a file with flags over them. Of ``steps`` and ``epochs`` only one may be said, so that a flag for one
    of them takes the file's other one away."""
    rivals = {"steps": "epochs", "epochs": "steps"}
    gone = {rival for key, rival in rivals.items() if flags.get(key) is not None}
    return {**{key: value for key, value in file_values.items() if key not in gone}, **flags}


def stored_values(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that is to be resumed: those it was started with, and over them what is given now.

    Raises:
        ConfigError: the run's config.yaml can't be read.
    """
    stored = Path(str(values.get("output"))) / "config.yaml"
    if values.get("resume") is None or not stored.is_file():
        return values
    return over_file(read_yaml(stored), {key: value for key, value in values.items() if value is not None})


def to_yaml(settings: BaseModel) -> str:
    """Settings as YAML that :func:`read_yaml` and :func:`make_settings` turn into the same settings."""
    values = settings.model_dump()
    if values.get("steps") is not None:
        del values["epochs"]
    # YAML takes these for ends of lines unless they are written as escapes.
    breaks = any(mark in str(value) for value in values.values() for mark in "\x85\u2028\u2029")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=not breaks)


def template_yaml() -> str:
    """Every key with its default and what it does, commented out unless it must be given."""
    lines = []
    for key, field in SETTINGS_OF_TRAINING.items():
        choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
        lines.append(f"# {field.description}{': ' + ' | '.join(choices) if choices else ''}")
        if field.is_required():
            lines.append(f"{key}: CHANGE_ME")
        else:
            lines.append(f"# {key}: {yaml.safe_dump(field.default).removesuffix('...' + chr(10)).strip()}")
    return "\n".join(lines)


def demo_config(output: str | None = None, *, steps: int | None = None) -> Config:
    """The demo's training: the embedded model learns to answer a capital's name first. Without an ``output``, the first
    of runs/demo, runs/demo-2, ... that is free."""
    if output is None:
        names = itertools.chain(["runs/demo"], (f"runs/demo-{i}" for i in itertools.count(2)))
        output = next(name for name in names if not Path(name).exists())
    data = Path(__file__).parent / "demo"
    return Config(
        model="smollm2-135m",
        data=str(data / "train.jsonl"),
        eval_data=str(data / "eval.jsonl"),
        output=output,
        learning_rate=3e-4,
        **({"epochs": 2.0} if steps is None else {"steps": steps}),
        num_answers=40,
    )
