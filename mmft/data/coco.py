"""COCO captions: the official annotation file, and Karpathy's split of it, each with its pictures in a folder.

Source: Lin et al., Microsoft COCO: common objects in context, ECCV 2014; Karpathy and Fei-Fei, Deep visual-semantic
alignments for generating image descriptions, CVPR 2015, whose file names the side of each picture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmft.config import CocoConfig
from mmft.data.imagefolder import Entry, ImageFolder, take_split
from mmft.data.metadata import BadRow, check_needs, file_name_of, texts_of
from mmft.types import NOTHING_NEEDED, Needs, UserError

# Karpathy's sides: restval is what the test of the official split left over, and trains.
KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


class CocoCaptions(ImageFolder):
    """A map-style dataset of `Row`s: a picture with all its captions as references.

    Raises UserError for a file that is in neither format, and what `ImageFolder` raises.
    """

    def __init__(self, config: CocoConfig, split: str = "train", needs: Needs = NOTHING_NEEDED):
        apart = config.heldout_path if split == "heldout" else None
        self.metadata = Path(apart or config.path)
        self._sides: dict[str, str] = {}
        self._heldout, self._apart = config.heldout_split, config.heldout_path is not None
        pictures = Path(config.pictures) if config.pictures else self.metadata.parent
        super().__init__(
            pictures, config.prompt, None, split, config.eval_fraction, config.seed, config.on_bad_row,
            config.max_bad_fraction, needs,
        )  # fmt: skip

    def _read(self) -> list[Entry]:
        if not self.path.is_dir():
            raise UserError(f"data.pictures: {self.path}: no such folder")
        entries = []
        for number, (record, captions, side) in enumerate(_records(self.metadata), start=1):
            name = None
            try:
                name = file_name_of(record, ("file_name",))
                if not os.path.isfile(self.path / name):
                    raise BadRow(f"no picture {name[:200]!r} in {str(self.path)!r}")
                references = texts_of({"captions": captions}, ("captions",))
                check_needs(self._needs, references)
                entries.append(Entry(name, name, number, references))
                if side is not None:
                    self._sides[name] = side
            except BadRow as bad:
                self._bad(number, str(bad), name)
        return entries

    def _side(self, entries: list[Entry], eval_fraction: float, seed: int) -> list[Entry]:
        if self.split == "all" or self._apart:  # each file is one side
            return entries
        if not self._sides:
            return take_split(entries, self.split, eval_fraction, seed)
        wanted = KARPATHY["train" if self.split == "train" else self._heldout]
        return [entry for entry in entries if self._sides.get(entry.file_name) in wanted]


def _records(path: Path) -> Iterator[tuple[dict[str, Any], list[Any], str | None]]:
    """(record with file_name, captions, Karpathy's side) of each picture."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"data.path: {path}: cannot read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"data.path: {path}: not JSON ({error})") from error
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise UserError(f'data.path: {path}: no list "images" as in COCO\'s caption files')
    annotations = data.get("annotations")
    if isinstance(annotations, list):
        said: dict[Any, list[Any]] = {}
        for annotation in annotations:
            if isinstance(annotation, dict):
                said.setdefault(annotation.get("image_id"), []).append(annotation.get("caption"))
        for image in images:
            yield image, said.get(image.get("id"), []), None
    elif any("sentences" in image for image in images):
        for image in images:
            name = os.path.join(str(image.get("filepath") or ""), str(image.get("filename") or ""))
            sentences = image.get("sentences")
            yield {"file_name": name}, sentences if isinstance(sentences, list) else [], str(image.get("split"))
    else:
        raise UserError(f'data.path: {path}: neither "annotations" (COCO) nor "sentences" (Karpathy) in it')
