"""Supervised fine-tuning as maximum likelihood: exact, visible, fast.

>>> import likely
>>> run = likely.train(model="smollm2-135m", data="train.jsonl", output="runs/1")  # doctest: +SKIP
>>> print(run.verdict)  # doctest: +SKIP
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from likely.errors import (
    ConfigError,
    DataError,
    GuardError,
    LikelyError,
    LockedError,
    ModelError,
    NonFiniteError,
    ResourceError,
)

if TYPE_CHECKING:
    from likely.insight.conversation import Voice
    from likely.learning_curve import Curve
    from likely.run import Run

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "DataError",
    "GuardError",
    "LikelyError",
    "LockedError",
    "ModelError",
    "NonFiniteError",
    "ResourceError",
    "chat",
    "check",
    "curve",
    "evaluate",
    "export",
    "score",
    "train",
]


@contextmanager
def _signals_as_python_has_them() -> Iterator[None]:
    from likely.stops import Stopped

    try:
        yield
    except Stopped as stopped:
        if stopped.signum == signal.SIGINT:
            raise KeyboardInterrupt(str(stopped)) from stopped
        raise SystemExit(stopped.exit_code) from stopped


def train(*, model: str, data: str, output: str, **settings: Any) -> Run:
    """Train a model on a file and report what changed.

    Args:
        model: a Hugging Face folder, a hub id, a run folder, ``RUN@step-N`` or ``smollm2-135m``.
        data: a JSONL file of ``messages`` or ``prompt``/``completion`` rows.
        output: the run folder to create.
        **settings: any other field of ``likely.config.Config`` or ``likely.config.Launch``, such as
            ``eval_data``, ``batch_size`` or ``resume``.

    Returns:
        The run: ``run.folder``, ``run.verdict`` and ``run.report``, the content of report.json.

    Raises:
        LikelyError: of the kind that fits the fault.
        GuardError: the training is done and written, and a response of ``guard`` gained more than ``guard_max_gain``
            nats; ``error.result`` is the run.
        KeyboardInterrupt, SystemExit: on SIGINT, SIGTERM; the steps done are saved, and ``resume="newest"`` goes on.
    """
    from likely.config import make_training, stored_values
    from likely.insight.guard import require_passed
    from likely.run import train as run_train
    from likely.training.log import Display

    config, launch = make_training(stored_values({"model": model, "data": data, "output": output, **settings}))
    with _signals_as_python_has_them():
        run = run_train(config, Display(), launch)
    require_passed(run.report.get("guard"), run)
    return run


def curve(*, model: str, data: str, output: str, **settings: Any) -> Curve:
    """Train on growing shares of a file, with several seeds each, and tell what twice as much data would bring.

    Args:
        output: the folder to create, for every point and what they say.
        **settings: any other field of :class:`likely.verb_settings.CurveSettings`, such as ``seeds`` or ``eval_data``.

    Returns:
        The curve: ``curve.folder``, ``curve.verdict`` and ``curve.result``, the content of curve.json.

    Raises:
        LikelyError: of the kind that fits the fault.
        KeyboardInterrupt, SystemExit: on SIGINT, SIGTERM; what is trained stays, and ``resume="newest"`` goes on.
    """
    from likely.config import make_settings, stored_values
    from likely.learning_curve import curve as run_curve
    from likely.training.log import Display
    from likely.verb_settings import CurveSettings

    values = stored_values({"model": model, "data": data, "output": output, **settings})
    asked = make_settings(CurveSettings, values)
    with _signals_as_python_has_them():
        return run_curve(asked, Display())


def check(*, model: str, data: str, **settings: Any) -> dict[str, Any]:
    """What training on a file would do, before any training, as ``likely check --json`` prints. Call it under
    ``if __name__ == "__main__":`` in a script, as the rows are rendered in processes of their own.

    Args:
        **settings: any other field of ``likely.verb_settings.CheckSettings``, such as ``eval_data``.

    Returns:
        ``{"ok", "verdict", "wrong", "proof", "audit", ...}``; ``ok`` is False where training would be refused.

    Raises:
        LikelyError: of the kind that fits the fault.
    """
    from likely.config import make_settings
    from likely.examine import check as examine_check
    from likely.training.log import Display
    from likely.verb_settings import CheckSettings

    return examine_check(data, make_settings(CheckSettings, {"model": model, **settings}), Display(quiet=True))


def score(*, model: str, data: str, with_prompts: bool = False, **settings: Any) -> Iterator[dict[str, Any]]:
    """Exact log-likelihood (nats) of every token of every example of a file, under one model or two.

    Args:
        with_prompts: look also at what each row's prompt does for its answer, which tells suspect labels.
        **settings: any other field of ``likely.verb_settings.LookSettings``, such as ``base`` or ``columns``.

    Returns:
        One record an example, as ``likely score`` writes them: ``source``, ``nll_nats``, ``num_tokens``, ``tokens``.

    Raises:
        LikelyError: of the kind that fits the fault.
    """
    from likely.config import make_settings
    from likely.look import score as look_score
    from likely.training.log import Display
    from likely.verb_settings import LookSettings

    asked = make_settings(LookSettings, {"model": model, **settings})
    return look_score(data, asked, Display(quiet=True), with_prompts=with_prompts)


def evaluate(*, model: str, data: str, **settings: Any) -> dict[str, Any]:
    """Held-out NLL (nats per token) with its interval and the other measures, as ``likely evaluate --json`` prints.

    Args:
        **settings: any other field of ``likely.verb_settings.EvaluateSettings``, such as ``base`` or ``columns``.

    Raises:
        LikelyError: of the kind that fits the fault.
        GuardError: a response of ``guard`` gained more than ``guard_max_gain`` nats over the base; ``error.result`` has
            the figures.
    """
    from likely.config import make_settings
    from likely.insight.guard import require_passed
    from likely.look import evaluate as look_evaluate
    from likely.training.log import Display
    from likely.verb_settings import EvaluateSettings

    found = look_evaluate(data, make_settings(EvaluateSettings, {"model": model, **settings}), Display(quiet=True))
    require_passed(found["guard"], found)
    return found


def export(*, run: str, to: str, output: str, **settings: Any) -> dict[str, Any]:
    """Write a run's tuned model for other tools and prove it there, as ``likely export --json`` prints.

    Args:
        run: a run folder, or ``RUN@step-N``.
        to: ``merged``, ``adapter``, ``gguf`` or ``ollama``.
        output: the folder to create.
        **settings: any other field of ``likely.verb_settings.ExportSettings``, such as ``type`` or ``push``.

    Returns:
        The content of export.json; see :func:`likely.deliver.export`.

    Raises:
        LikelyError: of the kind that fits the fault; nothing is left of an export that failed.
    """
    from likely.config import make_settings
    from likely.deliver import export as deliver_export
    from likely.training.log import Display
    from likely.verb_settings import ExportSettings

    asked = make_settings(ExportSettings, {"to": to, "output": output, **settings})
    return deliver_export(run, asked, Display(quiet=True))


def chat(*, run: str, **settings: Any) -> Voice:
    """A conversation with a run's tuned model, in the template and the tokens of its training.

    Args:
        run: a run folder, ``RUN@step-N``, or any other model.
        **settings: any other field of :class:`likely.verb_settings.ChatSettings` but ``prompt`` and ``compare``.

    Returns:
        The model's voice: ``voice.reply(question)`` gives ``text``, ``tokens`` with their log-probabilities and
        ``stopped``; ``voice.stream(question)`` the answer piece by piece; ``reset()``, ``instruct(system)`` and
        ``save(path)`` do what /reset, /system and /save do.

    Raises:
        LikelyError: of the kind that fits the fault.
    """
    from likely.config import make_settings
    from likely.converse import voices
    from likely.training.log import Display
    from likely.verb_settings import ChatSettings

    return voices(run, make_settings(ChatSettings, settings), Display(quiet=True))[-1]
