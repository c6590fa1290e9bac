"""`mmft push` and `merge`: nothing is called published or merged that does not answer like the original."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from mmft.config import BUILTIN_PREFIX, HubConfig, ModelConfig, Recipe, RewardRecipe, load_recipe, load_reward_recipe
from mmft.hub import KINDS, CardFacts, Hub, Kind, Pushed, is_local, kind_of, licence_in, model_card, stage
from mmft.models.merging import AGREEMENT, difference, load_plain, logits_of, merged, save_plain
from mmft.models.policy import Policy, load_adapter, load_pretrained
from mmft.models.reward import load_reward_model
from mmft.report.console import say
from mmft.report.folder import ADAPTER, EVAL, RECIPE
from mmft.run.describing import needs_mmft, policy_facts, reward_facts
from mmft.run.device import quiet_loading
from mmft.types import Row, UserError

_PROBE_SIDE = 224
_OTHER = "mmft_other"  # an adapter beside the first one


@dataclass(frozen=True)
class Target:
    """What is published: the folder of its weights, and the run that they come from where that is known."""

    kind: Kind
    weights: Path
    folder: Path
    recipe: Recipe | RewardRecipe | None
    model: ModelConfig | None  # the base, of an adapter

    @property
    def prompt(self) -> str:
        return self.recipe.data.prompt if isinstance(self.recipe, Recipe) else "Describe the picture."


def push(
    path: str,
    repo: str | None = None,
    private: bool | None = None,
    base: str | None = None,
    as_merged: bool = False,
    message: str = "",
) -> Pushed:
    """Publishes a run's adapter, a reward model or a plain model; returns where it is.

    repo, private: None: as the run's recipe says (`hub`), else private.
    base: where others find the base model, if it is on a hub and the run's `model.path` does not say so. as_merged:
    publishes the model with its adapter folded in. Loaded again before the push and after it from the hub, it must
    answer as what it was made of. Raises UserError.
    """
    quiet_loading()
    console, hub = Console(stderr=True), Hub()
    target = find_target(Path(path))
    hub_config = target.recipe.hub if isinstance(target.recipe, Recipe) else HubConfig()
    repo, private = repo or hub_config.repo, hub_config.private if private is None else private
    if repo is None:
        raise UserError("--repo: where to? USER/NAME")
    if as_merged and target.model is None:
        raise UserError(f"{path}: --merged: has no adapter to merge")
    hub.user()  # before anything is loaded
    with tempfile.TemporaryDirectory(prefix="mmft-push-") as name:
        aside = Path(name)
        if as_merged or (target.kind.name == "model" and target.folder != target.weights):
            _merge(target, aside / "merged", torch.float32, console)
            target = Target(KINDS["model"], aside / "merged", target.folder, target.recipe, None)
        answers_of = _Witness(target)
        with console.status(f"loading {path}"):
            answers = answers_of(target.weights)
        found = base or _base_on_hub(target)
        facts = _facts(target, repo, found, _licence(target, found, hub))
        staged = stage(target.weights, target.kind, aside / "staged", model_card(facts), _record(target), found)
        with console.status("comparing what will be pushed with the original"):
            _demand_same(answers, answers_of(staged), "what would be pushed")
        why = message or f"Upload {target.kind.name} with mmft"
        pushed = hub.push(staged, repo, private, why, lambda line: say(console, line))
        hub.pull(repo, aside / "pulled", pushed.revision)
        with console.status("comparing what is on the hub with the original"):
            _demand_same(answers, answers_of(aside / "pulled"), f"what {repo} holds")
    say(
        console, f"pushed {', '.join(pushed.files)}\n{pushed.url} answers as {path} does (commit {pushed.revision[:8]})"
    )
    return pushed


def merge(path: str, out: Path, dtype: str = "float32") -> Path:
    """Writes a run's model with its adapter folded in as a plain checkpoint, read back and compared. Raises UserError.

    dtype: of the weights; anything but float32 rounds them.
    """
    quiet_loading()
    if out.exists():
        raise UserError(f"{out}: is there already; choose another folder")
    target, console = find_target(Path(path)), Console(stderr=True)
    if target.model is None:
        raise UserError(f"{path}: has no adapter to merge")
    worst = _merge(target, out, getattr(torch, dtype), console)
    say(console, f"{out}: a plain checkpoint; its logits are the adapter's within {worst:.1e}")
    return out


def find_target(path: Path) -> Target:
    """What is in a folder: a run's adapter or weights, an adapter, a reward model, a model. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    weights = path / ADAPTER if (path / ADAPTER).is_dir() else path
    marked = any((weights / kind.mark).is_file() for kind in KINDS.values())
    if not marked and (path / RECIPE).is_file():
        raise UserError(f"{path}: no adapter was saved here; did the training end?")
    kind = kind_of(weights)
    recipe: Recipe | RewardRecipe | None = None
    if (path / RECIPE).is_file():
        recipe = load_reward_recipe(path / RECIPE) if kind.name == "reward" else load_recipe(path / RECIPE)
    if isinstance(recipe, Recipe) and (kind.name == "adapter" or weights != path):
        return Target(kind, weights, path, recipe, recipe.model.model_copy(update={"quantization": None}))
    return Target(kind, weights, path, recipe, _own_base(weights) if kind.name == "adapter" else None)


def _own_base(adapter: Path) -> ModelConfig:
    """The base that an adapter without a recipe names."""
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter}: adapter_config.json names no base model")
    return ModelConfig(path=base)


def _base_on_hub(target: Target) -> str | None:
    """The base's hub id; None for one that is bundled or on this machine."""
    path = target.model.path if target.model is not None else ""
    if isinstance(target.recipe, Recipe):
        path = target.recipe.model.path
    return None if not path or path.startswith(BUILTIN_PREFIX) or is_local(path) else path


def _licence(target: Target, base: str | None, hub: Hub) -> str | None:
    """The base's licence, as its card says on the hub or in its folder."""
    if base is not None:
        return hub.licence(base)
    path = target.recipe.model.path if isinstance(target.recipe, Recipe) else ""
    if path.startswith(BUILTIN_PREFIX):
        return "apache-2.0"  # what is bundled is under mmft's own
    card = Path(path) / "README.md"
    return licence_in(card.read_text(encoding="utf-8", errors="replace")) if path and card.is_file() else None


def _facts(target: Target, repo: str, base: str | None, licence: str | None) -> CardFacts:
    if target.kind.name == "reward":
        recipe = target.recipe if isinstance(target.recipe, RewardRecipe) else None
        return reward_facts(target.folder, recipe, repo)
    if isinstance(target.recipe, Recipe):
        config = target.model.resolved_path() if target.model is not None else str(target.weights)
        return policy_facts(target.folder, target.recipe, repo, target.kind.name, base, licence, needs_mmft(config))
    return CardFacts(repo, target.kind.name, base, base or "", licence)


def _record(target: Target) -> dict[str, str]:
    """The run's own files that go along, as text."""
    found = {name: target.folder / name for name in (RECIPE, EVAL)}
    return {name: file.read_text(encoding="utf-8") for name, file in found.items() if file.is_file()}


class _Witness:
    """What shows that folders hold the same: a model's logits, or a reward model's weights in a row.

    Weights have their checkpoint's own type. The base of adapters is loaded once.
    """

    def __init__(self, target: Target):
        self.target = target
        self._policy: Policy | None = None

    def __call__(self, folder: Path) -> Tensor:
        if self.target.kind.name == "reward":
            model = load_reward_model(str(folder))
            towers = (tensor for tower in model.towers for tensor in tower.state_dict().values())
            return torch.cat([tensor.flatten().float() for tensor in (*model.state_dict().values(), *towers)])
        if self.target.kind.name == "adapter":
            return self._of_adapter(folder)
        return logits_of(Policy(*load_pretrained(ModelConfig(path=str(folder.resolve())))), _probe(self.target))

    def _of_adapter(self, folder: Path) -> Tensor:
        assert self.target.model is not None
        if self._policy is None:
            self._policy = load_adapter(self.target.model, folder)
            return logits_of(self._policy, _probe(self.target))
        model = self._policy.model
        model.load_adapter(str(folder), adapter_name=_OTHER)
        try:
            model.set_adapter(_OTHER)
            return logits_of(self._policy, _probe(self.target))
        finally:
            model.set_adapter("default")
            model.delete_adapter(_OTHER)


def _demand_same(original: Tensor, other: Tensor, what: str) -> None:
    if not torch.equal(original, other):
        raise RuntimeError(f"{what} gives other logits than the original (by {difference(original, other):.3g})")


def _merge(target: Target, out: Path, dtype: torch.dtype, console: Console) -> float:
    """Merges into `out`; returns how far the logits of what was written are from the adapter's. Raises RuntimeError,
    leaving nothing, where that is more than rounding explains.
    """
    assert target.model is not None
    with console.status("merging"):
        policy = load_adapter(target.model, target.weights, torch.float32)
        answers = logits_of(policy, _probe(target))
        policy = merged(policy)
        save_plain(Policy(policy.model.to(dtype), policy.processor), out)
        processor = policy.processor
        del policy
        worst = difference(answers, logits_of(load_plain(out, processor, torch.float32), _probe(target)))
    if dtype == torch.float32 and worst > AGREEMENT:
        shutil.rmtree(out)
        raise RuntimeError(f"{out}: the merged model's logits are off by {worst:.3g}")
    return worst


def _probe(target: Target) -> Row:
    """A picture of noise and the run's prompt."""
    pixels = np.random.default_rng(0).integers(0, 256, (_PROBE_SIDE, _PROBE_SIDE, 3), dtype=np.uint8)
    return Row("probe", Image.fromarray(pixels), target.prompt)
