"""The loop: train nets on the same batches, in turn, and note loss and accuracy against steps and seconds.

What makes two nets comparable:
- the same seed gives the same initial weights (the layers draw the same numbers), the same order of pictures, and the
  same dropout: the generator is set anew for each step, from the seed and the number of the step, so it does not matter
  what else ran in between;
- they take turns, a few steps each, in one process, so that a machine that slows down slows both;
- the clock runs only while a step runs: not for the test, and not for the first step's preparations, done once before.

One step: loss = NLL(net(x[batch]), y[batch]), its gradient, and Adam's update. Several processes share each batch
(processes.py says how); every one of them sees the same points.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainconv.train.data import Data
from plainconv.train.net import DROPOUT, Layer, Net
from plainconv.train.processes import ALONE, Team

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
    dropout: float = DROPOUT,
    team: Team = ALONE,
    watch: Callable[[str, Point], None] | None = None,
) -> dict[str, list[Point]]:
    """Train one net for each layer, in turn, from the same initial weights on the same batches.

    Args:
        layers: name -> what makes a convolution layer (see Net).
        data: on the device to train on.
        epochs, batch, seed, every, team: see fit.
        dropout: share of the numbers that the net's two dropouts leave out.
        watch: called with the name and each new point.

    Returns:
        name -> the points of its training; the last is the end.
    """
    runs = {}
    for name, layer in layers.items():
        torch.manual_seed(seed)
        net = team.wrap(Net(layer, dropout).to(data.x.device))
        runs[name] = fit(net, data, epochs=epochs, batch=batch, seed=seed, every=every, team=team)
    points: dict[str, list[Point]] = {name: [] for name in layers}
    for turn in zip(*runs.values(), strict=True):
        for name, point in zip(runs, turn, strict=True):
            points[name].append(point)
            if watch is not None:
                watch(name, point)
    return points


def fit(
    net: nn.Module,
    data: Data,
    *,
    epochs: int,
    batch: int,
    seed: int = 0,
    every: int = EVERY,
    team: Team = ALONE,
) -> Iterator[Point]:
    """Train a net; each point is the next `every` steps.

    Args:
        net: [n, 1, 28, 28] -> logarithms of probabilities [n, 10]; trained in place.
        data: on the net's device.
        epochs: how often each picture is seen.
        batch: pictures in a step, of all processes together; the last of an epoch takes what is left.
        seed: of the order of the pictures and of dropout.
        every: steps from one point to the next; the last step is always one.
        team: the processes that do the same with the same arguments, if there are several; the net is wrapped for them.

    Yields:
        one point after each `every` steps, and one at the end.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    total = steps(data, epochs, batch)
    _prepare(net, team.share(data.x[:batch]))
    seconds, losses = 0.0, []
    for step, chosen in enumerate(_batches(data, epochs, batch, seed), start=1):
        torch.manual_seed((seed * 1_000_003 + step) * team.size + team.rank)  # dropout
        share = team.share(chosen)
        start = _now(data.x)
        optimizer.zero_grad()
        loss = F.nll_loss(net(data.x[share]), data.y[share], reduction="sum") * (team.size / len(chosen))
        loss.backward()
        optimizer.step()
        seconds += _now(data.x) - start
        losses.append(loss.item())
        if step % every == 0 or step == total:
            mean = team.sum(sum(losses) / len(losses), data.x.device) / team.size
            yield Point(step, seconds, mean, accuracy(net, data, team))
            losses = []


def steps(data: Data, epochs: int, batch: int) -> int:
    """How many steps a training takes."""
    return epochs * -(-len(data.x) // batch)


def accuracy(net: nn.Module, data: Data, team: Team = ALONE) -> float:
    """The share of the test pictures that the net gets right, 0 to 1; dropout is off meanwhile."""
    xs, ys = team.share(data.test_x), team.share(data.test_y)
    training = net.training
    net.eval()
    with torch.no_grad():
        right = sum(
            int((net(x).argmax(1) == y).sum()) for x, y in zip(xs.split(TEST_BATCH), ys.split(TEST_BATCH), strict=True)
        )
    net.train(training)
    return team.sum(right, data.x.device) / len(data.test_y)


def _batches(data: Data, epochs: int, batch: int, seed: int) -> Iterator[Tensor]:
    """The indices of each step's pictures, shuffled anew in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(len(data.x), generator=generator).to(data.x.device).split(batch)


def _prepare(net: nn.Module, x: Tensor) -> None:
    """One step forward and back whose gradients are thrown away: what is made at a first call is made."""
    net.train()
    net(x).sum().backward()
    net.zero_grad()


def _now(x: Tensor) -> float:
    """Seconds on the clock, when the device of `x` has done all its work."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return perf_counter()
