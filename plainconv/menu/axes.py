"""What the kernel of `direct` moves along, the same for the output and for the gradient for the input.

Along one dimension the output reads, for its place t and tap k, place  t * stride + k * dilation  of the padded input.
The gradient for the input is turned round: its place i is reached by tap k from place  (i + lo - k * dilation) / stride
of the output, if that is a whole number.  With i = stride * t + phase, this is

    t + (phase + lo - k * dilation) / stride        for the taps of the phase, those that divide without rest

so each of `stride` phases is a convolution with stride 1 and its own part of the taps, and writes every stride-th place
of the result.  All of them read the same rows: what they differ in is which taps they have and where those look.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from plainconv.menu import engine
from plainconv.menu.engine import Side, folded
from plainconv.problem import ConvProblem, Direction, Pair, Request


class Tap(NamedTuple):
    """One tap along a dimension: its number in the weight, where it reads for place 0 of its phase, and the phase."""

    number: int
    place: int
    phase: int


class Axis(NamedTuple):
    """One dimension: `size` elements that are read, padded; from one place to the next, `stride` of them.

    taps    in the order of their phases, and within one of what they read
    step    from one place of a phase to the next, in the result
    out     places of phase 0, which has the most
    made    elements of the result
    """

    size: int
    padding: Pair
    stride: int
    taps: tuple[Tap, ...]
    step: int
    out: int
    made: int

    @property
    def reach(self) -> int:
        """The furthest that a tap reads."""
        return max((tap.place for tap in self.taps), default=0)

    @property
    def plain(self) -> bool:
        """Whether place t of every phase reads element t and nothing else."""
        return self.stride == 1 and self.reach == 0 and self.padding[0] == 0 and self.out == self.size

    def places(self, phase: int) -> int:
        """How many places a phase has."""
        return max(-(-(self.made - phase) // self.step), 0)

    @property
    def met(self) -> int:
        """How often an element of the result reads one that is not padding, with stride 1 and zeros around."""
        spans = (
            min(self.size + self.padding[0] - tap.place, self.places(tap.phase)) - max(self.padding[0] - tap.place, 0)
            for tap in self.taps
        )
        return sum(max(span, 0) for span in spans)


Axes = tuple[Axis, Axis, Axis]


def _ahead(side: Side) -> Axis:
    taps = tuple(Tap(k, k * side.dilation, 0) for k in range(side.kernel))
    return Axis(side.size, side.padding, side.stride, taps, 1, side.out, side.out)


def _turned(side: Side) -> Axis:
    # A single element of the output meets each tap in a place of its own, however long the stride is.
    stride = side.stride if side.out > 1 else max(side.size, 1)
    places = -(-side.size // stride)
    taps = []
    for k in range(side.kernel):
        at = side.padding[0] - k * side.dilation
        phase = -at % stride
        tap = Tap(k, (at + phase) // stride, phase)
        if tap.phase < side.size and -places < tap.place < side.out:  # else it reads nothing anywhere
            taps.append(tap)
    first = min((tap.place for tap in taps), default=0)
    ordered = sorted(taps, key=lambda tap: (tap.phase, tap.place))
    moved = tuple(tap._replace(place=tap.place - first) for tap in ordered)
    return Axis(side.out, (-first, 0), 1, moved, stride, places, side.size)


@dataclass(frozen=True, eq=False)
class Work:
    """A request as the kernel sees it: in_channels and spatial are those of what is read, out_channels of the result.

    turned: it is the gradient for the input, so channels change places in the weight.
    """

    request: Request
    turned: bool
    batch: int
    groups: int
    in_channels: int
    out_channels: int
    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    mode: str

    @property
    def group_in(self) -> int:
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        return self.out_channels // self.groups

    @property
    def taps(self) -> int:
        return self.request.problem.taps

    def axes(self, merge: bool = True) -> Axes:
        """Depth, rows and width; merge: neighbours along which the kernel does not move become one."""
        return _axes(self.request.problem, self.turned, merge)


@lru_cache(4096)
def _axes(problem: ConvProblem, turned: bool, merge: bool) -> Axes:
    depth, high, width = (_turned(side) if turned else _ahead(side) for side in folded(problem, merge))
    return depth, high, width


@lru_cache(4096)
def work(request: Request) -> Work:
    """How the kernel sees a request."""
    problem = request.problem
    turned = request.direction is Direction.GRAD_INPUT
    read, made = ("y", "x") if turned else ("x", "y")
    batch, in_channels, *spatial = problem.shape_of(read)
    out_channels = problem.shape_of(made)[1]
    mode = "zeros" if turned else problem.padding_mode
    return Work(request, turned, batch, problem.groups, in_channels, out_channels, tuple(spatial), problem.kernel, mode)


def elements(axis: Axis, mode: str) -> list[list[int]]:
    """[element of the result, tap]: the element that is read, or -1 for a zero or a tap of another phase."""
    row = engine.shown(axis, mode, 0, max(axis.out - 1, 0) * axis.stride + axis.reach + 1).tolist()
    return [
        [row[i // axis.step * axis.stride + tap.place] if tap.phase == i % axis.step else -1 for tap in axis.taps]
        for i in range(axis.made)
    ]


def inside(axis: Axis, mode: str) -> list[tuple[int, int]]:
    """For each element of the result, the first tap that does not read padding, and how many there are."""
    each = ([k for k, element in enumerate(row) if element >= 0] for row in elements(axis, mode))
    none = (0, min(1, len(axis.taps))) if axis.step == 1 else (0, 0)
    return [(real[0], real[-1] + 1 - real[0]) if real else none for real in each]
