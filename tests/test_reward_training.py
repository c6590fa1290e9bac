"""Training of a reward model's network: losses by hand, early stopping, schedule, seeds, distance of pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import tiny_towers
import torch

from mmft.config.reward_recipe import RewardTrainConfig
from mmft.functional.schedule import learning_rate_factor
from mmft.models.features import FeatureStore
from mmft.models.reward import CaptionRewardModel
from mmft.models.towers import Tokens
from mmft.nn.fusion import masked_mean_pool
from mmft.rewards.judgements import Judgement, Preference
from mmft.train import reward as training
from mmft.train.reward import (
    TrainingSet,
    add_features,
    autocast_dtype,
    captions_of,
    fit_distance,
    loss_of,
    scores_of,
    train_network,
    validate,
)
from mmft.types import UserError


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_towers.saved(tiny_towers.llava(), tiny_towers.processor(), tmp_path_factory.mktemp("llava"))


class Bench:
    """A fresh small model with train and validation sets; `kept` are the metrics of each look at validation."""

    def __init__(self, tower: str, loss: str, validation: list[Judgement] | None = None, **changes: Any):
        self.loss, self.kept = loss, []
        changes = {"fusion": "sum", **changes}
        self.model = tiny_towers.reward_model(tower, loss=loss, **changes)
        train = tiny_towers.judgements(loss, 10)
        validation = tiny_towers.judgements(loss, 4, first=10) if validation is None else validation
        self.store, (self.train, self.validation) = tiny_towers.training_sets(self.model, train, validation)

    def fit(self, **train: Any) -> int:
        return train_network(
            self.model, self.store, self.train, self.validation, tiny_towers.recipe(self.loss, **train),
            lambda step, steps, metrics: self.kept.append((step, steps, metrics)),
        )  # fmt: skip

    def validated(self) -> float:
        dtype = autocast_dtype("cpu")  # as the training loop validates
        return validate(self.model, self.loss, self.validation, self.store, dtype)["loss/validation"]


def weights_of(model: CaptionRewardModel) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


class TestEarlyStopping:
    def test_the_best_weights_are_kept(self, tower: str) -> None:
        """Validation says the opposite of training: after the first look things only get worse."""
        bench = Bench(tower, "bradley_terry", tiny_towers.judgements("bradley_terry", 10, flip=True))
        best = bench.fit(steps=200, every=5, patience=3, lr=1e-2)
        losses = {step: metrics["loss/validation"] for step, _, metrics in bench.kept}
        assert list(losses) == [5, 10, 15, 20], "3 looks without a better one, and no more"
        assert best == 5 and losses[20] > losses[5] + 0.5
        assert bench.validated() == pytest.approx(losses[5], abs=1e-6)
        assert not bench.model.training

    def test_a_better_look_starts_the_count_again(self, tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Losses 5, 6, 4, 4, 6, 3.9, 7, 7, 7: the best is the sixth; the fourth is no better than the third."""
        said = iter([5, 6, 4, 4, 6, 3.9, 7, 7, 7, 1])
        weights: list[torch.Tensor] = []
        bench = Bench(tower, "mse")

        def scripted(model: CaptionRewardModel, *rest: Any) -> dict[str, float]:
            weights.append(weights_of(model))
            return {"loss/validation": next(said)}

        monkeypatch.setattr(training, "validate", scripted)
        assert bench.fit(steps=100, every=2, patience=3) == 12
        assert [step for step, _, _ in bench.kept] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
        assert torch.equal(weights_of(bench.model), weights[5])
        assert not torch.equal(weights[5], weights[8])

    def test_to_the_end_with_a_last_look(self, tower: str) -> None:
        bench = Bench(tower, "mse")
        bench.fit(steps=7, every=5, patience=9)
        assert [step for step, _, _ in bench.kept] == [5, 7]
        assert {steps for _, steps, _ in bench.kept} == {7}

    def test_a_validation_that_is_no_number_stops(self, tower: str) -> None:
        """Nothing would ever be better than it, and an untrained network would be saved as the best."""
        bench = Bench(tower, "mse")
        bench.validation.target_N[0] = math.nan
        with pytest.raises(FloatingPointError, match="held-out loss is not finite at step 1; lower train.lr"):
            bench.fit(steps=4, every=1, patience=9)


class TestLoop:
    @pytest.mark.parametrize("loss", tiny_towers.LOSSES)
    def test_what_is_reported(self, tower: str, loss: str) -> None:
        """The training loss is the mean since the last look; the learning rate is the cosine's."""
        bench = Bench(tower, loss)
        bench.fit(steps=30, every=10, warmup=4, lr=2e-3, patience=9)
        rates = [metrics["lr"] for _, _, metrics in bench.kept]
        assert rates == pytest.approx([2e-3 * learning_rate_factor("cosine", s, 30, 4) for s in (10, 20, 30)])
        assert rates[0] > rates[1] > rates[2] == 0
        shown = {"bradley_terry": "accuracy", "mse": "rmse", "aleatoric": "sigma"}[loss]
        assert all(f"reward_model/{shown}" in metrics for _, _, metrics in bench.kept)
        assert bench.kept[-1][2]["loss/train"] < bench.kept[0][2]["loss/train"]

    def test_the_mean_of_the_steps_since_the_last_look(self, tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
        values: list[float] = []
        original = training.loss_of

        def watched(model: Any, *rest: Any) -> Any:
            out = original(model, *rest)
            if torch.is_grad_enabled():
                values.append(out.loss.item())
            return out

        monkeypatch.setattr(training, "loss_of", watched)
        bench = Bench(tower, "mse")
        bench.fit(steps=6, every=3, patience=9)
        expected = [sum(values[:3]) / 3, sum(values[3:]) / 3]
        assert [metrics["loss/train"] for _, _, metrics in bench.kept] == pytest.approx(expected)

    def test_the_same_seed_gives_the_same_weights(self, tower: str) -> None:
        def trained(seed: int) -> torch.Tensor:
            bench = Bench(tower, "aleatoric", fusion="cross_attention", dropout=0.3)
            torch.manual_seed(seed)
            bench.fit(steps=12, seed=seed)
            return weights_of(bench.model)

        first = trained(0)
        assert torch.equal(first, trained(0))
        assert not torch.equal(first, trained(1))

    def test_a_loss_that_is_not_finite_stops_with_weights_unchanged(self, tower: str) -> None:
        bench = Bench(tower, "mse")
        bench.train.target_N[:] = math.nan
        before = weights_of(bench.model)
        with pytest.raises(FloatingPointError, match="the reward model's loss is nan at step 1"):
            bench.fit()
        assert torch.equal(weights_of(bench.model), before)

    def test_towers_are_not_trained(self, tower: str) -> None:
        bench = Bench(tower, "mse")
        before = torch.nn.utils.parameters_to_vector(bench.model._towers["text"].parameters()).clone()
        bench.fit(steps=3)
        assert torch.equal(torch.nn.utils.parameters_to_vector(bench.model._towers["text"].parameters()), before)
        inside = {id(p) for p in bench.model.parameters()}
        assert not inside & {id(p) for p in bench.model._towers["text"].parameters()}

    def test_gradients_are_clipped(self, tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
        norms = []
        original = torch.optim.AdamW.step

        def step(self: Any, *rest: Any) -> Any:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
            return original(self, *rest)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        Bench(tower, "mse").fit(steps=3, max_grad_norm=0.01)
        assert len(norms) == 3 and max(norms) <= 0.01 * 1.001


class TestBatches:
    def batches(self, size: int, count: int, process: int = 0, processes: int = 1, **train: Any) -> list[list[int]]:
        config = RewardTrainConfig(**{"batch": 4, **train})
        found: Iterator[torch.Tensor] = training._batches(size, config, process, processes)
        return [index.tolist() for index in islice(found, count)]

    def test_every_judgement_once_an_epoch(self) -> None:
        """10 items in batches of 4: after 5 batches each was there twice."""
        seen = [*chain(*self.batches(10, 5))]
        assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
        assert seen[:10] != seen[10:] != sorted(seen[10:])

    def test_sets_smaller_than_a_batch(self) -> None:
        assert sorted(chain(*self.batches(3, 3))) == sorted([0, 1, 2] * 4)

    def test_processes_share_the_same_batches(self) -> None:
        whole = self.batches(10, 4)
        parts = [self.batches(10, 4, process, 2) for process in (0, 1)]
        assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]
        with pytest.raises(UserError, match="train.batch: 4 cannot be shared by 3 processes"):
            self.batches(10, 1, 0, 3)

    def test_another_seed_another_order(self) -> None:
        assert self.batches(10, 2) == self.batches(10, 2) != self.batches(10, 2, seed=1)


class Fixed(torch.nn.Module):
    """Scores that are the first feature of a caption's only token."""

    def __init__(self, log_variance: float | None = None) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))
        self.log_variance = log_variance

    def forward(self, embeddings: Any, masks: Any) -> Any:
        mean_B = self.one * embeddings["text"][:, 0, 0]
        return mean_B, None if self.log_variance is None else torch.full_like(mean_B, self.log_variance)


def store_of(items: list[Judgement], scores: dict[str, float]) -> FeatureStore:
    def encode(captions: Any, rows: Any) -> Any:
        ones = torch.ones(len(captions), 1).bool()
        text = torch.tensor([[[scores[caption]]] for caption in captions])
        return Tokens(torch.zeros(len(captions), 1, 1), ones), Tokens(text, ones)

    store = FeatureStore(encode)
    add_features(store, items)
    return store


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


class TestLosses:
    def test_pairs_with_margins_and_ties(self) -> None:
        """d = 2 - 1 = 1 with margin 0.5: softplus(-0.5); d = 3 - 1 = 2, none: softplus(-2); d = -1, a tie."""
        picture = tiny_towers.judgements("mse", 1)[0].picture
        pairs = [
            Preference(picture=picture, chosen="two", rejected="one", margin=0.5),
            Preference(picture=picture, chosen="three", rejected="one"),
            Preference(picture=picture, chosen="two", rejected="three", tie=True),
        ]
        store = store_of(pairs, {"one": 1.0, "two": 2.0, "three": 3.0})
        data = TrainingSet.of(pairs, store)
        out = loss_of(Fixed(), "bradley_terry", data, torch.arange(3), store)
        expected = (softplus(-0.5) + softplus(-2) + 0.5 * (softplus(1) + softplus(-1))) / 3
        assert out.loss.item() == pytest.approx(expected, abs=1e-6)
        assert out.metrics["reward_model/accuracy"].item() == 1.0
        turned = loss_of(Fixed(), "bradley_terry", data, torch.tensor([2, 0]), store)
        assert turned.loss.item() == pytest.approx((0.5 * (softplus(1) + softplus(-1)) + softplus(-0.5)) / 2)

    def test_ratings(self) -> None:
        """Ratings 3 and 7, mean 5, sd 2: targets -1 and 1. Predicted 1 and 2: errors 2 and 1."""
        first, second = tiny_towers.judgements("mse", 1)[:2]
        items = [set_rating(first, "one", 3.0), set_rating(second, "two", 7.0)]
        store = store_of(items, {"one": 1.0, "two": 2.0})
        data = TrainingSet.of(items, store, mean=5.0, std=2.0)
        assert data.target_N.tolist() == [-1.0, 1.0] and data.second_N is None and len(data) == 2
        both = torch.arange(2)
        assert loss_of(Fixed(), "mse", data, both, store).loss.item() == pytest.approx((4 + 1) / 2)
        # variance 4: 1/2 (error^2 / 4 + log 4)
        noisy = loss_of(Fixed(math.log(4.0)), "aleatoric", data, both, store).loss.item()
        assert noisy == pytest.approx(0.5 * (2.5 / 4 + math.log(4.0)))

    def test_validation_is_the_mean_over_all(self, tower: str) -> None:
        """Of a set larger than one forward pass, and whose parts are of different size."""
        bench = Bench(tower, "mse")
        data, times = bench.validation, 40
        many = TrainingSet(data.first_N.repeat(times), None, data.target_N.repeat(times), data.tie_N.repeat(times))
        assert len(many) > 512 and len(many) % 512
        few = validate(bench.model, "mse", data, bench.store)
        repeated = validate(bench.model, "mse", many, bench.store)
        assert repeated["loss/validation"] == pytest.approx(few["loss/validation"], rel=1e-5)
        assert few["loss/validation"] == pytest.approx(few["reward_model/rmse"] ** 2, rel=1e-5)


def set_rating(item: Any, caption: str, rating: float) -> Any:
    return dataclasses.replace(item, caption=caption, rating=rating)


class TestFeatures:
    def test_each_picture_and_caption_is_encoded_once(self, tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_towers.reward_model(tower, "sum", "bradley_terry")
        items = tiny_towers.judgements("bradley_terry", 7)
        seen: list[tuple[int, int]] = []
        original = model.encode

        def encode(captions: Any, rows: Any) -> Any:
            seen.append((len(captions), len({id(row.image) for row in rows})))
            return original(captions, rows)

        store = FeatureStore(encode)
        monkeypatch.setattr(training, "PICTURES_AT_ONCE", 3)
        done: list[int] = []
        add_features(store, [*items, *items[:5]], done.append)
        captions = {(item.picture_key, text) for item in items for text in captions_of(item)}
        assert sum(count for count, _ in seen) == len(captions) == len(store)
        assert [pictures for _, pictures in seen] == done == [3, 3, 1]
        add_features(store, items)
        assert len(seen) == 3


class TestDistance:
    def test_mean_spread_and_limit(self, tower: str) -> None:
        bench = Bench(tower, "mse")
        fit_distance(bench.model, bench.store, bench.train, bench.validation)

        def pooled(data: TrainingSet) -> np.ndarray:
            image, _ = bench.store.batch(bench.store.one_per_picture(data.first_N))
            return masked_mean_pool(image.features_BND, image.mask_BN).double().numpy()

        x, held = pooled(bench.train), pooled(bench.validation)
        assert (len(x), len(held)) == (10, 4)
        covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / 10
        covariance += (0.01 * np.diag(covariance).mean() + 1e-6) * np.eye(len(covariance))
        off = held - x.mean(0)
        distance = np.einsum("nd,de,ne->n", off, np.linalg.inv(covariance), off)
        config = bench.model.config
        assert config.distance_limit == pytest.approx(np.quantile(distance, 0.99), rel=1e-2)
        image, _ = bench.store.batch(bench.store.one_per_picture(bench.validation.first_N))
        assert bench.model.distance(image).tolist() == pytest.approx(distance.tolist(), rel=1e-2)
        scores = scores_of(bench.model, bench.store, bench.train.first_N, uncertainty=False).mean_B
        assert config.prior_std == pytest.approx(scores.std(correction=0).item() / config.target_std, rel=1e-5)

    def test_one_picture_gives_numbers(self, tower: str) -> None:
        bench = Bench(tower, "mse")
        one = tiny_towers.judgements("mse", 1)[:1]
        data = TrainingSet.of(one, bench.store, bench.model.config.target_mean, bench.model.config.target_std)
        fit_distance(bench.model, bench.store, data, bench.validation)
        prediction = scores_of(bench.model, bench.store, bench.validation.first_N)
        assert torch.isfinite(prediction.sigma_B).all()

    def test_scores_are_those_of_the_captions_themselves(self, tower: str) -> None:
        bench = Bench(tower, "aleatoric", fusion="cross_attention")
        bench.fit(steps=5)
        fit_distance(bench.model, bench.store, bench.train, bench.validation)
        items = tiny_towers.judgements("aleatoric", 4, first=10)
        stored = scores_of(bench.model, bench.store, bench.validation.first_N)
        direct = bench.model.predict([item.caption for item in items], [item.row() for item in items])
        for name in ("mean_B", "epistemic_B", "aleatoric_B", "sigma_B"):
            torch.testing.assert_close(getattr(stored, name), getattr(direct, name), atol=1e-4, rtol=1e-4)
        plain = scores_of(bench.model, bench.store, bench.validation.first_N, uncertainty=False)
        assert torch.equal(plain.mean_B, stored.mean_B) and not plain.sigma_B.any()
