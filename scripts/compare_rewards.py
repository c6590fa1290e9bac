"""Compare finished runs of a learned reward with runs of a fixed one, by what neither reward contains: the oracle.

    for seed in 0 1 2; do
      mmft train recipes/caption_ppo.yaml train.seed=$seed logging.name=learned$seed
      mmft train recipes/caption_ppo_fixed.yaml train.seed=$seed logging.name=fixed$seed
    done
    python scripts/compare_rewards.py --learned runs/learned0 runs/learned1 runs/learned2 \\
        --fixed runs/fixed0 runs/fixed1 runs/fixed2

Exit status 1 when the learned reward improves the oracle's recall less than the fixed one does, on average over
the seeds, or when a tripwire has tripped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

METRICS = ("oracle_recall", "oracle_precision", "oracle_hallucination", "oracle_count", "oracle_attribute")
MUST = ("oracle_recall",)


def change(run: Path, metric: str) -> float:
    """Change of a metric by training, in percentage points."""
    record = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    return 100 * record["difference"][metric]["mean"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learned", nargs="+", type=Path, required=True)
    parser.add_argument("--fixed", nargs="+", type=Path, required=True)
    arguments = parser.parse_args()
    good = True
    print(f"{'change, in points':24}{'learned':>28}{'fixed':>28}")
    for metric in METRICS:
        sides = [[change(run, metric) for run in runs] for runs in (arguments.learned, arguments.fixed)]
        shown = [f"{fmean(side):+.1f} ({', '.join(f'{v:+.1f}' for v in side)})" for side in sides]
        print(f"{metric:24}{shown[0]:>28}{shown[1]:>28}")
        good &= metric not in MUST or fmean(sides[0]) >= fmean(sides[1])
    for run in (*arguments.learned, *arguments.fixed):
        if (run / "tripwire.json").is_file():
            print(f"{run}: the tripwire tripped")
            good = False
    print("the learned reward improves the oracle at least as much" if good else "NOT at least as much")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
