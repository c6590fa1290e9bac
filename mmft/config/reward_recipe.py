"""The recipe of a reward model (`reward_models/*.yaml`): judgements to learn from, model, loss, training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mmft.config.base import BUILTIN_MODELS, BUILTIN_PREFIX, Block, bundled, conflict
from mmft.config.reward import BadEndingTerm, BleuTerm, DetailTerm, LengthTerm, RepetitionTerm
from mmft.config.schema import DataConfig, ScenesConfig

Fusion = Literal["sum", "weighted_sum", "attention", "cross_attention", "shared_attention", "coupled"]
# Their `weight` is what training finds.
LinearTerm = Annotated[BleuTerm | DetailTerm | LengthTerm | RepetitionTerm | BadEndingTerm, Field(discriminator="type")]


class RewardModelConfig(Block):
    """The network: frozen towers, a fusion of what they see and read, and a head."""

    vision: str = Field(
        f"{BUILTIN_PREFIX}tiny-vlm",
        min_length=1,
        description="Checkpoint whose vision tower encodes the picture: a CLIP, SigLIP or vision-language model.",
    )
    text: str = Field(
        f"{BUILTIN_PREFIX}tiny-vlm",
        min_length=1,
        description="Checkpoint that encodes the caption: a sentence encoder, or a vision-language model.",
    )
    grounded: bool = Field(
        True,
        description="The text tower reads the caption after the picture and its prompt, and says how likely it finds "
        "each word; needs a vision-language model. false: it reads the caption alone.",
    )
    image_tokens: int = Field(16, ge=1, description="Most tokens kept of a picture; patches are averaged.")
    fusion: Fusion = Field("cross_attention", description="How the embeddings of picture and text become one.")
    queries: Literal["text", "image", "all"] = Field(
        "text", description="With cross_attention: whose tokens ask; both modalities answer."
    )
    hidden: int = Field(128, ge=4, le=4096, description="Width of the fusion.")
    layers: int = Field(2, ge=1, le=48, description="Blocks of the fusion.")
    heads: int = Field(4, ge=1, description="Attention heads.")
    dropout: float = Field(0.1, ge=0, lt=1, description="In training, and sampled at use for the uncertainty.")
    mc_samples: int = Field(8, ge=1, le=1000, description="Dropout masks drawn for the epistemic uncertainty.")

    @field_validator("vision", "text")
    @classmethod
    def _known_builtin(cls, path: str) -> str:
        return bundled(path, BUILTIN_MODELS)

    @model_validator(mode="after")
    def _divides(self) -> RewardModelConfig:
        if self.hidden % self.heads:
            raise conflict("heads", f"{self.heads} does not divide hidden {self.hidden}")
        return self


class AnnotatorsConfig(Block):
    """Simulated annotators of EmojiScenes. They look at the picture; the reward model learns from what they say."""

    count: int = Field(5, ge=1, description="Annotators, each with a taste of its own.")
    spread: float = Field(0.2, ge=0, description="Standard deviation of the logarithm of a taste's weights.")
    noise: float = Field(0.45, ge=0, description="Standard deviation of each judgement, where an object of three is 1.")
    length_bias: float = Field(0.0, description="What a word is worth to them as such: a bias to find.")
    seed: int = Field(0, ge=0, description="Which annotators.")


class SimulatedJudgements(Block):
    """Preferences or ratings of EmojiScenes by simulated annotators."""

    type: Literal["scenes"] = Field("scenes", description="The bundled pictures and simulated annotators.")
    seed: int = Field(1, ge=0, description="Which sequence of scenes; recipes that train policies use 0.")
    pictures: int = Field(6000, ge=8, description="Pictures to learn from.")
    candidates: int = Field(6, ge=2, le=16, description="Captions of a picture, right ones and wrong ones.")
    pairs: int = Field(4, ge=1, description="Choices a picture, where preferences are learned.")
    annotators: AnnotatorsConfig = Field(AnnotatorsConfig(), description="Noise and bias of those who judge.")
    prompt: str = Field("Describe the picture.", min_length=1, description="What the captions answer.")


class JudgementFile(Block):
    """Your own preferences or ratings: JSONL or parquet, as docs/data.md says."""

    type: Literal["file"] = Field("file", description="Preferences or ratings from a file.")
    path: str = Field(min_length=1, description="A .jsonl or .parquet file.")
    prompt: str = Field("Describe the picture.", min_length=1, description="Prompt of rows that name none.")
    on_bad_row: Literal["skip", "raise"] = Field("raise", description="Skip and list unreadable rows, or stop.")


class Corruptions(Block):
    """Preferences made from captions: a reference is better than the same reference with a fault put in."""

    type: Literal["corruptions"] = Field("corruptions", description="From any captioned pictures.")
    source: DataConfig = Field(ScenesConfig(), description="Pictures with references, as in a recipe's `data`.")
    kinds: tuple[str, ...] = Field((), description="Faults to put in (docs/data.md); empty: all of them.")
    per_picture: int = Field(4, ge=1, description="Pairs a picture.")
    pictures: int = Field(6000, ge=8, description="Most pictures taken.")
    seed: int = Field(0, ge=0, description="Which faults go where.")


Judgements = Annotated[SimulatedJudgements | JudgementFile | Corruptions, Field(discriminator="type")]


class RewardTrainConfig(Block):
    """How long and how fast. Training stops early when the held-out loss stops falling."""

    steps: int = Field(600, ge=1, description="Most optimizer steps.")
    batch: int = Field(128, ge=1, description="Pairs or ratings a step, over all processes.")
    lr: float = Field(1e-3, gt=0, lt=1, description="Peak learning rate, annealed by a cosine to 0.")
    warmup: int = Field(30, ge=0, description="Steps in which the learning rate rises from 0.")
    weight_decay: float = Field(0.01, ge=0, description="Of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Clip the gradient to this norm.")
    every: int = Field(50, ge=1, description="Steps between looks at the held-out loss.")
    patience: int = Field(4, ge=1, description="Looks without a better held-out loss before training stops.")
    validation: float = Field(0.1, gt=0, lt=0.5, description="Share of pictures for early stopping and term weights.")
    seed: int = Field(0, ge=0, description="Seed of initial weights, order and dropout.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to run.")


class RewardEvalConfig(Block):
    """Judgement on pictures that training never saw."""

    pictures: int = Field(400, ge=8, description="Held-out pictures, where they can be made.")
    fraction: float = Field(0.2, gt=0, lt=0.5, description="Share of pictures held out of a file of judgements.")


class RewardLogging(Block):
    """Where the reward model goes."""

    dir: str = Field("runs", min_length=1, description="Folder of run folders.")
    name: str | None = Field(None, pattern=r"^\w[\w.-]*$", description="The model's folder; null uses the name.")


class RewardRecipe(Block):
    """One reward model to train."""

    name: str = Field("reward", pattern=r"^\w[\w.-]*$", description="Letters, digits, - . _; by default the file's.")
    model: RewardModelConfig | None = Field(
        RewardModelConfig(), description="The network; null: weights of terms alone."
    )
    data: Judgements = Field(SimulatedJudgements(), description="Preferences or ratings.")
    loss: Literal["bradley_terry", "mse", "aleatoric"] = Field(
        "bradley_terry",
        description="bradley_terry learns from preferences; mse and aleatoric (mean and variance) from ratings.",
    )
    terms: tuple[LinearTerm, ...] = Field(
        (), description="Terms whose weights are learned, beside the network's; costs by their own sign."
    )
    train: RewardTrainConfig = Field(RewardTrainConfig(), description="Steps, batch, learning rate.")
    eval: RewardEvalConfig = Field(RewardEvalConfig(), description="Held-out judgement.")
    logging: RewardLogging = Field(RewardLogging(), description="Run folder.")

    @model_validator(mode="after")
    def _possible(self) -> RewardRecipe:
        if self.model is None and not self.terms:
            raise conflict("terms", "missing; a reward without a network needs terms")
        labels = [term.label for term in self.terms]
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise conflict(f"terms.{index}.name", f"a term named {label!r} is already there; give it another name")
        for index, term in enumerate(self.terms):
            for key, default in (("weight", 1.0), ("normalize", "none")):
                if getattr(term, key) != default:
                    raise conflict(f"terms.{index}.{key}", "weights are learned, of terms as measured; remove the key")
        for index, label in enumerate(labels):
            if label in ("network", "uncertainty"):
                raise conflict(f"terms.{index}.name", f"{label!r} is what the network's own term is called")
        if self.loss != "bradley_terry" and isinstance(self.data, Corruptions):
            raise conflict("loss", f"{self.loss} learns from ratings, and corruptions give preferences")
        return self

    @property
    def run_name(self) -> str:
        """The model folder's name."""
        return self.logging.name or self.name
