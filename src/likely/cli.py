"""Verbs: parse, call, print. Every setting of a training is a flag of ``likely train``."""

from __future__ import annotations

import json
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from likely import __version__, launched
from likely.complaints import of_flag
from likely.config import (
    Config,
    Launch,
    demo_config,
    make_settings,
    make_training,
    over_file,
    read_yaml,
    stored_values,
    template_yaml,
)
from likely.credentials import redact
from likely.errors import ConfigError, DataError, LikelyError, ResourceError, harmless, is_out_of_memory
from likely.flags import with_flags, with_value
from likely.stops import Stopped
from likely.streams import lasting, silence
from likely.verb_settings import (
    ChatSettings,
    CheckSettings,
    CurveSettings,
    EvaluateSettings,
    ExplainSettings,
    ExportSettings,
    LookSettings,
)

app = typer.Typer(
    name="likely",
    help="Supervised fine-tuning as maximum likelihood: exact, visible, fast.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, and nothing else there")]
Data = Annotated[
    str,
    typer.Argument(metavar="DATA", help="a file, a.jsonl,b.csv, a mix as a.jsonl:0.7,b.csv:0.3, or a hub id"),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        _print(f"likely {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Supervised fine-tuning as maximum likelihood: exact, visible, fast."""


@app.command("train")
@with_flags(Config, Launch)
def train(
    settings: dict[str, Any],
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="settings; flags go over them")] = None,
    config_flag: Annotated[Path | None, typer.Option("--config", help="the same, by name")] = None,
    as_json: Json = False,
) -> None:
    """Train a model on a file, score it before and after on held-out data, save it and report."""
    if config and config_flag:
        raise ConfigError("the settings are given twice", place="--config", way_out=f"leave out {config}")
    file = config or config_flag
    values = over_file(read_yaml(file) if file else {}, settings)
    wanted, launch = make_training(stored_values(values), str(file) if file else "")
    _in_processes(launch.nproc)
    from likely import run
    from likely.training.log import Display

    result = run.train(wanted, Display(), launch)
    if launched.speaks():  # and has the report
        _print_run(result.report, result.folder, as_json)


@app.command("check")
@with_flags(CheckSettings)
def check(
    settings: dict[str, Any],
    data: Data,
    output: Annotated[Path | None, typer.Option("--output", help="HTML page to write")] = None,
    as_json: Json = False,
) -> None:
    """What training on a file would do, row by row, and what to look at first; nothing is trained."""
    asked = make_settings(CheckSettings, settings)
    from likely import examine
    from likely.insight.check_page import to_html, to_text
    from likely.insight.score_file import check_output, replacing
    from likely.training.log import Display

    if output is not None:
        check_output(output, data)
    result = examine.check(data, asked, Display())
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    _print(json.dumps(result, ensure_ascii=False) if as_json else to_text(result, colour=colour))
    if output is not None and "proof" in result:
        page = to_html(result)
        with replacing(output) as file:
            file.write(page)
    if not result["ok"]:
        place = result["first_wrong"] or data
        raise DataError(result["verdict"].rstrip("."), place=place, way_out="mend or remove these rows")


@app.command()
def demo(
    output: Annotated[str | None, typer.Option("--output", help="run folder to create [runs/demo]")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="fewer optimizer steps")] = None,
    as_json: Json = False,
) -> None:
    """The whole story offline, on a CPU: score a real model, train it, and see what changed."""
    from likely import run
    from likely.training.log import Display

    result = run.train(demo_config(output, steps=steps), Display())
    _print_run(result.report, result.folder, as_json)


@app.command("score")
@with_flags(LookSettings)
def score(
    settings: dict[str, Any],
    data: Data,
    output: Annotated[Path | None, typer.Option("--output", help="JSONL or .parquet file to write")] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="show so many rows to look at first [20, if no number follows]")
    ] = None,
) -> None:
    """Write the exact log-likelihood of every token of every example; show the rows to look at."""
    asked = make_settings(LookSettings, settings)
    if output is None and rank is None:
        raise ConfigError("nothing says what to do with the scores", way_out="give --output FILE, or --rank")
    _in_processes(asked.nproc)
    from likely import look
    from likely.insight.ranking import Ranking
    from likely.insight.score_file import check_output, record_writer
    from likely.training.log import Display

    if output is not None:
        check_output(output, data)
    display = Display()
    ranking = Ranking(rank or 0)
    with record_writer(output) if output is not None and launched.speaks() else nullcontext() as write:
        for record in look.score(data, asked, display, beside=output, with_prompts=rank is not None):
            ranking.add(record)
            if write is not None:
                write(record)
    display.say(f"{output or data}: {ranking.summary}")
    if rank is not None:
        _print(ranking.to_text())


@app.command("evaluate")
@with_flags(EvaluateSettings)
def evaluate(settings: dict[str, Any], data: Data, as_json: Json = False) -> None:
    """Held-out negative log-likelihood and more, with intervals, beside a base model's."""
    asked = make_settings(EvaluateSettings, settings)
    _in_processes(asked.nproc)
    from likely import look
    from likely.insight.guard import require_passed
    from likely.insight.prose import evaluation_text
    from likely.training.log import Display

    result = look.evaluate(data, asked, Display())
    _print(json.dumps(result) if as_json else evaluation_text(result, asked.model, asked.base))
    require_passed(result["guard"])


@app.command("curve")
@with_flags(CurveSettings)
def curve(settings: dict[str, Any], as_json: Json = False) -> None:
    """Train on growing shares of the data, and tell what twice as much would bring."""
    asked = make_settings(CurveSettings, stored_values(settings))
    _in_processes(asked.nproc)
    from likely import learning_curve
    from likely.insight.curve_page import to_text
    from likely.training.log import Display

    found = learning_curve.curve(asked, Display())
    told = {"curve": str(found.folder), **found.result}
    _print(json.dumps(told) if as_json else f"{to_text(found.result)}\npicture: {found.folder / 'curve.html'}")


@app.command("explain")
@with_flags(ExplainSettings)
def explain(settings: dict[str, Any], as_json: Json = False) -> None:
    """One answer under the lens: distributions, p - onehot, and what a step will do."""
    asked = make_settings(ExplainSettings, settings)
    if asked.distribution is not None:
        from likely.insight.distribution import explain_distribution
        from likely.insight.prose import pulls_table

        told = explain_distribution(asked.distribution, asked.against, asked.rate)
        _print(json.dumps(told) if as_json else pulls_table(told))
        return
    from likely import look
    from likely.insight.prose import explanation

    result = look.explain(asked)
    _print(json.dumps(result) if as_json else explanation(result))


@app.command("export")
@with_flags(ExportSettings)
def export(
    settings: dict[str, Any],
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or RUN@step-N")],
    as_json: Json = False,
) -> None:
    """Write a run's model for other tools; load it there and score it again before it gets its name."""
    asked = make_settings(ExportSettings, settings)
    from likely import deliver
    from likely.insight.prose import export_text
    from likely.training.log import Display

    result = deliver.export(run, asked, Display())
    _print(json.dumps(result, ensure_ascii=False) if as_json else export_text(result, asked.output))


@app.command("view")
def view(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, or a folder of such")],
    scores: Annotated[
        list[Path] | None, typer.Option("--scores", help="a file that likely score wrote; may be given several times")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one")] = 8321,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="only print the address")] = False,
) -> None:
    """Look at runs and scored rows in a browser, token by token, also while a training goes on."""
    try:
        from likely.view import view as serve_view
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"starlette", "uvicorn"}:
            raise
        raise ConfigError(f"the viewer needs {error.name}", way_out="pip install 'likely[view]'") from error
    serve_view(runs, scores or [], host=host, port=port, browser=not no_browser, say=_say, debug="--debug" in sys.argv)


@app.command("chat")
@with_flags(ChatSettings)
def chat(
    settings: dict[str, Any],
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, RUN@step-N, or any model")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object for each answer")] = False,
) -> None:
    """Talk with the tuned model, or with base and tuned; /help lists what else can be typed."""
    asked = make_settings(ChatSettings, settings)
    from likely import converse
    from likely.training.log import Display

    live = asked.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    terminal = converse.Terminal(_stream, _complain, live, colour)
    speaking = converse.voices(run, asked, Display(quiet=asked.prompt is not None))
    if asked.prompt is not None:
        converse.answer_once(speaking, asked.prompt, terminal, as_json=as_json)
    else:
        converse.converse(speaking, terminal, as_json=as_json)


@app.command()
def init(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="another trainer's settings or job")] = None,
    trainer: Annotated[str | None, typer.Option("--from", help="trl, axolotl, llamafactory or openai")] = None,
) -> None:
    """Print a YAML: every setting with its default, or those that another trainer's file comes to."""
    if file is None and trainer is None:
        _print(template_yaml())
        return
    from likely.migration.carry import TRAINERS, carry_over

    if trainer not in TRAINERS or file is None:
        raise ConfigError(
            "a trainer and its file go together", place="init", way_out=f"--from {'|'.join(TRAINERS)} FILE"
        )
    carried = carry_over(trainer, file)
    try:
        make_training(carried.settings)
    except ConfigError as error:
        raise ConfigError(error.message, place=str(file), way_out=error.way_out) from error
    for line in [*carried.notes, f"{file}: {carried.summary}"]:
        sys.stderr.write(f"{line}\n")
    _print(carried.to_yaml())


@app.command()
def env(as_json: Json = False) -> None:
    """Versions and devices, for a bug report."""
    from likely import provenance
    from likely.model.load import best_device, choose_compute_dtype

    device = best_device()
    dtype = str(choose_compute_dtype("auto", device)).removeprefix("torch.")
    found = {**provenance.versions(), "device": provenance.device_name(device), "dtype auto": dtype}
    _print(json.dumps(found) if as_json else "\n".join(f"{name}: {value}" for name, value in found.items()))


def _print_run(report: dict[str, Any], folder: Path, as_json: bool) -> None:
    from likely.insight.guard import require_passed
    from likely.insight.prose import run_text

    _print(json.dumps({"run": str(folder), **report}) if as_json else run_text(report, folder))
    require_passed(report.get("guard"))


def _stream(text: str) -> None:
    """A piece of a line at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _complain(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _print(text: str) -> None:
    if launched.speaks():
        sys.stdout.write(text + "\n")


def _in_processes(nproc: int | None) -> None:
    """Do the same in several processes instead, where they are asked for and not there."""
    if nproc is not None and nproc > 1 and launched.place().world_size == 1:
        from likely.training.launch import run_on_this_machine

        raise SystemExit(run_on_this_machine(nproc, sys.argv[1:]))


def _say(text: str) -> None:
    """A line at once, while the verb goes on."""
    _print(text)
    sys.stdout.flush()


def _explain(error: BaseException) -> tuple[str, int]:
    """What to say on stderr, in one line, and what the shell should hear."""
    text, code = f"{type(error).__name__}: {error}; this is a bug, please report it with the output of --debug", 1
    if isinstance(error, (LikelyError, Stopped)):
        text, code = str(error), error.exit_code
    elif isinstance(error, (KeyboardInterrupt, typer.Abort)):
        text, code = "interrupted", 130
    elif hasattr(error, "format_message"):  # a usage error of the command line parser
        text, code = of_flag(error.format_message()), 2
    elif isinstance(error, OSError):  # of the machine, or it would have been met where it arose
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        code = ResourceError.exit_code
    elif is_out_of_memory(error):
        text, code = "out of memory; lower --pack-tokens, or use --tune lora", ResourceError.exit_code
    return redact(harmless(" ".join(text.split()))), code


def main() -> None:
    """One clear line and the right exit code for every fault."""
    debug = "--debug" in sys.argv
    arguments = with_value([a for a in sys.argv[1:] if a != "--debug"]) or ["--help"]
    with lasting():
        try:
            code = app(args=arguments, prog_name="likely", standalone_mode=False) or 0
            sys.stdout.flush()
        except BaseException as error:
            if isinstance(error, OSError) or isinstance(error.__context__, BrokenPipeError):
                silence(sys.stdout)  # or the end of the process would try, and fail, once more
            if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
                sys.exit(141)  # the reader has seen enough; the parser makes an exit of its own of that
            if isinstance(error, SystemExit):
                raise
            if debug:
                traceback.print_exc()
            text, code = _explain(error)
            sys.stderr.write(f"error: {text}\n")
        sys.exit(code)
