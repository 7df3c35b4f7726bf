"""What the verbs beside ``likely train`` are asked. Fields that a training has too mean the same there."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from likely.config import (
    SETTINGS_OF_TRAINING,
    Config,
    DataFiles,
    Day,
    Name,
    Number,
    PositiveInt,
    a_folder,
    make_config,
    refuse_idle_data_options,
)


def _as_in_training(key: str) -> Any:
    return SETTINGS_OF_TRAINING[key]


class ExplainSettings(BaseModel):
    """What ``likely explain`` is asked: a model's answer, or a distribution given by hand."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="the model to look at: state B")
    base: str | None = Field(None, description="a second state to compare with: state A")
    prompt: str | None = Field(None, description="what the model is asked")
    response: str | None = Field(None, description="the gold answer")
    step: bool = Field(False, description="show what one optimizer step on this example would do")
    learning_rate: Number = Field(1e-5, gt=0, description="of that step")
    rivals: int = Field(3, ge=0, description="other tokens to show")
    distribution: str | None = Field(
        None, description="no model: gold=0.25,Je=0.35 and so on, the gold token first; the rest is spread thinly"
    )
    against: str | None = Field(None, description="a second distribution, compared with the first")
    rate: Number = Field(0.1, gt=0, description="step size on the logits of a distribution")

    @model_validator(mode="after")
    def _one_of_two(self) -> ExplainSettings:
        if self.distribution is None and None in (self.model, self.prompt, self.response):
            raise ValueError("explain needs --model, --prompt and --response, or --distribution")
        if self.distribution is not None and self.model is not None:
            raise ValueError("--distribution is looked at without a model; leave out --model")
        return self


class ReadSettings(BaseModel):
    """Which model reads the data, and how: what every verb is asked that reads them as a training does."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: Name = _as_in_training("model")
    format: Literal["auto", "messages", "prompt_completion", "sharegpt", "alpaca", "text", "tokens"] = _as_in_training(
        "format"
    )
    columns: str | None = _as_in_training("columns")
    template: Literal["auto", "chat", "raw"] = _as_in_training("template")
    template_date: Day = _as_in_training("template_date")
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at a row that is wrong, or leave it out")
    on_too_long: Literal["error", "drop", "truncate_left", "truncate_right"] = _as_in_training("on_too_long")
    max_length: PositiveInt | None = _as_in_training("max_length")


class CheckSettings(ReadSettings):
    """What ``likely check`` is asked. Fields that a training has too mean the same there."""

    eval_data: DataFiles | None = Field(None, description="held-out data: looked for in the training data")
    eval_share: Number | None = _as_in_training("eval_share")
    train_on: Literal["assistant", "last_assistant", "all"] = _as_in_training("train_on")
    prompt_weight: Number = _as_in_training("prompt_weight")
    epochs: Number = _as_in_training("epochs")
    steps: PositiveInt | None = _as_in_training("steps")
    batch_size: PositiveInt = _as_in_training("batch_size")
    pack_tokens: PositiveInt | None = _as_in_training("pack_tokens")
    tune: Literal["full", "lora", "qlora"] = _as_in_training("tune")
    lora_rank: PositiveInt = _as_in_training("lora_rank")
    dtype: Literal["auto", "float32", "bfloat16"] = _as_in_training("dtype")
    seed: int = _as_in_training("seed")
    show: str | None = Field(None, description="show this row instead of three: its line, or file:line")
    plan: str | None = Field(None, description="what a step takes on a cluster: gpus=64,memory=80GB (docs/scaling.md)")
    processes: PositiveInt | None = Field(None, description="worker processes [one for each processor]")

    @model_validator(mode="after")
    def _nothing_idle(self) -> CheckSettings:
        refuse_idle_data_options(self)
        return self


class LookSettings(ReadSettings):
    """What ``likely score`` and ``likely evaluate`` are asked. The data are read as a training reads its held-out data,
    so that whatever was trained on can be scored."""

    base: Name | None = Field(None, description="a second model to compare with")
    seed: int = Field(0, ge=0, lt=2**64, description="chooses the rows of a mix of files")
    nproc: PositiveInt | None = _as_in_training("nproc")


class EvaluateSettings(LookSettings):
    """What ``likely evaluate`` is asked besides."""

    retain: DataFiles | None = _as_in_training("retain")
    guard: DataFiles | None = _as_in_training("guard")
    guard_max_gain: Number | None = _as_in_training("guard_max_gain")
    generate: bool = Field(False, description="answer every prompt greedily and compare with the gold answers")
    generate_tokens: PositiveInt | None = Field(
        None, description="longest answer to generate, in tokens [twice the longest gold answer, and 16]"
    )

    @model_validator(mode="after")
    def _nothing_idle(self) -> EvaluateSettings:
        if self.guard_max_gain is not None and (self.guard is None or self.base is None):
            raise ValueError("guard_max_gain bounds a change, so it needs guard and base; give both")
        if self.generate_tokens is not None and not self.generate:
            raise ValueError("generate_tokens has no effect without generate; give that too")
        return self


class ExportSettings(BaseModel):
    """What ``likely export`` is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    to: Literal["merged", "adapter", "gguf", "ollama"] = Field(
        description="a Hugging Face folder, a PEFT adapter, a GGUF file, or one with Ollama's Modelfile"
    )
    output: Annotated[Name, AfterValidator(a_folder)] = Field(description="folder to create")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="dtype of merged weights; auto is that of the base"
    )
    type: Literal["f32", "f16", "bf16", "q8_0"] = Field("f16", description="how a GGUF file keeps its matrices")
    rows: PositiveInt = Field(32, description="rows to verify the export with")
    data: DataFiles | None = Field(None, description="rows to verify with [the run's held-out rows]")
    push: str | None = Field(None, description="upload to ORG/NAME of the hub, with the token in HF_TOKEN")

    @model_validator(mode="after")
    def _nothing_idle(self) -> ExportSettings:
        if self.dtype != "auto" and self.to != "merged":
            raise ValueError("dtype is that of merged weights; leave it out")
        if "type" in self.model_fields_set and self.to not in {"gguf", "ollama"}:
            raise ValueError("type is that of a GGUF file; leave it out")
        return self


class ChatSettings(BaseModel):
    """What ``likely chat`` is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    compare: bool = Field(False, description="let the run's base answer too, before the tuned model")
    prompt: str | None = Field(None, description="answer this alone, and end")
    system: str | None = Field(None, description="system message to begin with")
    temperature: Number = Field(0.0, ge=0, le=100, description="0 takes the most likely token each time")
    seed: int = Field(0, ge=0, lt=2**63, description="of what is drawn at a temperature")
    max_tokens: PositiveInt = Field(512, description="longest answer, in tokens")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of weights and products; auto is bfloat16 where the device is fast at it"
    )

    @model_validator(mode="after")
    def _no_empty_prompt(self) -> ChatSettings:
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty; write one, or leave --prompt out to talk")
        return self


class CurveSettings(ReadSettings):
    """What ``likely curve`` is asked. All but ``seeds``, ``shares``, ``resume`` and ``nproc`` is a setting of each
    training."""

    data: DataFiles = _as_in_training("data")
    eval_data: DataFiles | None = _as_in_training("eval_data")
    eval_share: Number | None = _as_in_training("eval_share")
    output: Annotated[Name, AfterValidator(a_folder)] = Field(description="folder to create, for every point")
    seeds: PositiveInt = Field(3, description="trainings of each size: with the seeds --seed, --seed + 1 and so on")
    shares: str = Field("1/8,1/4,1/2,1", description="shares of the training rows, one training each and seed")
    epochs: Number = Field(3.0, gt=0, description="passes over the rows of each training, whatever their number")
    steps: PositiveInt | None = Field(None, description="optimizer steps of each training alike, instead of epochs")
    batch_size: PositiveInt = _as_in_training("batch_size")
    order: Literal["examples", "families"] = _as_in_training("order")
    learning_rate: Number | None = _as_in_training("learning_rate")
    schedule: Literal["cosine", "constant"] = _as_in_training("schedule")
    warmup: Number = _as_in_training("warmup")
    weight_decay: Number = _as_in_training("weight_decay")
    max_grad_norm: Number = _as_in_training("max_grad_norm")
    tune: Literal["full", "lora", "qlora"] = _as_in_training("tune")
    lora_rank: PositiveInt = _as_in_training("lora_rank")
    lora_alpha: Number | None = _as_in_training("lora_alpha")
    dtype: Literal["auto", "float32", "bfloat16"] = _as_in_training("dtype")
    pack_tokens: PositiveInt | None = _as_in_training("pack_tokens")
    activation_checkpointing: Literal["auto", "none", "full"] = _as_in_training("activation_checkpointing")
    train_on: Literal["assistant", "last_assistant", "all"] = _as_in_training("train_on")
    prompt_weight: Number = _as_in_training("prompt_weight")
    normalize: Literal["token", "example"] = _as_in_training("normalize")
    seed: int = Field(0, ge=0, lt=2**63, description="the first seed: of the rows, their order and new adapters")
    eval_every: PositiveInt | None = _as_in_training("eval_every")
    patience: PositiveInt | None = Field(
        None, description="judge each training by its best evaluation; stop it after so many without a better one"
    )
    resume: Literal["newest"] | None = Field(None, description="go on with the trainings that are done in --output")
    nproc: PositiveInt | None = _as_in_training("nproc")

    @model_validator(mode="after")
    def _enough_to_compare(self) -> CurveSettings:
        if len(self.sizes) < 3:
            raise ValueError(
                f"shares has {len(self.sizes)} sizes, and a curve needs three; give some, such as 1/4,1/2,1"
            )
        return self

    @property
    def sizes(self) -> list[Fraction]:
        """The shares, the smallest first.

        Raises:
            ValueError: one is no number above 0 and up to 1.
        """
        found = set()
        for part in self.shares.split(","):
            try:
                share = Fraction(part.strip())
            except (ValueError, ZeroDivisionError):
                raise ValueError(f"shares has {part.strip()!r}; write shares such as 1/8,1/4,1/2,1") from None
            if not 0 < share <= 1:
                raise ValueError(f"shares has {part.strip()}, which is not above 0 and up to 1")
            found.add(share)
        return sorted(found)

    def training(self) -> Config:
        """The training of all rows with the first seed.

        Raises:
            ConfigError: the settings don't go together.
        """
        own = {"seeds", "shares", "resume", "nproc"}
        return make_config({key: value for key, value in self.model_dump(exclude_unset=True).items() if key not in own})
