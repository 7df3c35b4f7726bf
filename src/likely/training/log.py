"""What a run says while it works: metrics.jsonl for programs, a progress bar or plain lines on stderr for people."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from likely.types import StepMetrics

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


class MetricsFile:
    """Appends one JSON object a line, each on disk before the next step starts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, metrics: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def write_step(self, metrics: StepMetrics) -> None:
        self.write(asdict(metrics))


class Display:
    """Progress and prose on stderr: bars in a terminal, a line every ten seconds elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line, as it is: text of users is not markup."""
        self.console.print(text, markup=False)

    def track(self, items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
        """The items, with a bar of how many are done and the time left."""
        with self._progress() as progress:
            task = progress.add_task(title, total=total, note="")
            for item in items:
                yield item
                progress.advance(task)

    @contextmanager
    def training(self, num_steps: int) -> Iterator[Callable[[StepMetrics], None]]:
        """A bar for the steps, with NLL per token, tokens/s and time left; call the result after each step."""
        tokens = seconds = last_line = 0.0
        with self._progress() as progress:
            task = progress.add_task("training", total=num_steps, note="")

            def show(metrics: StepMetrics) -> None:
                nonlocal tokens, seconds, last_line
                tokens += metrics.tokens
                seconds += metrics.seconds
                rate = tokens / max(seconds, 1e-9)
                note = f"nll {metrics.nll:.4f}  {rate:,.0f} tokens/s"
                progress.update(task, advance=1, note=note)
                done = metrics.step == num_steps
                if not self.console.is_terminal and (done or time.monotonic() - last_line > SECONDS_BETWEEN_LINES):
                    last_line = time.monotonic()
                    left = seconds / metrics.step * (num_steps - metrics.step)
                    self.say(f"step {metrics.step}/{num_steps}  {note}  {left:.0f} s left")

            yield show

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
