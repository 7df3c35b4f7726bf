"""What happens around the steps of a run: metrics are written, held-out data is scored, checkpoints are saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from likely import stops
from likely.errors import NonFiniteError
from likely.insight.evaluate import Evaluation
from likely.training.checkpoint import State
from likely.training.log import MetricsFile
from likely.types import StepMetrics

SECONDS_BETWEEN_SAVES = 600.0
MAX_SAVING_SHARE = 0.03  # of the time, where the user names no interval


@dataclass
class Journal:
    """Observes the loop. Its memory is metrics.jsonl, so a resumed run remembers what an earlier process did.

    Args:
        num_steps: of the whole run.
        save: writes a checkpoint of a state.
        evaluate: scores the held-out data; None where there is none.
        show: is told of each step, for the progress bar.
        skip_nonfinite: how many steps may be left out.
        patience: end after so many evaluations without a better one, and save the state of each better one.
    """

    metrics: MetricsFile
    num_steps: int
    save: Callable[[State], None] = lambda _: None
    evaluate: Callable[[], Evaluation] | None = None
    show: Callable[[StepMetrics], None] = lambda _: None
    say: Callable[[str], None] = lambda _: None
    require: Callable[[], None] = lambda: None  # that the run folder still is ours
    # Of a save that takes several processes: whether all of them mean to, and then nobody can do it alone.
    all_of: Callable[[bool], bool] | None = None
    eval_every: int | None = None
    save_every: int | None = None
    skip_nonfinite: int = 0
    patience: int | None = None

    steps: list[StepMetrics] = field(default_factory=list)
    step: int = 0
    skipped: int = 0
    best: tuple[int, float] | None = None
    evaluated: dict[int, dict[str, Any]] = field(default_factory=dict)  # step -> its evaluation
    _whole: bool = True  # the weights are those after ``step``, and so are the metrics
    _saved_step: int = 0
    _saved_at: float = field(default_factory=time.monotonic)
    _saving_seconds: float = 0.0

    def remember(self, state: State) -> None:
        """Go back to a state that was saved."""
        if self.metrics.size < state.metrics_bytes:
            self.say("metrics.jsonl is shorter than when the checkpoint was saved: its lines are lost, the run goes on")
        for line in self.metrics.rewind(state.metrics_bytes):
            if "nll" in line:
                self.steps.append(StepMetrics(**line))
            elif "evaluation" in line:
                self.evaluated[line["step"]] = line["evaluation"]
        self.step = self._saved_step = state.step
        self.skipped, self.best = state.skipped, state.best

    @contextmanager
    def updating(self) -> Iterator[None]:
        self.require()
        with stops.shield():
            self._whole = False  # and never again, if the update or its line fails
            yield
            self._whole = True

    def updated(self, metrics: StepMetrics) -> None:
        self.metrics.write_step(metrics)
        self.steps.append(metrics)
        self.step = metrics.step
        self.show(metrics)

    def short_of_memory(self, step: int, pack_tokens: int) -> None:
        self.say(
            f"step {step} did not fit in memory: tried again with at most {pack_tokens} tokens at once and activations"
            " computed twice; the result is the same"
        )

    def not_finite(self, step: int, error: NonFiniteError) -> None:
        if self.skipped >= self.skip_nonfinite:
            raise error
        with stops.shield():
            self.require()
            self.metrics.write({"step": step, "skipped": str(error)})
            self.skipped += 1
            self.step = step
        self.say(f"left out ({self.skipped} of at most {self.skip_nonfinite}): {error.place}: {error.message}")

    def between_steps(self, step: int) -> bool:
        stops.check()
        last = step == self.num_steps
        if self.eval_every and (bool(self.patience) if last else step % self.eval_every == 0):
            self.record_evaluation()
        if self.patience and self.best and self.best[0] == step:
            self.save_now()
        due = self.save_every and (last or step % self.save_every == 0)
        if not self.save_every and not last:
            due = self._long_since_saved()
        if due:
            self.save_now()
        return self._patience_is_over

    @property
    def _patience_is_over(self) -> bool:
        """A function of metrics.jsonl, so that a resumed run ends where an undisturbed one does."""
        if not self.patience or self.best is None:
            return False
        return sum(step > self.best[0] for step in self.evaluated) >= self.patience

    def record_evaluation(self) -> None:
        """Score the held-out data with the present weights, once for each step."""
        if self.evaluate is not None and self.step not in self.evaluated:
            self.record(self.step, self.evaluate())

    def record(self, step: int, summary: Evaluation) -> None:
        """Note an evaluation of the weights after ``step`` steps, where the user asked for evaluations on the way."""
        if not self.eval_every or step in self.evaluated:
            return
        with stops.shield():
            self.metrics.write({"step": step, "evaluation": asdict(summary)})
            self.evaluated[step] = asdict(summary)
            if step and (self.best is None or summary.nll < self.best[1]):
                self.best = (step, summary.nll)

    def course(self, base: Evaluation | None, tuned: Evaluation | None, kept: int) -> list[dict[str, Any]]:
        """``{"step", "nll", "ci95"}`` of the held-out data: of the base at step 0, on the way, and of the tuned model
        at the step that was ``kept``."""
        ends = {step: asdict(summary) for step, summary in ((0, base), (kept, tuned)) if summary}
        scores = sorted({**self.evaluated, **ends}.items())
        return [{"step": step, "nll": score["nll"], "ci95": score["ci95"]} for step, score in scores]

    def catch_up(self) -> bool:
        """Do what was due after the step that a resumed run was stopped in, if it was not done; whether that was the
        last step."""
        return bool(self.step) and self.between_steps(self.step)

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Whatever ends the steps inside, save the last whole one, if that can still be done."""
        try:
            with stops.rescuing(self.save_now if self.all_of is None else lambda: None):
                yield
        except BaseException:
            with suppress(Exception):
                self.save_now()
            raise

    def save_now(self) -> None:
        """Save the state after the last whole step, unless that was done or the weights are no longer those."""
        due = self.step != self._saved_step and self._whole
        if self.all_of is not None:
            due = self.all_of(due)
        if not due:
            return
        self.require()
        with stops.shield():
            started = time.monotonic()
            self.save(self.state)
            self._saved_step, self._saved_at = self.step, time.monotonic()
            self._saving_seconds = self._saved_at - started

    @property
    def state(self) -> State:
        """The present state; the metrics it speaks of are on the disk."""
        self.metrics.sync()
        return State(self.step, self.metrics.num_bytes, self.skipped, self.best)

    def _long_since_saved(self) -> bool:
        wait = max(SECONDS_BETWEEN_SAVES, self._saving_seconds / MAX_SAVING_SHARE)
        due = time.monotonic() - self._saved_at > wait
        return due if self.all_of is None else self.all_of(due)
