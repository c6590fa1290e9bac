"""A run in the words of its model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mmft.config import BUILTIN_PREFIX, Recipe, RewardRecipe
from mmft.hub import CardFacts, is_local
from mmft.models.reward import load_reward_config
from mmft.report.folder import EVAL, RunFolder, read_json
from mmft.report.labels import comparisons, label, summary_line
from mmft.rewards.learned import learned_weights

_ALGORITHMS = {"ppo": "PPO with a trained critic", "sft": "supervised fine-tuning"}
TRIPWIRE = "tripwire.json"


def policy_facts(
    folder: Path,
    recipe: Recipe,
    repo: str,
    kind: str,
    base: str | None,
    licence: str | None,
    needs_own: bool,
) -> CardFacts:
    """Of a run folder. base: the base model's hub id, None where it is not on a hub. needs_own: see `needs_mmft`."""
    record = read_json(folder / EVAL) or {}
    last = RunFolder(folder).last_step()
    rows = comparisons(record, last) if record.get("after") else []
    after = record.get("after") or {}
    data = recipe.data
    return CardFacts(
        repo=repo,
        kind=kind,
        base=base,
        base_name=_base_name(recipe.model.path, base),
        licence=licence,
        data=_data_words(data),
        dataset=data.path if data.type == "hub" and not is_local(data.path) else None,
        learned=_learned(recipe),
        reward=_reward(recipe),
        table=[(row.label.text, str(row.before), str(row.after), str(row.change), row.verdict) for row in rows],
        table_note=summary_line(record) if rows else "",
        scores={name: s["mean"] for name, s in after.items() if s and _is_number(s.get("mean"))},
        limits=_limits(recipe, record, read_json(folder / TRIPWIRE)),
        recipe=True,
        needs_mmft=needs_own,
        bundled=recipe.model.path.startswith(BUILTIN_PREFIX),
    )


def needs_mmft(path: str) -> bool:
    """Whether a checkpoint has a part that transformers learns of from mmft alone."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError):  # code of its own, then, and not ours
        return False
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    return any(type(part).__module__.startswith("mmft.") for part in parts)


def reward_facts(folder: Path, recipe: RewardRecipe | None, repo: str) -> CardFacts:
    """Of a reward model's folder."""
    config = load_reward_config(str(folder))
    record = read_json(folder / EVAL) or {}
    judged = ((record.get("pairwise") or {}).get("reward") or {}).get("all")
    learned = {"loss": config.loss, "fusion": config.fusion or "none: learned weights of terms alone"}
    if recipe is not None:
        learned["pictures"] = _data_words(recipe.data)
    if judged:
        learned["held-out pairwise accuracy"] = _interval(judged)
    if record.get("agreement"):
        learned["two annotators agree on"] = _interval(record["agreement"])
    limits = ["Of pictures unlike those it was trained on it says little; its uncertainty (sigma) tells."]
    return CardFacts(
        repo=repo,
        kind="reward",
        learned=learned,
        reward=[(name, f"{weight:+.3f}") for name, weight in learned_weights(config).items()],
        scores={"pairwise_accuracy": judged["mean"]} if judged else {},
        limits=limits,
        recipe=recipe is not None,
    )


def _base_name(path: str, base: str | None) -> str:
    if base is not None:
        return base
    if path.startswith(BUILTIN_PREFIX):
        return f"{path.removeprefix(BUILTIN_PREFIX)} (bundled with mmft)"
    return f"a model of its own called {Path(path).name}"


def _data_words(data: Any) -> str:
    path = str(getattr(data, "path", ""))
    if data.type == "scenes":
        return "EmojiScenes, synthetic pictures that mmft composes"
    if data.type == "hub" and not is_local(path):
        return path
    return f"pictures of its own ({data.type})"


def _learned(recipe: Recipe) -> Mapping[str, str]:
    t, lora = recipe.train, recipe.model.lora
    found = {
        "algorithm": _ALGORITHMS.get(recipe.algorithm.type, recipe.algorithm.type),
        "steps": f"{t.steps} of {t.batch} captions",
        "learning rate": f"{t.lr:g}, {t.schedule}",
        "adapters": "none: every weight" if lora is None else f"LoRA r {lora.r}, alpha {lora.alpha:g}",
    }
    if recipe.warm_up:
        found["warm-up"] = f"{recipe.warm_up.steps} supervised steps of {recipe.warm_up.batch} captions"
    if recipe.algorithm.type == "ppo":
        found["KL penalty"] = f"{recipe.kl.coef:g} ({recipe.kl.estimator})" if recipe.kl.coef else "none"
    found["L2 anchor"] = f"{recipe.anchor.l2:g}" if recipe.anchor.l2 else "none"
    found["seed"] = str(t.seed)
    return found


def _reward(recipe: Recipe) -> list[tuple[str, str]]:
    model = recipe.reward.model
    rows = []
    if model is not None:
        rows.append((f"learned reward model {Path(model).name if is_local(model) else model}", "its own"))
    return rows + [(term.label, f"{term.weight:g}") for term in recipe.reward.terms]


def _limits(recipe: Recipe, record: Mapping[str, Any], tripwire: Mapping[str, Any] | None) -> list[str]:
    limits = []
    if record.get("after"):
        count = f"{record['samples']} " if record.get("samples") else ""
        limits.append(
            f"Measured on {count}held-out pictures of the same kind, with greedy captions of at most "
            f"{recipe.generation.max_new_tokens} tokens; other pictures and prompts are untested."
        )
        worse = [row.label.text for row in comparisons(record) if row.verdict == "worse"]
        limits.append(f"Worse than before: {', '.join(worse)}." if worse else "No measured metric got worse.")
    else:
        limits.append("Not evaluated after training.")
    if tripwire:
        name = label(str(tripwire.get("metric", "a metric outside the reward"))).text
        limits.append(f"The reward was gamed in training: it rose while {name} fell, from which the run warned.")
    if recipe.data.type == "scenes":
        limits.append("Trained on synthetic scenes of emoji: it knows those and little else.")
    limits.append("It can say things that are not in the picture.")
    return limits


def _interval(summary: Mapping[str, float]) -> str:
    return f"{100 * summary['mean']:.1f}% [{100 * summary['low']:.1f}, {100 * summary['high']:.1f}]"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
