"""What is done to a network after it was connected, and what shows only in a gradient, is computed or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, Qwen3Config

from likely.data.trie import subtree_ends
from likely.errors import ModelError
from likely.model.attention import TriePlan
from likely.model.decoder import read_decoder
from likely.model.forward import connect
from likely.model.linear import Casts
from likely.training.objective import nll_sum
from naive import truth
from test_objective import (
    FAMILY,
    PEFT_WARNING,
    Pair,
    compare,
    logprob_difference,
    one_global_sum,
    pack_up,
    pair,
    tolerance_of,
)

TOLERANCE = tolerance_of("llama")


def middle(network: Any) -> Any:
    return network.model.layers[1]


def scaled_gradient(_module: Any, gradients: Any, _of_output: Any) -> Any:
    return tuple(None if g is None else 3 * g for g in gradients)


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def replace_weight(network: Any) -> None:
    up = middle(network).mlp.up_proj
    up.weight = nn.Parameter(2 * up.weight.detach())


def without_gate(network: Any) -> None:
    mlp = middle(network).mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x))


def drop_a_layer(network: Any) -> None:
    network.config.num_hidden_layers = 1


def change_all(network: Any) -> None:
    torch.manual_seed(3)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


IN_THE_VALUE: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda n: middle(n).register_forward_hook(lambda _m, _i, out: 1.3 * out),
    "a hook before": lambda n: middle(n).mlp.register_forward_pre_hook(lambda _m, i: (1.3 * i[0],)),
    "another forward": without_gate,
    "another weight": replace_weight,
    "another module": lambda n: setattr(middle(n).mlp, "up_proj", n.model.layers[0].mlp.gate_proj),
    "a parametrized weight": lambda n: parametrize.register_parametrization(middle(n).mlp.up_proj, "weight", Twice()),
    "a parametrized norm": lambda n: parametrize.register_parametrization(middle(n).input_layernorm, "weight", Twice()),
    "another scale": lambda n: setattr(middle(n).self_attn, "scaling", 0.1),
    "another epsilon": lambda n: setattr(middle(n).input_layernorm, "variance_epsilon", 0.5),
    "a layer less": drop_a_layer,
}
IN_THE_GRADIENT: dict[str, Callable[[Any], Any]] = {
    "layer": middle,
    "mlp": lambda n: middle(n).mlp,
    "linear": lambda n: middle(n).self_attn.q_proj,
    "norm": lambda n: middle(n).input_layernorm,
    "activation": lambda n: middle(n).mlp.act_fn,
    "last norm": lambda n: n.model.norm,
}


@pytest.mark.parametrize("change", [*IN_THE_VALUE.values()], ids=[*IN_THE_VALUE])
@pytest.mark.parametrize("after", [True, False])
def test_a_change_of_a_module(make_network: Any, make_examples: Any, change: Callable[[Any], Any], after: bool) -> None:
    network, reference = make_network("llama").double(), make_network("llama").double()
    change(reference)
    if not after:
        change(network)
    twin = Pair(connect(network, "changed", compute_dtype=torch.float64), reference)
    if after:
        change(network)
    # Weights that were computed from others when the network was read would be the old ones.
    change_all(twin.model.network)
    change_all(twin.reference)
    compare(twin, FAMILY, pack_up(twin.model, make_examples(FAMILY))).check(TOLERANCE)


@pytest.mark.parametrize("part", [*IN_THE_GRADIENT.values()], ids=[*IN_THE_GRADIENT])
@pytest.mark.parametrize("after", [True, False])
def test_a_hook_on_a_gradient(make_network: Any, make_examples: Any, part: Callable[[Any], Any], after: bool) -> None:
    """No likelihood shows it."""
    network = make_network("llama").double()
    if not after:
        part(network).register_full_backward_hook(scaled_gradient)
    twin = pair(network)
    if after:
        for each in (twin.model.network, twin.reference):
            part(each).register_full_backward_hook(scaled_gradient)
    compare(twin, FAMILY, pack_up(twin.model, make_examples(FAMILY))).check(TOLERANCE)


def test_a_hook_on_the_heads_gradient_is_refused(make_network: Any) -> None:
    network = make_network("llama").double()
    network.lm_head.register_full_backward_hook(scaled_gradient)
    with pytest.raises(ModelError, match="hooks on its output layer"):
        connect(network, "hooked", compute_dtype=torch.float64)


def test_a_hook_that_is_taken_away_gives_our_own_layers_back(make_network: Any, make_examples: Any) -> None:
    twin = pair(make_network("llama").double())
    packs = pack_up(twin.model, make_examples(FAMILY))
    called: list[None] = []
    hook = middle(twin.model.network).register_forward_hook(lambda *_: called.append(None))
    compare(twin, FAMILY, packs).check(TOLERANCE)
    assert called
    hook.remove()
    called.clear()
    compare(twin, FAMILY, packs).check(TOLERANCE)
    assert not called
    assert twin.model.decoder is not None


# ---- adapters


def adapted(network: Any) -> Any:
    options = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    network = get_peft_model(network, LoraConfig(r=2, **options))
    network.add_adapter("other", LoraConfig(r=3, **options))
    return network.double().eval()


def rescale(network: Any) -> None:
    for module in network.modules():
        if isinstance(module, LoraLinear):
            module.set_scale("default", 0.1)


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize(
    "change",
    [
        rescale,
        lambda n: n.set_adapter("other"),
        lambda n: n.base_model.set_adapter(["default", "other"]),
        lambda n: n.base_model.disable_adapter_layers(),
        lambda n: n.merge_adapter(),
        lambda n: (n.merge_adapter(), n.unmerge_adapter()),
    ],
    ids=["rescaled", "switched", "both", "disabled", "merged", "unmerged"],
)
def test_a_change_of_adapters(make_network: Any, make_examples: Any, change: Callable[[Any], Any]) -> None:
    twin = pair(adapted(make_network("llama")))
    packs = pack_up(twin.model, make_examples(FAMILY))
    compare(twin, FAMILY, packs).check(TOLERANCE)
    for network in (twin.model.network, twin.reference):
        change(network)
    expected = truth(twin.reference, FAMILY)
    assert logprob_difference(twin.model, packs, FAMILY, expected) <= TOLERANCE.logprob
    if nll_sum(twin.model, packs[0]).requires_grad:  # merged and disabled adapters are not trained
        compare(twin, FAMILY, packs).check(TOLERANCE)


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_merging_changes_what_was_cast(make_network: Any, make_examples: Any) -> None:
    """peft adds to the frozen weights behind autograd's back."""
    model = connect(adapted(make_network("llama")).float(), "merged", compute_dtype=torch.bfloat16)
    [pack] = pack_up(model, make_examples(FAMILY))

    def nll() -> float:
        with model.autocast():
            return nll_sum(model, pack).item()

    before = nll()
    model.network.merge_adapter()
    merged = nll()
    model._casts.clear()
    assert merged == nll()
    assert merged == pytest.approx(before, rel=0.01)


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize(
    "options",
    [
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], feedforward_modules=[]),
        peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["ia3", "vera", "prompt"],
)
def test_what_would_not_be_trained_is_refused(make_network: Any, options: Any) -> None:
    """Such adapters of the head change no likelihood at first, and a prompt stands before every row."""
    network = get_peft_model(make_network("llama"), options).double()
    with pytest.raises(ModelError, match=r"output layer|prompt"):
        connect(network, "adapted", compute_dtype=torch.float64)


# ---- casts


def test_a_cast_follows_its_parameter() -> None:
    narrow = Casts(torch.bfloat16)
    frozen = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    first = narrow(frozen)
    assert narrow(frozen) is first
    with torch.no_grad():
        frozen.add_(1)  # as load_state_dict does
    assert torch.equal(narrow(frozen), frozen.bfloat16())
    frozen.data = torch.full((2, 3), 5.0)
    assert torch.equal(narrow(frozen), frozen.bfloat16())
    frozen.data = torch.full((4, 3), 6.0)
    assert torch.equal(narrow(frozen), frozen.bfloat16())


def test_a_parameter_that_is_frozen_after_a_step_is_cast_once_more() -> None:
    narrow = Casts(torch.bfloat16)
    parameter = nn.Parameter(torch.ones(2, 3))
    narrow(parameter)
    parameter.grad = torch.ones(2, 3)
    torch.optim.AdamW([parameter], lr=1.0, fused=True).step()
    parameter.requires_grad_(requires_grad=False)
    narrow.forget()
    assert torch.equal(narrow(parameter), parameter.bfloat16())


def test_a_weight_that_is_computed_each_time_is_cast_each_time() -> None:
    """Else the identity of one that has gone could be that of the next."""
    narrow = Casts(torch.bfloat16)
    parameter = nn.Parameter(torch.ones(2, 3))
    for factor in range(1, 50):
        assert torch.equal(narrow(factor * parameter), (factor * parameter).bfloat16())


def test_outside_of_autocast_nothing_is_kept(make_network: Any, make_examples: Any) -> None:
    """Nobody says there when weights have changed; here adapters in float32 stand in a model in bfloat16."""
    network = adapted(make_network("llama")).bfloat16()
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    model = connect(network, "mixed", compute_dtype=torch.bfloat16)
    packs = pack_up(model, make_examples(FAMILY))
    one_global_sum(model, packs)
    before = nll_sum(model, packs[0]).item()
    torch.optim.AdamW([p for p in network.parameters() if p.grad is not None], lr=1.0, fused=True).step()
    after = nll_sum(model, packs[0]).item()
    model._casts.clear()
    assert after == nll_sum(model, packs[0]).item() != before


# ---- memory


def test_the_plan_of_memory_knows_every_window() -> None:
    """Layers with a short window keep their probabilities on chains so long that layers without one don't."""
    shape = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
    config = Qwen3Config(
        **shape, num_attention_heads=8, num_key_value_heads=2, head_dim=4, sliding_window=8, layer_types=kinds
    )
    config.use_sliding_window, config.sliding_window = True, 8
    depth = np.arange(2000)
    plan = TriePlan(depth, subtree_ends(depth), torch.device("cpu"))
    again = {}
    for name, layer_types in (("first", kinds), ("last", kinds[::-1])):
        config.layer_types = layer_types
        layers = AutoModelForCausalLM.from_config(config)
        decoder = read_decoder(layers)
        assert {half.window for half, _ in decoder.layers} == {None, 8}
        again[name] = decoder._num_computed_again(plan, torch.float32, 62_000_000)
    assert 0 < again["first"] == again["last"] < 4
