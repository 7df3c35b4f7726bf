"""Plans for many GPUs: the terms against closed forms, and whole steps against what others have published."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import likely
from likely.errors import ConfigError
from likely.insight.check_page import to_text
from likely.insight.estimate import Load, Shape
from likely.insight.plan import H100_RATE, Cluster, Work, imbalance, plan, read_cluster
from likely.types import Example, Source

BENCH = Path(__file__).parent.parent / "bench" / "scaling.py"
found = importlib.util.spec_from_file_location("scaling", BENCH)
assert found is not None
assert found.loader is not None
scaling = importlib.util.module_from_spec(found)
found.loader.exec_module(scaling)
B8: Shape = scaling.llama("8B")
B70: Shape = scaling.llama("70B")


def whole_rows(num: int, length: int) -> Load:
    """Rows of which every token is learnt, as in pretraining."""
    pairs = num * length * (length + 1) / 2
    return Load(num * length, num * length, length, pairs, pairs)


def work(batch_size: int, tune: str = "full", pack_tokens: int = 16384) -> Work:
    return Work(tune, 16, batch_size, pack_tokens)


def test_shapes_are_those_of_the_models() -> None:
    assert pytest.approx(8.03e9, rel=1e-3) == B8.parameters
    assert pytest.approx(70.55e9, rel=1e-3) == B70.parameters


@pytest.mark.parametrize(
    ("shape", "gpus", "rows_a_gpu", "rate", "network", "again", "published"),
    [
        # TorchTitan, December 2024: 8 H100 of one host. Half of the layers are computed twice, 7/6 of the work: here,
        # where all or none are, the rate makes up for that.
        (B8, 8, 2, H100_RATE * 8 / 7, 5e10, "full", 6667),
        # TorchTitan, 64 A100 with 25 GB/s each: the rate of an A100 is from 8B, the test is 70B.
        (B8, 64, 1, 1.74e14 * 6 / 7, 2.5e10, "none", 2904),
        (B70, 64, 1, 1.74e14, 2.5e10, "full", 331),
        # TorchTitan, December 2024, 128 H100 with 50 GB/s each: the rate is that of the first line.
        (B8, 128, 2, H100_RATE * 8 / 7, 5e10, "full", 6514),
    ],
)
def test_tokens_per_second_that_others_have_published(
    shape: Shape, gpus: int, rows_a_gpu: int, rate: float, network: float, again: str, published: float
) -> None:
    cluster = Cluster(gpus, memory=80e9, rate=rate, network=network)
    told = plan(shape, whole_rows(rows_a_gpu * gpus, 8192), work(rows_a_gpu * gpus), cluster)
    assert (told["layout"], told["checkpointing"], told["fits"]) == ("sharded", again, True)
    assert told["distinct_tokens_per_second"] / gpus == pytest.approx(published, rel=0.25)


# Operations per second of a GPU at FP8, from the first line.
FP8_RATE = 7.8e14


@pytest.mark.parametrize(
    ("name", "tune", "published"), [("2-7B", "full", 16891), ("2-7B", "lora", 24824), ("2-13B", "lora", 14629)]
)
def test_fine_tuning_by_eight_gpus_that_others_have_published(name: str, tune: str, published: float) -> None:
    """NeMo 24.12: 32 packed rows of 4,096 tokens a step, one at a time, nothing but data parallel."""
    load, cluster = whole_rows(32, 4096), Cluster(8, memory=80e9, rate=FP8_RATE)
    told = plan(scaling.llama(name), load, work(32, tune, 4096), cluster)
    assert (told["checkpointing"], told["fits"]) == ("none", True)
    assert told["distinct_tokens_per_second"] / 8 == pytest.approx(published, rel=0.25)


def test_the_plan_of_this_machine_counts_cores_and_not_processes() -> None:
    load = whole_rows(8, 200)
    machines = {1: scaling.Machine(1e11, 0.0, 4e10), 2: scaling.Machine(8e10, 1e9, 3e10)}
    two, four = (scaling.predict(B8, load, work(8), number, 1000.0, machines) for number in (2, 4))
    alone = 1000.0 - 28 * B8.parameters / 4e10
    assert two["compute"] == pytest.approx(alone / 2 / 0.8)
    assert four["compute"] == pytest.approx(two["compute"])
    assert two["communication"] == pytest.approx(4 * B8.parameters / 1e9)
    assert four["communication"] == pytest.approx(3 * two["communication"])  # each sends half more at half the speed
    assert four["update"] == pytest.approx(2 * two["update"])
    assert two["update"] == pytest.approx(28 * B8.parameters / 3e10)


def test_terms_in_closed_form() -> None:
    load = replace(whole_rows(16, 1000), largest_pack=1000)
    cluster = Cluster(8, memory=1e13, rate=1e14, link=1e11)
    told = plan(B8, load, work(16), cluster)
    assert told["layout"] == "replicated"
    assert told["checkpointing"] == "none"
    nodes, table = 16000, 128256 * 4096
    attention = 12 * 4096 * 32 * load.pairs
    flops = 6 * (B8.multiplied + table) * nodes + attention
    assert told["seconds"]["compute"] == pytest.approx(flops / 8 / 1e14)
    assert told["seconds"]["communication"] == pytest.approx(2 * 4 * B8.parameters * 7 / 8 / 1e11)
    assert told["gigabytes"]["weights"] == pytest.approx(4e-9 * B8.parameters)
    assert told["gigabytes"]["moments"] == pytest.approx(8e-9 * B8.parameters)
    assert told["checkpoint_gigabytes"] == pytest.approx(12e-9 * B8.parameters)
    assert told["seconds_per_step"] == pytest.approx(sum(told["seconds"].values()))
    slow = plan(B8, load, Work("full", 16, 16, 16384, imbalance=1.5), cluster)
    assert slow["seconds"]["compute"] == pytest.approx(1.5 * told["seconds"]["compute"])


def test_more_gpus_hold_less_each_and_a_ring_moves_all_but_its_share() -> None:
    tight = [plan(B70, whole_rows(64, 2048), work(64), Cluster(gpus, memory=80e9)) for gpus in (16, 32, 64)]
    assert [told["layout"] for told in tight] == ["sharded"] * 3
    assert [told["fits"] for told in tight] == [False, True, True]
    weights = [told["gigabytes"]["weights"] for told in tight]
    assert weights[0] == pytest.approx(2 * weights[1]) == pytest.approx(4 * weights[2])
    adapters = plan(B70, whole_rows(64, 2048), work(64, "lora"), Cluster(16, memory=80e9))
    assert adapters["fits"]
    assert adapters["checkpoint_gigabytes"] < 0.02 * tight[0]["checkpoint_gigabytes"]
    four_bits = plan(B70, whole_rows(64, 2048), work(64, "qlora", 4096), Cluster(16, memory=80e9))
    assert four_bits["layout"] == "replicated"
    assert four_bits["fits"]


def test_notes_say_what_to_change() -> None:
    few = plan(B8, whole_rows(8, 500), work(8), Cluster(64))
    assert any("a step of 8 examples can't occupy 64 GPUs" in note for note in few["notes"])
    small = plan(B70, whole_rows(8, 500), work(8), Cluster(2))
    assert any("does not fit" in note for note in small["notes"])


def test_a_cluster_is_read_from_its_words() -> None:
    found = read_cluster("gpus=64, memory=80GB,network=50GB/s,rate=400TFLOPS,per_host=4")
    assert found == Cluster(64, 80e9, 4, 4e14, 3e11, 5e10)
    assert (found.hosts, found.bandwidth) == (16, 5e10)
    assert Cluster(8).bandwidth == 3e11


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        ",",
        "memory=80GB",
        "gpus",
        "gpus=",
        "gpus=0",
        "gpus=-8",
        "gpus=2.5",
        "gpus=1e9",
        "gpus=1e999",
        "gpus=nan",
        "gpus=٨",
        "gpus=8,gpus=9",
        "gpus=8,disc=2GB",
        "gpus=many",
        "gpus=8,per_host=0",
        "gpus=8,memory=0",
        "gpus=8,memory=80",
        "gpus=8,memory=80TB",
        "gpus=8,memory=nanGB",
        "gpus=8,network=40/s",
        "gpus=8,rate=400",
    ],
)
def test_what_is_no_plan(wrong: str) -> None:
    """One line, which says what was meant where a unit is missing."""
    with pytest.raises(ConfigError) as caught:
        read_cluster(wrong)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("--plan: ")
    assert "\n" not in str(caught.value)


def test_a_plan_without_words_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a plan needs gpus"):
        likely.check(model="m", data=str(tmp_path / "d.jsonl"), plan="")


def test_imbalance_is_that_of_the_rule_that_deals() -> None:
    def row(token: int, length: int) -> Example:
        ids = np.full(length, token)
        return Example(ids, np.ones(length), np.zeros(length, np.int8), Source("a.jsonl", token))

    alike = [row(token, 100) for token in range(1, 9)]
    assert imbalance(B8, [alike], 1) == pytest.approx(1)
    assert imbalance(B8, [alike], 4) == pytest.approx(1)
    assert imbalance(B8, [alike], 16) == pytest.approx(2)  # half of the ranks have nothing
    one_long = [row(9, 4000), *alike]
    assert imbalance(B8, [one_long], 4) > 2


def test_the_check_prints_a_plan(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    rows = [json.dumps({"prompt": f"{n} and one?", "completion": str(n + 1)}) for n in range(40)]
    data.write_text("\n".join(rows), encoding="utf-8")
    told = likely.check(model=str(tiny_model_dir), data=str(data), plan="gpus=4,memory=16GB", processes=1)
    found = told["cost"]["plan"]
    assert found["layout"] == "replicated"
    assert 1 <= found["imbalance"] < 1.5
    assert found["seconds_per_step"] == pytest.approx(sum(found["seconds"].values()))
    text = to_text(told, colour=False)
    assert "on 4 GPUs, replicated: " in text
    assert f"{found['gigabytes_of_a_gpu']:.1f} GB of each GPU's 16" in text
    assert likely.check(model=str(tiny_model_dir), data=str(data), processes=1)["cost"]["plan"] is None
