"""Several processes give what one gives: losses to 1e-6, weights to 1e-5, and bit for bit the same each time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import likely
from likely import stops
from likely.errors import ConfigError, DataError, NonFiniteError
from likely.training import parallel
from likely.training.parallel import Ranks, joined
from several import Ended, together


def exchanges(rank: int) -> dict[str, Any]:
    """One of everything."""
    with joined() as ranks:
        gradients = [torch.full((2, 3), 1.0 + rank), torch.full((3, 2), 10.0 * rank).T, torch.ones(7)]
        parallel.BUCKET = 12  # the first two together, the last alone
        ranks.sum_gradients(gradients)
        told = {
            "alone": ranks.alone,
            "first": ranks.first,
            "sum": ranks.all_sum(np.array([1.0, 10.0**rank])).tolist(),
            "said": ranks.first_says({"rank": rank, "text": "é"}),
            "gathered": [part.tolist() for part in ranks.gather(np.arange(float(rank)))],
            "json": ranks.gather_json({"rank": rank}),
            "gradients": [g.tolist() for g in gradients],
            "made": ranks.one_host_one_maker(lambda: f"by {rank}"),
        }
        ranks.require_same("the number", 7)
        with ranks.together():
            told["end"] = True
    with joined() as again:
        told["again"] = again.all_sum(np.ones(1)).tolist()
    return told


def test_what_ranks_tell_each_other(tmp_path: Path) -> None:
    ended = together(3, exchanges, tmp_path)
    assert [e.code for e in ended] == [0, 0, 0], ended
    for rank, told in enumerate(e.gave for e in ended):
        assert told == {
            "alone": False,
            "first": rank == 0,
            "sum": [3.0, 111.0],
            "said": {"rank": 0, "text": "é"},
            "gathered": [[], [0.0], [0.0, 1.0]],
            "json": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            "gradients": [[[6.0] * 3] * 2, [[30.0] * 3] * 2, [3.0] * 7],
            "made": f"by {rank}",
            "end": True,
            "again": [3.0],
        }


def test_who_comes_back_first_finds_the_others(tmp_path: Path) -> None:
    """While the first rank still says goodbye, the others are at their next meeting."""

    def work(rank: int) -> list[float]:
        sums = []
        destroy = dist.destroy_process_group
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(dist, "destroy_process_group", lambda: (time.sleep(0.5), destroy()))
            for _ in range(3):
                with joined() as ranks:
                    sums += ranks.all_sum(np.ones(1)).tolist()
        return sums

    ended = together(2, work, tmp_path)
    assert [(e.code, e.gave, e.said) for e in ended] == [(0, [2.0] * 3, "")] * 2


def test_alone_nothing_is_exchanged() -> None:
    ranks = Ranks()
    assert ranks.alone
    assert ranks.first
    assert ranks.all_sum(np.array([2.0])).tolist() == [2.0]
    assert ranks.first_says([1]) == [1]
    assert ranks.gather_json(3) == [3]
    with pytest.raises(ValueError, match="mine"), ranks.together():
        raise ValueError("mine")


def failing(error: BaseException, rank_of_failure: int, reached: list[str]) -> Callable[[int], None]:
    """Rank ``rank_of_failure`` fails while the others are elsewhere."""

    def work(rank: int) -> None:
        with joined() as ranks:
            ranks.all_sum(np.ones(1))
            if rank == rank_of_failure:
                with ranks.together():
                    raise error
            ranks.first_says(None)
            raise AssertionError("went on without the others")

    return work


ERRORS = [
    (DataError("a bad row", place="d.jsonl:3"), 3, "d.jsonl:3: rank 1: a bad row"),
    (NonFiniteError("loss nan"), 6, "rank 1: loss nan"),
    (ZeroDivisionError("division by zero"), 1, "rank 1: ZeroDivisionError: division by zero"),
    (MemoryError(), 5, "rank 1: out of memory; lower --pack-tokens"),
    (stops.Stopped(15), 143, "rank 1 was terminated"),
    (KeyboardInterrupt(), 130, "rank 1 was interrupted"),
]


@pytest.mark.parametrize(("error", "code", "words"), ERRORS, ids=lambda value: type(value).__name__)
def test_a_failure_of_one_is_the_end_of_all(tmp_path: Path, error: BaseException, code: int, words: str) -> None:
    ended = together(3, failing(error, 1, []), tmp_path)
    assert [e.code for e in ended] == [code] * 3, ended
    assert ended[0].said == f"error: {words}\n"
    assert ended[1].said == ended[2].said == ""


def test_ranks_that_differ(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with joined() as ranks:
            ranks.require_same("the weights", [0.5 * (rank == 2)])

    ended = together(3, work, tmp_path)
    assert [e.code for e in ended] == [ConfigError.exit_code] * 3
    assert ended[0].said.startswith("error: the weights of rank 2 differ from those of rank 0")


# --- trainings ---


def write_rows(path: Path, lengths: list[int]) -> str:
    """Answers of so many words; every third row has a prompt in common."""
    words = ["Open", "the", "settings,", "choose", "security", "and", "press", "reset."]
    rows = [
        {
            "prompt": "What is the capital of France?" if i % 3 == 0 else f"{i} + {i}?",
            "completion": " ".join(words[(i + k) % 8] for k in range(length)),
        }
        for i, length in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def settings(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Uneven data: one row is longer than all others together, and the last step of an epoch has one example."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "model": str(tiny_model_dir),
        "data": write_rows(folder / "train.jsonl", [3, 1, 60, 2, 5, 1, 4]),
        "eval_data": write_rows(folder / "held_out.jsonl", [2, 7, 1, 4, 3]),
        "batch_size": 3,
        "steps": 6,
        "dtype": "float32",
        "pack_tokens": 200,
        "eval_every": 3,
        "save_every": 2,
        "num_answers": 2,
    }


TUNES = {"full": {"tune": "full", "learning_rate": 1e-3}, "lora": {"lora_rank": 4, "learning_rate": 1e-2}}


def train(run: Path, chosen: dict[str, Any], num: int, folder: Path, **more: Any) -> list[Ended]:
    def work(_: int) -> dict[str, Any]:
        return likely.train(**chosen, **more, output=str(run)).report

    ended = together(num, work, folder)
    assert [e.code for e in ended] == [0] * num, ended
    assert [e.said for e in ended[1:]] == [""] * (num - 1)
    return ended


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_time(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines_of(run)]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "model").glob("*.safetensors")
    return dict(load_file(path))


def assert_same(run: Path, other: Path) -> None:
    """Within the bounds that sums in another order leave."""
    steps, others = ([line for line in lines_of(r) if "nll" in line] for r in (run, other))
    assert [line["step"] for line in steps] == [line["step"] for line in others]
    for here, there in zip(steps, others, strict=True):
        assert here["nll"] == pytest.approx(there["nll"], rel=1e-6)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
        assert [here[key] for key in ("tokens", "supervised_tokens", "learning_rate")] == [
            there[key] for key in ("tokens", "supervised_tokens", "learning_rate")
        ]
    weights, those = weights_of(run), weights_of(other)
    assert weights.keys() == those.keys()
    for name, weight in weights.items():
        assert (weight - those[name]).abs().max() <= 1e-5, name
    evaluations, others = ([line for line in lines_of(r) if "evaluation" in line] for r in (run, other))
    for here, there in zip(evaluations, others, strict=True):
        assert here["evaluation"]["nll"] == pytest.approx(there["evaluation"]["nll"], rel=1e-6)


@pytest.mark.parametrize("tune", TUNES)
def test_one_two_and_four_ranks(settings: dict[str, Any], tmp_path: Path, tune: str) -> None:
    chosen = settings | TUNES[tune]
    likely.train(**chosen, output=str(tmp_path / "1"))
    for num in (2, 4):
        run = tmp_path / str(num)
        ended = train(run, chosen, num, tmp_path / f"of {num}")
        assert_same(run, tmp_path / "1")
        first = lines_of(tmp_path / "1")[0]["evaluation"], lines_of(run)[0]["evaluation"]
        assert first[0] == first[1]  # of the base, to the last digit
        assert [e.gave for e in ended[1:]] == [{}] * (num - 1)
        assert len(ended[0].gave["answers"]) == 2
        assert all(answer["after"] for answer in ended[0].gave["answers"])
    again = tmp_path / "again"
    train(again, chosen, 2, tmp_path / "of 2 again")
    twice = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(r)] for r in (again, tmp_path / "2")
    ]
    assert twice[0] == twice[1]
    assert all(torch.equal(weight, weights_of(again)[name]) for name, weight in weights_of(tmp_path / "2").items())


def test_a_run_goes_on_with_another_number_of_ranks(settings: dict[str, Any], tmp_path: Path) -> None:
    chosen = settings | TUNES["full"] | {"num_answers": 0}
    likely.train(**chosen, output=str(tmp_path / "whole"))
    run = tmp_path / "run"

    def stopped_after(step: int) -> Callable[[int], None]:
        def work(_: int) -> None:
            from likely.journal import Journal

            between = Journal.between_steps

            def stop(journal: Journal, at: int) -> bool:
                if at == step:
                    raise stops.Stopped(15)
                return between(journal, at)

            Journal.between_steps = stop  # type: ignore[method-assign]
            likely.train(**chosen, output=str(run), resume="newest")

        return work

    assert together(1, stopped_after(1), tmp_path / "a")[0].code == 143
    assert [e.code for e in together(2, stopped_after(3), tmp_path / "b")] == [143, 143]
    likely.train(**chosen, output=str(run), resume="newest")
    assert_same(run, tmp_path / "whole")
