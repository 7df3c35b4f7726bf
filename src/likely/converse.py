"""``likely chat``: the tuned model, or base and tuned, answer what is typed or comes through a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from likely import stops
from likely.config import Config, make_config, read_yaml
from likely.data.render import Renderer, load_tokenizer
from likely.errors import ConfigError, LikelyError
from likely.insight.conversation import Voice, harmless, likelihood_text
from likely.model import load as models
from likely.model.generate import Speaker, sampler
from likely.model.merge import merged_network
from likely.model.place import Place, choose_max_length, find_model
from likely.training.log import Display
from likely.verb_settings import ChatSettings

HELP = """\
/reset          forget what was said, but for the system message
/system TEXT    begin anew with this system message; without TEXT, with none
/likelihood     the tokens of the last answer, by the probability that the model gave them
/save FILE      add the conversation to a JSONL file, as a row to train on
/help           this list
/quit           end, as Ctrl-D does
//...           a message that begins with a slash
Ctrl-C stops an answer, and ends the program where there is none."""


@dataclass(frozen=True)
class Terminal:
    """Where a person or another program sits: ``write`` shows an answer, ``complain`` whatever goes wrong. A terminal
    (``live``) has prompts, and one with ``colour`` colours."""

    write: Callable[[str], None]
    complain: Callable[[str], None]
    live: bool
    colour: bool


def voices(run: str, asked: ChatSettings, display: Display) -> list[Voice]:
    """The tuned model, behind its base where both are asked for.

    Raises:
        LikelyError: of the kind that fits.
    """
    place = find_model(run)
    config = _config_of(run)
    found = [("tuned", place)]
    if asked.compare:
        if config is None:
            raise ConfigError("no run folder, so there is no base to compare with", place=run, way_out="name a run")
        found = [("base", _base_of(place, config)), *found]
    return [_voice(title, each, place, config, asked, display) for title, each in found]


def _config_of(run: str) -> Config | None:
    file = Path(run.partition("@")[0]) / "config.yaml"
    return make_config(read_yaml(file), str(file)) if file.is_file() else None


def _base_of(place: Place, config: Config) -> Place:
    """What the training began with; of an adapter that went on with another one, that one."""
    begun = find_model(config.model)
    return begun if begun != place else Place(place.weights)


def _voice(title: str, place: Place, own: Place, config: Config | None, asked: ChatSettings, display: Display) -> Voice:
    """Both models are told the same in the same tokens: those of the run."""
    tokenizer = load_tokenizer(own.tokenizer)
    renderer = Renderer(tokenizer)
    if config is not None:
        renderer = Renderer(tokenizer, template=config.template, template_date=config.template_date)
    device = models.best_device()
    display.say(f"loading {title}: {place.adapter or place.weights}")
    network = merged_network(place).to(models.choose_compute_dtype(asked.dtype, device)).to(device).eval()
    voice = Voice(
        title,
        Speaker(network),
        renderer,
        sampler(asked.temperature, asked.seed, device),
        asked.max_tokens,
        choose_max_length(place, None),
    )
    if asked.system is not None:
        voice.instruct(asked.system)
    return voice


def answer_once(speaking: list[Voice], prompt: str, terminal: Terminal, *, as_json: bool) -> None:
    """One prompt and its answers, for scripts.

    Raises:
        LikelyError: it can't be answered.
    """
    with stops.forgiving():
        _answer(speaking, prompt, terminal, as_json=as_json)


def converse(speaking: list[Voice], terminal: Terminal, *, as_json: bool) -> None:
    """Answer line after line until the end of the input, ``/quit`` or Ctrl-C at the prompt. As JSON every line but
    a command gives one object on the output: an answer, or ``{"prompt", "error"}``; commands tell theirs beside it."""
    commands = replace(terminal, write=terminal.complain) if as_json else terminal
    with stops.forgiving() as settle:
        if terminal.live:
            terminal.write("Type a message, or /help.\n")
        for line in _lines(terminal):
            if line.startswith("/") and not line.startswith("//"):
                word, _, rest = line.partition(" ")
                if word == "/quit":
                    return
                _try(partial(_command, word, rest.strip(), speaking, commands), terminal)
                continue
            text = line.removeprefix("/") if line.startswith("//") else line
            refused: str | None = "stopped; this turn is taken back"
            stopped = False
            try:
                refused = _try(partial(_answer, speaking, text, terminal, as_json=as_json), terminal)
            except KeyboardInterrupt:
                stopped = True
                terminal.complain(str(refused))
            if as_json and refused is not None:
                terminal.write(_json({"prompt": text, "error": refused}))
            settle(stopped)


def _try(act: Callable[[], None], terminal: Terminal) -> str | None:
    """Who talks goes on after a mistake, which is told and returned."""
    try:
        act()
    except LikelyError as error:
        terminal.complain(f"error: {error}")
        return str(error)
    return None


def _json(told: dict[str, Any]) -> str:
    """One line; bytes that are no text were refused, and are shown by a sign."""
    return json.dumps(told, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"


def _lines(terminal: Terminal) -> Iterator[str]:
    """What is typed, without empty lines; in a terminal with a line that can be edited and a history."""
    if terminal.live:
        with suppress(ImportError):
            import readline  # noqa: F401, PLC0415  (its import is what changes input())
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                terminal.write("\n")
                return
            if line:
                yield line
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # refused in its turn
    yield from filter(None, map(str.strip, sys.stdin))


def _answer(speaking: list[Voice], text: str, terminal: Terminal, *, as_json: bool) -> None:
    before = [list(voice.messages) for voice in speaking]
    try:
        for voice in speaking:
            _show(voice, text, terminal, named=len(speaking) > 1, silent=as_json)
    except BaseException:
        for voice, messages in zip(speaking, before, strict=True):  # a turn is everybody's, or nobody's
            voice.messages, voice.last = messages, None
        raise
    if as_json:
        told: dict[str, Any] = {"prompt": text}
        for voice in speaking:
            assert voice.last is not None  # noqa: S101
            told[voice.title] = voice.last.to_dict()
        terminal.write(_json(told))


def _show(voice: Voice, text: str, terminal: Terminal, *, named: bool, silent: bool) -> None:
    if named and not silent:
        terminal.write(f"{voice.title}: ")
    try:
        with closing(voice.stream(text)) as pieces:
            for piece in pieces:
                if not silent:
                    terminal.write(harmless(piece) if terminal.live else piece)
    finally:
        if not silent:
            terminal.write("\n")
    if not silent and voice.last is not None and not voice.last.stopped:
        terminal.complain(f"(cut after {len(voice.last.tokens)} tokens)")


def _command(word: str, rest: str, speaking: list[Voice], terminal: Terminal) -> None:
    if word == "/help":
        terminal.write(HELP + "\n")
    elif word == "/reset":
        for voice in speaking:
            voice.reset()
    elif word == "/system":
        for voice in speaking:
            voice.instruct(rest)
    elif word == "/likelihood":
        for voice in speaking:
            if voice.last is None:
                raise ConfigError("nothing was answered yet")
            title = f"{voice.title}: " if len(speaking) > 1 else ""
            terminal.write(f"{title}{likelihood_text(voice.last, colour=terminal.colour)}\n")
    elif word == "/save":
        if not rest:
            raise ConfigError("no file is named", way_out="write /save FILE.jsonl")
        speaking[-1].save(Path(rest))
        last = speaking[-1].last
        cut = last is not None and not last.stopped
        terminal.complain(f"saved to {rest}{'; its last answer was cut, and ends there as a row too' if cut else ''}")
    else:
        raise ConfigError(f"unknown command {word}", way_out="see /help; // begins a message with a slash")
