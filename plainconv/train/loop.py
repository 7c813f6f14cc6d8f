"""The loop: train nets on the same batches, in turn, and note loss and accuracy against steps and seconds.

What makes two nets comparable:
- the same seed gives the same initial weights (the layers draw the same numbers), the same order of pictures, and the
  same dropout: the generator is set anew for each step, from the seed and the number of the step, so it does not matter
  what else ran in between;
- they take turns, a few steps each, in one process, so that a machine that slows down slows both;
- the clock runs only while a step runs: not for the test, and not for the first step's preparations, done once before.

One step: loss = NLL(net(x[batch]), y[batch]), its gradient, and Adam's update.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainconv.train.data import Data
from plainconv.train.net import Layer, Net

LEARNING_RATE = 0.001
TEST_BATCH = 1000
EVERY = 10  # steps from one point to the next


@dataclass(frozen=True)
class Point:
    """Where a training is.

    Attributes:
        step: batches learnt from so far, counted from 1.
        seconds: spent in those steps; tests are not in it.
        loss: mean of the losses since the point before.
        accuracy: share of the test pictures that the net gets right, 0 to 1.
    """

    step: int
    seconds: float
    loss: float
    accuracy: float


def race(
    layers: Mapping[str, Layer],
    data: Data,
    *,
    epochs: int,
    batch: int,
    seed: int = 0,
    every: int = EVERY,
    watch: Callable[[str, Point], None] | None = None,
) -> dict[str, list[Point]]:
    """Train one net for each layer, in turn, from the same initial weights on the same batches.

    Args:
        layers: name -> what makes a convolution layer (see Net).
        data: on the device to train on.
        epochs, batch, seed, every: see fit.
        watch: called with the name and each new point.

    Returns:
        name -> the points of its training; the last is the end.
    """
    runs = {}
    for name, layer in layers.items():
        torch.manual_seed(seed)
        net = Net(layer).to(data.x.device)
        runs[name] = fit(net, data, epochs=epochs, batch=batch, seed=seed, every=every)
    points: dict[str, list[Point]] = {name: [] for name in layers}
    for turn in zip(*runs.values(), strict=True):
        for name, point in zip(runs, turn, strict=True):
            points[name].append(point)
            if watch is not None:
                watch(name, point)
    return points


def fit(net: nn.Module, data: Data, *, epochs: int, batch: int, seed: int = 0, every: int = EVERY) -> Iterator[Point]:
    """Train a net; each point is the next `every` steps.

    Args:
        net: [n, 1, 28, 28] -> logarithms of probabilities [n, 10]; trained in place.
        data: on the net's device.
        epochs: how often each picture is seen.
        batch: pictures in a step; the last of an epoch takes what is left.
        seed: of the order of the pictures and of dropout.
        every: steps from one point to the next; the last step is always one.

    Yields:
        one point after each `every` steps, and one at the end.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    total = steps(data, epochs, batch)
    _prepare(net, data, batch)
    seconds, losses = 0.0, []
    for step, chosen in enumerate(_batches(data, epochs, batch, seed), start=1):
        torch.manual_seed(seed * 1_000_003 + step)  # dropout
        start = _now(data.x)
        optimizer.zero_grad()
        loss = F.nll_loss(net(data.x[chosen]), data.y[chosen])
        loss.backward()
        optimizer.step()
        seconds += _now(data.x) - start
        losses.append(loss.item())
        if step % every == 0 or step == total:
            yield Point(step, seconds, sum(losses) / len(losses), accuracy(net, data))
            losses = []


def steps(data: Data, epochs: int, batch: int) -> int:
    """How many steps a training takes."""
    return epochs * -(-len(data.x) // batch)


def accuracy(net: nn.Module, data: Data) -> float:
    """The share of the test pictures that the net gets right, 0 to 1; dropout is off meanwhile."""
    training = net.training
    net.eval()
    with torch.no_grad():
        right = sum(
            int((net(x).argmax(1) == y).sum())
            for x, y in zip(data.test_x.split(TEST_BATCH), data.test_y.split(TEST_BATCH), strict=True)
        )
    net.train(training)
    return right / len(data.test_y)


def _batches(data: Data, epochs: int, batch: int, seed: int) -> Iterator[Tensor]:
    """The indices of each step's pictures, shuffled anew in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(len(data.x), generator=generator).to(data.x.device).split(batch)


def _prepare(net: nn.Module, data: Data, batch: int) -> None:
    """One step forward and back whose gradients are thrown away: what is made at a first call is made."""
    net.train()
    net(data.x[:batch]).sum().backward()
    net.zero_grad()


def _now(x: Tensor) -> float:
    """Seconds on the clock, when the device of `x` has done all its work."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return perf_counter()
