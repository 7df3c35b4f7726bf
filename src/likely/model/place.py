"""Names of models -> where they stand, and what can be known of them before torch is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from likely.errors import ModelError, first_line
from likely.model import embedded

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Place:
    """Where a model stands: a folder or a hub id, and the adapter folder to put on top of it."""

    weights: str
    adapter: str | None = None

    @property
    def tokenizer(self) -> str:
        return self.adapter or self.weights


def quiet_transformers() -> None:
    """Progress and complaints are ours to show."""
    import transformers  # noqa: PLC0415  (not needed to find a model)

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def find_model(name: str) -> Place:
    """A Hugging Face folder, a hub id, a run folder (its tuned model), ``RUN@step-N`` or ``smollm2-135m`` -> its place.

    Nothing is fetched here; a hub id is fetched by :func:`load_model`.

    Raises:
        ModelError: nothing of that name.
    """
    if name == embedded.NAME:
        folder = embedded.embedded_folder()
        return Place(str(folder) if folder else embedded.HUB_ID)
    run, _, step = name.partition("@")
    path = Path(name)
    if (Path(run) / "run.json").is_file():
        path = Path(run) / "model"
        if step:
            number = step.removeprefix("step-")
            path = Path(run) / "checkpoints" / (f"step-{int(number):06d}" if number.isdigit() else step) / "model"
        if not path.is_dir():
            saved = sorted(p.name for p in (Path(run) / "checkpoints").glob("step-*"))
            raise ModelError(
                f"{'no such checkpoint' if step else 'the run has no tuned model yet'}",
                place=name,
                way_out=f"saved: {', '.join(saved) or 'none'}",
            )
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return Place(find_model(_base_of_adapter(path)).weights, str(path))
        if not (path / "config.json").is_file():
            raise ModelError("the folder has no config.json", place=name, way_out="name a Hugging Face model folder")
        # An adapter remembers this name, and must not mean another folder, or a hub id, elsewhere.
        return Place(str(path.absolute()))
    if HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return Place(name)
    raise ModelError(
        "no such model", place=name, way_out=f"name a model folder, a hub id like org/name, a run, or {embedded.NAME}"
    )


def _base_of_adapter(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError("the adapter does not say which model it belongs to", place=str(folder)) from error
    return str(base)


def read_context_length(place: Place) -> int:
    """The context length of a model whose weights are not loaded yet.

    Raises:
        ModelError: there is no config that can be read.
    """
    from transformers import AutoConfig  # noqa: PLC0415  (not needed to find a model)

    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(place.weights, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"no config that can be read: {first_line(error)}", place=place.weights) from error
    return context_length(config)


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
    return int(min(lengths))
