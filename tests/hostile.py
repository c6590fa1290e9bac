"""Rows as nobody should write them, seeded: broken pictures, texts that attack tokenizers, lines that are no JSON."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPECIAL = ("<image>", "<IMAGE>", "<ima<image>ge>", "</s>", "<s>", "<pad>", "<|im_end|>", "<|endoftext|>", "[INST]")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sound_pictures(random_pixels: np.random.Generator) -> dict[str, bytes]:
    """Odd, but pictures."""
    noise = Image.fromarray(random_pixels.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    exif = noise.getexif()
    exif[0x0112] = 8
    frames = [noise.convert("P"), noise.rotate(90).convert("P")]
    deep = Image.fromarray(random_pixels.integers(0, 65536, (20, 20)).astype(np.uint16))
    return {
        "plain.png": encoded(noise), "plain.jpg": encoded(noise, "JPEG"), "plain.webp": encoded(noise, "WEBP"),
        "cmyk.jpg": encoded(noise.convert("CMYK"), "JPEG"), "deep.png": encoded(deep),
        "alpha.png": encoded(noise.convert("RGBA")), "grey.png": encoded(noise.convert("LA")),
        "bits.png": encoded(noise.convert("1")), "palette.png": encoded(noise.convert("P"), transparency=3),
        "moves.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "turned.jpg": encoded(noise, "JPEG", exif=exif), "floats.tiff": encoded(noise.convert("F"), "TIFF"),
        "notes.jpg": encoded(noise, "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x63\xff\xff\xff\xff"),
        "dot.png": encoded(Image.new("RGB", (1, 1))), "three.png": encoded(Image.new("RGB", (300, 3))),
        "tall.png": encoded(Image.new("L", (1, 5000))), "wide.jpg": encoded(Image.new("RGB", (6000, 2)), "JPEG"),
        "wrong_name.png": encoded(noise, "JPEG"), "big.png": encoded(Image.new("RGB", (3000, 2000))),
    }  # fmt: skip


def broken_pictures(chance: random.Random, sound: dict[str, bytes]) -> dict[str, bytes]:
    """Files that are no pictures, or no longer."""
    header = b"\x89PNG\r\n\x1a\n"

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    large = chunk(b"IHDR", struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0))  # where Pillow only warns
    files = {
        "empty.png": b"", "text.jpg": b"not a picture", "bomb.png": header + bomb + chunk(b"IDAT", b""),
        "large.png": header + large + chunk(b"IDAT", b"") + chunk(b"IEND", b""), "header.png": header,
    }  # fmt: skip
    for i in range(12):
        data = sound[chance.choice(sorted(sound))]
        files[f"cut{i}.png"] = data[: chance.randrange(1, len(data) // 2)]
    return files


def damaged_pictures(chance: random.Random, sound: dict[str, bytes]) -> dict[str, bytes]:
    """Bytes changed at random: some are still pictures."""
    files = {}
    for i in range(60):
        data = bytearray(sound[chance.choice(sorted(sound))])
        for _ in range(chance.choice((1, 3, 30))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        files[f"damaged{i}.png"] = bytes(data)
    return files


def text(chance: random.Random) -> Any:
    """A caption or question; mostly one that some reader chokes on."""
    words = " ".join(chance.choice(("dog", "cat", "two", "red", "on", "a")) for _ in range(chance.randrange(1, 9)))
    token = chance.choice(SPECIAL)
    return chance.choice((
        words, words, words, words, f"{words} {token} {words}", token, token * 50, "", "   ", "\0", f"{words}\0{words}",
        "x" * 30_000, "word " * 3_000, "a" * 19_999, "كلب أحمر على الطاولة", "\u202e" + words + "\u202d",
        "👩‍👩‍👧‍👦" * 20, "e" + "\u0301" * 500, "\ufeff" + words, "犬" * 300, f"{words}\r\n\t{words}", "\ud800",
        "[bold]" + words, "{question}", "%s %n ${x}", None, 7, True, {}, [], [[]], float("nan"), 1e308,
    ))  # fmt: skip


def record(chance: random.Random, names: list[str]) -> dict[str, Any]:
    """One row of metadata."""
    name: Any = chance.choice(names)
    if chance.random() < 0.08:
        name = chance.choice((
            "missing.png", "../outside.png", "/etc/passwd", "", None, 3, "folder", "a\0b.png", "n" * 5000, ".",
            "loop.png", ["plain.png"], "plain.png/", "C:\\x.png",
        ))  # fmt: skip
    row = {"file_name": name}
    captions = text(chance)
    if chance.random() < 0.4:
        captions = [text(chance) for _ in range(chance.randrange(4))] if chance.random() < 0.4 else "a dog"
    if chance.random() < 0.95:
        row[chance.choice(("caption", "captions", "references"))] = captions
    if chance.random() < 0.3:
        row["question"] = text(chance)
    if chance.random() < 0.2:
        row["answer"] = text(chance)
    return row


def line(chance: random.Random, names: list[str]) -> bytes:
    """One line of a metadata file, without its end."""
    data = json.dumps(record(chance, names)).encode()
    kind = chance.randrange(25)
    if kind == 0:
        return data[: chance.randrange(1, len(data))].replace(b"\n", b"")
    if kind == 1:
        place = chance.randrange(len(data))
        return data[:place] + bytes([chance.randrange(128, 256)]) + data[place + 1 :]
    if kind == 2:
        return chance.choice((
            b"[]", b"3", b"null", b'"text"', b"{}", b"{", b"nonsense", b"[" * 5000, b'{"a":' * 3000, b"9" * 9000,
            b"{}{}", b'{"file_name": "plain.png", "caption": "a dog", "x": 1e999}', b"\xff\xfe", b"\x00",
            b'{"file_name": "plain.png", "file_name": "plain.jpg", "caption": "a dog"}',
        ))  # fmt: skip
    return data


def folder(path: Path, rows: int, seed: int = 0, name: str = "metadata.jsonl") -> int:
    """Writes pictures and `rows` lines of metadata about them; returns how many."""
    chance = random.Random(seed)
    path.mkdir(parents=True, exist_ok=True)
    sound = sound_pictures(np.random.default_rng(seed))
    files = sound | broken_pictures(chance, sound) | damaged_pictures(chance, sound)
    for file, data in files.items():
        (path / file).write_bytes(data)
    (path / "folder").mkdir(exist_ok=True)
    (path / "loop.png").symlink_to("loop.png")
    names = [*files, *sorted(sound) * 6]
    lines = [line(chance, names) for _ in range(rows)]
    # Each file is named once in a sound line, or those of broken lines would be pictures without one.
    lines += [json.dumps({"file_name": file, "caption": "a dog"}).encode() for file in files]
    (path / name).write_bytes(b"\n".join(lines) + b"\n\n  \n")
    return len(lines)
