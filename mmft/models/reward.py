"""`CaptionRewardModel`: how good a caption of a picture is, and how sure that is.

Frozen towers see the picture and read the caption; a small trained network fuses what they give and scores it. Beside
it stand the learned weights of reference-based terms (BLEU, Detail, ...), which `mmft.rewards` adds up. A reward model
has its own processor and tokenizer: it reads decoded captions and pictures, so the policy may be any other model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import PushToHubMixin

from mmft.config import resolve
from mmft.functional.uncertainty import distance_variance, mahalanobis, mc_dropout_moments, predictive_sigma
from mmft.models.towers import GroundedTextTower, TextTower, Tokens, VisionTower, is_folder, load_tower
from mmft.nn.dropout import sampling_dropout
from mmft.nn.fusion import build_fusion, masked_mean_pool
from mmft.nn.heads import GaussianHead, ScalarHead
from mmft.types import Row, UserError

MC_SEED = 0  # of the dropout masks at use: the same caption gets the same sigma every time
# Where copies of towers lie in a saved model: no deeper, since `push_to_hub` looks one folder down.
_TOWER_FOLDERS = {"vision": "vision_tower", "text": "text_tower"}


class CaptionRewardConfig(PreTrainedConfig):
    """What a reward model is made of, and what training found beside the network's weights.

    vision, text: checkpoints of the towers: `builtin:NAME`, a hub id, or a folder within the model's own.
    vision_dim, text_dim: sizes of their features. fusion: None for a model of weighted terms alone. queries: for
    cross-attention, the modality that asks.
    loss: bradley_terry, mse or aleatoric; the last has a head for the noise.
    terms: learned weights, each {"type", options..., "weight", "low", "high", "unconstrained", "sign"}; the network's
    own weight is `network_weight`. reward_scale: what all weights are multiplied by, so that the rewards of captions
    that annotators chose have standard deviation 1.
    target_mean, target_std: of the ratings, which the network learns standardised (for preferences: what brings the
    mean score of chosen captions to 0, and 1). noise_std: in units of training, for the loss that assumes one noise
    for all. sigma_scale: what sigma is multiplied by, so that its intervals cover what they should. distance_limit,
    prior_std: see `distance_variance`; 0: not fitted.
    """

    model_type = "caption_reward"

    def __init__(
        self,
        vision: str = "",
        text: str = "",
        grounded: bool = False,
        fusion: str | None = None,
        vision_dim: int = 0,
        text_dim: int = 0,
        hidden: int = 128,
        layers: int = 2,
        heads: int = 4,
        queries: str = "text",
        dropout: float = 0.1,
        mc_samples: int = 8,
        image_tokens: int = 16,
        max_tokens: int = 96,
        loss: str = "bradley_terry",
        terms: Sequence[dict[str, Any]] = (),
        network_weight: float = 1.0,
        reward_scale: float = 1.0,
        target_mean: float = 0.0,
        target_std: float = 1.0,
        noise_std: float = 0.0,
        sigma_scale: float = 1.0,
        distance_limit: float = 0.0,
        prior_std: float = 0.0,
        tower_dtype: str = "bfloat16",
        **kwargs: Any,
    ):
        self.vision, self.text, self.grounded, self.fusion = vision, text, grounded, fusion
        self.vision_dim, self.text_dim = vision_dim, text_dim
        self.hidden, self.layers, self.heads, self.queries, self.dropout = hidden, layers, heads, queries, dropout
        self.mc_samples, self.image_tokens, self.max_tokens, self.loss = mc_samples, image_tokens, max_tokens, loss
        self.terms, self.network_weight, self.reward_scale = list(terms), network_weight, reward_scale
        self.target_mean, self.target_std = target_mean, target_std
        self.noise_std, self.sigma_scale = noise_std, sigma_scale
        self.distance_limit, self.prior_std = distance_limit, prior_std
        self.tower_dtype = tower_dtype
        super().__init__(**kwargs)


@dataclass
class Prediction:
    """Of B captions: the score, its epistemic and aleatoric standard deviation, and both together. (B,) each."""

    mean_B: Tensor
    epistemic_B: Tensor
    aleatoric_B: Tensor
    sigma_B: Tensor


class CaptionRewardProcessor(PushToHubMixin):
    """A reward model's own inputs: the text tower's processor or tokenizer, the vision tower's picture processor."""

    def __init__(self, text: Any, image_processor: Any):
        self.text, self.image_processor = text, image_processor

    @property
    def tokenizer(self) -> Any:
        return getattr(self.text, "tokenizer", self.text)

    @classmethod
    def of_towers(cls, vision: str, text: str, grounded: bool, trust: bool = False) -> CaptionRewardProcessor:
        image_processor = _load(AutoProcessor, vision, trust)
        reader = _load(AutoProcessor if grounded else AutoTokenizer, text, trust)
        return cls(reader, getattr(image_processor, "image_processor", image_processor))

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        self.text.save_pretrained(str(folder))
        self.image_processor.save_pretrained(str(Path(folder) / "vision"))

    @classmethod
    def from_pretrained(cls, path: str, grounded: bool, trust: bool = False) -> CaptionRewardProcessor:
        reader = _load(AutoProcessor if grounded else AutoTokenizer, path, trust)
        image_processor = _load(AutoProcessor, path, trust, subfolder="vision")
        return cls(reader, getattr(image_processor, "image_processor", image_processor))


def _load(kind: Any, path: str, trust: bool, **options: Any) -> Any:
    try:
        return kind.from_pretrained(path, trust_remote_code=trust, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"reward model: no processor can be loaded from {path!r}: {first}") from error


class CaptionRewardModel(PreTrainedModel):
    """Picture and caption -> reward. The towers are frozen and are not part of the state: a bundled or hub tower is
    named in the config, a tower from a folder is copied into the saved model.
    """

    config: CaptionRewardConfig
    config_class = CaptionRewardConfig
    base_model_prefix = "reward"
    main_input_name = "embeddings"

    def __init__(self, config: CaptionRewardConfig):
        super().__init__(config)
        # What the training pictures look like. Parameters, of which transformers wants at least one, though no gradient
        # reaches them: a model of terms alone is a checkpoint like any other.
        size = max(1, config.vision_dim)
        self.image_mean_D = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.image_precision_DD = nn.Parameter(torch.zeros(size, size), requires_grad=False)
        self.fusion = self.head = None
        if config.fusion is not None:
            dims = {"image": config.vision_dim, "text": config.text_dim}
            self.fusion = build_fusion(
                config.fusion, dims, config.hidden, config.layers, config.heads, config.dropout,
                None if config.queries == "all" else (config.queries,),
            )  # fmt: skip
            head = GaussianHead if config.loss == "aleatoric" else ScalarHead
            self.head = head(config.hidden, config.dropout)
        self._encoders: tuple[VisionTower, TextTower | GroundedTextTower] | None = None
        self._towers: dict[str, PreTrainedModel] = {}
        self.processor: CaptionRewardProcessor | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves."""

    def forward(self, embeddings: dict[str, Tensor], masks: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Features of both modalities (B, N, D), masks (B, N) -> mean_B as trained, log_variance_B or None."""
        if self.fusion is None or self.head is None:
            raise UserError("this reward model has weighted terms alone; it predicts nothing of its own")
        scored = self.head(self.fusion(embeddings, masks))
        return scored if isinstance(scored, tuple) else (scored, None)

    # Towers.

    def attach(self, processor: CaptionRewardProcessor, towers: dict[str, PreTrainedModel]) -> None:
        """Gives the model its processor and its loaded towers."""
        self.processor, self._towers = processor, towers
        self._encoders = encoders_of(self.config, towers, processor)

    @property
    def towers(self) -> list[PreTrainedModel]:
        """The loaded towers; none of a model of terms alone."""
        return list(self._towers.values())

    def encode(self, captions: Sequence[str], rows: Sequence[Row]) -> tuple[Tokens, Tokens]:
        """Frozen features of B captions and of their rows' pictures, each distinct picture encoded once."""
        if self._encoders is None:
            raise UserError("this reward model has no towers; load it with load_reward_model")
        see, read = self._encoders
        distinct = {id(row.image): row.image for row in rows}
        place = {key: i for i, key in enumerate(distinct)}
        seen = see(list(distinct.values()))
        index = torch.tensor([place[id(row.image)] for row in rows])
        return seen[index], read(list(captions), list(rows))

    # Use.

    @torch.no_grad()
    def predict(self, captions: Sequence[str], rows: Sequence[Row], batch: int = 256) -> Prediction:
        """Scores in the units of the target, with their uncertainty (E18 for the epistemic part), on the CPU."""
        parts = []
        for start in range(0, len(captions), batch):
            image, text = self.encode(captions[start : start + batch], rows[start : start + batch])
            parts.append(self.predict_features(image, text))
        return Prediction(*(torch.cat([getattr(p, n) for p in parts]).cpu() for n in Prediction.__annotations__))

    @torch.no_grad()
    def predict_features(self, image: Tokens, text: Tokens, uncertainty: bool = True) -> Prediction:
        """`predict` on features: one pass without dropout for the score, `mc_samples` with it for the uncertainty, to
        which a picture unlike those of training adds what nobody can know. uncertainty: False leaves it out, as 0.
        """
        config = self.config
        self.eval()
        inputs = (
            {"image": image.features_BND, "text": text.features_BND}, {"image": image.mask_BN, "text": text.mask_BN}
        )  # fmt: skip
        mean_B, log_variance_B = self(*inputs)
        if not uncertainty:
            none_B = torch.zeros_like(mean_B)
            return Prediction(mean_B * config.target_std + config.target_mean, none_B, none_B, none_B)
        noise_B = torch.full_like(mean_B, config.noise_std**2)
        aleatoric_B = noise_B if log_variance_B is None else log_variance_B.exp()
        epistemic_B = torch.zeros_like(mean_B)
        if config.dropout and config.mc_samples > 1:
            with sampling_dropout(self, MC_SEED):
                samples = [self(*inputs) for _ in range(config.mc_samples)]
            _, epistemic_B = mc_dropout_moments(torch.stack([mean for mean, _ in samples]))
            if log_variance_B is not None:
                aleatoric_B = torch.stack([s.exp() for _, s in samples if s is not None]).mean(0)
        if config.distance_limit:
            far_B = distance_variance(self.distance(image), config.distance_limit, config.prior_std**2)
            epistemic_B = epistemic_B + far_B
        scale = config.target_std * config.sigma_scale
        sigma_B = predictive_sigma(epistemic_B, aleatoric_B)
        mean_B = mean_B * config.target_std + config.target_mean
        return Prediction(mean_B, scale * epistemic_B.sqrt(), scale * aleatoric_B.sqrt(), scale * sigma_B)

    def distance(self, image: Tokens) -> Tensor:
        """Squared Mahalanobis distance of pictures from those of training -> (B,); 0 where there is no picture."""
        pooled_BD = masked_mean_pool(image.features_BND.float(), image.mask_BN)
        distance_B = mahalanobis(pooled_BD, self.image_mean_D, self.image_precision_DD)
        return distance_B.masked_fill(~image.mask_BN.any(1), 0.0)

    # Saving.

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """The network, the config, the processor; and the towers that came from a folder of this machine."""
        folder = Path(save_directory)
        paths = {name: getattr(self.config, name) for name in _TOWER_FOLDERS}
        try:
            for name, path in paths.items():
                if self.config.fusion is not None and (is_folder(path) or path in _TOWER_FOLDERS.values()):
                    setattr(self.config, name, self._save_tower(name, folder))
            super().save_pretrained(str(folder), **kwargs)
        finally:
            for name, path in paths.items():
                setattr(self.config, name, path)
        if self.processor is not None:
            self.processor.save_pretrained(folder)

    def _save_tower(self, name: str, folder: Path) -> str:
        """Copies a tower, one that serves as both once; returns the folder's name."""
        if not self._towers:
            raise UserError("this reward model has no towers to save with it; load it with load_reward_model")
        both = self._towers["vision"] is self._towers["text"]
        place = _TOWER_FOLDERS["text" if both else name]
        if place == _TOWER_FOLDERS[name]:
            self._towers[name].save_pretrained(str(folder / place))
        return place


def encoders_of(
    config: CaptionRewardConfig, towers: dict[str, PreTrainedModel], processor: CaptionRewardProcessor
) -> tuple[VisionTower, TextTower | GroundedTextTower]:
    reader = GroundedTextTower if config.grounded else TextTower
    vision = VisionTower(towers["vision"], processor.image_processor, config.image_tokens)
    return vision, reader(towers["text"], processor.text, config.max_tokens)


def tower_dims(
    config: CaptionRewardConfig, towers: dict[str, PreTrainedModel], processor: CaptionRewardProcessor
) -> tuple[int, int]:
    """Feature sizes of the vision and the text tower, which a fresh network is built for."""
    vision, text = encoders_of(config, towers, processor)
    return vision.dim, text.dim


AutoConfig.register(CaptionRewardConfig.model_type, CaptionRewardConfig, exist_ok=True)
AutoModel.register(CaptionRewardConfig, CaptionRewardModel, exist_ok=True)


def load_towers(config: CaptionRewardConfig, root: str, trust: bool = False) -> dict[str, PreTrainedModel]:
    """The towers of a reward model that lies at `root`; one checkpoint that serves as both is loaded once."""
    dtype = getattr(torch, config.tower_dtype)

    def load(path: str, grounded: bool) -> PreTrainedModel:
        if path in _TOWER_FOLDERS.values():
            return load_tower(root, grounded, dtype, trust, subfolder=path)
        return load_tower(resolve(path), grounded, dtype, trust)

    text = load(config.text, config.grounded)
    return {"text": text, "vision": text if config.vision == config.text else load(config.vision, False)}


def load_reward_model(path: str, device: str = "cpu", trust: bool = False) -> CaptionRewardModel:
    """A saved reward model with its towers and processor: `builtin:NAME`, a folder or a hub id.

    Raises UserError where there is none.
    """
    root = resolve(path)
    if root.startswith(("/", ".", "~")) and not Path(root).is_dir():
        raise UserError(f"reward.model: {path!r}: no such folder")
    config = load_reward_config(path)
    try:
        model, found = CaptionRewardModel.from_pretrained(
            root, config=config, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"reward.model: {path!r} cannot be loaded: {first}") from error
    if found["missing_keys"]:
        raise UserError(f"reward.model: {path!r} lacks weights, such as {min(found['missing_keys'])}")
    if config.fusion is not None:
        towers = load_towers(config, root, trust)
        for tower in towers.values():
            tower.to(device)
        model.attach(CaptionRewardProcessor.from_pretrained(root, config.grounded, trust), towers)
    return model.to(device).eval()


def load_reward_config(path: str) -> CaptionRewardConfig:
    """A saved reward model's config alone. Raises UserError where there is none, or one of another kind."""
    root = resolve(path)
    try:
        config = AutoConfig.from_pretrained(root)
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"reward.model: {path!r} is no reward model: {first}") from error
    if not isinstance(config, CaptionRewardConfig):
        raise UserError(f"reward.model: {path!r} is a {config.model_type}, not a model that `mmft reward train` made")
    return config
