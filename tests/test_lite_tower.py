"""EfficientNet-Lite0: shapes, padding, and that it is known to transformers as soon as models are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutput

from mmft.models.encode_once import without_dropped
from mmft.models.lite_tower import WIDTH, EfficientNetLiteConfig, EfficientNetLiteModel, SameConv


@pytest.mark.parametrize(("side", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (9, 5, 1), (8, 1, 1)])
def test_padding_is_tensorflow_s(side: int, kernel: int, stride: int) -> None:
    """ceil(side / stride) outputs; what does not divide goes behind."""
    convolution = SameConv(2, 3, kernel, stride)
    picture = torch.randn(1, 2, side, side)
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    padded = F.pad(picture, (total // 2, total - total // 2) * 2)
    expected = F.conv2d(padded, convolution.weight, convolution.bias, stride)
    assert expected.shape[-1] == -(-side // stride)
    assert torch.equal(convolution(picture), expected)


def test_tokens_are_cells_of_the_picture(tmp_path: Path) -> None:
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=128, patch_size=64)).eval()
    pictures = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        tokens = tower(pictures).last_hidden_state
        assert tokens.shape == (2, 4, WIDTH) == (2, 4, 1456)
        alone = tower(pictures[1:]).last_hidden_state
    assert torch.allclose(tokens[1:], alone, atol=1e-5), "nothing depends on the batch"
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, EfficientNetLiteModel) and again.config.image_size == 128
    with torch.no_grad():
        assert torch.equal(again.eval()(pictures).last_hidden_state, tokens)


def test_features_written_on_an_output_without_that_field_are_kept() -> None:
    """transformers' models set `pooler_output` on whatever a tower returns."""
    output = BaseModelOutput(last_hidden_state=torch.ones(1, 2, 3))
    output.pooler_output = [torch.zeros(2, 3)]  # type: ignore[attr-defined]
    kept = without_dropped(output)
    assert list(kept) == ["pooler_output"] and torch.equal(kept.pooler_output[0], torch.zeros(2, 3))
    assert without_dropped(kept).pooler_output is kept.pooler_output


def test_training_mode_changes_nothing() -> None:
    tower, pictures = EfficientNetLiteModel(EfficientNetLiteConfig()), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(tower.train()(pictures)[0], tower.eval()(pictures)[0])
