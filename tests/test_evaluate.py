"""Figures of a model against their definitions, and the lens against closed forms."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest
import torch

import naive
from likely.data.packing import build_packs
from likely.data.trie import entropy_floor
from likely.insight import evaluate
from likely.insight.charts import draw_charts
from likely.insight.lens import compare_next_token, next_token_logprobs
from likely.insight.pictures import visible
from likely.insight.report import Answer, Report
from likely.insight.report_page import render_html
from likely.training.objective import nll_sum
from likely.types import ExampleScore, StepMetrics

ROWS = [
    ([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]),
    ([1, 2, 3, 9], [0, 0, 0, 1]),
    ([7, 8, 2], [0, 1, 0.5]),
    ([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]),
]


class Letters:
    """A tokenizer as far as a report needs one."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.mark.parametrize("pack_tokens", [4, 9, 1000])
def test_scores_are_the_definition_whatever_the_packs(twin_of: Any, make_examples: Any, pack_tokens: int) -> None:
    twin = twin_of("llama", torch.float64)
    scores = evaluate.score_examples(twin.model, make_examples(ROWS), pack_tokens)
    for (ids, _), score in zip(ROWS, scores, strict=True):
        logp = torch.log_softmax(twin.reference(torch.tensor([ids])).logits[0].double(), -1).detach()
        gold = logp[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
        assert np.isnan(score.logprob_T[0])
        # parts of the layers compute in float32
        assert score.logprob_T[1:] == pytest.approx(gold.numpy(), abs=1e-6)
        assert score.rank_T[1:].tolist() == [1 + int((logp[t] > gold[t]).sum()) for t in range(len(gold))]
        assert score.entropy_T[1:] == pytest.approx(-(logp.exp() * logp).sum(-1)[:-1].numpy(), abs=1e-5)


def test_scores_of_many_tokens_are_kept_in_a_file(
    twin_of: Any, make_examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = twin_of("llama", torch.float64).model, make_examples(ROWS)
    in_memory = evaluate.score_examples(model, examples, 9)
    monkeypatch.setattr(evaluate, "MOST_IN_MEMORY", 3)
    in_a_file = evaluate.score_examples(model, examples, 9)
    monkeypatch.setattr(evaluate.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    without_disk = evaluate.score_examples(model, examples, 9)
    kinds = [isinstance(scores[0].logprob_T.base, np.memmap) for scores in (in_memory, in_a_file, without_disk)]
    assert kinds == [False, True, False]
    for own, other, third in zip(in_memory, in_a_file, without_disk, strict=True):
        for column in (field.name for field in fields(own)):
            np.testing.assert_array_equal(getattr(own, column), getattr(other, column))
            np.testing.assert_array_equal(getattr(own, column), getattr(third, column))
    assert evaluate.score_examples(model, [], 9) == []


def test_summary_is_the_definition(twin_of: Any, make_examples: Any) -> None:
    twin = twin_of("gpt2", torch.float64)
    examples = make_examples(ROWS)
    scores = evaluate.score_examples(twin.model, examples, 50)
    summary = evaluate.summarize(examples, scores, Letters())
    weight = sum(sum(w) for _, w in ROWS)
    expected = naive.truth(twin.reference, ROWS).nll / weight
    assert summary.nll == pytest.approx(expected, rel=1e-10)  # float64, the same terms in another order
    assert summary.perplexity == pytest.approx(math.exp(expected), rel=1e-9)
    assert summary.num_tokens == weight
    assert summary.bits_per_byte is None  # half a token has no bytes of its own
    everything = [(ids, [0.0] + [1.0] * (len(ids) - 1)) for ids, _ in ROWS]
    joint = naive.truth(twin.reference, everything).nll / sum(len(ids) - 1 for ids, _ in ROWS)
    assert summary.joint_nll == pytest.approx(joint, rel=1e-10)
    first_choice = sum(float(e.weights_T[s.rank_T == 1].sum()) for e, s in zip(examples, scores, strict=True))
    assert summary.token_accuracy == pytest.approx(first_choice / weight)
    low, high = summary.ci95 or (0, 0)
    assert low < summary.nll < high


def test_bits_per_byte(make_examples: Any) -> None:
    examples = make_examples([([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1])])
    scores = [ExampleScore(np.array([np.nan, *logp]), *np.ones((4, len(logp) + 1))) for logp in ([-1.0, -3.0], [-2.0])]
    assert evaluate.summarize(examples, scores, Letters()).bits_per_byte == pytest.approx(6 / math.log(2) / 3)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    """200 data sets of 60 examples: a 95% interval misses the truth about 10 times; 3 standard deviations around it."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        weight_N = rng.integers(5, 15, 60).astype(float)
        total_N = weight_N * rng.normal(2.0, 0.5, 60)
        low, high = evaluate.interval_of_ratio(total_N, weight_N) or (0.0, 0.0)
        hits += low <= 2.0 <= high
    assert 178 <= hits <= 199


def test_a_paired_difference_is_sharper_than_two_intervals(make_examples: Any) -> None:
    rng = np.random.default_rng(1)
    examples = make_examples([([1, 2], [0, 1])] * 50)
    base = rng.normal(-3, 1, 50)
    before, after = (
        [ExampleScore(np.array([np.nan, v]), *np.ones((4, 2))) for v in values]
        for values in (base, base + rng.normal(0.2, 0.05, 50))
    )
    delta = evaluate.compare(examples, before, after)
    low, high = delta.ci95 or (0.0, 0.0)
    assert delta.nll == pytest.approx(-0.2, abs=0.03)
    assert low < delta.nll < high < 0
    assert high - low < 0.05
    assert delta.share_better == 1.0
    assert evaluate.compare(examples[:1], before[:1], after[:1]).ci95 is None


def test_entropy_floor(make_examples: Any) -> None:
    """Two answers to one question, three to one: the best model gives 3/4 and 1/4."""
    examples = make_examples([([1, 2, 3], [0, 0, 1])] * 3 + [([1, 2, 4], [0, 0, 1])])
    assert entropy_floor(examples) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert entropy_floor(make_examples([([1, 2, 3, 4], [0, 0, 1, 1])])) == 0.0


def test_lens_of_the_textbook_question() -> None:
    """A {Paris .15, London .10, The .08} and B {Paris .25, London .05, The .04}, gold Paris: B is better, by
    log(.25 / .15) nats, and the gradient on the gold logit is p - 1."""
    vocabulary = 30
    before, after = (np.full(vocabulary, rest) for rest in ((1 - 0.33) / 27, (1 - 0.34) / 27))
    before[[0, 1, 2]], after[[0, 1, 2]] = (0.15, 0.10, 0.08), (0.25, 0.05, 0.04)
    lens = compare_next_token(Letters(), [5, 6], 0, np.log(before), np.log(after), num_rivals=2)
    assert (lens.nll_before, lens.nll_after) == pytest.approx((-math.log(0.15), -math.log(0.25)))
    gold, london, the, rest = lens.rows
    assert gold.gold
    assert (gold.gradient_before, gold.gradient_after) == pytest.approx((-0.85, -0.75))
    assert (london.before, london.after, london.gradient_before) == pytest.approx((0.10, 0.05, 0.10))
    assert (the.before, the.after) == pytest.approx((0.08, 0.04))
    assert rest.before == pytest.approx(0.67)
    assert sum(row.gradient_before for row in lens.rows) == pytest.approx(0)
    assert (lens.rank_before, lens.rank_after) == (1, 1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_next_token_logprobs_are_the_models(twin_of: Any, name: str) -> None:
    twin = twin_of(name, torch.float64)
    context = [3, 1, 4, 1, 5]
    expected = torch.log_softmax(twin.reference(torch.tensor([context])).logits[0, -1].double(), -1)
    found = next_token_logprobs(twin.model, context)
    assert found == pytest.approx(expected.detach().numpy(), abs=1e-6)  # parts of the layers compute in float32
    assert np.exp(found).sum() == pytest.approx(1)


def report(**changes: Any) -> Report:
    steps = [StepMetrics(i, 3.0 - i, 10, 8, 5, 1.0, 1e-3, 0.1) for i in (1, 2)]
    return Report(
        **({"title": "rows <b>on</b> a model", "facts": {"seed": "0"}, "steps": steps, "entropy_floor": 0.0} | changes)
    )


def figures(nll: float) -> evaluate.Evaluation:
    return evaluate.Evaluation(nll, (nll - 0.1, nll + 0.1), math.exp(nll), 1.0, 3, 12.0, 0.5, 2.0)


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((-0.5, -0.1), "Training helped"),
        ((0.1, 0.5), "Training hurt"),
        ((-0.1, 0.2), "No clear change"),
        (None, "too few"),
    ],
)
def test_the_verdict_says_no_more_than_the_interval(interval: Any, words: str) -> None:
    made = report(base=figures(1.5), tuned=figures(1.2), delta=evaluate.Delta(-0.3, interval, 0.5))
    assert words in made.verdict
    assert "nothing can be said" in report().verdict


def test_the_verdict_says_what_was_harmed() -> None:
    retain = {"change": 0.35, "change_ci95": (0.25, 0.5)}
    guard = {"passed": False, "num_rows": 2, "max_gain": 2.0, "rows": [{"broken": True}, {"broken": False}]}
    said = report(retain=retain, guard=guard).verdict
    assert "Retained text became less likely, by 0.3500 nats per token (95% interval [+0.2500, +0.5000])." in said
    assert said.endswith("1 of 2 unwanted responses gained more than the bound of 2 nats.")
    fine = report(retain=retain | {"change_ci95": (-0.1, 0.5)}, guard=guard | {"passed": True}).verdict
    assert fine == report().verdict


def test_the_page_is_self_contained_and_escapes_what_it_shows() -> None:
    hostile = "<script>alert(1)</script> $x$ \\frac & \x00"
    vocabulary = np.log(np.full(30, 1 / 30))
    made = report(
        base=figures(1.5),
        tuned=figures(1.2),
        delta=evaluate.Delta(-0.3, (-0.4, -0.2), 0.5),
        nll_before=[1.0, 2.0],
        nll_after=[0.5, 2.5],
        lens=compare_next_token(Letters(), [1], 2, vocabulary, vocabulary),
        answers=[Answer(hostile, "a", "a", hostile)],
    )
    page = render_html(made, draw_charts(made))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 3
    for attribute in ("src=", "@import", "url(http", 'href="http'):
        assert attribute not in page
    assert "rows &lt;b&gt;on" in page
    assert made.to_dict()["exact_match"] == {"base": 1, "tuned": 0, "of": 1}
    assert asdict(made)["lens"]["rows"]


def test_a_dollar_in_a_token_is_no_formula() -> None:
    class Dollars(Letters):
        def decode(self, ids: list[int], **_: Any) -> str:
            return "$" * len(ids) + "_{"

    vocabulary = np.log(np.full(30, 1 / 30))
    made = report(lens=compare_next_token(Dollars(), [1], 2, vocabulary, vocabulary))
    page = render_html(made, draw_charts(made))
    assert "$_{" in page


@pytest.mark.parametrize(("text", "shown"), [("a b", "a b"), (" a", "' a'"), ("\n", "'\\n'"), ("", "''")])
def test_white_space_is_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def wide_family() -> list[naive.Row]:
    """Rows that leave their neighbours at every depth, over more nodes than one block of attention takes."""
    rng = np.random.default_rng(0)
    stem = rng.integers(0, 60, 24).tolist()
    rows: list[naive.Row] = []
    for depth in [*range(24), *range(24, 0, -1)]:
        tail = rng.integers(0, 60, 4 + depth % 5).tolist()
        rows.append((stem[:depth] + tail, [0.0] * (depth + 1) + [1.0] * (len(tail) - 1)))
    return rows


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "qwen2-window"])
@pytest.mark.parametrize("pack_tokens", [40, 100, 4000])
def test_blocks_that_begin_inside_a_branch(twin_of: Any, make_examples: Any, name: str, pack_tokens: int) -> None:
    twin, rows = twin_of(name, torch.float64), wide_family()
    expected = naive.truth(twin.reference, rows)
    for score, logprob in zip(
        evaluate.score_examples(twin.model, make_examples(rows), pack_tokens), expected.logprob, strict=True
    ):
        assert score.logprob_T[1:] == pytest.approx(np.array(logprob[1:]), abs=1e-6)  # rotary angles are float32
    for parameter in twin.model.network.parameters():
        parameter.grad = None
    for pack in build_packs(make_examples(rows), pack_tokens):
        nll_sum(twin.model, pack).backward()
    for key, parameter in twin.model.network.named_parameters():
        wanted = expected.gradient[key]
        if wanted is not None:
            assert torch.allclose(
                parameter.grad, wanted.to(parameter.grad), atol=1e-5 * float(wanted.abs().max()) + 1e-7
            )
