"""What both kernels of GRAD_WEIGHT are told: how the long sum is cut, and how its places follow each other."""

from __future__ import annotations

import math
from typing import NamedTuple

from plainconv.gpu.launch import ends, three, tiles
from plainconv.problem import ConvProblem

Made = tuple[int, int, int, int]  # strides of the sums of parts: part, output channel, tap, input channel

# Of the GPU that parts are cut for, in cycles of its clock.
PROCESSORS = 132
BEGIN = 2000  # until the first product of a program, and from its last to the end
ADD = 4000  # the parts, if they were none
MOVED = 2000  # bytes in a cycle


def parts_of(
    problem: ConvProblem, count: int, steps: int, cycles: float, most: int, at_once: int = 1
) -> tuple[int, int]:
    """Into how many parts the places are cut for so many tiles of a weight, and how many steps each of them has.

    steps, cycles: of all places, and what one takes, where a multiprocessor has so many programs at once.  By the sizes
    alone: what takes the least time by count.  More parts keep more of a GPU busy, but all are written and read again.
    """
    count, steps, sums = max(count, 1), max(steps, 1), 4 * math.prod(problem.weight_shape)

    def taken(parts: int) -> float:
        rounds = tiles(count * parts, PROCESSORS * at_once)
        added = ADD + 2 * parts * sums / MOVED if parts > 1 else 0
        return rounds * (BEGIN + tiles(steps, parts) * cycles) + added

    most = min(most, steps, max(4 * PROCESSORS * at_once // count, 1))
    part = tiles(steps, min(range(1, most + 1), key=taken))
    return tiles(steps, part), part


class Meeting(NamedTuple):
    """Where the places of y meet those of x: of three dimensions each, and the image before them."""

    images: int
    low: tuple[int, ...]  # padding before
    end: tuple[int, ...]  # behind the last element of x that is left
    size: tuple[int, ...]  # of y
    of_x: tuple[int, ...]  # strides
    of_y: tuple[int, ...]
    dims: int  # along which x does not simply go on
    y_dims: int  # the same of y

    @staticmethod
    def of(problem: ConvProblem, of_x: tuple[int, ...], of_y: tuple[int, ...]) -> Meeting:
        """That of a problem, for x and y of these strides."""
        low = three((lo for lo, _ in problem.padding), 0)
        end, size = three(ends(problem), 1), three(problem.out, 1)
        return Meeting(problem.batch, low, end, size, of_x, of_y, problem.dims, problem.dims)

    def simply(self, problem: ConvProblem, x_last: bool, y_last: bool) -> Meeting:
        """The same in fewer dimensions, if there are some along which places simply go on in memory.

        x_last, y_last: whether channels are neighbours.
        """
        sizes = (self.images, *self.size)
        y_dims, of_y = _going_on(sizes, self.of_y, self.dims, y_last)
        if problem.taps == 1 and set(problem.stride) == {1} and set(problem.padding) == {(0, 0)}:
            dims, of_x = _going_on(sizes, self.of_x, self.dims, x_last)
            if dims == y_dims == 0:
                return Meeting(math.prod(sizes), self.low, (1, 1, 1), (1, 1, 1), of_x, of_y, 0, 0)
            if dims == y_dims == 1:
                line = (1, 1, math.prod(self.size))
                return Meeting(self.images, self.low, line, line, of_x, of_y, 1, 1)
        return self._replace(of_y=of_y, y_dims=y_dims)

    def numbers(self, x_channel: int, x_unit: int, y_channel: int, y_unit: int) -> tuple[int, ...]:
        """As kernels are told, strides in units."""
        of_x, of_y = (stride // x_unit for stride in self.of_x), (stride // y_unit for stride in self.of_y)
        return (*self.low, *self.end, *self.size, x_channel, *of_x, y_channel, *of_y)


def _going_on(sizes: tuple[int, ...], strides: tuple[int, ...], dims: int, last: bool) -> tuple[int, tuple[int, ...]]:
    """How many dimensions a walk through the places has to look at, and the strides to walk with.

    None where one place follows the other through all images, one where they do through an image.  Contiguous images
    are parted by their channels; that a batch of one has none to part compiles nothing.
    """
    if last and (step := _even(sizes, strides)) is not None:
        return 0, (step, 0, 0, 0)
    if (step := _even(sizes[1:], strides[1:])) is not None:
        return 1, (strides[0], 0, 0, step)
    return dims, strides


def _even(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """From each place to the next, if it is always the same."""
    step, places = None, 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1:
            step = stride if step is None else step
            if stride != step * places:
                return None
        places *= size
    return step or 0
