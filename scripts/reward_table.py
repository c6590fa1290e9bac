"""What the default reward pays for captions written from the scene graph: the table in docs/rewards.md.

    python scripts/reward_table.py            # 512 held-out scenes; add reward overrides as key=value

Only scenes with three or four kinds of object count, so that every caption in the table can be written of them.
"""

from __future__ import annotations

import sys

import numpy as np

from mmft.config import load_recipe
from mmft.data.scene_text import article, join, noun_phrase, noun_phrase_of
from mmft.data.scenes import Scene, sprites
from mmft.run import prepare


def captions(scene: Scene) -> dict[str, str]:
    phrases = [noun_phrase(obj, size=False) for obj in scene.objects]
    absent = next(noun_phrase_of(sprite) for sprite in sprites() if sprite.name not in scene.names)
    ground = f" on {article(scene.background)} background"
    return {
        "two objects": join(phrases[:2]),
        "two objects and the background": join(phrases[:2]) + ground,
        "two objects and a third that is not there": join([*phrases[:2], absent]),
        "two objects, the first of them twice": join([phrases[0], *phrases[:2]]),
        "three objects": join(phrases[:3]),
        "all objects": join(phrases),
        "all objects and the background": join(phrases) + ground,
    }


def main() -> int:
    job = prepare(load_recipe("caption_ppo", ["eval.samples=512", *sys.argv[1:]]))
    rows = [row for row in job.heldout.rows_without_pictures() if len(row.scene.objects) > 2]
    print(f"{len(rows)} scenes\n\n| caption | reward | detail |\n|---|---|---|")
    for name in captions(rows[0].scene):
        output = job.reward([captions(row.scene)[name] for row in rows], rows, update=False)
        print(f"| {name} | {np.mean(output.total):.2f} | {np.mean(output.raw['detail']):.2f} |")
    print(f"\nreferences, each against all of its row: {job.reward.reference_reward(rows, leave_one_out=False):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
