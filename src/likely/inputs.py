"""What a training needs before its first step: data, renderer, yardsticks and a resolved config; then a loaded model
and a plan of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from likely import outcome
from likely.config import Config
from likely.data.cache import load_kept
from likely.data.dataset import Dataset, Request
from likely.data.formats import read_options
from likely.data.mixture import absolute_parts
from likely.data.order import prefix_families
from likely.data.packing import choose_pack_tokens
from likely.data.render import Renderer, Supervision, load_tokenizer
from likely.data.split import hold_out, told_of_split
from likely.errors import ConfigError
from likely.model import load as models
from likely.model.forward import LanguageModel
from likely.model.place import Place, check_token_ids, choose_max_length, find_model
from likely.training import engine, memory
from likely.training.log import Display
from likely.training.parallel import ALONE, Ranks
from likely.types import Example


@dataclass(frozen=True)
class Inputs:
    """What a training needs before any weight is loaded; complete and checked, or an error was raised."""

    place: Place
    tokenizer: Any
    renderer: Renderer
    data: Dataset
    eval_data: Dataset | None
    yardsticks: outcome.Yardsticks
    config: Config  # resolved: no None where a number is meant

    def identity(self) -> dict[str, Any]:
        """What decides the result, but for the weights."""
        eval_data = self.eval_data.sha256 if self.eval_data else None
        return {"data": [self.data.sha256, eval_data], "renderer": self.renderer.identity(), **self.config.model_dump()}


def read_inputs(config: Config, display: Display) -> Inputs:
    """Read and render all data of a training.

    Raises:
        LikelyError: the model, the data or their combination can't be used.
    """
    place = find_model(config.model)
    tokenizer = load_tokenizer(place.tokenizer)
    supervision = Supervision(config.train_on, config.prompt_weight)
    renderer = Renderer(tokenizer, supervision, config.template, config.template_date)
    limit = choose_max_length(place, config.max_length)
    options = read_options(config.format, config.columns, config.on_bad_row == "skip", config.seed)

    # Held-out data is always judged by the answers, whatever training gives weight to.
    judge = Renderer(tokenizer, template=config.template, template_date=config.template_date)
    judging = Request(config.eval_data or config.data, judge, limit, options, config.on_too_long)
    data = load_kept(Request(config.data, renderer, limit, options, config.on_too_long), display.counting)
    eval_data = load_kept(judging, display.counting) if config.eval_data else None
    for dataset in filter(None, (data, eval_data)):
        check_token_ids(place, dataset.largest_token)
        for line in dataset.told:
            display.say(line)
        if dataset.num_unweighted:
            display.say(f"{dataset.path}: {dataset.num_unweighted} examples have weight 0 throughout and are left out")
    if eval_data and eval_data.sha256 == data.sha256:
        display.say(f"{eval_data.path} is the training data itself: its figures say nothing about new examples")
    share = config.eval_share
    if eval_data is None and share != 0:
        data, eval_data, share = hold_out(data, share, config.seed, judging)
        display.say(told_of_split(data, eval_data, asked=config.eval_share is not None))
    if config.eval_every is not None and eval_data is None:
        raise ConfigError("eval_every has nothing to score: no rows are held out", way_out="give --eval-data")
    pack_tokens = _pack_tokens(config.pack_tokens, [data, eval_data])
    resolved = _resolve(config, max_length=limit, pack_tokens=pack_tokens, eval_share=share or 0.0)
    retain = outcome.read_retain(config.retain, judge, limit, display)
    guard = outcome.read_guard(config.guard, judge, limit)
    check_token_ids(place, max(retain.largest_token if retain else 0, guard.largest_token if guard else 0))
    yardsticks = outcome.Yardsticks(tokenizer, judge, eval_data, retain, guard, pack_tokens, config.num_answers)
    return Inputs(place, tokenizer, renderer, data, eval_data, yardsticks, resolved)


def _pack_tokens(wanted: int | None, datasets: Sequence[Dataset | None]) -> int:
    """Trie tokens of a forward, with room for every example."""
    longest = max((d for d in datasets if d), key=lambda d: int(d.table.length_N.max()))
    length_N = longest.table.length_N
    return choose_pack_tokens(wanted, int(length_N.max()), longest.examples[int(length_N.argmax())].source)


def _resolve(config: Config, **chosen: float) -> Config:
    """The config with nothing left to a default that another machine, folder or version might choose otherwise."""
    dtype = models.choose_compute_dtype(config.dtype, models.best_device())
    alpha = config.lora_alpha if config.lora_alpha is not None or config.tune == "full" else 2.0 * config.lora_rank
    places = {key: getattr(config, key) for key in ("model", "output")}
    return config.model_copy(
        update={
            **{key: str(Path(place).absolute()) for key, place in places.items() if Path(place).exists()},
            "data": absolute_parts(config.data),
            "eval_data": absolute_parts(config.eval_data) if config.eval_data else None,
            "retain": absolute_parts(config.retain) if config.retain not in (None, outcome.BUNDLED) else config.retain,
            "guard": str(Path(config.guard).absolute()) if config.guard else None,
            "learning_rate": config.peak_learning_rate,
            **chosen,
            "dtype": str(dtype).removeprefix("torch."),
            "lora_alpha": alpha,
        }
    )


def load_model(
    inputs: Inputs, saved: Path | None = None, ranks: Ranks = ALONE, *, sharded: bool = False
) -> LanguageModel:
    """The model that is to be trained: as its base is, or as this training saved it in a folder. ``sharded``, each of
    the ranks holds some rows of each weight."""
    config, dtype = inputs.config, models.choose_compute_dtype(inputs.config.dtype, models.best_device())
    sharers = ranks.local_world_size
    if sharded:
        from likely.training.sharding import load_sharded  # noqa: PLC0415  (takes half a second)

        model = load_sharded(config.model, tuning_of(config), ranks, compute_dtype=dtype, saved=saved)
    elif saved is not None:
        model = models.load_for_resuming(config.model, saved, compute_dtype=dtype)
    else:
        model = models.load_for_training(config.model, tuning_of(config), compute_dtype=dtype)
    memory.set_limits(model, config.activation_checkpointing, sharers)
    if model.activation_room != 0:
        memory.keep_freed_memory()
    return model


def shards(inputs: Inputs, wanted: str, ranks: Ranks) -> bool:
    """Whether the ranks shard the model: as it is ``wanted``, and with ``auto`` where some rank has no room for all of
    it, with its gradient and AdamW's averages.

    Raises:
        ConfigError: it is wanted, and can't be.
    """
    quantized, always = inputs.config.tune == "qlora", wanted in {"full", "hybrid"}
    if always and (quantized or ranks.alone):
        why = "a base in four bits is not sharded" if quantized else "there is one process"
        raise ConfigError(f"shard is {wanted}, and {why}", way_out="use --nproc or torchrun, or --shard none")
    if wanted == "hybrid":
        ranks.shard_by_host()
    if wanted != "auto" or quantized or ranks.alone:
        return always
    fits = memory.fits(inputs.place, tuning_of(inputs.config), ranks.local_world_size)
    return not all(float(rank[0]) for rank in ranks.gather(np.array([float(fits)])))


def tuning_of(config: Config) -> models.Tuning:
    """What of the model a config trains."""
    rank = None if config.tune == "full" else config.lora_rank
    return models.Tuning(rank, config.lora_alpha, config.seed, quantized=config.tune == "qlora")


def plan_of(config: Config, total: int, examples: Sequence[Example]) -> engine.TrainingPlan:
    """What the loop needs to know of a resolved config."""
    assert config.pack_tokens is not None  # noqa: S101  (resolved)
    return engine.TrainingPlan(
        num_steps=total,
        batch_size=config.batch_size,
        pack_tokens=config.pack_tokens,
        peak_learning_rate=config.peak_learning_rate,
        warmup=config.warmup,
        schedule=config.schedule,
        max_grad_norm=config.max_grad_norm,
        normalize=config.normalize,
        seed=config.seed,
        family_N=prefix_families(examples) if config.order == "families" else None,
    )
