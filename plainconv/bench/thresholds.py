"""What the suites are held to: the least geometric mean of the ratios, and the least ratio of a layer.

Where the machine's own limit lies below that, LIMIT_SHARE of the limit counts instead.  A call that torch finishes in
under 25 us is held to SHORT_WORST.  On a GPU there are also ratios within one memory format, ratios of calls from
Python, and shares of the limit itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    "large depthwise layers": lambda row: (
        row.layer.problem.groups > 1 and max(row.layer.problem.kernel) <= WIDEST and row.bytes > LARGE
    ),
}
# What is held to a threshold, and the same at the machine's limit.
MEASURED: dict[str, Callable[[Row], tuple[float | None, float]]] = {
    "ratio": lambda row: (row.ratio, row.most),
    "contiguous": lambda row: (row.ratio_in(CONTIGUOUS), row.most_in(CONTIGUOUS)),
    "channels_last": lambda row: (row.ratio_in(CHANNELS_LAST), row.most_in(CHANNELS_LAST)),
    "called from Python": lambda row: (row.eager_ratio, math.inf),
    "share of the limit": lambda row: (row.share, math.inf),
}

_SEED = ("seed_picture", "seed_mnist")
_DEPTHWISE = ("mobilenet_v1_depthwise", "x3d_depthwise3d", "movinet_depthwise3d", "depthwise_conv1d_llm_audio")
_WIDE_DEPTHWISE = ("efficientnet_b0_depthwise", "convnext")
_GROUPED = ("resnext50_32x4d_grouped", "resnext101_32x8d", "resnext101_3d_grouped", "alexnet_grouped")
_LONG = ("conv1d_onednn", "wavenet_dilated", "wavenet_k2", "wav2vec2")
_TRANSPOSED = ("dcgan_transposed", "unet_original_upconv", "hifigan_v1")
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
_DENSE_3D = ("3d_unet", "c3d")
_DENSE_WIDE = ("segnet_7x7",)  # kernels of more than 3x3
_DENSE_OTHERS = ("rfcn_dilated", "a3c", "vit_patch16", "alexnet_owt", "overfeat_fast")  # forward in float32 not asked
_OTHERS = ("replknet31b_depthwise", "conv1d_dense_gpu")


def _only(suite: str) -> str:
    return {"convnext": "depthwise layers", "hifigan_v1": "layers that are not transposed"}.get(suite, "layers")


def _forward() -> dict[tuple[str, str], list[Threshold]]:
    found: dict[tuple[str, str], list[Threshold]] = {}

    def hold(dtype: str, suites: Sequence[str], geomean: float, worst: float, of: str = "") -> None:
        for suite in suites:
            found.setdefault((dtype, suite), []).append(Threshold(geomean, worst, of or _only(suite)))

    hold("float32", _SEED, 4, 2)
    hold("float32", _DEPTHWISE, 3, 1.2)
    hold("float32", ("efficientnet_b0_depthwise",), 1.6, 0.9)
    hold("float32", ("convnext",), 2, 0.9)
    hold("float32", _GROUPED, 1.5, 0.9)
    hold("float32", ("conv1d_onednn", "wavenet_dilated"), 2.5, 1)
    hold("float32", ("wavenet_k2", "wav2vec2"), 2, 1)
    hold("float32", ("hifigan_v1",), 1.4, 1)
    hold("float32", _DENSE, 1.1, 0.85)
    hold("float32", _TRANSPOSED, 2, 1, "transposed layers")
    hold("float32", ("tiny_call",), SHORT_WORST, SHORT_WORST)
    hold("float64", (*_SEED, *_DEPTHWISE, *_WIDE_DEPTHWISE, *_GROUPED, *_LONG, *_OTHERS, "hifigan_v1"), 3, 1)
    hold("float64", (*_DENSE, *_DENSE_3D, *_DENSE_WIDE, *_DENSE_OTHERS), 1.1, 0.85)
    hold("bfloat16", (*_SEED, *_DEPTHWISE, *_WIDE_DEPTHWISE, *_GROUPED, *_LONG, *_OTHERS, "hifigan_v1"), 1.2, 0)
    hold("bfloat16", (*_DENSE, *_DENSE_3D, *_DENSE_WIDE, *_DENSE_OTHERS), 1.0, 0)
    hold("bfloat16", _TRANSPOSED, 1.2, 0, "transposed layers")
    return found


def _train() -> dict[tuple[str, str], list[Threshold]]:
    found: dict[tuple[str, str], list[Threshold]] = {}
    for suites, geomean, worst in (
        (_SEED, 4.0, 2.0),
        (_DEPTHWISE, 4.0, 1.5),
        (_WIDE_DEPTHWISE, 2.0, 1.0),
        (_GROUPED, 1.5, 0.9),
        (_LONG, 2.0, 1.0),
        (_TRANSPOSED, 2.0, 1.0),
        ((*_DENSE, *_DENSE_3D, *_DENSE_WIDE, *_DENSE_OTHERS), 1.2, 0.85),
    ):
        for suite in suites:
            of = "transposed layers" if suite in _TRANSPOSED else _only(suite)
            found["float32", suite] = [Threshold(geomean, worst, of)]
    return found


def _cuda(train: bool) -> dict[tuple[str, str], list[Threshold]]:
    found: dict[tuple[str, str], list[Threshold]] = {}
    depthwise = (*_DEPTHWISE, *_WIDE_DEPTHWISE, "replknet31b_depthwise")
    for dtype in ("float32", "bfloat16", "float16"):
        if train:
            every = (*depthwise, *_GROUPED, *_LONG, *_OTHERS, *_TRANSPOSED, *_DENSE, *_DENSE_3D, *_DENSE_WIDE)
            found |= {(dtype, suite): [Threshold(1, 0)] for suite in (*every, *_DENSE_OTHERS)}
            found |= {(dtype, suite): [Threshold(2, 0)] for suite in _SEED}
            continue
        for suites, geomean in (
            (_SEED, 2.0),
            (_GROUPED, 2.0),
            (("conv1d_dense_gpu", *_LONG), 1.5),
        ):
            found |= {(dtype, suite): [Threshold(geomean, 0)] for suite in suites}
        for suite in depthwise:
            large = Threshold(0, 0.7, "large depthwise layers", "share of the limit")
            found[dtype, suite] = [Threshold(2, 0, _only(suite)), large]
        for suite in _TRANSPOSED:
            found[dtype, suite] = [Threshold(1.3, 0, "transposed layers")]
        found[dtype, "tiny_call"] = [Threshold(0, 1 / 3, by="called from Python")]
    if not train:
        for suite in (*_DENSE, *_DENSE_3D, *_DENSE_WIDE, *_DENSE_OTHERS):
            found["bfloat16", suite] = [Threshold(1.1, 0, by="contiguous"), Threshold(0.9, 0, by="channels_last")]
    return found


# Device -> direction -> (type, suite) -> what is asked.
THRESHOLDS = {
    "cpu": {"forward": _forward(), "train": _train()},
    "cuda": {"forward": _cuda(False), "train": _cuda(True)},
}


@dataclass(frozen=True)
class Held:
    """What a threshold says of the rows of a suite.

    Attributes:
        threshold: the one.
        geomean: of what it picks.
        asked: of that geomean, with regard to the machine's limit.
        missed: layers below what is asked of them, and that.
    """

    threshold: Threshold
    geomean: float
    asked: float
    missed: tuple[tuple[Row, float], ...]

    @property
    def good(self) -> bool:
        return self.geomean >= self.asked and not self.missed


def held(direction: str, dtype: str, suite: str, rows: Sequence[Row], device: str = "cpu") -> list[Held]:
    """The verdict of each threshold that a suite has; none where no row has a speed."""
    found = []
    for threshold in THRESHOLDS[device].get(direction, {}).get((dtype, suite), []):
        measured = [(row, *MEASURED[threshold.by](row)) for row in rows if PICKED[threshold.of](row)]
        picked = [(row, value, most) for row, value, most in measured if value is not None]
        if picked:
            geomean = _mean([value for _, value, _ in picked])
            asked = _least(threshold.geomean, _mean([most for *_, most in picked]))
            each = [(row, value, _asked(threshold, row, most)) for row, value, most in picked]
            missed = tuple((row, least) for row, value, least in each if value < least)
            found.append(Held(threshold, geomean, asked, missed))
    return found


def _asked(threshold: Threshold, row: Row, most: float) -> float:
    return _least(min(SHORT_WORST, threshold.worst) if row.short else threshold.worst, most)


def _least(target: float, limit: float) -> float:
    return target if limit >= target else LIMIT_SHARE * limit


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
