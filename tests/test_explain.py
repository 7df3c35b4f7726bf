"""One example under the lens: distributions given by hand, and what a step does to a model."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from likely.errors import ConfigError
from likely.insight.distribution import explain_distribution, parse, pulls
from likely.insight.explain import beliefs, effect_of_a_step, logprobs_at
from likely.insight.prose import lens_table

ROW = ([1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 1])


def test_which_of_two_distributions_is_better() -> None:
    told = explain_distribution("Paris=.15,London=.10,The=.08", "Paris=.25,London=.05,The=.04", 0.1)
    assert told["nll"] == pytest.approx(-math.log(0.15))
    assert told["better"].startswith("B is better, by 0.5108 nats")
    assert f"{-math.log(0.25):.4f}" in told["better"]
    swapped = explain_distribution("Paris=.25", "Paris=.15", 0.1)["better"]
    assert swapped.startswith("A is better, by 0.5108 nats")
    assert "Neither" in explain_distribution("Paris=.25", "Paris=.25,London=.5", 0.1)["better"]


def test_what_the_next_update_does_to_gold_and_rival() -> None:
    """Gold J' at .25 below its rival Je at .35: J' is pulled up by .75, Je pushed down by .35."""
    told = explain_distribution("J'=0.25,Je=0.35", None, 0.1)
    gold, rival, rest = told["pulls"]
    assert (gold["gradient"], rival["gradient"], rest["gradient"]) == pytest.approx((-0.75, 0.35, 0.40))
    assert gold["after"] > 0.25
    assert rival["after"] < 0.35
    assert sum(p["after"] for p in told["pulls"]) == pytest.approx(1)
    assert "0.75" in told["words"]
    assert "'Je' by 0.35" in told["words"]


def test_a_full_distribution_moves_as_softmax_says() -> None:
    found = pulls({"a": 0.2, "b": 0.5, "c": 0.3}, "a", 0.7)
    z = torch.log(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)).requires_grad_()
    (-torch.log_softmax(z, 0)[0]).backward()
    assert z.grad is not None
    assert [p.gradient for p in found] == pytest.approx(z.grad.tolist())
    assert [p.after for p in found] == pytest.approx(torch.softmax(z - 0.7 * z.grad, 0).tolist())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Paris", "no token=probability"),
        ("Paris=x", "no token=probability"),
        ("Paris=1.5", "no token=probability"),
        ("Paris=nan", "no token=probability"),
        ("=0.5", "no token=probability"),
        ("a=0.5,a=0.1", "stands twice"),
        ("a=0.6,b=0.6", "sum to 1.2"),
        ("a=0,b=0.6", "gold token"),
        ("a=25%,b=35%", "no token=probability"),
        ("a=0.3333334,b=0.3333334,c=0.3333334", r"sum to 1\.0000002"),
        ("a=0.5,everything else=0.1", "what the listed tokens leave"),
    ],
)
def test_what_is_no_distribution(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        explain_distribution(text, None, 0.1)


@pytest.mark.parametrize("rate", [1e3, 1e6, 1e308])
def test_no_step_is_too_large(rate: float) -> None:
    found = pulls({"a": 0.5, "b": 0.2, "c": 0.0}, "a", rate)
    assert [p.after for p in found] == pytest.approx([1, 0, 0, 0])
    assert sum(p.gradient for p in found) == pytest.approx(0)


def test_the_second_distribution_may_begin_with_a_rival() -> None:
    told = explain_distribution("Paris=0.15,London=0.1", "London=0,Paris=0.25", 0.1)
    assert told["better"].startswith("B is better, by 0.5108 nats")
    with pytest.raises(ConfigError, match="gives the gold token 'Paris' nothing"):
        explain_distribution("Paris=0.15", "London=0.2,Paris=0", 0.1)


def test_one_state_is_shown_once() -> None:
    row = {"text": "a", "gold": True, "before": 0.25, "after": 0.5, "gradient_before": -0.75, "gradient_after": -0.5}
    assert lens_table({"rows": [row]}, None, "B").splitlines()[0].split() == ["next", "token", "B", "p", "-", "onehot"]
    assert lens_table({"rows": [row]}, None, "B").splitlines()[1].split() == ["a", "(gold)", "50.00%", "-0.5000"]
    assert "25.00%" in lens_table({"rows": [row]}, "A", "B")


def test_what_is_certain_is_not_moved() -> None:
    told = explain_distribution("a=1", None, 0.1)
    assert [(p["gradient"], p["after"]) for p in told["pulls"]] == [(0.0, 1.0)]
    assert "by 0 times" in told["words"]


def test_a_token_may_hold_an_equals_sign() -> None:
    assert parse("a==0.5, b=0.25") == {"a=": 0.5, "b": 0.25}


def test_beliefs_are_the_models(twin_of: Any, make_examples: Any) -> None:
    class Numbers:
        def decode(self, ids: list[int]) -> str:
            return str(ids[0])

    twin = twin_of("gpt2", torch.float64)
    [example] = make_examples([ROW])
    positions, logp_SV = logprobs_at(twin.model, example)
    assert positions == [2, 3, 5]
    expected = torch.log_softmax(twin.reference(torch.tensor([ROW[0]])).logits[0].double(), -1).detach().numpy()
    assert logp_SV == pytest.approx(expected[[1, 2, 4]], abs=1e-10)  # float64, the same products
    for t, belief in zip(positions, beliefs(Numbers(), example, positions, logp_SV, 2), strict=True):
        row = expected[t - 1]
        assert belief.nll == pytest.approx(-row[ROW[0][t]])
        assert belief.rank == 1 + (row > row[ROW[0][t]]).sum()
        ordered = [v for v in np.argsort(-row) if v != ROW[0][t]][:2]
        assert [name for name, _ in belief.rivals] == [str(v) for v in ordered]
        assert belief.probability + belief.rest + sum(p for _, p in belief.rivals) == pytest.approx(1)


def test_the_measured_change_approaches_the_prediction(make_network: Any, make_examples: Any) -> None:
    """The error of a first-order prediction falls with the square of the step: a tenth of the rate, a hundredth."""
    from likely.model.forward import connect

    model = connect(make_network("gpt2").double(), "gpt2", compute_dtype=torch.float64)
    [example, other] = make_examples([ROW, ([1, 2, 7], [0, 0, 1])])
    weights = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    errors = []
    for rate in (1e-4, 1e-5, 1e-6):
        effect = effect_of_a_step(model, [example, other], example, learning_rate=rate, max_grad_norm=1.0)
        errors.append(np.abs(effect.measured - effect.predicted).max())
        assert effect.measured.sum() > 0
        assert np.abs(effect.predicted).max() > 10 * errors[-1]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.3)
    assert all(torch.equal(p, weights[name]) for name, p in model.network.named_parameters())


def test_a_step_on_a_frozen_model_is_refused(make_network: Any, make_examples: Any) -> None:
    from likely.model.forward import connect

    model = connect(make_network("gpt2"), "gpt2", compute_dtype=torch.float32)
    model.network.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        effect_of_a_step(model, make_examples([ROW]), make_examples([ROW])[0], learning_rate=1e-3, max_grad_norm=1.0)


def explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    from likely.cli import main

    monkeypatch.setattr(sys, "argv", ["likely", "explain", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_the_verb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Any) -> None:
    told = [f"--model={tiny_model_dir}", f"--base={tiny_model_dir}", "--prompt=Capital?", "--response=Paris.", "--step"]
    code, out, _ = explained(capsys, monkeypatch, *told, "--json")
    assert code == 0
    record = json.loads(out)
    assert "".join(t["text"] for t in record["tokens"]) == "Paris.<|im_end|>"
    assert record["nll"]["A"] == record["nll"]["B"] == pytest.approx(sum(t["A"]["nll"] for t in record["tokens"]))
    assert sum(row["gradient_before"] for row in record["first_token"]["rows"]) == pytest.approx(0, abs=1e-6)
    assert all(abs(t["step"]["predicted"]) > 0 for t in record["tokens"])
    code, out, _ = explained(capsys, monkeypatch, *told)
    assert code == 0
    assert "one step: log-probability" in out


def test_the_verb_says_what_it_lacks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = explained(capsys, monkeypatch, "--prompt=x")
    assert (code, out) == (2, "")
    assert err.startswith("error: explain needs --model")
    assert err.count("\n") == 1


def test_a_single_supervised_token(make_network: Any, make_examples: Any) -> None:
    from likely.model.forward import connect

    model = connect(make_network("llama").double(), "llama", compute_dtype=torch.float64)
    [example] = make_examples([([1, 2], [0, 1])])
    positions, logp_SV = logprobs_at(model, replace(example))
    assert positions == [1]
    assert np.exp(logp_SV).sum() == pytest.approx(1)
