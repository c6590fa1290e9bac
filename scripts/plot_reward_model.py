"""Writes the pictures of docs/rewards.md from the judgement of the bundled reward model, or of another.

python scripts/plot_reward_model.py [MODEL_FOLDER] [--out docs/images]
"""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path

from mmft.report.reward_plots import accuracy_by_kind, reliability_diagram, sigma_histograms

HOUSE = Path(__file__).resolve().parent.parent
PLOTS = {
    "reward_accuracy": accuracy_by_kind,
    "reward_reliability": reliability_diagram,
    "reward_sigma": sigma_histograms,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=HOUSE / "mmft" / "assets" / "caption-reward")
    parser.add_argument("--out", type=Path, default=HOUSE / "docs" / "images")
    arguments = parser.parse_args()
    record = json.loads((arguments.model / "eval.json").read_text(encoding="utf-8"))
    for name, draw in PLOTS.items():
        plot = draw(record)
        if plot is not None:
            path = arguments.out / f"{name}.png"
            path.write_bytes(base64.b64decode(plot.source.partition(",")[2]))
            print(path)


if __name__ == "__main__":
    main()
