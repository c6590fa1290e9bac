"""Rewards put together: a learned model beside terms, its uncertainty, shaping in the live trainer, other processes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.testing import assert_close
from transformers import set_seed

import mmft.train.ppo
from mmft.config import RewardConfig, load_reward_recipe
from mmft.models.reward import CaptionRewardModel, load_reward_model
from mmft.rewards.combine import RewardFunction, Shaping, WeightedTerm, build_reward
from mmft.rewards.learned import NETWORK, UNCERTAINTY, NetworkTerm
from mmft.rewards.terms import Term, build_term
from mmft.run.reward_training import build_model
from mmft.types import Row, UserError

SMALL = ("model.hidden=16", "model.heads=2", "model.layers=1", "model.image_tokens=4", "model.mc_samples=4")
TERMS = (
    {"type": "bleu", "weight": 0.5},
    {"type": "detail", "weight": 2.0, "consensus": 1.0},
    {"type": "length", "weight": 0.25, "target": [3, 9]},
)
SCALE, NETWORK_WEIGHT = 4.0, 0.125


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model that was never trained: weights of three terms and of a network that depends on what it sees."""
    torch.manual_seed(0)
    model = build_model(load_reward_recipe("preference_bt", SMALL))
    tiny.stirred(model, 0.3)
    model.config.terms = [dict(term) for term in TERMS]
    model.config.network_weight, model.config.reward_scale = NETWORK_WEIGHT, SCALE
    path = tmp_path_factory.mktemp("reward")
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Terms without a network."""
    config = CaptionRewardModel.config_class(terms=[dict(term) for term in TERMS], reward_scale=SCALE)
    path = tmp_path_factory.mktemp("linear")
    CaptionRewardModel(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return tiny.rows(6)


def reward(rows: list[Row], **config: Any) -> RewardFunction:
    function = build_reward(RewardConfig.model_validate(config))
    function.fit(rows)
    return function


def captions_of(rows: list[Row]) -> list[str]:
    """Right, short, wrong, long: something for every term to say."""
    said = [row.references[0] for row in rows]
    return [said[0], "a dog", "", said[0], "two " * 12 + "cats", *said[5:]][: len(rows)]


# A learned model


def test_learned_weights_times_the_scale(folder: str, rows: list[Row]) -> None:
    """4 * (0.5, 2, 0.25, 0.125) = (2, 8, 1, 0.5); length is a cost."""
    function = reward(rows, model=folder)
    assert list(function.terms) == ["bleu", "detail", "length", NETWORK, UNCERTAINTY]
    output = function(captions_of(rows), rows)
    for name, weight in {"bleu": 2.0, "detail": 8.0, "length": -1.0, NETWORK: 0.5, UNCERTAINTY: 0.0}.items():
        assert output.weighted[name] == pytest.approx([weight * value for value in output.raw[name]]), name
    network = load_reward_model(folder).predict(captions_of(rows), rows)
    assert output.raw[NETWORK] == pytest.approx(network.mean_B.tolist())
    assert output.raw[UNCERTAINTY] == pytest.approx(network.sigma_B.tolist())
    assert output.raw["length"][4] == 4.0, "13 words where 9 are allowed"
    columns = [output.weighted[name] for name in function.terms]
    assert output.total == pytest.approx([sum(values) for values in zip(*columns, strict=True)])
    assert len({round(value, 6) for value in output.raw[NETWORK]}) == len(rows), "it looks"


def test_weights_alone_need_no_network(linear: str, rows: list[Row]) -> None:
    function = reward(rows, model=linear)
    assert list(function.terms) == ["bleu", "detail", "length"]
    output = function(captions_of(rows), rows)
    expected = [
        2 * b + 8 * d - n
        for b, d, n in zip(output.raw["bleu"], output.raw["detail"], output.raw["length"], strict=True)
    ]
    assert output.total == pytest.approx(expected)


def test_a_listed_term_takes_the_place_of_the_models(folder: str, rows: list[Row]) -> None:
    """Its weight is taken as it is, and so are its options; a term of another name is added."""
    listed = [{"type": "length", "weight": 3.0, "target": [1, 2]}, {"type": "repetition", "weight": 0.5}]
    output = reward(rows, model=folder, terms=listed)(captions_of(rows), rows)
    assert list(output.raw) == ["bleu", "detail", "length", NETWORK, UNCERTAINTY, "repetition"]
    assert output.raw["length"][4] == 11.0 and output.weighted["length"][4] == -33.0, "13 words where 2 are allowed"
    assert output.weighted["bleu"] == pytest.approx([2 * value for value in output.raw["bleu"]])
    assert output.weighted["repetition"] == pytest.approx([-0.5 * value for value in output.raw["repetition"]])


def test_weight_0_leaves_a_term_out(folder: str, linear: str, rows: list[Row]) -> None:
    output = reward(rows, model=folder, terms=[{"type": "bleu", "weight": 0}])(captions_of(rows), rows)
    assert "bleu" not in output.raw and "detail" in output.raw
    with pytest.raises(UserError, match="the reward has no terms"):
        reward(rows, model=linear, terms=[{"type": term["type"], "weight": 0} for term in TERMS])


def test_uncertainty_counts_in_training_alone(folder: str, rows: list[Row]) -> None:
    """kappa 0.5 of a network that counts 0.5: R - sigma / 4 in training, R in evaluation; sigma is told in both."""
    penalised, plain = reward(rows, model=folder, uncertainty_penalty=0.5), reward(rows, model=folder)
    captions = captions_of(rows)
    trained, judged = penalised(captions, rows), penalised(captions, rows, update=False)
    sigma = trained.raw[UNCERTAINTY]
    assert min(sigma) > 1e-4 and sigma == judged.raw[UNCERTAINTY]
    expected = [value - 0.25 * s for value, s in zip(plain(captions, rows).total, sigma, strict=True)]
    assert trained.total == pytest.approx(expected)
    assert judged.total == pytest.approx(plain(captions, rows, update=False).total)
    assert trained.weighted[UNCERTAINTY] == pytest.approx([-0.25 * s for s in sigma])
    assert judged.weighted[UNCERTAINTY] == [0.0] * len(rows)


def test_no_penalty_without_something_uncertain(linear: str, rows: list[Row]) -> None:
    with pytest.raises(UserError, match=r"^reward.uncertainty_penalty: .* has no network"):
        reward(rows, model=linear, uncertainty_penalty=0.5)


def test_a_batch_is_encoded_once(folder: str, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """Network and uncertainty are two columns of one prediction."""
    function = reward(rows, model=folder, uncertainty_penalty=1.0)
    network = function.terms[NETWORK].term
    assert isinstance(network, NetworkTerm)
    calls = []
    predict = network.model.predict
    monkeypatch.setattr(network.model, "predict", lambda *a: calls.append(a) or predict(*a))
    function(captions_of(rows), rows)
    assert len(calls) == 1
    again = [dataclasses.replace(row, image=rows[0].image) for row in rows]
    assert function(captions_of(rows), again).raw[NETWORK] != function(captions_of(rows), rows).raw[NETWORK]
    assert len(calls) == 3, "another picture under the same caption is another question"


def test_state_goes_round(folder: str, rows: list[Row]) -> None:
    """What normalisers and terms learned, through JSON, into a reward that was fitted on other rows."""
    options: dict[str, Any] = {"model": folder, "terms": [{"type": "repetition", "normalize": "zscore", "weight": 1.0}]}
    function = reward(rows, **options)
    captions = ["a dog and a dog", *captions_of(rows)[1:]]
    function(captions, rows)
    state = json.loads(json.dumps(function.state_dict()))
    assert state["repetition"]["stats"]["count"] == len(rows)
    fresh = reward(rows[:1], **options)
    assert fresh(captions, rows, update=False).total != function(captions, rows, update=False).total
    fresh.load_state_dict(state)
    assert fresh(captions, rows, update=False) == function(captions, rows, update=False)
    with pytest.raises(UserError, match="the saved reward has terms"):
        reward(rows, model=folder).load_state_dict(state)


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_the_references_own_reward_in_one_batch(leave_one_out: bool, folder: str, rows: list[Row]) -> None:
    """All references at once give what row by row gave; rows with too few are passed over."""
    function = reward(rows, model=folder)
    few = [dataclasses.replace(rows[0], references=()), dataclasses.replace(rows[1], references=rows[1].references[:1])]
    means = []
    for row in [*rows[2:5], *few]:
        captions = row.references
        if len(captions) < (2 if leave_one_out else 1):
            continue
        others = [captions[:i] + captions[i + 1 :] if leave_one_out else captions for i in range(len(captions))]
        alone = [
            function([text], [dataclasses.replace(row, references=them)], update=False).total[0]
            for text, them in zip(captions, others, strict=True)
        ]
        means.append(math.fsum(alone) / len(alone))
    assert len(means) == (3 if leave_one_out else 4)
    together = function.reference_reward([*rows[2:5], *few], leave_one_out)
    assert together == pytest.approx(math.fsum(means) / len(means), abs=1e-5)


# Other processes


def test_workers_give_the_same_rewards(rows: list[Row]) -> None:
    terms = [{"type": "detail", "weight": 2.0, "normalize": "zscore"}, {"type": "length", "weight": 0.1}]
    captions = captions_of(rows)
    plain = reward(rows, terms=[terms[0]])
    spread = reward(rows, terms=[terms[0]], workers=2)
    try:
        assert spread(captions, rows) == plain(captions, rows)
        assert spread(captions[::-1], rows, update=False) == plain(captions[::-1], rows, update=False)
        assert spread.state_dict() == plain.state_dict()
    finally:
        spread.terms["detail"].term.close()  # type: ignore[attr-defined]


# Shaping in the live trainer

BETA = 0.5
POTENTIAL = {"type": "length", "target": [4, 20]}  # of an empty caption: -4


class Recorded:
    """What `make_experience` was given and gave, step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.steps: list[tuple[Any, Any]] = []
        original = mmft.train.ppo.make_experience

        def record(rollout: Any, settings: Any) -> Any:
            experience = original(rollout, settings)
            self.steps.append((rollout, experience))
            return experience

        monkeypatch.setattr(mmft.train.ppo, "make_experience", record)


def shaped(beta: float | None, potential: dict[str, Any] = POTENTIAL) -> RewardFunction:
    shaping = {} if beta is None else {"shaping": {"beta": beta, "potential": potential}}
    return reward(tiny.rows(), terms=[{"type": "bleu"}, {"type": "length", "weight": 0.1, "target": [2, 4]}], **shaping)


def learned(folder: Path, function: RewardFunction, **changes: Any) -> list[dict[str, float]]:
    settings = {"total_episodes": 16, "samples_per_prompt": 2, "response_length": 8, **changes}
    set_seed(0)
    trainer = tiny.trainer(tiny.vision_policy(eos_bias=6.0), folder, reward=function, **settings)
    trainer.train()
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in tiny.logs_of(trainer)]


def test_a_shaped_caption_sums_to_its_return_less_where_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sum_t R'_t = sum_t R_t - beta Phi(s_0), and Phi of an empty caption is -4 here: 2 more, whatever is said.

    Each token is recomputed as well, from the texts: -coef KL_t, the score at the last one, and
    beta (Phi(s_{t+1}) - Phi(s_t)) with Phi(end) = 0.
    """
    recorded = Recorded(monkeypatch)
    logs = learned(tmp_path, shaped(BETA))
    tokenizer = tiny.processor().tokenizer
    term = build_term("length", target=(4, 20))
    assert len(recorded.steps) == 2
    lengths = set()
    for (rollout, experience), line in zip(recorded.steps, logs, strict=True):
        count_B = rollout.mask_BT.sum(1)
        lengths |= set(count_B.tolist())
        unshaped_B = experience.non_score_reward_BT.sum(1) + rollout.scores_B
        assert_close(experience.reward_BT.sum(1), unshaped_B + BETA * 4.0)
        assert line["objective/return"] == pytest.approx((unshaped_B + BETA * 4.0).mean().item(), abs=1e-5)
        assert line["objective/scores"] == pytest.approx(rollout.scores_B.mean().item(), abs=1e-6), "not in the score"
        for b, count in enumerate(count_B.tolist()):
            tokens = rollout.responses_BT[b]
            texts = [tokenizer.decode(tokens[:t], skip_special_tokens=True).strip() for t in range(count)]
            phi = [-value for value in term(texts, [rollout.rows[b]] * count)] + [0.0]
            expected = experience.non_score_reward_BT[b, :count].clone()
            expected[-1] += rollout.scores_B[b]
            expected += BETA * torch.tensor([phi[t + 1] - phi[t] for t in range(count)])
            assert_close(experience.reward_BT[b, :count], expected)
            assert not experience.reward_BT[b, count:].any()
    assert len(lengths) > 2, "captions of several lengths, or the ends were not tried"


def test_a_discount_is_the_advantages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sum_t gamma^t R'_t = sum_t gamma^t R_t - beta Phi(s_0) at any gamma."""
    recorded = Recorded(monkeypatch)
    learned(tmp_path, shaped(BETA), total_episodes=8, gamma=0.9)
    rollout, experience = recorded.steps[0]
    time_T = torch.arange(rollout.mask_BT.shape[1])
    last_B = rollout.mask_BT.sum(1) - 1
    unshaped_B = (0.9**time_T * experience.non_score_reward_BT).sum(1) + 0.9**last_B * rollout.scores_B
    assert_close((0.9**time_T * experience.reward_BT).sum(1), unshaped_B + BETA * 4.0)


class Words(Term):
    """One for each word: something comes of the captions of an untrained policy, and nothing of an empty one."""

    def __call__(self, captions: Any, rows: Any, finished: Any = None) -> list[float]:
        return [float(len(text.split())) for text in captions]


def test_a_potential_that_starts_at_0_leaves_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi(s_0) = 0: a caption's rewards sum to its return itself, but words are paid for as they come."""
    recorded = Recorded(monkeypatch)
    function = shaped(None)
    function.shaping = Shaping(1.0, Words())
    learned(tmp_path, function, total_episodes=8)
    rollout, experience = recorded.steps[0]
    assert_close(experience.reward_BT.sum(1), experience.non_score_reward_BT.sum(1) + rollout.scores_B)
    assert (experience.reward_BT - experience.non_score_reward_BT).abs().gt(0.5).sum() > len(rollout.rows)


def test_a_potential_is_fitted_and_checked_as_a_term_is() -> None:
    """Detail needs the training rows and their references; nothing said is worth nothing, the reference most."""
    data = tiny.rows(4)
    function = shaped(1.0, {"type": "detail"})
    (phi,) = function.potentials([["", data[0].references[0].split()[0], data[0].references[0]]], data[:1])
    assert phi[:2] == [0.0, 0.0] and phi[2] > 0.3
    alone = build_reward(RewardConfig.model_validate({"terms": [{"type": "length"}], "shaping": {"beta": 1.0}}))
    with pytest.raises(UserError, match="'shaping' needs references"):
        alone.check([dataclasses.replace(data[0], references=())])


def test_beta_0_changes_nothing(tmp_path: Path) -> None:
    plain = learned(tmp_path / "plain", shaped(None))
    assert shaped(0.0).shaping is None
    assert learned(tmp_path / "zero", shaped(0.0)) == plain
    zero = RewardFunction(
        [WeightedTerm(name, entry.term, entry.weight) for name, entry in shaped(None).terms.items()],
        Shaping(0.0, build_term("length", target=(4, 20))),
    )
    assert learned(tmp_path / "computed", zero) == plain
    assert learned(tmp_path / "shaped", shaped(BETA)) != plain
