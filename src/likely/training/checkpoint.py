"""A checkpoint: everything that decides the next step, as safetensors and JSON, whole or not there at all.

step-000010/MANIFEST.json          run, step, config, fingerprints of data and base; SHA-256 of every other file
step-000010/model/                 the weights or the adapter, as transformers or peft load them
step-000010/optimizer.safetensors  AdamW's moments by parameter name; several files of 1 GiB where it was sharded
step-000010/random.safetensors     the random generators
step-000010/state.json             the step and what the metrics were; order and learning rate are functions of the step
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from likely import manifest, storage
from likely.errors import ModelError, ResourceError, first_line
from likely.stops import shield

FOLDER = re.compile(r"step-(\d{6,12})")


@dataclass(frozen=True)
class State:
    """What a run must know to go on after ``step`` steps. ``metrics_bytes`` is the length of metrics.jsonl then,
    ``skipped`` how many steps changed nothing because they were not finite, ``best`` the (step, held-out NLL in nats
    per token) of the best evaluation so far."""

    step: int
    metrics_bytes: int
    skipped: int = 0
    best: tuple[int, float] | None = None

    @classmethod
    def of(cls, values: dict[str, Any]) -> State:
        """The state that ``asdict`` and JSON made ``values`` of.

        Raises:
            ValueError: they are not of a state.
        """
        best = values["best"]
        counts = [values["step"], values["metrics_bytes"], values["skipped"], *([best[0]] if best else [])]
        if not all(type(count) is int and count >= 0 for count in counts) or (best and type(best[1]) is not float):
            raise ValueError(f"no state of a run: {values}")
        return cls(**{**values, "best": (best[0], best[1]) if best else None})


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def save_checkpoint(
    folder: Path,
    state: State,
    network: Any,
    optimizer: torch.optim.Optimizer,
    save_model: Callable[[Path], None],
    about: dict[str, Any],
) -> Path:
    """Write ``folder/step-N``. When this returns it is on the disk, and no crash can take it away.

    Args:
        about: goes into the manifest, which binds every file to it.

    Raises:
        ResourceError: the disk refuses; what was saved before is as it was.
    """
    final = folder / name_of(state.step)
    with shield(), storage.disk_errors(final, "the checkpoint"):
        storage.make_folder(folder)  # not the run folder itself: if that has gone, its lock has too
        with manifest.put_in_place(final) as (unfinished, seal):
            save_model(unfinished / "model")
            seal.settle()
            save_file(_optimizer_tensors(network, optimizer), unfinished / "optimizer.safetensors")
            save_file(random_states(), unfinished / "random.safetensors")
            storage.create_file(unfinished / "state.json", (json.dumps(asdict(state), indent=1) + "\n").encode())
            seal.close({"kind": "checkpoint", **about, "step": state.step})
    return final


def saved_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint by name, oldest first; other names are none of ours."""
    names = [FOLDER.fullmatch(p.name) for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(m[1]) for m in names if m and m[0] == name_of(int(m[1])))


def rotate(folder: Path, newest: int, keep: int, spared: Sequence[int]) -> None:
    """Remove old checkpoints but for ``keep`` of them up to ``newest``, which was just saved, and the ``spared``.

    Those after ``newest`` are of an earlier process, and may be what a resume could not trust: they count for nothing,
    and are replaced when the run comes to their steps.
    """
    for step in [step for step in saved_steps(folder) if step <= newest][:-keep]:
        if step not in spared:
            with shield():
                storage.discard(folder / name_of(step))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte is as it was written."""

    folder: Path
    state: State
    manifest: dict[str, Any]


def open_checkpoint(folder: Path, run_id: str) -> Checkpoint:
    """Verify a checkpoint of a run.

    Raises:
        ModelError: what is wrong with it.
    """
    if not folder.is_dir() or folder.is_symlink():
        saved = ", ".join(map(name_of, saved_steps(folder.parent))) or "none"
        raise ModelError("no such checkpoint", place=str(folder), way_out=f"saved: {saved}")
    content = manifest.verify(folder)
    if (content.get("kind"), content.get("step")) != ("checkpoint", int(folder.name.removeprefix("step-"))):
        raise ModelError(f"its manifest is that of {content.get('kind')} {content.get('step')!r}", place=str(folder))
    if content.get("run_id") != run_id:
        raise ModelError("it belongs to another run", place=str(folder))
    try:
        state = State.of(json.loads((folder / "state.json").read_bytes()))
        if state.step != content["step"]:
            raise ValueError(f"it is of step {state.step}")
        if not all(isinstance(content.get(key), dict) for key in ("config", "fingerprints")):
            raise ValueError("its manifest says nothing of config and fingerprints")
        return Checkpoint(folder, state, content)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"state.json can't be read: {error}", place=str(folder)) from error


def newest_valid(folder: Path, run_id: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be trusted, and why each newer one was passed over.

    Raises:
        ModelError: there are some, and none can be trusted.
    """
    reasons: list[str] = []
    for step in reversed(saved_steps(folder)):
        try:
            return open_checkpoint(folder / name_of(step), run_id), reasons
        except ModelError as error:
            reasons.append(str(error))
    if reasons:
        raise ModelError(
            f"no checkpoint can be trusted: {'; '.join(reasons)}",
            place=str(folder),
            way_out="restore one from a backup, or start again with another --output",
        )
    return None, []


def restore(checkpoint: Checkpoint, network: Any, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's moments and the random generators of a checkpoint; its weights are loaded with the model.

    Raises:
        ModelError: the moments are not those of the network's trainable parameters.
    """
    try:
        files = sorted(checkpoint.folder.glob("optimizer*.safetensors"))
        moments = {name: value for file in files for name, value in load_file(file).items()}
        if moments or checkpoint.state.step > checkpoint.state.skipped:  # else no step has made any
            _restore_optimizer(moments, network, optimizer)
        restore_random(checkpoint)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"its state can't be restored: {first_line(error)}", place=str(checkpoint.folder)) from error


def restore_random(checkpoint: Checkpoint) -> None:
    """The random generators of a checkpoint."""
    states = load_file(checkpoint.folder / "random.safetensors")
    torch.set_rng_state(states["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{i}"], i)


def _restore_optimizer(tensors: dict[str, torch.Tensor], network: Any, optimizer: torch.optim.Optimizer) -> None:
    names = trainable_of(dict(network.named_parameters()), optimizer)
    strange = {f"{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")} ^ set(tensors)
    if strange:
        raise ValueError(f"the optimizer's moments are those of other parameters: {min(strange)}")
    for name, parameter in names.items():
        moments = {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        shapes = {"step": torch.Size([]), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        for key, value in moments.items():
            if value.shape != shapes[key] or value.dtype not in {torch.float32, parameter.dtype}:
                raise ValueError(f"{name}.{key} is {value.dtype} of shape {tuple(value.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name}.{key} is not finite")
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}


def trainable_of(parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Those that the optimizer changes."""
    chosen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in parameters.items() if id(p) in chosen}


def _optimizer_tensors(network: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.contiguous()
        for name, parameter in trainable_of(dict(network.named_parameters()), optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def random_states() -> dict[str, torch.Tensor]:
    """Of torch, the only ones that a layer could draw from; the order of examples is a function of the seed."""
    return {"cpu": torch.get_rng_state()} | {
        f"cuda.{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())
    }


def require_disk(folder: Path, num_bytes: int, what: str = "a checkpoint with the model") -> None:
    """Find out before hours of work that there is no room for what they give.

    Raises:
        ResourceError: fewer than 1.2 x ``num_bytes`` are free.
    """
    disk = os.statvfs(folder)
    free, needed = disk.f_bavail * disk.f_frsize, int(1.2 * num_bytes)
    if free < needed:
        raise ResourceError(
            f"{free / 1e6:,.0f} MB of disk are free, and {what} takes {needed / 1e6:,.0f} MB",
            place=str(folder),
            way_out="free some, or name an --output on another disk",
        )
