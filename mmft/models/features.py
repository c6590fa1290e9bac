"""Frozen features of many judgements, computed once: what a reward model trains on, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mmft.models.towers import Tokens
from mmft.types import Row

Key = tuple[str, str, str]  # picture, prompt, caption


class FeatureStore:
    """Features of captions and of their pictures, in memory, each distinct one once.

    Text is kept without padding, one caption after the other; a batch is padded to its own longest.
    """

    def __init__(self, encode: Callable[[Sequence[str], Sequence[Row]], tuple[Tokens, Tokens]]):
        self.encode = encode
        self.index: dict[Key, int] = {}
        self.pictures: dict[str, int] = {}
        self._picture_of: list[int] = []
        self._image: list[Tokens] = []
        self._flat: list[Tensor] = []
        self._lengths: list[Tensor] = []
        self._packed: tuple[Tokens, Tensor, Tensor, Tensor, Tensor] | None = None

    def add(self, judged: Iterable[tuple[str, Row, Sequence[str]]]) -> None:
        """Encodes (picture key, row with its picture, captions) of some pictures; known captions are passed over."""
        captions: list[str] = []
        rows: list[Row] = []
        first_of: list[int] = []
        for key, row, texts in judged:
            new = [text for text in dict.fromkeys(texts) if (key, row.prompt, text) not in self.index]
            if not new:
                continue
            if key not in self.pictures:
                self.pictures[key] = len(self.pictures)
                first_of.append(len(captions))
            place = self.pictures[key]
            for text in new:
                self.index[key, row.prompt, text] = len(self._picture_of)
                self._picture_of.append(place)
                captions.append(text)
                rows.append(row)
        if not captions:
            return
        image, text = (tokens.to("cpu") for tokens in self.encode(captions, rows))
        if first_of:
            chosen = torch.tensor(first_of)
            self._image.append(Tokens(image.features_BND[chosen].clone(), image.mask_BN[chosen].clone()))
        self._flat.append(text.features_BND[text.mask_BN])
        self._lengths.append(text.mask_BN.sum(1))
        self._packed = None

    def __len__(self) -> int:
        return len(self._picture_of)

    def batch(self, index_B: Tensor) -> tuple[Tokens, Tokens]:
        """Features of picture and caption of the captions `index_B`."""
        image, flat, start, lengths, picture_of = self._pack()
        length_B = lengths[index_B]
        position = torch.arange(int(length_B.max()))
        mask = position < length_B[:, None]
        where = (start[index_B][:, None] + position).clamp(max=len(flat) - 1)
        return image[picture_of[index_B]], Tokens(flat[where] * mask[..., None], mask)

    def one_per_picture(self, index_N: Tensor) -> Tensor:
        """Of the captions `index_N`, one for each of their pictures."""
        first = {self._picture_of[i]: i for i in reversed(index_N.tolist())}
        return torch.tensor(sorted(first.values()))

    def _pack(self) -> tuple[Tokens, Tensor, Tensor, Tensor, Tensor]:
        if self._packed is None:
            flat, lengths = torch.cat(self._flat), torch.cat(self._lengths)
            image = Tokens.cat(self._image)
            self._flat, self._lengths, self._image = [flat], [lengths], [image]
            self._packed = image, flat, lengths.cumsum(0) - lengths, lengths, torch.tensor(self._picture_of)
        return self._packed
