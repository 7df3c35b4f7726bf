"""Models and checkpoints of sharded weights as the same files that one process writes and reads: tensors are gathered
one piece at a time, each by the rank that writes it, so that no process holds more than one piece besides its own rows.

What is exchanged here goes past FSDP's own group, so that a training whose forward failed can still be saved.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from likely import manifest, storage
from likely.errors import ModelError, NonFiniteError, first_line
from likely.model import load as models
from likely.model.forward import LanguageModel
from likely.model.headers import Stored, read_header
from likely.model.skeleton import read_rows
from likely.stops import shield
from likely.training.checkpoint import Checkpoint, State, random_states, restore_random, trainable_of
from likely.training.parallel import Ranks
from likely.training.sharding import first_row, local

PIECE = 1 << 28  # numbers of a file: 1 GiB
MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def put_in_place(final: Path, ranks: Ranks) -> Iterator[tuple[Path, manifest.Seal | None]]:
    """A folder that all ranks fill under another name and the first one seals, as :func:`likely.manifest.put_in_place`:
    it gets its name when all have agreed that their part is written, and if one has failed, nothing is left of it."""
    with shield(), storage.disk_errors(final, "what is to be saved"), ExitStack() as stack:
        seal = None
        unfinished = final
        with ranks.together():
            if ranks.first:
                storage.make_folder(final.parent)  # not the run folder itself: if that has gone, its lock has too
                unfinished, seal = stack.enter_context(manifest.put_in_place(final))
        unfinished = Path(ranks.first_says(str(unfinished)))
        with ranks.together():
            yield unfinished, seal


def save_model(model: LanguageModel, tokenizer: Any, folder: Path, ranks: Ranks) -> None:
    """The files of :func:`likely.model.load.save_model`; called by all ranks.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    assert model.gathering is not None  # noqa: S101
    parameters = model.gathering.parameters
    with ranks.together():
        broken = next((name for name, p in parameters.items() if not local(p).isfinite().all()), None)
        if broken:
            raise NonFiniteError(f"the weight {broken} is not finite", way_out="lower --learning-rate")
    if hasattr(model.network, "peft_config"):
        adapter = {name: p for name, p in parameters.items() if p.requires_grad}
        whole = _gathered(list(adapter), adapter, 0, ranks)
        if ranks.first:
            models.save_files(model, tokenizer, folder, whole)
        return
    if ranks.first:
        folder.mkdir(exist_ok=True)
        config = copy.deepcopy(model.network.config)
        config.architectures, config.dtype = [type(model.network).__name__.removeprefix("FSDP")], "float32"
        config.save_pretrained(folder)
        model.network.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    ranks.agree()
    files = _write("model", folder, parameters, ranks)
    if ranks.first and len(files) > 1:
        sizes = {"total_size": sum(4 * p.numel() for p in parameters.values())}
        names = {name: file for file, inside in files.items() for name in inside}
        text = json.dumps({"metadata": sizes, "weight_map": dict(sorted(names.items()))}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def save_checkpoint(
    final: Path,
    state: State,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    about: dict[str, Any],
    ranks: Ranks,
) -> None:
    """The files of :func:`likely.training.checkpoint.save_checkpoint`; called by all ranks."""
    assert model.gathering is not None  # noqa: S101
    with put_in_place(final, ranks) as (unfinished, seal):
        save_model(model, tokenizer, unfinished / "model", ranks)
        moments = {
            f"{name}.{key}": value
            for name, parameter in trainable_of(model.gathering.parameters, optimizer).items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        _write("optimizer", unfinished, moments, ranks)
        ranks.agree()
        if seal is not None:
            save_file(random_states(), unfinished / "random.safetensors")
            storage.create_file(unfinished / "state.json", (json.dumps(asdict(state), indent=1) + "\n").encode())
            seal.close({"kind": "checkpoint", **about, "step": state.step})


def _write(stem: str, folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, list[str]]:
    """Write tensors in pieces, as many at once as there are ranks.

    Returns:
        The names of the tensors in each file.
    """
    pieces = _pieces(tensors)
    files = [
        f"{stem}.safetensors" if len(pieces) == 1 else f"{stem}-{i:05d}-of-{len(pieces):05d}.safetensors"
        for i in range(1, len(pieces) + 1)
    ]
    for start in range(0, len(pieces), ranks.world_size):
        ranks.agree()
        for writer, names in enumerate(pieces[start : start + ranks.world_size]):
            gathered = _gathered(names, tensors, writer, ranks)
            if ranks.rank == writer:
                own = gathered
        if start + ranks.rank < len(pieces):
            save_file(own, folder / files[start + ranks.rank], metadata={"format": "pt"})
            storage.sync_file(folder / files[start + ranks.rank])
    return dict(zip(files, pieces, strict=True))


def _pieces(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    pieces: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if pieces[-1] and size + tensor.numel() > PIECE:
            pieces.append([])
            size = 0
        pieces[-1].append(name)
        size += tensor.numel()
    return pieces


def _gathered(names: list[str], tensors: Mapping[str, Tensor], writer: int, ranks: Ranks) -> dict[str, Tensor]:
    """Some tensors whole, on one rank; nothing on the others."""
    whole: dict[str, Tensor] = {}
    for name in names:
        tensor = tensors[name].detach()
        if not isinstance(tensor, DTensor):
            whole[name] = tensor.cpu()
            continue
        rows, most = local(tensor), -(-int(tensor.shape[0]) // ranks.shards)
        padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]) if len(rows) < most else rows
        gathered = ranks.gather_to(writer, padded.contiguous())
        if gathered is not None:
            whole[name] = gathered[: tensor.shape[0]].cpu()
    return whole if ranks.rank == writer else {}


def restore(checkpoint: Checkpoint, model: LanguageModel, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """What :func:`likely.training.checkpoint.restore` does, of this rank's rows.

    Raises:
        ModelError: the moments are not those of the network's trainable parameters.
    """
    assert model.gathering is not None  # noqa: S101
    try:
        held = {
            name: stored
            for file in sorted(checkpoint.folder.glob("optimizer*.safetensors"))
            for name, stored in read_header(file).items()
        }
        if held or checkpoint.state.step > checkpoint.state.skipped:
            _restore_moments(held, trainable_of(model.gathering.parameters, optimizer), optimizer, ranks)
        restore_random(checkpoint)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"its state can't be restored: {first_line(error)}", place=str(checkpoint.folder)) from error


def _restore_moments(
    held: Mapping[str, Stored], parameters: Mapping[str, Any], optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    wanted = {f"{name}.{key}" for name in parameters for key in ("step", *MOMENTS)}
    if strange := wanted ^ set(held):
        raise ValueError(f"the optimizer's moments are those of other parameters: {min(strange)}")
    for name, parameter in parameters.items():
        state = {}
        first = first_row(parameter, ranks.shard, ranks.shards)
        for key in MOMENTS:
            stored = held[f"{name}.{key}"]
            if stored.shape != tuple(parameter.shape):
                raise ValueError(f"{name}.{key} has shape {stored.shape}")
            state[key] = torch.zeros_like(parameter, requires_grad=False)
            rows = local(state[key])
            rows.copy_(read_rows((stored.file, f"{name}.{key}"), first, first + len(rows)))
        with safe_open(held[f"{name}.step"].file, framework="pt") as file:
            optimizer.state[parameter] = {"step": file.get_tensor(f"{name}.step"), **state}
