"""The run folder as a process finds it: its lock, what an earlier process left there, and where to go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from likely import manifest, stops, storage
from likely.errors import ConfigError, LikelyError, ModelError, ResourceError, is_out_of_memory
from likely.training.checkpoint import Checkpoint, State, name_of, newest_valid, open_checkpoint, saved_steps

TRACKED = frozenset({"tensorboard", "wandb"})  # made anew from metrics.jsonl whenever a run begins or goes on
# Settings that change no weight and no score. Where the data and the model stand may change too: their content may not.
FREE = {
    "activation_checkpointing",
    "data",
    "eval_data",
    "eval_every",
    "guard",
    "guard_max_gain",
    "keep_checkpoints",
    "model",
    "num_answers",
    "output",
    "pack_tokens",
    "retain",
    "save_every",
    "skip_nonfinite",
}


@dataclass(frozen=True)
class Layout:
    """How the folder of a verb is made up: the file ``mark`` is written first and says that the folder is the verb's;
    ``beginning`` is what may stand there before anything of worth does, the mark besides; that is in the folder
    ``kept``. ``others`` are more folders in which files are written."""

    verb: str
    mark: str
    beginning: frozenset[str]
    kept: str
    others: tuple[str, ...] = ()


RUN = Layout(
    "train",
    "run.json",
    TRACKED | {"config.yaml", "metrics.jsonl", "rejected.jsonl", "rejected-eval.jsonl", "checkpoints"},
    "checkpoints",
    ("report",),
)
CURVE = Layout("curve", "origins.json", frozenset({"config.yaml", "metrics.jsonl", "points"}), "points")


@dataclass(frozen=True)
class Start:
    """Where a run goes on: after a ``checkpoint``; or, when ``trained``, with the tuned model that is in place already;
    or, when ``finished``, nowhere. ``manifest`` and ``state`` are those of the checkpoint or the tuned model."""

    run_id: str | None = None
    manifest: dict[str, Any] | None = None
    state: State | None = None
    checkpoint: Checkpoint | None = None
    trained: bool = False
    finished: bool = False

    def told(self) -> dict[str, Any]:
        """For the other ranks, in what JSON knows."""
        own = {"run_id": self.run_id, "manifest": self.manifest, "trained": self.trained, "finished": self.finished}
        return own | {
            "state": asdict(self.state) if self.state else None,
            "checkpoint": str(self.checkpoint.folder) if self.checkpoint else None,
        }

    @classmethod
    def of(cls, told: dict[str, Any]) -> Start:
        """What the first rank has told."""
        state = State.of(told["state"]) if told["state"] else None
        checkpoint = None
        if told["checkpoint"] is not None:
            assert state is not None  # noqa: S101
            checkpoint = Checkpoint(Path(told["checkpoint"]), state, told["manifest"])
        return cls(told["run_id"], told["manifest"], state, checkpoint, told["trained"], told["finished"])


@dataclass(frozen=True)
class Claim:
    """A folder that this process holds. ``require`` raises a ResourceError once it is no longer the one that was
    locked; ``saved`` names what this process saved or went on from, the newest last."""

    folder: Path
    require: Callable[[], None]
    saved: list[str] = field(default_factory=list)
    layout: Layout = RUN

    def how_to_go_on(self) -> str:
        """For whoever sees the process end early."""
        command = f"go on with likely {self.layout.verb} --resume --output {self.folder}"
        if self.saved:
            return f"{self.saved[-1]} is saved: {command}"
        begun = _names(self.folder) and not _is_beginning(self.folder, self.layout)
        return f"nothing new was saved: {command}" if begun else "no step was done, so nothing was saved"

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """What ends the work inside early says how to go on with it."""
        try:
            yield
        except stops.Stopped as stopped:
            raise stops.Stopped(stopped.signum, f"{stopped}; {self.how_to_go_on()}") from None
        except Exception as error:
            if isinstance(error, ResourceError) and is_out_of_memory(error):
                raise ResourceError(
                    error.message, place=error.place, way_out=f"{error.way_out}; {self.how_to_go_on()}"
                ) from error
            if not isinstance(error, LikelyError) and is_out_of_memory(error):
                way_out = f"lower --pack-tokens or use --tune lora; {self.how_to_go_on()}"
                raise ResourceError("out of memory", place=str(self.folder), way_out=way_out) from error
            raise


@contextmanager
def claimed(output: str, *, resume: bool, layout: Layout = RUN, first: bool = True) -> Iterator[Claim]:
    """Make the folder if need be and hold its lock. If it was free and nothing of worth was saved in it, it is left
    empty; whatever a run did not write itself is never touched. Of several ranks the first does that for all.

    Raises:
        ConfigError: it is a file, or holds something already and is not to be resumed.
        LockedError: another process works there.
        ResourceError: it can't be made or written to.
    """
    folder = Path(output)
    if not first:
        yield Claim(folder, lambda: None)
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError("this is a file", place=output, way_out="name a folder for the run")
    existed = folder.is_dir()
    with storage.disk_errors(folder, "the run folder"):
        storage.make_folder(folder.absolute(), above=True)
    try:
        with storage.locked(folder) as require:
            storage.sweep(folder)
            for inner in (layout.kept, *layout.others):
                storage.sweep(folder / inner)
            free = not _names(folder) or _is_beginning(folder, layout)
            if not free and not (resume and _is_of(folder, layout)):
                raise ConfigError(
                    "the run folder is not empty",
                    place=output,
                    way_out="go on with it by --resume, name another --output, or remove it",
                )
            if free:
                _clear(folder, layout)
            try:
                yield Claim(folder, require, layout=layout)
            except BaseException:
                storage.sweep(folder)
                if free and _is_beginning(folder, layout):
                    _clear(folder, layout)
                raise
    except BaseException:
        if not existed:
            with suppress(OSError):
                folder.rmdir()
        raise


def _names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {storage.LOCK} if folder.is_dir() else set()


def _is_beginning(folder: Path, layout: Layout) -> bool:
    """Whether all that is there was written by the verb before it saved anything: it writes the mark first."""
    names = _names(folder)
    saved = (folder / layout.kept).is_dir() and any((folder / layout.kept).iterdir())
    return layout.mark in names and names <= layout.beginning | {layout.mark} and not saved


def _is_of(folder: Path, layout: Layout) -> bool:
    kept = saved_steps(folder / layout.kept) if layout is RUN else []
    return (folder / layout.mark).is_file() or bool(kept)


def _clear(folder: Path, layout: Layout) -> None:
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if path.name in TRACKED & layout.beginning:
            storage.discard(path)
        elif path.name in layout.beginning | {layout.mark}:
            path.rmdir() if path.is_dir() else path.unlink()


def find_start(folder: Path, resume: str | None, say: Callable[[str], None]) -> Start:
    """What of an earlier process can be gone on with; each thing that can't be trusted is told and passed over.

    Raises:
        ModelError: there are checkpoints and none is whole, or the one asked for is not.
    """
    if resume is None or not _names(folder):
        if resume is not None:
            say(f"{folder}: nothing to resume yet, the run starts from the beginning")
        return Start()
    if not (folder / "run.json").is_file():
        raise ModelError(
            "there is no run.json, so nothing says which run these files are of",
            place=str(folder),
            way_out="restore it from a backup, or name another --output",
        )
    run_id = _run_id(folder)
    if (folder / "model").exists():
        try:
            content = manifest.verify(folder / "model")
            if content.get("run_id") != run_id:
                raise ModelError("it belongs to another run", place=str(folder / "model"))
            state = State.of(content["state"])
            return Start(run_id, content, state, trained=True, finished=read_report(folder) is not None)
        except ModelError as error:
            say(f"passed over: {error}")
    if resume == "newest":
        checkpoint, reasons = newest_valid(folder / "checkpoints", run_id)
        for reason in reasons:
            say(f"passed over: {reason}")
    else:
        checkpoint = open_checkpoint(folder / "checkpoints" / name_of(int(resume.removeprefix("step-"))), run_id)
    if checkpoint is None:
        say(f"{folder}: no checkpoint yet, the run starts from the beginning")
        return Start()
    return Start(run_id, checkpoint.manifest, checkpoint.state, checkpoint)


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a finished run; None where it is not there or not whole."""
    try:
        report = json.loads((folder / "report.json").read_bytes())
        return dict(report) if report["verdict"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _run_id(folder: Path) -> str:
    try:
        return str(json.loads((folder / "run.json").read_bytes())["run_id"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"run.json can't be read: {error}", place=str(folder), way_out="restore it from a backup"
        ) from error


def refuse_changes(begun: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Compare the manifest of what a run has saved to what it would be resumed with: ``config`` and ``fingerprints``.

    Raises:
        ConfigError: other settings, which are all listed.
        ModelError: other data, tokenizer, template or base weights.
    """
    was, before = begun["config"], begun["fingerprints"]
    changed = [f"{key} {was.get(key)!r} -> {value!r}" for key, value in now["config"].items() if was.get(key) != value]
    free = FREE - ({"eval_every"} if now["config"].get("patience") else set())  # then it decides where the steps end
    changed = [line for line in changed if line.split()[0] not in free]
    if changed:
        raise ConfigError(
            f"a run can't be resumed with other settings: {', '.join(changed)}",
            place=str(folder),
            way_out="resume it as it was, or start a new run with another --output",
        )
    strange = [
        f"{name} {_short(before.get(name))} -> {_short(digest)}"
        for name, digest in now["fingerprints"].items()
        if before.get(name) != digest
    ]
    if strange:
        raise ModelError(
            f"not what the run was started with (SHA-256): {', '.join(strange)}",
            place=str(folder),
            way_out="bring back the files as they were, or start a new run with another --output",
        )


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"
