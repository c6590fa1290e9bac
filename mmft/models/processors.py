"""Processors: what transformers gives for a checkpoint, and the pair of two where it gives half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase

from mmft.types import UserError


class ProcessorPair:
    """An image processor and a tokenizer that were saved side by side without a processor to join them, as
    vision-encoder-decoder captioners are. Called and saved as a processor is.

    Text and pictures don't meet in it: there is no placeholder, and each picture is one row of `pixel_values`.
    """

    chat_template = None

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerBase):
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    def __call__(
        self,
        text: Sequence[str] | None = None,
        images: Sequence[Any] | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` of the texts, `pixel_values` of the pictures; either may be left out.

        options: the tokenizer's, as `padding` or `add_special_tokens`.
        """
        if text is None and images is None:
            raise ValueError("a processor needs text, images, or both")
        encoded: dict[str, Any] = {}
        if text is not None:
            encoded |= self.tokenizer(text, return_tensors=return_tensors, **options)
        if images is not None:
            encoded |= self.image_processor(images, return_tensors=return_tensors)
        return BatchFeature(encoded)

    def decode(self, *args: Any, **options: Any) -> str:
        return self.tokenizer.decode(*args, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **options)

    def save_pretrained(self, folder: Any) -> None:
        """Both, side by side again: `load_processor` and the two Auto classes read them."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_processor(path: str, trust_remote_code: bool = False) -> Any:
    """What prepares a checkpoint's inputs: its processor, or a `ProcessorPair`, or a tokenizer for text alone.

    Raises UserError for one that needs torchvision where there is none, and what `from_pretrained` raises.
    """
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        if hasattr(processor, "tokenizer"):
            return processor
        # Where no processor joins the two, AutoProcessor gives whichever it finds first and says nothing.
        if isinstance(processor, PreTrainedTokenizerBase):
            images = _image_processor(path, trust_remote_code)
            return processor if images is None else ProcessorPair(images, processor)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        return ProcessorPair(processor, tokenizer)
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
        raise UserError(
            f"model.path: the processor of {path!r} needs torchvision: pip install 'mmft[torchvision]'"
        ) from error


def _image_processor(path: str, trust_remote_code: bool) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):  # no file of one, or none for this kind of model: text alone
        return None
