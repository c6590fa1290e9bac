"""Learned weights of reward terms: hand arithmetic, grids, first-order conditions, signs, and honest intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmft.rewards.weights import RIDGE, LearnedWeight, learn_weights


def learn(features, target, objective="logistic", clusters=None, **options) -> list[LearnedWeight]:
    features, target = np.asarray(features, dtype=float), np.asarray(target, dtype=float)
    names = [f"t{k}" for k in range(features.shape[1])]
    clusters = [str(i) for i in range(len(target))] if clusters is None else clusters
    return learn_weights(names, features, target, clusters, objective, **{"resamples": 40, **options})


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class TestByHand:
    def test_one_feature_of_pairs(self) -> None:
        """8 of 10 pairs are won by the higher one: sigmoid(w) = 0.8, w = log 4, were it not for the ridge.

        The differences are +-1, standard deviation 0.8: gradient sigmoid(w) - 0.8 + 0.001 x 0.8^2 w = 0.
        """
        (learned,) = learn([[1.0]] * 8 + [[-1.0]] * 2, np.ones(10))
        assert learned.weight == pytest.approx(math.log(4), abs=0.01)
        assert sigmoid(learned.weight) - 0.8 + RIDGE * 0.64 * learned.weight == pytest.approx(0, abs=1e-9)
        assert learned.weight == learned.unconstrained

    def test_a_tie_is_half_a_win_each(self) -> None:
        """6 won and 4 ties, all with difference 1: (6 + 4/2) / 10 = 0.8."""
        (learned,) = learn([[1.0]] * 10, [1.0] * 6 + [0.5] * 4)
        assert sigmoid(learned.weight) + RIDGE * learned.weight == pytest.approx(0.8, abs=1e-9)
        (nothing,) = learn([[1.0]] * 10, [0.5] * 10)
        assert nothing.weight == pytest.approx(0, abs=1e-9)

    def test_the_scale_of_a_feature_is_undone(self) -> None:
        (plain,), (large,) = (learn(np.array([[1.0]] * 8 + [[-1.0]] * 2) * c, np.ones(10)) for c in (1, 1000))
        assert large.weight == pytest.approx(plain.weight / 1000, rel=1e-9)
        assert large.high == pytest.approx(plain.high / 1000, rel=1e-6)

    def test_two_features_of_ratings(self) -> None:
        """y = 3 + 2 a + 0.5 b on a and b in +-1: their products average 0, so each weight is its own / 1.001."""
        x = np.array([[a, b] for a in (1, -1) for b in (1, -1)] * 10)
        first, second = learn(x, 3 + x @ [2.0, 0.5], "squared")
        assert (first.weight, second.weight) == pytest.approx((2 / 1.001, 0.5 / 1.001), abs=1e-9)
        assert (first.sign, second.sign) == ("as expected", "as expected")

    def test_the_intercept_is_free(self) -> None:
        """Ratings around 50 and a feature around 10: a held intercept would make the feature explain the level."""
        x = 10 + np.array([[-1.0], [1.0]] * 10)
        assert learn(x, 50 + 0.0 * x[:, 0], "squared")[0].unconstrained == pytest.approx(0, abs=1e-9)
        assert learn(x, 50 + 2.0 * x[:, 0], "squared")[0].weight == pytest.approx(2 / 1.001, abs=1e-9)

    def test_pairs_have_no_intercept(self) -> None:
        """Turned round, a pair says the same."""
        rng = np.random.default_rng(0)
        x = rng.normal([0.5, 1.0], size=(60, 2))
        y = (rng.random(60) < sigmoid(x @ [1.0, 0.5])).astype(float)
        turned = np.where(np.arange(60) % 2, 1.0, -1.0)
        one, other = learn(x, y), learn(x * turned[:, None], np.where(turned > 0, y, 1 - y))
        # Not the same to the last digit: the ridge is on features standardised as they stand.
        assert [w.weight for w in one] == pytest.approx([w.weight for w in other], rel=0.01)

    def test_a_term_that_never_differs_has_no_weight(self) -> None:
        constant, useful = learn([[0.0, 1.0]] * 8 + [[0.0, -1.0]] * 2, np.ones(10))
        assert (constant.weight, constant.low, constant.high, constant.sign) == (0, 0, 0, "not told from 0")
        assert useful.weight > 1

    def test_perfect_separation_stays_finite(self) -> None:
        (learned,) = learn(np.abs(np.random.default_rng(0).normal(size=(50, 1))) + 0.1, np.ones(50))
        assert 1 < learned.weight < 100 and learned.sign == "as expected"


class TestNotNegative:
    def test_what_the_data_hold_against_a_term(self) -> None:
        """As above, with b at -1 a unit: its weight is 0, and a's stays, since the two are orthogonal."""
        x = np.array([[a, b] for a in (1, -1) for b in (1, -1)] * 10)
        first, against = learn(x, 3 + x @ [2.0, -1.0], "squared")
        assert first.weight == pytest.approx(2 / 1.001, abs=1e-9)
        assert (against.weight, against.low, against.high, against.sign) == (0, 0, 0, "against")
        assert against.unconstrained == pytest.approx(-1 / 1.001, abs=1e-9)
        assert against.unconstrained_high < 0

    def test_the_others_are_refitted_on_a_grid(self) -> None:
        """Two correlated terms, one of them a cost to the data: without it the other has another weight."""
        rng = np.random.default_rng(1)
        x = rng.normal(size=(400, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
        y = (rng.random(400) < sigmoid(x @ [1.5, -1.0])).astype(float)
        first, second = learn(x, y)
        scale = x.std(0)

        def loss(w: np.ndarray) -> float:
            score = x @ w
            return (np.logaddexp(0, score) - y * score).mean() + 0.5 * RIDGE * ((w * scale) ** 2).sum()

        ticks = np.arange(0, 3, 0.01)
        grid = min((loss(np.array([a, b])), a, b) for a in ticks for b in (0.0, 0.05, 0.5, 1.0))
        assert (first.weight, second.weight) == (pytest.approx(grid[1], abs=0.01), 0.0) and grid[2] == 0
        assert first.weight < first.unconstrained - 0.3
        assert second.sign == "against"

    @pytest.mark.parametrize("objective", ["logistic", "squared"])
    @pytest.mark.parametrize("seed", range(6))
    def test_first_order_conditions(self, objective: str, seed: int) -> None:
        """Gradient 0 where a weight is positive, and not below 0 where it is 0."""
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5)
        score = x @ rng.normal(size=5)
        noisy = score + rng.normal(size=200)
        y = (noisy > 0).astype(float) if objective == "logistic" else noisy + 7
        learned = np.array([w.weight for w in learn(x, y, objective, resamples=2)])
        scale = x.std(0)
        residual = (sigmoid(x @ learned) if objective == "logistic" else x @ learned) - y
        residual = residual - residual.mean() * (objective == "squared")  # the best intercept
        gradient = (x / scale).T @ residual / 200 + RIDGE * learned * scale
        assert (learned >= 0).all() and (learned == 0).any() and (learned > 0).any()
        assert gradient[learned > 0] == pytest.approx(0, abs=1e-6)
        assert (gradient[learned == 0] > -1e-6).all()


class TestIntervals:
    def test_they_hold_the_truth(self) -> None:
        """40 intervals of 95%: 38 are expected to; fewer than 34 have a chance below one in a hundred."""
        truth, held = np.array([1.0, 0.4]), 0
        for seed in range(20):
            rng = np.random.default_rng(seed)
            x = rng.normal(size=(300, 2))
            y = (rng.random(300) < sigmoid(x @ truth)).astype(float)
            learned = learn(x, y, resamples=80, seed=seed)
            held += sum(w.low <= t <= w.high for w, t in zip(learned, truth, strict=True))
        assert held >= 34

    def test_their_width_is_the_textbooks(self) -> None:
        """y = x + noise of sd 1, x of sd 1, N = 400: standard error 1/20, so the interval is 4 x 0.05 = 0.2 wide."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(400, 1))
        (learned,) = learn(x, x[:, 0] + rng.normal(size=400), "squared", resamples=400)
        assert learned.high - learned.low == pytest.approx(2 * 1.96 / 20, rel=0.15)

    def test_judgements_of_one_picture_are_one(self) -> None:
        """Every judgement written 9 times says nothing more: as its own picture each would, 3 times too sure."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(60, 1))
        y = x[:, 0] + rng.normal(size=60)
        pictures = [str(i) for i in range(60)]
        once, same, apart = (
            learn(x, y, "squared", pictures, resamples=300),
            learn(np.repeat(x, 9, 0), np.repeat(y, 9), "squared", list(np.repeat(pictures, 9)), resamples=300),
            learn(np.repeat(x, 9, 0), np.repeat(y, 9), "squared", resamples=300),
        )
        width = [w[0].high - w[0].low for w in (once, same, apart)]
        assert width[1] == pytest.approx(width[0], rel=1e-6)
        assert width[0] / width[2] == pytest.approx(3, rel=0.2)

    def test_what_is_not_there_is_not_told_from_zero(self) -> None:
        rng = np.random.default_rng(3)
        x = rng.normal(size=(200, 2))
        y = (rng.random(200) < sigmoid(2 * x[:, 0])).astype(float)
        real, nothing = learn(x, y)
        assert (real.sign, nothing.sign) == ("as expected", "not told from 0")
        assert nothing.low == 0 <= nothing.weight <= nothing.high
        assert nothing.unconstrained_low < 0 < nothing.unconstrained_high

    def test_the_same_seed_gives_the_same(self) -> None:
        x = np.random.default_rng(0).normal(size=(50, 1))
        y = (x[:, 0] > 0.3).astype(float)
        assert learn(x, y, seed=1) == learn(x, y, seed=1)
        one, other = (learn(x, y, seed=seed)[0] for seed in (1, 2))
        assert one.weight == other.weight and one.low != other.low


def test_the_default_is_bradley_terrys_log_odds() -> None:
    assert learn([[1.0]] * 3 + [[-1.0]], np.ones(4))[0].weight == pytest.approx(logit(0.75), abs=0.01)


def test_as_dict_has_every_number() -> None:
    (learned,) = learn([[1.0]] * 3 + [[-1.0]], np.ones(4))
    assert set(learned.as_dict()) == {
        "name", "weight", "low", "high", "unconstrained", "unconstrained_low", "unconstrained_high", "sign",
    }  # fmt: skip


@pytest.mark.parametrize(("features", "target"), [(np.ones((3, 1)), [1.0, 1.0]), (np.ones((0, 1)), []), ([1.0], [1.0])])
def test_what_does_not_fit_together(features, target) -> None:
    with pytest.raises(ValueError, match="features must be N > 0 x 1"):
        learn_weights(["t"], np.asarray(features), np.asarray(target), ["a"] * len(target), "squared")
