"""EfficientNet-Lite0 as a vision tower: 16 tokens a picture, for small models on processors.

Source: Tan and Le, EfficientNet: rethinking model scaling for convolutional neural networks, ICML 2019; its Lite form
(Liu, 2020) has ReLU6 and no squeeze-and-excitation. Batch norms are folded into the convolutions, so that nothing here
depends on a batch. transformers has the larger family alone, and as maps where Llava expects tokens; this module makes
the type known to its Auto classes when it is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

STEM, HEAD = 32, 1280
STAGES = (  # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
TAPPED = (1, 2, 4)  # stages whose maps are given beside the last: colours and edges are gone at the end
WIDTH = HEAD + sum(STAGES[i][-1] for i in TAPPED)


class EfficientNetLiteConfig(PreTrainedConfig):
    """image_size, patch_size: pixels a side of the picture, and of what one token stands for."""

    model_type = "efficientnet_lite"
    image_size: int = 256
    patch_size: int = 64
    hidden_size: int = WIDTH


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does, more behind than before, on which the weights were trained."""

    def __init__(self, into: int, out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(into, out, kernel, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        (kernel, stride), (height, width) = (self.kernel_size[0], self.stride[0]), x.shape[-2:]
        down, across = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (height, width))
        padding = (across // 2, across - across // 2, down // 2, down - down // 2)
        return super().forward(F.pad(x, padding))


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel by itself, project; with a way around where nothing changes shape."""

    def __init__(self, into: int, out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = into * expansion
        self.expand = SameConv(into, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, out, 1)
        self.around = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        y = x if isinstance(self.expand, nn.Identity) else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.around else y


class EfficientNetLiteModel(PreTrainedModel):
    """pixel_values (B, 3, S, S) -> tokens (B, (S / patch)^2, 1456): means over cells of the last map and of three
    earlier ones.
    """

    config_class = EfficientNetLiteConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = SameConv(3, STEM, 3, 2)
        stages, into = [], STEM
        for blocks, kernel, stride, expansion, out in STAGES:
            stage = []
            for i in range(blocks):
                stage.append(InvertedBottleneck(into, out, kernel, stride if i == 0 else 1, expansion))
                into = out
            stages.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(stages)
        self.head = SameConv(into, HEAD, 1)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        cells = pixel_values.shape[-1] // self.config.patch_size
        x, kept = F.relu6(self.stem(pixel_values)), []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in TAPPED:
                kept.append(x)
        maps = [*kept, F.relu6(self.head(x))]
        tokens = torch.cat([F.adaptive_avg_pool2d(m, cells) for m in maps], 1).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
