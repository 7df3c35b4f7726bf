"""Trackers: what a training told them, read back from each library's own local store; and that none can harm a run."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import likely
from likely.config import Launch, make_training
from likely.errors import ConfigError
from likely.training import engine, tracking
from likely.training.tracking import About, numbers_of, tracked
from test_run import files as rows_of_run

rows = rows_of_run  # the fixture

Series = dict[str, dict[int, list[float]]]  # name -> step -> what stands there; one number, if nothing is doubled


def needs(library: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"the package {library} is not installed")


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores of the test's own, and nobody logged in."""
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.chdir(tmp_path)


# --- what stands in each store ---


def add(series: Series, name: str, step: int, number: float) -> None:
    series.setdefault(name, {}).setdefault(step, []).append(number)


def read_tensorboard(folder: Path) -> tuple[Series, dict[str, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    series: Series = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            add(series, name, event.step, event.value)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = HParamsPluginData.FromString(content).session_start_info.hparams
    return series, {key: str(getattr(value, str(value.WhichOneof("kind")))) for key, value in given.items()}


def read_wandb(folder: Path) -> tuple[Series, dict[str, str]]:
    """The records of the only offline run, which are kept in LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    data, position, parts = path.read_bytes(), 7, b""
    series: Series = {}
    config: dict[str, str] = {}
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (2, 3):  # the first and the middle parts of a record
            continue
        record, parts = Record.FromString(parts), b""
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name, number in items.items():
                if not name.startswith("_"):
                    add(series, name, int(items["_step"]), number)
        for change in (*record.run.config.update, *record.config.update):
            config[change.key or change.nested_key[0]] = change.value_json
    return series, config


def read_mlflow(folder: Path) -> tuple[Series, dict[str, str]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("likely")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == folder.name
    assert run.info.status == "FINISHED"
    series: Series = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            add(series, name, metric.step, metric.value)
    return series, dict(run.data.params)


def read_trackio(folder: Path) -> tuple[Series, dict[str, str]]:
    import sqlite3

    [store] = (folder.parent / "trackio").glob("likely*.db")
    connection = sqlite3.connect(store)
    lines = connection.execute("SELECT step, metrics FROM metrics").fetchall()
    [(config,)] = connection.execute("SELECT config FROM configs").fetchall()
    connection.close()
    series: Series = {}
    for step, metrics in lines:
        for name, number in json.loads(metrics).items():
            add(series, name, step, number)
    return series, {key: str(value) for key, value in json.loads(config).items()}


READERS: dict[str, Callable[[Path], tuple[Series, dict[str, str]]]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}
EVERY = [pytest.param(name, marks=needs(name)) for name in READERS]


def metrics_of(folder: Path) -> Series:
    series: Series = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        for name, number in numbers_of(json.loads(line)).items():
            add(series, name, json.loads(line)["step"], number)
    return series


def assert_same(told: Series, meant: Series, *, but: str = "") -> None:
    """Every number of metrics.jsonl once, to float32, as some stores hold it; ``but`` names one measured anew."""
    assert set(told) == set(meant)
    for name, numbers in meant.items():
        assert set(told[name]) == set(numbers), name
        for step, [number] in numbers.items():
            [seen] = told[name][step]
            assert name == but or seen == pytest.approx(number, rel=1e-6), (name, step)


def train(rows: tuple[str, str], model: Path, folder: Path, **settings: Any) -> Any:
    common = {"steps": 4, "batch_size": 2, "dtype": "float32", "eval_every": 2, "save_every": 2}
    settings = common | settings
    return likely.train(model=str(model), data=rows[0], eval_data=rows[1], output=str(folder), **settings)


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", EVERY)
def test_a_run_and_its_resumption_stand_in_the_store_once(
    tmp_path: Path, rows: tuple[str, str], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Stopped in its fourth step, and gone on with from the second: the third is told twice."""
    run_step, folder = engine._run_step, tmp_path / "run"

    def stopping(step: int, *arguments: Any) -> None:
        if step == 4:
            raise RuntimeError("the power is gone")
        run_step(step, *arguments)

    with monkeypatch.context() as broken:
        broken.setattr(tracking, "SECONDS_TO_LEAVE", 30.0)
        broken.setattr(engine, "_run_step", stopping)
        broken.setattr("likely.journal.Journal.guarding", lambda _: nullcontext())
        with pytest.raises(RuntimeError, match="the power is gone"):
            train(rows, tiny_model_dir, folder, track=name)
    assert len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 5  # 3 steps, 2 evaluations
    train(rows, tiny_model_dir, folder, track=name, resume="newest")
    told, config = READERS[name](folder)
    meant = metrics_of(folder)
    assert sorted(meant["nll"]) == [1, 2, 3, 4]
    assert sorted(meant["evaluation/nll"]) == [0, 2, 4]
    assert_same(told, meant, but="seconds")
    assert float(config["batch_size"]) == 2
    assert config["tune"].strip('"') == "lora"


# --- what a tracker can't do to a training ---


class Told:
    """A tracker that keeps what it is told."""

    library = "json"
    last: Told

    def __init__(self, about: About) -> None:
        self.about = about
        self.lines: list[tuple[int, tracking.Numbers]] = []
        self.finished: bool | None = None
        Told.last = self

    def write(self, step: int, numbers: tracking.Numbers) -> None:
        self.lines.append((step, numbers))

    def close(self, *, finished: bool) -> None:
        self.finished = finished


class Broken(Told):
    def write(self, step: int, numbers: tracking.Numbers) -> None:  # noqa: ARG002
        raise OSError("no such host")


class Leaving(Told):
    def __init__(self, about: About) -> None:  # noqa: ARG002
        sys.exit("not logged in")


class Hanging(Told):
    def write(self, step: int, numbers: tracking.Numbers) -> None:  # noqa: ARG002
        threading.Event().wait(60)


def install(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setitem(tracking.ADAPTERS, "tensorboard", kind)


@pytest.mark.parametrize(("kind", "words"), [(Broken, "no such host"), (Leaving, "not logged in")])
def test_a_tracker_that_fails_is_left_out_in_one_line(
    tmp_path: Path,
    rows: tuple[str, str],
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: Any,
    words: str,
) -> None:
    install(monkeypatch, kind)
    run = train(rows, tiny_model_dir, tmp_path / "run", track="tensorboard")
    assert run.report["tuned"]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tensorboard: ")]
    assert told == [f"tensorboard: {words}; it is told nothing more of this run, which goes on"]


def test_a_tracker_that_hangs_holds_up_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Hanging)
    monkeypatch.setattr(tracking, "SECONDS_TO_FINISH", 0.2)
    said: list[str] = []
    started = time.monotonic()
    with tracked(["tensorboard"], said.append) as run:
        run.start(About("id", "run", tmp_path, {}))
        for step in range(10_000):
            run.tell({"step": step, "nll": 1.0})
    assert time.monotonic() - started < 5
    assert said == ["tensorboard: it has not written all that it was told, and is left behind"]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_tracker_hears_how_it_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[BaseException] | None
) -> None:
    install(monkeypatch, Told)
    with pytest.raises(error) if error else nullcontext(), tracked(["tensorboard"], print) as run:
        run.start(About("id", "run", tmp_path, {"seed": 1}))
        run.tell({"step": 1, "nll": 2.5, "tokens": 3})
        run.tell({"step": 2, "skipped": "the loss is NaN"})
        run.tell({"step": 2, "evaluation": {"nll": 1.5, "ci95": [1.0, 2.0], "bits_per_byte": None}})
        if error:
            raise error
    assert Told.last.finished is (error is None)
    assert Told.last.lines == [
        (1, {"nll": 2.5, "tokens": 3}),
        (2, {"evaluation/nll": 1.5, "evaluation/ci95_low": 1.0, "evaluation/ci95_high": 2.0}),
    ]


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_made(
    tmp_path: Path, rows: tuple[str, str], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Told, "library", "no_such_library")
    install(monkeypatch, Told)
    with pytest.raises(ConfigError) as refused:
        train(rows, tiny_model_dir, tmp_path / "run", track="tensorboard")
    assert str(refused.value) == (
        "--track tensorboard: the package no_such_library is not installed; "
        "pip install 'likely[tensorboard]', or leave tensorboard out"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_that_saved_nothing_leaves_no_events(
    tmp_path: Path, rows: tuple[str, str], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trackers keep in the run folder is no reason to refuse the same command once more."""

    class Writing(Told):
        def __init__(self, about: About) -> None:
            super().__init__(about)
            (about.folder / "tensorboard").mkdir()
            (about.folder / "tensorboard" / "events.out.tfevents.1").write_bytes(b"1")

    def failing(*_: Any) -> None:
        raise RuntimeError("at once")

    install(monkeypatch, Writing)
    with monkeypatch.context() as broken:
        broken.setattr(engine, "_run_step", failing)
        with pytest.raises(RuntimeError, match="at once"):
            train(rows, tiny_model_dir, tmp_path / "run", track="tensorboard")
    assert not (tmp_path / "run").exists()


# --- settings ---


NEEDED = {"model": "m", "data": "d.jsonl", "output": "o"}


def test_the_setting() -> None:
    assert make_training(NEEDED | {"track": ["wandb", "mlflow"]})[1].trackers == ["wandb", "mlflow"]
    assert make_training(NEEDED | {"track": "trackio, tensorboard"})[1].trackers == ["trackio", "tensorboard"]
    assert Launch().trackers == []
    for wrong in ("aim", "wandb,wandb", "", ","):
        with pytest.raises(ConfigError, match="name one or more of tensorboard, wandb, mlflow, trackio"):
            make_training(NEEDED | {"track": wrong})


def test_weights_and_biases_is_offline_unless_the_user_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert not tracking._is_logged_in()
    netrc.write_text("machine example.org login user password x\n", encoding="utf-8")
    netrc.chmod(0o600)
    assert not tracking._is_logged_in()
    netrc.write_text("machine api.wandb.ai login user password x\n", encoding="utf-8")
    assert tracking._is_logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not tracking._is_logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert tracking._is_logged_in()
