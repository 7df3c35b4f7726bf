"""Model folders from outside: each kind of broken or hostile folder is one named error before anything is built."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import likely
from likely.data.render import load_tokenizer
from likely.errors import ConfigError, LikelyError, ModelError
from likely.manifest import Seal
from likely.model.headers import check_finite, read_header
from likely.model.load import Tuning, load_for_training, load_model, save_model
from likely.model.place import find_model, local_folder, read_context_length
from likely.model.untrusted import INDEX, WEIGHTS, identity

Change = Callable[[Path], None]
ROW = {"messages": [{"role": "user", "content": "What is the capital?"}, {"role": "assistant", "content": "Paris."}]}
NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model_dir(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "d.jsonl").write_text((json.dumps(ROW) + "\n") * 3, encoding="utf-8")
    return str(tmp_path / "d.jsonl")


@pytest.fixture(scope="session")
def adapter_source(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = load_for_training(str(tiny_model_dir), Tuning(lora_rank=4), compute_dtype=torch.float32)
    save_model(model, AutoTokenizer.from_pretrained(tiny_model_dir), folder)
    return folder


@pytest.fixture
def adapter_dir(tmp_path: Path, adapter_source: Path) -> Path:
    return Path(shutil.copytree(adapter_source, tmp_path / "adapter"))


def refused(name: Path | str, *words: str, kind: type[LikelyError] = ModelError) -> LikelyError:
    """Loading is one clear line of the right kind, soon, and a folder is as it was."""
    folder = name if isinstance(name, Path) else None
    before = folder and snapshot(folder)
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        load_model(str(name))
    assert time.monotonic() - started < 10
    text = str(caught.value)
    assert caught.value.way_out, text
    assert len(text.splitlines()) == 1
    assert len(text) < 1000 + 2 * len(str(name))
    for word in words:
        assert word in text, text
    assert before == (folder and snapshot(folder))
    return caught.value


def snapshot(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --- safetensors ---


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        changed = change(header)
        return joined(header if changed is None else changed, raw[8 + length :])

    return edit


def entry(**fields: Any) -> Callable[[bytes], bytes]:
    return edit_header(lambda h: h[NORM].update(fields))


def overlap(header: dict[str, Any]) -> None:
    header[NORM]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]


BROKEN_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "seven bytes": lambda raw: raw[:7],
    "length only": lambda raw: raw[:8],
    "length of 2^63": lambda raw: struct.pack("<Q", 1 << 63) + raw[8:],
    "length of all the file": lambda raw: struct.pack("<Q", len(raw)) + raw[8:],
    "header of 100 MB": lambda raw: struct.pack("<Q", 100_000_000) + raw[8:],
    "header of zeros": lambda _: struct.pack("<Q", 64) + bytes(64),
    "header not UTF-8": lambda _: joined(b"\xff\xfe{}", b""),
    "header a list": lambda _: joined([], b""),
    "header deep": lambda _: joined(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "a tensor cut short": lambda raw: raw[:-1],
    "bytes after the end": lambda raw: raw + b"\0",
    "a name twice": lambda _: joined(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 2 + b'"b":1}', b""),
    "metadata no text": edit_header(lambda h: h.update(__metadata__={"format": 7})),
    "an entry no object": edit_header(lambda h: h.update({NORM: "x"})),
    "an entry with more": entry(code="os.system"),
    "unknown dtype": entry(dtype="F7"),
    "dtype no text": entry(dtype=["F32"]),
    "shape no list": entry(shape="32"),
    "shape of floats": entry(shape=[32.0]),
    "shape of truths": entry(shape=[True] * 3),
    "negative shape": entry(shape=[-32]),
    "shape overflows": entry(shape=[2**31, 2**31, 2**31]),
    "shape of 2^62": entry(shape=[2**62]),
    "shape of other product": entry(shape=[31]),
    "offsets turned round": edit_header(lambda h: h[NORM]["data_offsets"].reverse()),
    "offsets of three": edit_header(lambda h: h[NORM]["data_offsets"].append(0)),
    "offsets overlap": edit_header(overlap),
    "offsets beyond the end": entry(data_offsets=[10**12, 10**12 + 128]),
    "a gap": edit_header(lambda h: h.pop(NORM) and None),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_safetensors(model_dir: Path, name: str) -> None:
    weights = model_dir / WEIGHTS
    weights.write_bytes(BROKEN_FILES[name](weights.read_bytes()))
    refused(model_dir, "broken safetensors", str(weights))


def test_every_truncation_is_seen(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "whole.safetensors")
    raw = (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(read_header(tmp_path / "whole.safetensors")) == ["a", "b"]
    for length in range(len(raw)):
        (tmp_path / "cut.safetensors").write_bytes(raw[:length])
        with pytest.raises(ModelError):
            read_header(tmp_path / "cut.safetensors")


def test_a_header_says_what_the_library_says(model_dir: Path) -> None:
    tensors = load_file(model_dir / WEIGHTS)
    assert {n: t.shape for n, t in read_header(model_dir / WEIGHTS).items()} == {n: t.shape for n, t in tensors.items()}


# --- weights and config ---


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def set_config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


def put(name: str, content: str | bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    return lambda folder: rewrite(folder, change)


def renamed(name: str) -> Change:
    return lambda folder: (folder / WEIGHTS).rename(folder / name) and None


def unlink(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / WEIGHTS).rename(outside)
    (folder / WEIGHTS).symlink_to(outside)


def pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def spoilt(value: float, dtype: torch.dtype) -> Change:
    def change(found: dict[str, torch.Tensor]) -> None:
        found |= {name: value.to(dtype) for name, value in found.items()}
        found[NORM][-1] = value

    return tensors(change)


BAD_FOLDERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    **{
        f"only {name}": (renamed(name), (name, "safetensors"))
        for name in (
            "pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "model.pkl", "tf_model.h5",
            "flax_model.msgpack", "model.gguf",
        )
    },
    "no weights": (unlink(WEIGHTS), ("no safetensors",)),
    "a shard without its index": (renamed("model-00001-of-00002.safetensors"), (INDEX,)),
    "a missing tensor": (tensors(lambda t: t.pop("lm_head.weight")), ("lm_head.weight", "missing")),
    "a missing norm": (tensors(lambda t: t.pop(NORM)), (NORM,)),
    "a missing tensor beside a spare one": (
        tensors(lambda t: t.update(spare=t.pop("lm_head.weight"))), ("lm_head.weight",),
    ),
    "an unexpected tensor": (tensors(lambda t: t.update(spare=torch.ones(2))), ("spare", "no place")),
    "a layer less": (set_config(num_hidden_layers=1), ("model.layers.1.", "no place")),
    "a layer more": (set_config(num_hidden_layers=3), ("model.layers.2.",)),
    "another shape": (set_config(hidden_size=64), ("shape", "config.json")),
    "a transposed tensor": (
        tensors(lambda t: t.update({UP: t[UP].T.contiguous()})),
        ("up_proj",),
    ),
    "another vocabulary": (set_config(vocab_size=100), ("config.json",)),
    "a vocabulary of 10^15": (set_config(vocab_size=10**15), ("config.json",)),
    "a hidden size of 10^12": (set_config(hidden_size=10**12, head_dim=10**12), ("model",)),
    "a billion layers": (set_config(num_hidden_layers=10**9), ("num_hidden_layers", "10")),
    "layers no number": (set_config(num_hidden_layers="2"), ("num_hidden_layers",)),
    "a million experts": (set_config(model_type="mixtral", num_local_experts=10**6), ("num_local_experts",)),
    "NaN in float32": (spoilt(float("nan"), torch.float32), (NORM, "NaN")),
    "infinity in float32": (spoilt(float("inf"), torch.float32), (NORM,)),
    "NaN in bfloat16": (spoilt(float("nan"), torch.bfloat16), (NORM,)),
    "minus infinity in float16": (spoilt(float("-inf"), torch.float16), (NORM,)),
    "too large for float32": (spoilt(1e300, torch.float64), (NORM,)),
    "auto_map": (set_config(auto_map={"AutoModelForCausalLM": "evil.Model"}), ("config.json", "auto_map")),
    "auto_map within": (set_config(text_config={"auto_map": {"AutoConfig": "x.Y"}}), ("config.json", "auto_map")),
    "trust_remote_code": (set_config(trust_remote_code=True), ("config.json", "trust_remote_code")),
    "attention from the hub": (
        set_config(_attn_implementation_internal="evil/kernel"), ("config.json", "_attn_implementation_internal"),
    ),
    "attention from the hub, openly": (set_config(attn_implementation="evil/kernel"), ("attn_implementation",)),
    "experts from the hub": (set_config(experts_implementation={"": "evil/kernel"}), ("experts_implementation",)),
    "quantised": (set_config(quantization_config={"quant_method": "gptq", "bits": 4}), ("quantised", "gptq")),
    "other weights": (set_config(transformers_weights="evil.safetensors"), ("transformers_weights",)),
    "unknown architecture": (set_config(model_type="odd"), ("odd",)),
    "no architecture": (put("config.json", "{}"), ("model",)),
    "config no JSON": (put("config.json", "{model_type: llama}"), ("config.json", "JSON")),
    "config a list": (put("config.json", "[]"), ("config.json", "object")),
    "config empty": (put("config.json", ""), ("config.json",)),
    "config not UTF-8": (put("config.json", b'{"a": "\xff"}'), ("config.json",)),
    "config deep": (put("config.json", '{"a":' * 50_000 + "1" + "}" * 50_000), ("config.json", "deep")),
    "config rather deep": (put("config.json", '{"a":' * 100 + "1" + "}" * 100), ("config.json", "nested")),
    "config of 9 MB": (put("config.json", '{"a": "' + "x" * 9_000_000 + '"}'), ("config.json", "limit")),
    "config with a key twice": (put("config.json", '{"model_type": "llama", "model_type": "gpt2"}'), ("twice",)),
    "config with a long number": (put("config.json", '{"hidden_size": ' + "9" * 6000 + "}"), ("config.json",)),
    "no config": (unlink("config.json"), ("config.json",)),
    "config a pipe": (pipe("config.json"), ("config.json",)),
    "tokenizer a pipe": (pipe("tokenizer.json"), ("tokenizer.json", "pipe")),
    "weights a pipe": (pipe(WEIGHTS), (WEIGHTS, "pipe")),
    "a broken link": (lambda f: (f / "extra.json").symlink_to("gone.json"), ("extra.json",)),
    "a link to itself": (lambda f: (f / "added_tokens.json").symlink_to("added_tokens.json"), ("leads back",)),
    "a link out": (link_out, (WEIGHTS, "link")),
    "EOS outside": (set_config(eos_token_id=10**6), ("eos_token_id", "1000000")),
    "an EOS of several outside": (set_config(eos_token_id=[1, 10**6]), ("eos_token_id",)),
    "EOS no number": (set_config(eos_token_id=[None, "x"]), ("eos_token_id",)),
    "padding outside": (set_config(pad_token_id=10**6), ("model",)),
    "tokenizer_config with auto_map": (
        put("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'),
        ("tokenizer_config.json", "auto_map"),
    ),
    "tokenizer_config no JSON": (put("tokenizer_config.json", "{"), ("tokenizer_config.json",)),
    "generation_config no JSON": (put("generation_config.json", "x"), ("generation_config.json",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(model_dir: Path, name: str) -> None:
    change, words = BAD_FOLDERS[name]
    change(model_dir)
    refused(model_dir, *words)


def test_a_pickle_never_runs(model_dir: Path, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    evil = (
        b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    )  # what a pickle that runs a command looks like
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (model_dir / name).write_bytes(evil)
    load_model(str(model_dir))  # the safetensors beside them are used
    (model_dir / WEIGHTS).unlink()
    refused(model_dir, ".bin", "pickle")
    assert not canary.exists()


def test_code_in_a_folder_is_not_run(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    load_model(str(model_dir))
    set_config(auto_map={"AutoConfig": "modeling_evil.Config"}, model_type="evil")(model_dir)
    refused(model_dir, "auto_map")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_torch_is_not_told_to_unpickle(model_dir: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", value)
    refused(model_dir, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", kind=ConfigError)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    load_model(str(model_dir))


def test_harmless_tensors_of_old_files_are_let_through(model_dir: Path) -> None:
    """transformers drops the first by itself, and would leave the others over."""
    layer = "model.layers.0.self_attn"
    extra = {
        f"{layer}.rotary_emb.inv_freq": torch.ones(4),
        "model.embed_tokens.position_ids": torch.arange(8),
        f"{layer}.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        f"{layer}.attn.masked_bias": torch.tensor(-1e9).half(),
    }
    rewrite(model_dir, lambda t: t.update(extra))
    load_model(str(model_dir))


def test_a_model_is_checked_when_it_is_found(model_dir: Path) -> None:
    """Before a tokenizer, a config or a row of data is read."""
    find_model(str(model_dir))
    raw = (model_dir / WEIGHTS).read_bytes()
    (model_dir / WEIGHTS).write_bytes(raw[:-1])
    with pytest.raises(ModelError, match="broken safetensors"):
        find_model(str(model_dir))
    (model_dir / WEIGHTS).write_bytes(raw)
    set_config(auto_map={"AutoModel": "evil.M"})(model_dir)
    with pytest.raises(ModelError, match="auto_map"):
        find_model(str(model_dir))


def test_a_number_that_is_large_but_finite_is_let_through(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        top = torch.finfo(dtype).max
        save_file({"a": torch.tensor([top, -top, 0.0] * 3, dtype=dtype)}, tmp_path / "a.safetensors")
        check_finite(read_header(tmp_path / "a.safetensors"))


# --- shards ---


@pytest.fixture
def sharded(tmp_path: Path, tiny_model_dir: Path) -> Path:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "sharded"))
    (folder / WEIGHTS).unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(folder, max_shard_size="50kB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def test_shards_are_read(sharded: Path, tiny_model_dir: Path) -> None:
    one, many = load_model(str(tiny_model_dir)), load_model(str(sharded))
    assert all(torch.equal(a, b) for a, b in zip(one.network.parameters(), many.network.parameters(), strict=True))
    assert identity(sharded) != identity(tiny_model_dir)


@pytest.mark.parametrize(
    "target",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "gone.safetensors", "a\\b", "", 7, None],
)
def test_an_index_names_plain_files_of_its_folder(sharded: Path, target: Any) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0]
    shutil.copy(first, sharded.parent / "outside.safetensors")
    (sharded / "sub").mkdir()
    shutil.copy(first, sharded / "sub" / "x.safetensors")
    edit_index(sharded, lambda m: m.update({NORM: target}))
    refused(sharded, INDEX, "not the name")


def test_each_tensor_stands_in_the_shard_that_the_index_says(sharded: Path) -> None:
    names = sorted(p.name for p in sharded.glob("*.safetensors"))
    index = (sharded / INDEX).read_text(encoding="utf-8")

    def swap(found: dict[str, str]) -> None:
        found[NORM] = next(name for name in names if name != found[NORM])

    for change in (swap, lambda m: m.pop(NORM), lambda m: m.update(extra=names[0])):
        edit_index(sharded, change)
        refused(sharded, "differ from")
        (sharded / INDEX).write_text(index, encoding="utf-8")
    load_model(str(sharded))


@pytest.mark.parametrize(
    "content", ["", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1, "a": 2}}']
)
def test_a_broken_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content, encoding="utf-8")
    refused(sharded, INDEX)


# --- tokenizers ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unlink("tokenizer.json"), ("tokenizer",)),
        (put("tokenizer.json", "{"), ("tokenizer",)),
        (put("tokenizer.json", "[" * 100_000), ("tokenizer",)),
        (put("tokenizer.json", '{"model": {"type": "Evil"}}'), ("tokenizer",)),
        (put("tokenizer.json", b"\xff" * 100), ("tokenizer",)),
    ],
)
def test_broken_tokenizers(model_dir: Path, data: str, change: Change, words: tuple[str, ...]) -> None:
    change(model_dir)
    with pytest.raises(ModelError) as caught:
        likely.evaluate(model=str(model_dir), data=data)
    assert len(str(caught.value).splitlines()) == 1
    assert all(word in str(caught.value) for word in words)


def set_tokenizer(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


def replacing(content: str, times: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [step]}] * times}


DAMAGED: dict[str, tuple[Change, str]] = {
    "a normalizer that makes much of little": (
        set_tokenizer(normalizer=replacing("a" * 100, 6)), "may write 1,000,000,000,000 characters",
    ),
    "a control token without end": (
        put("tokenizer_config.json", json.dumps({"unk_token": "x" * 100_000})), "has 100,000 characters",
    ),
    "a control token that is a number": (put("tokenizer_config.json", '{"eos_token": 7}'), "tokenizer"),
    "tokens by no number": (put("added_tokens.json", '{"<zz>": "x"}'), "tokenizer"),
    "a length below 1": (put("tokenizer_config.json", '{"model_max_length": -1}'), "at least 1"),
    "an endless number": (put("tokenizer_config.json", '{"a": ' + "9" * 10_000 + "}"), "can't be read as JSON"),
    "tokenizer_config null": (put("tokenizer_config.json", "null"), "no JSON object"),
    "tokenizer_config zeros": (put("tokenizer_config.json", bytes(500)), "can't be read as JSON"),
    "special_tokens_map deep": (put("special_tokens_map.json", '{"a":' * 3000 + "1" + "}" * 3000), "nested"),
    "labels that are a number": (set_config(id2label=7), "no config that can be read"),
    "a length that is no whole number": (set_config(max_position_embeddings=2.5), "expected int, got float"),
    "a table of letters that makes the library panic": (
        set_tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "!!!"}), "no tokenizer that can be",
    ),
    "a decoder of another kind": (set_tokenizer(decoder={"type": "Evil"}), "no tokenizer that can be read"),
    "a vocabulary of other types": (set_tokenizer(model={"type": "BPE", "vocab": {"a": -5}, "merges": []}), "u32"),
}  # fmt: skip


def open_small_files(folder: Path) -> None:
    """What every verb does before anything else, without the weights."""
    place = find_model(str(folder))
    read_context_length(place)
    load_tokenizer(place.tokenizer)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_tokenizers_and_configs(model_dir: Path, name: str) -> None:
    change, words = DAMAGED[name]
    change(model_dir)
    with pytest.raises(ModelError) as caught:
        open_small_files(model_dir)
    assert words in str(caught.value)
    assert caught.value.way_out
    assert len(str(caught.value).splitlines()) == 1


def test_a_context_without_end_is_bounded(model_dir: Path) -> None:
    set_config(max_position_embeddings=10**18)(model_dir)
    assert read_context_length(find_model(str(model_dir))) == 1 << 30


def test_replacements_of_real_tokenizers_are_within_bounds(model_dir: Path) -> None:
    """Llama's, whose spaces become three bytes, and a few more."""
    set_tokenizer(normalizer=replacing("▁", 3))(model_dir)
    assert load_tokenizer(model_dir)


@pytest.mark.parametrize("where", ["vocabulary", "added token"])
@pytest.mark.parametrize("verb", ["train", "check"])
def test_an_id_beyond_all_vocabularies(model_dir: Path, data: str, tmp_path: Path, where: str, verb: str) -> None:
    """The library would take memory for each id below it, and end the process when there is no more."""
    path = model_dir / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if where == "vocabulary":
        content["model"]["vocab"]["zzz"] = 4_000_000_000
    else:
        content["added_tokens"][0]["id"] = 4_000_000_000
    path.write_text(json.dumps(content), encoding="utf-8")
    act = {
        "train": lambda: likely.train(model=str(model_dir), data=data, output=str(tmp_path / "run")),
        "check": lambda: likely.check(data=data, model=str(model_dir)),
    }
    with pytest.raises(ModelError, match=r"tokenizer\.json: a token has id 4000000000, over the limit of 10,000,000"):
        act[verb]()


def test_a_vocabulary_smaller_than_the_tokenizer(model_dir: Path, data: str, tmp_path: Path) -> None:
    def shrink(found: dict[str, torch.Tensor]) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            found[name] = found[name][:50].clone()

    rewrite(model_dir, shrink)
    set_config(vocab_size=50)(model_dir)
    for run in (
        lambda: likely.train(model=str(model_dir), data=data, output=str(tmp_path / "run"), steps=1),
        lambda: likely.evaluate(model=str(model_dir), data=data),
    ):
        with pytest.raises(ModelError, match="the vocabulary of the model has 50 tokens"):
            run()
    assert not (tmp_path / "run").exists()


def test_a_base_that_reads_text_in_other_tokens(model_dir: Path, data: str, tiny_model_dir: Path) -> None:
    path = model_dir / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["model"]["merges"] = state["model"]["merges"][:20]
    path.write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ConfigError, match="other tokens"):
        likely.evaluate(model=str(tiny_model_dir), base=str(model_dir), data=data)
    with pytest.raises(ConfigError, match="other tokens"):
        list(likely.score(model=str(tiny_model_dir), base=str(model_dir), data=data))
    shutil.copy(tiny_model_dir / "tokenizer.json", path)
    assert likely.evaluate(model=str(tiny_model_dir), base=str(model_dir), data=data)["delta"]["nll"] == 0


# --- adapters ---


def set_adapter(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


def adapter_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def edit(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        change(found)
        save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})

    return edit


def first_key(found: dict[str, torch.Tensor]) -> str:
    return sorted(found)[0]


BAD_ADAPTERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no base": (set_adapter(base_model_name_or_path=None), ("adapter_config.json", "belongs")),
    "base gone": (set_adapter(base_model_name_or_path="/gone/away"), ("adapter", "/gone/away")),
    "base a URL": (set_adapter(base_model_name_or_path="https://evil.example/x"), ("adapter_config.json",)),
    "auto_mapping": (set_adapter(auto_mapping={"parent_library": "os", "base_model_class": "x"}), ("auto_mapping",)),
    "megatron": (set_adapter(megatron_config={"a": 1}, megatron_core="evil"), ("megatron_config",)),
    "auto_map": (set_adapter(auto_map={"AutoModel": "evil.M"}), ("adapter_config.json", "auto_map")),
    "rank zero": (set_adapter(r=0), ("r is 0",)),
    "rank no number": (set_adapter(r="4"), ("r is '4'",)),
    "another rank": (set_adapter(r=8), ("rank 4", "r is 8")),
    "unknown kind": (set_adapter(peft_type="EVIL"), ("adapter",)),
    "NaN": (adapter_tensors(lambda t: t[first_key(t)].fill_(float("nan"))), ("NaN", "lora_A")),
    "a tensor missing": (adapter_tensors(lambda t: t.pop(first_key(t))), ("lora_A", "missing")),
    "a tensor too many": (
        adapter_tensors(lambda t: t.update({first_key(t).replace("layers.0", "layers.7"): torch.ones(4, 32)})),
        ("layers.7", "no place"),
    ),
    "another shape": (adapter_tensors(lambda t: t.update({first_key(t): torch.ones(4, 7)})), ("adapter",)),
    "config no JSON": (put("adapter_config.json", "{"), ("adapter_config.json",)),
    "config deep": (put("adapter_config.json", '{"a":' * 50_000 + "1" + "}" * 50_000), ("deep",)),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin") and None, ("adapter_model.bin",),
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ("adapter_model.safetensors",)),
    "weights cut": (
        lambda f: os.truncate(f / "adapter_model.safetensors", 1000), ("broken safetensors",),
    ),
    "base itself": (lambda f: set_adapter(base_model_name_or_path=str(f))(f), ("adapter",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_bad_adapters(adapter_dir: Path, name: str) -> None:
    change, words = BAD_ADAPTERS[name]
    change(adapter_dir)
    refused(adapter_dir, *words)


def test_an_adapter_remembers_the_weights_of_its_base(model_dir: Path, data: str, tmp_path: Path) -> None:
    likely.train(model=str(model_dir), data=data, output=str(tmp_path / "run"), steps=1, save_every=1)
    likely.evaluate(model=str(tmp_path / "run"), data=data)
    rewrite(model_dir, lambda t: t["lm_head.weight"].mul_(2))
    for name in ("run", "run/model", "run@step-1"):
        refused(tmp_path / name, "not those that this adapter was trained on", "run")
    with pytest.raises(ModelError, match="was trained on"):
        likely.train(model=str(tmp_path / "run"), data=data, output=str(tmp_path / "more"), steps=1)
    shutil.rmtree(model_dir)
    refused(tmp_path / "run", "run", str(model_dir))


def test_an_adapter_folder_says_only_what_is_true(adapter_dir: Path, tiny_model_dir: Path) -> None:
    assert not (adapter_dir / "README.md").exists()  # peft's form, not filled in
    remembered = json.loads((adapter_dir / "likely.json").read_text(encoding="utf-8"))
    assert remembered == {"base": str(tiny_model_dir), "base_sha256": identity(tiny_model_dir)}
    config = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == sorted(config["target_modules"])


def test_the_embedded_model_is_found_again_under_another_version(
    adapter_dir: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache folder's name has the version of transformers in it, and the adapter has that name."""
    from likely.model import embedded

    set_adapter(base_model_name_or_path="/old/cache/smollm2-135m-98362432-transformers-5.1.0")(adapter_dir)
    monkeypatch.setattr(embedded, "embedded_folder", lambda: tiny_model_dir)
    assert find_model(str(adapter_dir)).weights == str(tiny_model_dir)
    load_model(str(adapter_dir))


def test_going_on_with_an_adapter_keeps_its_rank(adapter_dir: Path, data: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": str(adapter_dir), "data": data, "steps": 1}
    for wrong, way_out in (({"lora_rank": 5}, "--lora-rank 4"), ({"lora_rank": 4, "lora_alpha": 3}, "--lora-alpha 8")):
        with pytest.raises(ConfigError, match=way_out):
            likely.train(output=str(tmp_path / "run"), **settings, **wrong)
    assert not (tmp_path / "run").exists()
    run = likely.train(output=str(tmp_path / "run"), **settings, lora_rank=4, lora_alpha=8)
    assert "rank 4," in run.report["facts"]["trained"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_labels", 10**9),
        ("num_labels", "3"),
        ("max_position_embeddings", -5),
        ("max_position_embeddings", 1),
        ("max_position_embeddings", "long"),
        ("vocab_size", [1]),
        ("rope_parameters", {"rope_type": ["dynamic"], "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": "x"}),
    ],
)
def test_settings_of_another_type(model_dir: Path, key: str, value: Any) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8")
    refused(str(model_dir), "config.json")


# --- names ---


@pytest.mark.parametrize(
    "step", ["step-99", "step-²", "nonsense", "step-", "", "../model", "step-1/../..", "step-9999999999999999999"]
)
def test_checkpoints_that_are_not_there(model_dir: Path, tmp_path: Path, step: str) -> None:
    shutil.copytree(model_dir, tmp_path / "run" / "checkpoints" / "step-000001" / "model")
    shutil.copytree(model_dir, tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text("{}", encoding="utf-8")
    for sealed in (tmp_path / "run" / "checkpoints" / "step-000001", tmp_path / "run" / "model"):
        with Seal(sealed) as seal:
            seal.close({})
    refused(f"{tmp_path}/run@{step}", f"run@{step}", "step-000001")
    for good in ("run", "run@step-1", "run@1", "run@step-000001"):
        find_model(f"{tmp_path}/{good}")


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "../" * 400, "https://user:pw@evil.example/x", "org/name/more"])
def test_names_of_nothing(name: str) -> None:
    refused(name)


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name(name: str) -> None:
    refused(name, "--model", kind=ConfigError)


def test_a_hub_id_that_cannot_be_had(data: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="hub") as caught:
        likely.evaluate(model="likely-tests/no-such-model", data=data)
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_cannot_be_read(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    for method in ("iterdir", "is_dir"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, forbidden)
            refused(str(model_dir), "Permission denied", str(model_dir))


def test_the_cache_of_the_hub_may_link_to_its_blobs(model_dir: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot_dir = repo / "snapshots" / "abc"
    snapshot_dir.mkdir(parents=True)
    for file in model_dir.iterdir():
        shutil.copy(file, repo / "blobs" / file.name)
        (snapshot_dir / file.name).symlink_to(f"../../blobs/{file.name}")
    load_model(str(snapshot_dir))
    assert local_folder(str(snapshot_dir)) == snapshot_dir


def test_an_adapter_among_the_weights_is_not_put_on_them(
    model_dir: Path, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub, both could come in one folder, and transformers would load both."""
    import huggingface_hub

    shutil.copy(adapter_dir / "adapter_config.json", model_dir)
    shutil.copy(adapter_dir / "adapter_model.safetensors", model_dir)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model_dir))
    refused("org/name", "adapter", "two folders")
    (model_dir / "adapter_config.json").unlink()
    assert load_model("org/name").network.name_or_path == "org/name"  # what an adapter of it would remember


# --- nothing is changed, nothing leaks ---


def test_base_and_data_are_left_as_they_were(model_dir: Path, data: str, tmp_path: Path) -> None:
    before = snapshot(model_dir), Path(data).read_bytes()
    for tune in ("full", "lora"):
        likely.train(
            model=str(model_dir),
            data=data,
            eval_data=data,
            output=str(tmp_path / tune),
            steps=2,
            tune=tune,
            save_every=1,
        )
        list(likely.score(model=str(tmp_path / tune), base=str(model_dir), data=data))
    assert (snapshot(model_dir), Path(data).read_bytes()) == before


def test_no_secret_of_the_environment_reaches_an_artefact(
    model_dir: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    canary = "hf_CanaryCanaryCanaryCanaryCanary00"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, canary)
    likely.train(model=str(model_dir), data=data, eval_data=data, output=str(tmp_path / "run"), steps=1, save_every=1)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or canary.encode() not in path.read_bytes(), path
    assert canary not in "".join(capfd.readouterr())
