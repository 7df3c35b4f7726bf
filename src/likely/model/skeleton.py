"""A model that has shapes and no memory, and where in its files each of its numbers stands: so that a process which
owns some rows of each weight reads those and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from likely.errors import ModelError, first_line
from likely.model.adapters import add_lora
from likely.model.decoder import NotRecognisedError, read_decoder
from likely.model.headers import Stored
from likely.model.load import Tuning, check_nothing_left, check_sizes, check_tuning, with_adapter
from likely.model.place import Place, find_model, local_folder, quiet_transformers
from likely.model.untrusted import COPY, check_model, identity
from likely.model.weight_shapes import HARMLESS


@dataclass(frozen=True)
class Skeleton:
    """``network`` has its weights on the meta device, and its adapters, which are small, in memory; ``held`` says of
    each weight without memory, by its name, what file it stands in, and by what name there."""

    network: Any
    held: dict[str, tuple[Path, str]]

    def save_hash(self) -> None:
        """Let an adapter that is trained on it remember the files; all of them are read."""
        causal_lm = getattr(self.network, "get_base_model", lambda: self.network)()
        causal_lm.base_sha256 = identity(next(iter(self.held.values()))[0].parent)


def make_skeleton(name: str, tuning: Tuning, saved: Path | None = None) -> Skeleton:
    """Of the model of a name, with something to train; or as a training of it had saved it in a folder.

    Raises:
        ConfigError, ModelError: as of :func:`likely.model.load.load_for_training`, or its layers are not of a class
            that can be sharded.
    """
    place = find_model(name)
    if saved is not None:
        adapted = (saved / "adapter_config.json").is_file()
        place = Place(place.weights, str(saved)) if adapted else Place(str(saved))
    elif place.adapter is not None:
        check_tuning(place, name, tuning)
    torch.manual_seed(tuning.seed)
    quiet_transformers()
    folder = local_folder(place.weights, with_weights=True)
    tensors = check_model(folder)
    if not tensors:
        raise ModelError("no safetensors weights", place=place.weights, way_out="name a folder with weights")
    network = _bare(folder, tensors, place.weights)
    files = {id(p): (tensors[name].file, name) for name, p in network.named_parameters()}
    if place.adapter is not None or tuning.lora_rank is not None:
        with _seeming_to_be_there(network):
            if place.adapter is not None:
                network = with_adapter(network, place, folder, trainable=True)
            elif tuning.lora_rank is not None:
                network = add_lora(network, rank=tuning.lora_rank, alpha=tuning.lora_alpha, seed=tuning.seed)
    # Adapters stand between a layer and its old name.
    return Skeleton(network, {name: files[id(p)] for name, p in network.named_parameters() if id(p) in files})


def _bare(folder: Path, tensors: Mapping[str, Stored], place: str) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_sizes(config, tensors)
        with torch.device("meta"):
            network = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        if (folder / "generation_config.json").is_file():
            network.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        read_decoder(network)
    except ModelError:
        raise
    except NotRecognisedError as error:
        raise ModelError(f"it can't be sharded: {error}", place=place, way_out="use --shard none") from error
    except Exception as error:
        raise ModelError(f"can't be loaded: {first_line(error)}", place=place, way_out=COPY) from error
    wanted = dict(network.named_parameters())
    known = network.state_dict()
    check_nothing_left(
        {
            "missing_keys": [name for name in wanted if name not in tensors],
            "mismatched_keys": [n for n, p in wanted.items() if n in tensors and tensors[n].shape != tuple(p.shape)],
            "unexpected_keys": [name for name in tensors if name not in known and not HARMLESS.search(name)],
        },
        place,
    )
    # The frequencies stand in no file.
    network.model.rotary_emb = type(network.model.rotary_emb)(config)
    network.name_or_path = network.config.name_or_path = place
    network.config.use_cache = True
    return network.eval()


@contextmanager
def _seeming_to_be_there(network: Any) -> Iterator[None]:
    """Inside, weights of the meta device are on the CPU, and one number each: peft makes adapters where the weights
    are, and on the meta device it would draw nothing."""
    meta = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                meta[module, name] = parameter
    stand_ins = {id(p): nn.Parameter(torch.zeros(1).expand(p.shape)) for p in meta.values()}
    for (module, name), parameter in meta.items():
        module._parameters[name] = stand_ins[id(parameter)]
    yield
    for (module, name), parameter in meta.items():
        module._parameters[name] = parameter.requires_grad_(stand_ins[id(parameter)].requires_grad)


def read_rows(place: tuple[Path, str], first: int, stop: int) -> Tensor:
    """Rows ``first`` to ``stop - 1`` of a weight in a file, in float32.

    Raises:
        ModelError: one of their numbers is not finite.
    """
    file, name = place
    with safe_open(file, framework="pt") as opened:
        rows: Tensor = opened.get_slice(name)[first:stop].to(torch.float32)
    # Least and most of some numbers take no memory, as a comparison of all of them would; NaN is both.
    if rows.numel() and not torch.stack(rows.aminmax()).isfinite().all():
        raise ModelError(
            f"the weight {name} has NaN or infinite numbers",
            place=str(file),
            way_out="take the weights from before they broke",
        )
    return rows
