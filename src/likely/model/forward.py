"""A language model as the objective sees it: hidden states over a pack, and the head that turns them into logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from likely.data.dealing import Cost
from likely.data.packing import build_packs
from likely.errors import ModelError, first_line
from likely.model.attention import NAME, TriePlan, trie_attention
from likely.model.decoder import Decoder, NotRecognisedError, computed_again, has_hooks, read_decoder
from likely.model.kernels import Kernels, find_kernels
from likely.model.linear import Casts
from likely.model.place import context_length
from likely.model.transfer import to_device, wide_product
from likely.types import Example, IntArray, Pack, Source

AttentionInterface.register(NAME, trie_attention)


@dataclass(frozen=True)
class Head:
    """Hidden state -> logits: ``softcap * tanh(scale * (W h + b) / softcap)``, without the cap where it is None."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_SD: Tensor, narrow_VD: Tensor | None = None) -> Tensor:
        """Logits (S, V) in at least float32: a bfloat16 logit of 20 is off by up to 0.06, which the loss would show.
        With the weight in a narrower dtype the product is of narrow numbers, as all others are, and still wide."""
        wide = torch.promote_types(hidden_SD.dtype, torch.float32)
        if narrow_VD is None:
            logits = hidden_SD.to(wide) @ self.weight.to(wide).T
        else:
            logits = wide_product(hidden_SD.to(narrow_VD.dtype), narrow_VD.T)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits.div_(self.softcap)).mul_(self.softcap)
        return logits

    def through(self, logits: Tensor, dlogits: Tensor) -> Tensor:
        """Gradient on ``W h + b`` from the gradient on the logits; overwrites ``dlogits``."""
        if self.softcap is not None:
            dlogits *= 1 - (logits / self.softcap).square()
        return dlogits.mul_(self.scale) if self.scale != 1.0 else dlogits


class Gathering(Protocol):
    """Of a model whose parameters are sharded over several processes: gathers those outside its layers."""

    @property
    def parameters(self) -> dict[str, Any]:
        """By name, each process's rows of them."""

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """What ``work`` gives while the parameters are there."""

    def release(self) -> None:
        """Give up what a forward without a backward has left gathered."""


@dataclass
class LanguageModel:
    """A causal language model of transformers, bare or with adapters of peft.

    ``network`` is what is trained and saved. ``compute_dtype`` is the dtype of the matrix products while training; the
    weights themselves stay in their own (float32 when training). ``shares`` says whether its layers can follow the
    branches of a trie; where they can't, each pack must be one chain. ``decoder`` computes the layers if they are
    known, else transformers does; it is read anew where the network may have changed. ``activation_room`` is how many
    bytes activations may take (None: no limit); what doesn't fit is computed again in the backward. ``kernels`` may
    compute the attention on a GPU. ``chunk_logits`` is how many logits the loss may hold at once (None: its own
    choice). ``gathering`` is of a model whose parameters are sharded: then every rank makes the same forwards and
    backwards in the same order, and what the network is does not change.
    """

    network: Any
    name: str
    compute_dtype: torch.dtype
    max_length: int
    shares: bool = True
    plain_attention: str = "sdpa"
    decoder: Decoder | None = None
    activation_room: int | None = None
    kernels: Kernels = field(default_factory=Kernels)
    chunk_logits: int | None = None
    gathering: Gathering | None = None
    _casts: dict[torch.dtype, Casts] = field(default_factory=dict)
    _inside: bool = False  # of autocast, where nothing of the network changes
    _known: Decoder | None = None
    _bytes_a_node: int | None = None

    @property
    def sharded(self) -> bool:
        return self.gathering is not None

    @property
    def causal_lm(self) -> Any:
        """The transformers model, inside the adapters if there are any."""
        return self.network.get_base_model() if hasattr(self.network, "peft_config") else self.network

    @property
    def device(self) -> torch.device:
        device: torch.device = self.causal_lm.get_output_embeddings().weight.device
        return device

    @property
    def casts(self) -> Casts:
        """Parameters in the dtype of the matrix products: inside :meth:`autocast` its, outside the weights' own."""
        kind = self.device.type
        inside = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if inside else self.head.weight.dtype
        if self.activation_room == 0:  # there is no memory to keep them in
            self._casts.clear()
        # or nobody says when they are stale, or the parameters themselves are not kept
        if self.activation_room == 0 or not inside or self.sharded:
            return Casts(dtype, kept=False)
        return self._casts.setdefault(dtype, Casts(dtype))

    @property
    def head(self) -> Head:
        config = self.causal_lm.config.get_text_config()
        output = self.causal_lm.get_output_embeddings()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(output.weight, getattr(output, "bias", None), scale, softcap)

    def gathered(self, work: Callable[[], Tensor]) -> Tensor:
        """What ``work`` gives that uses this model; a sharded one has its embeddings and its head meanwhile."""
        if self.gathering is None:
            return work()
        result = self.gathering.run(work)
        if not result.requires_grad:
            self.gathering.release()
        return result

    def hidden_at(self, pack: Pack, node_S: IntArray) -> Tensor:
        """Final hidden states (S, D) at some of a pack's nodes, which ascend.

        Raises:
            ModelError: some attention layer did not obey the trie, so that its result would be another likelihood.
        """
        self._check(pack)
        token_ids = to_device(pack.token_T, self.device)[None]
        if not self._inside:
            self._read_again()
        if self.decoder is not None and self._known is not None:
            plan, narrow = TriePlan(pack.position_T, pack.last_T, self.device, self.kernels), self.casts
            with torch.autocast(self.device.type, enabled=False):
                return self._known.hidden_at(token_ids[0], plan, node_S, narrow, self.activation_room)
        return self._forward_layers(pack, token_ids)[to_device(node_S, self.device)]

    def _read_again(self) -> None:
        """Modules may have been replaced, adapters switched or merged, hooks set, since the network was last read."""
        if self.decoder is None:
            return
        if self.sharded:
            self._known = self.decoder
            return
        now = _decoder_of(self.causal_lm)
        if now is None or self._known is None or not now.same_parameters(self._known):
            self._casts.clear()  # merging changes frozen weights
        self._known = now

    def _forward_layers(self, pack: Pack, token_ids: Tensor) -> Tensor:
        """Final hidden states (T, D), by the layers of transformers."""
        self._set_checkpointing(pack.num_nodes)
        position_ids = to_device(pack.position_T, self.device)[None]
        backbone = self.causal_lm.base_model
        if not self.shares:
            hidden: Tensor = backbone(input_ids=token_ids, use_cache=False).last_hidden_state
            return hidden[0]
        plan = TriePlan(pack.position_T, pack.last_T, self.device, self.kernels)
        hidden = backbone(
            input_ids=token_ids, position_ids=position_ids, use_cache=False, trie_plan=plan
        ).last_hidden_state
        self._check_obeyed(plan)
        return hidden[0]

    def _set_checkpointing(self, num_nodes: int) -> None:
        """All of transformers' layers are computed again in the backward, or none. What they keep is estimated as the
        inputs and outputs of all linear layers twice."""
        if self._bytes_a_node is None:
            modules = (m for m in self.causal_lm.base_model.modules() if not isinstance(m, torch.nn.Embedding))
            sides = sum(map(sum, map(_sides, modules)))
            self._bytes_a_node = 2 * sides * self.compute_dtype.itemsize
        again = self.activation_room is not None and self._bytes_a_node * num_nodes > self.activation_room
        for layer in self.causal_lm.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                # transformers asks for training mode too; that of the layer itself turns no dropout on.
                layer.training = layer.gradient_checkpointing = again and torch.is_grad_enabled()
                layer._gradient_checkpointing_func = computed_again

    def _check(self, pack: Pack) -> None:
        if self.causal_lm.training:
            raise ModelError(f"{self.name} is in training mode, where dropout makes the likelihood random")
        if pack.position_T.max(initial=0) >= self.max_length:
            raise ModelError(f"{pack.position_T.max() + 1} tokens, over {self.name}'s limit of {self.max_length}")
        rows = self.head.weight.shape[0]
        largest = max(pack.token_T.max(initial=0), pack.target_E.max(initial=0))
        if largest >= rows:
            raise ModelError(f"the token id {largest} is outside {self.name}'s vocabulary of {rows}")
        if not self.shares and not np.array_equal(pack.position_T, np.arange(pack.num_nodes)):
            raise ModelError(f"{self.name} can't follow the branches of a trie, and this pack has some")

    def _check_obeyed(self, plan: TriePlan) -> None:
        config = self.causal_lm.config.get_text_config()
        num_layers = config.num_hidden_layers
        # Without the list, a configured window is every layer's.
        kinds = getattr(config, "layer_types", None) or (
            ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * num_layers
        )
        num_windows, num_full = kinds.count("sliding_attention"), kinds.count("full_attention")
        if (plan.windowed_calls, plan.calls - plan.windowed_calls) != (num_windows, num_full):
            raise ModelError(
                f"{plan.calls} of {num_layers} layers of {type(self.causal_lm).__name__} attended along the trie,"
                f" {plan.windowed_calls} of {num_windows} through their window"
            )

    @property
    def predicted_cost(self) -> Cost:
        """Of a pack, from the multiplications of its linear layers, of attention and of the output layer."""
        config = self.causal_lm.config.get_text_config()
        modules = (m for m in self.causal_lm.base_model.modules() if not isinstance(m, torch.nn.Embedding))
        linear = sum(rows * columns for rows, columns in map(_sides, modules))
        vocabulary, hidden = self.head.weight.shape
        heads = getattr(config, "num_attention_heads", None)
        width = heads * head if heads and (head := getattr(config, "head_dim", None)) else hidden
        return Cost(2 * config.num_hidden_layers * width / linear, vocabulary * hidden / linear)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Matrix products in ``compute_dtype`` for what runs inside; weights and sums stay as they are. The network may
        change between two entries, and not inside."""
        for casts in self._casts.values():
            casts.forget()
        self._read_again()
        narrow = self.compute_dtype != self.head.weight.dtype
        outside, self._inside = self._inside, True
        try:
            with torch.autocast(self.device.type, dtype=self.compute_dtype if narrow else None, enabled=narrow):
                yield
        finally:
            self._inside = outside

    @contextmanager
    def as_transformers_runs_it(self) -> Iterator[Any]:
        """The network with the attention that transformers itself would use: for ``generate`` and for comparison."""
        own = self.causal_lm.config._attn_implementation
        self.causal_lm.set_attn_implementation(self.plain_attention)
        try:
            # peft calls the inner forward, past what gathers its parameters; the adapters are in the layers anyway.
            yield self.network if self.gathering is None else self.causal_lm
        finally:
            if self.gathering is not None:
                self.gathering.release()
            self.causal_lm.set_attn_implementation(own)


def connect(
    network: Any,
    name: str,
    *,
    compute_dtype: torch.dtype,
    sharded: tuple[Decoder, Gathering] | None = None,
) -> LanguageModel:
    """Plug the trie's attention into a transformers model and prove, on a small branching example, that the likelihood
    equals the one that transformers computes for each sequence alone. A model whose layers can't follow branches is run
    without sharing; one that disagrees even then is refused.

    Args:
        sharded: of a network that is sharded, what runs its layers and what gathers the rest; no other way is tried.

    Raises:
        ModelError: the model's likelihood can't be reproduced.
    """
    if getattr(getattr(network, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError(f"{name} has a trained prompt, whose tokens are in no row", way_out="use LoRA adapters")
    network.eval()  # Dropout would make the likelihood a random number, and differ between branches of a shared prefix.
    model = LanguageModel(network, name, compute_dtype, 0)
    model.max_length = context_length(model.causal_lm.config)
    model.plain_attention = model.causal_lm.config._attn_implementation
    output = model.causal_lm.get_output_embeddings()
    if isinstance(output, BaseTunerLayer):  # which may change nothing yet, and then only its gradient would tell
        raise ModelError(f"{name} has an adapter on its output layer", way_out="leave lm_head out of target_modules")
    failure = ""
    ways: list[tuple[Decoder | None, bool]] = [(None, True), (None, False)]
    if sharded is not None:
        ways, model.gathering = [(sharded[0], True)], sharded[1]
    else:
        ways.insert(0, (_decoder_of(model.causal_lm), True))
    for decoder, shares in ways:
        model.decoder, model.shares = decoder, shares
        model.causal_lm.set_attn_implementation(NAME if shares else model.plain_attention)
        try:
            difference = _largest_difference(model)
        except Exception as error:  # the layers are foreign code, and what they raise at a trie is theirs to choose
            if sharded is not None:  # where it may be another rank's, too
                raise
            failure = first_line(error)
            continue
        if difference <= _tolerance(model):
            if has_hooks(output):  # it is never called, and hooks may change the gradient alone
                raise ModelError(f"{name} has hooks on its output layer", way_out="remove them")
            if shares:
                config = model.causal_lm.config.get_text_config()
                model.kernels = find_kernels(config, model.device, compute_dtype)
            return model
        failure = f"log-likelihoods differ by {difference:.2g} nats from those of transformers"
    raise ModelError(f"{name}: {failure}", way_out="this architecture is not supported")


def _sides(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; none of what is none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return 0, 0
    # The weight of a quantised layer is a column of bytes.
    own = (module.in_features, module.out_features) if hasattr(module, "in_features") else weight.shape
    return int(own[0]), int(own[1])


def _decoder_of(causal_lm: Any) -> Decoder | None:
    try:
        return read_decoder(causal_lm)
    except NotRecognisedError:
        return None


def _tolerance(model: LanguageModel) -> float:
    """Nats. Rounding of the weights' dtype over a few dozen layers; a wrong mask or scale is off by far more."""
    return {torch.float64: 1e-6, torch.float32: 2e-3}.get(model.head.weight.dtype, 0.3)


def _logits(model: LanguageModel, pack: Pack, node_S: IntArray) -> Tensor:
    return model.head.logits(model.hidden_at(pack, node_S))


@torch.no_grad()
def _largest_difference(model: LanguageModel) -> float:
    """Over a few short sequences with common prefixes: largest |log P here - log P by transformers|."""
    vocabulary = model.head.weight.shape[0]
    rows = [[1, 5, 9, 3, 7, 2], [1, 5, 9, 4, 8, 6, 3], [1, 5, 2, 2, 9]]
    examples = [
        Example(
            np.array(row) % vocabulary,
            np.array([0.0] + [1.0] * (len(row) - 1)),
            np.zeros(len(row), np.int8),
            Source("", 0),
        )
        for row in rows
    ]
    largest = 0.0
    for pack in build_packs(examples, 64, share=model.shares):
        nodes = np.arange(pack.num_nodes)
        logits = model.gathered(partial(_logits, model, pack, nodes)).double().cpu()
        for i, edges in zip(pack.example_N, pack.edge_of_N, strict=True):
            here = torch.log_softmax(logits[pack.source_E[edges]], -1)
            token_ids = torch.from_numpy(examples[i].token_ids_T)[None].to(model.device)
            with model.as_transformers_runs_it():
                there = model.causal_lm(input_ids=token_ids, use_cache=False).logits[0, :-1].double().cpu()
            difference = (here - torch.log_softmax(there, -1)).abs().max()
            largest = max(largest, float(difference.nan_to_num(torch.inf)))
    return largest
