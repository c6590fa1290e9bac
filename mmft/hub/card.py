"""The model card: what a run knows of itself, for people who find its adapter on a hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mmft import __version__


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    kind: adapter, model or reward. base: the base model's id on the hub, None where it has none there; base_name: how
    people call it. licence: of the base model, None where it is not known. data: in words; dataset: its id on the hub.
    learned: lines "how: value" of training. reward: (term, weight). table: (metric, before, after, change, verdict);
    scores: name -> mean after training. recipe: whether it goes along. needs_mmft: whether the base has a part that
    transformers learns of from mmft. bundled: whether mmft brings the base.
    """

    repo: str
    kind: str
    base: str | None = None
    base_name: str = ""
    licence: str | None = None
    data: str = ""
    dataset: str | None = None
    learned: Mapping[str, str] = field(default_factory=dict)
    reward: Sequence[tuple[str, str]] = ()
    table: Sequence[tuple[str, str, str, str, str]] = ()
    table_note: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    limits: Sequence[str] = ()
    recipe: bool = False
    needs_mmft: bool = False
    bundled: bool = False


def model_card(facts: CardFacts) -> str:
    """A README.md with the front matter that hubs read."""
    parts = [
        f"---\n{_front_matter(facts)}\n---",
        f"# {facts.repo.rpartition('/')[2]}",
        _opening(facts),
        _loading(facts),
        _results(facts),
        _training(facts),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in facts.limits) if facts.limits else "",
        _licence(facts),
        f"Made with mmft {__version__}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def licence_in(card: str) -> str | None:
    """The licence that a card's front matter names."""
    try:
        found = ModelCard(card, ignore_metadata_errors=True).data.get("license")
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def _front_matter(facts: CardFacts) -> str:
    scores = [
        EvalResult(
            task_type="image-to-text", dataset_type=facts.dataset or "custom", dataset_name=facts.data or "held out",
            metric_type=name, metric_value=round(value, 4),
        )
        for name, value in facts.scores.items()
    ]  # fmt: skip
    data = ModelCardData(
        base_model=facts.base,
        library_name="peft" if facts.kind == "adapter" else "transformers",
        pipeline_tag="image-text-to-text" if facts.kind != "reward" else None,
        license=facts.licence,
        datasets=[facts.dataset] if facts.dataset else None,
        tags=["mmft", "reward-model" if facts.kind == "reward" else "reinforcement-learning"],
        model_name=facts.repo.rpartition("/")[2] if scores else None,
        eval_results=scores or None,
    )
    return data.to_yaml().strip()


def _opening(facts: CardFacts) -> str:
    how = facts.learned.get("algorithm", "")
    trained = f", fine-tuned by {how}" if how else ""
    if facts.kind == "adapter":
        return f"A LoRA adapter for {facts.base_name or 'a vision-language model'}{trained}."
    if facts.kind == "reward":
        return "A reward model: it looks at a picture, reads a caption, and says how good the caption is."
    return f"{facts.base_name or 'A vision-language model'}{trained}, with its adapter folded into the weights."


def _loading(facts: CardFacts) -> str:
    pull = f"mmft pull {facts.repo} {facts.repo.rpartition('/')[2]}"
    if facts.kind == "reward":
        return f"## Use\n\n```yaml\nreward:\n  model: {facts.repo}\n```\n\nin a recipe of mmft, or `{pull}`."
    own = "import mmft.models  # the base has a tower of mmft's\n" if facts.needs_mmft else ""
    if facts.kind == "model":
        code = (
            f"{own}from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f'model = AutoModelForImageTextToText.from_pretrained("{facts.repo}")\n'
            f'processor = AutoProcessor.from_pretrained("{facts.repo}")'
        )
    else:
        base = facts.base or "path/to/base"
        code = (
            f"{own}from peft import PeftModel\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f'base = AutoModelForImageTextToText.from_pretrained("{base}")\n'
            f'processor = AutoProcessor.from_pretrained("{base}")\n'
            f'model = PeftModel.from_pretrained(base, "{facts.repo}")'
        )
    where = "" if facts.base or facts.kind == "model" else f"\n\nThe base, {facts.base_name}, is not on the hub."
    folder = facts.repo.rpartition("/")[2]
    return f"## Use\n\n```python\n{code}\n```{where}\n\nOr `{pull}`, then `mmft generate {folder} picture.png`" + (
        "." if facts.base or facts.bundled or facts.kind == "model" else ", with the base's place in `recipe.yaml`."
    )


def _results(facts: CardFacts) -> str:
    if not facts.table:
        return ""
    lines = ["| metric | before | after | change | |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(_cell(cell) for cell in line)} |" for line in facts.table]
    note = f"\n\n{facts.table_note}" if facts.table_note else ""
    return f"## Results\n\nOn {facts.data or 'held-out pictures'}, with 95% intervals.\n\n" + "\n".join(lines) + note


def _training(facts: CardFacts) -> str:
    lines = [f"- {name}: {value}" for name, value in facts.learned.items()]
    if facts.data:
        lines.append(f"- data: {facts.data}")
    text = "\n".join(lines)
    if facts.reward:
        terms = "\n".join(f"| {_cell(name)} | {weight} |" for name, weight in facts.reward)
        text += f"\n\nReward:\n\n| term | weight |\n|---|---|\n{terms}"
    if facts.recipe:
        text += "\n\nEverything else is in `recipe.yaml`, which `mmft train` reads."
    return f"## Training\n\n{text}" if text else ""


def _licence(facts: CardFacts) -> str:
    if facts.kind == "reward" or not facts.base_name:
        return ""
    known = f"under {facts.licence}" if facts.licence else "under a licence that was not found; look it up before use"
    return f"## Licence\n\nThe base, {facts.base_name}, is {known}, which holds for what is derived from it too."


def _cell(text: str) -> str:
    """Text that cannot end a table's cell or start markup."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
