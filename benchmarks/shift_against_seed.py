"""Is `shift` ever slower than the few lines that this project grew from?

    python benchmarks/shift_against_seed.py [--runs 15] [--json FILE]

The seed multiplies the whole picture by kernel[y, x] and adds a slice of the product into a zeroed output, with
gradients by autograd.  Both sides run in one process, in turn, on the same tensors: the output, the gradient for the
input and the gradient for the weight, on the layers without groups of the picture filter and of the MNIST net.
Ends with exit code 1 if `shift` is slower anywhere (its median over the seed's).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

import plainconv
from plainconv.timing import machine

# n, c, o, height, width; every kernel is 3x3 (the suites seed_picture and seed_mnist)
LAYERS = {
    "picture, full HD": (1, 3, 3, 1080, 1920),
    "picture, 600x512": (1, 3, 3, 600, 512),
    "mnist conv1": (1000, 1, 3, 28, 28),
    "mnist conv2": (1000, 3, 3, 26, 26),
    "mnist conv3": (1000, 3, 6, 12, 12),
    "mnist conv4": (1000, 6, 6, 10, 10),
}


@dataclass(frozen=True)
class Record:
    """Medians in seconds, and how many times faster `shift` is."""

    layer: str
    direction: str
    seed_s: float
    shift_s: float
    ratio: float


def seed(x: Tensor, w: Tensor) -> Tensor:
    """The seed's last form: x [n, c, h, w], w [o, c, k, k] -> [n, o, h-k+1, w-k+1]."""
    pixels, taps = x.permute(0, 2, 3, 1), w.permute(2, 3, 1, 0)
    k = len(taps)
    height, width = x.shape[2] - k + 1, x.shape[3] - k + 1
    y = torch.zeros(len(x), height, width, len(w))
    for i in range(k):
        for j in range(k):
            y += (pixels @ taps[i, j])[:, i : i + height, j : j + width, :]
    return y.permute(0, 3, 1, 2)


def shift(x: Tensor, w: Tensor) -> Tensor:
    """plainconv's own."""
    return plainconv.conv2d(x, w, algorithm="shift")


def directions(
    convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, g: Tensor
) -> dict[str, Callable[[], object]]:
    """What to time: the three directions of one implementation."""
    xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()
    of_x, of_w = convolve(xg, w), convolve(x, wg)
    return {
        "forward": lambda: convolve(x, w),
        "grad_input": lambda: torch.autograd.grad(of_x, xg, g, retain_graph=True),
        "grad_weight": lambda: torch.autograd.grad(of_w, wg, g, retain_graph=True),
    }


def measure(runs: int) -> list[Record]:
    """Time every layer and direction, both sides in turn."""
    records = []
    for layer, (n, c, o, height, width) in LAYERS.items():
        torch.manual_seed(0)
        x, w, g = torch.randn(n, c, height, width), torch.randn(o, c, 3, 3), torch.randn(n, o, height - 2, width - 2)
        torch.testing.assert_close(shift(x, w), seed(x, w), rtol=1e-4, atol=1e-4)
        both = [directions(seed, x, w, g), directions(shift, x, w, g)]
        for direction in both[0]:
            spent: list[list[float]] = [[], []]
            for run in range(runs + 1):  # the first one warms up
                for side, times in zip(both, spent, strict=True):
                    start = perf_counter()
                    side[direction]()
                    if run:
                        times.append(perf_counter() - start)
            ours, theirs = statistics.median(spent[1]), statistics.median(spent[0])
            records.append(Record(layer, direction, theirs, ours, theirs / ours))
            sides_ms = f"seed {theirs * 1e3:8.2f} ms   shift {ours * 1e3:8.2f} ms"
            print(f"{layer:<18} {direction:<12} {sides_ms}   {theirs / ours:6.2f}x", flush=True)
    return records


def main() -> int:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the records here")
    arguments = parser.parse_args()
    records = measure(arguments.runs)
    if arguments.json:
        content = {"machine": machine(), "records": [asdict(record) for record in records]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    slower = [record for record in records if record.ratio < 1]
    print(f"slower in {len(slower)} of {len(records)}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
