"""Model folders from outside: everything in them is checked before transformers or peft may build anything from it.

A folder is data. What would make a library run code, fetch a file, read another place or allocate without bound is
refused by name: pickled weights, ``auto_map``, attention that is code of the hub, shards outside the folder, a config
that is larger than its weights. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from likely.errors import ConfigError, ModelError, first_line
from likely.model.headers import Stored, hash_files, read_header, unique_keys

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
IDENTITY = "likely.json"  # beside an adapter: the base it was trained on

PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
OTHER_FORMATS = {".h5", ".msgpack", ".gguf", ".onnx", ".npz"}
COPY = "copy or download the model's files again"
CONVERT = "load it once where you trust it and write safetensors: model.save_pretrained(folder)"

MAX_JSON_BYTES = {"tokenizer.json": 128 << 20, "vocab.json": 128 << 20, INDEX: 32 << 20}
MAX_OTHER_JSON_BYTES = 8 << 20
MAX_TOKEN_ID = 10_000_000  # the tokenizers library makes a table that is as long as the largest id
MAX_DEPTH = 32
MAX_EXPERTS = 4096
MAX_LABELS = 100_000  # of a classifier, which no model here is, but transformers makes a name for each
# Numbers that are reckoned with before a model is built: key -> the least that makes sense.
LEAST = {"max_position_embeddings": 2, "original_max_position_embeddings": 1, "model_max_length": 1, "vocab_size": 1}
READ_BY_LIBRARIES = {".json", ".safetensors", ".jinja", ".txt", ".model"}
JSON_OF_A_MODEL = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")

_LAYERS = re.compile(r"n_layers?|num_(hidden_)?layers|num_(en|de)coder_layers|(en|de)coder_layers")
_EXPERTS = re.compile(r"(n|num)_.*experts")
_LARGE_NUMBER = re.compile(rb"[:,\[]\s*\d{8,}")
_VOCABULARY = "vocab_size"
_UNSAFE_TORCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def check_environment() -> None:
    """Refuse to work where torch was told to unpickle whatever it is given.

    Raises:
        ConfigError: the environment variable is set.
    """
    if os.environ.get(_UNSAFE_TORCH, "").lower() in {"1", "y", "yes", "true"}:
        raise ConfigError(f"{_UNSAFE_TORCH} is set, so that loading may run code", way_out=f"unset {_UNSAFE_TORCH}")


def check_model(folder: Path, *, with_weights: bool = True) -> dict[str, Stored]:
    """Check a model folder and give its tensors by name; empty where it has no weights at all.

    Args:
        with_weights: False where only the small files are there yet.

    Raises:
        ConfigError: see :func:`check_environment`.
        ModelError: something in the folder is broken or not to be trusted; it is named.
    """
    check_environment()
    _check_files(folder)
    if (folder / ADAPTER_CONFIG).exists():  # transformers would put the adapter on top by itself
        raise ModelError("an adapter stands among the weights", place=str(folder), way_out="keep them in two folders")
    for name in JSON_OF_A_MODEL:
        if (folder / name).exists():
            _check_settings(read_json(folder / name), folder / name)
    config = read_json(folder / "config.json")
    tensors = read_tensors(folder) if with_weights else {}
    _check_size(config, len(tensors), folder / "config.json")
    if with_weights and not tensors:
        _refuse_other_formats(folder, "")
    return tensors


def check_adapter(folder: Path) -> dict[str, Stored]:
    """Check an adapter folder and give its tensors by name.

    Raises:
        ConfigError: see :func:`check_environment`.
        ModelError: something in the folder is broken or not to be trusted; it is named.
    """
    check_environment()
    _check_files(folder)
    config = read_adapter_config(folder)
    for name in JSON_OF_A_MODEL:
        if (folder / name).exists():
            _check_settings(read_json(folder / name), folder / name)
    if not (folder / ADAPTER_WEIGHTS).exists():
        _refuse_other_formats(folder, "adapter")
        raise ModelError(f"the adapter has no {ADAPTER_WEIGHTS}", place=str(folder), way_out="copy the whole folder")
    tensors = read_header(folder / ADAPTER_WEIGHTS)
    for name, tensor in tensors.items():
        if config.get("rank_pattern") or not name.endswith((".lora_A.weight", ".lora_B.weight")):
            continue
        rank = tensor.shape[0 if ".lora_A." in name else -1] if tensor.shape else 0
        if rank != config["r"]:
            message = f"{name} has rank {rank}, and {ADAPTER_CONFIG} says r is {config['r']}"
            raise ModelError(message, place=str(folder), way_out="copy the whole adapter folder again")
    return tensors


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter, checked: ``base_model_name_or_path`` is a name, ``r`` a rank if there is one.

    Raises:
        ModelError: they are broken, or would make peft import a module.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    _check_settings(config, path)
    for key in ("auto_mapping", "megatron_config"):
        if config.get(key):
            message = f"{key} would import code that the file names"
            raise ModelError(message, place=str(path), way_out=f"set {key} to null if you trust the rest")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or "://" in base or "\0" in base:
        raise ModelError(
            f"the adapter does not say which model it belongs to: base_model_name_or_path is {base!r}",
            place=str(path),
            way_out="write the name or folder of that model there",
        )
    rank = config.get("r", 1)
    if type(rank) is not int or rank < 1:
        raise ModelError(f"r is {rank!r}, no rank of an adapter", place=str(path), way_out=COPY)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of bounded size and depth.

    Raises:
        ModelError: it is no such file.
    """
    try:
        size = path.stat().st_size
        limit = MAX_JSON_BYTES.get(path.name, MAX_OTHER_JSON_BYTES)
        if size > limit:
            raise ModelError(f"{size:,} bytes, over the limit of {limit:,}", place=str(path), way_out=COPY)
        value = json.loads(path.read_bytes().decode(), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise ModelError(f"can't be read as JSON: {detail}", place=str(path), way_out=COPY) from error
    if not isinstance(value, dict):
        raise ModelError("no JSON object", place=str(path), way_out=COPY)
    return value


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding as config.json says it, also where the language model is a part of the whole."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and type(part.get(_VOCABULARY)) is int:
            return int(part[_VOCABULARY])
    return None


def identity(folder: Path) -> str:
    """What makes a base another base: SHA-256 over its weights files."""
    return hash_files(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads from a model folder; none where there are none.

    Raises:
        ModelError: the index is broken or names a file outside the folder.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    return sorted({folder / name for name in _read_index(folder).values()})


def _read_index(folder: Path) -> dict[str, str]:
    if not (folder / INDEX).exists():
        return {}
    path = folder / INDEX
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError("no weight_map", place=str(path), way_out=COPY)
    for name in set(map(str, shards.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII) or not (folder / name).is_file():
            message = f"{name[:120]!r} is not the name of a safetensors file in this folder"
            raise ModelError(message, place=str(path), way_out="copy or download the folder again")
    return shards


def read_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder by name, from the headers of its files; empty where there are none.

    Raises:
        ModelError: a file or the index is broken, or they contradict each other.
    """
    if (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS)
    shards = _read_index(folder)
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        header = read_header(file)
        promised = {name for name, shard in shards.items() if shard == file.name}
        if wrong := sorted(promised ^ header.keys()):
            where = "lacks" if wrong[0] in promised else "has without being asked for"
            message = f"{len(wrong)} tensors differ from {INDEX}; the file {where} {wrong[0]}"
            raise ModelError(message, place=str(file), way_out="copy or download the folder again")
        found |= header
    return found


def _check_files(folder: Path) -> None:
    """Every file that a library may open is an ordinary one, of bounded size, inside the folder."""
    try:
        paths = sorted(p for p in folder.iterdir() if p.suffix in READ_BY_LIBRARIES)
    except OSError as error:
        raise ModelError(error.strerror or str(error), place=str(folder), way_out="make it readable") from error
    inside = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":  # the hub's cache: each file is a link to its content
        inside.append(folder.resolve().parent.parent / "blobs")
    for path in paths:
        try:
            real = path.resolve()
        except (OSError, RuntimeError) as error:  # up to Python 3.12 a loop of links is a RuntimeError
            raise ModelError("a link that leads back to itself", place=str(path), way_out="put a file there") from error
        if path.is_symlink() and not any(real.is_relative_to(place) for place in inside):
            raise ModelError("a link out of the model folder", place=str(path), way_out="put the file itself there")
        if not path.is_file():
            if path.is_dir():
                continue
            raise ModelError("a broken link, a pipe or a device", place=str(path), way_out="put a file there")
        limit = MAX_JSON_BYTES.get(path.name, MAX_OTHER_JSON_BYTES)
        if path.suffix == ".json" and path.stat().st_size > limit:
            raise ModelError(
                f"{path.stat().st_size:,} bytes, over the limit of {limit:,}", place=str(path), way_out=COPY
            )
        if path.name == "tokenizer.json":
            _check_token_ids(path)


def _check_token_ids(path: Path) -> None:
    if not _LARGE_NUMBER.search(path.read_bytes()):  # many times faster than to read it all
        return
    content = read_json(path)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [value for key, value, _ in _walk({**content, "model": None}) if key == "id"]
    largest = max((value for value in ids if isinstance(value, int)), default=0)
    if largest > MAX_TOKEN_ID:
        message = f"a token has id {largest}, over the limit of {MAX_TOKEN_ID:,}"
        raise ModelError(message, place=str(path), way_out=COPY)


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    def refuse(message: str, way_out: str) -> ModelError:
        return ModelError(message, place=str(path), way_out=way_out)

    for key, value, depth in _walk(settings):
        if depth > MAX_DEPTH:
            raise refuse(f"nested over {MAX_DEPTH} levels", "name another model")
        if (key in {"auto_map", "trust_remote_code"} and value) or key.endswith("_internal"):
            raise refuse(
                f"{key} asks for code that is not part of transformers, and such code is never run",
                f"remove {key} in a copy of the folder if transformers knows this architecture by itself",
            )
        if key.endswith("_implementation") and not _is_plain_word(value):
            raise refuse(f"{key} is {str(value)[:80]!r}, code that would be fetched", f"remove {key}")
        least = LEAST.get(key)
        if least and value is not None and (type(value) not in {int, float} or not value >= least):
            raise refuse(f"{key} is {str(value)[:40]!r}", f"write a number of at least {least}")
        if key == "rope_type" and value is not None and not isinstance(value, str):
            raise refuse(f"{key} is {str(value)[:40]}", "write its name")
        if key == "num_labels" and not (type(value) is int and 0 <= value <= MAX_LABELS):
            raise refuse(f"{key} is {str(value)[:40]}", "remove it: a language model has no labels")
        if key == "transformers_weights" and value:
            raise refuse(f"{key} names other weights than {WEIGHTS}", f"rename the file and remove {key}")
        if key == "quantization_config" and value:
            method = value.get("quant_method", "unknown") if isinstance(value, dict) else value
            raise refuse(f"the weights are quantised ({method})", "name the model's unquantised weights")


def _is_plain_word(value: Any) -> bool:
    words = value.values() if isinstance(value, dict) else [value]
    return all(word is None or (isinstance(word, str) and re.fullmatch(r"\w*", word)) for word in words)


def _walk(value: Any, depth: int = 1) -> Iterator[tuple[str, Any, int]]:
    """``(key, value, depth)`` of every entry of nested objects and lists."""
    entries = value.items() if isinstance(value, dict) else (("", v) for v in value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield key, inner, depth
        if depth <= MAX_DEPTH:
            yield from _walk(inner, depth + 1)


def _check_size(config: dict[str, Any], num_tensors: int, path: Path) -> None:
    """A layer is at least one tensor, so a config with more layers than tensors is for other weights, or a bomb."""
    vocabulary = vocabulary_size(config)
    for key, value, _ in _walk(config):
        limit = MAX_EXPERTS if _EXPERTS.fullmatch(key) else num_tensors or 1024 if _LAYERS.fullmatch(key) else None
        if limit is not None and value is not None and (type(value) is not int or not 0 <= value <= limit):
            message = f"{key} is {str(value)[:40]}, and the files hold {num_tensors} tensors"
            raise ModelError(message, place=str(path), way_out="use the config that belongs to the weights")
        if key == "eos_token_id" and vocabulary is not None:
            for token in value if isinstance(value, list) else [value]:
                if token is not None and (type(token) is not int or not 0 <= token < vocabulary):
                    message = f"eos_token_id is {str(token)[:40]}, outside the vocabulary of {vocabulary}"
                    raise ModelError(message, place=str(path), way_out="use the config that belongs to the weights")


def _refuse_other_formats(folder: Path, prefix: str) -> None:
    """Name the weights that are there in a format that is not read."""
    found = sorted(p for p in folder.iterdir() if p.name.startswith(prefix) and p.suffix in PICKLED | OTHER_FORMATS)
    if found:
        kind = "a pickle, which can run code when it is read" if found[0].suffix in PICKLED else "no safetensors"
        raise ModelError(f"the weights are {kind}", place=str(found[0]), way_out=CONVERT)
    if shards := sorted(folder.glob("*.safetensors")):
        message = f"neither {WEIGHTS} nor {INDEX}, though {shards[0].name} is there"
        raise ModelError(message, place=str(folder), way_out="copy or download the whole folder")
