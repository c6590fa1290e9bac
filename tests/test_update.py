"""The update: which rows go together, what is computed once, and what happens where memory runs out."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import LlamaForCausalLM, set_seed
from trl.experimental.ppo import PPOConfig

from mmft.functional import lm_head
from mmft.models.policy import Policy
from mmft.models.prompts import Prompt
from mmft.models.scoring import TokenScores
from mmft.train import rollout as rollouts
from mmft.train import update
from mmft.train.experience import Experience, ppo_loss
from mmft.train.metrics import PhaseTimer, add_up
from mmft.train.ppo import VisionPPOTrainer
from mmft.train.ppo_config import VisionPPOConfig
from mmft.train.update import Updater
from mmft.types import Row

GROUPED = {"samples_per_prompt": 2, "total_episodes": 16, "learning_rate": 3e-3}
# Adam with a large epsilon is linear in the gradient: its own would turn rounding into whole steps.
GENTLY = {"learning_rate": 0.3, "adam_epsilon": 1.0, "max_grad_norm": 100.0}


def trained(folder: Path, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    set_seed(5)
    trainer = tiny.trainer(tiny.vision_policy(eos_bias=3.0), folder, **GROUPED | changes)
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.policy_model.named_parameters() if p.requires_grad}
    return trainer, weights


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


# Which rows go together


def test_micro_batches_keep_prompts_together_and_long_rows_first(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.vision_policy(), tmp_path, samples_per_prompt=2, per_device_train_batch_size=4)
    prompts = [p for p in (trainer.builder(row) for row in tiny.rows(4)) for _ in range(2)]
    mask = torch.ones(8, 6, dtype=torch.bool)
    order = [torch.tensor([6, 0, 7, 1, 4, 2, 5, 3])]
    (micro,) = trainer.updater.micro_batches(order, prompts, mask)
    rows = torch.cat(micro).tolist()
    assert sorted(rows) == list(range(8)) and [len(m) for m in micro] == [4, 4]
    assert all(rows[i] // 2 == rows[i + 1] // 2 for i in range(0, 8, 2))
    lengths = [len(prompts[i]) for i in rows]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1


def cut(rows: list[list[int]], micro: int, share: bool = True, args: Any = None) -> list[list[list[int]]]:
    """Micro-batches of minibatches. Rows 0, 1, 4 ask prompt A (3 tokens), 2, 3, 5, 6 ask B (5); answers as below."""
    a, b = Prompt(torch.tensor([5, 6, 7])), Prompt(torch.tensor([4, 4, 4, 4, 4]))
    prompts, lengths = [a, a, b, b, a, b, b], torch.tensor([1, 4, 2, 2, 9, 3, 1])
    args = args or VisionPPOConfig(output_dir="unused", report_to=[], per_device_train_batch_size=micro)
    updater = Updater(SimpleNamespace(args=args, interface=SimpleNamespace(share_prompts=share)))
    found = updater.micro_batches([torch.tensor(r) for r in rows], prompts, torch.arange(9) < lengths[:, None])
    return [[part.tolist() for part in minibatch] for minibatch in found]


def test_micro_batches_by_hand() -> None:
    """Prompt and answer together: A has 4, 7, 12 tokens, B 7, 7, 8, 6."""
    everything = [[6, 5, 4, 3, 2, 1, 0]]
    # A holds the longest row, so its rows come first, longest first; then B's
    assert cut(everything, 3) == [[[4, 1, 0], [5, 2, 3], [6]]]
    # by length alone where prompts are not shared, equal ones in the order of rows
    assert cut(everything, 3, share=False) == [[[4, 5, 1], [2, 3, 6], [0]]]
    # each minibatch by itself
    assert cut([[6, 0], [5, 1, 4]], 2) == [[[0, 6]], [[4, 1], [5]]]


def test_trls_order_is_left_as_drawn() -> None:
    args = PPOConfig(output_dir="unused", report_to=[], bf16=False, per_device_train_batch_size=2)
    assert cut([[6, 0, 5], [1, 2]], 2, args=args) == [[[6, 0], [5]], [[1, 2]]]


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 7, 50])
def test_micro_batches_are_a_partition(micro: int) -> None:
    rows = [[3, 0, 6], [2, 5, 1, 4]]
    found = cut(rows, micro)
    assert [sorted(i for part in minibatch for i in part) for minibatch in found] == [sorted(r) for r in rows]
    assert all(len(part) <= micro for minibatch in found for part in minibatch)
    assert [len(minibatch) for minibatch in found] == [-(-len(r) // micro) for r in rows]


# What is computed once


def test_the_first_pass_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring's graph serves the update: a forward pass less a step, and the same numbers and weights to the bit."""
    passes: list[bool] = []
    forward = rollouts.forward

    def counted(*args: Any, **options: Any) -> TokenScores:
        passes.append(torch.is_grad_enabled())
        return forward(*args, **options)

    monkeypatch.setattr(rollouts, "forward", counted)
    once, weights = trained(tmp_path / "once")
    with_graph = sum(passes)
    passes.clear()
    score = Updater.score

    def without(self: Any, *args: Any) -> Any:
        scored = score(self, *args)
        scored.live = None
        return scored

    monkeypatch.setattr(Updater, "score", without)
    twice, again = trained(tmp_path / "again")
    assert sum(passes) == with_graph + 2, "two steps, one pass more in each"
    assert_close(weights, again, 0.0)
    for ours, theirs in zip(tiny.logs_of(once), tiny.logs_of(twice), strict=True):
        names = {name for name in ours if not name.startswith("time/")}
        assert ours["policy/ratio_first"] == 1.0
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_shared_prompts_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of two epochs of two minibatches, from the same orders."""
    shuffled = VisionPPOTrainer._order

    def together(trainer: Any, step: int, epoch: int) -> Any:
        trainer.interface.share_prompts, kept = True, trainer.interface.share_prompts
        try:
            return shuffled(trainer, step, epoch)
        finally:
            trainer.interface.share_prompts = kept

    monkeypatch.setattr(VisionPPOTrainer, "_order", together)
    results = []
    for share in (True, False):
        trainer, weights = trained(tmp_path / str(share), share_prompts=share, **GENTLY)
        assert trainer.interface.share_prompts == share
        results.append((weights, dict(trainer.value_model.state_dict()), trainer))
    (ours, our_critic, shared), (theirs, their_critic, apart) = results
    assert_close(ours, theirs, 1e-4)
    assert_close(our_critic, their_critic, 1e-4)
    started = tiny.vision_policy(eos_bias=3.0).model.state_dict()
    assert max(float((weight - started[name]).abs().max()) for name, weight in ours.items()) > 1e-2
    for one, other in zip(tiny.logs_of(shared), tiny.logs_of(apart), strict=True):
        for name in ("objective/scores", "objective/entropy", "objective/kl", "loss/policy_avg", "loss/value_avg"):
            assert one[name] == pytest.approx(other[name], abs=1e-3), name


def test_shared_prompts_have_the_same_gradients(tmp_path: Path) -> None:
    """One micro-batch of four prompts with two answers each, forward and backward."""
    found = []
    for share in (True, False):
        trainer = tiny.trainer(tiny.vision_policy(), tmp_path)
        tiny.stirred(trainer.policy_model, 0.2)
        prompts = [p for p in (trainer.builder(row) for row in tiny.rows(4)) for _ in range(2)]
        trainer.interface.share_prompts, trainer.interface.checked = share, True
        tokens = tiny.answers(8, 5)
        mask = torch.arange(5)[None, :] < torch.tensor([5, 3, 1, 5, 4, 4, 2, 5])[:, None]
        scores = rollouts.forward(trainer.model, trainer.interface, prompts, tokens, mask, torch.arange(8))
        packed = trainer.interface.pack(prompts, tokens, mask)
        assert len(packed.inputs["input_ids"]) == (4 if share else 8)
        (scores.logprobs_BT * mask).sum().backward()
        grads = {n: p.grad.clone() for n, p in trainer.policy_model.named_parameters() if p.grad is not None}
        found.append((scores.logprobs_BT[mask].detach(), scores.value_BT[mask].detach(), grads))
    (lp, v, ours), (expected_lp, expected_v, theirs) = found
    torch.testing.assert_close(lp, expected_lp, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(v, expected_v, atol=1e-4, rtol=1e-4)
    assert ours.keys() == theirs.keys() and len(ours) > 4
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=1e-3)


def test_without_a_kl_there_is_no_reference_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 8 rows in micro-batches of 4: 2 passes of scoring, 2 of the reference, and 4 - 1 in two epochs."""
    counts = {}
    forward = rollouts.forward
    for coef in (0.0, 0.05):
        passes: list[bool] = []

        def counted(*args: Any, passes: list[bool] = passes, **options: Any) -> TokenScores:
            passes.append(len(args) < 7 or args[6])
            return forward(*args, **options)

        monkeypatch.setattr(rollouts, "forward", counted)
        trainer, _ = trained(tmp_path / str(coef), kl_coef=coef)
        counts[coef] = len(passes) / 2, passes.count(False) / 2
        logs = tiny.logs_of(trainer)
        assert all(("objective/kl" in log) == bool(coef) for log in logs)
        assert (logs[1]["objective/non_score_reward"] == 0) == (coef == 0)
    assert counts == {0.0: (5, 0), 0.05: (7, 2)}


def test_a_kl_that_is_steered_needs_the_reference_even_at_0(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path, kl_coef=0.0, kl_target=1.0)
    assert all("objective/kl" in log for log in tiny.logs_of(trainer))


def test_the_critics_adapter_learns_beside_the_policys(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.vision_policy(eos_bias=3.0), tmp_path, **GROUPED, critic="adapter")
    before = {n: p.detach().clone() for n, p in trainer.policy_model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {n for n, p in trainer.policy_model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert any(".critic." in n for n in moved) and any(".default." in n for n in moved)
    groups = trainer.optimizer.param_groups
    critic = {id(p) for n, p in trainer.policy_model.named_parameters() if ".critic." in n}
    assert critic <= {id(p) for p in groups[1]["params"]} and not critic & {id(p) for p in groups[0]["params"]}
    assert [log["policy/ratio_first"] for log in tiny.logs_of(trainer)] == [1.0, 1.0]


# Where memory runs out

# Made anew each time: an error that was raised before holds the frames that it came through.
FULL: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory."),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9."),
}
PASSES: dict[str, Callable[[bool], bool]] = {
    "any": lambda values: True,
    "scoring": lambda values: values and not torch.is_grad_enabled(),
    "reference": lambda values: not values,
    "update": lambda values: torch.is_grad_enabled(),
}


def limited(monkeypatch: pytest.MonkeyPatch, rows: int, where: str, error: str) -> list[int]:
    """A memory that holds so many rows in the passes of one kind; returns how many each pass that fitted had."""
    forward, sizes = rollouts.forward, []

    def small(
        model: Any, feeds: Any, prompts: Any, responses: Any, mask: Any, index: Any, values: bool = True, **options: Any
    ) -> TokenScores:
        if len(index) > rows and PASSES[where](values):
            raise FULL[error]()
        sizes.append(len(index))
        return forward(model, feeds, prompts, responses, mask, index, values, **options)

    monkeypatch.setattr(rollouts, "forward", small)
    return sizes


@pytest.mark.parametrize(
    ("where", "rows", "error"),
    [
        ("any", 1, "cuda"), ("any", 2, "cpu"), ("scoring", 2, "cuda"), ("reference", 2, "cuda"),
        ("reference", 1, "cuda"), ("update", 3, "cuda"),
    ],
)  # fmt: skip
def test_out_of_memory_halves_the_rows_and_changes_nothing(
    where: str, rows: int, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it happens, and whatever was computed before it with more rows at once."""
    _, expected = trained(tmp_path / "whole", **GENTLY)
    sizes = limited(monkeypatch, rows, where, error)
    trainer, weights = trained(tmp_path / "small", **GENTLY)
    assert trainer.updater.micro_batch == min(rows, 2) and max(sizes[-8:]) <= rows
    assert "going on with 2 rows at once" in caplog.text
    assert_close(weights, expected, 1e-6)
    assert [log["policy/ratio_first"] for log in tiny.logs_of(trainer)] == pytest.approx([1.0, 1.0], abs=1e-6)


def test_memory_that_runs_out_within_a_minibatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some micro-batches have left their gradients: they are dropped, and the minibatch begins anew."""
    pairs = GENTLY | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    _, expected = trained(tmp_path / "whole", **pairs)
    loss, calls = update.ppo_loss, []

    def failing(*args: Any) -> Any:
        calls.append(len(args[2]))
        if len(calls) == 4:
            raise FULL["cuda"]()
        return loss(*args)

    monkeypatch.setattr(update, "ppo_loss", failing)
    trainer, weights = trained(tmp_path / "small", **pairs)
    assert calls[:8] == [2, 2, 2, 2, 1, 1, 1, 1] and trainer.updater.micro_batch == 1
    assert_close(weights, expected, 1e-6)
    assert all(log["update/minibatches"] == 4 for log in tiny.logs_of(trainer)), "a minibatch counts once"


@pytest.mark.parametrize("where", ["reference", "update"])
def test_a_graph_that_is_given_up_does_not_live_on(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring's: the next try would find the memory as full as before. A graph by then is one of its own."""
    graphs: list[Any] = []
    alive: list[int] = []
    forward, loss = rollouts.forward, update.ppo_loss

    def tried() -> None:
        gc.collect()
        alive.append(sum(graph() is not None for graph in graphs))
        if len(alive) == 1:
            raise FULL["cuda"]()

    def watched_forward(*args: Any, **options: Any) -> TokenScores:
        if where == "reference" and PASSES["reference"](len(args) < 7 or args[6]):
            tried()
        scores = forward(*args, **options)
        if scores.logprobs_BT.requires_grad:
            graphs.append(weakref.ref(scores.logprobs_BT))
        return scores

    def watched_loss(*args: Any) -> Any:
        if where == "update":
            tried()
        return loss(*args)

    monkeypatch.setattr(rollouts, "forward", watched_forward)
    monkeypatch.setattr(update, "ppo_loss", watched_loss)
    trained(tmp_path, total_episodes=8)
    assert alive[:2] == ([1, 0] if where == "reference" else [1, 1])


def test_a_single_row_that_does_not_fit_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 0, "any", "cuda")
    with pytest.raises(torch.OutOfMemoryError):
        trained(tmp_path)


def test_other_errors_are_not_taken_for_a_full_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(rollouts, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trained(tmp_path)


def kept_by_the_update(vocabulary: int, trained_head: bool, folder: Path) -> tuple[int, int]:
    """(largest, sum) of the elements that a micro-batch's loss keeps for its backward pass, weights left out."""
    torch.manual_seed(0)
    model = tiny.with_lora(LlamaForCausalLM(tiny.llama_config(vocab_size=vocabulary)))
    model.lm_head.requires_grad_(trained_head)
    trainer = tiny.trainer(Policy(model, tiny.tokenizer()), folder, [Row(str(i), None, "a b c") for i in range(8)])
    prompts = [trainer.builder(Row("0", None, "a b c d"))] * 8
    tokens = torch.randint(2, 18, (8, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    weights = {p.data_ptr() for p in trainer.model.parameters()}
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            sizes.append(tensor.numel())
        return tensor

    zeros = torch.zeros(8, 40)
    experience = Experience(mask, mask, zeros, zeros, zeros + 1, zeros, zeros, zeros, zeros, zeros.sum())
    rows = torch.arange(8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = rollouts.forward(trainer.model, trainer.interface, prompts, tokens, mask, rows, entropy_grad=True)
        ppo_loss(scores, experience, rows, 0.2, 0.2, 0.1, 0.01)
    return max(sizes), sum(sizes)


@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen head", "trained head"])
def test_the_update_keeps_nothing_of_vocabulary_by_sequence(
    trained_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the vocabulary, and not a number more. The most for 320 states are the critic's 256 each."""
    monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", 2**14)
    small, large = (kept_by_the_update(v, trained_head, tmp_path / str(v)) for v in (1000, 2000))
    assert small == large and small[0] <= 8 * 40 * 256


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_recomputed_activations_give_the_same_gradients(tmp_path: Path) -> None:
    """In bf16 on a CPU, where frozen layers have their weights in a layout of their own in all other passes."""
    gradients = []
    for recomputed in (False, True):
        model = tiny.with_lora(tiny.llava().to(torch.bfloat16))
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        trainer = tiny.trainer(Policy(tiny.stirred(model, 0.2), tiny.processor()), tmp_path)
        if recomputed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            trainer.model.train()
        prompts = [trainer.builder(row) for row in tiny.rows(4)]
        tokens = tiny.answers(4, 5)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        scores = rollouts.forward(trainer.model, trainer.interface, prompts, tokens, mask, torch.arange(4))
        scores.logprobs_BT.sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert_close(gradients[1], gradients[0], 0.0)


# Numbers about it


def test_the_parts_of_a_step_are_timed(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path)
    log = tiny.logs_of(trainer)[-1]
    parts = [log[f"time/{part}"] for part in ("sample", "score", "reference", "reward", "update")]
    assert all(part > 0 for part in parts)
    assert sum(parts) <= log["time/step"]


def test_a_phase_counts_as_often_as_it_is_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 1 each time it is read."""
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    timer = PhaseTimer(torch.device("cpu"))  # 0
    with timer("sample"):  # 1 .. 2
        pass
    with pytest.raises(ValueError), timer("sample"):  # 3 .. 4
        raise ValueError
    with timer("update"), timer("within"):  # 5 .. 8, 6 .. 7
        pass
    assert timer.stop() == {"time/step": 9.0, "time/sample": 2.0, "time/update": 3.0, "time/within": 1.0}
    timer.start()  # 10
    assert timer.stop() == {"time/step": 1.0}


def test_parts_add_up_by_their_share_of_tokens() -> None:
    """2 and 6 of 8 tokens; of the values' 10, 4 and 6."""
    totals: dict[str, float] = defaultdict(float)
    add_up(totals, {"policy/approx_kl": 1.0, "policy/ratio_max": 3.0, "loss/value": 1.0, "value/x": 2.0}, 0.25, 0.4)
    add_up(totals, {"policy/approx_kl": 3.0, "policy/ratio_max": 2.0, "loss/value": 3.0, "value/x": 0.0}, 0.75, 0.6)
    expected = {"policy/approx_kl": 2.5, "policy/ratio_max": 3.0, "loss/value": 2.2, "value/x": 0.8}
    assert totals == pytest.approx(expected)
