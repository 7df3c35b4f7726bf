"""One of several processes fails: all end before anything is changed, with one line, and a resume reaches the same."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import world

from likely.errors import NonFiniteError, ResourceError
from likely.training import engine, signs
from likely.training.checkpoint import saved_steps
from likely.training.parallel import joined
from several import Ended, ends, start, together

SOON = 30.0  # seconds


@pytest.fixture(scope="module")
def two(lora_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The undisturbed outcome of two ranks: bit for bit what any resume by two must reach."""
    run = tmp_path_factory.mktemp("two") / "run"
    ended = together(2, lambda _: [world.train(run, lora_world.settings), None][1], run.parent / "logs")
    assert [e.code for e in ended] == [0, 0], ended
    return world.outcome(run)


def at_step(step: int, rank_of: int, act: Callable[[], Any]) -> Callable[[int], None]:
    """A change of a process: rank ``rank_of`` does something when it has computed the gradient's loss of a step."""

    def change(rank: int) -> None:
        original, calls = engine.compute_gradient, 0

        def compute(*given: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step and rank == rank_of:
                act()
            return original(*given, **more)

        engine.compute_gradient = compute

    return change


def disturbed(
    lora_world: Any, folder: Path, change: Callable[[int], None], environment: dict[str, str] | None = None
) -> tuple[list[int], Path]:
    run = folder / "run"

    def work(rank: int) -> None:
        signs.PATIENCE = 1.0
        change(rank)
        world.train(run, lora_world.settings)

    return start(2, work, folder / "logs", environment), run


def resumes_to(two: Any, run: Path, lora_world: Any) -> None:
    ended = together(2, lambda _: [world.train(run, lora_world.settings, "newest"), None][1], run.parent / "again")
    assert [e.code for e in ended] == [0, 0], ended
    assert world.outcome(run) == two | {"checkpoints": saved_steps(run / "checkpoints")}


def steps_done(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sum("nll" in json.loads(line) for line in lines)


def one_line(ended: Ended) -> str:
    (line,) = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    return line


def test_a_loss_that_is_not_finite_on_one_rank(lora_world: Any, two: Any, tmp_path: Path) -> None:
    def spoil() -> None:
        from likely.training import step

        nll_sum = step.nll_sum
        step.nll_sum = lambda *given: nll_sum(*given) * torch.nan

    pids, run = disturbed(lora_world, tmp_path, at_step(3, 1, spoil))
    ended = ends(pids, tmp_path / "logs")
    assert [e.code for e in ended] == [NonFiniteError.exit_code] * 2, ended
    assert "step 3: loss nan" in one_line(ended[0])
    assert ended[1].said == ""
    assert steps_done(run) == 2
    resumes_to(two, run, lora_world)


def test_a_signal_to_one_rank(lora_world: Any, two: Any, tmp_path: Path) -> None:
    pids, run = disturbed(lora_world, tmp_path, at_step(4, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    ended = ends(pids, tmp_path / "logs")
    assert [e.code for e in ended] == [143, 143], ended
    assert steps_done(run) == 3
    assert saved_steps(run / "checkpoints") == [2, 3]
    resumes_to(two, run, lora_world)


def test_no_room_for_a_checkpoint(lora_world: Any, two: Any, tmp_path: Path) -> None:
    """A save that fails on the rank that writes is a save that fails for all."""

    def change(rank: int) -> None:
        from likely import run as runs

        def refuse(*_: Any) -> Any:
            raise ResourceError("the checkpoint can't be written: No space left on device")

        if rank == 0:
            runs.save_checkpoint = refuse

    pids, run = disturbed(lora_world, tmp_path, change)
    ended = ends(pids, tmp_path / "logs")
    assert [e.code for e in ended] == [ResourceError.exit_code] * 2, ended
    assert "No space left" in one_line(ended[0])
    assert ended[1].said == ""
    assert not run.exists() or saved_steps(run / "checkpoints") == []
    resumes_to(two, run, lora_world)


@pytest.mark.parametrize("gone", [1, 0])
def test_a_killed_rank_is_named_and_what_is_done_is_saved(lora_world: Any, two: Any, tmp_path: Path, gone: int) -> None:
    pids, run = disturbed(lora_world, tmp_path, at_step(4, gone, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    began = time.monotonic()
    ended = ends(pids, tmp_path / "logs")
    assert ended[gone].code == -signal.SIGKILL
    other = ended[1 - gone]
    assert other.code == ResourceError.exit_code, other
    if gone == 1:  # else the store has gone with the rank that served it
        assert f"rank 1 (pid {pids[1]} on " in one_line(other)
        assert "gives no sign of life" in one_line(other)
        assert saved_steps(run / "checkpoints") == [2, 3]
    assert time.monotonic() - began < SOON + 10  # of which some is the start
    resumes_to(two, run, lora_world)


def test_a_rank_that_hangs(lora_world: Any, two: Any, tmp_path: Path) -> None:
    """It still gives signs of life, and ends itself once the others have named it."""
    pids, run = disturbed(lora_world, tmp_path, at_step(4, 1, lambda: time.sleep(1000)), {"LIKELY_TIMEOUT": "8"})
    ended = ends(pids, tmp_path / "logs")
    assert [e.code for e in ended] == [ResourceError.exit_code] * 2, ended
    assert f"rank 1 (pid {pids[1]} on " in one_line(ended[0])
    assert "hangs" in one_line(ended[0])
    assert saved_steps(run / "checkpoints") == [2, 3]
    resumes_to(two, run, lora_world)


def test_a_rank_that_is_cut_off(lora_world: Any, tmp_path: Path) -> None:
    """No connection is closed, and nothing comes any more: as when a cable is pulled."""
    pids, run = disturbed(
        lora_world, tmp_path, at_step(4, 1, lambda: os.kill(os.getpid(), signal.SIGSTOP)), {"LIKELY_SILENCE": "3"}
    )
    _, status = os.waitpid(pids[0], 0)
    assert os.waitstatus_to_exitcode(status) == ResourceError.exit_code
    os.kill(pids[1], signal.SIGKILL)
    os.waitpid(pids[1], 0)
    said = (tmp_path / "logs" / "said-0").read_text(encoding="utf-8")
    assert f"error: rank 1 (pid {pids[1]} on " in said
    assert saved_steps(run / "checkpoints") == [2, 3]


def test_nobody_waits_for_who_never_came(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank == 0:
            with joined() as ranks:
                ranks.all_sum(np.ones(1))

    ended = together(2, work, tmp_path, {"LIKELY_TIMEOUT": "3"})
    assert ended[0].code == ResourceError.exit_code
    assert "the 2 processes of this training can't find each other" in one_line(ended[0])
