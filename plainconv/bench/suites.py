"""The layers that are measured: figures of real networks, from public sources, in `layers.json`.

A suite is a list of layers.  A layer is a `ConvProblem`; a transposed layer is the mirrored problem whose GRAD_INPUT it
is, so that its input has the problem's output shape and the other way round.  layers.json holds one layer a line, its
problem in the text form that `ConvProblem.parse` reads, and where its figures come from.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

from plainconv.files import InputError
from plainconv.problem import ConvProblem, Direction

CUT_FLOP = 4e9  # a layer with more than that is cut, unless the whole is asked for
STEPS = 256  # the extent is cut to a multiple of 1 / STEPS

_MIRROR = {Direction.FORWARD: Direction.GRAD_INPUT, Direction.GRAD_INPUT: Direction.FORWARD}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a suite.

    Attributes:
        suite: the name of its suite.
        name: its name there.
        problem: the convolution; for a transposed layer the one whose gradient for the input it is.
        transposed: whether it is a transposed convolution.
        count: how often the network has it.
        source: where its figures come from.
    """

    suite: str
    name: str
    problem: ConvProblem
    transposed: bool = False
    count: int = 1
    source: str = ""

    @property
    def flop(self) -> int:
        """Floating-point operations of one direction: two for each product."""
        return 2 * self.problem.multiplies

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.problem.output_shape if self.transposed else self.problem.input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.problem.input_shape if self.transposed else self.problem.output_shape

    @property
    def output_padding(self) -> tuple[int, ...]:
        """What torch's conv_transpose calls so: by how much the output is longer than it must be."""
        p = self.problem
        sides = zip(p.spatial, p.out, p.kernel, p.stride, p.padding, p.dilation, strict=True)
        return tuple(size - ((o - 1) * s - lo - hi + d * (k - 1) + 1) for size, o, k, s, (lo, hi), d in sides)

    def direction(self, asked: Direction) -> Direction:
        """The direction of `problem` that a direction of this layer is."""
        return _MIRROR.get(asked, asked) if self.transposed else asked

    def cut(self, flop: float = CUT_FLOP) -> Layer:
        """This layer with at most so many operations: fewer images first, then a smaller extent; itself if it has."""
        if self.flop <= flop:
            return self
        one = dataclasses.replace(self.problem, batch=1)
        images = max(1, int(flop // (2 * one.multiplies)))
        if 2 * one.multiplies <= flop:
            return dataclasses.replace(self, problem=dataclasses.replace(self.problem, batch=images))
        smaller = (_shrunk(one, step) for step in range(STEPS, 0, -1))
        return dataclasses.replace(
            self, problem=next((p for p in smaller if 2 * p.multiplies <= flop), _shrunk(one, 0))
        )


def _shrunk(problem: ConvProblem, step: int) -> ConvProblem:
    """Every extent times step / STEPS, but never too short for one output."""
    sides = zip(problem.spatial, problem.kernel, problem.dilation, problem.padding, strict=True)
    spatial = tuple(max(size * step // STEPS, (k - 1) * d + 1 - lo - hi, 1) for size, k, d, (lo, hi) in sides)
    return dataclasses.replace(problem, spatial=spatial)


@functools.cache
def load() -> dict[str, tuple[Layer, ...]]:
    """Name of a suite -> its layers, all that come with the package."""
    suites: dict[str, tuple[Layer, ...]] = {}
    for row in json.loads(files("plainconv.bench").joinpath("layers.json").read_text()):
        row["problem"] = ConvProblem.parse(row["problem"])
        layer = Layer(**row)
        suites[layer.suite] = (*suites.get(layer.suite, ()), layer)
    return suites


def named(names: Iterable[str]) -> list[Layer]:
    """The layers of the suites named, in order; InputError names a suite that does not exist."""
    known = load()
    found: list[Layer] = []
    for name in dict.fromkeys(names):
        if name not in known:
            raise InputError(f"unknown suite {name!r}; `plainconv bench --list` names those that there are")
        found += known[name]
    return found
