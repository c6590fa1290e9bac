"""CLIPScore: how well a caption goes with its picture, by a model that was trained to tell pairs from strangers.

Source: Hessel, Holtzman, Forbes, Le Bras and Choi, CLIPScore: a reference-free evaluation metric for image captioning,
EMNLP 2021: w = 2.5, max(cos, 0); RefCLIPScore is the harmonic mean with the cosine to the nearest reference.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

from mmft.types import Row, UserError

WEIGHT = 2.5
_KEPT = 4096  # pictures whose embeddings are kept
_AT_ONCE = 64


class ClipScore:
    """A frozen CLIP or SigLIP checkpoint. Each picture is embedded once and kept, the oldest are forgotten.

    model: a folder or a hub id. Raises UserError for one that is not there or embeds no pictures and texts.
    """

    def __init__(self, model: str, prompt: str = "A photo depicts", device: str | None = None):
        if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
            raise UserError(f"clip_score.model: {model!r}: no such folder")
        try:
            self.processor: Any = AutoProcessor.from_pretrained(model)
            self.model: Any = AutoModel.from_pretrained(model, use_safetensors=True).eval()
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"clip_score.model: {model!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise UserError(f"clip_score.model: {model!r} does not embed pictures and texts; use a CLIP or a SigLIP")
        self.prompt = prompt
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._pictures: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(self, captions: Sequence[str], rows: Sequence[Row], with_references: bool = False) -> list[float]:
        """B captions of B rows with pictures -> CLIPScores in [0, 2.5], or RefCLIPScores."""
        pictures_BD, texts_BD = self._pictures_of(rows), self._texts(captions)
        scores = WEIGHT * (pictures_BD * texts_BD).sum(1).clamp(min=0)
        if not with_references:
            return scores.tolist()
        nearest = [
            float((self._texts(row.references) @ text).max().clamp(min=0))
            for row, text in zip(rows, texts_BD, strict=True)
        ]
        return [2 * a * b / (a + b) if a and b else 0.0 for a, b in zip(scores.tolist(), nearest, strict=True)]

    @torch.no_grad()
    def _pictures_of(self, rows: Sequence[Row]) -> Tensor:
        keys: list[bytes] = []
        new: dict[bytes, Image] = {}
        for row in rows:
            if row.image is None:
                raise UserError(f"clip_score: row {row.id!r} has no picture")
            keys.append(key := picture_key(row.image))
            if key in self._pictures:
                self._pictures.move_to_end(key)
            else:
                new[key] = row.image
        unknown = list(new)
        for i in range(0, len(unknown), _AT_ONCE):
            part = unknown[i : i + _AT_ONCE]
            pixels = self.processor(images=[new[key] for key in part], return_tensors="pt")["pixel_values"]
            found = _unit(self.model.get_image_features(pixel_values=pixels.to(self.model.device)))
            self._pictures.update(zip(part, found, strict=True))
        given = torch.stack([self._pictures[key] for key in keys])
        while len(self._pictures) > _KEPT:
            self._pictures.popitem(last=False)
        return given

    @torch.no_grad()
    def _texts(self, captions: Sequence[str]) -> Tensor:
        texts = [f"{self.prompt} {caption}".strip() for caption in captions]
        # SigLIP has learned with texts of full length alone.
        padding = "max_length" if "siglip" in str(self.model.config.model_type) else True
        inputs = self.processor(text=texts, padding=padding, truncation=True, return_tensors="pt")
        return _unit(self.model.get_text_features(**inputs.to(self.model.device)))


def picture_key(image: Image) -> bytes:
    """A digest of what a picture shows: names of rows may be those of another data set's."""
    return hashlib.blake2b(image.tobytes(), digest_size=16, salt=f"{image.width}x{image.height}"[:16].encode()).digest()


def _unit(features: Any) -> Tensor:
    """(B, D) of length 1; what models give is a tensor or holds one."""
    tensor = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(tensor.float(), dim=-1)
