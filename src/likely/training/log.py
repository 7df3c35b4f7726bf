"""What a run says while it works: metrics.jsonl for programs, a progress bar or plain lines on stderr for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from likely import launched, storage
from likely.errors import ModelError, harmless
from likely.types import StepMetrics

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


class MetricsFile:
    """One JSON object a line. A line is the operating system's before the next step starts, and on the disk before a
    checkpoint speaks of it. ``num_bytes`` is the length of the whole lines: a line that failed may leave a part.
    ``tell`` hears of each line once it is there, and of those that stay when a run goes on."""

    def __init__(self, path: Path, tell: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self._path = path
        self._tell = tell
        self.num_bytes = 0

    def write(self, metrics: dict[str, Any]) -> None:
        line = (json.dumps(metrics, allow_nan=False) + "\n").encode()
        with storage.disk_errors(self._path, "the metrics"):
            storage.append(self._path, line)
        self.num_bytes += len(line)
        self._tell(metrics)

    def write_step(self, metrics: StepMetrics) -> None:
        self.write(asdict(metrics))

    def sync(self) -> None:
        if self.num_bytes:
            with storage.disk_errors(self._path, "the metrics"):
                storage.sync_file(self._path)
                storage.sync_folder(self._path.parent)

    @property
    def size(self) -> int:
        """Bytes of the file, whoever wrote them."""
        return self._path.stat().st_size if self._path.is_file() else 0

    def rewind(self, num_bytes: int) -> list[dict[str, Any]]:
        """Forget what stands after the first ``num_bytes`` bytes; the lines that stay.

        Raises:
            ModelError: a line that no run wrote.
        """
        with storage.disk_errors(self._path, "the metrics"):
            if self.size > num_bytes:
                storage.truncate(self._path, num_bytes)
            whole = self._path.read_bytes() if self._path.exists() else b""
        self.num_bytes = len(whole)
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                lines.append({**json.loads(line)})
                int(lines[-1]["step"])
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ModelError(
                    f"no line of metrics: {error}",
                    place=f"{self._path}:{number}",
                    way_out="remove the file to go on without the lines so far",
                ) from error
        for whole_line in lines:
            self._tell(whole_line)
        return lines


class UnwrittenMetrics(MetricsFile):
    """Of a rank that leaves the file to the first."""

    def write(self, metrics: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def rewind(self, num_bytes: int) -> list[dict[str, Any]]:  # noqa: ARG002  (the first rank reads it)
        return []


class _Stderr:
    """The standard error stream of the moment. A terminal that was closed, or a pipe that nobody reads, must not end a
    training."""

    encoding = property(lambda _: getattr(sys.stderr, "encoding", "utf-8"))

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            return sys.stderr.isatty()
        return False


class Display:
    """Progress and prose on stderr: bars in a terminal, a line every ten seconds elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        quiet = quiet or not launched.speaks()  # of several processes, one shows what all do
        self.console = Console(file=cast(IO[str], _Stderr()), quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line, as it is: text of users is not markup."""
        self.console.print(harmless(text), markup=False)

    def track(self, items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
        """The items, with a bar of how many are done and the time left."""
        with self._progress() as progress:
            task = progress.add_task(title, total=total, note="")
            for item in items:
                yield item
                progress.advance(task)

    @contextmanager
    def counting(self, title: str) -> Iterator[Callable[[int, float], None]]:
        """A bar for rows whose number is not known before the last, with rate and time left; call the result with how
        many more are done, and the share of all that they bring it to."""
        done, started = 0, time.monotonic()
        last_line = started
        with self._progress() as progress:
            task = progress.add_task(title, total=None, note="")

            def advance(number: int, share: float) -> None:
                nonlocal done, last_line
                done += number
                now = time.monotonic()
                rate = done / max(now - started, 1e-9)
                total = max(round(done / share), done) if share else None
                progress.update(task, completed=done, total=total, note=f"{rate:,.0f} rows/s")
                if not self.console.is_terminal and now - last_line > SECONDS_BETWEEN_LINES:
                    last_line = now
                    left = f"  about {(total - done) / rate:.0f} s left" if total else ""
                    percent = f" ({share:.0%})" if share else ""
                    self.say(f"{title}: {done:,} rows{percent}  {rate:,.0f} rows/s{left}")

            yield advance

    @contextmanager
    def training(self, num_steps: int, steps_done: int = 0) -> Iterator[Callable[[StepMetrics], None]]:
        """A bar for the steps, with NLL per token, tokens/s and time left; call the result after each step."""
        tokens = seconds = last_line = 0.0
        started = time.monotonic()
        with self._progress() as progress:
            task = progress.add_task("training", total=num_steps, completed=steps_done, note="")

            def show(metrics: StepMetrics) -> None:
                nonlocal tokens, seconds, last_line
                tokens += metrics.tokens
                seconds += metrics.seconds
                rate = tokens / max(seconds, 1e-9)
                note = f"nll {metrics.nll:.4f}  {rate:,.0f} tokens/s"
                progress.update(task, completed=metrics.step, note=note)
                done = metrics.step == num_steps
                if not self.console.is_terminal and (done or time.monotonic() - last_line > SECONDS_BETWEEN_LINES):
                    last_line = time.monotonic()
                    elapsed = time.monotonic() - started  # with what happens between the steps
                    left = elapsed / (metrics.step - steps_done) * (num_steps - metrics.step)
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
            # The console writes to the stderr of the moment: a bar in its place would write to itself for ever.
            redirect_stdout=False,
            redirect_stderr=False,
        )
