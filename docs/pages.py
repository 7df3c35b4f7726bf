"""Pages of the site that are made from the code, so that they can say nothing else: command line and settings.

A hook of MkDocs (``mkdocs.yml``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from likely.cli import app
from likely.config import SETTINGS_OF_TRAINING, Config, Launch

ROOT = Path(__file__).parent.parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out what the nav names and nobody has written yet, and name every other page."""
    named: set[str] = set()
    config.nav = _present(config.nav or [], Path(config.docs_dir), named)
    rest = sorted(path.name for path in Path(config.docs_dir).glob("*.md") if path.name not in named | {"log.md"})
    config.nav += [{"More": rest}] if rest else []
    return config


def _present(nav: Any, docs: Path, named: set[str]) -> Any:
    found = []
    for entry in nav:
        if isinstance(entry, str):
            entry = {"": entry}  # noqa: PLW2901
        [(title, target)] = entry.items()
        if isinstance(target, list):
            inner = _present(target, docs, named)
            found += [{title: inner}] if inner else []
        elif target in GENERATED or (docs / target).is_file():
            named.add(target)
            found.append({title: target} if title else target)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, write in GENERATED.items():
        files.append(File.generated(config, name, content=write()))
    return files


def command_line() -> str:
    """Every verb with its arguments and flags, from the parser itself."""
    group: Any = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "Every verb prints its help with `likely VERB --help`. Exit codes are at the end.",
        "",
    ]
    for name, verb in group.commands.items():
        takes = [p for p in verb.params if p.param_type_name == "argument"]
        usage = " ".join([f"likely {name}", *(_spelling(p) for p in takes), "[OPTIONS]"])
        lines += [
            f"## likely {name}",
            "",
            _plain(verb.help),
            "",
            "```text",
            usage,
            "```",
            "",
            "| option | |",
            "|---|---|",
        ]
        lines += [f"| `{_spelling(p)}` | {_plain(p.help)} |" for p in verb.params if p.name != "help"]
        lines += [""]
    return "\n".join([*lines, *_exit_codes()])


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return ", ".join(parameter.opts)


def _plain(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _exit_codes() -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^Exit codes: .*?\.$", readme, re.DOTALL | re.MULTILINE)
    return ["## Exit codes", "", found[0] if found else "", ""]


def settings() -> str:
    """Every field of a training's settings, from its JSON Schema."""
    lines = [
        "# Settings",
        "",
        "What `likely train` is told: by a flag (`--batch-size 8`), by a key of a YAML file (`batch_size: 8`) or by an",
        "argument of `likely.train` (`batch_size=8`). A flag goes over the file. `likely init` prints them as YAML.",
        "",
    ]
    about = {
        Config: ("What a training is", "These are stored with the run, and `likely train RUN/config.yaml` repeats it."),
        Launch: ("How it is carried out", "These have no say in the result, and are not stored."),
    }
    for kind, (title, text) in about.items():
        schema = kind.model_json_schema()
        lines += [f"## {title}", "", text, ""]
        for key, field in schema["properties"].items():
            lines += _setting(key, field, required=key in schema.get("required", []))
    return "\n".join(lines)


def _setting(key: str, field: dict[str, Any], *, required: bool) -> list[str]:
    branches = [branch for branch in field.get("anyOf", [field]) if branch.get("type") != "null"]
    limits = []
    for branch in branches:
        limits += [f"{words} {branch[name]:,}" for name, words in _LIMITS.items() if name in branch]
    choices = [str(choice) for branch in branches for choice in branch.get("enum", [])]
    kinds = ", ".join(str(branch["type"]) for branch in branches if "type" in branch)
    default = field.get("default")
    facts = ["must be given" if required else f"default `{default}`" if default is not None else "no default"]
    facts += [kinds] if not choices else [f"one of {', '.join(f'`{choice}`' for choice in choices)}"]
    text = str(SETTINGS_OF_TRAINING[key].description)
    return [f"### {key}", "", f"{text[:1].upper()}{text[1:]}.", "", f"*{'; '.join([*facts, *limits])}*", ""]


_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def security() -> str:
    return (ROOT / "SECURITY.md").read_text(encoding="utf-8")


GENERATED = {
    "reference/command-line.md": command_line,
    "reference/settings.md": settings,
    "security.md": security,
}
