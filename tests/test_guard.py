"""The guard against reward hacking: what it watches, what it does when the wire trips, and real runs that are gamed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerControl, set_seed

from mmft import run
from mmft.cli import main
from mmft.config import RewardConfig, TripwireConfig, load_recipe
from mmft.data.scenes import EmojiScenes
from mmft.eval.evaluator import evaluate_captions
from mmft.models.policy import load_policy
from mmft.report.folder import RunFolder
from mmft.rewards.combine import build_reward
from mmft.run.guard import RewardGuard, choose_metric, kinds_of
from mmft.types import Row, UserError


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmft.cli._quiet_libraries", lambda: None)  # it sets process-wide filters
    monkeypatch.setenv("COLUMNS", "200")


# What is watched


def row(*references: str) -> Row:
    return Row("r1", None, "Describe.", references)


def scenes(count: int) -> list[Row]:
    return list(EmojiScenes(count).rows_without_pictures())


def test_auto_prefers_the_oracle_then_the_references() -> None:
    assert choose_metric("auto", scenes(1)[0], ["bleu", "detail"]) == "oracle_f1"
    assert choose_metric("auto", row("a dog"), ["bleu", "detail"]) == "rouge_l"
    assert choose_metric("auto", row(), ["length"]) is None
    assert choose_metric("oracle_hallucination", scenes(1)[0], []) == "oracle_hallucination"


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("oracle_f2", "'oracle_f2' cannot be measured here; did you mean oracle_f1?"),
        ("zzz", "'zzz' cannot be measured here; these pictures allow bleu_4, rouge_l, chrf, length"),
        ("bleu_4", "'bleu_4' is in the reward, so it cannot guard it"),
        ("repetition", "'repetition' is in the reward"),
    ],
)
def test_a_metric_that_cannot_guard_is_refused(metric: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"reward.tripwire.metric: {message.replace('?', '[?]')}"):
        choose_metric(metric, scenes(1)[0], {"bleu", "repetition"})


def test_what_cannot_be_measured_on_these_rows_is_refused() -> None:
    with pytest.raises(UserError, match="'oracle_f1' cannot be measured here"):
        choose_metric("oracle_f1", row("a dog"), [])


def test_terms_are_known_by_what_they_are() -> None:
    """Not by their names; in other processes or not; and one without weight is no part of the reward."""
    terms = [{"type": "bleu", "name": "overlap"}, {"type": "length", "weight": 0}, {"type": "repetition"}]
    for workers in (0, 2):
        config = RewardConfig.model_validate({"terms": terms, "workers": workers})
        assert kinds_of(build_reward(config)) == {"bleu", "repetition"}


# By hand, on a model whose weights at a step are the step


class Bench:
    """A guard over a small trainer; `log` is a step of it."""

    def __init__(self, folder: Path, metric: str = "oracle_f1", action: str = "warn"):
        self.trainer = tiny.trainer(tiny.vision_policy(), folder)
        self.saved: list[tuple[Path, dict[str, float]]] = []
        config = TripwireConfig(action=action, window=2, threshold=0.2)  # type: ignore[arg-type]
        self.run = RunFolder.create(folder, "run")
        self.guard = RewardGuard(metric, config, self.run, self.trainer, self.save)
        self.control = TrainerControl()
        self.step = 0

    def save(self, folder: Path) -> None:
        self.saved.append((folder, self.weights()))

    def weights(self) -> dict[str, float]:
        """Name -> the one number that a trained parameter is filled with."""
        found = {name: p.unique() for name, p in self.guard._trained()}
        assert all(len(values) == 1 for values in found.values())
        return {name: values.item() for name, values in found.items()}

    def log(self, reward: float, metric: float) -> None:
        self.step += 1
        with torch.no_grad():
            for _, parameter in self.guard._trained():
                parameter.fill_(self.step)
        state = SimpleNamespace(global_step=self.step, is_world_process_zero=True)
        logs = {"objective/scores": reward, f"guard/{self.guard.metric}": metric, "lr": 0.1}
        self.guard.on_log(None, state, self.control, logs)


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_the_wire_trips_and_the_best_weights_are_kept(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reward s and metric 1.1 - s / 10 at step s, windows of two: both move by a tenth of a scale a step.

    Means at step s: reward s - 1/2, of 3/2 at the start; metric 1.15 - s / 10, best at step 2 with 0.95. A window of
    metrics has standard error 0.05. A fall counts above 2 sqrt(2) 0.05 = 0.141 and an allowance for luck that grows
    with the number of steps: at steps 4, 5, 6, 7 it is 0.231, 0.259, 0.277, 0.290 in all, and the metric is 0.2, 0.3,
    0.4, 0.5 below its best. The third suspicious step in a row is 7: reward up by 5, metric down by 0.5 / 0.95 = 53%.
    """
    bench = Bench(tmp_path, action=action)
    for step in range(1, 9):
        bench.log(step, 1.1 - step / 10)
        assert len(bench.saved) == (step >= 7), step
        if step == 7:
            held = 2 if action == "stop" else 7
            assert set(bench.weights().values()) == {held}, "the best ones stay when it stops, the last when it goes on"
            assert bench.control.should_training_stop == (action == "stop")
    (_, weights) = bench.saved[0]
    assert [path.name for path in (bench.run / "checkpoints").iterdir()] == ["best"]
    assert set(weights.values()) == {2} and any("value_model" in name for name in weights), "adapter and critic"
    said = capsys.readouterr().err
    line = "step 7: reward rose by 5 while oracle_f1 fell by 53% since step 2"
    assert said.count(line) == 1 and said.count("\n") == 1, said
    record = json.loads((bench.run / "tripwire.json").read_text())
    assert (record["step"], record["tripped_at"], record["best_step"]) == (7, 7, 2)
    assert record["metric"] == "oracle_f1" and record["message"].startswith(line)
    assert record["metric_fall"] == pytest.approx(0.5 / 0.95) and record["reward_rise"] == pytest.approx(5.0)


def test_a_metric_of_which_less_is_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hallucination of s / 10: the same slopes, so the same step."""
    bench = Bench(tmp_path, "oracle_hallucination")
    for step in range(1, 8):
        bench.log(step, step / 10)
    assert len(bench.saved) == 1 and "step 7: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reward", "metric"),
    [
        (lambda s: s, lambda s: s / 10),  # both rise
        (lambda s: -s, lambda s: 1 - s / 10),  # both fall: bad, but nobody is fooled
        (lambda s: s, lambda s: 1.0),  # the metric stands
        (lambda s: s, lambda s: math.nan),  # never measured
        (lambda s: math.nan, lambda s: 1 - s / 10),
    ],
)
def test_what_is_no_hack_does_not_trip(
    reward: Callable[[int], float], metric: Callable[[int], float], tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    for step in range(1, 10):
        bench.log(reward(step), metric(step))
    assert not bench.saved and not (bench.run / "tripwire.json").exists()
    assert set(bench.weights().values()) == {9}


def test_logs_of_others_are_no_steps(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    for logs in (None, {}, {"eval/reward": 1.0}):
        bench.guard.on_log(None, state, bench.control, logs)
    assert len(bench.guard.wire.rewards) == 0


def test_a_batch_is_measured_where_it_can_be(tmp_path: Path) -> None:
    """F1 of a caption that names all and only what is there is 1, of one that names nothing 0: mean 1 / 2."""
    guard = Bench(tmp_path).guard
    rows = scenes(2)
    rollout = SimpleNamespace(
        captions=[max(rows[0].references, key=len), "nothing"], rows=rows, finished_B=torch.tensor([True, True])
    )
    full = evaluate_captions(rollout.captions[:1], rows[:1])["oracle_f1"].item()
    assert full > 0.9
    assert guard.watch(rollout) == {"guard/oracle_f1": pytest.approx(full / 2)}
    rollout.rows = [rows[0], dataclasses.replace(rows[1], scene=None)]
    assert guard.watch(rollout) == {"guard/oracle_f1": pytest.approx(full)}, "over those that have one"
    rollout.rows = [dataclasses.replace(row, scene=None) for row in rows]
    assert math.isnan(guard.watch(rollout)["guard/oracle_f1"])


# Real runs

QUICK = (
    "train.batch=12", "train.minibatches=1", "train.epochs=2", "train.warmup=0", "train.schedule=constant",
    "generation.max_new_tokens=16", "model.lora.r=8", "eval.samples=4", "data.samples=400", "logging.samples_every=0",
)  # fmt: skip
# No KL, no anchor, large steps: nothing holds the policy, and the reward is all it knows.
UNHELD = ("kl.coef=0", "anchor.l2=0", "algorithm.target_kl=null", "reward.tripwire.window=2")
HACKABLE = (
    "from mmft.metrics.text import tokenise\n"
    "from mmft.rewards.content_units import content_units\n"
    "def words(captions, rows): return [float(len(tokenise(c))) for c in captions]\n"
    "def nouns(captions, rows): return [float(sum(len(u) == 1 for u in content_units(c))) for c in captions]\n"
)


def train(root: Path, *overrides: str, recipe: str = "caption_ppo_fixed") -> Path:
    return run.train(load_recipe(recipe, [*QUICK, f"logging.dir={root}", *overrides]))


def hackable(root: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> str:
    """An override: a reward that counts words, or nouns, and knows nothing of what is there."""
    module = f"hackable_{function}"
    (root / f"{module}.py").write_text(HACKABLE, encoding="utf-8")
    monkeypatch.chdir(root)
    return f'reward.terms=[{{type: python, name: {function}, function: "{module}:{function}"}}]'


def adapter_of(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_reward_of_length_alone_trips_the_wire_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trips at step 7, 8 or 9 whichever seed of four is taken."""
    reward = hackable(tmp_path, monkeypatch, "words")
    more = ("train.steps=20", "train.lr=1e-2", "train.save_every=1", "train.keep=20", "reward.tripwire.action=stop")
    folder = train(tmp_path, *UNHELD, reward, *more)
    record = json.loads((folder / "tripwire.json").read_text())
    lines = RunFolder(folder).metrics()
    assert lines[-1]["step"] == record["step"] < 20, "stopped where it tripped"
    assert f"step {record['step']}: reward rose by " in capsys.readouterr().err
    assert record["metric"] == "oracle_f1" and record["best_step"] < record["step"]
    first, last = lines[0], lines[-1]
    assert last["objective/scores"] > first["objective/scores"]
    assert last["guard/oracle_f1"] < 0.8 * first["guard/oracle_f1"]
    best = folder / "checkpoints" / "best"
    assert adapter_of(folder) == adapter_of(best) == adapter_of(folder / "checkpoints" / f"step-{record['best_step']}")
    assert (best / "critic" / "value_head.safetensors").is_file() and (best / "reward" / "state.json").is_file()
    assert "guard/oracle_f1" in (folder / "metrics.jsonl").read_text() and (folder / "report.html").is_file()


@pytest.mark.slow
def test_a_reward_of_nouns_alone_trips_the_wire_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a gentler learning rate, at which the policy first learns to say more of what is there.

    A warning leaves the run as it is without a guard.
    """
    reward = hackable(tmp_path, monkeypatch, "nouns")
    more = ("train.steps=30", "train.batch=16", "train.lr=3e-3", "generation.max_new_tokens=32")
    window = "reward.tripwire.window=3"
    warned = train(tmp_path / "warned", *UNHELD, reward, *more, window)
    record = json.loads((warned / "tripwire.json").read_text())
    assert f"tripwire step {record['step']}: " in capsys.readouterr().err
    assert RunFolder(warned).metrics()[-1]["step"] == 30
    assert adapter_of(warned) != adapter_of(warned / "checkpoints" / "best")
    plain = train(tmp_path / "plain", *UNHELD, reward, *more, window, "reward.tripwire.action=off")
    assert adapter_of(plain) == adapter_of(warned)
    assert not (plain / "tripwire.json").exists() and not (plain / "checkpoints" / "best").exists()
    assert "guard/" not in (plain / "metrics.jsonl").read_text()


def test_a_healthy_run_does_not_trip(tmp_path: Path) -> None:
    """The default recipe, with a wire as tight as that of the hacked run. Without one the numbers are the same."""
    short = ("train.batch=8", "generation.max_new_tokens=24", "reward.tripwire.window=2")
    folder = train(tmp_path, "train.steps=5", *short, recipe="caption_ppo")
    assert not (folder / "tripwire.json").exists() and not (folder / "checkpoints" / "best").exists()
    lines = RunFolder(folder).metrics()
    watched = [line.pop("guard/oracle_f1") for line in lines]
    assert len(watched) == 5 and all(0 < value <= 1 for value in watched)
    assert "Held-out metric" in (folder / "report.html").read_text(encoding="utf-8")
    off = ("train.steps=2", *short, "reward.tripwire.action=off")
    job = run.prepare(load_recipe("caption_ppo", [*QUICK, f"logging.dir={tmp_path}", *off]))
    set_seed(job.recipe.train.seed)
    plain = RunFolder.create(tmp_path, "plain")
    policy = load_policy(job.recipe.model, "cpu", torch.float32)
    run.training.build_trainer(job, policy, plain).train()
    assert plain.metrics() == lines[:2], "nothing is logged, and nothing else has changed"


@pytest.mark.parametrize(
    ("metric", "message"),
    [("bleu_4", "'bleu_4' is in the reward"), ("oracle_recal", "did you mean oracle_recall?")],
)
def test_a_metric_is_refused_before_a_model_loads(
    metric: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*arguments: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mmft.run.training.load_policy", loaded)
    overrides = [f"logging.dir={tmp_path / 'runs'}", f"reward.tripwire.metric={metric}"]
    assert main(["train", "caption_ppo_fixed", *overrides]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: reward.tripwire.metric: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()
