"""The fit of a learning curve against closed forms and another optimizer, and its answers against simulated curves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import least_squares

from likely.insight.curve_answer import judge
from likely.insight.power_law import (
    EXPONENTS,
    Scores,
    fit_power_law,
    interval,
    replicate,
    slope_per_doubling,
)
from likely.insight.room import Seen, room_for_more

SIZES = np.array([100.0, 200.0, 400.0, 800.0])


def law(a: float, b: float, c: float) -> Any:
    return lambda relative: a + b * np.asarray(relative) ** -c


def simulate(truth: Any, seed: int, *, seeds: int = 3, examples: int = 200, **noise: float) -> Scores:
    """Curves as trainings give them: examples differ in difficulty, alike at all sizes and a little by size; trainings
    differ by chance, the small ones more; and answers differ in length."""
    sd = {"difficulty": 0.4, "by_size": 0.05, "training": 0.003, **noise}
    rng = np.random.default_rng(seed)
    weight_N = rng.integers(3, 12, examples).astype(np.float64)
    relative_K = SIZES / SIZES[-1]
    # Centred, so that the truth is that of these examples' population and of no other.
    own_N = rng.normal(0, sd["difficulty"], examples)
    by_size_KN = rng.normal(0, sd["by_size"], (4, examples))
    training_KS = rng.normal(0, sd["training"], (4, seeds)) * relative_K[:, None] ** -0.25
    per_token_KSN = truth(relative_K)[:, None, None] + own_N + by_size_KN[:, None] + training_KS[:, :, None]
    return Scores(SIZES, per_token_KSN * weight_N, weight_N)


@pytest.mark.parametrize(("a", "b", "c"), [(0.3, 0.5, 0.6), (1.0, 0.02, 1.7), (0.0, 2.0, 0.1), (0.5, -0.2, 0.8)])
def test_a_law_without_noise_is_found(a: float, b: float, c: float) -> None:
    found = fit_power_law(SIZES, law(a, b, c)(SIZES / 800)[None], refine=True)
    assert (found.a[0], found.b[0], found.c[0]) == pytest.approx((a, b, c), abs=1e-5)
    assert found.doubling[0] == pytest.approx(law(a, b, c)(1.0) - law(a, b, c)(2.0), abs=1e-7)
    assert found.at(np.array([0.5]))[0] == pytest.approx(law(a, b, c)(0.5), abs=1e-7)


def test_where_the_law_is_no_power_of_n() -> None:
    """A line in log n is a power near 0, whose limit is far below; a level curve has no power, and nothing to gain."""
    line = (2 - 0.1 * np.log2(SIZES / 800))[None]
    found = fit_power_law(SIZES, line, refine=True)
    assert found.c[0] == pytest.approx(EXPONENTS[0], rel=1e-3)
    assert found.a[0] < -4
    assert found.doubling[0] == pytest.approx(0.1, rel=0.05)
    assert slope_per_doubling(SIZES, line)[0] == pytest.approx(0.1)
    level = fit_power_law(SIZES, np.full((1, 4), 0.7), refine=True)
    assert level.doubling[0] == pytest.approx(0, abs=1e-12)
    assert level.a[0] + level.b[0] == pytest.approx(0.7)


def test_the_straight_line_sees_the_last_sizes_only() -> None:
    assert slope_per_doubling(SIZES, np.array([[9.0, 1.0, 0.9, 0.8]]))[0] == pytest.approx(0.1)


def test_the_fit_is_that_of_a_general_optimizer() -> None:
    rng = np.random.default_rng(4)
    for _ in range(10):
        nll_K = law(0.4, 0.3, 0.7)(SIZES / 800) + rng.normal(0, 0.01, 4)
        found = fit_power_law(SIZES, nll_K[None], refine=True)
        other = least_squares(
            lambda x, nll_K=nll_K: law(*x)(SIZES / 800) - nll_K, (0.3, 0.4, 0.5), xtol=1e-14, ftol=1e-14, gtol=1e-14
        )
        ours = ((found.at(SIZES / 800) - nll_K) ** 2).sum()
        assert ours == pytest.approx(2 * other.cost, rel=1e-6)
        coarse = fit_power_law(SIZES, nll_K[None])  # the grid's, as in replicates
        assert coarse.doubling[0] == pytest.approx(found.doubling[0], abs=5e-4)


@pytest.mark.parametrize(
    ("truth", "noise"),
    [
        (law(0.3, 0.10, 0.5), {}),
        (law(0.3, 0.10, 0.5), {"training": 0.0001}),  # all chance is of the examples
        (law(0.3, 0.10, 0.5), {"by_size": 0.0, "training": 0.02}),  # all of the seeds
        (law(0.3, 0.0, 0.5), {}),  # saturated
    ],
)
def test_intervals_cover_as_often_as_they_say(truth: Any, noise: dict[str, float]) -> None:
    """200 curves: a 95% interval misses ten times; three standard deviations more are 19. (A bootstrap of 100 examples
    is a little too narrow, Student's part for the seeds a little too wide.)"""
    gain = float(truth(1.0) - truth(2.0))
    hits = 0
    for seed in range(200):
        scores = simulate(truth, seed, examples=100, **noise)
        low, high = interval(fit_power_law(scores.size_K, replicate(scores, num=400)).doubling)
        hits += low <= gain <= high
    assert hits >= 181


def test_each_source_of_chance_has_its_share() -> None:
    """With chance of one kind alone the replicates of the other hardly move, and Student's factor is there."""
    few = simulate(law(0.3, 0.1, 0.5), 1, by_size=0.0, difficulty=0.0, training=0.01, examples=50)
    assert replicate(few, seeds=False).std(0).max() < 1e-9
    moved = replicate(few, examples=False, num=20_000) - few.mean_K
    error_K = few.mean_KS.std(-1, ddof=1) / np.sqrt(3)
    low, high = np.quantile(moved[:, 0], [0.025, 0.975])
    assert (high - low) / 2 == pytest.approx(4.303 * error_K[0], rel=0.1)  # t with 2 degrees of freedom
    alone = simulate(law(0.3, 0.1, 0.5), 1, seeds=1)
    with pytest.raises(ValueError, match="one seed"):
        replicate(alone)


def test_a_falling_curve_and_a_saturated_one() -> None:
    truth = law(0.3, 0.1, 0.5)
    for seed in range(5):
        found = judge(simulate(truth, seed), base=1.0)
        assert found["kind"] == "falls", found
        low, high = found["doubling"]["ci95"]
        assert low <= found["doubling"]["nats"] <= high
        words = f"by {found['doubling']['nats']:.4f} ± {found['doubling']['half_width']:.4f} nats per token"
        assert words in found["verdict"]
        assert found["reasons"] == []
    kinds = [judge(simulate(law(0.3, 0.0, 0.5), s, examples=100), base=1.0)["kind"] for s in range(20)]
    assert kinds.count("saturated") >= 18  # 95% intervals may be wrong once in twenty
    saturated = judge(simulate(law(0.3, 0.0, 0.5), 0), base=1.0)
    assert "More data of this kind is not expected to help" in saturated["verdict"]
    assert saturated["doubling"]["ci95"][1] < 0.07


def undertrained() -> Scores:
    """What the demo's capitals gave in one pass (docs/log.md): the smallest size had two steps."""
    mean_KS = [[0.4385, 0.4792, 0.4163], [0.2905, 0.2874, 0.3154], [0.2745, 0.2625, 0.2682], [0.2206, 0.2333, 0.2485]]
    apart_KN = np.random.default_rng(0).normal(0, 0.03, (4, 40))
    apart_KN -= apart_KN.mean(-1, keepdims=True)
    return Scores(SIZES, np.array(mean_KS)[:, :, None] + apart_KN[:, None], np.ones(40))


def test_points_that_cannot_answer() -> None:
    truth = law(0.3, 0.1, 0.5)
    cases = [
        (simulate(truth, 0, training=0.2), "most of that is the chance of the seeds, so raise --seeds"),
        (simulate(truth, 0, by_size=2.0, examples=30), "of the held-out examples, so give more held-out rows"),
        (simulate(truth, 0, seeds=1), "one seed tells nothing of chance"),
        (simulate(truth, 0, examples=12), "12 held-out examples are too few"),
        (simulate(lambda n: 0.3 + 0.05 * np.asarray(n), 0, training=0.001), "NLL rises by"),
        (undertrained(), "the last doublings lowered"),
        (simulate(lambda n: 0.5 - 0.2 * np.asarray(n) ** 3, 0, training=0.001), "no power law goes through them"),
    ]
    for scores, words in cases:
        found = judge(scores, base=1.0)
        assert found["kind"] == "none", (words, found)
        assert words in found["verdict"]
        assert found["verdict"].startswith("These points can't support an answer: ")
    seen = judge(simulate(truth, 0), 1.0, ["the held-out data is the training data"])
    assert "the held-out data is the training data" in seen["verdict"]
    # What little a doubling brings is much where training gained little.
    assert judge(simulate(law(0.3, 0.0, 0.5), 0), base=0.31)["kind"] == "none"


def test_a_lopsided_interval_without_0_is_an_answer_without_a_plus_or_minus() -> None:
    """A fall that ends soon has a short side towards 0 and a long one away from it."""
    for seed in range(20):
        found = judge(simulate(lambda n: 0.5 - 0.01 * np.log2(n), seed, training=3e-3), base=1.0)
        doubling = found["doubling"]
        if doubling["ci95"][0] > 0 and doubling["nats"] <= doubling["half_width"] and found["kind"] == "falls":
            break
    else:
        raise AssertionError("no seed has a lopsided interval")
    low, high = doubling["ci95"]
    assert "±" not in found["verdict"]
    assert f"by {doubling['nats']:.4f} nats per token" in found["verdict"]
    assert f"[{low:.4f}, {high:.4f}]" in found["verdict"]
    assert found["log_linear"]["per_doubling"] <= high


def test_an_exponent_that_is_open_is_said_to_be() -> None:
    assert judge(simulate(law(0.3, 0.0, 0.5), 0), base=1.0)["power_law"]["determined"] is False
    sharp = simulate(law(0.3, 0.1, 0.5), 0, training=3e-4, by_size=3e-3)
    found = judge(sharp, base=1.0)["power_law"]
    assert found["determined"] is True
    assert found["c_ci95"][0] <= 0.5 <= found["c_ci95"][1]


def test_an_answer_is_a_function_of_the_points() -> None:
    first, second = (judge(simulate(law(0.3, 0.1, 0.5), 3), base=1.0) for _ in range(2))
    assert first == second


def seen_of(nll_K: Any, seed: int, *, seeds: int = 3, examples: int = 200, spread: float = 0.4) -> Seen:
    """Rows that were trained on: ``nll_K`` nats per token on average, each row and each training a little apart."""
    rng = np.random.default_rng([seed, 9])
    rows_KS = []
    for nll in np.asarray(nll_K, float):
        weights_SN = rng.integers(3, 12, (seeds, examples)).astype(float)
        per_token_SN = nll + rng.normal(0, spread, (seeds, examples)) + rng.normal(0, 0.003, (seeds, 1))
        rows_KS.append(list(zip(per_token_SN * weights_SN, weights_SN, strict=True)))
    return Seen.of(rows_KS)


def coin(seed: int, *, noise: float = 0.02) -> Scores:
    """What 80 to 640 tosses of a coin gave in 300 steps each (docs/log.md): small shares are learnt by heart, and the
    last one is at the entropy."""
    rng = np.random.default_rng(seed)
    nll_KSN = (
        np.array([0.80, 0.58, 0.29, 0.1985])[:, None, None]
        + rng.normal(0, noise, (4, 3, 1)) * np.array([1, 1, 0.3, 0.05])[:, None, None]
    )
    return Scores(SIZES, nll_KSN + rng.normal(0, 0.01, (4, 1, 200)), np.ones(200))


def test_rows_that_were_trained_on_have_a_mean_and_its_error() -> None:
    nll_N, weight_N = np.array([2.0, 3.0, 7.0]), np.array([1.0, 2.0, 3.0])
    seen = Seen.of([[(nll_N, weight_N)]])
    assert seen.nll_KS.tolist() == [[2.0]]
    assert seen.error_KS[0, 0] == pytest.approx(np.sqrt((0 + 1 + 1) * 3 / 2) / 6)
    rng = np.random.default_rng(0)
    draws = [(rng.exponential(1, 50) * (w := rng.integers(1, 9, 50)), w.astype(float)) for _ in range(2000)]
    many = Seen.of([draws])
    assert many.error_KS.mean() == pytest.approx(many.nll_KS.std(), rel=0.1)


def test_what_more_data_can_bring_at_most() -> None:
    """The gap to the rows that were trained on; more where their NLL still falls; less where held-out answers differ at
    one context."""
    quiet = {"difficulty": 0.0, "by_size": 0.0, "training": 0.0}
    scores = simulate(law(0.3, 0.1, 0.5), 0, **quiet)
    assert scores.mean_K[-1] == pytest.approx(0.4)
    rises, falls = (
        Seen(np.tile(nll, (3, 1)).T, np.zeros((4, 3))) for nll in ([0, 0.1, 0.2, 0.25], [0.9, 0.6, 0.45, 0.3])
    )
    assert room_for_more(scores, rises) == pytest.approx(0.15)
    assert room_for_more(scores, falls) == pytest.approx(0.1 + 0.15)
    assert room_for_more(scores, falls, floor=0.38) == pytest.approx(0.02)
    # A seed that makes both alike leaves no chance in what lies between them.
    moved = Scores(SIZES, scores.nll_KSN + np.array([-0.001, 0.0, 0.001])[:, None] * scores.weight_N, scores.weight_N)
    alike = Seen(rises.nll_KS + np.array([-0.001, 0.0, 0.001]), rises.error_KS)
    # (A drawn seed is now and then so far off that no NLL would be left.)
    assert np.quantile(room_for_more(moved, alike), [0.01, 1.0]) == pytest.approx(0.15)
    assert room_for_more(moved, rises).std() > 0.0005
    assert room_for_more(scores, Seen(rises.nll_KS, rises.error_KS + 0.03)).std() == pytest.approx(
        0.03 / 3**0.5, rel=0.1
    )


def test_a_floor_that_the_last_point_has_just_reached() -> None:
    """Without the rows that were trained on a law goes on falling; with them there is nothing to fall to."""
    without = []
    for seed in range(4):
        scores = coin(seed)
        seen = seen_of([0.0, 0.03, 0.12, 0.195], seed, spread=0.01)
        without.append(judge(scores, base=6.8)["kind"])
        found = judge(scores, 6.8, room_B=room_for_more(scores, seen))
        assert found["kind"] == "saturated", found["verdict"]
        assert found["room"]["refutes"]
        assert found["doubling"]["ci95"][1] <= found["room"]["most"] < 0.03
        assert "rows that were not trained on are hardly less likely than rows that were" in found["verdict"]
    assert "falls" in without  # the very fault
    assert "saturated" not in without
    # What is left is much where training gained little: then the law is wrong, and nothing takes its place.
    little = judge(scores, 0.25, room_B=room_for_more(scores, seen))
    assert little["kind"] == "none"
    assert "a law through them expects" in little["verdict"]


@pytest.mark.parametrize(
    ("truth", "seen_K"),
    [
        (law(0.3, 0.10, 0.5), 0.3 - 0.10 * (SIZES / 800) ** -0.5),  # many passes: both go to one limit
        (law(0.3, 0.10, 0.5), 0.3 + 0.10 * (SIZES / 800) ** -0.5),  # one pass: no row is known better than another
        (law(0.3, 0.05, 1.0), 0.3 - 0.01 * (SIZES / 800) ** -1.0),
    ],
)
def test_a_curve_that_falls_is_believed(truth: Any, seen_K: Any) -> None:
    """Seen rows take away no answer, and no more of an interval than is sure not to be there."""
    gain, hits = float(truth(1.0) - truth(2.0)), 0
    for seed in range(8):  # docs/log.md has more
        scores = simulate(truth, seed)
        found = judge(scores, 1.0, room_B=room_for_more(scores, seen_of(seen_K, seed)))
        assert found["kind"] == "falls", found["verdict"]
        low, high = found["doubling"]["ci95"]
        hits += low <= gain <= high
    assert hits >= 6
