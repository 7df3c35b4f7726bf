"""Another trainer's file -> the YAML of a training here, and a list of what is not the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from likely.migration import axolotl, llamafactory, openai, trl
from likely.migration.foreign import Foreign, Note

Trainer = Literal["trl", "axolotl", "llamafactory", "openai"]
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)
READERS = {"trl": trl.read, "axolotl": axolotl.read, "llamafactory": llamafactory.read, "openai": openai.read}


@dataclass(frozen=True)
class Carried:
    """``settings`` are those of ``likely train``, to be checked as such; ``notes`` are in the order of the file."""

    settings: dict[str, Any]
    notes: list[Note]

    @property
    def summary(self) -> str:
        counts = [sum(note.kind == kind for note in self.notes) for kind in ("differs", "no counterpart", "not needed")]
        return "{} settings; {} mean something else here, {} have no counterpart, {} are not needed".format(
            len(self.settings), *counts
        )

    def to_yaml(self) -> str:
        """The settings, below the notes as comments."""
        head = [f"# {note}" for note in self.notes]
        return "\n".join([*head, yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=False).rstrip()])


def carry_over(trainer: Trainer, path: Path) -> Carried:
    """Read a trainer's file.

    Raises:
        ConfigError: it can't be read, a value is none that the trainer takes, or it is no supervised fine-tuning.
    """
    job = Foreign(path)
    READERS[trainer](job)
    job.finish()
    return Carried(job.settings, job.notes)
