"""Build mmft/assets/sprites: about a hundred emoji pictures and their names, for EmojiScenes.

    apt-get install fonts-noto-color-emoji
    npm pack emojibase-data && tar xzf emojibase-data-*.tgz
    python scripts/build_sprites.py --emojibase package --out mmft/assets/sprites

Writes atlas.png (a 10-column sheet of 64 x 64 RGBA sprites) and sprites.json (name, plural, group, emoji, keywords by
position in the sheet). Art: Noto Color Emoji; names and keywords: emojibase-data (see NOTICE). Deterministic: no
random numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
STRIKE = 109  # the only bitmap size in the font
CELL = 64
COLUMNS = 10

# Objects that a person names in one common word, distinct in shape or colour at 24 pixels.
NAMES = {
    "animal": "🐶 dog,🐱 cat,🐰 rabbit,🦊 fox,🐻 bear,🐼 panda,🐯 tiger,🦁 lion,🐮 cow,🐷 pig,🐸 frog,"
    "🐵 monkey,🐔 chicken,"
    "🐧 penguin,🦉 owl,🐢 turtle,🐍 snake,🐙 octopus,🦀 crab,"
    "🐟 fish,🐳 whale,🦋 butterfly,🐌 snail,🐝 bee,🐞 ladybug,🐘 elephant,"
    "🦓 zebra,🦒 giraffe,🐴 horse,🦆 duck",
    "plant": "🌵 cactus,🌲 tree,🍁 leaf,🌹 rose,🌻 sunflower,🌷 tulip,🍄 mushroom",
    "food": "🍎 apple,🍌 banana,🍇 grapes,🍉 watermelon,"
    "🍓 strawberry,🍒 cherry,🍍 pineapple,🍋 lemon,🥕 carrot,🌽 corn,"
    "🥦 broccoli,"
    "🍅 tomato,🍞 bread,🧀 cheese,🍕 pizza,🍔 hamburger,🌭 hotdog,🍩 doughnut,"
    "🍪 cookie,🎂 cake,🍦 icecream,🥚 egg,☕ coffee",
    "travel": "🚗 car,🚌 bus,🚂 train,🚲 bicycle,🚀 rocket,🚁 helicopter,⛵ sailboat,🚜 tractor,🏠 house,⛺ tent",
    "sky": "🌙 moon,⭐ star,🌈 rainbow,☂ umbrella,⛄ snowman,🔥 fire,⚡ lightning,🌍 globe",
    "object": "⚽ football,🏀 basketball,🎾 racket,🎸 guitar,🎺 trumpet,🥁 drum,🎈 balloon,🎁 gift,🔑 key,"
    "🔔 bell,📚 books,"
    "✂ scissors,🔨 hammer,💡 lightbulb,⏰ clock,📷 camera,📱 phone,"
    "👑 crown,🎩 hat,👟 shoe,👓 glasses,💎 diamond",
}
PLURAL = {
    "fox": "foxes", "fish": "fish", "octopus": "octopuses", "cactus": "cactuses", "leaf": "leaves",
    "butterfly": "butterflies",
    "cherry": "cherries", "strawberry": "strawberries", "tomato": "tomatoes", "bus": "buses", "box": "boxes",
}  # fmt: skip
UNCOUNTED = {
    "grapes",
    "corn",
    "broccoli",
    "bread",
    "cheese",
    "coffee",
    "fire",
    "lightning",
    "books",
    "scissors",
    "glasses",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emojibase", type=Path, required=True, help="the unpacked emojibase-data package")
    parser.add_argument("--out", type=Path, default=Path("mmft/assets/sprites"))
    args = parser.parse_args()

    known = {
        item["emoji"].rstrip("\ufe0f"): item
        for item in json.loads((args.emojibase / "en" / "data.json").read_text(encoding="utf-8"))
        if "emoji" in item
    }
    font = ImageFont.truetype(FONT, STRIKE)
    entries, sprites = [], []
    for group, line in NAMES.items():
        for pair in line.split(","):
            emoji, name = pair.strip().split(" ", 1)
            item = known[emoji]
            words = {*item["label"].split(), *(word for tag in item["tags"] for word in tag.split())}
            if name not in words:
                print(f"note: {emoji} is called {name!r}; emojibase says {item['label']!r} {sorted(words)}")
            entries.append(
                {
                    "name": name,
                    "plural": name if name in UNCOUNTED else PLURAL.get(name, name + "s"),
                    "countable": name not in UNCOUNTED,
                    "group": group,
                    "emoji": emoji,
                    "label": item["label"],
                    "keywords": item["tags"],
                }
            )
            sprites.append(render(font, emoji))

    rows = -(-len(sprites) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for i, sprite in enumerate(sprites):
        atlas.paste(sprite, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    args.out.mkdir(parents=True, exist_ok=True)
    atlas.save(args.out / "atlas.png", optimize=True)
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (args.out / "sprites.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(sprites)} sprites -> {args.out}")
    return 0


def render(font: ImageFont.FreeTypeFont, emoji: str) -> Image.Image:
    """One emoji, cropped to its own box and fitted into a CELL x CELL transparent square."""
    canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(canvas).text((STRIKE // 4, STRIKE // 4), emoji, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise SystemExit(f"the font draws nothing for {emoji!r}")
    glyph = canvas.crop(box)
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square.resize((CELL, CELL), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    sys.exit(main())
