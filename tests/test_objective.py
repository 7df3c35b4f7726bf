"""Loss, log-probabilities and every parameter's gradient over tries, against the definition computed naively."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from likely.data.packing import build_packs, normalize_per_example, supervise_everything
from likely.errors import ModelError
from likely.model import attention
from likely.model.adapters import add_lora
from likely.model.forward import LanguageModel, connect
from likely.training import objective
from likely.training.objective import nll_sum, score_edges
from likely.types import Example, Pack
from naive import Row, Truth, families, truth

MakeExamples = Callable[[list[Row]], list[Example]]
Step = Callable[[LanguageModel, list[Pack]], float]

SHARING = [
    "llama",
    "llama-tied",
    "qwen3",
    "gpt2",
    "mistral-window",
    "qwen2-window",
    "gemma2",
    "phi-head-bias",
    "cohere-logit-scale",
    "granite-logits-scaling",
]
FLAT = ["bloom"]
OTHER_VALUES = ["deepseek3-narrow-values", "deepseek3-wide-values"]
OWN = ["llama", "llama-tied", "qwen3", "mistral-window", "qwen2-window"]
WINDOWED = ["mistral-window", "qwen2-window", "gemma2"]
VOCABULARY = 67

# Every case at once: a stem of several turns, branches inside a chain and at its end, a row that is a prefix of others,
# duplicates, fractional weights, an answer of one token, a row without supervision, and a row that shares nothing.
FAMILY: list[Row] = [
    ([5, 9, 3, 7, 2, 8, 11, 4, 6, 60], [0, 0, 0, 1, 1, 1, 0, 1, 1, 1]),
    ([5, 9, 3, 7, 2, 33, 12, 13, 14], [0, 0, 0, 0, 0, 1, 1, 0.5, 0.25]),
    ([5, 9, 3, 7, 2, 8, 11, 40, 41], [0, 0, 0, 0, 0, 0, 0, 2, 1]),
    ([5, 9, 3, 7, 2, 8, 11, 40, 41], [0, 0, 0, 0, 0, 0, 0, 2, 1]),
    ([5, 9, 3, 20], [0, 0, 0, 1 / 3]),
    ([5, 9, 3, 7], [0, 0, 0, 1]),
    ([5, 9, 3, 7, 2], [0, 0, 0, 0, 0]),
    ([50, 51, 52, 53, 54, 55, 56, 57], [0, 1, 1, 1, 1, 1, 1, 1]),
]


@dataclass(frozen=True)
class Tolerance:
    """Largest difference: of the loss relative to the loss; of a log-probability relative to it, or to 1 nat if that is
    more; of a parameter's gradient relative to its norm, or to the share ``floor`` of the whole gradient's norm if that
    is more. The floor is for gradients that (nearly) vanish by symmetry, as that of attention over a single key or over
    equal values: there rounding is all there is."""

    nll: float
    logprob: float
    gradient: float


def tolerance_of(name: str, dtype: torch.dtype = torch.float64) -> Tolerance:
    if dtype == torch.float32:
        # The model's own rounding, 6e-8 an operation, over some dozens of operations; the reference is float64, and
        # transformers in float32 is as far from it.
        return Tolerance(1e-5, 1e-5, 1e-5)
    if name == "gemma2":
        # The reference, transformers' eager attention, computes its softmax in float32 whatever the weights are: 6e-8
        # relative in each probability, over two layers and logits of a few nats.
        return Tolerance(1e-6, 1e-6, 1e-5)
    if name in {"gpt2", "phi-head-bias", "bloom"}:
        # Float64 throughout, forward and backward: only the order of sums differs.
        return Tolerance(1e-10, 1e-10, 1e-10)
    # RMS norms cast to float32, so a float32 rounding (6e-8) is in the gradients of both sides, in another order.
    return Tolerance(1e-10, 1e-10, 1e-6)


PEFT_WARNING = "ignore:`is_gradient_checkpointing`:FutureWarning"  # peft 0.21 asks transformers 5.23 by the old name
WRONG = 1e-2  # far above every tolerance here: what a mistake must exceed to be called caught


@dataclass(frozen=True)
class Difference:
    nll: float
    logprob: float
    gradient: float

    def check(self, tolerance: Tolerance) -> None:
        assert self.nll <= tolerance.nll, f"loss differs by {self.nll:.2g}"
        assert self.logprob <= tolerance.logprob, f"a log-probability differs by {self.logprob:.2g}"
        assert self.gradient <= tolerance.gradient, f"a gradient differs by {self.gradient:.2g}"


def total_weight(packs: list[Pack]) -> float:
    return float(sum(pack.weight_E.sum() for pack in packs))


def one_global_sum(model: LanguageModel, packs: list[Pack]) -> float:
    """The step's loss in nats, with the gradient of loss / weight left in the parameters."""
    nll = 0.0
    for pack in packs:
        loss = nll_sum(model, pack)
        (loss / total_weight(packs)).backward()
        nll += loss.item()
    return nll


def mean_of_means(model: LanguageModel, packs: list[Pack]) -> float:
    """The well-known mistake: each pack's own mean, averaged over the packs."""
    nll = 0.0
    for pack in packs:
        loss = nll_sum(model, pack)
        (loss / total_weight([pack]) / len(packs)).backward()
        nll += loss.item()
    return nll


def pack_up(model: LanguageModel, examples: list[Example], room: int = 10_000) -> list[Pack]:
    """Packs that hold ``room`` tokens more than the longest example."""
    longest = max((len(e.token_ids_T) for e in examples), default=1)
    return build_packs(examples, longest + room, share=model.shares)


def norm(gradients: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


def gradient_difference(model: LanguageModel, expected: Truth) -> float:
    """Largest over the parameters of |g - g'| / |g'|, with the floor that ``Tolerance`` describes."""
    expected_of = {k: g for k, g in expected.gradient.items() if g is not None}
    # In float32 noise of the whole gradient's size times 1e-7 is 1e-5 of a gradient a hundred times smaller.
    floor = norm(expected_of.values()) * (0.1 if model.head.weight.dtype == torch.float32 else 0.01)
    largest = 0.0
    for name, parameter in model.network.named_parameters():
        there = expected_of.get(name, torch.zeros(parameter.shape, dtype=torch.float64))
        here = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = max(norm([there]), floor) or 1.0
        difference = norm([here.double() - there]) / scale
        largest = max(largest, math.inf if math.isnan(difference) else difference)
    return largest


def logprob_difference(model: LanguageModel, packs: list[Pack], rows: list[Row], expected: Truth) -> float:
    """Over all supervised tokens of all rows."""
    largest = 0.0
    for pack in packs:
        logprob_E = score_edges(model, pack).logprob_E
        for i, edge_of in zip(pack.example_N.tolist(), pack.edge_of_N, strict=True):
            there = np.array([expected.logprob[i][t] for t, weight in enumerate(rows[i][1]) if weight])
            difference = np.abs(logprob_E[edge_of] - there) / np.maximum(1.0, np.abs(there))
            largest = max(largest, float(np.nan_to_num(difference, nan=np.inf).max()))
    return largest


def compare(
    twin: Any, rows: list[Row], packs: list[Pack], *, step: Step = one_global_sum, model: LanguageModel | None = None
) -> Difference:
    """How far the packs' loss, log-probabilities and gradient are from the truth about the rows."""
    model = model or twin.model
    weight = sum(sum(weights) for _, weights in rows)
    expected = truth(twin.reference, rows, weight or 1.0)
    model.network.zero_grad(set_to_none=True)
    nll = step(model, packs)
    off = abs(nll - expected.nll) / (expected.nll or 1.0)
    return Difference(
        math.inf if math.isnan(off) else off,
        logprob_difference(model, packs, rows, expected),
        gradient_difference(model, expected),
    )


def moderate(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],  # to explain a failure takes longer than to shrink it
        # Building a model on its first use is slow data generation in the eyes of hypothesis.
        suppress_health_check=[HealthCheck.too_slow],
    )


# ---- against the definition


@pytest.mark.parametrize("name", SHARING + FLAT)
@moderate(25)
@given(rows=families(VOCABULARY), room=st.sampled_from([0, 3, 1000]))
def test_float64(twin_of: Any, make_examples: MakeExamples, name: str, rows: list[Row], room: int) -> None:
    twin = twin_of(name, torch.float64)
    packs = pack_up(twin.model, make_examples(rows), room)
    compare(twin, rows, packs).check(tolerance_of(name))


@pytest.mark.parametrize("name", SHARING + FLAT)
@moderate(10)
@given(rows=families(VOCABULARY), room=st.sampled_from([0, 1000]))
def test_float32(twin_of: Any, make_examples: MakeExamples, name: str, rows: list[Row], room: int) -> None:
    twin = twin_of(name, torch.float32)
    packs = pack_up(twin.model, make_examples(rows), room)
    compare(twin, rows, packs).check(tolerance_of(name, torch.float32))


@pytest.mark.parametrize("name", SHARING + FLAT + OTHER_VALUES)
def test_every_case_at_once(twin_of: Any, make_examples: MakeExamples, name: str) -> None:
    twin = twin_of(name, torch.float64)
    packs = pack_up(twin.model, make_examples(FAMILY))
    assert len(packs) == (7 if name in FLAT else 1), "a family that must be shared was not"
    compare(twin, FAMILY, packs).check(tolerance_of(name))


@pytest.mark.parametrize("name", SHARING + FLAT)
def test_rank_and_entropy(twin_of: Any, make_examples: MakeExamples, name: str) -> None:
    twin = twin_of(name, torch.float64)
    expected = truth(twin.reference, FAMILY)
    for pack in pack_up(twin.model, make_examples(FAMILY)):
        scores = score_edges(twin.model, pack)
        for i, edge_of in zip(pack.example_N.tolist(), pack.edge_of_N, strict=True):
            supervised = [t for t, weight in enumerate(FAMILY[i][1]) if weight]
            assert scores.rank_E[edge_of].tolist() == [expected.rank[i][t] for t in supervised]
            # Entropy is a mean of log-probabilities, so it is as exact as they are.
            exact = pytest.approx([expected.entropy[i][t] for t in supervised], rel=tolerance_of(name).logprob)
            assert scores.entropy_E[edge_of].tolist() == exact


@pytest.mark.parametrize("name", WINDOWED)
def test_the_window_is_active_in_the_reference(twin_of: Any, make_network: Any, name: str) -> None:
    """Else the comparison of windowed models would prove nothing about windows."""
    windowed = twin_of(name, torch.float64).reference
    config = copy.deepcopy(windowed.config)
    config.sliding_window = 1000
    unlimited = type(windowed)(config).double().eval()
    unlimited.load_state_dict(windowed.state_dict())
    row = FAMILY[0]
    assert len(row[0]) > 2 * windowed.config.sliding_window
    narrow, wide = (truth(model, [row]).logprob[0] for model in (windowed, unlimited))
    assert narrow[1:5] == pytest.approx(wide[1:5], abs=1e-5)  # up to 4 tokens of context fit into the window of 4
    assert max(abs(a - b) for a, b in zip(narrow[5:], wide[5:], strict=True)) > WRONG


def test_the_caps_are_active_in_the_reference(twin_of: Any) -> None:
    capped = twin_of("gemma2", torch.float64).reference
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        config = copy.deepcopy(capped.config)
        setattr(config, field, None)
        uncapped = type(capped)._from_config(config, attn_implementation="eager").double().eval()
        uncapped.load_state_dict(capped.state_dict())
        a, b = (truth(model, FAMILY[:1]).nll for model in (capped, uncapped))
        assert abs(a - b) > WRONG, field


# ---- what must not change the result


@pytest.mark.parametrize("name", ["gpt2", "mistral-window", "llama-tied"])
@moderate(15)
@given(rows=families(VOCABULARY), room=st.integers(0, 40), data=st.data())
def test_any_split_and_any_order(
    twin_of: Any, make_examples: MakeExamples, name: str, rows: list[Row], room: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rows))
    twin = twin_of(name, torch.float64)
    packs = pack_up(twin.model, make_examples(shuffled), room)
    packs = data.draw(st.permutations(packs))
    compare(twin, shuffled, packs).check(tolerance_of(name))


def test_one_backward_for_all_packs(twin_of: Any, make_examples: MakeExamples) -> None:
    def summed_first(model: LanguageModel, packs: list[Pack]) -> float:
        loss = torch.stack([nll_sum(model, pack) for pack in packs]).sum()
        (loss / total_weight(packs)).backward()
        return loss.item()

    twin = twin_of("gpt2", torch.float64)
    packs = pack_up(twin.model, make_examples(FAMILY), 0)
    assert len(packs) > 1
    compare(twin, FAMILY, packs, step=summed_first).check(tolerance_of("gpt2"))


@pytest.mark.parametrize("name", ["gpt2", "mistral-window", "gemma2"])
@pytest.mark.parametrize(("merged", "block"), [(0, 1), (0, 3), (2, 2), (5, 3), (1000, 1)])
def test_query_blocks(
    twin_of: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, name: str, merged: int, block: int
) -> None:
    monkeypatch.setattr(attention, "MERGED_QUERIES", merged)
    monkeypatch.setattr(attention, "BLOCK_QUERIES", block)
    twin = twin_of(name, torch.float64)
    compare(twin, FAMILY, pack_up(twin.model, make_examples(FAMILY))).check(tolerance_of(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma2"])
@pytest.mark.parametrize("keys", [0, 5, 1000])
def test_probabilities_kept_or_computed_again(
    twin_of: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, name: str, keys: int
) -> None:
    monkeypatch.setattr(attention, "KEPT_KEYS", keys)
    monkeypatch.setattr(attention, "MERGED_QUERIES", 2)
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 3)
    twin = twin_of(name, torch.float64)
    compare(twin, FAMILY, pack_up(twin.model, make_examples(FAMILY))).check(tolerance_of(name))


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("name", SHARING + FLAT)
@pytest.mark.parametrize("adapted", [False, True])
def test_activations_computed_again(make_network: Any, make_examples: Any, name: str, adapted: bool) -> None:
    """Bit for bit what they would be if they were kept, in less memory."""
    network = make_network(name)
    if adapted:
        network = add_lora(network, rank=2, alpha=None, seed=0)
        for parameter in network.parameters():
            parameter.data += 0.1 * parameter.requires_grad  # the second factor starts at zero
    model = connect(network.double(), name, compute_dtype=torch.float64)
    packs = pack_up(model, make_examples(FAMILY))
    found, kept = [], []
    for room in (None, 0, 60_000):
        model.activation_room = room
        model.network.zero_grad(set_to_none=True)
        sizes: dict[int, int] = {}

        def keep(x: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            losses = [nll_sum(model, pack) for pack in packs]
        kept.append(sum(sizes.values()))
        (sum(losses) / total_weight(packs)).backward()
        found.append([*(loss.detach() for loss in losses), *(p.grad for p in model.network.parameters())])
    for other in found[1:]:
        for here, there in zip(other, found[0], strict=True):
            assert here is there is None or torch.equal(here, there)
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.parametrize("name", OWN)
def test_the_layers_of_transformers_agree_with_ours(
    make_network: Any, twin_of: Any, make_examples: Any, name: str
) -> None:
    model = connect(make_network(name).double(), name, compute_dtype=torch.float64)
    model.decoder = None
    compare(twin_of(name, torch.float64), FAMILY, pack_up(model, make_examples(FAMILY)), model=model).check(
        tolerance_of(name)
    )


@pytest.mark.parametrize("name", SHARING + FLAT)
def test_which_models_are_run_by_our_own_layers(twin_of: Any, name: str) -> None:
    """Else every other test of them would be one of transformers' layers."""
    assert (twin_of(name, torch.float64).model.decoder is not None) == (name in OWN)


def test_layers_that_do_something_else_are_left_to_transformers(make_network: Any) -> None:
    """Recognised by their names, and not what their names say."""
    network = make_network("llama").double()
    network.model.layers[0].mlp.register_forward_hook(lambda *inputs_and_output: 2 * inputs_and_output[-1])
    model = connect(network, "hooked", compute_dtype=torch.float64)
    assert model.decoder is None
    assert model.shares


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "gemma2", "phi-head-bias"])
@pytest.mark.parametrize("rows_at_once", [1, 2, 5])
def test_logit_chunks(
    twin_of: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, name: str, rows_at_once: int
) -> None:
    monkeypatch.setattr(objective, "CHUNK_LOGITS", rows_at_once * VOCABULARY)
    twin = twin_of(name, torch.float64)
    compare(twin, FAMILY, pack_up(twin.model, make_examples(FAMILY))).check(tolerance_of(name))


def test_a_chunk_holds_at_least_one_context(
    twin_of: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "CHUNK_LOGITS", 1)
    twin = twin_of("gpt2", torch.float64)
    compare(twin, FAMILY, pack_up(twin.model, make_examples(FAMILY))).check(tolerance_of("gpt2"))


def test_order_of_edges(twin_of: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack's edges may stand in any order, and scores come back in the pack's."""
    monkeypatch.setattr(objective, "CHUNK_LOGITS", 3 * VOCABULARY)
    twin = twin_of("gpt2", torch.float64)
    [pack] = pack_up(twin.model, make_examples(FAMILY))
    order = np.random.default_rng(0).permutation(len(pack.source_E))
    new_place = np.argsort(order)
    shuffled = replace(
        pack,
        source_E=pack.source_E[order],
        target_E=pack.target_E[order],
        weight_E=pack.weight_E[order],
        edge_of_N=tuple(new_place[edge_of] for edge_of in pack.edge_of_N),
    )
    compare(twin, FAMILY, [shuffled]).check(tolerance_of("gpt2"))


# ---- weights


def test_duplicates_count_as_often_as_they_stand(twin_of: Any, make_examples: MakeExamples) -> None:
    twin = twin_of("gpt2", torch.float64)
    row = FAMILY[0]
    [once] = pack_up(twin.model, make_examples([row]))
    [thrice] = pack_up(twin.model, make_examples([row] * 3))
    assert thrice.num_nodes == once.num_nodes
    # The same sum, with other weights.
    assert nll_sum(twin.model, thrice).item() == pytest.approx(3 * nll_sum(twin.model, once).item(), rel=1e-12)
    rows = [row, row, FAMILY[1]]
    compare(twin, rows, pack_up(twin.model, make_examples(rows))).check(tolerance_of("gpt2"))


@pytest.mark.parametrize("room", [0, 1000])
def test_each_example_counts_the_same_when_normalized(twin_of: Any, make_examples: MakeExamples, room: int) -> None:
    twin = twin_of("gpt2", torch.float64)
    rows = [(ids, [w / sum(weights) if w else 0.0 for w in weights]) for ids, weights in FAMILY]
    packs = pack_up(twin.model, [normalize_per_example(e) for e in make_examples(FAMILY)], room)
    assert total_weight(packs) == pytest.approx(7)  # the rows that supervise something
    compare(twin, rows, packs).check(tolerance_of("gpt2"))


def test_joint_likelihood(twin_of: Any, make_examples: MakeExamples) -> None:
    twin = twin_of("gpt2", torch.float64)
    rows = [(ids, [0.0] + [1.0] * (len(ids) - 1)) for ids, _ in FAMILY]
    packs = pack_up(twin.model, [supervise_everything(e) for e in make_examples(FAMILY)])
    compare(twin, rows, packs).check(tolerance_of("gpt2"))


def test_weights_of_messages(twin_of: Any, make_examples: MakeExamples) -> None:
    """A prompt weight on the prompts' tokens, and a weight per turn that differs between rows with the same tokens."""
    twin = twin_of("gpt2", torch.float64)
    ids = [5, 9, 3, 7, 2, 8, 11]
    rows: list[Row] = [
        (ids, [0, 0.1, 0.1, 0.7, 0.7, 0.1, 1]),
        (ids, [0, 0.1, 0.1, 0, 0, 0.1, 0.3]),
        ([*ids, 30], [0, 0.1, 0.1, 1, 1, 0.1, 0.1, 1.5]),
    ]
    compare(twin, rows, pack_up(twin.model, make_examples(rows))).check(tolerance_of("gpt2"))


def test_frozen_parameters_get_no_gradient(twin_of: Any, make_network: Any, make_examples: MakeExamples) -> None:
    """As with adapters: the head is frozen, and the rest gets the same gradient as if it were not."""
    twin = twin_of("phi-head-bias", torch.float64)
    model = connect(make_network("phi-head-bias").double(), "frozen", compute_dtype=torch.float64)
    head = model.network.get_output_embeddings().requires_grad_(requires_grad=False)
    one_global_sum(model, pack_up(model, make_examples(FAMILY)))
    assert head.weight.grad is None
    assert head.bias.grad is None
    expected = truth(twin.reference, FAMILY, sum(sum(weights) for _, weights in FAMILY))
    for name in ("lm_head.weight", "lm_head.bias"):
        expected.gradient[name] = None
    assert gradient_difference(model, expected) <= tolerance_of("phi-head-bias").gradient


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pack_without_edges_is_a_zero_in_the_graph(twin_of: Any, make_examples: MakeExamples, name: str) -> None:
    model = twin_of(name, torch.float64).model
    [pack] = pack_up(model, make_examples(FAMILY[:1]))
    none = np.empty(0, np.int64)
    pack = replace(pack, source_E=none, target_E=none, weight_E=np.empty(0), edge_of_N=(none,))
    model.network.zero_grad(set_to_none=True)
    loss = nll_sum(model, pack)
    assert loss.item() == 0
    loss.backward()
    # A rank without supervision takes part in the gradient's reduction with zeros.
    assert all(p.grad is not None and not p.grad.any() for p in model.network.parameters())
    assert not any(len(column) for column in astuple(score_edges(model, pack)))


def test_rows_without_supervision_change_nothing(twin_of: Any, make_examples: MakeExamples) -> None:
    twin = twin_of("gpt2", torch.float64)
    rows = [*FAMILY[:3], ([5, 9, 3, 60, 61], [0.0] * 5), ([62], [0.0]), ([63, 64], [0.0, 0.0])]
    packs = pack_up(twin.model, make_examples(rows))
    assert [pack.token_T.tolist() for pack in packs] == [
        pack.token_T.tolist() for pack in pack_up(twin.model, make_examples(FAMILY[:3]))
    ]
    compare(twin, rows, packs).check(tolerance_of("gpt2"))


# ---- adapters


def with_adapters(network: Any, targets: list[str], *, start_at_zero: bool) -> Any:
    # peft starts with B = 0, where the adapters are not in the likelihood yet and A has no gradient.
    options = LoraConfig(r=2, target_modules=targets, init_lora_weights=start_at_zero, task_type="CAUSAL_LM")
    return get_peft_model(network, options).double().eval()


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("name", [*OWN, "granite-logits-scaling"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], ["k_proj", "o_proj", "gate_proj", "up_proj"]])
def test_adapters(make_network: Any, make_examples: MakeExamples, name: str, targets: list[str]) -> None:
    network = with_adapters(make_network(name), targets, start_at_zero=False)
    twin = pair(network)
    assert twin.model.shares
    assert (twin.model.decoder is not None) == (name in OWN)
    packs = pack_up(twin.model, make_examples(FAMILY))
    compare(twin, FAMILY, packs).check(tolerance_of(name))
    trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in network.named_parameters() if "lora_" in name}


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("start_at_zero", [True, False])
def test_adapters_of_the_head_are_trained_or_refused(
    make_network: Any, make_examples: MakeExamples, start_at_zero: bool
) -> None:
    """At zero such an adapter changes no likelihood, so only its gradient can tell whether it takes part."""
    network = with_adapters(make_network("llama"), ["q_proj", "lm_head"], start_at_zero=start_at_zero)
    try:
        twin = pair(network)
        difference = compare(twin, FAMILY, pack_up(twin.model, make_examples(FAMILY)))
    except ModelError:
        return
    difference.check(tolerance_of("llama"))


@dataclass(frozen=True)
class Pair:
    model: LanguageModel
    reference: Any


def pair(network: Any) -> Pair:
    reference = copy.deepcopy(network)
    return Pair(connect(network, "pair", compute_dtype=torch.float64), reference)


# ---- lower precision


def test_bfloat16_products(twin_of: Any, make_network: Any, make_examples: MakeExamples) -> None:
    twin = twin_of("llama", torch.float64)
    model = connect(make_network("llama"), "bfloat16", compute_dtype=torch.bfloat16)
    assert model.shares
    packs = pack_up(model, make_examples(FAMILY))
    expected = truth(twin.reference, FAMILY, total_weight(packs))
    with model.autocast():
        nll = one_global_sum(model, packs)
    # bfloat16 keeps 8 bits, 0.4% an operation, and errors of opposite sign cancel in the sum.
    assert nll == pytest.approx(expected.nll, rel=0.03)
    here, there = [], []
    for name, parameter in model.network.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        here.append(parameter.grad.flatten().double())
        there.append(expected.gradient[name].flatten())
    # A few percent of noise leaves the direction: cosine 0.99 is 8 degrees.
    assert torch.cosine_similarity(torch.cat(here), torch.cat(there), dim=0) > 0.99


def test_products_in_the_dtype_of_the_weights_need_no_autocast(twin_of: Any) -> None:
    with twin_of("llama", torch.float32).model.autocast():
        assert not torch.is_autocast_enabled("cpu")


# ---- models that don't obey


def test_without_a_trie_the_model_refuses(twin_of: Any) -> None:
    network = twin_of("llama", torch.float64).model.network
    with pytest.raises(ModelError, match="without a trie"):
        network(input_ids=torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("name", ["mistral-window", "gemma2"])
def test_as_transformers_runs_it(twin_of: Any, name: str) -> None:
    twin = twin_of(name, torch.float64)
    token_ids = torch.tensor([FAMILY[0][0]])
    with twin.model.as_transformers_runs_it() as network, torch.no_grad():
        assert torch.equal(network(input_ids=token_ids).logits, twin.reference(input_ids=token_ids).logits)
    assert twin.model.causal_lm.config._attn_implementation == attention.NAME


def ignore_the_trie(network: Any) -> None:
    """One layer keeps an attention of its own, as a layer with code of its own would."""
    layer = network.model.layers[1].self_attn
    layer.config = copy.deepcopy(network.config)
    layer.config._attn_implementation = "sdpa"


def test_a_layer_that_ignores_the_trie_is_caught(make_network: Any, make_examples: MakeExamples) -> None:
    model = connect(make_network("granite-logits-scaling").double(), "one layer", compute_dtype=torch.float64)
    [pack] = pack_up(model, make_examples(FAMILY))
    ignore_the_trie(model.network)
    for use in (nll_sum, score_edges):
        with pytest.raises(ModelError, match="1 of 2 layers"):
            use(model, pack)


def test_a_model_that_ignores_the_trie_is_run_flat(
    twin_of: Any, make_network: Any, make_examples: MakeExamples
) -> None:
    name = "granite-logits-scaling"
    network = make_network(name).double()
    ignore_the_trie(network)
    model = connect(network, "one layer", compute_dtype=torch.float64)
    assert not model.shares
    packs = pack_up(model, make_examples(FAMILY))
    compare(twin_of(name, torch.float64), FAMILY, packs, model=model).check(tolerance_of(name))


def test_a_wrong_mask_is_noticed_when_connecting(
    twin_of: Any, make_network: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "hidden_keys", without_mask(attention.hidden_keys))
    model = connect(make_network("llama").double(), "masked", compute_dtype=torch.float64)
    assert not model.shares
    packs = pack_up(model, make_examples(FAMILY))
    compare(twin_of("llama", torch.float64), FAMILY, packs, model=model).check(tolerance_of("llama"))
    with pytest.raises(ModelError, match="branches"):
        model.hidden_at(build_packs(make_examples(FAMILY), 100)[0], np.array([0]))


def test_a_likelihood_that_is_not_the_heads_is_refused(make_network: Any) -> None:
    network = make_network("llama").double()
    network.lm_head.register_forward_hook(lambda *inputs_and_logits: 2 * inputs_and_logits[-1])
    with pytest.raises(ModelError, match="differ by"):
        connect(network, "scaled", compute_dtype=torch.float64)


def test_dropout_is_off(make_network: Any) -> None:
    network = make_network("gpt2").train()
    assert network.config.resid_pdrop > 0
    model = connect(network, "dropout", compute_dtype=torch.float32)
    assert not any(module.training for module in model.network.modules())


@pytest.mark.parametrize("name", ["llama-dynamic-rope", "phi3-longrope", "qwen2moe-window-in-mask"])
def test_what_shows_only_in_long_sequences_is_exact_or_refused(
    make_network: Any, make_examples: MakeExamples, name: str
) -> None:
    """Some models compute short sequences like any other and differ beyond a length (16 here), which a short trial
    does not reach. Here a short conversation shares its prefix with a long one."""
    long = [(7 * i) % VOCABULARY for i in range(40)]
    rows: list[Row] = [(long, [0.0] + [1.0] * 39), ([*long[:6], 3, 4, 5, 6], [0.0] * 6 + [1.0] * 4)]
    try:
        twin = pair(make_network(name).double())
        difference = compare(twin, rows, pack_up(twin.model, make_examples(rows)))
    except ModelError:
        return
    difference.check(tolerance_of(name))


# ---- mistakes that the comparison must see

Mask = Callable[..., Any]


def without_mask(hidden_keys: Mask) -> Mask:
    return lambda *arguments: np.zeros_like(hidden_keys(*arguments))


def shifted_mask(hidden_keys: Mask) -> Mask:
    """Each query sees one key of its future."""

    def mutated(*arguments: Any) -> Any:
        hidden = hidden_keys(*arguments)
        shifted = np.zeros_like(hidden)
        shifted[:, 1:] = hidden[:, :-1]
        return shifted

    return mutated


def assert_caught(difference: Difference) -> None:
    """The same check as everywhere, with a tolerance that no rounding reaches."""
    with pytest.raises(AssertionError, match="differs by"):
        difference.check(Tolerance(WRONG, WRONG, WRONG))
    assert difference.gradient > WRONG


MUTATED = ["llama", "gpt2", "mistral-window"]


@pytest.mark.parametrize("name", MUTATED)
@pytest.mark.parametrize("mutation", [without_mask, shifted_mask])
def test_mutated_mask(
    twin_of: Any,
    make_examples: MakeExamples,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mutation: Callable[[Mask], Mask],
) -> None:
    twin = twin_of(name, torch.float64)
    monkeypatch.setattr(attention, "hidden_keys", mutation(attention.hidden_keys))
    assert_caught(compare(twin, FAMILY, pack_up(twin.model, make_examples(FAMILY))))


@pytest.mark.parametrize("name", MUTATED)
def test_mutated_mask_in_the_backward_alone(
    twin_of: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(attention, "KEPT_KEYS", 0)  # so that the backward computes them itself
    probabilities = attention._probabilities

    def step(model: LanguageModel, packs: list[Pack]) -> float:
        losses = [nll_sum(model, pack) for pack in packs]
        with monkeypatch.context() as patch:
            patch.setattr(
                attention,
                "_probabilities",
                lambda q, k, bias, *rest: probabilities(q, k, torch.zeros_like(bias), *rest),
            )
            (torch.stack(losses).sum() / total_weight(packs)).backward()
        return sum(loss.item() for loss in losses)

    twin = twin_of(name, torch.float64)
    difference = compare(twin, FAMILY, pack_up(twin.model, make_examples(FAMILY)), step=step)
    assert_caught(difference)
    assert max(difference.nll, difference.logprob) < WRONG  # so it is the gradient's comparison that sees it


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_mutated_positions(
    twin_of: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A node's place in the row instead of its depth."""
    twin = twin_of(name, torch.float64)
    backbone = twin.model.causal_lm.base_model
    module = backbone if name == "gpt2" else backbone.rotary_emb

    def in_a_row(*arguments: Any, position_ids: torch.Tensor, **options: Any) -> Any:
        places = torch.arange(position_ids.shape[1])[None]
        return type(module).forward(module, *arguments, position_ids=places, **options)

    monkeypatch.setattr(module, "forward", in_a_row)
    assert_caught(compare(twin, FAMILY, pack_up(twin.model, make_examples(FAMILY))))


@pytest.mark.parametrize("name", MUTATED)
@pytest.mark.parametrize("field", ["source_E", "target_E", "weight_E"])
def test_mutated_edges(twin_of: Any, make_examples: MakeExamples, name: str, field: str) -> None:
    """Labels that are off by one."""
    twin = twin_of(name, torch.float64)
    packs = pack_up(twin.model, make_examples(FAMILY))
    packs = [replace(pack, **{field: np.roll(getattr(pack, field), 1)}) for pack in packs]
    assert_caught(compare(twin, FAMILY, packs))


@pytest.mark.parametrize("name", MUTATED)
def test_mean_of_means(twin_of: Any, make_examples: MakeExamples, name: str) -> None:
    twin = twin_of(name, torch.float64)
    packs = pack_up(twin.model, make_examples(FAMILY), 0)
    assert len(packs) > 1
    difference = compare(twin, FAMILY, packs, step=mean_of_means)
    assert_caught(difference)
    # One pack has only one mean, which is why the mistake survives tests with one batch.
    one_pack = pack_up(twin.model, make_examples(FAMILY))
    compare(twin, FAMILY, one_pack, step=mean_of_means).check(tolerance_of(name))


def test_forgotten_duplicates(twin_of: Any, make_examples: MakeExamples) -> None:
    twin = twin_of("gpt2", torch.float64)
    rows = [FAMILY[0], FAMILY[0], FAMILY[1]]
    packs = pack_up(twin.model, make_examples(rows))
    packs = [replace(pack, weight_E=np.minimum(pack.weight_E, 1.0)) for pack in packs]
    assert_caught(compare(twin, rows, packs))
