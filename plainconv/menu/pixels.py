"""How `depthwise` makes the gradient for the weight in channels_last: the kernel of plainconv/cpu/pixels.py.

Nothing is padded and nothing is copied.  Threads get chunks of the rows, with sums of their own.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from plainconv.cpu import compile as cpu
from plainconv.cpu import pixels, weights
from plainconv.cpu.emit import natives
from plainconv.menu import engine
from plainconv.menu.base import Bound, Cost, Tensors, moved_bytes
from plainconv.menu.engine import STORED, Side, folded, summed
from plainconv.menu.taps import Prepared, filling
from plainconv.problem import Request
from plainconv.remember import on_forget, weigh

PLACES = 4  # that are taken together
APART = 4 << 10  # bytes between the sums of two threads: what one core asks for ahead, the other does not write
SUMS = 16  # of a tile, at most: beside more, LLVM loads ahead until registers run out

# Cycles, set by hand on one core with AVX-512; see plainconv/menu/lanes.py.
CYCLES_PER_SECOND = 3.66e9
PRODUCT = 1.7  # with the pixel that it loads and the address of that
PLACE = 3.0
TILE = 30.0
ADD = 3.0  # a sum added to those in memory
BYTES_PER_SECOND = 13e9  # a thread, of memory
CACHED_BYTES = 16 << 20
HIDDEN = 0.25


def _lanes(request: Request, target: cpu.Target) -> int:
    _, size = summed(request)
    return min(target.bits // 8 // size, max(16 // size, 1 << (request.problem.in_channels - 1).bit_length()))


def _tile(request: Request, sides: tuple[Side, Side, Side], registers: int) -> tuple[int, int]:
    """The most taps of the rows and of the width that fit the registers; both divide the kernel."""
    _, high, width = sides
    room = min(registers - PLACES - 3 - request.has_bias, SUMS)
    wide = max(taps for taps in range(1, width.kernel + 1) if width.kernel % taps == 0 and taps <= room)
    return max(taps for taps in range(1, high.kernel + 1) if high.kernel % taps == 0 and taps * wide <= room), wide


def _counts(request: Request) -> tuple[int, int, int, int]:
    """Vectors of channels, rows of all planes, chunks of them, and sums from a chunk to the next."""
    problem, width = request.problem, _lanes(request, cpu.Target.host())
    depth, high, _ = folded(problem, False)
    vectors, rows = -(-problem.in_channels // width), problem.batch * depth.out * high.out
    chunks, chunk = max(1, min(request.threads, rows)), vectors * (problem.taps + request.has_bias) * width
    return vectors, rows, chunks, chunk + APART // summed(request)[1] * (chunks > 1)


@lru_cache(1024)
def prepare(request: Request, x_strides: tuple[int, ...], y_strides: tuple[int, ...]) -> Prepared:
    """The kernels, the tables and the sizes of a request whose tensors lie so in memory."""
    problem, target = request.problem, cpu.Target.host()
    sides = depth, high, width = folded(problem, False)
    vectors, rows, chunks, chunk = _counts(request)
    x_depth, x_row, x_col = (0,) * (3 - problem.dims) + x_strides[2:]
    y_depth, y_row, y_col = (0,) * (3 - problem.dims) + y_strides[2:]
    lanes_, (tall, wide) = _lanes(request, target), _tile(request, sides, target.registers)
    (element, _), stored = summed(request), STORED[request.dtype]
    native = natives(target) - {"pairs"}
    alone = problem.in_channels == 1  # then its stride means nothing
    shape = pixels.Shape(
        element=element,
        stored=stored,
        native=native,
        lanes=lanes_,
        kernel=(depth.kernel, high.kernel, width.kernel),
        stride=(high.stride, width.stride),
        dilation=(high.dilation, width.dilation),
        spread=(x_strides[1] != 1 and not alone, y_strides[1] != 1 and not alone),
        high=tall,
        wide=wide,
        places=PLACES,
        bias=request.has_bias,
    )
    head = min(max(-(-width.padding[0] // width.stride), 0), width.out)
    reach = (width.kernel - 1) * width.dilation + 1
    good = min((width.size + width.padding[0] - reach) // width.stride + 1, width.out)  # places before the right edge
    tables = _tables(request, sides, (x_depth, x_row, x_col), lanes_)
    sizes = {
        "channels": problem.in_channels,
        "vectors": vectors,
        "rows": rows,
        "chunks": chunks,
        "chunk": chunk,
        "out_depth": depth.out,
        "out_rows": high.out,
        "out_width": width.out,
        "x_image": x_strides[0],
        "x_channel": x_strides[1],
        "y_image": y_strides[0],
        "y_channel": y_strides[1],
        "y_depth": y_depth,
        "y_row": y_row,
        "y_col": y_col,
        "x_col": x_col,
        "lo": width.padding[0],
        "head": head,
        "inside": max(good - head, 0) // PLACES,
    }
    # To what adds the chunks it is a weight of one group and one input channel.
    total_sizes = {
        "chunks": chunks,
        "chunk": chunk,
        "unit": (problem.taps + request.has_bias) * lanes_,
        "channel_blocks": 1,
        "tiles": vectors,
        "group_in": 1,
        "group_out": problem.in_channels,
        "block_channels": 1,
        "w_group": 0,
        "w_output": problem.taps,
        "w_block": 0,
        "u_count": 1,
        "w_u": 0,
        "v_each": problem.taps,
    }
    ready = Prepared(
        cpu.compile(pixels.text(shape), target),
        torch.tensor([*(table.data_ptr() for table in tables), *(sizes[name] for name in pixels.SIZES)]),
        tables,
        chunks,
        cpu.compile(weights.total(weights.Shape(element, stored, native, lanes_, "", 1, "", 1, 1, shape.bias)), target),
        tuple(total_sizes[name] for name in weights.TOTAL_SIZES),
        vectors,
    )
    weigh(ready, sum(table.nbytes for table in tables))
    return ready


on_forget(prepare.cache_clear)


def _tables(
    request: Request, sides: tuple[Side, Side, Side], strides: tuple[int, int, int], lanes_: int
) -> tuple[Tensor, ...]:
    """Bytes from an image to a depth [out, tap], a padded row, a padded column, or -1; and the zeros of the border."""
    depth, high, width = sides
    mode, size = request.problem.padding_mode, request.dtype.itemsize
    by_tap = [engine.shown(depth, mode, k * depth.dilation, depth.out, depth.stride) for k in range(depth.kernel)]
    shown = [torch.stack(by_tap, 1)]
    for side in (high, width):
        shown.append(engine.shown(side, mode, 0, (side.out - 1) * side.stride + (side.kernel - 1) * side.dilation + 1))
    tables = [torch.where(s < 0, -1, s * (stride * size)) for s, stride in zip(shown, strides, strict=True)]
    return *tables, torch.zeros(lanes_, dtype=request.dtype)


def cost(request: Request) -> Cost:
    """Cycles of the kernel, or memory, whichever is longer, and the calls."""
    problem, target = request.problem, cpu.Target.host()
    sides = folded(problem, False)
    vectors, rows, chunks, chunk = _counts(request)
    tall, wide = _tile(request, sides, target.registers)
    _, size = summed(request)
    tiles = problem.taps // (tall * wide)
    tile = sides[2].out * (max(tall * wide, 4) * PRODUCT + PLACE) + TILE + ADD * tall * wide
    cycles = rows * vectors * tiles * tile / chunks
    moved = moved_bytes(request)
    memory, work = max(moved - CACHED_BYTES, 0) / BYTES_PER_SECOND / chunks, cycles / CYCLES_PER_SECOND
    seconds = max(work, memory) + HIDDEN * min(work, memory) + engine.launches_s(chunks)
    return Cost(problem.multiplies, moved, chunks * chunk * size, seconds)


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a weight's gradient, and a bias' beside it, for tensors that lie in memory as these."""
    if not request.problem.multiplies:
        return engine.zeros
    return filling(prepare(request, tensors.first.stride(), tensors.second.stride()), request.threads)
