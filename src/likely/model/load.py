"""Names -> models, and models -> folders that transformers and peft load without us."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict

from likely.errors import ConfigError, ModelError, NonFiniteError, first_line
from likely.model.adapters import add_lora, draw_lora_again
from likely.model.forward import LanguageModel, connect
from likely.model.headers import Stored, check_finite
from likely.model.place import Place, find_model, local_folder, quiet_transformers
from likely.model.quantized import NF4, is_quantized, keep_layout, quantization_config
from likely.model.untrusted import (
    COPY,
    IDENTITY,
    check_adapter,
    check_model,
    identity,
    read_adapter_config,
    read_json,
)
from likely.model.weight_shapes import HARMLESS, check_shapes


def read_network(
    place: Place, *, dtype: torch.dtype, trainable: bool = False, quantized: bool = False, expanded: bool = False
) -> Any:
    """The transformers model at a place, with its adapter if there is one. All that its files promise is checked first:
    see :mod:`likely.model.untrusted`.

    Args:
        quantized: linear layers in four bits; the base of an adapter that was trained so is so in any case.
        expanded: the numbers that four bits stand for, as ordinary layers, so that an adapter can be merged into them.

    Raises:
        ConfigError: it is to be quantised, and bitsandbytes is not installed.
        ModelError: the files are not to be trusted, broken, not those of this architecture, or not finite.
    """
    quiet_transformers()
    folder = local_folder(place.weights, with_weights=True)
    tensors = check_model(folder)
    if not tensors:
        raise ModelError("no safetensors weights", place=place.weights, way_out="name a folder with weights")
    four_bits = {"quantization_config": quantization_config()} if quantized or trained_on_nf4(place) else {}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        wanted = check_sizes(config, tensors)
        check_finite({name: t for name, t in tensors.items() if name in wanted or not HARMLESS.search(name)})
        network, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are reported then, and refused below by name
            output_loading_info=True,
            **four_bits,
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"can't be loaded: {first_line(error)}", place=place.weights, way_out=COPY) from error
    check_nothing_left(info, place.weights)
    # The name that an adapter remembers: a hub id stays one, wherever its files are kept.
    network.name_or_path = network.config.name_or_path = place.weights
    network.config.use_cache = True
    if four_bits and expanded:
        network = network.dequantize(dtype)
    elif four_bits:
        keep_layout(network)
    if trainable:
        network.base_sha256 = identity(folder)  # what an adapter that is trained on it remembers
    return network if place.adapter is None else with_adapter(network, place, folder, trainable)


def check_sizes(config: Any, tensors: Mapping[str, Stored]) -> set[str]:
    """Compare with a model that has shapes but no memory, so that a wrong config can't make a large one; the names of
    its weights."""
    check_shapes(config, tensors)
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for name, wanted in skeleton.state_dict().items():
        stored = tensors.get(name)
        if stored and stored.num_elements != wanted.numel():
            raise ModelError(
                f"{name} has shape {list(stored.shape)}, and config.json asks for {list(wanted.shape)}",
                place=str(stored.file),
                way_out="use the config that belongs to the weights",
            )
    wanted_elements = sum(p.numel() for p in skeleton.parameters())
    stored_elements = sum(t.num_elements for t in tensors.values())
    if wanted_elements > stored_elements:
        missing = sorted(skeleton.state_dict().keys() - tensors.keys())
        raise ModelError(
            f"config.json asks for {wanted_elements:,} numbers and the files hold {stored_elements:,}"
            + (f"; missing are {_some(missing)}" if missing else ""),
            place=str(next(iter(tensors.values())).file.parent),
            way_out="name a folder with complete causal language model weights",
        )
    return set(skeleton.state_dict())


def check_nothing_left(info: Mapping[str, Any], place: str) -> None:
    """Every weight of the model came from the files, and every tensor of the files went into the model."""
    unexpected = [name for name in map(str, info["unexpected_keys"]) if not HARMLESS.search(name)]
    for kind, names in (
        ("weights have no value in the files", info["missing_keys"]),
        ("weights have another shape in the files", info["mismatched_keys"]),
        ("tensors of the files have no place in the model of config.json", unexpected),
    ):
        if names:
            raise ModelError(
                f"{len(names)} {kind}: {_some(sorted(map(str, names)))}",
                place=place,
                way_out="name a folder with complete causal language model weights and their own config.json",
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def with_adapter(network: Any, place: Place, base: Path, trainable: bool) -> Any:
    assert place.adapter is not None  # noqa: S101
    folder = Path(place.adapter)
    tensors = check_adapter(folder)
    check_finite(tensors)
    if (folder / IDENTITY).exists() and read_json(folder / IDENTITY).get("base_sha256") not in {None, identity(base)}:
        raise ModelError(
            f"the weights of its base {place.weights} are not those that this adapter was trained on",
            place=place.adapter,
            way_out="bring the old weights back, or train the adapter again",
        )
    try:
        with warnings.catch_warnings():
            # peft still uses names that transformers is leaving, and what it warns of is refused below.
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(network, folder, is_trainable=trainable)
            wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except Exception as error:
        message = f"the adapter can't be loaded: {first_line(error)}"
        raise ModelError(message, place=place.adapter, way_out="copy the whole adapter folder again") from error
    if wrong := sorted(wanted.keys() ^ tensors.keys()):
        what = "is missing from" if wrong[0] in wanted else "has no place in the model of"
        raise ModelError(
            f"{len(wrong)} tensors of the adapter don't fit its base: {wrong[0]} {what} the files",
            place=place.adapter,
            way_out="name the adapter's own base in adapter_config.json",
        )
    return adapted


def trained_on_nf4(place: Place) -> bool:
    """Whether the adapter at a place, if there is one, was trained on a base in four bits."""
    identity_file = Path(place.adapter or "") / IDENTITY
    return place.adapter is not None and identity_file.exists() and read_json(identity_file).get("quantization") == NF4


def load_model(
    name: str,
    *,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    trainable: bool = False,
) -> LanguageModel:
    """The model of a name in float32 weights, ready to be scored; ``trainable``, a step can be taken with it too."""
    network = read_network(find_model(name), dtype=torch.float32, trainable=trainable).to(device or best_device())
    return connect(network, name, compute_dtype=compute_dtype)


@dataclass(frozen=True)
class Tuning:
    """What is trained: all weights (``lora_rank`` None), or adapters of that rank, on a ``quantized`` base or not."""

    lora_rank: int | None = None
    lora_alpha: float | None = None
    seed: int = 0
    quantized: bool = False


def load_for_training(
    name: str, tuning: Tuning, *, compute_dtype: torch.dtype, device: torch.device | None = None
) -> LanguageModel:
    """The model of a name with float32 master weights and something to train.

    Raises:
        ConfigError: an adapter is to go on with another rank or scale than it has.
        ModelError: full tuning of an adapter, which would leave its base behind.
    """
    place = find_model(name)
    if place.adapter is not None:
        check_tuning(place, name, tuning)
    # Whatever a layer may draw in training is a function of the seed.
    torch.manual_seed(tuning.seed)
    network = read_network(place, dtype=torch.float32, trainable=True, quantized=tuning.quantized)
    if tuning.lora_rank is not None and place.adapter is None:
        network = add_lora(network, rank=tuning.lora_rank, alpha=tuning.lora_alpha, seed=tuning.seed)
    network = network.to(device or best_device())
    return connect(network, name, compute_dtype=compute_dtype)


def check_tuning(place: Place, name: str, tuning: Tuning) -> None:
    assert place.adapter is not None  # noqa: S101
    if tuning.lora_rank is None:
        raise ModelError(
            "this is an adapter, and full tuning trains all weights", place=name, way_out="use --tune lora"
        )
    if tuning.quantized != trained_on_nf4(place):
        kind, other = ("qlora", "lora") if trained_on_nf4(place) else ("lora", "qlora")
        raise ConfigError(
            f"tune is {other}, and the adapter to go on with was trained with {kind}",
            place=name,
            way_out=f"use --tune {kind}",
        )
    own = read_adapter_config(Path(place.adapter))
    for flag, asked, has in (
        ("lora_rank", tuning.lora_rank, own.get("r")),
        ("lora_alpha", tuning.lora_alpha, own.get("lora_alpha")),
    ):
        if asked is not None and asked != has:
            raise ConfigError(
                f"{flag} is {asked:g}, and the adapter to go on with has {has}",
                place=name,
                way_out=f"use --{flag.replace('_', '-')} {has}",
            )


def load_for_resuming(
    name: str, saved: Path, *, compute_dtype: torch.dtype, device: torch.device | None = None
) -> LanguageModel:
    """The model that a training of ``name`` had saved in a folder, with float32 master weights and the same things to
    train."""
    place = Place(str(saved))
    if (saved / "adapter_config.json").is_file():
        place = Place(find_model(name).weights, str(saved))
    network = read_network(place, dtype=torch.float32, trainable=True).to(device or best_device())
    return connect(network, name, compute_dtype=compute_dtype)


def save_model(model: LanguageModel, tokenizer: Any, folder: Path) -> None:
    """The weights, or the adapter alone, with the tokenizer and its template, as files of transformers or peft.

    Raises:
        NonFiniteError: a weight is NaN or infinite; nothing is written.
    """
    broken = next((name for name, p in model.network.named_parameters() if not p.isfinite().all()), None)
    if broken:
        raise NonFiniteError(f"the weight {broken} is not finite", way_out="lower --learning-rate; nothing was saved")
    save_files(model, tokenizer, folder)


def save_files(model: LanguageModel, tokenizer: Any, folder: Path, adapter: dict[str, Any] | None = None) -> None:
    """What :func:`save_model` writes.

    Args:
        adapter: the tensors of the adapter by the names of the network's parameters, where the network's own are
            sharded.
    """
    network = model.network
    with model.as_transformers_runs_it():
        if isinstance(network, PeftModel):
            settings = network.active_peft_config
            if isinstance(settings.target_modules, set):  # whose order is another one in each process
                settings.target_modules = sorted(settings.target_modules)
            # "auto" would ask the hub whether the base's vocabulary was resized.
            network.save_pretrained(folder, save_embedding_layers=False, state_dict=adapter)
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty form for a model card
            base = {
                "base": settings.base_model_name_or_path,
                "base_sha256": model.causal_lm.base_sha256,
                **({"quantization": NF4} if is_quantized(network) else {}),
            }
            (folder / IDENTITY).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")
        else:
            network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def checksum(model: LanguageModel) -> list[float]:
    """A number for each parameter, by which two processes see that they start from the same weights."""
    sums = [p.sum(dtype=torch.float64) for p in model.network.parameters()]
    return torch.stack(sums).cpu().tolist()


def bytes_to_save(model: LanguageModel) -> int:
    """Bytes on disk of one checkpoint (weights or adapter, and AdamW's two moments) and of the tuned model."""
    parameters = list(model.network.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    saved = trainable if isinstance(model.network, PeftModel) else sum(p.numel() for p in parameters)
    return int(4 * (2 * saved + 2 * trainable))


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies it in hardware, else float32."""
    if wanted != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[wanted]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


class Restart:
    """Takes a model that :func:`load_for_training` gave back to where its training began, as often as wanted, without
    loading it again: new adapters are drawn anew; of whatever else is trained a copy is kept in the host's memory."""

    def __init__(self, model: LanguageModel, tuning: Tuning) -> None:
        self._network = model.network
        self._draws = tuning.lora_rank is not None and find_model(model.name).adapter is None
        trained = {} if self._draws else {n: p for n, p in model.network.named_parameters() if p.requires_grad}
        self._kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}

    @torch.no_grad()
    def begin(self, seed: int) -> None:
        """The weights are those that ``load_for_training`` gives with this seed, to the bit."""
        torch.manual_seed(seed)
        if self._draws:
            draw_lora_again(self._network, seed=seed)
        for name, parameter in self._network.named_parameters():
            if name in self._kept:
                parameter.copy_(self._kept[name])
