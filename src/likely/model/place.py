"""Names of models -> where they stand, and what can be known of them before torch is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from likely import manifest
from likely.errors import ConfigError, LikelyError, ModelError, first_line
from likely.model import embedded
from likely.model.untrusted import (
    ADAPTER_CONFIG,
    COPY,
    check_adapter,
    check_model,
    read_adapter_config,
    read_json,
    read_tensors,
    vocabulary_size,
)
from likely.model.weight_shapes import check_shapes
from likely.strict_yaml import MAX_CHARACTERS, read_settings
from likely.types import Example

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
STEP = re.compile(r"(?:step-)?([0-9]{1,12})")
LONGEST = 1 << 30  # tokens; lengths are held in 32 bits
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "README.md"]
FRONT_MATTER = re.compile(r"\ufeff?---\n(.*?\n)---\n", re.DOTALL)
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}")


@dataclass(frozen=True)
class Place:
    """Where a model stands: a folder or a hub id, and the adapter folder to put on top of it."""

    weights: str
    adapter: str | None = None

    @property
    def tokenizer(self) -> str:
        """The folder of its tokenizer; of a hub id, the small files are fetched for it."""
        return self.adapter or str(local_folder(self.weights))


def quiet_transformers() -> None:
    """Progress and complaints are ours to show."""
    import transformers  # noqa: PLC0415  (not needed to find a model)

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def find_model(name: str) -> Place:
    """A Hugging Face folder, a hub id, a run folder (its tuned model), ``RUN@step-N`` or ``smollm2-135m`` -> its place.

    The folder's files are checked (:mod:`likely.model.untrusted`), its weights not yet read. Nothing is fetched here.

    Raises:
        ConfigError: no name at all.
        ModelError: nothing of that name, or nothing that can be trusted.
    """
    if not name.strip():
        raise ConfigError("the model's name is empty", place="--model", way_out="name a model")
    if name == embedded.NAME:
        folder = embedded.embedded_folder()
        return Place(str(folder) if folder else embedded.HUB_ID)
    try:
        path = _folder_of_run(name) or Path(name)
        if path.is_dir():
            return _place_of_folder(path, name)
        is_hub_id = HUB_ID.fullmatch(name) and not path.parent.is_dir()
    except OSError as error:
        raise ModelError(error.strerror or str(error), place=name, way_out="check the path") from error
    if is_hub_id:
        return Place(name)
    raise ModelError(
        "no such model", place=name, way_out=f"name a model folder, a hub id like org/name, a run, or {embedded.NAME}"
    )


def _folder_of_run(name: str) -> Path | None:
    """The model folder of ``RUN`` or ``RUN@step-N``; None where ``RUN`` is no run folder."""
    run, at, step = name.partition("@")
    if not (Path(run) / "run.json").is_file():
        return None
    path = Path(run) / "model"
    if at:
        number = STEP.fullmatch(step)
        path = Path(run) / "checkpoints" / f"step-{int(number[1]) if number else 0:06d}" / "model"
    if not path.is_dir():
        saved = sorted(p.name for p in (Path(run) / "checkpoints").glob("step-*"))
        raise ModelError(
            f"{'no such checkpoint' if at else 'the run has no tuned model yet'}",
            place=name,
            way_out=f"saved: {', '.join(saved) or 'none'}",
        )
    _require_whole(path.parent if at else path, path)
    return path


def _require_whole(sealed: Path, path: Path) -> None:
    try:
        stamp = (sealed / manifest.NAME).stat().st_mtime_ns if (sealed / manifest.NAME).exists() else 0
        _verify_once(sealed, stamp)
    except ModelError as error:
        raise ModelError(
            error.message, place=error.place, way_out=f"to use it as it is, name the folder {path} itself"
        ) from error


@cache
def _verify_once(sealed: Path, _stamp: int) -> None:
    """A verb finds its model several times, and hashing some gigabytes takes seconds."""
    manifest.verify(sealed)


def _place_of_folder(path: Path, name: str) -> Place:
    if (path / ADAPTER_CONFIG).is_file():
        check_adapter(path)
        return Place(_base_of_adapter(path, name), str(path))
    if not (path / "config.json").is_file():
        raise ModelError("the folder has no config.json", place=name, way_out="name a Hugging Face model folder")
    check_model(path)
    # An adapter remembers this name, and must not mean another folder, or a hub id, elsewhere.
    return Place(str(path.absolute()))


def _base_of_adapter(folder: Path, name: str) -> str:
    base = str(read_adapter_config(folder)["base_model_name_or_path"])
    if embedded.is_converted(base) and not Path(base).is_dir():
        base = embedded.NAME  # converted by another version of transformers, or on another machine
    if (Path(base) / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"the base of this adapter is itself an adapter, {base}", place=name, way_out="merge that one first"
        )
    try:
        return find_model(base).weights
    except LikelyError as error:
        message = f"the base of this adapter can't be used: {error.place}: {error.message}"
        raise ModelError(message, place=name, way_out=error.way_out) from error


def local_folder(weights: str, *, with_weights: bool = False) -> Path:
    """The folder of a place's weights. Of a hub id, safetensors and small files, or the small files alone, are fetched
    into the hub's cache and checked.

    Raises:
        ModelError: they can't be fetched, or not be trusted.
    """
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (half a second that only a hub id needs)

    patterns = [*SMALL_FILES, "*.safetensors"] if with_weights else SMALL_FILES
    try:
        folder = Path(snapshot_download(weights, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # network, names, permissions: each with a class of its own
        raise ModelError(
            f"can't be fetched from the hub: {first_line(error)}",
            place=weights,
            way_out="check the name and the network, or name a local folder",
        ) from error
    check_model(folder, with_weights=with_weights)
    return folder


def licence_of(place: Place) -> str | None:
    """The licence that the card of a model names, as its hub writes it (``apache-2.0``); None where it names none."""
    try:
        with (local_folder(place.weights) / "README.md").open(encoding="utf-8") as card:
            head = card.read(MAX_CHARACTERS)
        metadata = FRONT_MATTER.match(head)
        licence = read_settings(metadata[1]).values.get("license") if metadata else None
    except (OSError, ValueError, LikelyError):
        return None
    return licence if isinstance(licence, str) and LICENCE.fullmatch(licence) else None


def read_context_length(place: Place) -> int:
    """The context length of a model whose weights are not loaded yet.

    Raises:
        ModelError: there is no config that can be read, or it is not that of the weights in its folder.
    """
    from transformers import AutoConfig  # noqa: PLC0415  (not needed to find a model)

    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(local_folder(place.weights), trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:
        message = f"no config that can be read: {first_line(error)}"
        raise ModelError(message, place=place.weights, way_out=COPY) from error
    if Path(place.weights).is_dir():  # of a hub id, only the small files are here
        check_shapes(config, read_tensors(Path(place.weights)))
    return context_length(config)


def check_token_ids(place: Place, largest: int) -> None:
    """Refuse a tokenizer with ids that the model's embedding has no row for; ``largest`` is the
    largest id that is used.

    Raises:
        ModelError: the tokenizer belongs to another model.
    """
    rows = vocabulary_size(read_json(local_folder(place.weights) / "config.json"))
    if rows is not None and largest >= rows:
        raise ModelError(
            f"the tokenizer gives the token id {largest}, and the vocabulary of the model has {rows} tokens",
            place=place.weights,
            way_out="use the tokenizer that belongs to the weights",
        )


def check_same_tokens(name: str, tokenizer: Any, other_name: str, other: Any, examples: Iterable[Example]) -> None:
    """Refuse to compare two models whose token ids don't mean the same text, or that split text in other tokens.

    Raises:
        ConfigError: they differ.
    """
    used = sorted(set().union(*(e.token_ids_T.tolist() for e in examples)))
    parts = [json.loads(t.backend_tokenizer.to_str()) for t in (tokenizer, other)]
    if any(parts[0][key] != parts[1][key] for key in ("normalizer", "pre_tokenizer", "model")) or (
        tokenizer.convert_ids_to_tokens(used) != other.convert_ids_to_tokens(used)
    ):
        raise ConfigError(
            f"{other_name} reads text in other tokens than {name}, so their likelihoods can't be compared",
            place="--base",
            way_out="compare states of one model",
        )


def context_length(config: Any) -> int:
    """The longest sequence (tokens) whose likelihood does not depend on what else is in the batch.

    That is the context the model was made for. Rotary embeddings of type ``dynamic`` and ``longrope`` change every
    position's angle once any sequence of a forward passes the original length, so there it is the original one.
    """
    config = config.get_text_config()
    lengths = [getattr(config, "max_position_embeddings", None) or 1 << 20]
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in {"dynamic", "longrope"}:
            original = parameters.get("original_max_position_embeddings")
            lengths.append(original or getattr(config, "original_max_position_embeddings", None) or lengths[0])
    return int(min(*lengths, LONGEST))


def choose_max_length(place: Place, wanted: int | None) -> int:
    """The longest example allowed: what is wanted, or the model's context.

    Raises:
        ConfigError: more is wanted than the model's context holds.
    """
    context = read_context_length(place)
    if wanted is not None and wanted > context:
        raise ConfigError(
            f"max_length {wanted} is over the model's context of {context} tokens", way_out=f"use at most {context}"
        )
    return wanted or context
