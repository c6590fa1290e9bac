"""The `reward` block of a recipe: terms, the learned model, shaping, and the guards against gaming."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mmft.config.base import BUILTIN_REWARDS, Block, bundled, conflict


class TermBase(Block):
    """What every reward term has."""

    name: str | None = Field(None, pattern=r"^\w+$", description="Name in logs; null uses the type.")
    weight: float = Field(1.0, ge=0, description="Factor in the sum; costs are subtracted by their own sign.")
    normalize: Literal["none", "minmax", "zscore"] = Field(
        "none", description="Put the term on a common scale by running statistics before weighting."
    )

    @property
    def label(self) -> str:
        """The name under which the term is logged."""
        return self.name or self.type  # type: ignore[attr-defined]


class BleuTerm(TermBase):
    """Sentence BLEU against all references, from 0 to 1 (sacrebleu)."""

    type: Literal["bleu"] = Field("bleu", description="Overlap of word n-grams with the references.")
    max_order: int = Field(4, ge=1, le=8, description="Longest n-gram.")
    smoothing: Literal["exp", "floor", "add-k", "none"] = Field(
        "exp", description="What replaces an n-gram order without matches (Chen and Cherry 2014)."
    )
    smooth_value: float | None = Field(None, ge=0, description="k of add-k or the floor; null: sacrebleu's default.")


class DetailTerm(TermBase):
    """Specific content shared with the references, weighted by how informative it is."""

    type: Literal["detail"] = Field("detail", description="Informative words and bindings, not a word count.")
    beta: float = Field(1.0, gt=0, le=10, description="F-beta: above 1 favours recall, below 1 precision.")
    idf_power: float = Field(1.0, ge=0, le=4, description="Exponent on inverse document frequency; 0 counts alike.")
    binding_weight: float = Field(1.0, ge=0, description="Worth of a pair (red, apple) or a relation beside a word.")
    consensus: float = Field(0.5, ge=0, le=1, description="1: what more references say counts more; 0: counts alike.")
    hallucination_penalty: float = Field(0.0, ge=0, description="What a wholly unsupported caption loses.")


class CiderDTerm(TermBase):
    """CIDEr-D against all references, from 0 to 10; document frequencies are those of the training references."""

    type: Literal["cider_d"] = Field("cider_d", description="Agreement with references, rare words counting more.")
    max_order: int = Field(4, ge=1, le=8, description="Longest n-gram.")
    sigma: float = Field(6.0, gt=0, description="How far lengths may differ, in words.")
    count_end: bool = Field(True, description="The end of a sentence counts as a word, so that breaking off costs.")
    contrast: float = Field(
        0.0, ge=0, description="Less this much of what the caption earns by other pictures' references (CIDErBtw)."
    )


class RougeLTerm(TermBase):
    """F1 of the longest common subsequence of words, the best over the references, from 0 to 1."""

    type: Literal["rouge_l"] = Field("rouge_l", description="Longest common subsequence with a reference.")


class ChrfTerm(TermBase):
    """Overlap of character n-grams with the nearest reference, from 0 to 1 (sacrebleu)."""

    type: Literal["chrf"] = Field("chrf", description="Overlap of character n-grams.")


class VqaAccuracyTerm(TermBase):
    """How many people gave this answer, as VQA counts it, from 0 to 1; rows need answers."""

    type: Literal["vqa_accuracy"] = Field("vqa_accuracy", description="Agreement with people's answers.")


class ExactMatchTerm(TermBase):
    """1 for an answer that somebody gave, after VQA's normalisation; rows need answers."""

    type: Literal["exact_match"] = Field("exact_match", description="Whether it is one of the answers.")


class ClipScoreTerm(TermBase):
    """CLIPScore of caption and picture: 2.5 times their cosine, by any CLIP or SigLIP checkpoint."""

    type: Literal["clip_score"] = Field("clip_score", description="How well caption and picture go together.")
    model: str = Field(min_length=1, description="The CLIP or SigLIP checkpoint: a folder or a hub id.")
    references: bool = Field(False, description="RefCLIPScore: the harmonic mean with the nearest reference's cosine.")
    prompt: str = Field("A photo depicts", description="What stands before each caption.")


class LengthTerm(TermBase):
    """A cost for each word outside a target band."""

    type: Literal["length"] = Field("length", description="Words too few or too many (a cost).")
    target: tuple[int, int] = Field((4, 20), description="[low, high]: lengths in words that cost nothing.")

    @field_validator("target")
    @classmethod
    def _ordered(cls, target: tuple[int, int]) -> tuple[int, int]:
        low, high = target
        if not 0 <= low < high:
            raise conflict("", f"must be [low, high] with 0 <= low < high, got [{low}, {high}]")
        return target


class RepetitionTerm(TermBase):
    """A cost for saying the same thing again."""

    type: Literal["repetition"] = Field("repetition", description="Share of repeated content (a cost).")
    ngram: int = Field(2, ge=1, le=8, description="A run of this many content words said before is a repeat.")


class BadEndingTerm(TermBase):
    """A cost for captions that stop in the middle."""

    type: Literal["bad_ending"] = Field("bad_ending", description="Cut off, or ends on a function word (a cost).")


class PythonTerm(TermBase):
    """Any function `f(captions, rows) -> list of float`."""

    type: Literal["python"] = Field("python", description="Your own function.")
    function: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="`module:function`, importable where mmft runs."
    )
    sign: Literal[1, -1] = Field(1, description="1: a reward; -1: a cost.")


RewardTerm = Annotated[
    BleuTerm
    | CiderDTerm
    | RougeLTerm
    | ChrfTerm
    | DetailTerm
    | ClipScoreTerm
    | VqaAccuracyTerm
    | ExactMatchTerm
    | LengthTerm
    | RepetitionTerm
    | BadEndingTerm
    | PythonTerm,
    Field(discriminator="type"),
]


class ShapingConfig(Block):
    """Potential-based shaping (equation E15): a reward for each token that leaves the best policy as it is."""

    beta: float = Field(1.0, ge=0, description="Weight of the potential's increase.")
    potential: RewardTerm = Field(
        DetailTerm(), description="A term whose value of the caption so far is the potential; its weight is not used."
    )


class TripwireConfig(Block):
    """A metric that is not in the reward, watched beside it: a reward that rises while it falls is being gamed."""

    metric: str = Field(
        "auto",
        pattern=r"^\w+$",
        description="A metric of docs/metrics.md; `auto`: oracle_f1 where pictures have a scene graph, else rouge_l.",
    )
    threshold: float = Field(0.1, gt=0, lt=1, description="Fall of the metric, relative to its best, that counts.")
    window: int = Field(10, ge=2, description="Steps over which reward and metric are averaged.")
    action: Literal["warn", "stop", "off"] = Field("warn", description="What happens when it trips.")

    @field_validator("action", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML 1.1 reads a bare `off` as a boolean


class RewardConfig(Block):
    """A weighted sum of terms (equations E28 and E34), with weights given here or learned."""

    terms: tuple[RewardTerm, ...] = Field(
        (),
        description="The terms, each logged raw, normalised, weighted. Beside a model: in place of its term of that "
        "name, or added to them; weight 0 leaves a term out.",
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="A reward model that `mmft reward train` made: `builtin:NAME`, a folder or a hub id. It brings "
        "its terms with their learned weights, and its own prediction.",
    )
    uncertainty_penalty: float = Field(
        0.0, ge=0, description="kappa: in training, kappa * sigma of the network's weighted score is subtracted."
    )
    shaping: ShapingConfig | None = Field(None, description="Reward for progress within a caption; null: none.")
    on_error: Literal["raise", "drop"] = Field(
        "raise",
        description="A term that fails or gives no finite number on a caption: stop, or leave that caption out.",
    )
    tripwire: TripwireConfig = Field(TripwireConfig(), description="Guard against gaming of the reward.")
    workers: int = Field(0, ge=0, le=256, description="Processes for slow terms without pictures; 0: none.")

    @field_validator("model")
    @classmethod
    def _known_builtin(cls, model: str | None) -> str | None:
        return model if model is None else bundled(model, BUILTIN_REWARDS)

    @model_validator(mode="after")
    def _usable(self) -> RewardConfig:
        labels = [term.label for term in self.terms]
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise conflict(f"terms.{index}.name", f"a term named {label!r} is already there; give it another name")
        if self.model is None and not self.terms:
            raise conflict("terms", "missing; list terms or set reward.model")
        if self.model is None and not any(term.weight for term in self.terms):
            raise conflict("terms", "every weight is 0, so there is nothing to learn")
        if self.model is None and self.uncertainty_penalty:
            raise conflict("uncertainty_penalty", "there is no reward.model whose uncertainty could be subtracted")
        return self
