"""A model over several processes, none of which has all of it: what comes out is what one process makes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import likely
from likely import stops
from likely.data.packing import build_packs, idle_pack
from likely.errors import ConfigError, ModelError
from likely.model.load import Tuning
from likely.training import sharded_files
from likely.training.objective import nll_sum
from likely.training.parallel import Ranks, joined
from likely.training.sharding import load_sharded, local
from naive import Row, truth
from several import Ended, together
from test_ranks import TUNES, assert_same, lines_of, train, weights_of, write_rows

ROWS: list[Row] = [
    ([5, 6, 7, 8, 9], [0, 0, 1, 1, 1]),
    ([5, 6, 7, 3], [0, 0, 0, 0.5]),
    ([5, 6, 2, 3, 4, 7], [0, 0, 0, 1, 2, 1]),
]


@pytest.fixture(scope="module")
def tied_model_dir(
    tiny_model_dir: Path, make_network: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model with one table for its tokens and its head."""
    folder = tmp_path_factory.mktemp("tied")
    for file in tiny_model_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def settings(tied_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Uneven data: one row is longer than all others together, and the last step of an epoch has one example."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "model": str(tied_model_dir),
        "data": write_rows(folder / "train.jsonl", [3, 1, 60, 2, 5, 1, 4]),
        "eval_data": write_rows(folder / "held_out.jsonl", [2, 7, 1, 4, 3]),
        "batch_size": 3,
        "steps": 6,
        "dtype": "float32",
        "pack_tokens": 200,
        "eval_every": 3,
        "save_every": 2,
        "num_answers": 1,
    }


def sharded(folder: Path, tuning: Tuning, ranks: Ranks) -> Any:
    return load_sharded(str(folder), tuning, ranks, compute_dtype=torch.float32)


def test_the_gradient_is_that_of_the_definition(
    tied_model_dir: Path, make_examples: Callable[[list[Row]], Any], tmp_path: Path
) -> None:
    """Rows that this rank has nothing of are there too, and a rank without examples adds nothing."""
    (pack,) = build_packs(make_examples(ROWS), 64)

    def work(rank: int) -> tuple[float, list[str], float]:
        from transformers import AutoModelForCausalLM

        with joined() as ranks:
            model = sharded(tied_model_dir, Tuning(), ranks)
            loss = nll_sum(model, pack if rank == 2 else idle_pack())
            loss.backward()
            found = {name: p.grad.full_tensor() for name, p in model.network.named_parameters()}
            held = sum(local(p).numel() for p in model.network.parameters())
            assert held <= 0.4 * sum(p.numel() for p in model.network.parameters())
            expected = truth(AutoModelForCausalLM.from_pretrained(tied_model_dir).double(), ROWS)
            wrong = [
                name
                for name, gradient in expected.gradient.items()
                if gradient is None or (found[name] - gradient).abs().max() > 1e-4 * gradient.abs().max()
            ]
            return float(loss.detach()), wrong, expected.nll

    ended = together(3, work, tmp_path)
    assert [e.code for e in ended] == [0] * 3, ended
    for rank, (loss, wrong, nll) in enumerate(e.gave for e in ended):
        assert wrong == []
        assert loss == pytest.approx(nll if rank == 2 else 0.0, rel=1e-6)


def files_of(folder: Path) -> dict[str, Any]:
    """Names of files, with what is in those of JSON."""
    return {
        file.name: json.loads(file.read_bytes()) if file.suffix == ".json" else None
        for file in folder.iterdir()
        if file.name not in {"MANIFEST.json", "state.json"}
    }


@pytest.mark.parametrize("tune", TUNES)
def test_one_two_and_four_ranks(settings: dict[str, Any], tmp_path: Path, tune: str) -> None:
    chosen = settings | TUNES[tune]
    likely.train(**chosen, output=str(tmp_path / "1"))
    for num in (2, 4) if tune == "full" else (2,):
        run = tmp_path / str(num)
        # Answers take a gathering of every layer for each token.
        asked = {"num_answers": 1 if (num, tune) == (2, "full") else 0}
        ended = train(run, chosen | asked, num, tmp_path / f"of {num}", shard="full")
        assert "sharded" in ended[0].said
        assert_same(run, tmp_path / "1")
        for folder in ("model", "checkpoints/step-000006", "checkpoints/step-000006/model"):
            assert files_of(run / folder) == files_of(tmp_path / "1" / folder)
        answers = json.loads((tmp_path / "1" / "report.json").read_bytes())["answers"]
        assert ended[0].gave["answers"] == answers[: asked["num_answers"]]
    if tune == "lora":
        return
    train(tmp_path / "again", chosen | {"num_answers": 0}, 2, tmp_path / "of 2 again", shard="full")
    assert [line["nll"] for line in lines_of(tmp_path / "again") if "nll" in line] == [
        line["nll"] for line in lines_of(tmp_path / "2") if "nll" in line
    ]
    weights = weights_of(tmp_path / "2")
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(tmp_path / "again").items())


@pytest.mark.parametrize("tune", TUNES)
def test_whole_copies_on_two_hosts(settings: dict[str, Any], tmp_path: Path, tune: str) -> None:
    """Two hosts of two ranks, each with all rows. Full tuning is stopped on its way, and goes on from there."""
    chosen = settings | TUNES[tune] | {"num_answers": 0, "eval_every": None, "save_every": 3}
    likely.train(**chosen, output=str(tmp_path / "1"))

    def until(last: int) -> Callable[[int], None]:
        def work(rank: int) -> None:
            from likely.journal import Journal

            between = Journal.between_steps
            os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")

            def stop(journal: Journal, at: int) -> bool:
                if at == last and rank == 3:
                    raise stops.Stopped(15)
                return between(journal, at)

            Journal.between_steps = stop  # type: ignore[method-assign]
            likely.train(**chosen, output=str(tmp_path / "4"), shard="hybrid", resume="newest")

        return work

    if tune == "full":
        assert [e.code for e in together(4, until(2), tmp_path / "stopped")] == [143] * 4
    ended = together(4, until(99), tmp_path / "logs")
    assert [e.code for e in ended] == [0] * 4, ended
    assert "each of 2 processes of a host holds some rows" in ended[0].said
    assert ("going on after step 2" in ended[0].said) == (tune == "full")
    assert_same(tmp_path / "4", tmp_path / "1")
    for folder in ("model", "checkpoints/step-000006", "checkpoints/step-000006/model"):
        assert files_of(tmp_path / "4" / folder) == files_of(tmp_path / "1" / folder)


@pytest.mark.parametrize("tune", TUNES)
def test_a_run_goes_on_sharded_in_another_way(settings: dict[str, Any], tmp_path: Path, tune: str) -> None:
    """One process, two, four, and one again; with files of a few rows, and one of the ranks stopped by a signal."""
    chosen = settings | TUNES[tune] | {"num_answers": 0, "save_every": None, "eval_every": None}
    likely.train(**chosen, output=str(tmp_path / "whole"))
    run = tmp_path / "run"

    def stopped_after(step: int, **more: Any) -> Callable[[int], None]:
        def work(rank: int) -> None:
            from likely.journal import Journal

            between = Journal.between_steps
            sharded_files.PIECE = 5000

            def stop(journal: Journal, at: int) -> bool:
                if at == step and rank == 0:
                    raise stops.Stopped(15)
                return between(journal, at)

            Journal.between_steps = stop  # type: ignore[method-assign]
            likely.train(**chosen, **more, output=str(run), resume="newest")

        return work

    assert together(1, stopped_after(1), tmp_path / "a")[0].code == 143
    assert [e.code for e in together(2, stopped_after(3, shard="full"), tmp_path / "b")] == [143] * 2
    assert [e.code for e in together(4, stopped_after(4, shard="full"), tmp_path / "c")] == [143] * 4
    saved = run / "checkpoints" / "step-000004"
    assert len(list(saved.glob("optimizer-*-of-*.safetensors"))) > 1
    if tune == "full":
        index = json.loads((saved / "model" / "model.safetensors.index.json").read_bytes())
        assert set(index["weight_map"]) == set(weights_of(tmp_path / "whole"))
    likely.train(**chosen, output=str(run), resume="newest")
    assert_same(run, tmp_path / "whole")


def test_auto_shards_what_does_not_fit(settings: dict[str, Any], tmp_path: Path) -> None:
    """And with fewer examples than ranks, in bfloat16."""
    chosen = settings | TUNES["full"] | {"num_answers": 0, "batch_size": 1, "steps": 2, "dtype": "bfloat16"}

    def work(_: int) -> None:
        from likely.training import memory

        memory.free_bytes = lambda _: 500_000
        likely.train(**chosen, output=str(tmp_path / "run"))

    ended = together(2, work, tmp_path / "logs")
    assert [e.code for e in ended] == [0, 0], ended
    assert "the model is sharded" in ended[0].said
    likely.train(**chosen, output=str(tmp_path / "1"))
    steps, others = ([line["nll"] for line in lines_of(tmp_path / r) if "nll" in line] for r in ("run", "1"))
    assert steps == pytest.approx(others, rel=1e-3)
    replicated = train(tmp_path / "replicated", chosen | {"steps": 1}, 2, tmp_path / "logs of 2")
    assert "sharded" not in replicated[0].said


def in_the_middle(
    act: Callable[[], None], settings: dict[str, Any], folder: Path, timeout: str = "60", rank: int = 1
) -> tuple[list[Ended], float, Path]:
    """A rank does something in the forward of the third step, when the others wait for its rows."""
    chosen = settings | TUNES["full"] | {"num_answers": 0, "eval_every": None, "save_every": None}

    def work(own: int) -> None:
        from likely.training import engine, sharding, signs

        signs.PATIENCE = 1.0
        original, gradient, calls = sharding.through_layer, engine.compute_gradient, 0

        def layer(*given: Any, **more: Any) -> Any:
            if calls == 3 and own == rank:
                act()
            return original(*given, **more)

        def compute(*given: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            return gradient(*given, **more)

        sharding.through_layer, engine.compute_gradient = layer, compute
        likely.train(**chosen, output=str(folder / "run"), shard="full")

    started = time.monotonic()
    ended = together(3, work, folder / "logs", {"LIKELY_TIMEOUT": timeout})
    return ended, time.monotonic() - started, folder / "run"


def test_a_failure_in_the_middle_of_a_forward_ends_all(settings: dict[str, Any], tmp_path: Path) -> None:
    def fail() -> None:
        raise ModelError("a layer broke")

    ended, seconds, run = in_the_middle(fail, settings, tmp_path)
    assert [e.code for e in ended] == [ModelError.exit_code] * 3, ended
    assert ended[0].said.splitlines()[-1] == "error: rank 1: a layer broke"
    assert ended[1].said == ended[2].said == ""
    assert seconds < 30
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]  # the last whole step, saved by all
    likely.train(
        **settings | TUNES["full"] | {"num_answers": 0, "eval_every": None, "save_every": None},
        output=str(run),
        resume="newest",
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_memory_ends_all_with_one_line(settings: dict[str, Any], tmp_path: Path, rank: int) -> None:
    def fail() -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory")

    ended, seconds, run = in_the_middle(fail, settings, tmp_path, rank=rank)
    assert [e.code for e in ended] == [5] * 3, ended
    (line,) = [line for line in ended[0].said.splitlines() if line.startswith("error: ")]
    assert "out of memory" in line
    assert "lower --pack-tokens" in line
    assert "step-000002 is saved" in line
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert seconds < 60


def test_a_rank_that_is_killed_in_the_middle_of_a_forward_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    ended, seconds, _ = in_the_middle(lambda: os.kill(os.getpid(), signal.SIGKILL), settings, tmp_path)
    assert [e.code for e in ended] == [5, -signal.SIGKILL, 5], ended
    assert "error: rank 1 (pid " in ended[0].said.splitlines()[-1]
    assert "no sign of life" in ended[0].said.splitlines()[-1]
    assert seconds < 30


def test_a_rank_that_hangs_in_the_middle_of_a_forward_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    ended, seconds, _ = in_the_middle(lambda: time.sleep(90), settings, tmp_path, timeout="8")
    assert [e.code for e in ended] == [5, 5, 5], ended
    assert "error: rank 1 (pid " in ended[0].said.splitlines()[-1]
    assert "hangs: the others waited for it in vain" in ended[0].said.splitlines()[-1]
    assert seconds < 60


def test_what_can_not_be_sharded(
    settings: dict[str, Any], tied_model_dir: Path, make_network: Callable[[str], Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="there is one process"):
        likely.train(**settings, output=str(tmp_path / "run"), shard="full")
    gpt = tmp_path / "gpt"
    gpt.mkdir()
    for file in tied_model_dir.iterdir():
        (gpt / file.name).write_bytes(file.read_bytes())
    network = make_network("gpt2")
    network.resize_token_embeddings(360)
    network.save_pretrained(gpt)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tied_model_dir.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][-1] = torch.nan  # of the last rank alone
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})

    def work(_: int) -> list[str]:
        said = []
        for folder in (gpt, broken):
            try:
                with joined() as ranks:
                    sharded(folder, Tuning(), ranks)
            except (ModelError, SystemExit) as error:
                said.append(str(error))
        return said

    ended = together(2, work, tmp_path / "logs")
    assert "it can't be sharded: GPT2LMHeadModel is not one of" in ended[0].gave[0]
    assert "rank 1: the weight model.norm.weight has NaN" in ended[0].gave[1]
    assert ended[1].gave == ["4", "4"]
