"""`CaptionRewardModel`: saved and read back to the bit, serving PPO of another model, uncertainty, and clear errors."""

from __future__ import annotations

import gc
import itertools
import json
import random
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_towers
import torch
from huggingface_hub import CommitOperationAdd
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import hub

from mmft.config import RewardConfig, SimulatedJudgements
from mmft.data.scenes import EmojiScenes
from mmft.data.unusual import UNUSUAL, unusual
from mmft.functional.uncertainty import distance_variance
from mmft.models.reward import (
    MC_SEED,
    CaptionRewardConfig,
    CaptionRewardModel,
    load_reward_config,
    load_reward_model,
)
from mmft.models.towers import Tokens
from mmft.nn.dropout import McDropout, sampling_dropout
from mmft.nn.heads import GaussianHead, ScalarHead
from mmft.rewards import build_reward
from mmft.rewards.learned import NetworkTerm, UncertaintyTerm, label_of, learned_weights, term_of
from mmft.rewards.simulate import adversarial
from mmft.train.reward import fit_distance, train_network, validate
from mmft.types import Row, UserError

CAPTIONS = ["a dog", "two owls and a cat on a green background", "", "some corn above a dog"]
DETAIL = {"type": "detail", "name": None, "beta": 1.0, "weight": 2.0, "low": 1.0, "high": 3.0, "sign": "as expected"}
LENGTH = {"type": "length", "name": "words", "target": [3, 9], "weight": 0.5}


def rows(count: int = 4) -> list[Row]:
    return [Row(row.id, row.image, tiny_towers.PROMPT, row.references) for row in EmojiScenes(count)]


def same(one: CaptionRewardModel, other: CaptionRewardModel) -> None:
    """Bit for bit, on captions and pictures."""
    mine, theirs = (model.predict(CAPTIONS, rows()) for model in (one, other))
    for name in ("mean_B", "epistemic_B", "aleatoric_B", "sigma_B"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_towers.saved(tiny_towers.llava(), tiny_towers.processor(), tmp_path_factory.mktemp("llava"))


@dataclass
class Made:
    """A reward model that was trained for a few steps and saved; losses on the training set before and after."""

    model: CaptionRewardModel
    folder: Path
    before: float
    after: float


def make(tower: str, fusion: str, loss: str, folder: Path, **changes: Any) -> Made:
    model = tiny_towers.reward_model(tower, fusion, loss, **changes)
    model.config.terms = [DETAIL, LENGTH]
    parts = tiny_towers.judgements(loss, 8), tiny_towers.judgements(loss, 3, first=8)
    store, (train, validation) = tiny_towers.training_sets(model, *parts)
    before = validate(model, loss, train, store)["loss/validation"]
    train_network(model, store, train, validation, tiny_towers.recipe(loss, steps=24, patience=99))
    fit_distance(model, store, train, validation)
    if loss == "mse":
        model.config.noise_std = 0.7
    after = validate(model, loss, train, store)["loss/validation"]
    model.save_pretrained(folder)
    return Made(model, folder, before, after)


@pytest.fixture(scope="module", params=itertools.product(tiny_towers.FUSIONS, tiny_towers.LOSSES), ids="-".join)
def made(request: pytest.FixtureRequest, tower: str, tmp_path_factory: pytest.TempPathFactory) -> Made:
    fusion, loss = request.param
    return make(tower, fusion, loss, tmp_path_factory.mktemp(f"{fusion}-{loss}"))


class TestEveryFusionAndLoss:
    def test_a_few_steps_lower_the_loss(self, made: Made) -> None:
        assert made.after < made.before - 0.01

    def test_saved_and_read_back_to_the_bit(self, made: Made) -> None:
        loaded = load_reward_model(str(made.folder))
        same(made.model, loaded)
        prediction = loaded.predict(CAPTIONS, rows())
        assert prediction.mean_B.std() > 1e-3 and (prediction.sigma_B > 0).all()
        assert isinstance(loaded.head, GaussianHead if made.model.config.loss == "aleatoric" else ScalarHead)
        assert not loaded.training

    def test_it_trains_a_policy_of_another_kind(self, made: Made, tmp_path: Path) -> None:
        """Two steps of PPO; the policy has pieces of words and 96 pixels, the reward whole words and 32 pixels."""
        policy = tiny.vision_policy()
        config = RewardConfig.model_validate({"model": str(made.folder), "uncertainty_penalty": 0.5})
        reward = build_reward(config)
        reward.fit(data := tiny.rows())
        own = reward.terms["network"].term.model
        assert own.processor.tokenizer.get_vocab() != policy.processor.tokenizer.get_vocab()
        assert own.processor.image_processor.size != policy.processor.image_processor.size
        trainer = tiny.trainer(policy, tmp_path, data=data, reward=reward, total_episodes=16)
        seen: list[Any] = []
        trainer.on_rollout = lambda step, rollout: seen.append(rollout)
        adapters = {n: p.detach().clone() for n, p in policy.model.named_parameters() if p.requires_grad}
        trainer.train()
        assert [log["policy/ratio_first"] for log in tiny.logs_of(trainer)] == [1.0, 1.0]
        moved = [not torch.equal(adapters[n], p) for n, p in policy.model.named_parameters() if p.requires_grad]
        assert any(moved)
        fresh = load_reward_model(str(made.folder))
        for rollout in seen:
            expected = fresh.predict(rollout.captions, [row.for_reward() for row in rollout.rows])
            raw = {name: torch.tensor(values) for name, values in rollout.reward.raw.items()}
            torch.testing.assert_close(raw["network"], expected.mean_B, atol=1e-5, rtol=1e-5)
            # TRL sets every nn.Dropout's p to 0; the reward model's own dropout is untouched.
            torch.testing.assert_close(raw["uncertainty"], expected.sigma_B, atol=1e-5, rtol=1e-4)
            assert (expected.epistemic_B > 0).all()
            total = 2 * raw["detail"] - 0.5 * raw["words"] + raw["network"] - 0.5 * raw["uncertainty"]
            torch.testing.assert_close(rollout.scores_B, total, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def one(tower: str, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tower, "cross_attention", "aleatoric", tmp_path_factory.mktemp("one"), dropout=0.2)


class TestSaving:
    def test_safetensors_alone(self, one: Made) -> None:
        files = {path.relative_to(one.folder).as_posix() for path in one.folder.rglob("*") if path.is_file()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "text_tower/model.safetensors"} <= files
        assert not {path for path in files if path.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))}

    def test_a_tower_from_a_folder_travels_along(self, tmp_path: Path) -> None:
        """The folder that it came from may vanish, and the saved model may move; one tower for both is kept once."""
        tower = tiny_towers.saved(tiny_towers.llava(), tiny_towers.processor(), tmp_path / "llava")
        model = tiny_towers.reward_model(tower, "sum", "mse")
        model.save_pretrained(tmp_path / "saved")
        assert (model.config.vision, model.config.text) == (tower, tower), "the model in memory is as it was"
        shutil.rmtree(tower)
        (tmp_path / "saved").rename(tmp_path / "elsewhere")
        loaded = load_reward_model(str(tmp_path / "elsewhere"))
        same(model, loaded)
        assert not (tmp_path / "elsewhere" / "vision_tower").exists()
        assert loaded._towers["vision"] is loaded._towers["text"]
        loaded.save_pretrained(tmp_path / "again")
        shutil.rmtree(tmp_path / "elsewhere")
        same(model, load_reward_model(str(tmp_path / "again")))
        assert tower not in (tmp_path / "again" / "config.json").read_text()

    def test_two_towers(self, tmp_path: Path) -> None:
        """Pictures by a CLIP, captions by a sentence encoder that reads them alone."""
        words = tiny_towers.word_tokenizer(sentence=True)
        clip = tiny_towers.saved(tiny_towers.clip(), tiny_towers.image_processor(), tmp_path / "clip")
        bert = tiny_towers.saved(tiny_towers.bert(), words, tmp_path / "bert")
        model = tiny_towers.reward_model(clip, "coupled", "mse", text=bert, grounded=False)
        assert (model.config.vision_dim, model.config.text_dim) == (24, 20)
        model.save_pretrained(tmp_path / "saved")
        for folder in (clip, bert):
            shutil.rmtree(folder)
        loaded = load_reward_model(str(tmp_path / "saved"))
        same(model, loaded)
        assert [type(loaded._towers[name]).__name__ for name in ("vision", "text")] == ["CLIPModel", "BertModel"]
        own = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert own("a dog")["input_ids"] == words("a dog")["input_ids"]

    def test_a_bundled_tower_is_named_alone(self, tmp_path: Path) -> None:
        model = tiny_towers.reward_model("builtin:tiny-vlm", "sum", "bradley_terry", tower_dtype="bfloat16")
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert (config["vision"], config["text"], config["tower_dtype"]) == (*["builtin:tiny-vlm"] * 2, "bfloat16")
        assert not list(tmp_path.glob("*_tower"))
        assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 2**20
        same(model, load_reward_model(str(tmp_path)))

    def test_the_auto_classes_find_it(self, one: Made, tmp_path: Path) -> None:
        config = AutoConfig.from_pretrained(one.folder)
        assert isinstance(config, CaptionRewardConfig) and config.fusion == "cross_attention"
        model = AutoModel.from_pretrained(one.folder)
        assert isinstance(model, CaptionRewardModel)
        for name, weight in one.model.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name]), name
        with pytest.raises(UserError, match="has no towers; load it with load_reward_model"):
            model.predict(["a dog"], rows(1))
        with pytest.raises(UserError, match="no towers to save with it; load it with load_reward_model"):
            model.save_pretrained(tmp_path)

    def test_its_own_tokenizer_and_picture_processor(self, one: Made) -> None:
        assert AutoTokenizer.from_pretrained(one.folder).get_vocab() == tiny_towers.word_tokenizer().get_vocab()
        pictures = AutoImageProcessor.from_pretrained(one.folder / "vision")
        assert dict(pictures.size) == {"height": 32, "width": 32}

    def test_every_key_of_the_config_is_kept(self, tmp_path: Path) -> None:
        keys = {
            "fusion": "coupled", "vision_dim": 3, "text_dim": 5, "hidden": 8, "layers": 3, "heads": 2, "queries": "all",
            "dropout": 0.3, "mc_samples": 5, "image_tokens": 7, "max_tokens": 9, "loss": "aleatoric", "terms": [LENGTH],
            "network_weight": 0.25, "reward_scale": 2.0, "target_mean": -1.5, "target_std": 3.0, "noise_std": 0.1,
            "sigma_scale": 1.25, "distance_limit": 6.0, "prior_std": 0.5, "tower_dtype": "float32", "grounded": True,
            "vision": "someone/clip", "text": "someone/vlm",
        }  # fmt: skip
        CaptionRewardConfig(**keys).save_pretrained(tmp_path)
        loaded = load_reward_config(str(tmp_path))
        assert {key: getattr(loaded, key) for key in keys} == keys

    def test_everything_is_pushed(self, one: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is uploaded is a whole model, and no more than a folder deep, where transformers looks."""
        sent: list[str] = []

        class Hub:
            def create_repo(self, repo_id: str, **options: Any) -> Any:
                return type("Repo", (), {"repo_id": repo_id})

            def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], **options: Any) -> str:
                sent.extend(operation.path_in_repo for operation in operations)
                return repo_id

        class Card:
            def save(self, path: str) -> None:
                Path(path).write_text("card")

        monkeypatch.setattr(hub, "hf_api", Hub)
        monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **options: Card())
        one.model.push_to_hub("someone/reward")
        local = {path.relative_to(one.folder).as_posix() for path in one.folder.rglob("*") if path.is_file()}
        assert {path.replace("\\", "/") for path in sent} == local | {"README.md"}

    def test_weights_of_terms_alone(self, tmp_path: Path) -> None:
        model = CaptionRewardModel(CaptionRewardConfig(terms=[DETAIL, LENGTH], reward_scale=0.5))
        model.save_pretrained(tmp_path)
        loaded = load_reward_model(str(tmp_path))
        assert learned_weights(loaded.config) == {"detail": 1.0, "words": 0.25}
        with pytest.raises(UserError, match="weighted terms alone"):
            loaded({}, {})
        reward = build_reward(RewardConfig(model=str(tmp_path)))
        assert {name: term.signed_weight for name, term in reward.terms.items()} == {"detail": 1.0, "words": -0.25}
        with pytest.raises(UserError, match="reward.uncertainty_penalty: .* has no network, so no uncertainty"):
            build_reward(RewardConfig(model=str(tmp_path), uncertainty_penalty=1.0))


class TestErrors:
    """One line that names what was asked for."""

    def check(self, path: Path | str, text: str) -> None:
        with pytest.raises(UserError, match=text) as caught:
            load_reward_model(str(path))
        assert "\n" not in str(caught.value)

    @pytest.fixture
    def copy(self, one: Made, tmp_path: Path) -> Path:
        return Path(shutil.copytree(one.folder, tmp_path / "copy"))

    def test_no_such_folder(self, tmp_path: Path) -> None:
        self.check(tmp_path / "nothing", "^reward.model: '.*nothing': no such folder$")

    def test_no_model_in_it(self, tmp_path: Path) -> None:
        self.check(tmp_path, "^reward.model: '.*' is no reward model: ")

    def test_a_hub_id_that_is_not_there(self) -> None:
        self.check("someone/nothing", "^reward.model: 'someone/nothing' is no reward model: ")

    def test_another_model(self, tower: str) -> None:
        self.check(tower, "^reward.model: '.*' is a llava, not a model that `mmft reward train` made$")

    def test_no_weights(self, copy: Path) -> None:
        (copy / "model.safetensors").unlink()
        self.check(copy, "^reward.model: '.*copy' cannot be loaded: ")

    def test_damaged_weights(self, copy: Path) -> None:
        (copy / "model.safetensors").write_bytes(b"not weights")
        self.check(copy, "^reward.model: '.*copy' cannot be loaded: ")

    def test_weights_of_another_network(self, copy: Path) -> None:
        """Where transformers would warn, and score by chance."""
        self.edit(copy, fusion="coupled")
        self.check(copy, "^reward.model: '.*copy' lacks weights, such as fusion")

    def test_weights_of_another_size(self, copy: Path) -> None:
        self.edit(copy, hidden=32)
        self.check(copy, "^reward.model: '.*copy' cannot be loaded: ")

    def test_no_tower(self, copy: Path) -> None:
        shutil.rmtree(copy / "text_tower")
        self.check(copy, "^reward model: the tower '.*' cannot be loaded: ")

    def test_no_tokenizer(self, copy: Path) -> None:
        for path in (*copy.glob("*token*"), *copy.glob("processor*")):
            path.unlink()
        self.check(copy, "^reward model: no processor can be loaded from '.*copy': ")

    def edit(self, folder: Path, **changes: Any) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestUncertainty:
    def features(self, model: CaptionRewardModel) -> tuple[Tokens, Tokens]:
        return model.encode(CAPTIONS, rows())

    def sampled(self, model: CaptionRewardModel, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = self.features(model)
        inputs = (
            {"image": image.features_BND, "text": text.features_BND}, {"image": image.mask_BN, "text": text.mask_BN}
        )  # fmt: skip
        with torch.no_grad(), sampling_dropout(model, MC_SEED):
            samples = [model(*inputs) for _ in range(count)]
        return torch.stack([mean for mean, _ in samples]), torch.stack([s for _, s in samples])

    def near_sighted(self, one: Made) -> tuple[CaptionRewardModel, torch.Tensor]:
        """A copy to which all these pictures are far, and what it owes to that."""
        model = load_reward_model(str(one.folder))
        distance = model.distance(self.features(model)[0])
        model.config.distance_limit = distance.min().item() / 2
        far = distance_variance(distance, model.config.distance_limit, model.config.prior_std**2)
        assert (far > 0).all() and far.std() > 0
        return model, far

    def test_both_parts_recomputed(self, one: Made) -> None:
        """Var = 1/T sum (f_t - mean)^2, and the distance's; noise = mean of exp(s_t); in units of the ratings."""
        model, far = self.near_sighted(one)
        config = model.config
        means, log_variances = self.sampled(model, config.mc_samples)
        epistemic = ((means - means.mean(0)) ** 2).mean(0) + far
        aleatoric = log_variances.exp().mean(0)
        found = model.predict(CAPTIONS, rows())
        scale = config.target_std
        assert scale != 1 and (means.std(0) > 0).all()
        torch.testing.assert_close(found.epistemic_B, scale * epistemic.sqrt())
        torch.testing.assert_close(found.aleatoric_B, scale * aleatoric.sqrt())
        torch.testing.assert_close(found.sigma_B, scale * (epistemic + aleatoric).sqrt())

    def test_the_score_is_the_pass_without_dropout(self, one: Made) -> None:
        model, config = one.model, one.model.config
        image, text = self.features(model)
        with torch.no_grad():
            mean, _ = model.eval()(
                {"image": image.features_BND, "text": text.features_BND}, {"image": image.mask_BN, "text": text.mask_BN}
            )
        expected = mean * config.target_std + config.target_mean
        torch.testing.assert_close(model.predict(CAPTIONS, rows()).mean_B, expected)

    def test_the_same_sigma_every_time_and_in_any_batch(self, one: Made) -> None:
        whole = one.model.predict(CAPTIONS, rows())
        torch.manual_seed(1234)
        again = one.model.predict(CAPTIONS, rows())
        assert torch.equal(whole.sigma_B, again.sigma_B)
        parts = one.model.predict(CAPTIONS, rows(), batch=1)
        turned = one.model.predict(CAPTIONS[::-1], rows()[::-1])
        for name in ("mean_B", "sigma_B", "epistemic_B"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(getattr(turned, name).flip(0), getattr(whole, name), atol=1e-4, rtol=1e-4)

    def test_the_global_random_numbers_are_left_alone(self, one: Made) -> None:
        state = torch.random.get_rng_state()
        one.model.predict(CAPTIONS, rows())
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_dropout_that_a_trainer_zeroes_is_not_this(self, one: Made) -> None:
        model = load_reward_model(str(one.folder))
        before = model.predict(CAPTIONS, rows()).epistemic_B
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        assert torch.equal(model.predict(CAPTIONS, rows()).epistemic_B, before)
        assert any(isinstance(module, McDropout) for module in model.modules())

    @pytest.mark.parametrize("changes", [{"mc_samples": 1}, {"dropout": 0.0}])
    def test_without_samples_only_distance_is_left(self, one: Made, changes: dict[str, Any]) -> None:
        model, far = self.near_sighted(one)
        for name, value in changes.items():
            setattr(model.config, name, value)
        found = model.predict(CAPTIONS, rows())
        torch.testing.assert_close(found.epistemic_B, model.config.target_std * far.sqrt())

    def test_noise_of_a_loss_that_assumes_one(self, tower: str) -> None:
        """noise_std 0.7 in units of training, times the ratings' deviation 3 and the scale 2."""
        model = tiny_towers.reward_model(tower, "sum", "mse", dropout=0.0)
        model.config.noise_std, model.config.target_std, model.config.sigma_scale = 0.7, 3.0, 2.0
        found = model.predict(CAPTIONS, rows())
        assert found.aleatoric_B.tolist() == pytest.approx([4.2] * 4)
        assert found.sigma_B.tolist() == pytest.approx([4.2] * 4) and not found.epistemic_B.any()

    def test_the_scale_multiplies_sigma_and_not_the_score(self, one: Made) -> None:
        model = load_reward_model(str(one.folder))
        before = model.predict(CAPTIONS, rows())
        model.config.sigma_scale *= 3.0
        after = model.predict(CAPTIONS, rows())
        assert torch.equal(after.mean_B, before.mean_B)
        for name in ("epistemic_B", "aleatoric_B", "sigma_B"):
            torch.testing.assert_close(getattr(after, name), 3 * getattr(before, name))

    def test_a_strange_picture_is_less_certain(self) -> None:
        """With the bundled towers: of held-back pictures none is as uncertain as any of noise, and few of gradients."""
        model = tiny_towers.reward_model("builtin:tiny-vlm", "sum", "mse", image_tokens=16, grounded=False)
        parts = (tiny_towers.judgements("mse", 60)[::6], tiny_towers.judgements("mse", 30, first=60)[::6])
        store, (train, validation) = tiny_towers.training_sets(model, *parts)
        fit_distance(model, store, train, validation)
        known = [Row(row.id, row.image, tiny_towers.PROMPT) for row in EmojiScenes(110)][90:]
        sigma, distance = self.seen(model, known)
        for kind in ("noise", "gradient"):
            strange = [Row("", unusual(row.image, kind, random.Random(i)), row.prompt) for i, row in enumerate(known)]
            other, farther = self.seen(model, strange)
            assert (other[:, None] > sigma).float().mean() > (0.99 if kind == "noise" else 0.9)
            assert (farther[:, None] > distance).float().mean() > 0.95

    def seen(self, model: CaptionRewardModel, pictures: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        captions = ["a dog"] * len(pictures)
        return model.predict(captions, pictures).epistemic_B, model.distance(model.encode(captions, pictures)[0])

    def test_no_picture_is_no_distance(self, one: Made) -> None:
        model = one.model
        seen = [Row("", None, tiny_towers.PROMPT), rows(1)[0]]
        image, _ = model.encode(["a dog"] * 2, seen)
        assert model.distance(image)[0] == 0 < model.distance(image)[1]
        assert torch.isfinite(model.predict(["a dog"] * 2, seen).sigma_B).all()

    def test_unusual_pictures_are_pictures(self) -> None:
        picture = rows(1)[0].image
        for kind in UNUSUAL:
            made, again = (unusual(picture, kind, random.Random(1)) for _ in range(2))
            assert (made.size, made.mode) == (picture.size, "RGB") and made.tobytes() == again.tobytes()
            assert made.tobytes() != picture.tobytes()


class TestTerms:
    def test_labels_options_and_weights(self) -> None:
        config = CaptionRewardConfig(terms=[DETAIL, LENGTH], fusion="sum", network_weight=0.75, reward_scale=2.0)
        assert [label_of(entry) for entry in config.terms] == ["detail", "words"]
        assert learned_weights(config) == {"detail": 4.0, "words": 1.0, "network": 1.5}
        length = term_of(LENGTH)
        assert (length.low, length.high, length.sign) == (3, 9, -1)
        assert term_of(DETAIL).detail.beta == 1.0

    def test_prediction_and_uncertainty_are_one_pass(self, one: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []
        model = load_reward_model(str(one.folder))
        original = model.predict
        monkeypatch.setattr(model, "predict", lambda *args: (calls.append(1), original(*args))[1])
        network = NetworkTerm(model)
        uncertainty = UncertaintyTerm(network)
        seen = rows()
        means, sigmas = network(CAPTIONS, seen), uncertainty(CAPTIONS, seen)
        assert calls == [1] and (uncertainty.sign, network.sign) == (-1, 1)
        expected = one.model.predict(CAPTIONS, seen)
        assert means == expected.mean_B.tolist() and sigmas == expected.sigma_B.tolist()
        network(CAPTIONS[::-1], seen)
        network(CAPTIONS, seen[::-1])
        assert calls == [1, 1, 1]

    def test_another_prompt_about_the_same_picture_is_another_question(self, one: Made) -> None:
        network, picture = NetworkTerm(one.model), rows(1)[0].image
        asked = [Row("", picture, prompt) for prompt in (tiny_towers.PROMPT, "is a dog on the left ?")]
        first, second = (network(["a dog"], [row])[0] for row in asked)
        assert first != second == one.model.predict(["a dog"], [asked[1]]).mean_B.item()

    def test_a_picture_stays_while_its_answer_does(self, one: Made) -> None:
        """Were it freed, another picture could come to lie at its address, and get its score."""
        network, picture = NetworkTerm(one.model), Image.new("RGB", (32, 32), "red")
        alive = weakref.ref(picture)
        network(["a dog"], [Row("", picture, "?")])
        del picture
        gc.collect()
        assert alive() is not None

    def test_uncertainty_counts_in_training_alone(self, one: Made) -> None:
        config = RewardConfig.model_validate({"model": str(one.folder), "uncertainty_penalty": 0.5})
        reward = build_reward(config)
        reward.fit(seen := rows())
        training, evaluation = (reward(CAPTIONS, seen, update=update) for update in (True, False))
        sigma = training.raw["uncertainty"]
        assert evaluation.raw["uncertainty"] == sigma and min(sigma) > 0
        difference = [e - t for e, t in zip(evaluation.total, training.total, strict=True)]
        assert difference == pytest.approx([0.5 * s for s in sigma], abs=1e-6)


def test_the_bundled_reward_model_knows_right_from_wrong() -> None:
    """Its network alone, without references: the true caption of a held-out picture against one with another noun."""
    model = load_reward_model("builtin:caption-reward")
    pairs = adversarial(SimulatedJudgements(), "heldout", 10)
    about = {pair.picture_key: pair.row() for pair in pairs}
    seen = [about[pair.picture_key] for pair in pairs]
    chosen, rejected = (
        model.predict([getattr(pair, name) for pair in pairs], seen).mean_B for name in ("chosen", "rejected")
    )
    assert (chosen > rejected).float().mean() >= 0.85
