"""Training of a reward model: features once, then the network on preferences or ratings, then the terms' weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from mmft.config import RewardRecipe
from mmft.config.reward_recipe import RewardTrainConfig
from mmft.functional.reward_losses import aleatoric_loss, bradley_terry_loss, mse_loss
from mmft.functional.schedule import learning_rate_factor
from mmft.functional.uncertainty import mahalanobis
from mmft.models.features import FeatureStore
from mmft.models.reward import CaptionRewardModel, Prediction
from mmft.nn.fusion import masked_mean_pool
from mmft.rewards.judgements import Judgement, Preference, Rating
from mmft.types import LossOutput, UserError

PICTURES_AT_ONCE = 64
_SHRINKAGE = 0.01  # of the covariance towards a ball: fewer pictures than dimensions must do too
_INSIDE = 0.99  # share of validation pictures that count as like those of training

Report = Callable[[int, int, dict[str, float]], None]


def captions_of(item: Judgement) -> tuple[str, ...]:
    """What an item judges: the chosen and the rejected caption, or the rated one."""
    return (item.chosen, item.rejected) if isinstance(item, Preference) else (item.caption,)  # type: ignore[attr-defined]


def add_features(store: FeatureStore, items: Sequence[Judgement], report: Callable[[int], None] | None = None) -> None:
    """Encodes the pictures and captions of judgements. report: called with the number of pictures done."""
    groups: dict[tuple[str, str], list[Judgement]] = {}
    for item in items:
        groups.setdefault((item.picture_key, item.prompt), []).append(item)
    waiting = list(groups.items())
    for start in range(0, len(waiting), PICTURES_AT_ONCE):
        part = waiting[start : start + PICTURES_AT_ONCE]
        store.add(
            (key, members[0].row(), [text for item in members for text in captions_of(item)])
            for (key, _), members in part
        )
        if report is not None:
            report(len(part))


@dataclass(frozen=True)
class TrainingSet:
    """Judgements as indices into a feature store, with what was said of them.

    first_N: the chosen or the rated caption. second_N: the rejected one, None for ratings. target_N: ratings in units
    of training, or margins (NaN: none). tie_N: pairs that tie.
    """

    first_N: Tensor
    second_N: Tensor | None
    target_N: Tensor
    tie_N: Tensor

    def __len__(self) -> int:
        return len(self.first_N)

    @classmethod
    def of(cls, items: Sequence[Judgement], store: FeatureStore, mean: float = 0.0, std: float = 1.0) -> TrainingSet:
        def index(item: Judgement, caption: str) -> int:
            return store.index[item.picture_key, item.prompt, caption]

        first = torch.tensor([index(item, captions_of(item)[0]) for item in items])
        if isinstance(items[0], Preference):
            pairs = [item for item in items if isinstance(item, Preference)]
            second = torch.tensor([index(item, item.rejected) for item in pairs])
            margin = torch.tensor([math.nan if p.margin is None else p.margin for p in pairs])
            return cls(first, second, margin, torch.tensor([p.tie for p in pairs]))
        ratings = torch.tensor([item.rating for item in items if isinstance(item, Rating)])
        return cls(first, None, (ratings - mean) / std, torch.zeros(len(items), dtype=torch.bool))


def loss_of(model: Any, kind: str, data: TrainingSet, index_B: Tensor, store: FeatureStore) -> LossOutput:
    """The recipe's loss on the judgements `index_B`. Equation: E08, E33 or Bradley-Terry's."""
    device = next(model.parameters()).device
    captions = data.first_N[index_B]
    if data.second_N is not None:
        captions = torch.cat([captions, data.second_N[index_B]])
    image, text = (tokens.to(device) for tokens in store.batch(captions))
    mean_B, log_variance_B = model(
        {"image": image.features_BND, "text": text.features_BND}, {"image": image.mask_BN, "text": text.mask_BN}
    )
    mean_B, target_B = mean_B.float(), data.target_N[index_B].to(device)
    if kind == "bradley_terry":
        chosen_B, rejected_B = mean_B.chunk(2)
        return bradley_terry_loss(chosen_B, rejected_B, target_B.nan_to_num(0.0), data.tie_N[index_B].to(device))
    if kind == "mse":
        return mse_loss(mean_B, target_B)
    return aleatoric_loss(mean_B, log_variance_B.float(), target_B)


def autocast_dtype(device: str) -> torch.dtype | None:
    """bfloat16 where the machine multiplies it in hardware; elsewhere it would be slower than float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else None


def train_network(
    model: CaptionRewardModel,
    store: FeatureStore,
    train: TrainingSet,
    validation: TrainingSet,
    recipe: RewardRecipe,
    report: Report | None = None,
) -> int:
    """Trains until `train.steps`, or until the validation loss stops falling; keeps the best weights.

    report: called with (step, steps, metrics) at every look at the validation loss. Returns the step of the weights
    kept. Raises FloatingPointError where the loss is not finite; no weight has been changed then.
    """
    t = recipe.train
    device = next(model.parameters()).device.type
    accelerator = Accelerator(cpu=device == "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=t.lr, weight_decay=t.weight_decay)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor("cosine", step, t.steps, t.warmup))
    batches = _batches(len(train), t, accelerator.process_index, accelerator.num_processes)
    dtype = autocast_dtype(device)
    best, best_step, best_state, worse = math.inf, 0, copy.deepcopy(model.state_dict()), 0
    running: list[float] = []
    for step in range(1, t.steps + 1):
        wrapped.train()
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            out = loss_of(wrapped, recipe.loss, train, next(batches), store)
        if not torch.isfinite(out.loss):
            raise FloatingPointError(f"the reward model's loss is {out.loss.item()} at step {step}; lower train.lr")
        accelerator.backward(out.loss)
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), t.max_grad_norm)
        if norm is not None and not torch.isfinite(norm):
            raise FloatingPointError(f"the reward model's gradient is {float(norm)} at step {step}; lower train.lr")
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running.append(float(out.loss.detach()))
        if step % t.every and step != t.steps:
            continue
        metrics = validate(model, recipe.loss, validation, store, dtype)
        if report is not None:
            report(
                step, t.steps, {"loss/train": sum(running) / len(running), "lr": schedule.get_last_lr()[0], **metrics}
            )
        running.clear()
        if not math.isfinite(metrics["loss/validation"]):
            raise FloatingPointError(f"the reward model's held-out loss is not finite at step {step}; lower train.lr")
        if metrics["loss/validation"] < best:
            best, best_step, worse = metrics["loss/validation"], step, 0
            best_state = copy.deepcopy(model.state_dict())
        else:
            worse += 1
        if worse >= t.patience:
            break
    model.load_state_dict(best_state)
    model.eval()
    return best_step


@torch.no_grad()
def fit_distance(model: CaptionRewardModel, store: FeatureStore, train: TrainingSet, validation: TrainingSet) -> None:
    """Learns what pictures of training look like, and how far validation pictures lie from them."""

    def pooled(data: TrainingSet) -> Tensor:
        image, _ = store.batch(store.one_per_picture(data.first_N))
        return masked_mean_pool(image.features_BND.float(), image.mask_BN)

    x_ND = pooled(train)
    covariance_DD = torch.cov(x_ND.T, correction=0)  # one picture has one too
    ridge = _SHRINKAGE * covariance_DD.diagonal().mean() + 1e-6
    model.image_mean_D.copy_(x_ND.mean(0))
    model.image_precision_DD.copy_(torch.linalg.inv(covariance_DD + ridge * torch.eye(x_ND.shape[1])))
    distance_N = mahalanobis(pooled(validation), model.image_mean_D.cpu(), model.image_precision_DD.cpu())
    model.config.distance_limit = float(distance_N.quantile(_INSIDE))
    scores_N = scores_of(model, store, train.first_N[:2048], uncertainty=False).mean_B
    model.config.prior_std = float(scores_N.std(correction=0)) / model.config.target_std


def scores_of(model: CaptionRewardModel, store: FeatureStore, index_N: Tensor, uncertainty: bool = True) -> Prediction:
    """Predictions for captions of a feature store, on the CPU. uncertainty: see `predict_features`."""
    device = next(model.parameters()).device
    parts = []
    for index_B in index_N.split(512):
        image, text = (tokens.to(device) for tokens in store.batch(index_B))
        parts.append(model.predict_features(image, text, uncertainty))
    return Prediction(*(torch.cat([getattr(p, n) for p in parts]).cpu() for n in Prediction.__annotations__))


@torch.no_grad()
def validate(
    model: CaptionRewardModel, kind: str, data: TrainingSet, store: FeatureStore, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """The loss and its metrics on all of a set, without dropout."""
    model.eval()
    device = next(model.parameters()).device.type
    totals: dict[str, float] = {}
    for index_B in torch.arange(len(data)).split(512):
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            out = loss_of(model, kind, data, index_B, store)
        share = len(index_B) / len(data)
        for name, value in {"loss/validation": out.loss, **out.metrics}.items():
            totals[name] = totals.get(name, 0.0) + share * float(value)
    return totals


def _batches(size: int, config: RewardTrainConfig, process: int, processes: int) -> Iterator[Tensor]:
    """Shuffled batches without end, the same order on all processes, each taking its part."""
    if config.batch % processes:
        raise UserError(f"train.batch: {config.batch} cannot be shared by {processes} processes")
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < config.batch:
            order = torch.cat([order, torch.randperm(size, generator=generator)])
        yield order[: config.batch][process::processes]
        order = order[config.batch :]
