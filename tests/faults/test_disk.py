"""The disk fails, the process dies, or the power goes, at each call that changes the disk."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import power
import pytest
import shim
import world

from likely import run as runs
from likely import storage
from likely.errors import LikelyError, ResourceError
from likely.training.checkpoint import newest_valid, saved_steps

# Every call in a soak, one in so many in the daily tests.
STRIDE = 1 if "LIKELY_SOAK" in os.environ else 9
CALLS = 118


def calls_of(world_: Any, run: Path, monkeypatch: Any) -> list[str]:
    counter = shim.Shim()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "system", counter)
        world.train(run, world_.settings)
    return counter.calls


def test_the_sweeps_cover_a_whole_run(bare_world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    calls = calls_of(bare_world, tmp_path / "run", monkeypatch)
    assert set(calls) >= {"write", "sync", "make_folder", "rename", "replace"}
    assert CALLS - 20 < len(calls) <= CALLS, f"set CALLS to a little over {len(calls)}"


def sweep(offset: int) -> range:
    return range(1 + offset % STRIDE, CALLS, STRIDE)


@pytest.mark.parametrize("at", sweep(0))
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["no space", "io error"])
def test_a_call_that_fails(bare_world: Any, tmp_path: Path, monkeypatch: Any, at: int, number: int) -> None:
    run = tmp_path / "run"
    faulty = shim.Shim(at, shim.failing(number))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "system", faulty)
        try:
            world.train(run, bare_world.settings)
        except LikelyError as error:
            assert isinstance(error, ResourceError)  # noqa: PT017
            assert os.strerror(number) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            # Only what is to be thrown away anyway may fail unheard, and what comes after the run.
            assert at > len(faulty.calls) or faulty.calls[at - 1] in {"remove_tree", "rename"}
    if run.exists():
        for step in saved_steps(run / "checkpoints"):
            assert newest_valid(run / "checkpoints", _run_id(run))[0] is not None, step
    world.train(run, bare_world.settings, resume="newest")
    assert world.outcome(run) == bare_world.reference | {"checkpoints": saved_steps(run / "checkpoints")}


def _run_id(run: Path) -> str:
    import json

    return str(json.loads((run / "run.json").read_bytes())["run_id"])


@pytest.mark.parametrize("at", sweep(4))
def test_killed_at_a_call(bare_world: Any, tmp_path: Path, at: int) -> None:
    run = tmp_path / "run"
    child = os.fork()
    if child == 0:
        storage.system = shim.Shim(at, shim.killing)
        try:
            world.train(run, bare_world.settings)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in {0, 137}
    world.train(run, bare_world.settings, resume="newest")
    assert world.outcome(run) == bare_world.reference


def test_loss_of_power(bare_world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """At every moment of a run, whatever the disk had not been told to keep may be gone."""
    root, run = tmp_path, tmp_path / "run"
    recorder = shim.Recorder(root)
    original = runs.save_checkpoint

    def save(folder: Path, state: Any, *arguments: Any) -> Path:
        saved = original(folder, state, *arguments)
        recorder.log.append(("acknowledged", state.step))
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(storage, "system", recorder)
        patch.setattr(runs, "save_checkpoint", save)
        world.train(run, bare_world.settings)
    run_id, acknowledged = _run_id(run), 0
    moments = range(1, len(recorder.log) + 1)
    for moment in moments:
        event = recorder.log[moment - 1]
        acknowledged = event[1] if event[0] == "acknowledged" else acknowledged
        for survivors in power.VARIANTS:
            left = world.fresh(tmp_path / "left")
            power.replay(recorder.log[:moment], left, survivors)
            found = 0
            if saved_steps(left / "run" / "checkpoints"):
                checkpoint, _ = newest_valid(left / "run" / "checkpoints", run_id)
                found = checkpoint.state.step if checkpoint else 0
            assert found >= acknowledged, f"{survivors} after {event[:2]}"
    # And what is left is enough to reach the same end.
    for moment in [m for m in moments if m % 40 == 11]:
        for survivors in power.VARIANTS:
            left = world.fresh(tmp_path / "left")
            power.replay(recorder.log[:moment], left, survivors)
            world.train(left / "run", bare_world.settings, resume="newest")
            assert world.outcome(left / "run") == bare_world.reference, (survivors, moment)


def test_a_full_file_system(bare_world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """What foreign code writes fails too; the limit on the size of a file stands for a disk with no room."""
    import resource
    import signal

    run = tmp_path / "run"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            world.train(run, bare_world.settings | {"tune": "full"})
        except LikelyError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ResourceError.exit_code
    assert not run.exists() or not list(run.rglob("*.safetensors"))


def test_too_little_disk_is_found_before_training(bare_world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    class Full:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(os, "statvfs", lambda _: Full())
    with pytest.raises(ResourceError, match=r"0 MB of disk are free, and a checkpoint with the model takes"):
        world.train(tmp_path / "run", bare_world.settings)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_vanishes(bare_world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    run, original = tmp_path / "run", runs.save_checkpoint

    def save(folder: Path, state: Any, *arguments: Any) -> Path:
        if state.step == 4:
            shutil.rmtree(run)
        return original(folder, state, *arguments)

    monkeypatch.setattr(runs, "save_checkpoint", save)
    with pytest.raises(ResourceError):
        world.train(run, bare_world.settings | {"save_every": 2})
