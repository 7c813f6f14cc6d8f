"""plainconv beside torch: one picture filtered by every algorithm, and one small CNN trained with either layer.

The filter's problem is the idea's own: the picture as one image with all its channels, and a weight that leads every
colour to itself and mixes none,

    x [1, c, h, w] * weight [c*m, c, kh, kw] -> y [1, c*m, h - kh + 1, w - kw + 1],   weight[i*m + j, i] = kernel[j].

Everything is timed on contiguous and on channels_last tensors, in turn, and the better of the two counts: for torch as
for the algorithms. The error is the largest distance from torch's result in float64, in levels of the picture.
`loops` does a cut-out only, larger for a large kernel; its time is multiplied by how many more products the whole
picture has, and marked so.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plainconv.files import InputError
from plainconv.functional import conv2d
from plainconv.menu.base import AlgorithmRefused
from plainconv.picture import KERNELS, Picture, apply
from plainconv.plan import algorithms
from plainconv.timing import Timing, in_turn, machine
from plainconv.train import Data, Point, layers, race

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CUT = 32  # pixels; the side of the cut-out that `loops` filters, or more for a kernel that needs more
BEYOND = 7  # pixels; the cut-out is at least this much larger than the kernel


@dataclass(frozen=True)
class Comparison:
    """All that a report shows.

    Attributes:
        records: what was measured, as plain data for JSON: "made", "machine", "filter" and "training".
        gallery: name of a kernel -> the picture filtered with it; "original" is first.
        made: "torch", "auto" or an algorithm -> the picture that it made of the kernel compared.
    """

    records: dict[str, Any]
    gallery: dict[str, Picture]
    made: dict[str, Picture]


@dataclass(frozen=True)
class Row:
    """What one algorithm, or torch, did with the picture.

    Attributes:
        name: "torch", "auto" or the algorithm.
        timing: in its better layout; None when it refused.
        layout: that layout.
        both: layout -> timing.
        scale: 1, or by how much the time of a cut-out was multiplied.
        largest_error: in levels.
        refused: why it did not run, or None.
    """

    name: str
    timing: Timing | None = None
    layout: str = ""
    both: dict[str, Timing] | None = None
    scale: float = 1.0
    largest_error: float = 0.0
    refused: str | None = None


def compare(
    picture: Picture,
    kernel: Tensor,
    data: Data,
    *,
    epochs: int,
    batch: int,
    seed: int = 0,
    seconds: float = 8.0,
    watch: Callable[[str, Point], None] | None = None,
) -> Comparison:
    """The whole comparison: the picture first, then the training.

    Args:
        picture: its pixels lie on the device to measure on.
        kernel: float [m, kh, kw]; all algorithms are compared on it.
        data: on the device to train on.
        epochs, batch, seed, watch: see plainconv.train.race.
        seconds: how long to time the algorithms, about.
    """
    rows, made = compare_filters(picture, kernel, seconds=seconds)
    others = {name: torch.tensor(KERNELS[name], dtype=torch.float64) for name in KERNELS if name != "identity"}
    gallery = {"original": picture}
    gallery |= {name: picture.with_pixels(apply(picture.pixels, other)) for name, other in others.items()}
    runs = race(layers(), data, epochs=epochs, batch=batch, seed=seed, watch=watch)
    channels, height, width = picture.pixels.shape
    records = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "filter": {
            "channels": channels,
            "height": height,
            "width": width,
            "kernel": kernel.tolist(),
            "device": str(picture.pixels.device),
            "rows": [asdict(row) for row in rows],
        },
        "training": {
            "learnt_from": len(data.x),
            "tested_with": len(data.test_x),
            "epochs": epochs,
            "batch": batch,
            "seed": seed,
            "device": str(data.x.device),
            "runs": {name: [asdict(point) for point in points] for name, points in runs.items()},
        },
    }
    return Comparison(records, gallery, made)


def compare_filters(picture: Picture, kernel: Tensor, *, seconds: float = 8.0) -> tuple[list[Row], dict[str, Picture]]:
    """Filter a picture with torch, with "auto" and with each algorithm, and time them in turn.

    Args:
        picture: its pixels lie on the device to measure on.
        kernel: float [m, kh, kw].
        seconds: how long to measure, about.

    Returns:
        the rows, torch's first, and name -> the picture it made (of those that did not refuse).

    Raises:
        InputError: the kernel does not fit into the picture.
    """
    check_fits(picture, kernel)
    x = picture.pixels.unsqueeze(0)  # [1, c, h, w]
    weight = spread(kernel, x.shape[1]).to(x)
    exact = F.conv2d(x.double(), weight.double())
    cut = cut_out(x, *kernel.shape[-2:])
    exact_cut = F.conv2d(cut.double(), weight.double())
    scale = exact.numel() / exact_cut.numel()

    rows: dict[str, Row] = {}
    made: dict[str, Picture] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    for name in ("torch", "auto", *algorithms()):
        small = name == "loops"
        y, refused = None, ""
        for layout, memory_format in LAYOUTS.items():
            image = (cut if small else x).contiguous(memory_format=memory_format)
            w = weight.contiguous(memory_format=memory_format)
            call = _caller(name, image, w)
            try:
                y = call()
            except AlgorithmRefused as why:  # some serve only one of the layouts
                refused = str(why)
            else:
                calls[f"{name} {layout}"] = call
        if y is None:
            rows[name] = Row(name, refused=refused)
            continue
        error = float((y.double() - (exact_cut if small else exact)).abs().max())
        rows[name] = Row(name, scale=scale if small else 1.0, largest_error=error)
        made[name] = Picture(magnitude(y[0], len(kernel)), peak=picture.peak, profile=picture.profile)

    timings = in_turn(calls, seconds=seconds)
    for name in made:
        served = [layout for layout in LAYOUTS if f"{name} {layout}" in timings]
        both = {layout: _scaled(timings[f"{name} {layout}"], rows[name].scale) for layout in served}
        layout = min(both, key=lambda which: both[which].median_s)
        rows[name] = Row(
            name, both[layout], layout, both, scale=rows[name].scale, largest_error=rows[name].largest_error
        )
    return list(rows.values()), made


def spread(kernel: Tensor, channels: int) -> Tensor:
    """[m, kh, kw] -> [c*m, c, kh, kw]: each channel to itself, zeros elsewhere."""
    own = torch.eye(channels, dtype=kernel.dtype)[:, None, :, None, None]  # [c, 1, c, 1, 1]
    return (own * kernel[None, :, None]).flatten(0, 1)


def magnitude(y: Tensor, m: int) -> Tensor:
    """[c*m, h, w] -> [c, h, w]: the answer of one matrix, or the length of the vector of several."""
    return y if m == 1 else torch.linalg.vector_norm(y.unflatten(0, (-1, m)), dim=1)


def check_fits(picture: Picture, kernel: Tensor) -> None:
    """Raise InputError if the kernel, [m, kh, kw], is nowhere wholly inside the picture: nothing is padded here."""
    (height, width), (kh, kw) = picture.pixels.shape[-2:], kernel.shape[-2:]
    if height < kh or width < kw:
        raise InputError(f"a picture of {width}x{height} pixels cannot hold a kernel of {kw}x{kh}")


def cut_out(x: Tensor, kh: int = 1, kw: int = 1) -> Tensor:
    """The middle CUT x CUT pixels of [1, c, h, w], more where the kernel needs it, or all where there are fewer."""
    rows, columns = max(CUT, kh + BEYOND), max(CUT, kw + BEYOND)
    top, left = max(x.shape[-2] - rows, 0) // 2, max(x.shape[-1] - columns, 0) // 2
    return x[..., top : top + rows, left : left + columns]


def _caller(name: str, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    if name == "torch":
        return lambda: F.conv2d(x, weight)
    return lambda: conv2d(x, weight, algorithm=name)


def _scaled(timing: Timing, scale: float) -> Timing:
    return Timing(timing.median_s * scale, timing.low_s * scale, timing.high_s * scale, timing.calls)
