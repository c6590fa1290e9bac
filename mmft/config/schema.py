"""The recipe schema: frozen, typed, bounded, closed to unknown keys.

One model a block of the YAML, unions on `type` where a block has several kinds. A kind appears here when it runs, not
before: an unknown `type` is answered with the kinds that exist. Numbers that follow from others are computed where
they are used and never stored here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mmft.config.base import BUILTIN_MODELS, BUILTIN_PREFIX, Block, bundled, conflict, resolve, yaml_switch
from mmft.config.reward import RewardConfig

# Initialisations of PEFT that move the pretrained weights: with the adapter off, the model would not be the pretrained
# one, and neither the reference of the KL term nor the anchor would be right.
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraConfig(Block):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = Field(16, ge=1, le=1024, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Scale: an adapter adds alpha / r * B A.")
    target_modules: Literal["language", "all-linear"] | tuple[str, ...] = Field(
        "language",
        description="`language`: every linear layer of the language model; `all-linear`: the vision tower's too; "
        "or a list of names in the language model, as q_proj or self_attn.q_proj.",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    use_rslora: bool = Field(
        False, description="Scale by alpha / sqrt(r), for high ranks (Kalajdzievski 2023, arXiv:2312.03732)."
    )
    use_dora: bool = Field(
        False, description="Learn each output's magnitude apart from its direction (Liu et al. 2024, arXiv:2402.09353)."
    )
    modules_to_save: tuple[str, ...] = Field(
        (), description="Modules trained whole beside the adapters and saved with them, by name, as lm_head."
    )
    init: Literal["default", "gaussian"] = Field(
        "default",
        description="How A is drawn: `default` (Kaiming) or `gaussian`. B is 0: a fresh adapter does nothing.",
    )

    @field_validator("init", mode="before")
    @classmethod
    def _starts_at_the_pretrained(cls, init: Any) -> Any:
        if isinstance(init, str) and init.lower().startswith(_MOVES_THE_BASE):
            raise conflict("", f"{init} changes the pretrained weights, which KL and anchor compare with; use default")
        return init


class ModelConfig(Block):
    """The pretrained policy."""

    path: str = Field(
        f"{BUILTIN_PREFIX}tiny-vlm",
        min_length=1,
        description="`builtin:NAME`, a local folder, or a hub id that AutoModelForImageTextToText loads.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the frozen weights; `auto` follows train.precision."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")
    quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="Quantise the frozen weights with bitsandbytes, as QLoRA does (needs LoRA)."
    )
    lora: LoraConfig | None = Field(LoraConfig(), description="Adapters; null fine-tunes every weight.")
    encode_once: Annotated[Literal["auto", "on", "off"], BeforeValidator(yaml_switch)] = Field(
        "auto",
        description="Encode each distinct picture once and reuse its features; `auto`: when the tower is frozen.",
    )
    feature_cache_gb: float = Field(
        2.0, ge=0, description="Memory for pictures' features, in GiB; the least recently used are dropped."
    )

    @field_validator("path")
    @classmethod
    def _known_builtin(cls, path: str) -> str:
        return bundled(path, BUILTIN_MODELS)

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.quantization and self.lora is None:
            raise conflict("quantization", "quantised weights cannot be trained; set model.lora")
        trains_tower = self.lora is None or self.lora.target_modules == "all-linear"
        if self.encode_once == "on" and trains_tower:
            raise conflict("encode_once", "cannot be on while the vision tower trains; use off or auto")
        return self

    def resolved_path(self) -> str:
        """What `from_pretrained` is given: a bundled model's folder, or the path or hub id as written."""
        return resolve(self.path)


class ScenesConfig(Block):
    """EmojiScenes: pictures composed on the fly, with several references and an exact scene graph for evaluation."""

    type: Literal["scenes"] = Field("scenes", description="The bundled synthetic pictures.")
    seed: int = Field(0, ge=0, description="Which infinite sequence of scenes.")
    samples: int = Field(20_000, ge=1, description="Training scenes in one pass.")
    prompt: str = Field("Describe the picture.", min_length=1, description="What the policy is asked.")


class ColumnsConfig(Block):
    """Names of the fields of metadata.jsonl or metadata.csv."""

    image: str = Field("file_name", min_length=1, description="Picture file, relative to the folder.")
    references: str | None = Field(
        None, min_length=1, description="Caption or list of captions; null tries caption, captions, references."
    )
    question: str = Field("question", min_length=1, description="Question about the picture, used as its prompt.")
    answer: str | None = Field(None, min_length=1, description="Answer, or everybody's; null tries answer and answers.")


class ImageFolderConfig(Block):
    """A folder of pictures with captions in a metadata.jsonl or metadata.csv, as `datasets` lays it out."""

    type: Literal["imagefolder"] = Field("imagefolder", description="Your own pictures.")
    path: str = Field(min_length=1, description="The folder.")
    prompt: str = Field("Describe the picture.", min_length=1, description="What the policy is asked.")
    columns: ColumnsConfig = Field(ColumnsConfig(), description="Field names in metadata.jsonl.")
    eval_fraction: float = Field(0.1, ge=0, lt=1, description="Share of pictures held out for evaluation.")
    seed: int = Field(0, ge=0, description="Which pictures are held out.")
    on_bad_row: Literal["skip", "raise"] = Field("skip", description="Skip and list unreadable rows, or stop.")
    max_bad_fraction: float = Field(
        0.1, ge=0, le=1, description="Share of rows that may be skipped before the run stops; 1: any."
    )


class CocoConfig(Block):
    """COCO captions: the official JSON, or Karpathy's, which says itself which pictures are held out."""

    type: Literal["coco"] = Field("coco", description="COCO caption files.")
    path: str = Field(min_length=1, description="captions_*.json, or dataset_coco.json.")
    pictures: str | None = Field(None, min_length=1, description="Folder of the pictures; null: that of the JSON file.")
    heldout_path: str | None = Field(None, min_length=1, description="A second JSON file, to evaluate on.")
    heldout_split: Literal["val", "test"] = Field("val", description="Karpathy's split to evaluate on.")
    prompt: str = Field("Describe the picture.", min_length=1, description="What the policy is asked.")
    eval_fraction: float = Field(0.1, ge=0, lt=1, description="Share held out where the files say nothing.")
    seed: int = Field(0, ge=0, description="Which pictures are held out.")
    on_bad_row: Literal["skip", "raise"] = Field("skip", description="Skip and list unreadable rows, or stop.")
    max_bad_fraction: float = Field(
        0.1, ge=0, le=1, description="Share of rows that may be skipped before the run stops; 1: any."
    )


class TableColumnsConfig(Block):
    """Names of a table's columns; null tries the usual ones."""

    image: str | None = Field(
        None, min_length=1, description="The picture: a path, bytes, base64 text, or what `datasets` keeps."
    )
    references: str | None = Field(None, min_length=1, description="Caption or list of captions.")
    question: str | None = Field(None, min_length=1, description="Question about the picture, used as its prompt.")
    answer: str | None = Field(None, min_length=1, description="Answer to the question, or everybody's.")


class StreamedConfig(Block):
    """What data sets share that are larger than memory."""

    prompt: str = Field("Describe the picture.", min_length=1, description="What the policy is asked.")
    columns: TableColumnsConfig = Field(TableColumnsConfig(), description="Names of columns.")
    eval_fraction: float = Field(0.1, ge=0, lt=1, description="Share of pictures held out for evaluation.")
    seed: int = Field(0, ge=0, description="Which pictures are held out.")
    shuffle_window: int = Field(2000, ge=1, description="Rows that are shuffled at once, within 256 MiB.")
    on_bad_row: Literal["skip", "raise"] = Field("skip", description="Skip and list unreadable rows, or stop.")
    max_bad_fraction: float = Field(
        0.1, ge=0, le=1, description="Share of rows that may be skipped before the run stops; 1: any."
    )


class TableConfig(StreamedConfig):
    """JSON lines, CSV or parquet, of any size: read while training goes on."""

    type: Literal["table"] = Field("table", description="Rows of .jsonl, .csv, .tsv or .parquet files.")
    path: str = Field(min_length=1, description="A file, a folder, or a pattern as data/*.parquet.")
    heldout_path: str | None = Field(
        None, min_length=1, description="Held-out rows; null holds out eval_fraction of the pictures."
    )


class HubDataConfig(StreamedConfig):
    """A data set of the hub, or a folder, that `datasets` streams."""

    type: Literal["hub"] = Field("hub", description="A streamed data set.")
    path: str = Field(min_length=1, description="Its id, or a folder.")
    subset: str | None = Field(None, min_length=1, description="Its configuration, where it has several.")
    split: str = Field("train", min_length=1, description="The split to train on.")
    heldout_split: str | None = Field(
        None, min_length=1, description="The split to evaluate on; null holds out eval_fraction of the pictures."
    )


DataConfig = Annotated[
    ScenesConfig | ImageFolderConfig | CocoConfig | TableConfig | HubDataConfig, Field(discriminator="type")
]


class PPOAlgorithm(Block):
    """Proximal policy optimisation with a trained critic (Schulman et al. 2017, arXiv:1707.06347)."""

    type: Literal["ppo"] = Field("ppo", description="The algorithm.")
    gamma: float = Field(1.0, ge=0, le=1, description="Discount per token.")
    lam: float = Field(0.95, ge=0, le=1, description="Lambda of generalised advantage estimation.")
    clip_range: float = Field(0.2, gt=0, lt=1, description="How far the probability ratio may move.")
    value_clip_range: float = Field(0.2, gt=0, description="How far a value may move in one update.")
    critic: Literal["shared", "adapter"] = Field(
        "shared",
        description="`shared`: the value head reads the policy's hidden states; `adapter`: those of a second LoRA "
        "adapter on the same weights, for one more forward pass.",
    )
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    whiten_rewards: bool = Field(False, description="Scale the rewards of a batch to unit variance.")
    whiten_advantages: bool = Field(True, description="Scale the advantages of a batch to mean 0, variance 1.")
    missing_eos_penalty: float | None = Field(
        None, ge=0, description="Subtracted from the reward of a caption that does not end by itself."
    )
    target_kl: float | None = Field(None, gt=0, description="Stop an update early when its approximate KL passes this.")
    max_grad_norm: float = Field(1.0, gt=0, description="Clip the gradient to this norm.")


class SFTAlgorithm(Block):
    """Supervised fine-tuning on the references, or answers, of the data: maximum likelihood by TRL's SFTTrainer."""

    type: Literal["sft"] = Field("sft", description="The algorithm.")
    max_grad_norm: float = Field(1.0, gt=0, description="Clip the gradient to this norm.")


AlgorithmConfig = Annotated[PPOAlgorithm | SFTAlgorithm, Field(discriminator="type")]


def _ppo_unless_said(value: object) -> object:
    return {"type": "ppo", **value} if isinstance(value, dict) else value


class WarmUpConfig(Block):
    """Supervised steps before reinforcement learning: a policy that never says anything good has nothing to reinforce.

    What is reported as `before` is the policy after them.
    """

    type: Literal["sft"] = Field("sft", description="Maximum likelihood of the references.")
    steps: int = Field(100, ge=1, description="Optimizer steps.")
    batch: int = Field(32, ge=1, description="Captions a step.")
    micro_batch: int | None = Field(None, ge=1, description="Captions a forward pass; null: the whole batch.")
    lr: float = Field(1e-4, gt=0, lt=1, description="Peak learning rate; it falls along a cosine.")

    @model_validator(mode="after")
    def _divides(self) -> WarmUpConfig:
        if self.micro_batch and self.batch % self.micro_batch:
            raise conflict("micro_batch", f"{self.micro_batch} does not divide warm_up.batch {self.batch}")
        return self


class AnchorConfig(Block):
    """L2 distance to the pretrained weights (equation E22), exact for LoRA."""

    l2: float = Field(1e-3, ge=0, description="Weight of the squared distance in the loss; 0 turns it off.")


class KLConfig(Block):
    """Penalty for leaving the pretrained policy, inside the reward."""

    coef: float = Field(0.05, ge=0, description="Weight; the first one when `target` is set.")
    estimator: Literal["k1", "k3"] = Field("k1", description="Schulman's estimators: k1 unbiased, k3 low variance.")
    target: float | None = Field(
        None, gt=0, description="KL per caption to steer to by adapting the weight; null: fixed."
    )
    horizon: int = Field(10_000, ge=1, description="Captions over which the weight adapts.")


class GenerationConfig(Block):
    """How captions are sampled in training."""

    max_new_tokens: int = Field(32, ge=1, description="Longest caption, in tokens.")
    min_new_tokens: int = Field(0, ge=0, description="Tokens before a caption may end.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; log-probabilities use the same.")
    top_k: int = Field(0, ge=0, description="Sample among the k likeliest tokens; 0: all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample among the likeliest tokens of this total probability.")

    @model_validator(mode="after")
    def _ordered(self) -> GenerationConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise conflict("min_new_tokens", f"{self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        return self


class TrainConfig(Block):
    """How long, how much at once, how fast."""

    steps: int = Field(100, ge=1, description="Rollouts, each followed by one update.")
    batch: int = Field(64, ge=1, description="Captions a step, over all processes.")
    samples_per_prompt: int = Field(1, ge=1, description="Captions of each picture in a batch.")
    minibatches: int = Field(1, ge=1, description="Optimizer steps an epoch.")
    micro_batch: int | None = Field(None, ge=1, description="Captions a forward pass; null: a whole minibatch.")
    epochs: int = Field(4, ge=1, description="Passes over each batch.")
    share_prompts: bool = Field(True, description="Captions of one picture share its forward and backward pass.")
    lr: float = Field(1e-4, gt=0, lt=1, description="Learning rate of the policy.")
    value_lr: float | None = Field(None, gt=0, lt=1, description="Learning rate of the value head; null: the same.")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="Learning rate over time.")
    warmup: int = Field(0, ge=0, description="Steps in which the learning rate rises from 0.")
    seed: int = Field(0, ge=0, description="Seed of sampling, shuffling and initial weights.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Arithmetic of the frozen weights; `auto`: bf16 on a CPU or GPU that has it, "
        "fp32 where weights themselves train.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to run.")
    workers: int = Field(2, ge=0, le=64, description="Threads that prepare the next batch while the model computes.")
    save_every: int = Field(50, ge=0, description="Steps between checkpoints; 0: only at the end or when stopped.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        for key in ("samples_per_prompt", "minibatches"):
            if self.batch % getattr(self, key):
                raise conflict(key, f"{getattr(self, key)} does not divide train.batch {self.batch}")
        minibatch = self.batch // self.minibatches
        if self.micro_batch and minibatch % self.micro_batch:
            raise conflict(
                "micro_batch", f"{self.micro_batch} does not divide a minibatch of {minibatch} (batch / minibatches)"
            )
        return self


class EvalConfig(Block):
    """Evaluation on pictures the policy never trained on, with greedy captions."""

    samples: int = Field(256, ge=1, description="Pictures.")
    every: int = Field(0, ge=0, description="Steps between evaluations; 0: only before and after.")
    split: Literal["heldout", "train"] = Field("heldout", description="Which pictures.")
    batch: int = Field(64, ge=1, description="Pictures at a time.")


class LoggingConfig(Block):
    """Where results go."""

    dir: str = Field("runs", min_length=1, description="Folder of run folders.")
    name: str | None = Field(
        None, pattern=r"^\w[\w.-]*$", description="Run folder, letters, digits, - . _; null uses the recipe's name."
    )
    report_to: tuple[str, ...] = Field((), description="Trackers that transformers knows: tensorboard, wandb, trackio.")
    samples_every: int = Field(10, ge=0, description="Steps between batches written to samples.jsonl; 0: none.")


class HubConfig(Block):
    """Where the adapter is published."""

    repo: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$", description="USER/NAME; null keeps it local.")
    private: bool = Field(True, description="Make a private repository.")


class Recipe(Block):
    """One runnable job."""

    name: str = Field("run", pattern=r"^\w[\w.-]*$", description="Letters, digits, - . _; by default the file's name.")
    model: ModelConfig = Field(ModelConfig(), description="The pretrained policy and its adapters.")
    data: DataConfig = Field(description="Pictures and references.")
    reward: RewardConfig = Field(description="What a good caption is.")
    algorithm: Annotated[AlgorithmConfig, BeforeValidator(_ppo_unless_said)] = Field(
        PPOAlgorithm(), description="How the policy learns; without a type, by ppo."
    )
    anchor: AnchorConfig = Field(AnchorConfig(), description="Pull to the pretrained weights.")
    adapter_penalty: float = Field(0.0, ge=0, description="Weight of the adapters' own squared norm (equation E25).")
    kl: KLConfig = Field(KLConfig(), description="Pull to the pretrained policy.")
    generation: GenerationConfig = Field(GenerationConfig(), description="Sampling in training.")
    train: TrainConfig = Field(TrainConfig(), description="Steps, batch, learning rate.")
    warm_up: WarmUpConfig | None = Field(None, description="Supervised steps before those of ppo; null: none.")
    eval: EvalConfig = Field(EvalConfig(), description="Before and after.")
    accelerate: str | None = Field(
        None, min_length=1, description="Config to launch with: a name in recipes/accelerate, as ddp, or a file."
    )
    logging: LoggingConfig = Field(LoggingConfig(), description="Run folder and trackers.")
    hub: HubConfig = Field(HubConfig(), description="Publishing.")

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        if self.adapter_penalty and self.model.lora is None:
            raise conflict("adapter_penalty", "there is no adapter to penalise; set model.lora or use anchor.l2")
        if self.warm_up and self.algorithm.type == "sft":
            raise conflict("warm_up", "algorithm sft is what it would do; raise train.steps")
        if self.ppo.critic == "adapter" and self.model.lora is None:
            raise conflict(
                "algorithm.critic", "adapter needs weights that stay as they are; set model.lora or use shared"
            )
        return self

    @model_validator(mode="after")
    def _can_evaluate(self) -> Recipe:
        data = self.data
        apart = getattr(data, "heldout_path", None) or getattr(data, "heldout_split", None)
        if self.eval.split == "heldout" and not apart and not getattr(data, "eval_fraction", 1):
            raise conflict("data.eval_fraction", "0 leaves no held-out pictures; raise it or set eval.split to train")
        return self

    @property
    def ppo(self) -> PPOAlgorithm:
        """PPO's settings; their defaults where another algorithm trains."""
        return self.algorithm if isinstance(self.algorithm, PPOAlgorithm) else PPOAlgorithm()

    @property
    def run_name(self) -> str:
        """The run folder's name."""
        return self.logging.name or self.name
