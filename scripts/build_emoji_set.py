"""Build a captioned set of real pictures: about 1,400 Noto emoji, with their names and keywords as references.

    apt-get install fonts-noto-color-emoji
    npm pack emojibase-data && tar xzf emojibase-data-*.tgz
    python scripts/build_emoji_set.py --emojibase package --out smol-vlm/emoji

Writes pictures/*.png (128 x 128 on white), train.jsonl and heldout.jsonl (file_name, captions) and NOTICE; in
train_shuffled.jsonl and heldout_shuffled.jsonl the captions stand beside pictures of other rows, a control for what can
be learned without looking. Left out are symbols, flags, components, families (grey silhouettes in this font), and what
the font does not draw. Emoji whose names differ in the person alone ("man running", "woman running") are on one side of
the split. Deterministic.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, features

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
STRIKE, SIDE = 109, 128  # the font's only bitmap size; pixels a side of a picture
GROUPS = {0: "smileys", 1: "people", 3: "animals and plants", 4: "food", 5: "travel", 6: "activities", 7: "objects"}
NEWEST = 15.1  # Unicode emoji version of the font
HELD_OUT = 0.12
PERSON = re.compile(r"\b(man|men|woman|women|person|people|boy|girl|older|prince|princess|mr|mrs)\b")
NOTICE = """Pictures: Noto Color Emoji (https://github.com/googlefonts/noto-emoji), Apache License 2.0 (font: OFL 1.1).
Names and keywords: emojibase-data (https://emojibase.dev), MIT License, Copyright Miles Johnson; from Unicode CLDR.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emojibase", type=Path, required=True, help="the unpacked emojibase-data package")
    parser.add_argument("--out", type=Path, default=Path("smol-vlm/emoji"))
    args = parser.parse_args()
    if not features.check("raqm"):
        raise SystemExit("Pillow lacks Raqm, without which joined emoji come apart; install one of its own wheels")
    if not Path(FONT).is_file():
        raise SystemExit(f"{FONT}: not there; apt-get install fonts-noto-color-emoji")

    known = json.loads((args.emojibase / "en" / "data.json").read_text(encoding="utf-8"))
    font = ImageFont.truetype(FONT, STRIKE)
    (args.out / "pictures").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    seen: dict[bytes, str] = {}
    for item in known:
        if item.get("group") not in GROUPS or item["version"] > NEWEST or item["label"].startswith("family"):
            continue
        picture = draw(font, item["emoji"])
        if picture is None or seen.setdefault(picture.tobytes(), item["label"]) != item["label"]:
            continue
        name = f"{item['hexcode']}.png"
        picture.save(args.out / "pictures" / name, optimize=True)
        row = {"file_name": f"pictures/{name}", "captions": captions(item), "group": GROUPS[item["group"]]}
        rows["heldout" if is_held_out(item["label"]) else "train"].append(row)
    for side, of_side in rows.items():
        write(args.out / f"{side}.jsonl", of_side)
        write(args.out / f"{side}_shuffled.jsonl", shuffled(of_side))
    (args.out / "NOTICE").write_text(NOTICE, encoding="utf-8")
    print(f"{len(rows['train'])} pictures to train on, {len(rows['heldout'])} held out -> {args.out}")
    return 0


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def shuffled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with each other's pictures: each has that of the next in a random circle, so none its own."""
    circle = random.Random(0).sample(range(len(rows)), len(rows))
    following = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    return [{**row, "file_name": rows[following[i]]["file_name"]} for i, row in enumerate(rows)]


def captions(item: dict[str, Any]) -> list[str]:
    """The name; and the name with three keywords more, at most three times."""
    name = " ".join(re.sub(r"[^\w\s'-]", " ", item["label"]).split()).lower()
    words = set(name.split())
    tags = [tag.lower() for tag in item.get("tags", []) if tag.isascii() and not re.search(r"\d", tag)]
    tags = [tag for tag in tags if not set(tag.split()) <= words]
    return [name, *(f"{name}, {', '.join(tags[i : i + 3])}" for i in range(0, min(len(tags), 9), 3))]


def is_held_out(label: str) -> bool:
    """By the name without its person, so that no caption is on both sides."""
    bare = " ".join(PERSON.sub(" ", label.lower()).split()) or label
    return hashlib.sha256(bare.encode()).digest()[0] < 256 * HELD_OUT


def draw(font: ImageFont.FreeTypeFont, emoji: str) -> Image.Image | None:
    """One emoji, cropped to its own box, in the middle of a white square; None for what the font does not draw as one
    coloured glyph.
    """
    canvas = Image.new("RGBA", (4 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(canvas).text((STRIKE // 4, STRIKE // 4), emoji, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None or box[2] - box[0] > 1.3 * STRIKE:
        return None
    glyph = canvas.crop(box)
    side = int(1.12 * max(glyph.size))
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    sys.exit(main())
