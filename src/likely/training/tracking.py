"""Trackers of experiments, told what metrics.jsonl is told. Each is a thin adapter on its own library, in a thread of
its own: whatever a tracker does or fails to do, the training neither waits nor stops.

A run that goes on tells the lines that stay once more, from the first: TensorBoard's and Weights & Biases' local files
are written anew, MLflow and Trackio pass over what they have. So no step is there twice and none is missing."""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Protocol, cast
from urllib.parse import urlsplit

from likely.errors import ConfigError, first_line

PROJECT = "likely"  # the project or experiment in trackers that have such
SECONDS_TO_FINISH = 30.0  # after the last line
SECONDS_TO_LEAVE = 2.0  # where the training was stopped or failed

Numbers = dict[str, float]


@dataclass(frozen=True)
class About:
    """A run, as trackers know it: an identity that stays when it is resumed, a name for people, its settings."""

    run_id: str
    name: str
    folder: Path
    settings: dict[str, Any]


class Tracker(Protocol):
    """A library's run. It is made, told and closed in one thread."""

    def write(self, step: int, numbers: Numbers) -> None:
        """What one line of metrics.jsonl says after ``step`` steps."""

    def close(self, *, finished: bool) -> None:
        """Write what is still held. Not ``finished``: the training was stopped, or failed."""


class TensorBoard:
    """Event files in RUN/tensorboard, by torch's writer."""

    library = "tensorboard"

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = about.folder / "tensorboard"
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self._writer = SummaryWriter(str(folder), flush_secs=10)
        for summary in hparams(about.settings, {"evaluation/nll": None, "nll": None}):  # type: ignore[no-untyped-call]
            cast(Any, self._writer.file_writer).add_summary(summary)

    def write(self, step: int, numbers: Numbers) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self, *, finished: bool) -> None:  # noqa: ARG002  (event files know no such state)
        self._writer.close()


class WeightsAndBiases:
    """A run in RUN/wandb, offline unless the user has logged in or set WANDB_MODE; ``wandb sync`` uploads it later."""

    library = "wandb"

    def __init__(self, about: About) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        offline = "WANDB_MODE" not in os.environ and not _is_logged_in()
        for earlier in (about.folder / "wandb").glob(f"offline-run-*-{about.run_id}"):
            shutil.rmtree(earlier)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=about.run_id,
            name=about.name,
            dir=str(about.folder),
            config=about.settings,
            resume=None if offline else "allow",
            mode="offline" if offline else None,
            # The metrics and settings of the run, and nothing of the machine or the code it ran on.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    def write(self, step: int, numbers: Numbers) -> None:
        if step >= self._run.starting_step:  # what the server has of a run that goes on
            self._run.log(numbers, step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run in MLflow's tracking store: MLFLOW_TRACKING_URI, or its own default in the working folder."""

    library = "mlflow"

    def __init__(self, about: About) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # tables that it creates are no news
        self._client, self._metric = MlflowClient(), Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        earlier = self._client.search_runs([experiment], f"tags.`likely.run_id` = '{about.run_id}'")
        self._is_new = not earlier
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {"likely.run_id": about.run_id}
            self._id = self._client.create_run(experiment, run_name=about.name, tags=tags).info.run_id
            params = [Param(key, str(value)) for key, value in about.settings.items()]
            self._client.log_batch(self._id, params=params)
        self._steps: dict[str, set[int]] = {}

    def write(self, step: int, numbers: Numbers) -> None:
        now = int(time.time() * 1000)
        new = {name: number for name, number in numbers.items() if step not in self._known_steps(name)}
        self._client.log_batch(self._id, metrics=[self._metric(n, v, now, step) for n, v in new.items()])

    def _known_steps(self, name: str) -> set[int]:
        if self._is_new:
            return set()
        if name not in self._steps:
            self._steps[name] = {metric.step for metric in self._client.get_metric_history(self._id, name)}
        return self._steps[name]

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


class Trackio:
    """A run in Trackio's local store, TRACKIO_DIR or its own default; ``trackio sync`` uploads it. Written through the
    store itself, since ``trackio.init`` asks the hub who is logged in, and prints."""

    library = "trackio"

    def __init__(self, about: About) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        self._store, self._about = SQLiteStorage, about
        self._config: dict[str, Any] | None = about.settings

    def write(self, step: int, numbers: Numbers) -> None:
        kind = "evaluation" if any(name.startswith("evaluation/") for name in numbers) else "step"
        self._store.bulk_log(
            os.environ.get("TRACKIO_PROJECT", PROJECT),
            f"{self._about.name}-{self._about.run_id[:8]}",
            [numbers],
            steps=[step],
            config=self._config,
            run_id=self._about.run_id,
            log_ids=[f"{self._about.run_id}-{kind}-{step}"],  # a line of the same id is there once
        )
        self._config = None

    def close(self, *, finished: bool) -> None:
        pass


ADAPTERS: dict[str, type[TensorBoard | WeightsAndBiases | MLflow | Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def _is_logged_in() -> bool:
    """Whether the user gave Weights & Biases a key, in the environment or by ``wandb login``."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    return False


def numbers_of(line: dict[str, Any]) -> Numbers:
    """The numbers of one line of metrics.jsonl; an evaluation's under ``evaluation/``, its interval as two ends."""
    numbers: Numbers = {}
    prefix = "evaluation/" if "evaluation" in line else ""
    for key, value in (line["evaluation"] if prefix else line).items():
        if key == "ci95" and value is not None:
            numbers |= {f"{prefix}ci95_low": value[0], f"{prefix}ci95_high": value[1]}
        elif isinstance(value, (int, float)) and key != "step":
            numbers[prefix + key] = value
    return numbers


@dataclass
class Tracking:
    """The trackers of a training; see :func:`tracked`."""

    names: Sequence[str]
    say: Callable[[str], None]
    _lines: dict[str, SimpleQueue[dict[str, Any] | bool]] = field(default_factory=dict)
    _threads: dict[str, threading.Thread] = field(default_factory=dict)

    OFF: ClassVar[str] = "it is told nothing more of this run, which goes on"

    def start(self, about: About) -> None:
        """Make each tracker's run, or go on with it, in a thread that ends with :meth:`close`."""
        for name in self.names:
            lines = self._lines[name] = SimpleQueue()
            self._threads[name] = threading.Thread(
                target=self._track, args=(name, about, lines), name=f"track-{name}", daemon=True
            )
            self._threads[name].start()

    def tell(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl, on its way to the trackers when this returns."""
        for lines in self._lines.values():
            lines.put(line)

    def close(self, *, finished: bool) -> None:
        """Give the trackers a moment to write what they were told."""
        for lines in self._lines.values():
            lines.put(finished)
        deadline = time.monotonic() + (SECONDS_TO_FINISH if finished else SECONDS_TO_LEAVE)
        for name, thread in self._threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self.say(f"{name}: it has not written all that it was told, and is left behind")

    def _track(self, name: str, about: About, lines: SimpleQueue[dict[str, Any] | bool]) -> None:
        try:
            tracker: Tracker = ADAPTERS[name](about)
            while isinstance(line := lines.get(), dict):
                if numbers := numbers_of(line):
                    tracker.write(line["step"], numbers)
            tracker.close(finished=line)
        except (Exception, SystemExit) as error:  # of a library that this training does not need
            del self._lines[name]
            self.say(f"{name}: {first_line(error)}; {self.OFF}")


@contextmanager
def tracked(names: Sequence[str], say: Callable[[str], None]) -> Iterator[Tracking]:
    """The trackers of that name, closed at the end.

    Raises:
        ConfigError: one's library is not installed.
    """
    for name in names:
        library = ADAPTERS[name].library
        if importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"the package {library} is not installed",
                place=f"--track {name}",
                way_out=f"pip install 'likely[{name}]', or leave {name} out",
            )
    tracking = Tracking(names, say)
    try:
        yield tracking
    except BaseException:
        tracking.close(finished=False)
        raise
    tracking.close(finished=True)
