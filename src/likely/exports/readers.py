"""Exports as the tools read that will use them, in those tools' own plain calls: nothing here knows how they were made.

Each reader gives the log-probability of a row's tokens, the tokens of a text, and what the tool knows of the template
and of the tokens to stop at.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from likely.errors import ModelError, first_line
from likely.exports import gguf_file, stored
from likely.model.load import trained_on_nf4
from likely.model.place import Place, quiet_transformers
from likely.model.quantized import NF4, quantization_config
from likely.model.untrusted import ADAPTER_CONFIG, read_json
from likely.types import FloatArray

# Keys that transformers' GGUF reader leaves to its defaults -> the setting that it leaves.
_OVERLOOKED = {
    "qwen3.attention.key_length": "head_dim",
    "gpt2.context_length": "n_positions",
    "gpt2.vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class Reading:
    """What a tool makes of an export.

    ``logprobs(ids)`` gives log P(ids[t] | ids before t) for t = 1 .. T-1 in nats; ``encode(text)`` the ids of a text
    whose control tokens are obeyed, with nothing put around it, and ``encode_raw`` with what the tool puts around any
    text; ``template`` is the chat template, ``variables`` the special tokens that it may name; ``stop_ids`` are the
    tokens that generation ends at, ``told_stop_ids`` those of them that the tool must be told of; ``dtype`` is that of
    the weights; ``stored()`` are the digests of all that is stored.
    """

    tool: str
    dtype: str
    logprobs: Callable[[Sequence[int]], FloatArray]
    encode: Callable[[str], list[int]]
    encode_raw: Callable[[str], list[int]]
    template: Any
    variables: Mapping[str, Any]
    stop_ids: frozenset[int]
    stored: Callable[[], stored.Digests]
    told_stop_ids: frozenset[int] = frozenset()


def read_folder(folder: Path) -> Reading:
    """A Hugging Face folder, by transformers.

    Raises:
        ModelError: it can't be loaded.
    """
    with _said_of(folder):
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    reading = _of_transformers(f"transformers {transformers.__version__}", network, tokenizer)
    return replace(reading, stored=lambda: of_folder(network, folder))


def of_folder(network: Any, folder: Path) -> stored.Digests:
    """The digests of a Hugging Face folder, and of the network that was saved to it or loaded from it."""
    digests = stored.of_network(network) | stored.of_settings(network)
    return digests | stored.of_tensor_files(folder) | stored.of_files(folder, but=stored.WEIGHTS)


def read_adapter(folder: Path) -> Reading:
    """An adapter on its base, by peft.

    Raises:
        ModelError: they can't be loaded.
    """
    from peft import PeftModel  # noqa: PLC0415  (after likely.model, which keeps the libraries that it loads quiet)

    with _said_of(folder):
        base = read_json(folder / ADAPTER_CONFIG)["base_model_name_or_path"]
        four_bits = trained_on_nf4(Place(base, str(folder)))
        settings = {"quantization_config": quantization_config(), "dtype": torch.float32} if four_bits else {}
        network = transformers.AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, **settings)
        tuned = PeftModel.from_pretrained(network, str(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        own = _stops_of(network.generation_config)
        told = _stops_of(transformers.GenerationConfig.from_pretrained(folder)) - own
    reading = _of_transformers(f"peft {importlib.metadata.version('peft')}", tuned, tokenizer, own | told)
    dtype = NF4 if four_bits else reading.dtype
    return replace(reading, told_stop_ids=told, dtype=dtype, stored=lambda: stored.of_files(folder))


def read_gguf(file: Path) -> Reading:
    """A GGUF file, by llama.cpp where llama-cpp-python is installed, else by transformers' reader.

    Raises:
        ModelError: it can't be loaded.
    """
    metadata, names = gguf_header(file)
    reading = _of_llama_cpp(file, metadata) if has_llama_cpp() else _of_gguf_reader(file, metadata, names)
    beside = file.suffix
    return replace(reading, stored=lambda: gguf_file.read_digests(file) | stored.of_files(file.parent, but=beside))


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def gguf_header(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys and values of a GGUF file, without its arrays, and the names of its tensors; by the library that the
    format comes with."""
    from gguf import GGUFReader, GGUFValueType  # noqa: PLC0415  (an extra)

    with _said_of(file):
        reader = GGUFReader(file)
        fields = {name: f for name, f in reader.fields.items() if f.types and f.types[0] != GGUFValueType.ARRAY}
        return {name: field.contents() for name, field in fields.items()}, [tensor.name for tensor in reader.tensors]


def _of_transformers(tool: str, network: Any, tokenizer: Any, stop_ids: frozenset[int] | None = None) -> Reading:
    network.eval()

    @torch.no_grad()
    def logprobs(ids: Sequence[int]) -> FloatArray:
        token_ids = torch.tensor([list(ids)], device=network.device)
        with _said_of(Path(tool), "run"):
            logits = network(input_ids=token_ids).logits[0, :-1].double()
        gold = torch.log_softmax(logits, -1).gather(1, token_ids[0, 1:, None])
        found: FloatArray = gold[:, 0].cpu().numpy()
        return found

    return Reading(
        tool,
        str(network.dtype).removeprefix("torch."),
        logprobs,
        lambda text: list(tokenizer(text, add_special_tokens=False).input_ids),
        lambda text: list(tokenizer(text).input_ids),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        _stops_of(network.generation_config) if stop_ids is None else stop_ids,
        lambda: stored.of_network(network),
    )


def _stops_of(settings: Any) -> frozenset[int]:
    stops = settings.eos_token_id
    return frozenset(stops if isinstance(stops, list) else [stops] if stops is not None else [])


def _of_gguf_reader(file: Path, metadata: Mapping[str, Any], names: Sequence[str]) -> Reading:
    overlooked = {setting: metadata[key] for key, setting in _OVERLOOKED.items() if key in metadata}
    if "rope_freqs.weight" in names:
        raise ModelError(
            "transformers' GGUF reader passes over scaled rotary embeddings, so the file can't be verified",
            place=str(file),
            way_out="pip install llama-cpp-python",
        )
    with _said_of(file):
        network = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False, **overlooked
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
    tool = f"transformers {transformers.__version__}, its GGUF reader"
    reading = _of_transformers(tool, network, tokenizer, gguf_stops(metadata))
    return _with_bos(reading, metadata)


def gguf_stops(metadata: Mapping[str, Any]) -> frozenset[int]:
    """The tokens that a GGUF file says generation ends at."""
    keys = ("eos", "eot", "eom")
    found = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys)
    return frozenset(int(token_id) for token_id in found if token_id is not None)


def _with_bos(reading: Reading, metadata: Mapping[str, Any]) -> Reading:
    """A GGUF file says by a flag whether text is begun with a token, and every program that reads it obeys that."""
    begins = [int(metadata["tokenizer.ggml.bos_token_id"])] if metadata.get("tokenizer.ggml.add_bos_token") else []
    return replace(reading, encode_raw=lambda text: [*begins, *reading.encode(text)])


def _of_llama_cpp(file: Path, metadata: Mapping[str, Any]) -> Reading:
    import llama_cpp  # noqa: PLC0415  (optional)

    with _said_of(file):
        # Keys and values in float32: what is judged is the file, not a cache of half precision.
        model = llama_cpp.Llama(
            str(file), n_ctx=0, logits_all=True, verbose=False, type_k=0, type_v=0, n_gpu_layers=0, seed=0
        )

    def logprobs(ids: Sequence[int]) -> FloatArray:
        model.reset()
        model.eval(list(ids))
        logits = torch.from_numpy(np.array(model.scores[: len(ids) - 1], np.float64))
        gold = torch.log_softmax(logits, -1).gather(1, torch.tensor(list(ids))[1:, None])
        found: FloatArray = gold[:, 0].numpy()
        return found

    def encode(text: str) -> list[int]:
        return list(model.tokenize(text.encode(), add_bos=False, special=True))

    def piece(key: str) -> str | None:
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return None if token_id is None else model.detokenize([int(token_id)], special=True).decode()

    named = {f"{name}_token": piece(key) for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"))}
    reading = Reading(
        f"llama.cpp by llama-cpp-python {llama_cpp.__version__}",
        str(metadata.get("general.file_type")),
        logprobs,
        encode,
        encode,
        metadata.get("tokenizer.chat_template"),
        {name: text for name, text in named.items() if text is not None},
        gguf_stops(metadata),
        dict,
    )
    return _with_bos(reading, metadata)


class _said_of:  # noqa: N801  (a context manager, as contextlib's are named)
    """Whatever a tool raises while it loads an export is about the export."""

    def __init__(self, place: Path, what: str = "load") -> None:
        self._place = place
        self._what = what
        self._quiet = ExitStack()

    def __enter__(self) -> None:
        quiet_transformers()
        self._quiet.enter_context(warnings.catch_warnings())
        self._quiet.enter_context(redirect_stderr(io.StringIO()))  # a bar of progress that knows no other way
        warnings.simplefilter("ignore")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._quiet.close()
        if isinstance(error, Exception) and not isinstance(error, (ModelError, MemoryError)):
            raise ModelError(
                f"the tool that will use it can't {self._what} it: {first_line(error)}", place=self._place.name
            ) from error
