"""mmft's PPO beside TRL's PPO on text alone: episodes a second, and how far their losses are apart.

    python scripts/bench/text_ppo.py                          # a Llama of 12 x 384, SmolLM2's vocabulary, LoRA
    python scripts/bench/text_ppo.py --rank 0 --vocabulary 16384      # every weight trains
    python scripts/bench/text_ppo.py --layers 2 --width 32 --vocabulary 512 --steps 1     # does it run?

The same `PPOConfig`, seed, prompts, policy, reference and reward model in all; the critic in two ways. `mmft` and `trl`
have TRL's usual value model, a second network of the policy's size. In `mmft-shared` and `trl-shared` it is a value
head on the policy's own trunk, which TRL runs once for the logits and once more for the values. Each of ours must log
the losses of its pair, step by step. Every contender runs in a process of its own, one after another.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from checkpoint import build_tokenizer
from measuring import RolloutClock, command, documented, machine, peak_memory, pick_device, run_child, say
from tables import markdown, memory, seconds, times

PAIRS = {"mmft": "trl", "mmft-shared": "trl-shared"}
CONTENDERS = ("mmft", "trl", "mmft-shared", "trl-shared")
LOSSES = ("loss/policy_avg", "loss/value_avg", "objective/kl", "objective/entropy", "objective/rlhf_reward")


@dataclass(frozen=True)
class Spec:
    """One contender's run. steps: counted batches, after one that warms up."""

    contender: str
    layers: int = 12
    width: int = 384
    vocabulary: int = 49152
    batch: int = 8
    shortest: int = 32
    longest: int = 96
    new: int = 48
    epochs: int = 4
    minibatches: int = 1
    steps: int = 3
    learning_rate: float = 1e-5
    r: int = 16
    device: str = "cpu"
    seed: int = 0

    @property
    def batches(self) -> int:
        return self.steps + 1


def llama_config(spec: Spec, tokenizer: Any) -> Any:
    from transformers import LlamaConfig

    heads = max(1, spec.width // 64)
    return LlamaConfig(
        vocab_size=spec.vocabulary, hidden_size=spec.width, intermediate_size=8 * spec.width // 3,
        num_hidden_layers=spec.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, num_labels=1,
    )  # fmt: skip


class TrunkCritic(torch.nn.Module):
    """A value model as TRL takes it whose backbone is the policy's own trunk."""

    base_model_prefix = "trunk"

    def __init__(self, trunk: torch.nn.Module, score: torch.nn.Module):
        super().__init__()
        self.trunk = trunk
        self.score = score


def critic_of(spec: Spec, config: Any, policy: Any) -> torch.nn.Module:
    """The value model, drawn from a seed of its own."""
    from transformers import LlamaForSequenceClassification

    from mmft.models.critic import ValueHead

    torch.manual_seed(spec.seed + 3)
    if not spec.contender.endswith("-shared"):
        return LlamaForSequenceClassification(config)
    head = ValueHead(spec.width)
    if spec.contender == "mmft-shared":
        return head
    base = policy.base_model.model if spec.r else policy
    return TrunkCritic(base.model, head.score)


def models(spec: Spec, tokenizer: Any) -> dict[str, Any]:
    """Policy, value model and reward model, each drawn from a seed of its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    config = llama_config(spec, tokenizer)
    torch.manual_seed(spec.seed + 1)
    policy = LlamaForCausalLM(config)
    policy.lm_head = without_padding(policy.lm_head, tokenizer.pad_token_id)
    if spec.r:
        policy = get_peft_model(policy, LoraConfig(r=spec.r, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(spec.seed + 2)
    reward = LlamaForSequenceClassification(config)
    critic = critic_of(spec, config, policy)
    return {"model": policy, "ref_model": None, "reward_model": reward, "value_model": critic}


def without_padding(head: torch.nn.Linear, pad_id: int) -> torch.nn.Linear:
    """The output layer with a bias under which padding is never sampled: TRL would take it for the response's end."""
    biased = torch.nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        biased.weight.copy_(head.weight)
        biased.bias.zero_()[pad_id] = -1e4
    return biased


def prompts(spec: Spec, special: int) -> Any:
    """Prompts of random tokens behind the special ones, of `shortest` to `longest`: more than any run reads."""
    from datasets import Dataset

    choose = random.Random(spec.seed)
    count = spec.batch * spec.batches
    lengths = [choose.randint(spec.shortest, spec.longest) for _ in range(count)]
    ids = [[choose.randrange(special, spec.vocabulary) for _ in range(length)] for length in lengths]
    return Dataset.from_dict({"input_ids": ids})


def arguments_of(spec: Spec, folder: str) -> Any:
    from trl.experimental.ppo import PPOConfig

    return PPOConfig(
        output_dir=folder, per_device_train_batch_size=spec.batch,
        gradient_accumulation_steps=1, num_mini_batches=spec.minibatches, num_ppo_epochs=spec.epochs,
        total_episodes=spec.batches * spec.batch, response_length=spec.new, local_rollout_forward_batch_size=spec.batch,
        learning_rate=spec.learning_rate, stop_token="eos", temperature=1.0, kl_coef=0.05, seed=spec.seed,
        bf16=False, gradient_checkpointing=False, use_cpu=spec.device == "cpu", report_to=[], disable_tqdm=True,
        logging_steps=1, save_strategy="no", num_sample_generations=0,
    )  # fmt: skip


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def child(fields: dict[str, Any]) -> dict[str, Any]:
    """One contender's run; `fields` are those of a `Spec`."""
    from mmft.train.ppo import VisionPPOTrainer

    from trl.experimental.ppo import PPOTrainer  # isort: skip  # after mmft.train, which silences it

    spec = Spec(**fields | {"device": pick_device(fields.get("device", "cpu"))})
    tokenizer = build_tokenizer(spec.vocabulary)
    clock = RolloutClock(1, spec.device)
    kind = PPOTrainer if spec.contender.startswith("trl") else VisionPPOTrainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            arguments_of(spec, folder), tokenizer, train_dataset=prompts(spec, len(tokenizer.all_special_ids)),
            callbacks=[clock], **models(spec, tokenizer),
        )  # fmt: skip
        seed_all(spec.seed)  # what a trainer draws when it is made is its own affair
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    return {
        "spec": asdict(spec),
        "seconds": clock.seconds[1:],
        "peak_bytes": peak_memory(spec.device),
        "losses": [{name: log[name] for name in LOSSES} for log in logs],
    }


def parser() -> argparse.ArgumentParser:
    options = documented(__doc__)
    options.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="who runs")
    options.add_argument("--layers", type=int, default=Spec.layers, help="of policy, value model and reward model")
    options.add_argument("--width", type=int, default=Spec.width, help="hidden size, a multiple of 64 or less")
    options.add_argument("--vocabulary", type=int, default=Spec.vocabulary, help="tokens known")
    options.add_argument("--batch", type=int, default=Spec.batch, help="episodes a step")
    options.add_argument("--new", type=int, default=Spec.new, help="tokens of a response")
    options.add_argument("--epochs", type=int, default=Spec.epochs, help="passes over each batch")
    options.add_argument("--minibatches", type=int, default=Spec.minibatches, help="optimizer steps an epoch")
    options.add_argument("--steps", type=int, default=Spec.steps, help="batches that count, after one that warms up")
    options.add_argument(
        "--rank", type=int, default=Spec.r, dest="r", help="of adapters on q and v; 0 trains all weights"
    )
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    return options


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    fields = {name: value for name, value in vars(arguments).items() if name in Spec.__dataclass_fields__}
    runs = []
    for contender in arguments.contenders:
        say(f"contender {contender}")
        runs.append(run_child("text_ppo.py", fields | {"contender": contender}))
    return {"machine": machine(), "runs": runs}


def largest_differences(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """(largest difference, largest value) of each logged loss over all steps."""
    return {
        name: (
            max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True)),
            max(abs(log[name]) for log in theirs),
        )
        for name in LOSSES
    }


def rate(result: dict[str, Any]) -> float:
    """Episodes a second, by the median step."""
    return result["spec"]["batch"] / median(result["seconds"])


def show(results: dict[str, Any]) -> str:
    by_name = {result["spec"]["contender"]: result for result in results["runs"]}
    rows, gaps = [], []
    for name, result in by_name.items():
        theirs = by_name.get(PAIRS.get(name, name))
        faster = times(rate(result) / rate(theirs)) if theirs else "-"
        took = seconds(median(result["seconds"]))
        rows.append([name, took, f"{rate(result):.3g}", faster, memory(result["peak_bytes"])])
        if theirs and name in PAIRS:
            found = largest_differences(result["losses"], theirs["losses"])
            gaps += [[name, loss, f"{gap:.1e}", f"{value:.1e}"] for loss, (gap, value) in found.items()]
    where = results["machine"]
    head = f"{where.get('gpu') or where['processor']}, {where['threads']} threads, torch {where['torch']}"
    table = markdown(["contender", "a step", "episodes a second", "of TRL's", "peak memory"], rows)
    if not gaps:
        return f"{head}\n\n{table}"
    return f"{head}\n\n{table}\n\n{markdown(['contender', 'logged', 'from TRL, at most', 'largest value'], gaps)}"


if __name__ == "__main__":
    sys.exit(command(parser, collect, show, child))
