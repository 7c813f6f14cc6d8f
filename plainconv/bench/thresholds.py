"""What the suites are held to: the least geometric mean of the ratios, and the least ratio of a layer.

Where the machine's own limit lies below that, LIMIT_SHARE of the limit counts instead; both are kept, and shown where
they differ.  That limit is one of the definition's products: what passes it has fewer, and is held to the target.  A
call that torch finishes in under 25 us is held to SHORT_WORST.  On a GPU there are also ratios within one memory
format, ratios of calls from Python, and shares of the limit itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from plainconv.bench.calls import CHANNELS_LAST, CONTIGUOUS
from plainconv.bench.run import Row

LIMIT_SHARE = 0.75
SHORT_WORST = 0.5
REGRET = (1.15, 1.5)  # of "auto": its time over that of the best algorithm, geomean and worst


@dataclass(frozen=True)
class Threshold:
    """Of those layers of a suite that `of` picks: geomean and worst of what `by` measures.

    `of` and `by` are names for the reader, of PICKED and MEASURED.
    """

    geomean: float
    worst: float
    of: str = "layers"
    by: str = "ratio"


LARGE = 100_000_000  # bytes of a layer's tensors, from which a GPU is held to a share of its limit
WIDEST = 7  # taps along a dimension of such a layer, at most

PICKED: dict[str, Callable[[Row], bool]] = {
    "layers": lambda row: True,
    "depthwise layers": lambda row: row.layer.problem.groups > 1,
    "transposed layers": lambda row: row.layer.transposed,
    "layers that are not transposed": lambda row: not row.layer.transposed,
    "3x3 layers of stride 1": lambda row: (
        row.layer.problem.kernel == (3, 3) and row.layer.problem.stride == (1, 1) and not row.layer.transposed
    ),
    "large depthwise layers": lambda row: (
        row.layer.problem.groups > 1 and max(row.layer.problem.kernel) <= WIDEST and row.bytes > LARGE
    ),
}
# What is held to a threshold, and the same at the machine's limit.
MEASURED: dict[str, Callable[[Row], tuple[float | None, float]]] = {
    "ratio": lambda row: (row.ratio, row.most),
    "prepacked": lambda row: (row.packed_ratio, row.most),
    "contiguous": lambda row: (row.ratio_in(CONTIGUOUS), row.most_in(CONTIGUOUS)),
    "channels_last": lambda row: (row.ratio_in(CHANNELS_LAST), row.most_in(CHANNELS_LAST)),
    "called from Python": lambda row: (row.eager_ratio, math.inf),
    "share of the limit": lambda row: (row.share, math.inf),
}

# Suites, or some layers of one: "suite: what PICKED calls them".
_SEED = ("seed_picture", "seed_mnist")
_DEPTHWISE = ("mobilenet_v1_depthwise", "x3d_depthwise3d", "movinet_depthwise3d", "depthwise_conv1d_llm_audio")
_WIDE_DEPTHWISE = ("efficientnet_b0_depthwise", "convnext: depthwise layers")
_GROUPED = ("resnext50_32x4d_grouped", "resnext101_32x8d", "resnext101_3d_grouped", "alexnet_grouped")
_LONG = ("conv1d_onednn", "wavenet_dilated", "wavenet_k2", "wav2vec2")
_HIFIGAN = "hifigan_v1: layers that are not transposed"
_TRANSPOSED = ("dcgan_transposed", "unet_original_upconv", "hifigan_v1: transposed layers")
_DENSE = (
    "resnet50_v1.5_mlperf",
    "inception_v3",
    "vgg19",
    "vgg_a",
    "densenet",
    "mobilenet_v1_pointwise",
    "mobilenet_v2",
    "xception",
    "yolov2",
    "unet_original",
    "unet_small_onednn",
    "ssd_resnet34",
    "cosmictagger",
)
_SQUARE = tuple(
    f"{suite}: 3x3 layers of stride 1"
    for suite in ("resnet50_v1.5_mlperf", "vgg19", "vgg_a", "ssd_resnet34", "unet_original", "yolov2")
)
_DENSE_3D = ("3d_unet", "c3d")
_DENSE_WIDE = ("segnet_7x7",)  # kernels of more than 3x3
_DENSE_OTHERS = ("rfcn_dilated", "a3c", "vit_patch16", "alexnet_owt", "overfeat_fast")  # forward in float32 not asked
_DENSE_ALL = (*_DENSE, *_DENSE_3D, *_DENSE_WIDE, *_DENSE_OTHERS)
_OTHERS = ("replknet31b_depthwise", "conv1d_dense_gpu")

Thresholds = dict[tuple[str, str], list[Threshold]]  # (type, suite) -> what is asked


def _hold(
    found: Thresholds, dtype: str, names: Iterable[str], geomean: float, worst: float = 0, by: str = "ratio"
) -> None:
    for name in names:
        suite, _, of = name.partition(": ")
        found.setdefault((dtype, suite), []).append(Threshold(geomean, worst, of or "layers", by))


def _forward() -> Thresholds:
    found: Thresholds = {}
    for names, geomean, worst in (
        (_SEED, 4.0, 2.0),
        (_DEPTHWISE, 3.0, 1.2),
        (("efficientnet_b0_depthwise",), 1.6, 0.9),
        (("convnext: depthwise layers",), 2.0, 0.9),
        (("replknet31b_depthwise",), 2.5, 0.0),
        (_GROUPED, 1.5, 0.9),
        (("conv1d_onednn", "wavenet_dilated"), 2.5, 1.0),
        (("wavenet_k2", "wav2vec2"), 2.0, 1.0),
        ((_HIFIGAN,), 1.4, 1.0),
        (_DENSE, 1.4, 0.9),
        (_DENSE_3D, 2.2, 0.9),
        (_DENSE_WIDE, 1.5, 0.9),
        (_SQUARE, 2.2, 1.0),
        (_TRANSPOSED, 2.0, 1.0),
        (("tiny_call",), SHORT_WORST, SHORT_WORST),
    ):
        _hold(found, "float32", names, geomean, worst)
    _hold(found, "float32", (*_DENSE, *_DENSE_3D, *_DENSE_WIDE), 1.6, by="prepacked")
    _hold(found, "float32", _SQUARE, 2.5, by="prepacked")
    others = (*_SEED, *_DEPTHWISE, *_WIDE_DEPTHWISE, *_GROUPED, *_LONG, *_OTHERS, _HIFIGAN)
    _hold(found, "float64", others, 3, 1)
    _hold(found, "float64", _DENSE_ALL, 1.1, 0.85)
    _hold(found, "bfloat16", (*others, *_TRANSPOSED), 1.2)
    _hold(found, "bfloat16", _DENSE_ALL, 1)
    return found


def _train() -> Thresholds:
    found: Thresholds = {}
    for names, geomean, worst in (
        (_SEED, 4.0, 2.0),
        (_DEPTHWISE, 4.0, 1.5),
        (_WIDE_DEPTHWISE, 2.0, 1.0),
        (_GROUPED, 1.5, 0.9),
        (_LONG, 2.0, 1.0),
        (_TRANSPOSED, 2.0, 1.0),
        (_DENSE_ALL, 1.2, 0.85),
        (_SQUARE, 1.7, 0.0),
    ):
        _hold(found, "float32", names, geomean, worst)
    return found


def _cuda_forward() -> Thresholds:
    found: Thresholds = {}
    depthwise = (*_DEPTHWISE, *_WIDE_DEPTHWISE, "replknet31b_depthwise")
    large = [f"{name.partition(': ')[0]}: large depthwise layers" for name in depthwise]
    for dtype in ("float32", "bfloat16", "float16"):
        _hold(found, dtype, (*_SEED, *_GROUPED, *depthwise), 2)
        _hold(found, dtype, large, 0, 0.7, "share of the limit")
        _hold(found, dtype, ("conv1d_dense_gpu", *_LONG), 1.5)
        _hold(found, dtype, _TRANSPOSED, 1.3)
        _hold(found, dtype, ("tiny_call",), 0, 1 / 3, "called from Python")
    _hold(found, "bfloat16", _DENSE_ALL, 1.1, by="contiguous")
    _hold(found, "bfloat16", _DENSE_ALL, 0.9, by="channels_last")
    return found


def _cuda_train() -> Thresholds:
    found: Thresholds = {}
    others = (*_DEPTHWISE, *_WIDE_DEPTHWISE, *_GROUPED, *_LONG, *_OTHERS, *_TRANSPOSED, *_DENSE_ALL)
    for dtype in ("float32", "bfloat16", "float16"):
        _hold(found, dtype, _SEED, 2)
        _hold(found, dtype, (name.partition(": ")[0] for name in others), 1)  # whole suites
    return found


# Device -> direction -> (type, suite) -> what is asked.
THRESHOLDS = {
    "cpu": {"forward": _forward(), "train": _train()},
    "cuda": {"forward": _cuda_forward(), "train": _cuda_train()},
}


@dataclass(frozen=True)
class Found:
    """A value beside what is asked of it.

    Attributes:
        value: that was measured.
        target: of it.
        most: what it would be at the machine's limit.
    """

    value: float
    target: float
    most: float

    @property
    def asked(self) -> float:
        """What counts: the target, or a share of the limit where that lies between."""
        return LIMIT_SHARE * self.most if self.value <= self.most < self.target else self.target

    @property
    def good(self) -> bool:
        return self.value >= self.asked

    @property
    def spared(self) -> bool:
        """Whether it is good by the machine's limit alone."""
        return self.good and self.value < self.target

    def __str__(self) -> str:
        limited = f" ({self.target:.2f} but for the limit)" * (self.asked < self.target)
        return f"{self.value:.2f} of {self.asked:.2f}{limited}"


@dataclass(frozen=True)
class Held:
    """What a threshold says of the rows of a suite.

    Attributes:
        threshold: the one.
        geomean: of what it picks.
        layers: each row that it picks.
    """

    threshold: Threshold
    geomean: Found
    layers: tuple[tuple[Row, Found], ...]

    @property
    def good(self) -> bool:
        return self.geomean.good and not self.missed

    @property
    def missed(self) -> list[tuple[Row, Found]]:
        """Layers below what is asked of them."""
        return [(row, found) for row, found in self.layers if not found.good]

    @property
    def spared(self) -> list[tuple[Row, Found]]:
        """Layers below their target that are good by the machine's limit alone."""
        return [(row, found) for row, found in self.layers if found.spared]


def picked(of: str, rows: Iterable[Row]) -> list[Row]:
    """The rows that a name in PICKED stands for."""
    return [row for row in rows if PICKED[of](row)]


def held(direction: str, dtype: str, suite: str, rows: Sequence[Row], device: str = "cpu") -> list[Held]:
    """The verdict of each threshold that a suite has; none where no row has a speed."""
    verdicts = []
    for threshold in THRESHOLDS[device].get(direction, {}).get((dtype, suite), []):
        measured = [(row, *MEASURED[threshold.by](row)) for row in picked(threshold.of, rows)]
        known = [(row, value, most) for row, value, most in measured if value is not None]
        if known:
            geomean = _mean([value for _, value, _ in known]), threshold.geomean, _mean([most for *_, most in known])
            layers = tuple((row, Found(value, _worst(threshold, row), most)) for row, value, most in known)
            verdicts.append(Held(threshold, Found(*geomean), layers))
    return verdicts


def _worst(threshold: Threshold, row: Row) -> float:
    return min(SHORT_WORST, threshold.worst) if row.short else threshold.worst


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
