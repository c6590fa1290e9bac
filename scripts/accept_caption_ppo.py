"""Does the default recipe still do what it is for? Judges finished runs of recipes/caption_ppo.yaml.

    for seed in 0 1 2; do mmft train recipes/caption_ppo.yaml train.seed=$seed logging.name=seed$seed; done
    python scripts/accept_caption_ppo.py runs/seed0 runs/seed1 runs/seed2

Each run must close a quarter of the distance to the references' own reward with an interval above zero, raise the
oracle's recall by 8 points, and raise neither hallucination (by more than a point) nor bad endings nor repeats. Exit
status 1 if not.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmft.eval.evaluator import share_of_gap_closed
from mmft.report.folder import RunFolder


def verdicts(run: RunFolder) -> dict[str, tuple[str, bool]]:
    record = run.evaluation()
    if not record or "difference" not in record:
        raise SystemExit(f"{run.path}: no evaluation before and after")
    change = record["difference"]
    mean = {name: change[name]["mean"] for name in change}
    share = share_of_gap_closed(record) or 0.0
    return {
        "samples": (str(record["samples"]), record["samples"] >= 256),
        "gap closed": (f"{share:.0%}", share >= 0.25 and change["reward"]["low"] > 0),
        "recall": (f"{100 * mean['oracle_recall']:+.1f}", mean["oracle_recall"] >= 0.08),
        "hallucination": (f"{100 * mean['oracle_hallucination']:+.2f}", mean["oracle_hallucination"] <= 0.01),
        "bad endings": (f"{100 * mean['bad_ending']:+.2f}", mean["bad_ending"] <= 0),
        "repeats": (f"{100 * mean['repetition']:+.2f}", mean["repetition"] <= 0),
    }


def main() -> int:
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders:
        print(__doc__)
        return 2
    good = True
    for folder in folders:
        found = verdicts(RunFolder(folder))
        good &= all(passed for _, passed in found.values())
        print(f"{folder}: " + ", ".join(f"{n} {text}{'' if ok else ' FAILS'}" for n, (text, ok) in found.items()))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
