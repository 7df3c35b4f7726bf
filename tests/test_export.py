"""Exports: what another tool loads is the model that was trained, and a fault in what was written is found."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen3Config

import likely
from likely import deliver, storage
from likely.errors import ConfigError, LikelyError, ModelError
from likely.exports import gguf_file, readers
from likely.model.merge import merged_network
from likely.model.place import Place
from test_cli import Likely, assert_refused, write_rows
from test_cli import likely as likely_cli  # noqa: F401  (a fixture)
from test_run import independent_nll

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

PAIRS = [
    ("Capital of France?", "Paris."),
    ("And of Spain?", "Madrid."),
    ("Say hi.", "Hi there!"),
    ("2 + 2?", "It is 4"),
]
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


ROPE: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def chats() -> list[dict[str, Any]]:
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS]
    return [*rows, {"messages": [SYSTEM, *rows[0]["messages"], *rows[2]["messages"]]}]


@dataclass(frozen=True)
class World:
    """Runs by name, all trained and judged on ``data``, and the models that they began with."""

    runs: dict[str, str]
    bases: dict[str, str]
    data: str


def make_base(folder: Path, config: Any, tokenizer: Any, dtype: torch.dtype = torch.float32) -> str:
    torch.manual_seed(5)
    network = AutoModelForCausalLM.from_config(config)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, chat_tokenizer: Any) -> World:
    folder = tmp_path_factory.mktemp("exports")
    data = str(write_rows(folder / "rows.jsonl", *chats()))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": len(chat_tokenizer) + 3}
    tied = Qwen2Config(**SHAPE, **ids, tie_word_embeddings=True)
    wide = Qwen3Config(**SHAPE, **ids, head_dim=16, tie_word_embeddings=False)
    small = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        vocab_size=len(chat_tokenizer),
    )  # fmt: skip
    bases = {
        "llama": str(tiny_model_dir),
        "qwen2": make_base(folder / "qwen2", tied, chat_tokenizer, torch.bfloat16),
        "qwen3": make_base(folder / "qwen3", wide, chat_tokenizer),
        "gpt2": make_base(folder / "gpt2", small, chat_tokenizer),
    }
    runs = {}
    for name, base in bases.items():
        run = likely.train(
            model=base, data=data, eval_data=data, output=str(folder / f"run-{name}"), steps=4, batch_size=2,
            learning_rate=3e-2, dtype="float32", lora_alpha=None if name == "qwen3" else 8.0,
            tune="full" if name == "qwen3" else "lora",
        )  # fmt: skip
        runs[name] = str(run.folder)
    return World(runs, bases, data)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models leave nothing that memory would be short of, and looking for it takes a third of the time."""
    monkeypatch.setattr("likely.deliver.gc.collect", lambda: 0)


def export(world: World, name: str, to: str, output: Path, **settings: Any) -> dict[str, Any]:
    return likely.export(run=world.runs[name], to=to, output=str(output), **settings)


CASES = [
    ("llama", "merged", {}),
    ("qwen2", "merged", {}),
    ("qwen2", "merged", {"dtype": "float32"}),
    ("qwen3", "merged", {}),
    ("llama", "adapter", {}),
    ("gpt2", "adapter", {}),
    *[("llama", "gguf", {"type": kind}) for kind in ("f32", "f16", "bf16", "q8_0")],
    ("qwen2", "gguf", {"type": "f32"}),
    ("qwen3", "gguf", {"type": "f32"}),
    ("gpt2", "gguf", {"type": "f32"}),
    ("llama", "ollama", {}),
    ("qwen2", "ollama", {"type": "q8_0"}),
]


@pytest.mark.parametrize(("name", "to", "settings"), CASES)
def test_exports_are_the_run(world: World, tmp_path: Path, name: str, to: str, settings: dict[str, Any]) -> None:
    report = export(world, name, to, tmp_path / "out", **settings)
    stored = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert stored == {key: value for key, value in report.items() if key != "pushed"}
    nll = report["nll"]
    figures = likely.evaluate(model=world.runs[name], data=world.data)
    assert nll["run"] == pytest.approx(figures["nll"], abs=1e-6)
    assert abs(nll["difference"]) <= nll["bound"]
    assert report["rows"] == {"from": f"held-out rows of {world.data}", "num": 5}
    assert "<|im_end|>" in report["stop_tokens"]
    # Five rows, of each the prompt and the whole; eight nasty texts; and the prompts once more by Ollama's template.
    assert report["texts"] == 18 + 5 * (to == "ollama")
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_merged_folder_needs_nothing_of_ours(world: World, tmp_path: Path, name: str) -> None:
    report = export(world, name, "merged", tmp_path / "out")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    # The base's own dtype: what was trained on bfloat16 weights is bfloat16 again.
    assert network.dtype == {"llama": torch.float32, "qwen2": torch.bfloat16}[name]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = write_rows(tmp_path / "rows.jsonl", *chats()[:4])  # that reader knows single turns
    nats = independent_nll(network.float(), tokenizer, str(rows))
    expected = likely.evaluate(model=world.runs[name], data=str(rows))["nll"]
    assert nats == pytest.approx(expected, abs=report["nll"]["bound"])


def test_what_was_held_out_by_the_run_is_what_verifies(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f"{2 * i}"} for i in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    options: Any = {"model": str(tiny_model_dir), "data": str(data), "steps": 1, "dtype": "float32"}
    run = likely.train(output=str(tmp_path / "run"), eval_share=0.2, **options)
    report = likely.export(run=str(run.folder), to="merged", output=str(tmp_path / "out"), rows=100)
    assert report["rows"] == {"from": f"held-out rows of {data}", "num": run.report["tuned"]["num_examples"]}
    assert report["nll"]["run"] == pytest.approx(run.report["tuned"]["nll"], abs=1e-6)
    run = likely.train(output=str(tmp_path / "all"), eval_share=0, **options)
    report = likely.export(run=str(run.folder), to="merged", output=str(tmp_path / "two"), rows=3)
    assert report["rows"] == {"from": f"training rows of {data}", "num": 3}


def test_a_run_on_a_run(world: World, tmp_path: Path) -> None:
    run = likely.train(
        model=world.runs["qwen3"], data=world.data, eval_data=world.data, output=str(tmp_path / "run"), steps=1,
        dtype="float32",
    )  # fmt: skip
    report = likely.export(run=str(run.folder), to="merged", output=str(tmp_path / "out"))
    assert report["nll"]["run"] == pytest.approx(run.report["tuned"]["nll"], abs=1e-6)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}])
def test_every_kind_of_lora_is_merged(tiny_model_dir: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(3)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **kind))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    extra = {"path_initial_model_for_weight_conversion": None} if "init_lora_weights" in kind else {}
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False, **extra)
    ids = torch.tensor([[5, 9, 3, 7, 2, 8]])
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "adapter")
    merged = merged_network(Place(str(tiny_model_dir), str(tmp_path / "adapter")))
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, again(ids).logits, atol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(ids).logits
        assert not torch.allclose(merged(ids).logits, plain, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_on_four_bits(tmp_path: Path, chat_tokenizer: Any, family: str) -> None:
    """GPT-2's layers keep (in, out), and in four bits (out, in): what is exported must keep what its readers expect."""
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(chat_tokenizer)}
    config: Any = transformers.LlamaConfig(**SHAPE | {"hidden_size": 64, "intermediate_size": 128}, **ids)
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, **ids)
    base = make_base(tmp_path / "base", config, chat_tokenizer)
    data = str(write_rows(tmp_path / "rows.jsonl", *chats()))
    run = likely.train(
        model=base, data=data, eval_data=data, output=str(tmp_path / "run"), tune="qlora", steps=4, batch_size=2,
        learning_rate=3e-2, dtype="float32",
    )  # fmt: skip
    for to in ("adapter", "merged", "gguf"):
        settings = {"type": "f32"} if to == "gguf" else {}
        report = likely.export(run=str(run.folder), to=to, output=str(tmp_path / to), **settings)
        assert report["nll"]["run"] == pytest.approx(run.report["tuned"]["nll"], abs=1e-5)


# --- planted faults ---


def flip_tensor(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in tensors if "v_proj" in n and "lora_A" not in n)
    save_file(tensors | {name: -tensors[name]}, file, metadata={"format": "pt"})


def change_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return plant


def change_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")

    return plant


def change_gguf(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        reader = gguf.GGUFReader(folder / "model.gguf", "r+")
        change(reader)
        reader.data.flush()

    return plant


def flip_gguf_tensor(reader: Any) -> None:
    tensor = next(t for t in reader.tensors if t.name == "blk.1.attn_v.weight")
    tensor.data[:] = -tensor.data


def set_key(key: str, value: Any) -> Callable[[Any], None]:
    def change(reader: Any) -> None:
        reader.fields[key].parts[-1][0] = value

    return change


def no_stop(reader: Any) -> None:
    for key in ("eos", "eot"):
        set_key(f"tokenizer.ggml.{key}_token_id", 0)(reader)


def other_template(reader: Any) -> None:
    part = reader.fields["tokenizer.chat_template"].parts[-1]
    part[bytes(part).index(b"assistant\n") + 9] = ord(" ")


def broken_merge(reader: Any) -> None:
    field = reader.fields["tokenizer.ggml.merges"]
    part = field.parts[field.data[0]]
    part[0], part[-1] = part[-1], part[0]


def nudge_tensor(folder: Path) -> None:
    """The last bit of one number, which no bound on likelihoods can see."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in tensors if "v_proj" in n)
    tensors[name].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


def swap_tensors(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    one, other = sorted(n for n in tensors if "layers.0" in n and ("k_proj" in n or "v_proj" in n))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, file, metadata={"format": "pt"})


def add_tensor(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    more = {"model.layers.9.self_attn.q_proj.weight": torch.ones(2, 2)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})


def lose_tensor(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[next(n for n in tensors if "k_proj" in n)]
    save_file(tensors, file, metadata={"format": "pt"})


def swap_words(content: dict[str, Any]) -> None:
    """Two tokens that no row has."""
    words = content["model"]["vocab"]
    one, other = list(words)[-2:]
    words[one], words[other] = words[other], words[one]


FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def nudge_gguf_tensor(reader: Any) -> None:
    tensor = next(t for t in reader.tensors if t.name == "blk.1.attn_v.weight")
    tensor.data.view("uint8").reshape(-1)[0] ^= 1


def swap_gguf_tensors(reader: Any) -> None:
    one, other = (next(t for t in reader.tensors if t.name == f"blk.{i}.attn_q.weight") for i in (0, 1))
    first = one.data.copy()
    one.data[:], other.data[:] = other.data, first


def cut(name: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) - 500])

    return plant


FAULTS = [
    ("merged", flip_tensor, "another model"),
    ("merged", change_json("config.json", lambda c: c["rope_parameters"].update(rope_theta=30.0)), "another model"),
    ("merged", change_json("generation_config.json", lambda c: c.update(eos_token_id=[0])), "does not stop at"),
    ("merged", change_json("config.json", lambda c: c.update(dtype="bfloat16")), "is read as bfloat16"),
    ("merged", change_text("chat_template.jinja", "assistant\n", "assistant"), "has other tokens"),
    ("merged", change_text("chat_template.jinja", "<|im_end|>", ""), "has other tokens"),
    ("merged", change_json("tokenizer.json", lambda c: c["model"]["merges"].pop(3)), "has other tokens"),
    ("adapter", flip_tensor, "another model"),
    ("adapter", change_json("adapter_config.json", lambda c: c.update(lora_alpha=32)), "another model"),
    ("adapter", change_text("chat_template.jinja", "<|im_end|>", ""), "has other tokens"),
    ("gguf", change_gguf(flip_gguf_tensor), "another model"),
    ("gguf", change_gguf(set_key("llama.rope.freq_base", 30.0)), "another model"),
    ("gguf", change_gguf(no_stop), "does not stop at"),
    ("gguf", change_gguf(other_template), "has other tokens"),
    ("gguf", change_gguf(broken_merge), "can't load it|has other tokens"),
    ("ollama", change_text("Modelfile", "PARAMETER stop", 'PARAMETER stop "no"\n#'), "Modelfile"),
    ("ollama", change_text("Modelfile", 'PARAMETER stop "<|im_end|>"\n', ""), "does not stop at"),
    ("ollama", change_text("Modelfile", "<|im_end|>\n{{ end }}{{ end }}", "{{ end }}{{ end }}"), "has other tokens"),
    ("ollama", change_gguf(set_key("llama.rope.freq_base", 30.0)), "another model"),
    ("merged", nudge_tensor, "1 of .* stored values differ, though its NLL is .* apart, where 0.0001 is allowed"),
    ("adapter", nudge_tensor, "adapter_model.safetensors is not what was written: 1 of"),
    ("gguf", change_gguf(nudge_gguf_tensor), "tensor blk.1.attn_v.weight is not what was written: 1 of .* apart"),
    ("merged", swap_tensors, "another model"),
    ("gguf", change_gguf(swap_gguf_tensors), "another model"),
    ("gguf", cut("model.gguf"), "can't load it"),
    ("merged", cut("model.safetensors"), "can't load it"),
    (
        "merged",
        change_json("tokenizer_config.json", lambda c: c.update({"eos_token": "<|endoftext|>"})),
        "its eos_token is",
    ),
    (
        "adapter",
        change_json("tokenizer_config.json", lambda c: c.update({"bos_token": "<|endoftext|>"})),
        "its bos_token is",
    ),
    ("gguf", change_gguf(set_key("tokenizer.ggml.bos_token_id", 0)), "bos_token_id is not what was written"),
    ("gguf", change_gguf(set_key("llama.context_length", 7)), "context_length is not what was written"),
    # What no row and no likelihood shows: settings of generation and of the tokenizer, and what readers pass over.
    (
        "merged",
        change_json("config.json", lambda c: c.update(max_position_embeddings=7)),
        "config.json is not what was written",
    ),
    ("merged", change_json("config.json", lambda c: c.update(rms_norm_eps=2e-6)), "stored values differ"),
    ("merged", change_json("generation_config.json", lambda c: c.update(suppress_tokens=[5])), "generation"),
    (
        "merged",
        change_json("tokenizer_config.json", lambda c: c.update(model_max_length=3)),
        "tokenizer_config.json is",
    ),
    ("merged", change_json("tokenizer.json", swap_words), "tokenizer.json is not what|has other tokens"),
    ("merged", change_json("config.json", lambda c: c.update(quantization_config=FOUR_BITS)), "can't|stored values"),
    ("merged", add_tensor, "the list of tensors is not what was written"),
    ("merged", lose_tensor, "another model|can't load it|stored values"),
    ("ollama", change_text("Modelfile", "PARAMETER stop", "PARAMETER temperature 3\nPARAMETER stop"), "not understood"),
    ("ollama", change_text("Modelfile", "FROM ./model.gguf", "FROM ./other.gguf"), "Modelfile is not what was written"),
]


@pytest.mark.parametrize(("to", "plant", "words"), FAULTS)
def test_a_planted_fault_is_found(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, plant: Any, words: str
) -> None:
    write = deliver._write

    def write_and_plant(work: Any, folder: Path) -> Any:
        written = write(work, folder)
        plant(folder)
        return written

    monkeypatch.setattr(deliver, "_write", write_and_plant)
    settings = {"type": "f32"} if to in {"gguf", "ollama"} else {}
    with pytest.raises(ModelError, match=words) as refused:
        export(world, "llama", to, tmp_path / "out", **settings)
    assert str(refused.value).startswith(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []  # neither the export nor what it was prepared under


def test_what_a_killed_export_left_is_swept(world: World, tmp_path: Path) -> None:
    """And what another process prepares is not, nor what only looks alike."""
    names = [".tmp-out-00aa11bb", ".tmp-out-22cc33dd", ".tmp-out-more-00aa11bb", ".tmp-out-mine"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    with storage.claimed(tmp_path / names[1]) as ours:
        assert ours
        export(world, "llama", "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names[1:]}


# --- what is refused, and left as it was ---


def test_what_cannot_be_exported(world: World, tmp_path: Path, likely_cli: Likely) -> None:  # noqa: F811
    full, lora = world.runs["qwen3"], world.runs["llama"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep", encoding="utf-8")
    for code, arguments, words in (
        (2, ("export", lora, "--to", "merged", "--output", "full"), ("full", "something there")),
        (2, ("export", lora, "--to", "onnx", "--output", "o"), ("onnx",)),
        (2, ("export", lora, "--to", "merged", "--type", "f32", "--output", "o"), ("type",)),
        (2, ("export", lora, "--to", "gguf", "--dtype", "float32", "--output", "o"), ("dtype",)),
        (2, ("export", lora, "--to", "merged", "--output", "o", "--push", "nobody"), ("ORG/NAME",)),
        (2, ("export", lora, "--to", "merged", "--output", "o", "--push", "a/b"), ("HF_TOKEN",)),
        (2, ("export", world.bases["llama"], "--to", "merged", "--output", "o"), ("no run folder",)),
        (4, ("export", "nothing", "--to", "merged", "--output", "o"), ("nothing",)),
        (4, ("export", full, "--to", "adapter", "--output", "o"), ("no adapter", "--to merged")),
        (3, ("export", lora, "--to", "merged", "--output", "o", "--data", "none.jsonl"), ("none.jsonl",)),
    ):
        assert_refused(likely_cli(*arguments), code, *words)
        assert {p.name for p in tmp_path.iterdir()} == {"full"}
    assert (tmp_path / "full" / "mine.txt").read_text(encoding="utf-8") == "keep"


def test_the_command_tells_the_figures(world: World, tmp_path: Path, likely_cli: Likely) -> None:  # noqa: F811
    said = likely_cli("export", world.runs["llama"], "--to", "adapter", "--output", "out", "--rows", 2, "--json")
    assert said.code == 0, said.err
    report = json.loads(said.out)
    assert report["rows"]["num"] == 2
    said = likely_cli("export", world.runs["llama"], "--to", "adapter", "--output", "again", "--rows", 2)
    assert f"{report['nll']['run']:.6f}" in said.out
    assert "note: its base is a folder of this machine" in said.out


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.BloomConfig(), "architecture bloom"),
        (transformers.MistralConfig(sliding_window=16), "sliding window"),
        (Qwen2Config(use_sliding_window=True, sliding_window=16, max_window_layers=1), "sliding window"),
    ],
)
def test_architectures_that_gguf_has_no_words_for(config: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        gguf_file.check_family(config)


def test_rotary_embeddings_of_llama_3() -> None:
    config = transformers.LlamaConfig(**SHAPE, vocab_size=64, rope_parameters=ROPE)
    theirs = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq
    head = config.head_dim
    plain = 1 / 10000.0 ** (torch.arange(0, head, 2) / head)
    factors = gguf_file.rope_factors(config)
    assert torch.allclose(plain / torch.from_numpy(factors), theirs, rtol=1e-5)
    config.rope_parameters = ROPE | {"rope_type": "yarn"}
    with pytest.raises(ModelError, match="yarn"):
        gguf_file.rope_factors(config)


def test_scaled_rotary_embeddings_are_verified_or_refused(tmp_path: Path, chat_tokenizer: Any) -> None:
    ids = {"vocab_size": len(chat_tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    base = make_base(tmp_path / "base", transformers.LlamaConfig(**SHAPE, **ids, rope_parameters=ROPE), chat_tokenizer)
    data = str(write_rows(tmp_path / "rows.jsonl", *chats()))
    run = likely.train(model=base, data=data, eval_data=data, output=str(tmp_path / "run"), steps=1, dtype="float32")
    settings: Any = {"run": str(run.folder), "to": "gguf", "output": str(tmp_path / "out"), "type": "f32"}
    if readers.has_llama_cpp():
        assert likely.export(**settings)["tool"].startswith("llama.cpp")
        return
    with pytest.raises(ModelError, match="pip install llama-cpp-python"):
        likely.export(**settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not readers.has_llama_cpp(), reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_llama_cpp_says_so_too(world: World, tmp_path: Path, name: str) -> None:
    report = export(world, name, "gguf", tmp_path / "out", type="f32")
    assert report["tool"].startswith("llama.cpp")


# --- the hub ---


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A hub of this machine; gives what it was told: ``files``, ``tokens``, ``private``."""
    told: dict[str, Any] = {"files": {}, "tokens": set(), "private": None}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            told["tokens"].add(self.headers["Authorization"])
            if self.path == "/api/repos/create":
                told["private"] = json.loads(body).get("private", json.loads(body).get("visibility") == "private")
                self.answer({"url": f"{address}/me/tuned", "id": "x", "name": "me/tuned"})
            elif "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.answer({"files": files})
            else:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        told["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer({"commitUrl": f"{address}/me/tuned/commit/abc", "commitOid": "abc", "hookOutput": ""})

        def do_GET(self) -> None:
            self.answer({"id": "me/tuned", "siblings": [], "sha": "0" * 40, "private": True, "tags": []})

        def answer(self, content: dict[str, Any]) -> None:
            raw = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield told
    server.shutdown()
    server.server_close()
    thread.join()


TOKEN = "hf_" + "x" * 34


def test_pushed_to_the_hub_after_it_was_verified(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: dict[str, Any]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    report = export(world, "llama", "adapter", tmp_path / "out", push="me/tuned")
    assert report["pushed"].endswith("/me/tuned/commit/abc")
    assert hub["private"] is True
    assert hub["tokens"] == {f"Bearer {TOKEN}"}
    for name in ("adapter_model.safetensors", "adapter_config.json", "export.json", "tokenizer.json"):
        assert hub["files"][name] == (tmp_path / "out" / name).read_bytes()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_a_fault_is_not_pushed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: dict[str, Any]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    write = deliver._write
    monkeypatch.setattr(deliver, "_write", lambda work, folder: (write(work, folder), flip_tensor(folder))[0])
    with pytest.raises(ModelError):
        export(world, "llama", "adapter", tmp_path / "out", push="me/tuned")
    assert hub["tokens"] == set()


def test_a_hub_that_cannot_be_reached(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(LikelyError) as refused:  # the tests are offline
        export(world, "llama", "adapter", tmp_path / "out", push="me/tuned")
    assert refused.value.exit_code == 5
    assert TOKEN not in str(refused.value)
    assert (tmp_path / "out" / "export.json").exists()


def test_no_token_no_work(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        export(world, "llama", "adapter", tmp_path / "out", push="me/tuned")
    assert not (tmp_path / "out").exists()
