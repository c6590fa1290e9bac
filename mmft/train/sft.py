"""Supervised fine-tuning: the likelihood of references under the policy, by TRL's SFTTrainer.

TRL gives the loop, optimizer, schedule and accelerate; prompts, pictures and token log-probabilities are the same as in
reinforcement learning, so that the one begins where the other ends, for every family of models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from mmft.data.cursor import RowCursor
from mmft.data.prefetch import Prefetch
from mmft.models.interface import Interface
from mmft.models.scoring import PolicyWithCritic
from mmft.train import rollout as rollouts
from mmft.types import Row, UserError

_PATIENCE = 100  # micro-batches without a single target before it is given up


@dataclass(frozen=True)
class SFTSettings:
    """steps: of the optimizer; batch: captions each; micro_batch: captions a forward pass."""

    steps: int
    batch: int
    micro_batch: int
    lr: float
    schedule: str = "cosine"
    warmup: int = 0
    max_grad_norm: float = 1.0
    seed: int = 0
    use_cpu: bool = False
    workers: int = 0


def target_of(row: Row, rng: random.Random) -> str | None:
    """What the policy should say: the answer where a question is asked, or one of the references; None for neither."""
    if row.answer is not None and row.is_asked:
        return row.answer
    return rng.choice(row.references) if row.references else None


class CaptionSFTTrainer(SFTTrainer):
    """TRL's trainer over rows of a cursor: a batch's rows are those that are due, whatever places its loader drew.

    next_rows: the rows of the next micro-batch; those without a target are left out.
    """

    def __init__(
        self, interface: Interface, scorer: nn.Module, next_rows: Callable[[], list[Row]], seed: int, **options: Any
    ):
        self.interface, self.scorer = interface, scorer
        self.next_rows, self.rng = next_rows, random.Random(seed)
        super().__init__(data_collator=self._next, processing_class=interface.builder.tokenizer, **options)

    def _next(self, places: Sequence[dict[str, Any]]) -> dict[str, Any]:
        for _ in range(_PATIENCE):
            pairs = [(row, target_of(row, self.rng)) for row in self.next_rows()]
            kept = [(row, target) for row, target in pairs if target]
            if kept:
                return {"rows": [row for row, _ in kept], "targets": [target for _, target in kept]}
        raise UserError("supervised fine-tuning needs references or answers, and the data has none")

    def _answers(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, T) tokens with EOS at the end, and their mask."""
        tokenizer: Any = self.interface.builder.tokenizer
        ids = [tokenizer(text.strip(), add_special_tokens=False)["input_ids"] for text in texts]
        rows = [torch.tensor([*row, tokenizer.eos_token_id]) for row in ids]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.interface.pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        return tokens.to(self.interface.device), mask.to(self.interface.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of -log pi over the tokens of a micro-batch's targets, each up to and including EOS."""
        tokens, mask = self._answers(inputs["targets"])
        prompts = [self.interface.builder(row) for row in inputs["rows"]]
        everything = torch.arange(len(prompts))
        scores = rollouts.forward(
            self.scorer, self.interface, prompts, tokens, mask, everything, values=False, with_entropy=False
        )
        loss = -(scores.logprobs_BT * mask).sum() / mask.sum()
        if not torch.isfinite(loss):
            step = self.state.global_step + 1
            raise UserError(f"sft: the loss is {float(loss.detach())} at step {step}; lower the learning rate")
        return (loss, {"logprobs": scores.logprobs_BT}) if return_outputs else loss


def fine_tune(
    policy: Any,
    interface: Interface,
    banned: Sequence[int],
    cursor: RowCursor,
    settings: SFTSettings,
    folder: Path,
    log: Callable[[int, dict[str, float]], None],
) -> float:
    """Trains `policy`'s trainable weights on the rows of `cursor`; returns the last loss, nats a token.

    log: is given each step's `loss/sft`, `sft/grad_norm` and `lr`. Raises UserError where the loss is not finite.
    """
    args = SFTConfig(
        output_dir=str(folder), max_steps=settings.steps, per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch // settings.micro_batch, learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule, warmup_steps=settings.warmup, max_grad_norm=settings.max_grad_norm,
        seed=settings.seed, use_cpu=settings.use_cpu, weight_decay=0.0, logging_steps=1, report_to=[], max_length=None,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True}, bf16=False, dataloader_num_workers=0,
    )  # fmt: skip
    scorer = PolicyWithCritic(policy, nn.Identity(), banned, 1.0).to(interface.device)
    record = _Log(log)
    ahead = Prefetch(cursor, settings.micro_batch, settings.workers, slice(None))
    trainer = CaptionSFTTrainer(
        interface, scorer, ahead.next, settings.seed, model=policy, args=args, callbacks=[record],
        train_dataset=Dataset.from_dict({"place": range(settings.steps * settings.batch)}),
    )  # fmt: skip
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    try:
        trainer.train()
    finally:
        ahead.close()
    policy.eval()
    return record.loss


class _Log(TrainerCallback):
    def __init__(self, log: Callable[[int, dict[str, float]], None]):
        self.log, self.loss = log, float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        numbers = {"loss/sft": self.loss, "sft/grad_norm": float(logs["grad_norm"]), "lr": float(logs["learning_rate"])}
        self.log(state.global_step, numbers)
