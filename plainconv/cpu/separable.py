"""Two kernels, one after the other, a band of rows at a time: what the first makes is read while it is in the cache.

The kernel of rows.py is used twice, on planes of one channel: along the width (`across`), one row a task, from the
input into a strip of rows, and along the rows (`down`), from the strip into the result.  A task here is a band of the
result's rows, as high as the strip allows:

    move    the rows of the last band that this one reads too go to the strip's beginning
    across  the rows that are missing
    down    the band

All strips begin with the first row that their band reads; so the address that `across` is given for its row 0 may lie
before the strip, and is not touched.  Offsets and strides are bytes here, and the text is the same for every problem.
"""

from __future__ import annotations

from collections.abc import Sequence

from plainconv.cpu.emit import Emit, Value
from plainconv.cpu.rows import POINTERS as ROWS_POINTERS
from plainconv.cpu.rows import SIZES as ROWS_SIZES

POINTERS = (
    "across",  # the kernels, and their arguments: what of them a task does not set is settled
    "down",
    "across_settled",
    "down_settled",
    "x",
    "w_across",  # [output channels, taps]
    "w_down",
    "bias",
    "residual",
    "y",
    "strips",  # one for each share
)
SIZES = (
    "size",  # of an element
    "shares",  # how many threads the tasks are dealt to
    "strip",
    "tasks",
    "bands",  # of a plane
    "depth",  # planes of a channel
    "out_channels",
    "multiplier",  # output channels of an input channel
    "x_image",
    "x_channel",
    "x_depth",
    "y_channel",
    "y_depth",
    "across_taps",  # of an output channel
    "down_taps",
    "pitch",  # from a row of the strip to the next
    "band",  # blocks of a band, of `block` rows of the result
    "block",
    "blocks",
    "out_rows",
    "stride",
    "reach",  # rows that are read for the first row of the result, after the first of them
)


def text() -> str:
    """The kernel: POINTERS and SIZES are its arguments, tasks are shares of image, channel, depth, band."""
    e = Emit(1)
    given = e.arguments(*("ptr",) * len(POINTERS), *("i64",) * len(SIZES))
    of = dict(zip((*POINTERS, *SIZES), given, strict=True))
    across, down = (_Passed(e, of[f"{name}_settled"]) for name in ("across", "down"))

    def share(i: Value, _: list[Value]) -> Sequence[Value]:
        number = e.begin + i
        first, last = (n * of["tasks"] // of["shares"] for n in (number, number + 1))
        strip = e.at(of["strips"], number * of["strip"], "i8")

        def task(_: Value, state: list[Value]) -> Sequence[Value]:
            plane, band, start, made = state  # rows start to made lie in the strip
            channel_plane = plane // of["depth"]
            d, o, image = plane % of["depth"], channel_plane % of["out_channels"], channel_plane // of["out_channels"]
            block = band * of["band"]
            end = e.least(block + of["band"], of["blocks"])
            # The last block may overlap the one before.
            top = e.least(block * of["block"], of["out_rows"] - of["block"]) * of["stride"]
            bottom = (e.least(end * of["block"], of["out_rows"]) - 1) * of["stride"] + of["reach"] + 1
            kept = e.most(made - top, 0)
            e.move(strip, e.at(strip, (top - start) * of["pitch"], "i8"), kept * of["pitch"])
            virtual = e.at(strip, 0 - top * of["pitch"], "i8")  # where row 0 would be
            x = image * of["x_image"] + o // of["multiplier"] * of["x_channel"] + d * of["x_depth"]
            across.set("x", e.at(of["x"], x, "i8"))
            across.set("w", e.at(of["w_across"], o * of["across_taps"] * of["size"], "i8"))
            across.set("y", virtual)
            e.enter(of["across"], across.array, e.most(made, top), bottom)
            y = channel_plane * of["y_channel"] + d * of["y_depth"]
            down.set("x", virtual)
            down.set("w", e.at(of["w_down"], o * of["down_taps"] * of["size"], "i8"))
            down.set("bias", e.at(of["bias"], o * of["size"], "i8"))
            down.set("residual", e.at(of["residual"], y, "i8"))
            down.set("y", e.at(of["y"], y, "i8"))
            e.enter(of["down"], down.array, block, end)
            over = e.compare("sge", band + 1, of["bands"])
            following = e.select(over, plane + 1, plane), e.select(over, e.number(0), band + 1)
            return [*following, top, e.select(over, e.number(0), bottom)]

        begin = [first // of["bands"], first % of["bands"], e.number(0), e.number(0)]
        e.loop(last - first, begin, task)
        return []

    e.loop(e.end - e.begin, [], share)
    return e.module()


class _Passed:
    """Arguments of a kernel of rows.py, on the stack."""

    def __init__(self, e: Emit, settled: Value) -> None:
        self.e, self.array = e, e.stack("i64", len(ROWS_POINTERS) + len(ROWS_SIZES))

        def copy(i: Value, _: list[Value]) -> Sequence[Value]:
            e.put(e.scalar(settled, i, "i64"), self.array, i)
            return []

        e.loop(len(ROWS_POINTERS) + len(ROWS_SIZES), [], copy)

    def set(self, name: str, pointer: Value) -> None:
        self.e.put(self.e.address(pointer), self.array, ROWS_POINTERS.index(name))
