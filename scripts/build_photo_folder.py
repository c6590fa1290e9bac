"""Build a folder of photographs as people have them: scikit-image's sample pictures, with captions of our own.

    pip install scikit-image
    python scripts/build_photo_folder.py --out photos
    mmft data check photos
    mmft train recipes/caption_ppo.yaml data.type=imagefolder data.path=photos

Only pictures that come inside the package: nothing is downloaded. Their licences are in its `data/README.txt`; they are
not part of this repository.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from PIL import Image

CAPTIONS = {
    "astronaut.png": ["a woman in an orange space suit smiles", "an astronaut in front of a flag and a model shuttle"],
    "brick.png": ["a wall of grey bricks", "rows of bricks, seen from near"],
    "camera.png": ["a man looks through a camera on a tripod", "a photographer in a dark coat on a lawn"],
    "cell.png": ["a single cell under a microscope", "a grey blob on a grey ground"],
    "chelsea.png": ["a tabby cat looks at the camera", "the face of a striped cat"],
    "clock_motion.png": ["a clock, blurred by motion", "the dial of a clock that moved"],
    "coffee.png": ["a cup of coffee on a saucer with a spoon", "coffee on a wooden table"],
    "coins.png": ["many old coins in rows", "greek coins on a dark ground"],
    "color.png": ["a disc of many colours", "a wheel of colours"],
    "grass.png": ["a lawn of grass, seen from above", "blades of grass"],
    "gravel.png": ["a ground of small stones", "grey gravel"],
    "horse.png": ["the black shape of a horse", "a horse, seen from the side, black on white"],
    "hubble_deep_field.jpg": ["hundreds of galaxies in the dark sky", "far galaxies, seen by a telescope"],
    "ihc.png": ["brown and blue stained tissue", "cells of a colon under a microscope"],
    "moon.png": ["craters on the surface of the moon", "the grey moon, seen from near"],
    "motorcycle_left.png": ["a motorcycle in a garage", "an old motorcycle beside tools"],
    "page.png": ["a page of printed text", "a scanned page with writing on it"],
    "phantom.png": ["ellipses of grey on black", "a drawing of a head in a scanner"],
    "retina.jpg": ["the back of an eye with its veins", "a retina, orange on black"],
    "rocket.jpg": ["a rocket on its launch pad in the evening", "a white rocket before the start"],
    "text.png": ["handwritten words on paper", "a few words written by hand"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("photos"))
    args = parser.parse_args()
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("scikit-image is not installed: pip install scikit-image")
    folder = Path(found.submodule_search_locations[0]) / "data"
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, captions in CAPTIONS.items():
        if not (folder / name).is_file():
            print(f"{name}: not in this release of scikit-image", file=sys.stderr)
            continue
        target = f"{Path(name).stem}.jpg"
        Image.open(folder / name).convert("RGB").save(args.out / target, quality=92)
        lines.append(json.dumps({"file_name": target, "caption": captions}))
    (args.out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} pictures -> {args.out}")
    return 0 if lines else 1


if __name__ == "__main__":
    sys.exit(main())
