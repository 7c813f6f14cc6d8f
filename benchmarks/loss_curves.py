"""Does training with `winograd` go the way that it goes with torch's layers?

    python benchmarks/loss_curves.py [--data FOLDER] [--json FILE]

The MNIST net (3 epochs of batches of 1000) and a small ResNet (50 steps on random pictures), each four times: with
plainconv's layers, whose 3x3 convolutions of stride 1 are all computed by `winograd` in all three directions, and with
torch's, from the same initial weights on the same batches; then with torch's from two other seeds.  What the algorithm
changes in the loss should be less than what the seed changes: both are given, averaged over the points of the curves.
Ends with exit code 1 if it is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainconv.nn import Conv2d
from plainconv.timing import machine
from plainconv.train import data, loop
from plainconv.train.net import Layer

SEEDS = (0, 1, 2)
EPOCHS, BATCH = 3, 1000  # of MNIST
STEPS, PICTURES = 50, 64  # of the ResNet
CHANNELS = (16, 32, 64)


@dataclass(frozen=True)
class Curves:
    """The losses of one net.

    Attributes:
        net: its name.
        winograd: loss at each point, with plainconv's layers.
        torch: the same for torch's layers, from each seed; the first is that of `winograd`.
        algorithm_gap: the mean distance between `winograd` and the first of `torch`.
        seed_gap: the least mean distance between the first of `torch` and the others.
    """

    net: str
    winograd: list[float]
    torch: list[list[float]]
    algorithm_gap: float
    seed_gap: float


def winograd(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True) -> nn.Module:
    """plainconv's layer: by winograd, wherever that is for it."""
    algorithm = "winograd" if (kernel, stride) == (3, 1) else "auto"
    return Conv2d(inputs, outputs, kernel, stride, padding, bias=bias, algorithm=algorithm)


class Block(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), with a 1x1 convolution of x where the shape changes."""

    def __init__(self, conv: Layer, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        conv = partial(conv, bias=False)
        self.first = nn.Sequential(conv(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())
        self.second = nn.Sequential(conv(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs))
        self.short = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, inputs, h, w] -> [n, outputs, h / stride, w / stride]."""
        return F.relu(self.short(x) + self.second(self.first(x)))


def resnet(conv: Layer) -> nn.Module:
    """[n, 3, 32, 32] -> logits [n, 10]: a convolution, and two blocks at each of three sizes."""
    blocks, inputs = [], CHANNELS[0]
    for outputs in CHANNELS:
        blocks += [Block(conv, inputs, outputs, 1 + (inputs != outputs)), Block(conv, outputs, outputs, 1)]
        inputs = outputs
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    return nn.Sequential(conv(3, CHANNELS[0], 3, padding=1), nn.ReLU(), *blocks, *head)


def of_resnet(conv: Layer, seed: int) -> list[float]:
    """The loss of each step; pictures and labels are random, and the same in each step."""
    torch.manual_seed(seed)
    net, x, y = resnet(conv), torch.randn(PICTURES, 3, 32, 32), torch.randint(10, (PICTURES,))
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def of_mnist(pictures: data.Data, conv: Layer, seed: int) -> list[float]:
    """The mean loss of every ten steps."""
    points = loop.race({"one": conv}, pictures, epochs=EPOCHS, batch=BATCH, seed=seed)["one"]
    return [point.loss for point in points]


def gap(one: Sequence[float], other: Sequence[float]) -> float:
    """The mean distance of two curves."""
    return fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def main() -> int:
    """Parse, train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the MNIST files; by default they are fetched")
    parser.add_argument("--json", type=Path, help="write the curves here")
    arguments = parser.parse_args()
    found = []
    for net, curve in (("mnist", partial(of_mnist, data.load("mnist", arguments.data))), ("resnet", of_resnet)):
        ours, torchs = curve(winograd, SEEDS[0]), [curve(nn.Conv2d, seed) for seed in SEEDS]
        seed_gap = min(gap(torchs[0], other) for other in torchs[1:])
        found.append(Curves(net, ours, torchs, gap(ours, torchs[0]), seed_gap))
        print(f"{net:<8} the algorithm changes the loss by {found[-1].algorithm_gap:.1e}, the seed by {seed_gap:.1e}")
    if arguments.json:
        content = {"machine": machine(), "curves": [asdict(curves) for curves in found]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(curves.algorithm_gap >= curves.seed_gap for curves in found))


if __name__ == "__main__":
    sys.exit(main())
