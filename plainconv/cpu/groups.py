"""The kernel of `narrow` for channels_last: that of plainconv/cpu/channels.py, for groups of several channels.

    y[r, p, o .. o + lanes]  =  bias[o ..]  +  sum over c, i, k  of
        weight[c, i, k, o ..] * x[r * stride + i * dilation - lo, p * stride + k * dilation - lo, c of each o ..]

A vector of outputs is a part of a group, or holds several groups.  What a tile reads in a step lies far apart, and
often in the same few places of a cache: so it is copied first, zeros for the border, and then

    c           input channels of a group
      load weights
      each input row, each pixel: one channel, to all lanes, or to those of each group its own; it serves all the
      outputs that it lies under

While it is copied, what the next block reads is asked for, and of a large input what the next task reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

from plainconv.cpu.channels import Channels, Group, Shape
from plainconv.cpu.emit import Value


@lru_cache(512)
def text(shape: Shape) -> str:
    """The kernel of this shape: see `channels.text`."""
    return _Groups(shape).kernel()


class _Groups(Channels):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        # For each lane, how far behind the first group's its input channel is.
        self.sources = [lane // shape.made * shape.seen for lane in range(shape.lanes)]
        self.several = shape.made < shape.lanes
        self.pitch = (shape.seen * (shape.lanes // shape.made) + shape.lanes - 1) // shape.lanes if self.several else 1
        places = (shape.pixels - 1) * shape.stride[1] + (shape.taps - 1) * shape.dilation[1] + 1
        count = min(places, shape.pixels * shape.taps)
        # Reading goes on behind a group's channels; those lanes are not used.
        size = (len(shape.meets) * count * self.pitch + 1) * shape.lanes
        self.copied = self.e.stack(shape.element, size)

    def source(self, block: Value) -> Value:
        """The first input channel that a block sees."""
        of = self.given
        return self.channel(block) // of["group_out"] * of["group_in"]

    def inputs(self, group: Group) -> tuple[Value, Value, Value]:
        lanes, each = self.shape.lanes, self.given["group_in"]
        if not self.several:
            return self.source(group.first), each, (each + (lanes - 1)) // lanes * lanes
        count, pixel = self.sources[-1] + self.shape.seen, self.pitch * lanes
        return self.source(group.first), self.e.number(count), self.e.number(pixel)

    def tile(
        self, group: Group, block: Value, steps: Value, to: Value, first: Value, pixels: int, inside: Value | bool
    ) -> None:
        e, of, shape = self.e, self.given, self.shape
        at = to + first * of["y_pixel"] + self.channel(group.first + block)

        def pixel(p: Value, _: list[Value]) -> Sequence[Value]:
            for r in range(shape.rows):
                e.prefetch(e.at(of["y"], at + r * of["y_row"] + p * of["y_pixel"], shape.stored), "write")
            return []

        e.loop(pixels, [], pixel)
        super().tile(group, block, steps, to, first, pixels, inside)

    def ask(self, group: Group, block: Value, step: Value, place: Value, pixels: int, inside: Value | bool) -> None:
        """Nothing: it is done beside the copying."""

    def taps(
        self,
        group: Group,
        block: Value,
        acc: list[Value],
        step: Value,
        weights: Value,
        left: Value,
        pixels: int,
        count: int,
        inside: Value | bool,
    ) -> list[Value]:
        e, of, shape = self.e, self.given, self.shape
        places = sorted({p * shape.stride[1] + k * shape.dilation[1] for p in range(pixels) for k in range(count)})
        source, each = self.source(group.first + block), shape.weight.all_taps * shape.lanes
        last = e.compare("sge", block + 1, group.count)
        follows = self.source(group.first + e.select(last, e.number(0), block + 1)) - source
        moved = e.select(last, e.number(pixels * shape.stride[1]), e.number(0))

        def part(i: Value, acc: list[Value]) -> Sequence[Value]:
            """Input channels that fill a vector, or those of all its groups."""
            behind = i * shape.lanes
            inputs = e.number(shape.seen) if self.several else e.least(of["group_in"] - behind, shape.lanes)
            seen = e.number(self.sources[-1] + shape.seen) if self.several else inputs
            copy = partial(self.copy, step, source + behind, seen, left, places, follows=follows, moved=moved)
            if isinstance(inside, Value):
                e.when(inside, lambda: copy(inside=True), lambda: copy(inside=False))
            else:
                copy(inside=inside)

            def one(c: Value, acc: list[Value]) -> Sequence[Value]:
                return self.products(acc, step, e.at(weights, (behind + c) * each), c, pixels, count, places)

            return e.loop(inputs, acc, one)

        return e.loop(1 if self.several else (of["group_in"] + (shape.lanes - 1)) // shape.lanes, acc, part)

    def copy(
        self,
        step: Value,
        source: Value,
        inputs: Value,
        left: Value,
        places: Sequence[int],
        follows: Value,
        moved: Value,
        inside: bool,
    ) -> None:
        """What these places of the input rows of a step hold, to [row, place, input channels].

        The next block reads `follows` channels and `moved` places behind.
        """
        e, of, shape = self.e, self.given, self.shape
        masks = [e.tail(inputs - v * shape.lanes) for v in range(self.pitch)]

        def row(i: Value, _: list[Value]) -> Sequence[Value]:
            start, pixel = (
                e.scalar(of_all, step * len(shape.meets) + i, type_)
                for of_all, type_ in ((self.starts, "ptr"), (self.pixels, "i64"))
            )

            def copy() -> None:
                begin, next_ = e.at(start, source, shape.stored), follows + moved * pixel
                later = e.select(of["fresh"] > 0, of["ahead"], next_)
                for number, place in enumerate(places):
                    if inside:
                        at = e.at(begin, (left - of["lo"] + place) * pixel, shape.stored)
                    else:
                        shown = e.scalar(of["width_table"], left + place, "i64")
                        at = e.select(shown >= 0, e.at(begin, shown * pixel, shape.stored), of["zeros"])
                    for v, mask in enumerate(masks):
                        for far in (next_, later):
                            e.prefetch(e.at(at, far + v * shape.lanes, shape.stored))
                        to = (i * len(places) + number) * (self.pitch * shape.lanes) + v * shape.lanes
                        e.store(e.load(at, v * shape.lanes, mask, shape.stored), self.copied, to)

            e.when(e.compare("ne", e.address(start), 0), copy)
            return []

        e.loop(len(shape.meets), [], row)

    def products(
        self,
        acc: list[Value],
        step: Value,
        weights: Value,
        c: Value,
        pixels: int,
        count: int,
        places: Sequence[int],
    ) -> list[Value]:
        """Add what one input channel of each group gives."""
        e, shape = self.e, self.shape
        under: dict[int, list[tuple[int, int]]] = {}
        for p in range(pixels):
            for k in range(count):
                under.setdefault(p * shape.stride[1] + k * shape.dilation[1], []).append((p, k))
        copied = e.at(self.copied, c)
        held: dict[tuple[int, int], Value] = {}

        def weight(i: int, k: int) -> Value:
            at = (i * shape.tap_steps[1] + k * shape.weight.steps[2]) * shape.lanes
            return held[i, k] if held else e.load(weights, at)

        if shape.holds:
            held = {(i, k): weight(i, k) for i in range(shape.inner) for k in range(count)}

        def row(number: int, meets: list[tuple[int, int]], sums: dict[tuple[int, int], Value]) -> None:
            w = {(i, k): weight(i, k) for _, i in meets for k in range(count)}
            for i, place in enumerate(places):
                x = self.input(e.at(copied, (number * len(places) + i) * (self.pitch * shape.lanes)))
                for r, tap in meets:
                    for p, k in under[place]:
                        sums[r, p] = e.fma(x, w[tap, k], sums[r, p])

        sums = {(r, p): acc[r * pixels + p] for r in range(shape.rows) for p in range(pixels)}
        for number, meets in enumerate(shape.meets.values()):
            real = e.compare("ne", e.scalar(self.starts, step * len(shape.meets) + number, "i64"), 0)
            rows = {r for r, _ in meets}
            e.only_if(real, sums, [(r, p) for r, p in sums if r in rows], partial(row, number, meets, sums))
        return list(sums.values())

    def input(self, at: Value) -> Value:
        """An input channel of each group, copied there for the first one: to all lanes of the group."""
        e, lanes = self.e, self.shape.lanes
        if not self.several:
            return e.broadcast(e.scalar(at))
        parts = [e.load(at, begin) for begin in range(0, self.sources[-1] + 1, lanes)]
        return e.pick(parts[0], parts[-1], self.sources)
