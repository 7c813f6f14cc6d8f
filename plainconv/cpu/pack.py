"""Weights packed for the dense kernel: lanes are output channels, or steps take two channels.

A weight is seen as w[o, u, v], v side by side in memory: contiguous weights have (u, v) = (channel or pair of channels,
tap), channels_last ones (tap, channel).  With lanes of `width` outputs to a tile,

    packed[o // width, r, o % width]  =  w[o, u, v]        zero for outputs that do not exist

in squares of lanes x lanes, transposed in registers; r counts taps, and within them channels.  Without lanes,
packed[o, r] holds the pairs of w, and r counts channels, and within them taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from plainconv.cpu.emit import Emit, Value

POINTERS = ("w", "packed")
SIZES = (
    "groups",
    "outputs",  # of a group
    "vectors",  # of lanes, of a group, made up to whole tiles
    "u_count",
    "v_count",
    "w_group",
    "w_output",
    "w_u",
    "w_far",  # from a number to the other of its pair
    "alone",  # the u whose numbers have no other
    "r_u",  # r = r_u * u + r_v * v
    "r_v",
    "width",  # lanes of a tile
)


@dataclass(frozen=True)
class Shape:
    """All that the text depends on; pairs: None, or where the other number of a pair is, "near" or "far"."""

    element: str
    stored: str
    native: frozenset[str]
    lanes: int
    pairs: str | None
    transposed: bool


@lru_cache(64)
def text(shape: Shape) -> str:
    """The kernel of this shape; tasks are vectors of outputs (or outputs, if they are no lanes) of all groups."""
    e = Emit(shape.lanes, shape.element, shape.native)
    given = e.arguments(*("ptr",) * len(POINTERS), *("i64",) * len(SIZES))
    of = dict(zip((*POINTERS, *SIZES), given, strict=True))
    lanes = shape.lanes
    rows = lanes if shape.transposed else 1

    def task(i: Value, _: list[Value]) -> Sequence[Value]:
        number = e.begin + i
        group, vector = number // of["vectors"], number % of["vectors"]
        output = vector * rows
        w = e.at(of["w"], group * of["w_group"] + output * of["w_output"], shape.stored)
        size = of["u_count"] * of["v_count"]
        if shape.transposed:
            tiles = of["vectors"] * lanes // of["width"]
            tile, lane = output // of["width"], output % of["width"]
            to = e.at(of["packed"], (group * tiles + tile) * size * of["width"] + lane)
        else:
            to = e.at(of["packed"], number * size)

        def each_u(u: Value, _: list[Value]) -> Sequence[Value]:
            def each_vector(v: Value, _: list[Value]) -> Sequence[Value]:
                first = v * lanes
                left = of["v_count"] - first
                loaded = []
                for r in range(rows):
                    here = left if rows == 1 else e.select(output + r < of["outputs"], left, e.number(0))
                    other = e.tail(e.select(e.compare("eq", u, of["alone"]), e.number(0), here))
                    loaded.append(read(w, of["w_output"] * r + u * of["w_u"], first, e.tail(here), other))
                if shape.transposed:
                    # Columns that do not exist are written over the last one, which is then written itself.
                    for column, value in reversed(list(enumerate(e.transpose(loaded)))):
                        place = u * of["r_u"] + (first + e.least(left - 1, column)) * of["r_v"]
                        e.store(value, to, place * of["width"])
                else:
                    e.store(loaded[0], to, u * of["r_u"] + first, e.tail(left))
                return []

            e.loop((of["v_count"] + (lanes - 1)) // lanes, [], each_vector)
            return []

        e.loop(of["u_count"], [], each_u)
        return []

    def read(w: Value, start: Value, first: Value, mask: Value, other: Value) -> Value:
        if shape.pairs == "near":
            return e.load_pairs(w, start + first * 2, mask)
        value = e.load(w, start + first, mask, shape.stored)
        if shape.pairs is None:
            return value
        return e.pairs_of(value, e.load(w, start + first + of["w_far"], other, shape.stored))

    e.loop(e.end - e.begin, [], task)
    return e.module()
