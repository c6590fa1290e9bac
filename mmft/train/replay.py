"""The batch at which an update's numbers ceased to be finite: kept whole, and run again row by row to see where."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mmft.models.prompts import Prompt
from mmft.train import rollout as rollouts
from mmft.train import trainer_state
from mmft.train.experience import Experience, Rollout, ppo_loss
from mmft.train.ppo_config import setting
from mmft.train.sharding import full, put
from mmft.types import UserError

if TYPE_CHECKING:
    from mmft.train.ppo import VisionPPOTrainer

_FORMAT = "mmft-batch-1"


class NonFiniteUpdate(FloatingPointError, UserError):
    """A loss or gradient that is no finite number; no weight has been changed by it."""


@dataclass(frozen=True)
class Batch:
    """Rows of a minibatch with all that its loss is made of, and the weights that it met."""

    step: int
    reason: str
    recipe: str | None
    interface: dict[str, Any]
    ids: list[str]
    captions: list[str]
    prompts: list[Prompt]
    responses_BT: Tensor
    mask_BT: Tensor
    experience: Experience
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class RowReport:
    """One row by itself. worst_ratio, worst_advantage: largest magnitudes over its tokens."""

    id: str
    caption: str
    loss: float
    worst_ratio: float
    worst_advantage: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)

    @property
    def culprit(self) -> str:
        """Where a row is not finite, its first number that is not, in words."""
        numbers = {"advantage": self.worst_advantage, "ratio": self.worst_ratio, "loss": self.loss}
        return next(f"its {name} is {value}" for name, value in numbers.items() if not math.isfinite(value))


@dataclass(frozen=True)
class ReplayReport:
    """rows: each by itself; loss: of all together, with the anchor's penalty; module: the first, going forward, whose
    output was not finite; parameter: the first, going backward, whose gradient was not, where the loss is finite.
    """

    rows: list[RowReport]
    loss: float
    module: str | None
    parameter: str | None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and self.parameter is None and all(row.finite for row in self.rows)


def packed_batch(
    trainer: VisionPPOTrainer, rollout: Rollout, experience: Experience, rows: Tensor, reason: str
) -> bytes:
    """A batch file (safetensors) of these local rows. All processes take part: weights may be in parts."""
    index = rows.tolist()
    tensors: dict[str, Tensor] = {"responses": rollout.responses_BT[rows], "mask": rollout.mask_BT[rows]}
    for field in dataclasses.fields(Experience):
        value = getattr(experience, field.name)
        tensors[f"experience/{field.name}"] = value[rows] if value.dim() else value
    for place, i in enumerate(index):
        prompt = rollout.prompts[i]
        tensors[f"prompt/{place}/ids"] = prompt.input_ids
        for kind in ("pictures", "token_inputs"):
            for name, tensor in getattr(prompt, kind).items():
                tensors[f"prompt/{place}/{kind}/{name}"] = tensor
    for name, parameter in trainer_state.trained(trainer).items():
        tensors[f"weight/{name}"] = full(parameter.detach())
    record = {
        "step": trainer.state.global_step + 1,
        "reason": reason,
        "recipe": getattr(trainer, "recipe_text", None),
        "interface": trainer.interface.state_dict(),
        "ids": [rollout.rows[i].id if rollout.rows else str(i) for i in index],
        "captions": [rollout.captions[i] if rollout.captions else "" for i in index],
        "pictures": [rollout.prompts[i].picture_count for i in index],
    }
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(plain, {"format": _FORMAT, "record": json.dumps(record)})


def read_batch(path: Path) -> Batch:
    """A batch file. Raises UserError for one that is none."""
    try:
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
            if known.get("format") != _FORMAT:
                raise UserError(f"{path}: not a batch that mmft kept")
            record = json.loads(known["record"])
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    fields = {f.name: tensors[f"experience/{f.name}"] for f in dataclasses.fields(Experience)}
    weights = {name.removeprefix("weight/"): t for name, t in tensors.items() if name.startswith("weight/")}
    prompts = [_prompt(tensors, i, count) for i, count in enumerate(record["pictures"])]
    return Batch(
        record["step"], record["reason"], record["recipe"], record["interface"], record["ids"], record["captions"],
        prompts, tensors["responses"], tensors["mask"], Experience(**fields), weights,
    )  # fmt: skip


def _prompt(tensors: dict[str, Tensor], place: int, count: int) -> Prompt:
    parts: dict[str, dict[str, Tensor]] = {"pictures": {}, "token_inputs": {}}
    for kind, found in parts.items():
        start = f"prompt/{place}/{kind}/"
        found.update({name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)})
    return Prompt(tensors[f"prompt/{place}/ids"], parts["pictures"], parts["token_inputs"], count)


def replay(batch: Batch, trainer: VisionPPOTrainer) -> ReplayReport:
    """Loss and gradients of the batch with the weights that it met; the trainer's optimizer does nothing. Raises
    UserError where the batch has no rows, or the trainer another model.
    """
    if not batch.ids:
        raise UserError("the batch has no rows of this process; replay that of another")
    own = trainer_state.trained(trainer)
    if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in batch.weights.items()}:
        raise UserError("the batch is of another model: its trained weights have other names or shapes")
    trainer.interface.load_state_dict(batch.interface)
    for name, parameter in own.items():
        put(parameter, batch.weights[name])
    module: list[str] = []
    parameter: list[str] = []
    with _watching(trainer.model, module), _watching_gradients(own, parameter):
        rows = [_row(batch, trainer, i) for i in range(len(batch.ids))]
        loss = trainer.updater.halving(lambda: _gradients(batch, trainer))
    trainer.optimizer.zero_grad()
    broken = parameter[0] if parameter and math.isfinite(loss) else None  # of a loss of NaN all gradients are NaN
    return ReplayReport(rows, loss, module[0] if module else None, broken)


def _gradients(batch: Batch, trainer: VisionPPOTrainer) -> float:
    """The loss of all rows, whose gradients are added up micro-batch by micro-batch, as in the update."""
    experience = batch.experience
    tokens, value_tokens = (max(1, int(m.sum())) for m in (experience.mask_BT, experience.value_mask_BT))
    everything = torch.arange(len(batch.ids), device=trainer.accelerator.device)
    (minibatch,) = trainer.updater.micro_batches([everything], batch.prompts, batch.mask_BT)
    penalty = trainer.anchor.penalty().loss
    total = float(penalty.detach())
    if penalty.requires_grad:
        penalty.backward()
    for index in minibatch:
        rows = index.cpu()
        share = int(experience.mask_BT[rows].sum()) / tokens
        value_share = int(experience.value_mask_BT[rows].sum()) / value_tokens
        loss = _loss(batch, trainer, index, share, value_share)
        loss.backward()
        total += float(loss.detach())
    return total


def _row(batch: Batch, trainer: VisionPPOTrainer, i: int) -> RowReport:
    index = torch.tensor([i], device=trainer.accelerator.device)
    mask_T = batch.mask_BT[i]
    with torch.no_grad():
        scores = _scores(batch, trainer, index)
        ratio_T = (scores.logprobs_BT[0].cpu() - batch.experience.logprobs_BT[i])[mask_T].exp()
        loss = float(_loss(batch, trainer, index))
    advantage_T = batch.experience.advantage_BT[i][mask_T]
    return RowReport(batch.ids[i], batch.captions[i], loss, _largest(ratio_T), _largest(advantage_T))


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _scores(batch: Batch, trainer: VisionPPOTrainer, index: Tensor) -> Any:
    responses, mask = (tensor.to(trainer.accelerator.device) for tensor in (batch.responses_BT, batch.mask_BT))
    wanted = bool(setting(trainer.args, "entropy_coef"))
    return rollouts.forward(
        trainer.model, trainer.interface, batch.prompts, responses, mask, index, entropy_grad=wanted
    )


def _loss(
    batch: Batch, trainer: VisionPPOTrainer, index: Tensor, share: float = 1.0, value_share: float = 1.0
) -> Tensor:
    args, device = trainer.args, trainer.accelerator.device
    parts = {f.name: getattr(batch.experience, f.name).to(device) for f in dataclasses.fields(Experience)}
    return ppo_loss(
        _scores(batch, trainer, index), Experience(**parts), index, args.cliprange, args.cliprange_value, args.vf_coef,
        setting(args, "entropy_coef"), share, value_share,
    ).loss  # fmt: skip


@contextmanager
def _watching(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Notes the modules whose output holds a number that is not finite, in the order in which they ran."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            values: Sequence[Any] = output if isinstance(output, tuple | list) else [output]
            floats = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
            if any(not torch.isfinite(v).all() for v in floats):
                found.append(name)

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if n and not list(m.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watching_gradients(parameters: Mapping[str, nn.Parameter], found: list[str]) -> Iterator[None]:
    """Notes the parameters whose gradient holds a number that is not finite, in the order of the backward pass."""

    def watch(name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            if not torch.isfinite(parameter.grad).all():
                found.append(name)

        return hook

    handles = [p.register_post_accumulate_grad_hook(watch(name)) for name, p in parameters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
