"""Pictures from disk as a model should see them: upright, 8 bits a channel, RGB, on white."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

# What the functions below raise for files that are broken, cut short, of an unknown kind, or absurdly large.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def unreadable(error: BaseException) -> str:
    """What to say of one of them."""
    text = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text repeats the path, or an address in memory
        text = "not a picture"
    return f"unreadable picture ({text})"


MOST_SLENDER = 50  # times as long as wide; more is filled up with white, for processors refuse it
SMALLEST_SIDE = 4  # pixels; a picture of 1 or 3 is taken for one of 1 or 3 channels
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")

# Pillow warns between its limit and twice that; here the limit is one, see `_opened`. And it talks of broken camera
# notes and the like, of which pictures are either whole or listed as bad rows.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def load_picture(path: str | Path | BinaryIO) -> Image.Image:
    """Decodes one file to an upright RGB picture that any processor takes: its first frame, at least `SMALLEST_SIDE`
    pixels each way and at most `MOST_SLENDER` times as long as wide. Raises one of `UNREADABLE` where that cannot be
    done.
    """
    with _opened(path) as image:
        image.load()
        return presentable(to_rgb(_upright(image)))


def verify_picture(path: str | Path | BinaryIO) -> None:
    """Checks a file's header, and its checksums where the format has them, without decoding it."""
    with _opened(path) as image:
        image.verify()


def presentable(image: Image.Image) -> Image.Image:
    """The picture, enlarged where it is a few pixels wide or high and on a white ground where it is a mere line."""
    width, height = image.size
    shortest = math.ceil(max(width, height) / MOST_SLENDER)
    if min(width, height) < shortest:
        ground = Image.new("RGB", (max(width, shortest), max(height, shortest)), "white")
        ground.paste(image, ((ground.width - width) // 2, (ground.height - height) // 2))
        image = ground
    factor = math.ceil(SMALLEST_SIDE / min(image.size))
    if factor == 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


@contextmanager
def _opened(path: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """A file of at most Pillow's pixel limit. Decoders fail on broken files in ways of their own: all are ValueErrors
    here.
    """
    try:
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise ValueError(f"{image.width} x {image.height} pixels: more than {limit}")
            yield image
    except UNREADABLE:
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # what a camera's broken notes raise is anybody's guess; the picture itself is sound
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, whatever the mode: `Image.convert` alone clips 16 bits, and shows what lies under transparent pixels."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    if image.mode in _SIXTEEN_BIT or image.mode in ("I", "F"):
        return Image.fromarray(_to_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        # Pillow has no way from La (colour already multiplied by alpha) to RGBA but through LA.
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> np.ndarray:
    """Grey levels 0..255. 16-bit files are scaled by their full range, so that two pictures stay comparable;
    32-bit integers and floats have no agreed white, so those outside the usual ranges are scaled by their own."""
    grey = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(grey.min()), float(grey.max())
    if image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format == "PNG"):
        grey = grey / 257.0  # 65535 / 255
    elif image.mode == "F" and low >= 0.0 and high <= 1.0:
        grey = grey * 255.0
    elif not (low >= 0.0 and high <= 255.0):
        grey = (grey - low) * (255.0 / (high - low)) if high > low else np.zeros_like(grey)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    """Through the picture's own ink profile where it has a usable one: the plain formula gives garish colours."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            inks, screen = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, inks, screen, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")
