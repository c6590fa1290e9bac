"""Terms that fail: `reward.on_error` stops and says on which caption, or leaves that caption out."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from mmft.config import load_recipe
from mmft.eval.evaluator import evaluate_captions
from mmft.functional.normalize import RunningStats
from mmft.report.folder import RunFolder, read_lines
from mmft.rewards import parallel
from mmft.rewards.combine import RewardFunction, Shaping, WeightedTerm, build_reward
from mmft.rewards.parallel import ParallelTerm, WorkerDied
from mmft.rewards.terms import Term
from mmft.types import Row, UserError

ROWS = [Row(f"r{i}", None, "p", ("one", "bad", "three")) for i in range(4)]


class Length(Term):
    """Letters of a caption; of one that is bad, what a test wants."""

    def __init__(self, bad: Any = None, alone: bool = True):
        self.bad, self.alone, self.calls = bad, alone, 0

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        self.calls += 1
        values: list[float] = []
        for caption in captions:
            if caption == "bad" and isinstance(self.bad, Exception) and (self.alone or len(captions) > 1):
                raise self.bad
            if caption != "bad" or self.bad is None or isinstance(self.bad, Exception):
                values.append(float(len(caption)))
            elif self.bad != "nothing":
                values.append(self.bad)
        return values


class Odd(Exception):
    """Cannot be sent from one process to another: it is made anew with other arguments."""

    def __init__(self, one: int, other: int):
        super().__init__(f"{one} and {other}")


def reward(on_error: str = "raise", bad: Any = None, alone: bool = True, normalize: str = "none") -> RewardFunction:
    terms = [WeightedTerm("plain", Length(), 2.0, normalize), WeightedTerm("picky", Length(bad, alone))]
    return RewardFunction(terms, on_error=on_error)  # type: ignore[arg-type]


FAULTS = [
    (KeyError("no such word"), "failed (KeyError: 'no such word')"),
    (UserError("the parser failed\non line 2"), "failed (the parser failed)"),
    (math.nan, "gave nan"),
    (-math.inf, "gave -inf"),
    ("nothing", "failed (it gave 0 values for 1 captions)"),
    ("word", "failed (ValueError: could not convert string to float: 'word')"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=[said for _, said in FAULTS])
@pytest.mark.parametrize("update", [True, False])
def test_the_caption_on_which_a_term_fails_is_named(fault: Any, said: str, update: bool) -> None:
    function = reward(bad=fault, normalize="zscore")
    with pytest.raises(UserError) as error:
        function(["one", "three", "bad", "bad"], ROWS, update=update)
    assert str(error.value) == f"reward term 'picky' {said} for sample 'r2', caption 'bad'"
    assert function.terms["plain"].stats == RunningStats(), "nothing was learned from a batch that failed"


def test_the_term_s_own_error_goes_along() -> None:
    fault = KeyError("no such word")
    with pytest.raises(UserError) as error:
        reward(bad=fault)(["one", "bad"], ROWS[:2])
    assert error.value.__cause__ is fault


@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=[said for _, said in FAULTS])
@pytest.mark.parametrize("update", [True, False])
def test_it_can_be_left_out(fault: Any, said: str, update: bool) -> None:
    """Two of four captions have a reward: 3 and 5 letters, counted twice by one term and once by the other."""
    function, told = reward("drop", fault), []
    function.on_drop = lambda reason, row, caption: told.append((reason, row.id, caption))
    output = function(["one", "bad", "three", "bad"], ROWS, update=update)
    assert output.total == [9.0, 0.0, 15.0, 0.0] and output.dropped == (1, 3)
    for stage in (output.raw, output.normalized, output.weighted):
        assert all(math.isnan(values[i]) == (i in output.dropped) for values in stage.values() for i in range(4))
    reason = f"reward term 'picky' {said} for sample '{{}}', caption 'bad'"
    assert told == [(reason.format(row), row, "bad") for row in ("r1", "r3")]


def test_nothing_is_asked_twice_where_nothing_failed() -> None:
    function = reward("drop")
    output = function(["one", "bad"], ROWS[:2])
    assert output.dropped == () and output.total == [9.0, 9.0]
    assert [entry.term.calls for entry in function.terms.values()] == [1, 1]


@pytest.mark.parametrize("normalize", ["zscore", "minmax"])
def test_normalisers_never_see_what_is_left_out(normalize: str) -> None:
    function = reward("drop", math.nan, normalize=normalize)
    without = reward(normalize=normalize)
    some, all_of = function(["one", "bad", "three"], ROWS[:3]), without(["one", "three"], ROWS[:2])
    assert [some.total[0], some.total[2]] == all_of.total
    assert function.terms["plain"].stats == without.terms["plain"].stats != RunningStats()


def test_a_batch_without_any_reward_stops() -> None:
    for update in (True, False):
        with pytest.raises(UserError, match="no caption of the batch has a reward: reward term 'picky' gave nan for"):
            reward("drop", math.nan)(["bad", "bad"], ROWS[:2], update=update)
    assert reward("drop", math.nan)([], []).total == []


@pytest.mark.parametrize("on_error", ["raise", "drop"])
def test_a_term_that_fails_on_a_batch_alone_stops(on_error: str) -> None:
    """No caption is to blame: memory that runs out, say."""
    with pytest.raises(UserError, match=r"'picky' fails on a batch of 2 captions, on none of them alone \(Memory"):
        reward(on_error, MemoryError(), alone=False)(["one", "bad"], ROWS[:2])


def test_in_several_processes_one_may_have_no_reward() -> None:
    """The values of another process come along: it has rewards of 1 and 2, so the mean is theirs."""
    function = reward("drop", math.nan, normalize="zscore")
    gathered: list[list[float]] = []

    def gather(values: Sequence[float]) -> list[float]:
        gathered.append(list(values))
        return [*values, 1.0, 2.0]

    function.gather = gather
    output = function(["bad", "bad"], ROWS[:2])
    assert output.dropped == (0, 1) and output.total == [0.0, 0.0]
    stats = function.terms["plain"].stats
    assert (stats.count, stats.mean) == (2, 1.5)
    assert gathered[0] == [0] and all(math.isnan(value) for value in gathered[1])
    function(["bad", "one"], ROWS[:2], update=False)
    assert len(gathered) == 2, "an evaluation is not the same in all processes, so it must not wait for the others"
    function.gather = list
    with pytest.raises(UserError, match="no caption of the batch"):
        function(["bad", "bad"], ROWS[:2])


def test_evaluation_and_ceiling_are_over_what_has_a_reward() -> None:
    function = reward("drop", math.nan)
    scores = evaluate_captions(["one", "bad"], ROWS[:2], function)
    assert scores["reward"][0] == 9.0 and math.isnan(scores["reward"][1])
    # References "one", "bad", "three" of each row: (9 + 15) / 2. A row with none that has a reward doesn't count.
    assert function.reference_reward(ROWS, leave_one_out=False) == 12.0
    other = Row("r9", None, "p", ("bad", "bad"))
    assert function.reference_reward([ROWS[0], other]) == 12.0


def test_the_log_of_a_batch_is_strict_json(tmp_path: Path) -> None:
    function, run = reward("drop", KeyError("x")), RunFolder.create(tmp_path, "a")
    function.on_drop = run.append_dropped
    captions = ["one", "bad"]
    run.write_samples(1, captions, ROWS[:2], function(captions, ROWS[:2]))
    line = (run / "samples.jsonl").read_text().splitlines()[1]
    sample = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert sample["reward"] == 0.0
    assert sample["terms"]["plain"] == {"raw": None, "normalized": None, "weighted": None}
    (dropped,) = read_lines(run / "dropped.jsonl")
    assert (dropped["id"], dropped["caption"]) == ("r1", "bad") and "KeyError: 'x'" in dropped["reason"]


def test_without_a_listener_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        reward("drop", math.nan)(["one", "bad"], ROWS[:2])
    assert caplog.messages == ["dropped: reward term 'picky' gave nan for sample 'r1', caption 'bad'"]


def test_a_users_function_may_fail_on_one_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a recipe, whose key it is."""
    code = "def f(captions, rows):\n    return [float(c) for c in captions]\n"
    (tmp_path / "numbers_said.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    terms = 'reward.terms=[{type: python, function: "numbers_said:f"}]'
    config = load_recipe("caption_ppo_fixed", [terms, "reward.on_error=drop"]).reward
    output = build_reward(config)(["1", "two", "3"], ROWS[:3])
    assert output.dropped == (1,) and output.total == [1.0, 0.0, 3.0]
    stops = build_reward(load_recipe("caption_ppo_fixed", [terms]).reward)
    with pytest.raises(UserError, match=r"for sample 'r1', caption 'two'$"):
        stops(["1", "two", "3"], ROWS[:3])


@pytest.mark.parametrize("on_error", ["raise", "drop"])
def test_a_dead_worker_stops_at_once(on_error: str) -> None:
    """Asked again caption by caption, it would die and be started each time."""
    function = reward(on_error, WorkerDied("a worker process died"))
    with pytest.raises(WorkerDied):
        function(["one", "bad"], ROWS[:2])
    assert function.terms["picky"].term.calls == 1


def test_errors_that_cannot_leave_a_worker_are_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for fault, kind, said in ((Odd(1, 2), UserError, "Odd: 1 and 2"), (KeyError("x"), KeyError, "'x'")):
        monkeypatch.setattr(parallel, "_term", Length(fault))
        with pytest.raises(kind) as error:
            parallel._score(["bad"], ROWS[:1], None)
        assert str(error.value) == said


def test_captions_are_left_out_in_worker_processes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def f(captions, rows):\n    return [float(c) for c in captions]\n"
    (tmp_path / "numbers_heard.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with ParallelTerm("python", {"function": "numbers_heard:f"}, workers=1) as term:
        output = RewardFunction([WeightedTerm("f", term)], on_error="drop")(["1", "two", "3"], ROWS[:3])
    assert output.dropped == (1,) and output.total == [1.0, 0.0, 3.0]


def test_a_potential_that_fails_is_named() -> None:
    function = RewardFunction([WeightedTerm("plain", Length())], Shaping(1.0, Length(KeyError("x"))))
    assert function.potentials([["", "one"]], ROWS[:1]) == [[0.0, 3.0]]
    with pytest.raises(UserError, match=r"^reward term 'shaping' failed \(KeyError: 'x'\)$"):
        function.potentials([["", "bad"]], ROWS[:1])


def test_training_goes_on_without_the_captions_left_out(tmp_path: Path) -> None:
    """Their tokens count in no mean: the step learns from the others alone."""
    data = tiny.rows(8)
    bad = {data[2].id, data[5].id}

    class Picky(Length):
        def __call__(self, captions: Any, rows: Any, finished: Any = None) -> list[float]:
            return [math.nan if row.id in bad else float(len(c)) for c, row in zip(captions, rows, strict=True)]

    function = RewardFunction([WeightedTerm("picky", Picky())], on_error="drop")
    seen: list[Any] = []
    trainer = tiny.trainer(tiny.vision_policy(eos_bias=1.0), tmp_path, data, reward=function)
    trainer.on_rollout = lambda step, rollout: seen.append(rollout)
    trainer.train()
    (rollout,), (log,) = seen, tiny.logs_of(trainer)
    kept = [i for i, row in enumerate(rollout.rows) if row.id not in bad]
    assert len(kept) == 6 and log["reward/dropped"] == 2.0
    lengths = [float(len(rollout.captions[i])) for i in kept]
    assert log["reward/raw/picky"] == log["objective/scores"] == pytest.approx(sum(lengths) / 6)
    assert all(math.isfinite(value) for value in log.values())
