"""Judgement of reward models as numbers, against values worked by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mmft.eval import reward_metrics
from mmft.eval.intervals import clustered, summarise
from mmft.eval.reward_metrics import (
    auroc,
    coverage,
    expected_calibration_error,
    gaussian_nll,
    kendall_tau,
    length_bias,
    log_loss,
    midranks,
    pair_correct,
    reliability,
    within_picture_tau,
)


class TestPairs:
    def test_right_wrong_equal(self):
        assert pair_correct([2.0, 1.0, 3.0], [1.0, 2.0, 3.0]).tolist() == [1.0, 0.0, 0.5]

    def test_ties_of_annotators_and_undefined_scores_are_left_out(self):
        correct = pair_correct([2.0, 1.0, math.nan], [1.0, 2.0, 0.0], tie_N=[False, True, False])
        assert np.isnan(correct).tolist() == [False, True, True]
        # Only the first pair counts: 1 / 1.
        assert summarise({"x": correct})["x"]["mean"] == 1.0

    def test_tolerance(self):
        assert pair_correct([1.25, 1.5, 1.0], [1.0, 1.0, 1.25], tolerance=0.25).tolist() == [0.5, 1.0, 0.5]


class TestClustered:
    def test_mean_is_over_samples_and_draws_are_of_clusters(self):
        # Picture a: 1, 1, 1; picture b: 0. Mean 3/4. A draw of two pictures is aa: 1, ab: 3/4, bb: 0, with
        # probability 1/4, 1/2, 1/4; so the 2.5% and 97.5% quantiles are 0 and 1.
        summary = clustered({"x": [1, 1, 0, 1]}, ["a", "a", "b", "a"])["x"]
        assert summary == {"mean": 0.75, "low": 0.0, "high": 1.0}

    def test_one_sample_a_cluster_is_the_plain_bootstrap(self):
        values = np.random.default_rng(3).normal(size=30)
        names = [f"{i:02d}" for i in range(30)]
        assert clustered({"x": values}, names)["x"] == pytest.approx(summarise({"x": values})["x"])

    def test_copies_within_a_picture_tell_nothing_new(self):
        # Each value 25 times: the interval is that of the 40 pictures, sqrt(25) = 5 times wider than that of
        # 1000 samples taken as independent.
        values = np.random.default_rng(1).normal(size=40)
        once = summarise({"x": values})["x"]
        copied = clustered({"x": np.repeat(values, 25)}, [f"{i:02d}" for i in np.repeat(np.arange(40), 25)])["x"]
        naive = summarise({"x": np.repeat(values, 25)})["x"]
        assert copied == pytest.approx(once)
        assert (copied["high"] - copied["low"]) / (naive["high"] - naive["low"]) == pytest.approx(5, rel=0.1)

    def test_undefined_is_left_out(self):
        summary = clustered({"x": [1, math.nan, 4], "y": [math.nan] * 3}, ["a", "a", "b"])
        assert summary["x"]["mean"] == 2.5  # (1 + 4) / 2
        assert summary["y"] == {"mean": None, "low": None, "high": None}

    def test_no_metrics_and_wrong_lengths(self):
        assert clustered({}, []) == {}
        with pytest.raises(ValueError, match="3 samples, but clusters of 2"):
            clustered({"x": [1, 2, 3]}, ["a", "b"])


class TestKendall:
    def test_by_hand_without_ties(self):
        # x 1 2 3 4, y 1 3 2 4: of 6 pairs one, (2, 3), is discordant: (5 - 1) / 6 = 2/3.
        assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(2 / 3)
        assert kendall_tau([1, 2, 3, 4], [-1, -3, -2, -4]) == pytest.approx(-2 / 3)

    def test_by_hand_with_ties(self):
        # x 1 1 2 3, y 1 2 2 3. Pairs: (1,2) tied in x; (2,3) tied in y; the other four concordant.
        # tau_b = 4 / sqrt(5 * 5) = 0.8.
        assert kendall_tau([1, 1, 2, 3], [1, 2, 2, 3]) == pytest.approx(0.8)

    def test_undefined(self):
        assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))
        assert math.isnan(kendall_tau([1], [1]))
        assert kendall_tau([1, 2, math.nan], [1, 2, 0]) == 1.0
        with pytest.raises(ValueError, match="cannot pair 2 values with 3"):
            kendall_tau([1, 2], [1, 2, 3])

    def test_chunks_change_nothing(self, monkeypatch):
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 9, 97), rng.integers(0, 9, 97)
        concordance = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in itertools.combinations(range(97), 2)]
        untied = [sum(v[i] != v[j] for i, j in itertools.combinations(range(97), 2)) for v in (x, y)]
        monkeypatch.setattr(reward_metrics, "_CHUNK", 97 * 10)
        assert kendall_tau(x, y) == pytest.approx(sum(concordance) / math.sqrt(untied[0] * untied[1]))

    def test_within_pictures(self):
        # b: 2 captions in the right order; a: 3 captions, one of 3 pairs discordant: 1/3; c: one caption.
        tau = within_picture_tau([5, 1, 9, 2, 3, 7], [50, 1, 90, 3, 2, 7], ["b", "a", "b", "a", "a", "c"])
        np.testing.assert_allclose(tau, [1.0, 1 / 3, math.nan])

    def test_within_pictures_ignores_what_differs_between_them(self):
        # Reversed within both pictures, though the picture with higher ratings has the higher scores.
        tau = within_picture_tau([2, 1, 12, 11], [1, 2, 11, 12], ["a", "a", "b", "b"])
        assert tau.tolist() == [-1.0, -1.0]
        assert kendall_tau([2, 1, 12, 11], [1, 2, 11, 12]) == pytest.approx(1 / 3)  # (4 - 2) / 6


class TestPreferenceCalibration:
    def test_bins_by_hand(self):
        # Confidences .6 .6 .9 .9 (the third is said from the other side: p = .1, outcome 0: the likelier was chosen).
        # Bins of width .1: [.6, .7) right 1 of 2; [.9, 1] right 1.5 of 2.
        bins = reliability([0.6, 0.6, 0.1, 0.9], [1, 0, 0, 0.5], bins=5)
        assert [entry["count"] for entry in bins] == [2, 2]
        assert [entry["confidence"] for entry in bins] == pytest.approx([0.6, 0.9])
        assert [entry["accuracy"] for entry in bins] == pytest.approx([0.5, 0.75])
        # ECE = 2/4 |.5 - .6| + 2/4 |.75 - .9| = .05 + .075 = .125.
        assert expected_calibration_error([0.6, 0.6, 0.1, 0.9], [1, 0, 0, 0.5], bins=5) == pytest.approx(0.125)

    def test_which_caption_is_first_changes_nothing(self):
        p, y = np.array([0.2, 0.5, 0.7, 1.0]), np.array([1.0, 1.0, 0.5, 1.0])
        there, back = reliability(p, y, bins=3), reliability(1 - p, 1 - y, bins=3)
        assert [list(entry.values()) for entry in there] == [pytest.approx(list(entry.values())) for entry in back]
        assert log_loss(p, y) == pytest.approx(log_loss(1 - p, 1 - y))

    def test_certainty_and_indifference_have_bins(self):
        assert reliability([1.0, 0.0, 0.5], [1, 0, 1], bins=10) == [
            {"confidence": 0.5, "accuracy": 0.5, "count": 1},
            {"confidence": 1.0, "accuracy": 1.0, "count": 2},
        ]

    def test_calibrated_preferences_have_no_error(self):
        rng = np.random.default_rng(0)
        p = rng.random(200_000)
        y = rng.random(200_000) < p
        assert expected_calibration_error(p, y) < 0.006
        assert expected_calibration_error(np.where(p > 0.5, 0.99, 0.01), y) == pytest.approx(0.99 - 0.75, abs=0.01)

    def test_log_loss_by_hand(self):
        # -[ln .8 + ln(1 - .4)] / 2 = (.223144 + .510826) / 2 = .366985
        assert log_loss([0.8, 0.4], [1, 0]) == pytest.approx(0.366985, abs=1e-6)
        assert log_loss([0.5], [1]) == pytest.approx(math.log(2))
        assert log_loss([0.0], [1], clip=1e-3) == pytest.approx(-math.log(1e-3))
        # A tie at p = .8: -(ln .8 + ln .2) / 2 = .916291
        assert log_loss([0.8], [0.5]) == pytest.approx(0.916291, abs=1e-6)

    def test_nothing_and_nonsense(self):
        assert reliability([], []) == []
        assert math.isnan(expected_calibration_error([], [])) and math.isnan(log_loss([], []))
        with pytest.raises(ValueError, match="probability outside"):
            log_loss([1.5], [1])
        with pytest.raises(ValueError, match="outcome outside"):
            reliability([0.5], [-1])


class TestRatingCalibration:
    def test_coverage_by_hand(self):
        # |z| = 0.5, 1.0, 1.7, 3.0; quantiles: 50%: 0.674, 80%: 1.282, 90%: 1.645, 95%: 1.960.
        share = coverage([0.5, -2.0, 3.7, 4.0], [0.0, 0.0, 2.0, 1.0], [1.0, 2.0, 1.0, 1.0])
        assert share == {0.5: 0.25, 0.8: 0.5, 0.9: 0.5, 0.95: 0.75}

    def test_coverage_of_calibrated_and_of_overconfident(self):
        rng = np.random.default_rng(0)
        mean, sigma = rng.normal(size=100_000), rng.uniform(0.5, 2, 100_000)
        target = mean + sigma * rng.normal(size=100_000)
        for level, share in coverage(target, mean, sigma).items():
            assert share == pytest.approx(level, abs=0.006)
        assert coverage(target, mean, sigma / 2)[0.9] == pytest.approx(0.5892, abs=0.006)  # P(|z| < 1.645 / 2)

    def test_nll_by_hand(self):
        # y - mu = 2, sigma = 2: 1/2 + ln 2 + .918939 = 2.112086; y = mu, sigma = 1: .918939. Mean 1.515512.
        assert gaussian_nll([3.0, 0.0], [1.0, 0.0], [2.0, 1.0]) == pytest.approx(1.515512, abs=1e-6)
        assert gaussian_nll([1.0], [0.0], [1.0]) < gaussian_nll([1.0], [0.0], [0.5])

    def test_sigma_must_be_positive(self):
        with pytest.raises(ValueError, match="sigma must be positive"):
            coverage([1.0], [1.0], [0.0])
        assert math.isnan(gaussian_nll([], [], []))


class TestAuroc:
    def test_by_hand(self):
        # Positives 3, 2, 1 against negatives 0, 2: 3 beats both; 2 beats 0, ties 2; 1 beats 0: (2 + 1.5 + 1) / 6.
        assert auroc([3, 2, 1], [0, 2]) == pytest.approx(0.75)
        assert auroc([0, 2], [3, 2, 1]) == pytest.approx(0.25)

    def test_extremes(self):
        assert auroc([2, 3], [0, 1]) == 1.0
        assert auroc([0, 1], [2, 3]) == 0.0
        assert auroc([1, 1], [1]) == 0.5
        assert math.isnan(auroc([], [1])) and math.isnan(auroc([1], [math.nan]))

    def test_midranks(self):
        assert midranks([10, 30, 10, 20]).tolist() == [1.5, 4.0, 1.5, 3.0]
        assert midranks([]).tolist() == []


class TestLengthBias:
    def test_by_hand(self):
        # Ranks: score 1 2 3 4, length 2 1 4 3, quality 1 2 4 3. About their means, times 2:
        # s = -3 -1 1 3, l = -1 -3 3 1, q = -3 -1 3 1; sums of squares 20 each.
        # s.l = 3 + 3 + 3 + 3 = 12; s.q = 9 + 1 + 3 + 3 = 16; l.q = 3 + 3 + 9 + 1 = 16.
        # r_sl = .6, r_sq = r_lq = .8; partial = (.6 - .64) / sqrt(.36 * .36) = -1/9.
        assert length_bias([10, 20, 30, 40], [5, 4, 9, 8], [0.1, 0.2, 0.9, 0.3]) == pytest.approx(-1 / 9)

    def test_length_that_only_follows_quality_is_no_bias(self):
        rng = np.random.default_rng(0)
        quality = rng.normal(size=4000)
        length = quality + rng.normal(size=4000)
        score = quality + rng.normal(size=4000)
        assert np.corrcoef(score, length)[0, 1] > 0.45
        assert length_bias(score, length, quality) == pytest.approx(0, abs=0.06)
        assert length_bias(score + length, length, quality) > 0.5
        assert length_bias(score - length, length, quality) < -0.5

    def test_quality_that_does_not_vary_leaves_spearman(self):
        # Ranks 1 2 3 against 1 3 2: 1 - 6 * 2 / (3 * 8) = 1/2.
        assert length_bias([1, 2, 3], [1, 9, 4], [7, 7, 7]) == pytest.approx(0.5)

    def test_undefined(self):
        assert math.isnan(length_bias([1, 2, 3], [4, 4, 4], [1, 3, 2]))
        assert math.isnan(length_bias([1, 2, 3, 4], [1, 3, 2, 4], [2, 4, 6, 8]))  # quality explains the score wholly
        assert math.isnan(length_bias([1, 2], [1, 2], [1, 2]))
