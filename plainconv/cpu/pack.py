"""What is packed for the dense kernel: a weight whose lanes are output channels, or whose steps take two channels.

A weight is seen as w[o, u, v], v side by side in memory: contiguous weights have (u, v) = (channel or pair of channels,
tap), channels_last ones (tap, channel).  With lanes of `width` outputs to a tile,

    packed[o // width, r, o % width]  =  w[o, u, v]        zero for outputs that do not exist

in squares of lanes x lanes, transposed in registers; r counts taps, and within them channels.  Where outputs lie side
by side already, as in a channels_last weight turned round, vectors are copied as they are.  Without lanes, packed[o, r]
holds the pairs of w, and r counts channels, and within them taps.

Images are packed like outputs where several of them are read at once: w[o, u, v] is the input then, o its images, u its
pixels and v their channels.
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
    "v_numbers",  # near each other: of all v, which may be one less than two each
    "w_group",
    "w_output",
    "w_u",
    "w_v",  # 1, unless outputs lie side by side
    "w_far",  # from a number to the other of its pair
    "alone",  # the u whose numbers have no other
    "r_u",  # r = r_u * u + r_v * v
    "r_v",
    "width",  # lanes of a tile
    "runs",  # into which vectors (or outputs, if they are no lanes) of a group are cut for tasks, and
    "splits",  # the u of a run; "copied" knows neither
)


@dataclass(frozen=True)
class Shape:
    """All that the text depends on.

    pairs   None, or where the other number of a pair is, "near" or "far"
    lay     how outputs become lanes: "transposed", or "copied" where they lie side by side; "kept": they do not
    """

    element: str
    stored: str
    native: frozenset[str]
    lanes: int
    pairs: str | None
    lay: str


@lru_cache(64)
def text(shape: Shape) -> str:
    """The kernel of this shape; tasks are runs of outputs, split along u, of all groups, or single u ("copied").

    What lies side by side in memory should be read in one task: a run of one vector if that is u, else of all vectors.
    """
    e = Emit(shape.lanes, shape.element, shape.native)
    given = e.arguments(*("ptr",) * len(POINTERS), *("i64",) * len(SIZES))
    of = dict(zip((*POINTERS, *SIZES), given, strict=True))
    lanes = shape.lanes
    rows = lanes if shape.lay == "transposed" else 1
    size = of["u_count"] * of["v_count"]

    def place(group: Value, output: Value) -> Value:
        """Where a vector of outputs begins, packed."""
        tiles = of["vectors"] * lanes // of["width"]
        return (group * tiles + output // of["width"]) * size * of["width"] + output % of["width"]

    def copied(i: Value, _: list[Value]) -> Sequence[Value]:
        group, u = (e.begin + i) // of["u_count"], (e.begin + i) % of["u_count"]
        other = e.select(e.compare("eq", u, of["alone"]), e.number(0), of["outputs"])

        def each_v(v: Value, _: list[Value]) -> Sequence[Value]:
            w = e.at(of["w"], group * of["w_group"] + u * of["w_u"] + v * of["w_v"], shape.stored)
            row = (u * of["r_u"] + v * of["r_v"]) * of["width"]

            def each_vector(n: Value, _: list[Value]) -> Sequence[Value]:
                output = n * lanes
                value = read(w, e.number(0), output, e.tail(of["outputs"] - output), e.tail(other - output))
                e.store(value, e.at(of["packed"], place(group, output)), row)
                return []

            e.loop(of["vectors"], [], each_vector)
            return []

        e.loop(of["v_count"], [], each_v)
        return []

    def squares(group: Value, vector: Value, u: Value) -> Sequence[Value]:
        """All v of a vector of outputs, and one u."""
        output = vector * rows
        w = e.at(of["w"], group * of["w_group"] + output * of["w_output"], shape.stored)
        to = e.at(of["packed"], place(group, output) if rows > 1 else (group * of["vectors"] + vector) * size)

        def each_vector(v: Value, _: list[Value]) -> Sequence[Value]:
            first = v * lanes
            left = of["v_count"] - first
            loaded = []
            near = shape.pairs == "near"
            numbers = of["v_numbers"] - first * 2 if near else left
            for r in range(rows):
                here = numbers if rows == 1 else e.select(output + r < of["outputs"], numbers, e.number(0))
                other = e.tail(e.select(e.compare("eq", u, of["alone"]), e.number(0), here))
                mask = e.tail_of_pairs(here) if near else e.tail(here)
                loaded.append(read(w, of["w_output"] * r + u * of["w_u"], first, mask, other))
            if rows > 1:
                # Columns that do not exist are written over the last one, which is then written itself.
                for column, value in reversed(list(enumerate(e.transpose(loaded)))):
                    row = u * of["r_u"] + (first + e.least(left - 1, column)) * of["r_v"]
                    e.store(value, to, row * of["width"])
            else:
                e.store(loaded[0], to, u * of["r_u"] + first, e.tail(left))
            return []

        e.loop((of["v_count"] + (lanes - 1)) // lanes, [], each_vector)
        return []

    def task(i: Value, _: list[Value]) -> Sequence[Value]:
        rest, piece = (e.begin + i) // of["splits"], (e.begin + i) % of["splits"]
        group, run = rest // of["runs"], rest % of["runs"]
        begin, end = (count * of["u_count"] // of["splits"] for count in (piece, piece + 1))
        first, behind = (count * of["vectors"] // of["runs"] for count in (run, run + 1))

        def each_u(i: Value, _: list[Value]) -> Sequence[Value]:
            e.loop(behind - first, [], lambda n, _: squares(group, first + n, begin + i))
            return []

        e.loop(end - begin, [], each_u)
        return []

    def read(w: Value, start: Value, first: Value, mask: Value, other: Value) -> Value:
        if shape.pairs == "near":
            return e.load_pairs(w, start + first * 2, mask)
        value = e.load(w, start + first, mask, shape.stored)
        if shape.pairs is None:
            return value
        return e.pairs_of(value, e.load(w, start + first + of["w_far"], other, shape.stored))

    e.loop(e.end - e.begin, [], copied if shape.lay == "copied" else task)
    return e.module()
