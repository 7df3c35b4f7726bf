"""The model card of a run: metadata that the hub's own classes accept, figures of the report, code that runs, and no
name of a folder of the machine it was written on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

import likely
from likely import provenance
from likely.insight.card import model_card
from likely.model.place import Place, licence_of
from reported import HELD_OUT, TRAIN, Finished, made, write_rows

PUBLISHED: dict[str, Any] = {
    "base": "org/base-1b",
    "base_name": "org/base-1b",
    "base_note": None,
    "base_sha256": "ab" * 32,
    "licence": "apache-2.0",
    "data": ["org/rows:train", "more.jsonl"],
    "eval_data": ["held_out.jsonl"],
    "datasets": ["org/rows"],
    "adapter": True,
    "four_bits": False,
    "has_template": True,
    "supervised": {"assistant": {"tokens": 30, "supervised": 20, "weight": 19.5}},
    "settings": {"tune": "lora", "learning_rate": 2e-4},
    "versions": {"torch": "2.13.0"},
}


def checked(text: str) -> Any:
    """The metadata, through the hub's own classes and back, and by a plain YAML reader."""
    card = ModelCard(text)
    plain = yaml.safe_load(text.split("---\n")[1])
    again = ModelCardData(**{k: v for k, v in plain.items() if k != "model-index"}, model_name=None)
    assert again.license == card.data.license
    assert yaml.safe_load(card.data.to_yaml()) == plain
    # What the hub's specification of model cards asks for.
    assert plain["library_name"] in {"transformers", "peft"}
    assert plain["pipeline_tag"] == "text-generation"
    assert all(isinstance(tag, str) for tag in plain["tags"])
    for model in plain.get("model-index", []):
        assert isinstance(model["name"], str)
        for result in model["results"]:
            assert {"task", "dataset", "metrics"} <= set(result)
            assert {"name", "type"} <= set(result["dataset"])
            for metric in result["metrics"]:
                assert isinstance(metric["value"], float)
                assert {"type", "name"} <= set(metric)
    return card.data


def test_the_metadata_of_a_published_base_and_data_set() -> None:
    data = checked(model_card(made(), PUBLISHED))
    assert (data.license, data.base_model, data.datasets) == ("apache-2.0", "org/base-1b", ["org/rows"])
    assert (data.library_name, data.to_dict()["base_model_relation"]) == ("peft", "adapter")
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"nll": 1.2, "perplexity": pytest.approx(3.320117), "bits_per_byte": 1.0, "accuracy": 0.5}
    assert data.model_name == "org/base-1b fine-tuned on org/rows:train, more.jsonl"


def test_hostile_names_are_text() -> None:
    name = "a\n---\nlicense: mit\n|`<img src=x>[x](http://e.org)\u202e\x00\ud800.jsonl"
    text = model_card(
        made(title=name), PUBLISHED | {"data": [name], "eval_data": [name], "base_name": name, "base": None}
    )
    text.encode()
    data = checked(text)
    assert data.license == "apache-2.0"
    body = text.split("\n---\n\n", 1)[1]
    assert "\\<img src=x\\>\\[x\\]" in body.splitlines()[0]
    assert not set("\u202e\x00\ud800") & set(text)
    for line in body.splitlines():
        assert not re.search(r"(?<!\\)<img", re.sub(r"`[^`]*`", "", line))


def test_without_held_out_rows_nothing_is_claimed() -> None:
    nothing: dict[str, Any] = dict.fromkeys(("base", "tuned", "delta"))
    text = model_card(made(**nothing), PUBLISHED | {"eval_data": [], "licence": None, "datasets": []})
    data = checked(text)
    assert data.eval_results is None
    assert data.license is None
    assert "model-index" not in text
    assert "Not measured: anything on held-out data." in text
    assert "licence is not known" in text


def test_the_card_of_a_run(finished: Finished) -> None:
    text = (finished.folder / "README.md").read_text(encoding="utf-8")
    data = checked(text)
    metrics = {result.metric_type: result.metric_value for result in data.eval_results}
    assert metrics["nll"] == pytest.approx(finished.report["tuned"]["nll"], abs=1e-6)
    assert data.eval_results[0].dataset_name == "held_out.jsonl"
    assert data.base_model is None  # a folder of this machine
    assert (
        f"| NLL, nats per token | {finished.report['base']['nll']:.4f} | {finished.report['tuned']['nll']:.4f} |"
        in text
    )
    delta = finished.report["delta"]
    assert f"change {delta['nll']:+.4f}" in text
    for value in finished.report["hashes"].values():
        assert value in text
    weight = finished.report["counted"]["held out data"]["weight"]
    assert re.search(rf"\| held out data \| {len(HELD_OUT)} \| .* {weight:g} \|", text)
    assert "learning_rate` | `0.003`" in text
    assert "Not measured: how much was forgotten" not in text


def test_no_folder_of_this_machine_is_in_a_card(finished: Finished, tmp_path: Path) -> None:
    text = (finished.folder / "README.md").read_text(encoding="utf-8")
    report = json.dumps(finished.report)
    hidden = {str(finished.folder.parent), str(Path.home()), str(tmp_path.parent)}
    assert any(name in report for name in hidden)  # so that the next line looks for something
    assert not [name for name in hidden if name in text and name != "/"]
    assert "train.jsonl" in text


def test_settings_told_are_no_places() -> None:
    fields = set(likely.config.Config.model_fields)
    assert set(provenance.TOLD) <= fields
    assert not set(provenance.TOLD) & {"model", "data", "eval_data", "retain", "guard", "output", "columns"}


def test_the_code_of_the_card_runs(
    tmp_path: Path, make_model_dir: Any, chat_tokenizer: Any, base_tokenizer: Any
) -> None:
    """An adapter with a template, and a whole model without one."""
    lines = ["import os"]
    for tune, tokenizer in (("lora", chat_tokenizer), ("full", base_tokenizer)):
        base = make_model_dir(tokenizer)
        (base / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# A model\n", encoding="utf-8")
        data = tmp_path / f"{tune}.jsonl"
        write_rows(data, TRAIN)
        if tune == "full":
            rows = [{"prompt": question, "completion": answer} for question, answer in TRAIN]
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        output = str(tmp_path / tune)
        run = likely.train(model=str(base), data=str(data), output=output, tune=tune, steps=1, dtype="float32")
        text = (run.folder / "README.md").read_text(encoding="utf-8")
        metadata = checked(text)
        assert metadata.license == "mit"
        assert metadata.library_name == ("peft" if tune == "lora" else "transformers")
        [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert ("apply_chat_template" in code) == (tune == "lora")
        (run.folder / "base").symlink_to(base)
        lines += [f"os.chdir({output!r})", code.replace("max_new_tokens=64", "max_new_tokens=4")]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\nText", "apache-2.0"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: 'a`b'\n---\n", None),
        ("---\nlicense: &x mit\nother: *x\n---\n", None),
        ("---\nlicense: mit", None),
        ("license: mit\n---\n", None),
        ("# Only text", None),
        ("\x00" * 100, None),
        ("---\n" + "x: y\n" * 100_000, None),
        (None, None),
    ],
)
def test_the_licence_of_a_base(tmp_path: Path, tiny_model_dir: Path, card: str | None, licence: str | None) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(tiny_model_dir / "config.json", folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    assert licence_of(Place(str(folder))) == licence
