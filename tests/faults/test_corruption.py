"""Whatever is changed in a checkpoint is found before a byte of it is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from safetensors.torch import load_file, save_file

import likely
from likely import manifest
from likely.errors import ModelError
from likely.training.checkpoint import name_of, newest_valid, open_checkpoint

REGION = 4096


@pytest.fixture
def checkpoints(lora_world: Any, tmp_path: Path) -> Path:
    shutil.copytree(lora_world.undisturbed, tmp_path / "run")
    return tmp_path / "run" / "checkpoints"


def run_id(checkpoints: Path) -> str:
    return str(json.loads((checkpoints.parent / "run.json").read_bytes())["run_id"])


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def assert_passed_over(checkpoints: Path) -> str:
    """The newest checkpoint is not trusted, by itself or among others."""
    with pytest.raises(ModelError) as caught:
        open_checkpoint(checkpoints / name_of(6), run_id(checkpoints))
    assert "\n" not in str(caught.value)
    found, reasons = newest_valid(checkpoints, run_id(checkpoints))
    assert found is not None
    assert (found.state.step, reasons) == (4, [str(caught.value)])
    return str(caught.value)


def test_every_region_of_every_file(checkpoints: Path) -> None:
    tried = 0
    for path in files(checkpoints / name_of(6)):
        whole = path.read_bytes()
        for start in range(0, len(whole), REGION):
            for bit in (0, 3, 7):
                changed = bytearray(whole)
                changed[min(start + 17 * bit, len(whole) - 1)] ^= 1 << bit
                path.write_bytes(changed)
                with pytest.raises(ModelError):
                    open_checkpoint(checkpoints / name_of(6), run_id(checkpoints))
                tried += 1
        path.write_bytes(whole)
    assert tried > 50
    assert open_checkpoint(checkpoints / name_of(6), run_id(checkpoints)).state.step == 6


def test_every_bit_of_the_small_files(checkpoints: Path) -> None:
    for name in ("state.json", manifest.NAME):
        path = checkpoints / name_of(6) / name
        whole = path.read_bytes()
        for place in range(0, len(whole), 1 if "LIKELY_SOAK" in os.environ else 7):
            changed = bytearray(whole)
            changed[place] ^= 1 << (place % 8)
            path.write_bytes(changed)
            with pytest.raises(ModelError):
                open_checkpoint(checkpoints / name_of(6), run_id(checkpoints))
        path.write_bytes(whole)


def test_every_file_cut_extended_or_gone(checkpoints: Path) -> None:
    for path in files(checkpoints / name_of(6)):
        whole = path.read_bytes()
        for changed in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\0", whole[:-64] + bytes(64)):
            path.write_bytes(changed)
            assert_passed_over(checkpoints)
        path.unlink()
        assert path.name in assert_passed_over(checkpoints)
        path.mkdir()
        assert_passed_over(checkpoints)
        path.rmdir()
        target = checkpoints / "elsewhere"
        target.write_bytes(whole)
        path.symlink_to(target)
        assert_passed_over(checkpoints)
        path.unlink()
        path.write_bytes(whole)
    assert newest_valid(checkpoints, run_id(checkpoints))[1] == []


def test_files_added_or_swapped(checkpoints: Path) -> None:
    newest, older = checkpoints / name_of(6), checkpoints / name_of(4)
    (newest / "model" / "generation_config.json").write_text("{}", encoding="utf-8")
    assert "model/generation_config.json is not in its manifest" in assert_passed_over(checkpoints)
    (newest / "model" / "generation_config.json").unlink()
    for path in files(newest):
        whole = path.read_bytes()
        other = (older / path.relative_to(newest)).read_bytes()
        if other != whole:
            path.write_bytes(other)
            assert_passed_over(checkpoints)
            path.write_bytes(whole)


def edits() -> Iterator[tuple[str, Any]]:
    """Changes of a manifest by somebody who also mends its hash."""
    yield "another step", lambda m: m.update(step=5)
    yield "a step of text", lambda m: m.update(step="6")
    yield "no step", lambda m: m.pop("step")
    yield "a newer schema", lambda m: m.update(schema=2)
    yield "no files", lambda m: m.update(files={})
    yield "files as a list", lambda m: m.update(files=[])
    yield "another run", lambda m: m.update(run_id="0" * 32)
    yield "another kind", lambda m: m.update(kind="model")
    yield "a million files", lambda m: m["files"].update({f"f{i}": {"size": 1, "sha256": ""} for i in range(20_000)})
    for name in ("../../etc/passwd", "/etc/passwd", "model/../state.json", "./state.json", "model//config.json"):
        yield name, lambda m, name=name: m["files"].update({name: {"size": 1, "sha256": "0" * 64}})
    for entry in ({"size": -1, "sha256": ""}, {"size": 1.5, "sha256": ""}, {"size": True}, "text", None, 7, []):
        yield f"the entry {entry}", lambda m, entry=entry: m["files"].update({"state.json": entry})


@pytest.mark.parametrize(("name", "edit"), list(edits()), ids=lambda value: value if isinstance(value, str) else "")
def test_edited_manifests(checkpoints: Path, name: str, edit: Any) -> None:
    path = checkpoints / name_of(6) / manifest.NAME
    content = json.loads(path.read_bytes())
    del content["manifest_sha256"]
    edit(content)
    path.write_bytes(manifest._text({**content, "manifest_sha256": manifest._digest(content)}))
    assert_passed_over(checkpoints)


def edit_state(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_bytes()) | changes
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

    return change


def edit_tensors(name: str, change: Any) -> Any:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return edit


def drop_one(tensors: dict[str, Any]) -> None:
    del tensors[min(tensors)]


def another_kind(tensors: dict[str, Any]) -> None:
    key = next(k for k in tensors if k.endswith(".step"))
    tensors[key] = torch.zeros(2, dtype=torch.int64)


def not_finite(tensors: dict[str, Any]) -> None:
    tensors[max(tensors)] = torch.full_like(tensors[max(tensors)], torch.nan)


FORGERIES = [
    edit_state(step=5),
    edit_state(step="4"),
    edit_state(step=True),
    edit_state(metrics_bytes=-1),
    edit_state(metrics_bytes="x"),
    edit_state(skipped=None),
    edit_state(best="ab"),
    edit_state(best=[1]),
    edit_state(more=1),
    edit_tensors("optimizer.safetensors", dict.clear),
    edit_tensors("optimizer.safetensors", drop_one),
    edit_tensors("optimizer.safetensors", another_kind),
    edit_tensors("optimizer.safetensors", not_finite),
    edit_tensors("random.safetensors", lambda t: t.update(cpu=t["cpu"][:9].clone())),
    edit_tensors("random.safetensors", dict.clear),
    lambda folder: (folder / "optimizer.safetensors").write_bytes(b"nothing"),
    lambda folder: (folder / "state.json").write_bytes(b"[]"),
]


@pytest.mark.parametrize("forge", FORGERIES)
def test_forged_states(lora_world: Any, checkpoints: Path, forge: Any) -> None:
    """Changed by somebody who mends the manifest as well."""
    folder = checkpoints / name_of(6)
    content = manifest.read(folder)
    forge(folder)
    (folder / manifest.NAME).unlink()
    with manifest.Seal(folder) as seal:
        seal.close({key: value for key, value in content.items() if key not in {"schema", "files"}})
    shutil.rmtree(checkpoints.parent / "model")
    (checkpoints.parent / "report.json").unlink()
    with pytest.raises(ModelError, match=r"step-000006"):
        world.train(checkpoints.parent, lora_world.settings, resume="step-6")


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"[" * 100_000, b"\xff\xfe", b'{"schema": 1}', b"7"])
def test_manifests_that_are_none(checkpoints: Path, text: bytes) -> None:
    (checkpoints / name_of(6) / manifest.NAME).write_bytes(text)
    assert "MANIFEST.json can't be trusted" in assert_passed_over(checkpoints)


def test_nothing_left_to_trust(lora_world: Any, checkpoints: Path) -> None:
    run = checkpoints.parent
    shutil.rmtree(run / "model")
    (run / "report.json").unlink()
    for step in (2, 4, 6):
        (checkpoints / name_of(step) / "state.json").write_bytes(b"{}")
    before = files(run)
    with pytest.raises(ModelError, match=r"no checkpoint can be trusted: .*step-000006.*step-000004.*step-000002"):
        world.train(run, lora_world.settings, resume="newest")
    assert files(run) == before
    with pytest.raises(ModelError, match=r"step-000002: state.json has 2 bytes instead of"):
        world.train(run, lora_world.settings, resume="step-2")


def test_a_corrupt_tuned_model_is_made_again(lora_world: Any, checkpoints: Path, capsys: Any) -> None:
    run = checkpoints.parent
    weights = run / "model" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    world.train(run, lora_world.settings, resume="newest")
    assert "passed over: " in capsys.readouterr().err
    assert world.outcome(run) == lora_world.reference


def test_what_is_looked_at_is_verified_too(lora_world: Any, checkpoints: Path) -> None:
    data = lora_world.settings["eval_data"]
    for name, folder in (
        (str(checkpoints.parent), checkpoints.parent),
        (f"{checkpoints.parent}@step-4", checkpoints / name_of(4)),
    ):
        weights = folder / "model" / "adapter_model.safetensors"
        raw = bytearray(weights.read_bytes())
        raw[-2] ^= 1
        weights.write_bytes(raw)
        with pytest.raises(ModelError, match=r"adapter_model.safetensors was changed"):
            likely.evaluate(model=name, data=data)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_id": ', "\0"])
def test_a_run_json_that_is_none(lora_world: Any, checkpoints: Path, text: str) -> None:
    (checkpoints.parent / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"run.json can't be read"):
        world.train(checkpoints.parent, lora_world.settings, resume="newest")
