"""The networks of benchmarks/models.py: transformers' configurations and a 3-D U-Net, with random weights.

Nothing is downloaded.  Each is a module of one tensor that gives one tensor, so that every side is called alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Named(nn.Module):
    """One of transformers' models: its input by name, and of its output what is asked for by name."""

    def __init__(self, model: nn.Module, input: str, output: str | None) -> None:
        super().__init__()
        self.model, self.input, self.output = model, input, output

    def forward(self, x: Tensor) -> Tensor:
        """The output of that name, or all there is."""
        found = self.model(**{self.input: x})
        return found if self.output is None else found[self.output]


class Pair(nn.Sequential):
    """Two times relu(bn(conv(x))), [n, inputs, *sizes] -> [n, outputs, *sizes]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        both = ((inputs, outputs), (outputs, outputs))
        each = (
            (nn.Conv3d(*channels, 3, padding=1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU()) for channels in both
        )
        super().__init__(*(layer for layers in each for layer in layers))


class UNet3d(nn.Module):
    """A U-Net over volumes: [n, 1, d, h, w] -> [n, classes, d, h, w], sizes that halve as often as there are floors."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64, 128), classes: int = 4) -> None:
        super().__init__()
        pairs = [*itertools.pairwise(channels)]
        self.first = Pair(1, channels[0])
        self.down = nn.ModuleList(Pair(*pair) for pair in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose3d(wide, narrow, 2, stride=2) for narrow, wide in reversed(pairs))
        self.join = nn.ModuleList(Pair(2 * narrow, narrow) for narrow, _ in reversed(pairs))
        self.pool, self.last = nn.MaxPool3d(2), nn.Conv3d(channels[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The scores of each class at each place."""
        left = [self.first(x)]
        for down in self.down:
            left.append(down(self.pool(left[-1])))
        x = left.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([left.pop(), up(x)], 1))
        return self.last(x)


@dataclass(frozen=True)
class Network:
    """How a network is made, and what it is given.

    Attributes:
        make: of options for its configuration (none for the one that is measured).
        shape: of its input, without the batch.
        batches: those that are measured.
        needs: the package that it comes from.
    """

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    needs: str = "transformers"

    @property
    def why_not(self) -> str | None:
        """The sentence for a package that is not here."""
        return None if find_spec(self.needs) else f"{self.needs} is not installed"

    def module(self, **options: Any) -> nn.Module:
        """The network for inference; norms have statistics as training leaves them, not 0 and 1."""
        torch.manual_seed(0)
        made = self.make(**options).eval()
        for layer in made.modules():
            if isinstance(layer, _NORMS):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
        return made

    def input(self, batch: int) -> Tensor:
        """Random numbers, the same each time."""
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(1))


def _of_transformers(
    model: str, config: str, input: str, output: str | None, **always: Any
) -> Callable[..., nn.Module]:
    def make(**options: Any) -> nn.Module:
        import transformers

        built = getattr(transformers, model)(getattr(transformers, config)(**always, **options))
        return Named(built, input, output)

    return make


_PICTURE = (3, 224, 224)
_CHANCES = "hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop"

NETWORKS = {  # chance is taken out (dropped units and layers), so that all sides compute the same in training
    "resnet50": Network(
        _of_transformers("ResNetForImageClassification", "ResNetConfig", "pixel_values", "logits"), _PICTURE, (1, 8)
    ),
    "convnext_tiny": Network(
        _of_transformers("ConvNextForImageClassification", "ConvNextConfig", "pixel_values", "logits"), _PICTURE
    ),
    "mobilenet_v2": Network(
        _of_transformers(
            "MobileNetV2ForImageClassification",
            "MobileNetV2Config",
            "pixel_values",
            "logits",
            classifier_dropout_prob=0.0,
        ),
        _PICTURE,
    ),
    "regnet": Network(
        _of_transformers("RegNetForImageClassification", "RegNetConfig", "pixel_values", "logits"), _PICTURE
    ),
    "segformer": Network(
        _of_transformers(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            "pixel_values",
            "logits",
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
        ),
        (3, 512, 512),
    ),
    "wav2vec2_base": Network(
        _of_transformers(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            "input_values",
            "last_hidden_state",
            mask_time_prob=0.0,
            **dict.fromkeys(_CHANCES, 0.0),
        ),
        (16000,),
    ),
    "encodec": Network(_of_transformers("EncodecModel", "EncodecConfig", "input_values", "audio_values"), (1, 24000)),
    "hifigan": Network(_of_transformers("SpeechT5HifiGan", "SpeechT5HifiGanConfig", "spectrogram", None), (100, 80)),
    "unet3d": Network(UNet3d, (1, 64, 64, 64), needs="torch"),
}
