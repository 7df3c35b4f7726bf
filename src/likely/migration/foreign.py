"""Another trainer's file while it is carried over: its values with their lines, what became of each, and our settings.

Every key ends in one of four ways: it is carried, it means something else here, it has no counterpart, or it has no say
in the result. What nobody asked for by the end has no counterpart, so that nothing is dropped in silence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from likely.credentials import has_credential, redact
from likely.errors import ConfigError, quoted
from likely.strict_yaml import MAX_CHARACTERS, YamlError, read_settings

Kind = Literal["differs", "no counterpart", "not needed"]
SECRET = (
    "token", "api_key", "apikey", "access_key", "private_key", "secret", "password", "passwd", "passphrase",
    "credential", "authorization",
)  # fmt: skip
NOT_SECRET = ("tokens", "tokenizer", "tokenized", "eos_token", "pad_token", "bos_token", "unk_token")

FILE_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst", ".zip", ".arrow")


@dataclass(frozen=True)
class Note:
    """What became of a key: ``place`` is file:line, or the file where a default of the other trainer is meant."""

    place: str
    key: str
    value: str
    kind: Kind
    text: str

    def __str__(self) -> str:
        shown = f"{self.key}: {self.value}" if self.value else f"{self.key} (not given)"
        return visible(redact(f"{self.place}: {shown}: {self.kind}: {self.text}"))


class Foreign:
    """A file of another trainer. ``settings`` are ours, filled by :meth:`carry`; ``notes`` say what is not the same.

    Raises:
        ConfigError: the file can't be read, or is no mapping of keys to values.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values, self._lines = _read(path)
        self.settings: dict[str, Any] = {}
        self.notes: list[Note] = []
        self._asked: set[str] = set()

    def value(self, key: str, default: Any = None) -> Any:
        """What a key says; the default where it is not there or empty."""
        self._asked.add(key)
        found = self.values.get(key)
        return default if found is None or found in ("", [], {}) else found

    def text(self, key: str, default: str | None = None) -> str | None:
        found = self.value(key)
        if found is None:
            return default
        if not isinstance(found, str):
            raise self.wrong(key, "write a text")
        return found

    def switch(self, key: str, default: bool = False) -> bool:
        found = self.value(key, default)
        if isinstance(found, str) and found.lower() in {"true", "false", "auto"}:
            return found.lower() != "false"
        if not isinstance(found, bool):
            raise self.wrong(key, "write true or false")
        return found

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number, also as a text, since YAML 1.1 reads 2e-5 as one."""
        found = self.value(key)
        if found is None:
            return default
        try:
            if isinstance(found, bool):
                raise ValueError
            number = float(found)
        except (TypeError, ValueError):
            raise self.wrong(key, "write a number") from None
        if not abs(number) < float("inf"):
            raise self.wrong(key, "write a finite number")
        return number

    def count(self, key: str, default: int | None = None) -> int | None:
        """An integer of at least 1; the default for 0 and -1, which trainers use for what is not given."""
        found = self.number(key)
        if found is None or found in (0, -1):
            return default
        if found != int(found) or found < 1:
            raise self.wrong(key, "write an integer of 1 or more")
        return int(found)

    def seed(self, about: str) -> None:
        """The seed to the last digit, with what it does not bring here."""
        found = self.value("seed")
        if found is None:
            return
        text = str(found)
        whole = not isinstance(found, bool) and text.isascii() and text.isdecimal() and len(text) <= 20
        if not whole or int(text) >= 1 << 64:
            raise self.wrong("seed", "write an integer from 0 to 2^64 - 1")
        self.carry("seed", int(text))
        self.differs("seed", about)

    def share(self, key: str) -> float | None:
        """A number of at least 0."""
        found = self.number(key)
        if found is not None and found < 0:
            raise self.wrong(key, "write a number of 0 or more")
        return found

    def wrong(self, key: str, way_out: str) -> ConfigError:
        return ConfigError(f"{key} is {self._shown(key)}", place=self._place(key), way_out=way_out)

    def carry(self, name: str, value: Any, key: str = "") -> None:
        """Our setting ``name``. A text with a credential is not carried, and said to be there under ``key``."""
        if isinstance(value, str) and has_credential(value):
            self.lacks(key or name, f"it holds a credential, which is not copied: set {name} without it")
            value = "CHANGE_ME"
        self.settings[name] = value

    def hub_name(self, name: str, config: Any, split: Any, key: str, named: str) -> str:
        """``org/name:config:split`` without what is the default; a file's name as it is. Of a split that is more than
        a name, such as ``train[:5%]``, the name alone is carried, which is said of ``key``. ``named`` is the name's
        own key."""
        if "://" in name:
            self.lacks(named, "nothing is fetched from an address: download it, and set data to the file")
            return "CHANGE_ME"
        if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.lower().endswith(FILE_ENDINGS):
            return name
        asked = str(split or "train").strip()
        plain = re.split(r"[^\w.-]", asked, maxsplit=1)[0] or "train"
        if plain != asked:
            self.differs(key, f"a part of a split can't be named, so all of {plain} is: make a file of the rows meant")
        if config and config != "default":
            return f"{name}:{config}:{plain}"
        return name if plain == "train" else f"{name}:{plain}"

    def differs(self, key: str, text: str) -> None:
        self._note(key, "differs", text)

    def lacks(self, key: str, text: str) -> None:
        self._note(key, "no counterpart", text)

    def not_needed(self, keys: Iterable[str], text: str) -> None:
        """Keys, where they are given, that change nothing in the weights of a training here."""
        for key in keys:
            if self.value(key) is not None:
                self._note(key, "not needed", text)

    def without_counterpart(self, reasons: Mapping[str, str], off: Iterable[Any] = (False, 0, 1, "none", "no")) -> None:
        """Keys, where they are given and do not say ``off``, that ask for what can't be had here."""
        for key, text in reasons.items():
            found = self.value(key)
            if found is not None and not any(found is o or (found == o and not isinstance(found, bool)) for o in off):
                self.lacks(key, text)

    def beginning(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """The reasons of prefixes as those of the keys that begin with them."""
        return {key: text for key in self.values for prefix, text in reasons.items() if key.startswith(prefix)}

    def finish(self) -> None:
        """Account for the keys that were not asked for, and put the notes in the order of the file."""
        for key, value in self.values.items():
            if key in self._asked or any(note.key == key for note in self.notes):
                continue
            if value is None:
                self._note(key, "not needed", "nothing is set")
            else:
                self.lacks(key, "not known; see what it does there before you leave it out")
        self.notes.sort(key=lambda note: int(note.place.rpartition(":")[2]) if note.value else 0)

    def line(self, key: str) -> int | None:
        """Of a key, or of a nested one as ``datasets.0.type``; None where it is not there."""
        return self._lines.get(key)

    def _note(self, key: str, kind: Kind, text: str) -> None:
        self._asked.add(key.partition(".")[0])
        self.notes.append(Note(self._place(key), key, self._shown(key), kind, text))

    def _place(self, key: str) -> str:
        line = self.line(key)
        return f"{self.path}:{line}" if line else str(self.path)

    def _shown(self, key: str) -> str:
        if self.line(key) is None:
            return ""
        if is_secret(key):
            return "***"
        found: Any = self.values
        for part in key.split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
        found = _hidden(found)
        return _plain(found) if isinstance(found, str) else quoted(found)


def is_secret(key: str) -> bool:
    """Whether a key's name says that its value must not be repeated."""
    name = key.lower()
    if name.split("_")[-1] in {"auth", "pwd"}:
        return True
    return any(word in name for word in SECRET) and not any(word in name for word in NOT_SECRET)


def visible(text: str) -> str:
    """A line of which no character steers a terminal or is none in YAML: such are written as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _hidden(value: Any) -> Any:
    """A value as it may be repeated: with stars for credentials, and for whatever a key's name says is one. They go
    before a long value is cut, since half a credential looks like none."""
    if isinstance(value, dict):
        return {redact(str(k)): "***" if is_secret(str(k)) else _hidden(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_hidden(each) for each in value]
    return redact(value) if isinstance(value, str) else value


def _plain(text: str) -> str:
    return text if len(text) <= 60 and text.isprintable() else quoted(text)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The values of a YAML or JSON file, and the line of every key, nested ones with dots."""
    try:
        with path.open("rb") as file:
            text = file.read(4 * MAX_CHARACTERS + 4).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} is not UTF-8"
        raise ConfigError(reason, place=str(path), way_out="save the file as UTF-8 text") from error
    except OSError as error:
        raise ConfigError(error.strerror or str(error), place=str(path), way_out="check the path") from error
    if text.lstrip().startswith("{"):
        text = _json_as_yaml(text, path)
    try:
        values = _joined(read_settings(text).values)
    except UnicodeDecodeError as error:
        way_out = "write the character itself"
        raise ConfigError("half a character, a lone surrogate", place=str(path), way_out=way_out) from error
    except YamlError as error:
        where = f"{path}:{error.line}:{error.column}" if error.line else str(path)
        raise ConfigError(redact(str(error)), place=where, way_out="give the trainer's YAML or JSON file") from error
    lines: dict[str, int] = {}
    root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    _note_lines(root, "", lines)
    # By the words of the file: YAML reads the key null as nothing, and on as true.
    names = [_joined(key.value) for key, _ in root.value]
    return dict(zip(names, values.values(), strict=True)), lines


def _joined(value: Any) -> Any:
    """A value in which a pair of surrogates, as JSON escapes a character beyond the first 65,536, is that character.

    Raises:
        UnicodeDecodeError: half of such a pair.
    """
    if isinstance(value, dict):
        return {_joined(key): _joined(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_joined(each) for each in value]
    return value.encode("utf-16", "surrogatepass").decode("utf-16") if isinstance(value, str) else value


def _json_as_yaml(text: str, path: Path) -> str:
    """JSON is YAML but for tabs between its values."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f"{path}:{error.lineno}:{error.colno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise ConfigError(f"broken JSON: {error}", place=place, way_out="give the trainer's own file") from error
    return text.replace("\t", " ")


def _note_lines(node: Any, prefix: str, lines: dict[str, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{_joined(key.value)}"
            lines[name] = key.start_mark.line + 1
            _note_lines(value, f"{name}.", lines)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[f"{prefix}{number}"] = value.start_mark.line + 1
            _note_lines(value, f"{prefix}{number}.", lines)
