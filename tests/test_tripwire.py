"""The tripwire by hand, and on simulated runs: it must see a hacked one and leave a healthy one alone."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable

import pytest

from mmft.train.tripwire import Tripwire, TripwireState

Curve = Callable[[int], tuple[float, float]]  # step -> expected reward and metric
NAN = float("nan")


def simulate(curve: Curve, seed: int, steps: int, wire: Tripwire | None = None, noise: float = 0.05) -> Tripwire:
    rng, wire = random.Random(seed), wire or Tripwire()
    for step in range(1, steps + 1):
        reward, metric = curve(step)
        wire.update(step, reward + rng.gauss(0, noise), metric + rng.gauss(0, noise))
    return wire


def feed(wire: Tripwire, pairs: Iterable[tuple[float, float]], first: int = 1) -> list[TripwireState]:
    return [wire.update(step, reward, metric) for step, (reward, metric) in enumerate(pairs, first)]


def healthy(step: int) -> tuple[float, float]:
    return 1 - math.exp(-step / 60), 0.4 + 0.3 * (1 - math.exp(-step / 60))


def plateau(step: int) -> tuple[float, float]:
    return 1 - math.exp(-step / 60), 0.6


def nothing_learned(step: int) -> tuple[float, float]:
    return 0.0, 0.6


def both_fall(step: int) -> tuple[float, float]:
    return 1 - step / 200, 0.6 - step / 400


def hacked(step: int) -> tuple[float, float]:
    """The metric rises to 0.6 at step 100, then loses 0.006 a step."""
    return step / 200, 0.4 + step / 500 if step <= 100 else max(0.1, 0.6 - 0.006 * (step - 100))


# By hand


STEP_CHANGE = [(0.0, 1.0)] * 2 + [(4.0, 0.5)] * 12


def test_levels_by_hand() -> None:
    states = feed(Tripwire(window=2), STEP_CHANGE[:4])
    assert states[0] == TripwireState(1)  # no full window yet
    assert states[1] == TripwireState(2, 0.0, 0.0, best_step=2, is_best=True)
    # reward (0 + 4) / 2 - 0 = 2; metric 1 - (1 + 0.5) / 2 = 0.25, of a best of 1
    assert states[2] == TripwireState(3, 2.0, 0.25, best_step=2)
    assert states[3] == TripwireState(4, 4.0, 0.5, best_step=2)


@pytest.mark.parametrize(("patience", "expected"), [(1, 12), (3, 14)])
def test_trips_when_the_fall_exceeds_noise_by_hand(patience: int, expected: int) -> None:
    # The fall is 0.5 from step 4 on. One window, (1, 0.5), has scatter: variance 0.125, squared error 0.0625.
    # Step 11 is the 10th full window: error sqrt(0.0625 / 10) = 0.07906, luck sqrt(2 ln 5) = 1.7941,
    #   noise (2 sqrt 2 + 2 * 1.7941) * 0.07906 = 0.5073 > 0.5
    # Step 12, the 11th: sqrt(0.0625 / 11) = 0.07538, sqrt(2 ln 5.5) = 1.8465, (2.8284 + 3.6930) * 0.07538 = 0.4916
    states = feed(Tripwire(window=2, patience=patience), STEP_CHANGE)
    assert [state.step for state in states if state.trips_now] == [expected]
    assert states[-1].tripped_at == expected and states[-1].fell_since == 2
    assert states[expected - 2].tripped_at is None


def test_rise_must_exceed_noise_by_hand() -> None:
    # Start (0, 2): mean 1, standard error sqrt(2) / sqrt(2) = 1. Later rewards are constant: noise 2 * 1 = 2.
    # Metric: 1 until step 2, then 0.5; by step 14 its fall is beyond noise (see above).
    def states(reward: float) -> list[TripwireState]:
        return feed(Tripwire(window=2), [(0.0, 1.0), (2.0, 1.0)] + [(reward, 0.5)] * 12)

    assert states(2.99)[-1].tripped_at is None  # rise 1.99
    assert states(3.01)[-1].tripped_at == 14


def test_threshold_is_a_share_of_the_best() -> None:
    # 0.5 of a best of 1 on the numbers above
    assert feed(Tripwire(threshold=0.51, window=2), STEP_CHANGE)[-1].tripped_at is None
    assert feed(Tripwire(threshold=0.49, window=2), STEP_CHANGE)[-1].tripped_at == 14


@pytest.mark.parametrize(
    ("best", "now", "fall"),
    [(0.0, -0.3, 1.0), (-0.3, -0.4, 0.25), (0.3, -0.3, 2.0), (0.0, 0.0, 0.0)],
)
def test_fall_of_metrics_that_are_not_positive(best: float, now: float, fall: float) -> None:
    states = feed(Tripwire(window=2), [(0.0, best)] * 2 + [(1.0, now)] * 2)
    assert states[-1].metric_fall == pytest.approx(fall)


def test_best_step_is_the_end_of_the_best_window() -> None:
    states = feed(Tripwire(window=2), [(0.0, m) for m in (0.1, 0.3, 0.5, 0.3, 0.2)])
    # means from step 2: 0.2, 0.4, 0.4, 0.25; an equal is not a new best
    assert [state.is_best for state in states] == [False, True, True, False, False]
    assert states[-1].best_step == 3


@pytest.mark.parametrize("gap", [(NAN, 0.5), (4.0, NAN), (math.inf, 0.5)])
def test_undefined_values_are_passed_over(gap: tuple[float, float]) -> None:
    plain = feed(Tripwire(window=2), STEP_CHANGE)
    wire = Tripwire(window=2)
    for index, pair in enumerate(STEP_CHANGE):
        state = wire.update(index + 1, *pair)
        between = wire.update(index + 1, *gap)
        assert state == plain[index]
        assert not between.is_best and between.tripped_at == state.tripped_at
        assert between.metric_fall == state.metric_fall


@pytest.mark.parametrize("options", [{"threshold": -0.1}, {"window": 1}, {"patience": 0}])
def test_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="window >= 2"):
        Tripwire(**options)


def test_description() -> None:
    wire = Tripwire(window=2)
    feed(wire, STEP_CHANGE)
    assert wire.trip is not None
    assert wire.trip.describe("oracle_recall") == (
        "reward rose by 4 while oracle_recall fell by 50% since step 2: "
        "the reward is probably being hacked; best checkpoint: step 2"
    )


# Simulated runs


@pytest.mark.parametrize("curve", [healthy, plateau, nothing_learned, both_fall])
def test_no_false_alarms(curve: Curve) -> None:
    trips = [seed for seed in range(50) if simulate(curve, seed, steps=200).trip]
    assert trips == []


def test_hacked_runs_trip_soon_after_the_fall() -> None:
    for seed in range(50):
        trip = simulate(hacked, seed, steps=200).trip
        assert trip is not None and trip.tripped_at is not None
        # 10% of 0.6 is lost at step 110; with a noise of 8% a batch some more steps are needed to be sure.
        assert 110 <= trip.tripped_at <= 150
        assert trip.fell_since is not None and 70 <= trip.fell_since <= 115


def test_first_trip_stays() -> None:
    states = feed(Tripwire(window=2), [*STEP_CHANGE, *[(5.0, 3.0)] * 3])
    # The metric recovers: the best moves on, where the wire tripped does not.
    assert states[-1].best_step == 16 and states[-1].metric_fall == 0.0
    assert (states[-1].tripped_at, states[-1].fell_since) == (14, 2)
    assert [state.trips_now for state in states].count(True) == 1


@pytest.mark.parametrize("cut", [0, 5, 60, 118, 150])
def test_resumes_exactly(cut: int) -> None:
    rng = random.Random(3)
    pairs = [tuple(value + rng.gauss(0, 0.05) for value in hacked(step)) for step in range(1, 201)]
    whole = Tripwire()
    states = feed(whole, pairs)
    first, second = Tripwire(), Tripwire()
    feed(first, pairs[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert feed(second, pairs[cut:], cut + 1) == states[cut:]
    assert second.state_dict() == whole.state_dict()
    assert states[-1].tripped_at is not None
