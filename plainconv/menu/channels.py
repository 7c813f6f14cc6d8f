"""How `depthwise` and `narrow` serve channels_last: the kernel of plainconv/cpu/channels.py, its tiles, tables, cost.

Nothing is padded.  The weight is packed by each thread for itself, into the workspace, which also has room for the few
rows that a task reads: they are copied, channels side by side, if those of the input lie apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.cpu import channels, groups
from plainconv.cpu import compile as cpu
from plainconv.cpu.emit import natives
from plainconv.cpu.launch import launch_all
from plainconv.menu import engine
from plainconv.menu.base import ALIGNMENT, Bound, Cost, Tensors
from plainconv.menu.engine import STORED, Side, folded, padded
from plainconv.menu.lanes import gradients, planes_met
from plainconv.menu.parts import Part, parts
from plainconv.problem import ConvProblem, Direction, Request
from plainconv.remember import on_forget, weigh

PIXELS = 7  # of a tile: the maps of most networks are 7 * 2^n wide
ROWS = 2  # and as many rows, where that many products are not too many
UNROLLED = 400  # products in a row, at most, where taps along the rows are unrolled
PACKED = 128 << 10  # bytes of a packed weight that stay in a core's own cache, beside what it is multiplied with
TASKS = 2  # for each thread, at least, so that shares come out even
ASKED = 16 << 20  # bytes of an input so large that what the next task reads is asked for ahead
STREAMED = 24 << 20  # bytes of an input and a result together that do not stay in the caches
ASKED_GROUPS = 4 << 20  # the same where it is asked for beside a copy
SPAN = 128  # tiles along the width that a task has, at most
SPAN_COPIED = 32  # and where what it reads is copied

# Rough speeds, measured on one core with AVX-512: they choose tiles and rank algorithms.
CYCLES_PER_SECOND = 3.66e9  # in each, a vector is multiplied and added
LINE = 2.0  # cycles, of 64 bytes from the second cache: a tile finds little in the first
STEP = 10.0
BROADCAST = 1.4  # an input channel for all lanes of its group
DEALT = 2.2  # or for those of several groups at once
INPUT = 12.0  # an input channel of a group
FAR = 18.0  # and more, if the weight of a vector of outputs is larger than NEAR
NEAR = 32 << 10
COPY = 2.5  # a vector of input channels, copied
TILE = 20.0
STRIP = 60.0
HIGH = 28  # rows of a picture so high that an odd one does not count
BYTES_PER_SECOND = 16e9  # memory, all threads
CACHED_PER_SECOND = 60e9  # where input and output stay in a cache
CACHED = 16 << 20
HIDDEN = 0.1  # of the shorter of work and memory, the part that the longer does not hide
PACK_S = 0.4e-9  # a number of the weight
LAUNCH_S = 6e-6
THREADS_S = 4e-6


def why_not(request: Request) -> str | None:
    """The sentence for what the kernel does not do for `depthwise`."""
    made, word = request.problem.group_out, "output"
    if request.direction is Direction.GRAD_INPUT:
        made, word = request.problem.group_in, "input"
    if made != 1:
        return f"in channels_last it is for one {word} channel a group, and here are {made}"
    return engine.why_not(request) or gradients(request)


def why_not_groups(request: Request) -> str | None:
    """The sentence for what the kernel does not do for `narrow`."""
    if request.direction is Direction.GRAD_WEIGHT:
        return "it makes no gradient for a weight in channels_last"
    if sentence := engine.why_not(request) or gradients(request):
        return sentence
    if any(_vector(part.request, cpu.Target.host()) is None for part in _parts(request)):
        problem = request.problem
        sides = f"{problem.group_in} input and {problem.group_out} output channels"
        return f"in channels_last a vector has to be a part of a group or hold a few whole ones, and theirs are {sides}"
    return None


# -- what a call needs -----------------------------------------------------------------------------------------------


Sides = tuple[Side, Side, Side]


class Vector(NamedTuple):
    """Lanes of a vector of outputs; input and output channels of each group in it: see `channels.Shape`."""

    lanes: int
    seen: int
    made: int


def _vector(request: Request, target: cpu.Target) -> Vector | None:
    """The widest vector that is a part of a group, or holds several whole ones; None if there is none."""
    problem, size = request.problem, engine.summed(request)[1]
    lanes, least, seen, made = target.bits // 8 // size, 16 // size, problem.group_in, problem.group_out
    if seen == made == 1:  # neighbours alike, whole or not
        return Vector(min(lanes, max(least, 1 << (problem.in_channels - 1).bit_length())), 1, 1)
    while lanes >= least:
        if made and made % lanes == 0:
            return Vector(lanes, 0, lanes)
        held = lanes // max(made, 1)
        if made > 1 and lanes % made == 0 and held <= problem.groups and (held - 1) * seen < 2 * lanes:
            return Vector(lanes, seen, made)
        lanes //= 2
    return None


@lru_cache(4096)
def shape_of(part: Part, target: cpu.Target, regular: bool = True, spread: bool = False) -> channels.Shape:
    """The kernel that serves a part of a request.

    regular: whether nothing lies between the pixels of the input; spread: whether its channels lie apart.

    Outputs that are neighbours along the rows share what they load; where rows have a stride, or are odd in number,
    those along the depth may share more.
    """
    both = [_shape(part, target, regular, spread, turned) for turned in (False, True)]
    problem = part.request.problem
    return min(both, key=lambda shape: _cycles(part.request, shape, sides_of(problem, regular, shape.turned)))


def sides_of(problem: ConvProblem, regular: bool, turned: bool) -> Sides:
    """Depth, rows and width, as the kernel has them."""
    depth, high, width = folded(problem, regular)
    return (high, depth, width) if turned else (depth, high, width)


def _shape(part: Part, target: cpu.Target, regular: bool, spread: bool, turned: bool) -> channels.Shape:
    request, problem = part.request, part.request.problem
    depth, high, width = sides_of(problem, regular, turned)
    stored, (element, _) = STORED[request.dtype], engine.summed(request)
    vector = _vector(request, target)
    if vector is None:
        raise ValueError(f"{request} has no vector of whole groups")
    lanes, seen, made = vector
    pixels = next(pixels for pixels in (PIXELS, 4, 2, 1) if pixels <= width.out)
    spare = target.registers - (2 if target.fma else 4)  # products of their own lie beside the sums
    rows = min(ROWS, high.out) if target.registers > 16 else 1
    inner, products = high.kernel, rows * pixels * high.kernel * width.kernel
    if rows == 1 or rows * pixels + min(rows, inner) * width.kernel > spare or products > UNROLLED:
        rows, inner = 1, 1  # no rows to share what is loaded
    taps = min(width.kernel, max(spare - rows * pixels, 1))
    return channels.Shape(
        element=element,
        stored=stored,
        lanes=lanes,
        native=natives(target) if stored == "half" else frozenset(),
        kernel=(depth.kernel, high.kernel, width.kernel),
        stride=(high.stride, width.stride),
        dilation=(high.dilation, width.dilation),
        weight=part.weight,
        turned=turned,
        spread=spread,
        mask=problem.out_channels < lanes,
        seen=seen,
        made=made,
        rows=rows,
        pixels=pixels,
        ends=min(pixels - 1, 2),
        inner=inner,
        taps=taps,
        holds=rows * pixels + inner * taps <= spare,
        has_bias=request.has_bias,
        has_residual=request.has_residual,
        activation=request.activation,
    )


@dataclass(frozen=True, eq=False)
class Prepared:
    """A compiled kernel with all of its arguments but the tensors' addresses and strides."""

    shape: channels.Shape
    kernel: cpu.Kernel
    tables: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    tasks: int


def _table(side: Side, mode: str) -> Tensor:
    """[out, kernel]: the element that a tap reads for each place of the output, or -1."""
    taps = [engine.shown(side, mode, k * side.dilation, side.out, side.stride) for k in range(side.kernel)]
    return torch.stack(taps, 1)


def _tables(request: Request, shape: channels.Shape, sides: Sides) -> tuple[Tensor, ...]:
    (depth, high, width), mode = sides, request.problem.padding_mode
    strips = -(-high.out // shape.rows)
    first = (torch.arange(strips) * shape.rows).clamp(max=high.out - shape.rows) * high.stride
    chunk = torch.arange(shape.chunks).view(-1, 1) * (shape.inner * high.dilation)
    wanted = first.view(-1, 1, 1) + chunk + torch.tensor(list(shape.meets))
    by_row = engine.shown(high, mode, 0, int(wanted.max()) + 1)[wanted]  # [strip, chunk, row]
    places = (width.out - 1) * width.stride + (width.kernel - 1) * width.dilation + 1
    zeros = torch.zeros(request.problem.in_channels + shape.lanes, dtype=request.dtype)
    by_width = engine.shown(width, mode, 0, places)
    return _table(depth, mode), by_row, by_width, zeros, _spans(width, shape, by_width)


def _spans(width: Side, shape: channels.Shape, by_width: Tensor) -> Tensor:
    """[span, 2]: the first element of a row that the tiles of a span read, and how many from there on."""
    _, _, tiles, ends = _cut(width, shape)
    spans, total = _span_count(width, shape), tiles + ends
    found = []
    for span in range(spans if shape.spread else 0):
        first, behind = (number * total // spans for number in (span, span + 1))
        begin, end = _pixel(width, shape, first), min(_pixel(width, shape, behind - 1) + shape.pixels, width.out)
        seen = by_width[begin * width.stride : (end - 1) * width.stride + (width.kernel - 1) * width.dilation + 1]
        seen = seen[seen >= 0]
        found.append([int(seen.min()), int(seen.max() - seen.min()) + 1] if len(seen) else [0, 0])
    return torch.tensor(found, dtype=torch.int64)


def _pixel(width: Side, shape: channels.Shape, number: int) -> int:
    """The first of a tile."""
    tiles = width.out // shape.pixels
    if number < tiles:
        return number * shape.pixels
    return min(tiles * shape.pixels + (number - tiles) * shape.ends, width.out - shape.ends)


def _span_count(width: Side, shape: channels.Shape) -> int:
    _, _, tiles, ends = _cut(width, shape)
    return -(-(tiles + ends) // (SPAN_COPIED if shape.spread else SPAN))


def _cut(width: Side, shape: channels.Shape) -> tuple[int, int, int, int]:
    """Tiles of a row: at the left edge, inside, all of them, and the narrower ones that end it."""
    tiles, left = divmod(width.out, shape.pixels)
    step = shape.pixels * width.stride
    reads = (shape.pixels - 1) * width.stride + (width.kernel - 1) * width.dilation + 1  # places of a tile
    head = min(-(-max(width.padding[0], 0) // step), tiles)
    good = min((width.size + width.padding[0] - reads) // step + 1, tiles)  # tiles before the edge on the right
    return head, max(good - head, 0), tiles, -(-left // shape.ends) if left else 0


def _blocks(problem: ConvProblem, shape: channels.Shape) -> int:
    return -(-problem.out_channels // shape.lanes)


def _packed_bytes(request: Request, shape: channels.Shape) -> int:
    """Of the packed weight, in the type of the sums: each thread packs what it needs."""
    numbers = _blocks(request.problem, shape) * request.problem.group_in * shape.weight.all_taps * shape.lanes
    return max(request.threads, 1) * numbers * engine.summed(request)[1]


def _row_copied(problem: ConvProblem, shape: channels.Shape, width: Side) -> int:
    """Elements of a row that is copied, at most: whole vectors of pixels, and of the channels of each."""
    tiles = -(-sum(_cut(width, shape)[2:]) // _span_count(width, shape))
    places = (tiles * shape.pixels - 1) * width.stride + (width.kernel - 1) * width.dilation + 1
    places = min(places, width.size) if problem.padding_mode == "zeros" else width.size
    seen = shape.seen * (shape.lanes // shape.made) or problem.group_in
    # One pixel more: rows that lie 4 KiB apart would meet in few sets of the cache.
    return (padded(places, shape.lanes) + 1) * padded(seen, shape.lanes)


@lru_cache(4096)
def _room(request: Request) -> int:
    """Bytes of the rows that a task copies, of any part."""
    most = 0
    for part in _parts(request):
        shape = shape_of(part, cpu.Target.host(), False, True)
        _, _, width = sides_of(part.request.problem, False, shape.turned)
        most = max(most, shape.copied_rows * _row_copied(part.request.problem, shape, width))
    return padded(most * request.dtype.itemsize, ALIGNMENT)


@lru_cache(1024)
def prepare(part: Part, regular: bool, spread: bool) -> Prepared:
    """The kernel and the tables of a part; a call only adds the addresses of its tensors and their strides."""
    request, problem, target = part.request, part.request.problem, cpu.Target.host()
    shape = shape_of(part, target, regular, spread)
    sides = depth, high, width = sides_of(problem, regular, shape.turned)
    head, inside, tiles, ends = _cut(width, shape)
    strips, blocks, spans = -(-high.out // shape.rows), _blocks(problem, shape), _span_count(width, shape)
    tasks = problem.batch * depth.out * strips * spans
    wanted = TASKS * request.threads if request.threads > 1 else 1
    dealt = min(-(-wanted // tasks), blocks) if tasks else 1
    if shape.made > 1:  # no two groups read the same, so each may well have a weight that stays in the cache
        weight = _packed_bytes(request, shape) // max(request.threads, 1)
        dealt = max(dealt, min(-(-weight // PACKED), blocks))
    if spread:
        dealt = blocks
    channels_of = (problem.out_channels, problem.group_in, problem.group_out)
    counts = (*channels_of, blocks, dealt, tasks, spans, strips)
    ready = Prepared(
        shape=shape,
        kernel=cpu.compile((channels if shape.made == 1 else groups).text(shape), target),
        tables=_tables(request, shape, sides),
        sizes=(*counts, depth.out, high.out, width.out, width.padding[0], head, inside, tiles, ends),
        tasks=tasks * dealt,
    )
    weigh(ready, sum(table.nbytes for table in ready.tables))
    return ready


on_forget(prepare.cache_clear)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Elements from an image, depth, row, pixel and channel to the next."""
    image, channel, *inner = tensor.stride()
    depth, row, pixel = (0,) * (3 - len(inner)) + tuple(inner)
    return image, depth, row, pixel, channel


def _turned(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Depth and rows have changed places."""
    image, depth, row, *inner = strides
    return image, row, depth, *inner


def _ahead(request: Request, shape: channels.Shape, sides: Sides, strides: tuple[int, ...]) -> tuple[int, int]:
    """How many of the input rows of a task are asked for, and how far further on: what only the next task reads."""
    least = ASKED if shape.made == 1 else ASKED_GROUPS
    if math.prod(request.problem.input_shape) * request.dtype.itemsize < least or shape.mask or shape.spread:
        return 0, 0
    (depth, high, _), (_, plane, row, *_) = sides, strides
    if depth.out > 1:
        return depth.stride * shape.chunks * len(shape.meets), depth.stride * plane
    return shape.rows * high.stride, shape.rows * high.stride * row


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a result, activation and residual included."""
    x, threads, size = tensors.first, request.threads, request.dtype.itemsize
    lies = x.movedim(1, -1).is_contiguous()
    made = request.problem.shape_of(request.direction.makes)
    streams = (x.numel() + math.prod(made)) * size >= STREAMED and made[1] * size % channels.LINE == 0
    bound = [_bind(request, part, None if lies else x, made) for part in _parts(request)]
    # As many for every part, as no part waits for another: a share's scratch is then always the same thread's.
    shares = min(max(threads, 1), max((ready.tasks for ready, *_ in bound), default=0))

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, w, bias, residual = tensors
        w, bias = w.contiguous(), None if bias is None else bias.contiguous()
        given = (x.data_ptr(), w.data_ptr(), workspace.data_ptr(), 0 if bias is None else bias.data_ptr())
        added, made = 0 if residual is None else residual.data_ptr(), out.data_ptr()
        past = streams and made % channels.LINE == 0
        jobs = [  # no two write to the same place
            (ready.kernel, (*given, added + first * size, made + first * size, *behind, past, shares), shares, False)
            for ready, first, behind in bound
            if ready.tasks
        ]
        launch_all(jobs, threads)

    return call


def _parts(request: Request) -> tuple[Part, ...]:
    return parts(request) or ()


def _bind(request: Request, part: Part, x: Tensor | None, made: Sequence[int]) -> tuple[Prepared, int, tuple[int, ...]]:
    """The kernel of a part, its first element of a result of the shape `made`, and its arguments behind the tensors.

    x: the input, if it does not lie as channels_last does.
    """
    problem, front, c = part.request.problem, (0,) * (3 - len(part.step)), made[1]
    regular, spread = x is None and not part.apart, x is not None and x.shape[1] > 1 and x.stride(1) != 1
    ready = prepare(part, regular, spread)
    _, high, width = folded(problem, regular)
    seen = problem.in_channels
    strides: tuple[int, ...] = (
        math.prod(problem.input_shape[1:]),
        high.size * width.size * seen,
        width.size * seen,
        seen,
        1,
    )
    if x is not None:
        strides = _strides(x)
    result: tuple[int, ...] = (math.prod(made[1:]), high.out * width.out * c, width.out * c, c)
    first = 0
    if part.apart:
        rows, cols = ((1,) * (3 - len(made[2:])) + tuple(made[2:]))[1:]
        steps = (rows * cols * c, cols * c, c)
        first = sum(start * step for start, step in zip((*front, *part.start), steps, strict=True))
        each = (1,) * len(front) + part.step
        result = (result[0], each[0] * steps[0], each[1] * steps[1], each[2] * steps[2])
    if ready.shape.turned:
        strides, result = _turned(strides), _turned(result)
    sides = sides_of(problem, regular, ready.shape.turned)
    room = (_packed_bytes(request, ready.shape), _room(request), _row_copied(problem, ready.shape, sides[2]))
    behind = (*ready.sizes, *_ahead(part.request, ready.shape, sides, strides), *room)
    return ready, first, (*(table.data_ptr() for table in ready.tables), *strides, *result, *behind)


def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    """Fill `out`, which has the strides of channels_last, as the residual has."""
    bind(request, tensors)(tensors, out, workspace)


# -- estimates -------------------------------------------------------------------------------------------------------


def _cycles(request: Request, shape: channels.Shape, sides: Sides) -> float:
    """Of one thread, while it multiplies: idle lanes and rows too, but for those of a high picture."""
    depth, high, width = sides
    _, _, tiles, ends = _cut(width, shape)
    strips: float = -(-high.out // shape.rows)
    if high.out > HIGH:
        strips = high.out / shape.rows
    planes = request.problem.batch * depth.out * strips * _blocks(request.problem, shape)
    places = min(width.kernel + (shape.pixels - 1) * width.stride, shape.pixels * width.kernel)
    register = shape.lanes * (8 if shape.element == "double" else 4) / 64
    line = max(shape.lanes * request.dtype.itemsize / 64, register / 2)

    def tile(pixels: int, places: int) -> float:
        products, loads = shape.rows * pixels * shape.inner * width.kernel * register, len(shape.meets) * places
        if shape.made == 1:
            return max(products, loads * line * LINE) + STEP
        held = shape.lanes // shape.made
        each = loads * (BROADCAST if held == 1 else DEALT)
        copies = loads * -(-request.problem.group_in * held // shape.lanes) * COPY
        weight = request.problem.group_in * shape.weight.all_taps * register * 64
        far = FAR if weight > NEAR else 0.0
        return request.problem.group_in * (max(products, each) + INPUT + far) + copies + STEP

    met = planes_met(depth, request.problem.padding_mode) if shape.made > 1 else depth.kernel
    steps = met * shape.chunks
    each = tiles * (steps * tile(shape.pixels, places) + TILE)
    narrow = (shape.ends - 1) * width.stride + width.kernel
    return planes * (each + ends * (steps * tile(shape.ends, narrow) + TILE)) + planes * STRIP


def cost(request: Request) -> Cost:
    """Work of the tiles as they are, and memory; the longer hides most of the other."""
    problem, target, threads = request.problem, cpu.Target.host(), max(request.threads, 1)
    work, products, workspace = 0.0, 0, 0
    each = _parts(request)
    for part in each:
        shape = shape_of(part, target, not part.apart)
        depth, high, width = sides = sides_of(part.request.problem, not part.apart, shape.turned)
        work += _cycles(part.request, shape, sides) / CYCLES_PER_SECOND / threads
        work += problem.out_channels * problem.group_in * shape.weight.all_taps * PACK_S
        _, _, tiles, ends = _cut(width, shape)
        sums = problem.batch * depth.out * -(-high.out // shape.rows) * shape.rows
        sums *= (tiles * shape.pixels + ends * shape.ends) * _blocks(problem, shape) * shape.lanes
        products += sums * part.request.problem.group_in * part.request.problem.taps
        workspace = max(workspace, _packed_bytes(request, shape))
    workspace += _room(request) * threads
    size = request.dtype.itemsize
    elements = sum(math.prod(problem.shape_of(role)) for role in ("x", "w", "y"))
    memory = size * elements / (BYTES_PER_SECOND if size * elements > CACHED else CACHED_PER_SECOND)
    seconds = max(work, memory) + HIDDEN * min(work, memory)
    seconds += len(each) * (LAUNCH_S + (THREADS_S if threads > 1 else 0.0))
    return Cost(products, size * elements, workspace, seconds)
