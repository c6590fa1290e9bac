"""Metric vectors, intervals and paired differences, against numbers worked by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mmft.data.scenes import EmojiScenes
from mmft.eval.evaluator import evaluate_captions, evaluation_record, share_of_gap_closed
from mmft.eval.intervals import compare, summarise
from mmft.types import RewardOutput, Row


class FakeReward:
    """Longer is better; keeps what it was called with."""

    def __call__(self, captions, rows, finished=None, update=True):
        self.finished, self.update = finished, update
        total = [float(len(caption)) for caption in captions]
        return RewardOutput(total, {"size": [value / 2 for value in total]}, {}, {})


class TestIntervals:
    def test_means_by_hand_and_undefined_samples(self):
        # (1 + 2 + 6) / 3 = 3; the NaN is no sample of y: (0 + 1) / 2 = 0.5; z is defined nowhere.
        summary = summarise({"x": [1, 2, 6], "y": [0, math.nan, 1], "z": [math.nan] * 3})
        assert summary["x"]["mean"] == pytest.approx(3.0)
        assert summary["y"]["mean"] == pytest.approx(0.5)
        assert summary["z"] == {"mean": None, "low": None, "high": None}
        assert 1 <= summary["x"]["low"] < 3 < summary["x"]["high"] <= 6

    def test_interval_is_the_normal_one_for_many_samples(self):
        values = np.random.default_rng(1).normal(5, 2, 4000)
        summary = summarise({"x": values})["x"]
        half = 1.96 * values.std() / math.sqrt(len(values))  # 0.062
        assert summary["low"] == pytest.approx(values.mean() - half, abs=0.006)
        assert summary["high"] == pytest.approx(values.mean() + half, abs=0.006)

    def test_covers_the_truth_about_95_times_in_100(self):
        rng = np.random.default_rng(2)
        covered = 0
        for trial in range(200):
            interval = summarise({"x": rng.exponential(1.0, 80)}, seed=trial, resamples=400)["x"]
            covered += interval["low"] <= 1.0 <= interval["high"]
        assert 178 <= covered <= 198  # 190 expected; the percentile interval is a little short on skewed data

    def test_same_seed_same_numbers_and_one_sample(self):
        values = {"x": np.random.default_rng(3).random(50)}
        assert summarise(values, seed=4) == summarise(values, seed=4)
        assert summarise(values, seed=4) != summarise(values, seed=5)
        assert summarise({"x": [0.25]})["x"] == {"mean": 0.25, "low": 0.25, "high": 0.25}

    def test_chunks_change_nothing(self, monkeypatch):
        values = {"x": np.random.default_rng(3).random(50)}
        whole = summarise(values)
        monkeypatch.setattr("mmft.eval.intervals._CHUNK", 50 * 7)
        assert summarise(values)["x"] == pytest.approx(whole["x"])

    def test_difference_is_paired(self):
        # Pictures differ by 100, the change is 1 each: paired, the interval is [1, 1]; unpaired it would hold zero.
        before = {"x": np.arange(50) * 100.0, "gone": np.zeros(50)}
        after = {"x": before["x"] + 1.0, "new": np.ones(50)}
        assert compare(before, after) == {"x": {"mean": 1.0, "low": 1.0, "high": 1.0}}
        # after - before: undefined where either side is. (3 - 1) = 2 is the only pair.
        partly = compare({"x": [1, math.nan, 4]}, {"x": [3, 5, math.nan]})
        assert partly["x"] == {"mean": 2.0, "low": 2.0, "high": 2.0}

    def test_wrong_sizes(self):
        with pytest.raises(ValueError, match="different lengths"):
            summarise({"x": [1], "y": [1, 2]})
        with pytest.raises(ValueError, match="no samples"):
            summarise({"x": []})
        with pytest.raises(ValueError, match="cannot pair 1 samples before with 2"):
            compare({"x": [1]}, {"x": [1, 2]})
        assert summarise({}) == compare({"x": [1]}, {"y": [1]}) == {}


class TestEvaluateCaptions:
    ROWS = (
        Row("a", None, "p", ("a red apple on the table", "an apple")),
        Row("b", None, "p"),
        Row("c", None, "p", ("two dogs run in the park",)),
    )

    def test_vectors(self):
        reward = FakeReward()
        captions = ["a red apple on the table", "a dog and a dog and a", ""]
        scores = evaluate_captions(captions, self.ROWS, reward, finished=[True, False, True])
        assert scores["reward"].tolist() == [24, 21, 0]
        assert scores["term_size"].tolist() == [12, 10.5, 0]
        assert not reward.update
        assert reward.finished == [True, False, True]
        assert scores["bleu_4"][0] == pytest.approx(1.0)
        assert scores["rouge_l"][0] == pytest.approx(1.0)
        assert np.isnan(scores["bleu_4"][1]), "no references: undefined, not zero"
        assert scores["bleu_4"][2] == scores["rouge_l"][2] == 0
        assert scores["length"].tolist() == [6, 7, 0]
        assert scores["repetition"][0] == 0 < scores["repetition"][1]
        assert scores["bad_ending"].tolist() == [0, 1, 1]
        assert scores["finished"].tolist() == [1, 0, 1]
        assert not any(name.startswith("oracle") for name in scores)

    def test_less_to_measure(self):
        scores = evaluate_captions(["a cat"], [Row("b", None, "p")])
        assert set(scores) == {"length", "repetition", "bad_ending"}

    def test_the_oracle_sees_scenes(self):
        rows = [EmojiScenes(3, "heldout")[i] for i in range(3)]
        captions = [rows[0].references[0], "", rows[2].references[0]]
        scores = evaluate_captions(captions, [*rows[:2], Row("plain", None, "p")])
        assert scores["oracle_precision"][0] == 1.0
        assert scores["oracle_hallucination"][0] == 0.0
        assert scores["oracle_recall"][1] == 0.0
        assert np.isnan(scores["oracle_precision"][1]), "nothing claimed"
        assert np.isnan([scores[name][2] for name in scores if name.startswith("oracle")]).all()

    @pytest.mark.parametrize(("captions", "finished"), [([], None), (["a"] * 2, None), (["a"] * 3, [True])])
    def test_mismatch(self, captions, finished):
        with pytest.raises(ValueError, match="expected N > 0 of each"):
            evaluate_captions(captions, self.ROWS, finished=finished)


class TestRecord:
    def test_shape_of_eval_json(self):
        before = evaluate_captions(["a cat", "a"], TestEvaluateCaptions.ROWS[:2], FakeReward())
        after = evaluate_captions(["a cat!!", "a"], TestEvaluateCaptions.ROWS[:2], FakeReward())
        record = evaluation_record(before, after, reference_reward=7.0)
        assert list(record) == ["before", "after", "difference", "samples", "reference_reward"]
        assert record["samples"] == 2
        assert record["before"]["reward"]["mean"] == 3.0
        assert record["difference"]["reward"]["mean"] == 1.0  # ((7 - 5) + 0) / 2
        assert set(record["after"]["reward"]) == {"mean", "low", "high"}
        assert share_of_gap_closed(record) == pytest.approx(0.25)  # (4 - 3) / (7 - 3)
        json.loads(json.dumps(record, allow_nan=False))

    def test_one_side_and_no_ceiling(self):
        scores = {"reward": np.array([1.0, 2.0])}
        record = evaluation_record(scores, None, reference_reward=math.nan)
        assert set(record) == {"before", "samples", "reference_reward"}
        assert record["reference_reward"] is None
        assert share_of_gap_closed(record) is None
        above = evaluation_record(scores, scores, reference_reward=1.0)
        assert share_of_gap_closed(above) is None, "no gap to close"
        with pytest.raises(ValueError, match="nothing"):
            evaluation_record(None, None)


def test_with_the_real_reward():
    from mmft.config import load_recipe
    from mmft.rewards.combine import build_reward

    rows = [EmojiScenes(12, "heldout")[i] for i in range(12)]
    reward = build_reward(load_recipe("recipes/caption_ppo.yaml").reward)
    reward.fit(EmojiScenes(50)[i] for i in range(50))
    state = json.dumps(reward.state_dict(), sort_keys=True)
    good = evaluate_captions([row.references[0] for row in rows], rows, reward, [True] * 12)
    poor = evaluate_captions(["a thing"] * 12, rows, reward, [True] * 12)
    record = evaluation_record(poor, good, reward.reference_reward(rows))
    assert record["difference"]["reward"]["low"] > 0
    assert {"term_bleu", "term_detail"} <= set(record["after"])
    assert json.dumps(reward.state_dict(), sort_keys=True) == state, "evaluation teaches the normalisers nothing"
