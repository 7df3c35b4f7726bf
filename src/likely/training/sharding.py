"""One model over several processes: each holds some rows of every weight, of its gradient and of its moments (FSDP2,
torch.distributed.fsdp.fully_shard). A layer's weights are gathered when a forward or a backward comes to it.

Weights are gathered, and gradients summed, in float32: what comes out is what replicated weights give, to rounding.
torch's own collectives are replaced by those of :class:`Ranks`, so that none of them waits without an end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from likely.model.decoder import Decoder, read_decoder, reader_of_layers, through_layer
from likely.model.forward import LanguageModel, connect
from likely.model.layer import Sight
from likely.model.load import Tuning
from likely.model.skeleton import Skeleton, make_skeleton, read_rows
from likely.training.parallel import Ranks

# Their old names are deprecated, and the new ones are not in all versions.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor; of any other one, itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor, rank: int, world_size: int) -> int:
    """The first row of a rank, as torch.chunk cuts them."""
    rows = int(tensor.shape[0])
    return min(rank * -(-rows // world_size), rows)


def load_sharded(
    name: str, tuning: Tuning, ranks: Ranks, *, compute_dtype: torch.dtype, saved: Path | None = None
) -> LanguageModel:
    """The model of :func:`likely.model.load.load_for_training`, or of ``load_for_resuming``, sharded over all ranks.
    Each reads its own rows and nothing else.

    Raises:
        LikelyError: as these two; or its layers are not of a class that can be sharded.
    """
    with ranks.together():
        skeleton = make_skeleton(name, tuning, saved)
        if ranks.first:
            skeleton.save_hash()
    network = skeleton.network
    causal_lm = network.get_base_model() if hasattr(network, "peft_config") else network
    decoder = read_decoder(causal_lm)  # for what it keeps in memory; its parameters have none
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    _shard(causal_lm, ranks, device)
    with ranks.together():
        _fill(skeleton, ranks, device)
        causal_lm.model.rotary_emb.to(device)
    run = _Sharded(decoder.backbone, decoder.layers), _Outside(causal_lm, dict(network.named_parameters()))
    with ranks.together():
        return connect(network, name, compute_dtype=compute_dtype, sharded=run)


def _shard(causal_lm: Any, ranks: Ranks, device: torch.device) -> None:
    mesh = DeviceMesh.from_group(ranks.inner_group(), device.type)
    read = reader_of_layers(causal_lm)

    def halves(layer: Any) -> Callable[..., Tensor]:
        def run(x_TD: Tensor, sight: Sight, *, again: bool) -> Tensor:
            return through_layer(*read(layer), x_TD, sight, again=again)

        return run

    def outside(work: Callable[[], Tensor]) -> Tensor:
        return work()

    layers = list(causal_lm.model.layers)
    methods = {layer: ("likely_halves", halves(layer)) for layer in layers} | {causal_lm: ("likely_run", outside)}
    for module, (name, method) in methods.items():
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # every rank has divided by the one number of the whole step
        module.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies first
        if device.type == "cpu":
            module.set_custom_all_gather(_AllGather(ranks))
            module.set_custom_reduce_scatter(_ReduceScatter(ranks))
        setattr(module, name, method)
        register_fsdp_forward_method(module, name)


@torch.no_grad()
def _fill(skeleton: Skeleton, ranks: Ranks, device: torch.device) -> None:
    """Read this rank's rows of each weight."""
    filled: dict[int, nn.Parameter] = {}
    values: dict[str, nn.Parameter] = {}
    for name, parameter in skeleton.network.named_parameters(remove_duplicate=False):
        if not parameter.is_meta:
            continue
        if id(parameter) not in filled:
            first = first_row(parameter, ranks.shard, ranks.shards)
            rows = read_rows(skeleton.held[name], first, first + len(local(parameter))).to(device)
            whole = DTensor.from_local(
                rows,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            filled[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        values[name] = filled[id(parameter)]
    skeleton.network.load_state_dict(values, strict=False, assign=True)


@dataclass(frozen=True)
class _Sharded(Decoder):
    """Layers whose weights are gathered as each of them is come to."""

    def layer(self, index: int, x_TD: Tensor, sight: Sight, *, again: bool) -> Tensor:
        out: Tensor = self.backbone.layers[index].likely_halves(x_TD, sight, again=again)
        return out


@dataclass(frozen=True)
class _Outside:
    """The embeddings, the last norm and the head."""

    causal_lm: Any
    parameters: dict[str, Any]

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        result: Tensor = self.causal_lm.likely_run(work)
        return result

    def release(self) -> None:
        self.causal_lm.reshard()


class _Comm:
    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Comm):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:  # noqa: ARG002
        self._ranks.exchange_inside(lambda: _ALL_GATHER(output_tensor, input_tensor, group=group, async_op=True))


class _ReduceScatter(_Comm):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,  # noqa: ARG002
    ) -> None:
        self._ranks.exchange_inside(
            lambda: _REDUCE_SCATTER(output_tensor, input_tensor, op=op, group=group, async_op=True)
        )
