"""A run that was cut off goes on as if it had not been: bit for bit, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import world

from likely import run as runs
from likely.errors import ConfigError, LikelyError, LockedError, ModelError, NonFiniteError, ResourceError
from likely.training.checkpoint import name_of, saved_steps
from likely.training.step import compute_gradient


class Cut(Exception):  # noqa: N818  (no error, an end)
    """Stands for whatever ends a process."""


def cut_after(monkeypatch: pytest.MonkeyPatch, steps: int, error: BaseException) -> None:
    """End the run in the step after ``steps`` whole ones."""
    done = 0

    def compute(*arguments: Any, **more: Any) -> Any:
        nonlocal done
        done += 1
        if done > steps:
            raise error
        return compute_gradient(*arguments, **more)

    monkeypatch.setattr("likely.training.engine.compute_gradient", compute)


@pytest.mark.parametrize("steps", range(world.STEPS))
def test_resumed_equals_undisturbed(any_world: Any, tmp_path: Path, monkeypatch: Any, steps: int) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_after(patch, steps, Cut())
        with pytest.raises(Cut):
            world.train(run, any_world.settings)
    # The last whole step is saved whatever ended the run; before the first there is nothing to keep.
    assert saved_steps(run / "checkpoints")[-1:] == ([steps] if steps else [])
    assert run.exists() == bool(steps)
    world.train(run, any_world.settings, resume="newest")
    expected = {**any_world.reference, "checkpoints": saved_steps(run / "checkpoints")}
    assert world.outcome(run) == expected
    assert saved_steps(run / "checkpoints")[-1] == world.STEPS


def test_one_step_a_process(lora_world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "run"
    for _ in range(world.STEPS - 1):
        with monkeypatch.context() as patch:
            cut_after(patch, 1, Cut())
            with pytest.raises(Cut):
                world.train(run, lora_world.settings, resume="newest")
    world.train(run, lora_world.settings, resume="newest")
    assert world.outcome(run) == lora_world.reference | {"checkpoints": saved_steps(run / "checkpoints")}


@pytest.mark.parametrize("place", ["outcome.look", "write_report", "_compose_report"])
def test_cut_after_the_last_step(lora_world: Any, tmp_path: Path, monkeypatch: Any, place: str) -> None:
    owner, _, name = place.rpartition(".")
    holder = getattr(runs, owner) if owner else runs
    run, original = tmp_path / "run", getattr(holder, name)

    def cut(*arguments: Any) -> Any:
        if (run / "model").exists():
            raise Cut
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, cut)
        with pytest.raises(Cut):
            world.train(run, lora_world.settings)
    with monkeypatch.context() as patch:
        patch.setattr(runs.engine, "train", lambda *_, **__: pytest.fail("it trained on"))
        world.train(run, lora_world.settings, resume="newest")
    assert world.outcome(run) == lora_world.reference


def test_a_finished_run_is_left_alone(lora_world: Any, monkeypatch: Any) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in lora_world.undisturbed.rglob("*") if p.is_file()}
    monkeypatch.setattr(runs, "read_inputs", lambda *_: pytest.fail("it read the data"))
    for resume in ("newest", "step-4"):
        again = world.train(lora_world.undisturbed, lora_world.settings, resume=resume)
        assert again.verdict == lora_world.reference["verdict"]
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in before}


def unfinished(lora_world: Any, run: Path) -> Path:
    """A copy of the undisturbed run as if it had been killed before the tuned model was saved."""
    shutil.copytree(lora_world.undisturbed, run)
    shutil.rmtree(run / "model")
    (run / "report.json").unlink()
    return run


def test_from_a_step_by_name(lora_world: Any, tmp_path: Path) -> None:
    run = unfinished(lora_world, tmp_path / "run")
    assert saved_steps(run / "checkpoints") == [2, 4, 6]
    world.train(run, lora_world.settings, resume="step-2")
    assert world.outcome(run) == lora_world.reference
    run = unfinished(lora_world, world.fresh(run))
    with pytest.raises(ModelError, match=r"step-000003: no such checkpoint; saved: step-000002, step-000004"):
        world.train(run, lora_world.settings, resume="step-3")


def test_without_flags_the_stored_settings_count(lora_world: Any, tmp_path: Path) -> None:
    from likely.config import make_training, stored_values
    from likely.training.log import Display

    run = unfinished(lora_world, tmp_path / "run")
    config, launch = make_training(stored_values({"output": str(run), "resume": "newest"}))
    runs.train(config, Display(quiet=True), launch)
    assert world.outcome(run) == lora_world.reference


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"learning_rate": 2e-2}, ConfigError, ["learning_rate 0.01 -> 0.02"]),
        ({"seed": 1, "batch_size": 2}, ConfigError, ["batch_size 3 -> 2", "seed 0 -> 1"]),
        ({"steps": 9}, ConfigError, ["steps 6 -> 9"]),
        ({"tune": "full", "lora_alpha": None}, LikelyError, ["tune"]),
        ({"pack_tokens": 900}, None, []),
        ({"save_every": 1, "keep_checkpoints": 1, "eval_every": 2}, None, []),
    ],
)
def test_changed_settings(lora_world: Any, tmp_path: Path, change: Any, kind: Any, words: list[str]) -> None:
    run = unfinished(lora_world, tmp_path / "run")
    if kind is None:
        world.train(run, lora_world.settings | change, resume="newest")
        return
    with pytest.raises(kind) as caught:
        world.train(run, lora_world.settings | change, resume="newest")
    assert all(word in str(caught.value) for word in words)
    assert saved_steps(run / "checkpoints") == [2, 4, 6]


@pytest.mark.parametrize("name", ["train.jsonl", "held_out.jsonl"])
def test_changed_data(lora_world: Any, tmp_path: Path, name: str) -> None:
    run = unfinished(lora_world, tmp_path / "run")
    world.write_data(tmp_path)
    chosen = lora_world.settings | {
        "data": str(tmp_path / "train.jsonl"),
        "eval_data": str(tmp_path / "held_out.jsonl"),
    }
    text = (tmp_path / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(text.replace("0.", "1."), encoding="utf-8")
    with pytest.raises(ModelError, match=r"SHA-256\): (data|eval_data) [0-9a-f]{12} -> [0-9a-f]{12}; bring back"):
        world.train(run, chosen, resume="newest")
    (tmp_path / name).write_text(text, encoding="utf-8")
    # The same content at another place is the same data.
    world.train(run, chosen, resume="newest")
    assert world.outcome(run) == lora_world.reference


def test_changed_base(lora_world: Any, tmp_path: Path) -> None:
    run = unfinished(lora_world, tmp_path / "run")
    model = tmp_path / "model"
    shutil.copytree(lora_world.settings["model"], model)
    weights = model / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(ModelError, match=r"base [0-9a-f]{12} -> [0-9a-f]{12}"):
        world.train(run, lora_world.settings | {"model": str(model)}, resume="newest")


def test_a_checkpoint_of_another_run(lora_world: Any, full_world: Any, tmp_path: Path) -> None:
    run = unfinished(lora_world, tmp_path / "run")
    strange = run / "checkpoints" / name_of(6)
    shutil.rmtree(strange)
    shutil.copytree(full_world.undisturbed / "checkpoints" / name_of(6), strange)
    world.train(run, lora_world.settings, resume="newest")
    assert world.outcome(run) == lora_world.reference
    run = unfinished(lora_world, world.fresh(run))
    shutil.rmtree(run / "checkpoints" / name_of(6))
    shutil.copytree(run / "checkpoints" / name_of(4), run / "checkpoints" / name_of(6))
    with pytest.raises(ModelError, match="its manifest is that of checkpoint 4"):
        world.train(run, lora_world.settings, resume="step-6")


def test_names_that_are_not_ours(lora_world: Any, tmp_path: Path) -> None:
    run = unfinished(lora_world, tmp_path / "run")
    for name in ("step-abc", "step-00010", "step-10.bak", "step-9999999999999999999", "step-0000002", "x-step-000008"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / ".tmp-step-000008-ab").mkdir()
    (run / ".trash-model-00").mkdir()
    assert saved_steps(run / "checkpoints") == [2, 4, 6]
    world.train(run, lora_world.settings, resume="newest")
    assert not list(run.rglob(".tmp-*")) + list(run.rglob(".trash-*"))
    assert (run / "checkpoints" / "step-abc").is_dir()


def test_two_processes_on_one_run(lora_world: Any) -> None:
    from likely import storage

    with (
        storage.locked(lora_world.undisturbed),
        pytest.raises(LockedError, match=r"another process \(pid \d+\)") as caught,
    ):
        world.train(lora_world.undisturbed, lora_world.settings, resume="newest")
    assert caught.value.exit_code == 7
    assert not (lora_world.undisturbed / storage.LOCK).exists()


def test_a_folder_with_something_in_it(lora_world: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("dear", encoding="utf-8")
    with pytest.raises(ConfigError, match="not empty"):
        world.train(tmp_path / "run", lora_world.settings)
    with pytest.raises(ConfigError, match="not empty; go on with it by --resume"):
        world.train(lora_world.undisturbed, lora_world.settings)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_that_never_saved_anything_is_begun_again(lora_world: Any, tmp_path: Path) -> None:
    run = unfinished(lora_world, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "report", ignore_errors=True)
    for path in run.iterdir():
        if path.name not in {"run.json", "config.yaml", "metrics.jsonl"}:
            path.unlink()
    world.train(run, lora_world.settings)  # as typed the first time
    assert world.outcome(run) == lora_world.reference


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        MemoryError(),
        RuntimeError("can't allocate memory"),
    ],
)
def test_out_of_memory(lora_world: Any, tmp_path: Path, monkeypatch: Any, error: Exception) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_after(patch, 3, error)
        with pytest.raises(ResourceError, match=r"out of memory .* lower --max-length .* step-000003 is saved: go on"):
            world.train(run, lora_world.settings)
    world.train(run, lora_world.settings | {"pack_tokens": 60}, resume="newest")
    assert saved_steps(run / "checkpoints")[-1] == world.STEPS


class _Broken:
    """Makes the gradient of chosen steps not finite."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.calls = steps, 0

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        self.calls += 1
        if self.calls in self.steps:
            raise NonFiniteError("loss nan and gradient norm nan before the update")
        return compute_gradient(*arguments, **more)


def test_steps_that_are_not_finite(lora_world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr("likely.training.engine.compute_gradient", _Broken({2, 5}))
    with pytest.raises(NonFiniteError, match=r"step 2: .*train.jsonl:\d+, .*--skip-nonfinite"):
        world.train(run, lora_world.settings)
    assert saved_steps(run / "checkpoints") == [1]
    # The user may then go on without such steps; the budget is counted over all processes.
    monkeypatch.setattr("likely.training.engine.compute_gradient", _Broken({1, 4}))
    with pytest.raises(NonFiniteError, match="step 5"):
        world.train(run, lora_world.settings | {"skip_nonfinite": 1}, resume="newest")
    monkeypatch.setattr("likely.training.engine.compute_gradient", _Broken({1}))
    world.train(run, lora_world.settings | {"skip_nonfinite": 2}, resume="newest")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [2, 5]
    assert [line["step"] for line in lines if "nll" in line] == [1, 3, 4, 6]


def test_rotation_keeps_the_newest_and_the_best(lora_world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    worse = iter([1.0, 5.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0])
    original = runs.evaluation.summarize

    def summarize(*arguments: Any) -> Any:
        from dataclasses import replace

        return replace(original(*arguments), nll=next(worse), ci95=None)

    monkeypatch.setattr(runs.evaluation, "summarize", summarize)
    chosen = lora_world.settings | {"save_every": 1, "eval_every": 1, "keep_checkpoints": 2}
    world.train(tmp_path / "run", chosen)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [
        2,
        5,
        6,
    ]  # evaluations after steps 1, 2, ...: 5.0, 2.0, ...


def test_rotation_does_not_count_what_was_passed_over(lora_world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    run = unfinished(lora_world, tmp_path / "run")
    for step in (4, 6):
        (run / "checkpoints" / name_of(step) / "state.json").write_text("{}", encoding="utf-8")
    with monkeypatch.context() as patch:
        cut_after(patch, 1, Cut())
        with pytest.raises(Cut):
            world.train(run, lora_world.settings | {"keep_checkpoints": 1}, resume="newest")
    assert saved_steps(run / "checkpoints") == [3, 4, 6]
    world.train(run, lora_world.settings | {"keep_checkpoints": 1}, resume="newest")
    assert world.outcome(run) == lora_world.reference | {
        "checkpoints": [3, 6]
    }  # the best by its evaluation, the newest


def test_a_run_without_its_run_json(lora_world: Any, tmp_path: Path) -> None:
    run = unfinished(lora_world, tmp_path / "run")
    (run / "run.json").unlink()
    before = sorted(run.rglob("*"))
    with pytest.raises(ModelError, match=r"no run.json"):
        world.train(run, lora_world.settings, resume="newest")
    assert before == sorted(run.rglob("*"))


@pytest.mark.parametrize("resume", [None, "newest"])
def test_files_of_others_are_never_touched(lora_world: Any, tmp_path: Path, resume: str | None) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "epoch_9.ckpt").write_text("mine", encoding="utf-8")
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).write_text("mine", encoding="utf-8")
    before = {p: p.read_text(encoding="utf-8") for p in run.rglob("*") if p.is_file()}
    for chosen in (lora_world.settings, lora_world.settings | {"data": str(tmp_path / "missing.jsonl")}):
        with pytest.raises(ConfigError):
            world.train(run, chosen, resume=resume)
    assert before == {p: p.read_text(encoding="utf-8") for p in run.rglob("*") if p.is_file()}


def test_a_folder_that_was_swapped(lora_world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Another process may have begun a run of its own under the same name."""
    run, done = tmp_path / "run", 0

    def compute(*arguments: Any, **more: Any) -> Any:
        nonlocal done
        done += 1
        if done == 3:
            run.rename(tmp_path / "moved")
            (run / "checkpoints").mkdir(parents=True)
            (run / "metrics.jsonl").write_text("theirs\n", encoding="utf-8")
        return compute_gradient(*arguments, **more)

    monkeypatch.setattr("likely.training.engine.compute_gradient", compute)
    with pytest.raises(ResourceError, match="moved, removed or replaced"):
        world.train(run, lora_world.settings)
    assert (run / "metrics.jsonl").read_text(encoding="utf-8") == "theirs\n"
    assert sorted(p.name for p in run.rglob("*")) == ["checkpoints", "metrics.jsonl"]
    assert saved_steps(tmp_path / "moved" / "checkpoints") == [2]


def test_lost_or_broken_metrics(lora_world: Any, tmp_path: Path, capsys: Any) -> None:
    run = unfinished(lora_world, tmp_path / "run")
    (run / "metrics.jsonl").write_text("[1]\n" * 400, encoding="utf-8")
    with pytest.raises(ModelError, match=r"metrics.jsonl:1: no line of metrics"):
        world.train(run, lora_world.settings, resume="step-4")
    (run / "metrics.jsonl").unlink()
    world.train(run, lora_world.settings, resume="step-4")
    assert "metrics.jsonl is shorter" in capsys.readouterr().err
    weights = "adapter_model.safetensors"
    assert world.outcome(run)[weights] == lora_world.reference[weights]


@pytest.mark.parametrize("text", ["{", "{}", "[]", "null"])
def test_a_broken_report_is_written_again(lora_world: Any, tmp_path: Path, text: str) -> None:
    shutil.copytree(lora_world.undisturbed, tmp_path / "run")
    (tmp_path / "run" / "report.json").write_text(text, encoding="utf-8")
    world.train(tmp_path / "run", lora_world.settings, resume="newest")
    assert world.outcome(tmp_path / "run") == lora_world.reference


def test_two_runs_hold_the_same_state(full_world: Any, tmp_path: Path) -> None:
    torch.manual_seed(99)
    world.train(tmp_path / "run", full_world.settings)
    for name in ("random.safetensors", "optimizer.safetensors", "state.json"):
        one, other = (
            (run / "checkpoints" / name_of(6) / name).read_bytes() for run in (tmp_path / "run", full_world.undisturbed)
        )
        if name == "state.json":  # its metrics have seconds of other lengths
            one, other = (json.dumps(json.loads(raw) | {"metrics_bytes": 0}).encode() for raw in (one, other))
        assert one == other, name


def test_what_is_given_stays_as_it_is(any_world: Any, tmp_path: Path) -> None:
    given = [Path(any_world.settings["model"]), any_world.folder]
    files = [p for place in given for p in place.glob("*") if p.is_file()]
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
    world.train(tmp_path / "run", any_world.settings)
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
