"""Examine every family of the zoo and write what was found into docs/models.md, below its introduction.

    python scripts/model_table.py [--check]     # --check writes nothing; exits 1 where the page says otherwise

Two minutes on one core. tests/torchvision_shim.py says how to have torchvision, which some processors need.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torchvision_shim  # noqa: E402

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torchvision_shim.available()

import zoo  # noqa: E402
from families import FamilyReport, Verdict, examine  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
COLUMNS = {
    "PPO": "two_steps",
    "encode once": "encode_once",
    "sampling": "",
    "shared prompt": "prompt_sharing",
    "adapter off": "adapter_off",
    "padding": "padding",
    "save, reload": "save_reload",
    "several pictures": "several_pictures",
    "text alone": "text_only",
}
DECODERS = {
    "cached": "cache",
    "cached without positions": "cache",
    "cached apart": "cache, a prompt pass a row",
    "cached with pictures": "cache, pictures in every pass",
    "generate": "generate",
    "scoring": "a scoring pass a token",
}
# Families that were tried, and why they are not in the zoo. As far as transformers 5.24 goes.
MISSING = {
    "llama4": "its forward fails in this release of transformers: its output has no `image_outputs`",
    "gemma3n": "its tower comes from timm",
    "fast_vlm": "its tower comes from timm",
    "perception_lm": "its tower comes from timm",
    "granite4_vision": "its connector wants a tower of width 64 at least, too large for the zoo",
}

MARK = "<!-- From here on written by scripts/model_table.py. -->\n"


def cells(report: FamilyReport) -> list[str]:
    """A family's row, without its name."""
    row = []
    for title, name in COLUMNS.items():
        verdict = report.verdicts.get(name, Verdict("no"))
        if title == "sampling":
            row.append(DECODERS.get(report.decoder, "no"))
        elif title == "encode once" and verdict.result == "yes":
            row.append(report.features)
        else:
            row.append("**wrong**" if verdict.result == "wrong" else verdict.result)
    return row


def reasons(report: FamilyReport) -> list[str]:
    """Why something is not "yes", a line each."""
    titles = {name: title for title, name in COLUMNS.items()}
    lines = [f"{titles[name]}: {verdict.reason}" for name, verdict in report.verdicts.items() if verdict.reason]
    lines += [f"sampling: {note.partition(': ')[2]}" for note in report.notes if note.startswith("responses are")]
    return [_plain(line) for line in lines]


def _plain(line: str) -> str:
    """Without measured numbers, which differ between machines, and with markdown's signs as they are."""
    line = re.sub(r" \(?off by [\d.e+-]+ nats\)?", " (draws with other odds)", line)
    line = re.sub(r" change by [\d.e+-]+ nats( a token)?", " change", line)
    if line.startswith("sampling: not by cached"):  # the first way tried, and the model's own: the others fail alike
        ways = re.findall(r"([a-z ]+) \((.*?)\)(?=; [a-z]|$)", line.removeprefix("sampling: not by "))
        line = "sampling: " + "; ".join(f"{name.strip()}: {why}" for name, why in (ways[0], ways[-1]))
    parts = line.split("`")  # inside backticks signs are safe
    return "`".join(part if i % 2 else re.sub(r"([<>|*_\[\]])", r"\\\1", part) for i, part in enumerate(parts))


def found(reports: list[FamilyReport]) -> str:
    """The generated part of the page."""
    passed = sum(report.passes for report in reports)
    table = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    table += [f"| {report.name} | {' | '.join(cells(report))} |" for report in reports]
    notes = []
    for report in reports:
        family = zoo.FAMILIES[report.name]
        extra = [*(["its processor needs torchvision"] if family.needs_torchvision else []), *reasons(report)]
        notes.append(f"**{report.name}**: {_plain(family.notes)}.")
        notes += [f"- {line}" for line in extra]
        notes.append("")
    return "\n".join([
        "", "## Families", "", f"{passed} of {len(reports)} families can be trained.", "", *table, "",
        "## What each is like, and why something is not done", "", *notes, *not_covered(), "",
    ])  # fmt: skip


def not_covered() -> list[str]:
    covered = {_model_type(name) for name in zoo.FAMILIES} | set(MISSING)
    rest = [name for name in sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) if name not in covered]
    return [
        "## Families that were not examined", "",
        *(f"- {name}: {reason}" for name, reason in MISSING.items()), "",
        "Not tried; many of them are variants of the above: " + ", ".join(rest) + ".",
    ]  # fmt: skip


def _model_type(name: str) -> str:
    """What transformers calls a family of the zoo."""
    return {"blip-2-t5": "blip-2"}.get(name, name)


def main() -> int:
    if reason := next((reason for name in zoo.FAMILIES if (reason := zoo.missing(name))), ""):
        print(f"not every family can be examined here: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        reports = [examine(name, zoo.build(name, Path(folder) / name)) for name in zoo.FAMILIES]
    written = PAGE.read_text(encoding="utf-8")
    page = written.partition(MARK)[0] + MARK + found(reports)
    if "--check" in sys.argv[1:]:
        print("docs/models.md is " + ("as found" if page == written else "out of date: python scripts/model_table.py"))
        return 0 if page == written else 1
    PAGE.write_text(page, encoding="utf-8")
    for report in reports:
        print("\n".join(report.faults) or f"{report.name}: fine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
