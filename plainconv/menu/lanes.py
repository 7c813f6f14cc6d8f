"""What `narrow` and `depthwise` share: one kernel whose lanes are neighbours along the width, two shapes of its tile.

The problem is folded to three dimensions, (depth, rows, width): sizes of 1 go in front, and of an input that is
contiguous, dimensions that the kernel does not move along become one (a 1x1 convolution knows no lines, only one long
row).  Borders are tables made once for a problem, with the row of zeros that stands for every row outside; nothing is
padded and no input is copied, whatever its strides.  The kernel itself is in plainconv/cpu/rows.py.

Tiles are chosen, and calls estimated, by counting cycles: products, loads and weights of a chunk of taps, of which the
longer hides most of the other, and what tiles and tasks cost to begin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.cpu import compile as cpu
from plainconv.cpu import rows
from plainconv.cpu.emit import natives
from plainconv.cpu.launch import launch_all
from plainconv.menu import engine
from plainconv.menu.base import Bound, Buffer, Cost, Tensors, carve, compute_dtype, moved_bytes, workspace_bytes
from plainconv.menu.engine import STORED, Side, folded
from plainconv.menu.parts import Part, parts
from plainconv.problem import ConvProblem, Direction, Request
from plainconv.remember import on_forget, weigh

# Tiles are chosen, and calls estimated, by these.  Cycles are those in which a vector of the widest kind is multiplied
# and added; fitted to the layers of the suites on one core with AVX-512.
CYCLES_PER_SECOND = 3.66e9
LOAD = 1.3  # a vector, often across two cache lines
BROADCAST = 1.3  # a weight
SHUFFLE = 1.9  # lanes that cross 128 bits
CONVERT = 2.0  # half types, when they are loaded
GATHER = 1.6  # a lane that is loaded by itself
HIDDEN = 0.25  # of the shorter of loads and products, the part that the longer does not hide
STORE = 1.0
PLACE = 0.7  # the address of an input row, in a chunk of taps
CHUNK = 4.0
TILE = 8.0
FILL = 1.0  # the address of an input row, in a task
TASK = 20.0
CACHED_BYTES = 16 << 20  # so much comes and goes beside the work
BYTES_PER_SECOND = 13e9  # a thread, of memory
LAUNCH_S = 6e-6  # from Python to the kernel and back
THREADS_S = 2e-6  # waking torch's threads

ROWS = 14  # of a tile, at most
MOST_PARTS = 64  # of a gradient for the input: each has its own kernel
HIGH = (14, 7, 4, 2, 1)  # and of a high picture: the maps of most networks are 7 * 2^n high, and others leave few idle
SHORT = 32  # vectors of a row that is short
INNER = 9  # taps of the rows that are unrolled, at most; of a longer kernel, as many in each turn
SHARED = 10  # rows of a tile and unrolled taps, together, at most, for ARM


class Layout(Enum):
    """How an input lies in memory: contiguous; with contiguous rows, wherever they are; or with any strides."""

    PLAIN = "plain"
    ROWS = "rows"
    SPREAD = "spread"


class Tile(NamedTuple):
    """Output channels, rows and vectors whose sums a tile keeps in registers, and taps of the rows that share loads."""

    outputs: int
    rows: int
    vectors: int
    inner: int


def gradients(request: Request) -> str | None:
    """The sentence for gradients for the input that are not made of parts."""
    if request.direction is not Direction.GRAD_INPUT:
        return None
    problem = request.problem
    if math.prod(min(*sides) for sides in zip(problem.stride, problem.spatial, strict=True)) > MOST_PARTS:
        return f"it makes a convolution for each phase of the stride, and {problem.stride} has more than {MOST_PARTS}"
    if parts(request) is None:
        return "no output reaches some places of the gradient, and its kernels have nothing to sum there"
    return None


def why_not(request: Request) -> str | None:
    """The sentence for what no kernel of this kind does."""
    if request.channels_last:
        return "its lanes are neighbours along the width, and channels_last has channels there"
    return engine.why_not(request) or gradients(request)


# -- what a call needs -----------------------------------------------------------------------------------------------

Sides = tuple[Side, Side, Side]
Choose = Callable[[Request, cpu.Target, Sides], Tile]


def lanes_of(request: Request, target: cpu.Target, width: Side) -> int:
    """Lanes of the narrowest register that holds a row of the output, else of the widest there is."""
    size = compute_dtype(request.dtype).itemsize
    widest, least = target.bits // 8 // size, 16 // size
    return min(widest, max(least, 1 << (width.out - 1).bit_length()))


def best_tile(request: Request, target: cpu.Target, sides: Sides, most_outputs: int) -> Tile:
    """The tile that should be quickest, of those whose sums, weights and input fit the registers.

    Only a low picture, or a short row, is looked at more closely; all others have the same tile, so that a new size
    needs no new kernel.
    """
    problem = request.problem
    _, high, width = sides
    if high.out == 1:
        low = width.out <= SHORT * lanes_of(request, target, width)
        counts = [(1, vectors) for vectors in (8, 4, 2, 1)]
    else:
        low = high.out <= 2 * ROWS
        counts = [(count, 1) for count in (range(min(ROWS, high.out), 0, -1) if low else HIGH)]
    most = max(problem.group_out, 1)  # a tensor may have no channels
    divided = {-(-most // n) for n in range(1, most + 1)}  # 7 are 4 and 3, not 6 and 1
    tiles = [
        Tile(outputs, count, vectors, inner)
        for outputs in divided
        if outputs <= most_outputs
        for count, vectors in counts
        for inner in {1, -(-high.kernel // -(-high.kernel // INNER))}
        if _fits(Tile(outputs, count, vectors, inner), sides, target)
    ]
    if not low and high.out == 1:  # the most vectors that fit
        longest = max(tile.vectors for tile in tiles)
        tiles = [tile for tile in tiles if tile.vectors == longest]
    if not low:  # idle rows, and what does not fill a tile, do not count
        return min(tiles, key=lambda tile: (_column(request, target, sides, tile) / (tile.rows * tile.vectors), tile))
    return min(tiles, key=lambda tile: (_cycles(request, target, sides, tile), tile))


def _fits(tile: Tile, sides: Sides, target: cpu.Target) -> bool:
    """Whether sums and weights stay in registers; LLVM needs more room for what a stride picks, and around loops."""
    depth, _, width = sides
    picks, arm = 1 < width.stride <= rows.PICKED_STRIDE, target.machine == "aarch64"
    crowded = picks * (2 if target.bits == 128 else 1) + (depth.kernel > 1)
    sums, weights = tile.outputs * tile.rows * tile.vectors, tile.outputs * tile.inner
    if sums == 1:
        return True
    if picks and (tile.outputs > 4 or (tile.inner > 1 and (tile.outputs > 1 or target.bits < 512))):
        return False
    # For ARM, LLVM loads long before it multiplies, and what rows would share waits in too many registers.
    if arm and tile.inner > 1 and (tile.outputs > 1 or tile.rows + tile.inner > SHARED):
        return False
    room = target.registers * (5 if arm else 6) // 8 * 2**crowded // 3**crowded
    most_rows = -(-ROWS // 2 ** min(crowded, 1))
    held = sums + weights * (2 if arm else 1) + (3 if target.fma else 4) + min(crowded, 1)
    return tile.rows <= most_rows and sums <= room and held <= target.registers


def _cycles(request: Request, target: cpu.Target, sides: Sides, tile: Tile) -> float:
    """Of all rows of one depth of one group's output, with this tile."""
    _, high, width = sides
    lanes = lanes_of(request, target, width)
    _, inside, single = _columns(width, lanes, tile.vectors)
    places, chunks = _places(tile, high), -(-high.kernel // tile.inner)
    work = inside * _column(request, target, sides, tile)
    work += single * _column(request, target, sides, tile._replace(vectors=1))
    return -(-high.out // tile.rows) * (TASK + chunks * places * FILL + work)


def _places(tile: Tile, high: Side) -> int:
    """How many input rows a tile reads for each of its chunks."""
    return len({r * high.stride + k * high.dilation for r in range(tile.rows) for k in range(tile.inner)})


def _column(request: Request, target: cpu.Target, sides: Sides, tile: Tile) -> float:
    """Cycles of a column of vectors, for all outputs of a group."""
    problem = request.problem
    depth, high, width = sides
    lanes, places, sums = lanes_of(request, target, width), _places(tile, high), tile.outputs * tile.rows * tile.vectors
    vectors = places * tile.vectors
    products, weights = sums * tile.inner * width.kernel, tile.outputs * tile.inner * width.kernel
    loaded: float = width.kernel  # vectors of each place
    if width.stride > rows.PICKED_STRIDE:
        loaded = width.kernel * lanes * GATHER / LOAD
    elif width.stride > 1:
        loaded = width.stride + 1
        crossing = width.kernel - width.stride if width.stride % 2 == 0 else width.kernel * (width.stride - 1)
        products += int(vectors * max(crossing, 0) * SHUFFLE)
    convert = CONVERT if request.dtype.itemsize == 2 else 0.0
    loads = vectors * loaded * (LOAD + convert) + weights * BROADCAST
    register = max(lanes * compute_dtype(request.dtype).itemsize * 8, 128) / max(target.bits, 512)
    waits = 4 * tile.inner * width.kernel / 2  # a sum for itself, with the next tile's beside it
    chunk = max(register * (max(products, loads) + HIDDEN * min(products, loads)), waits) + places * PLACE + CHUNK
    chunks = problem.group_in * planes_met(depth, problem.padding_mode) * -(-high.kernel // tile.inner)
    tiles = -(-problem.group_out // tile.outputs)
    return tiles * (chunks * chunk + TILE + register * sums * STORE)


def planes_met(depth: Side, mode: str) -> float:
    """How many planes of taps an output meets, on average; those of the border are left out."""
    if mode != "zeros":
        return depth.kernel
    met = 0
    for k in range(depth.kernel):
        first = max(-(-(depth.padding[0] - k * depth.dilation) // depth.stride), 0)
        last = min((depth.size - 1 + depth.padding[0] - k * depth.dilation) // depth.stride, depth.out - 1)
        met += max(last - first + 1, 0)
    return met / max(depth.out, 1)


class Cut(NamedTuple):
    """How the output is cut: see SIZES of the kernel."""

    blocks: int
    head: int
    inside: int
    single: int
    tiles: int

    @property
    def columns(self) -> int:
        return self.inside + self.single


def shape_of(part: Part, target: cpu.Target, tile: Tile, layout: Layout = Layout.PLAIN) -> rows.Shape:
    """The kernel that serves a part of a request with this tile."""
    request = part.request
    problem = request.problem
    depth, high, width = folded(problem, layout is Layout.PLAIN)
    bordered = problem.padding_mode != "zeros" and max(width.padding) > 0
    rest = problem.group_out % tile.outputs
    return rows.Shape(
        element=STORED[compute_dtype(request.dtype)],
        stored=STORED[request.dtype],
        native=natives(target) & {"half"} if request.dtype is torch.float16 else frozenset(),
        lanes=lanes_of(request, target, width),
        weight=part.weight,
        apart=part.step[-1],
        kernel=(depth.kernel, high.kernel, width.kernel),
        thick=depth.kernel > 1 or depth.padding != (0, 0),
        stride=(high.stride, width.stride),
        dilation=(high.dilation, width.dilation),
        sides="table" if bordered else "mask",
        spread=layout is Layout.SPREAD,
        wide=width.out > 2 * rows.AHEAD * lanes_of(request, target, width),
        one_channel=problem.group_in == 1,
        has_bias=request.has_bias,
        has_residual=request.has_residual,
        activation=request.activation,
        outputs=tile.outputs,
        rest=rest,
        one_tile=tile.outputs == problem.group_out,
        rows=min(tile.rows, high.out),
        vectors=tile.vectors,
        inner=tile.inner,
        registers=target.registers,
    )


def cut(problem: ConvProblem, shape: rows.Shape, layout: Layout = Layout.PLAIN) -> Cut:
    """Where along the width loads need no care, and how many tiles there are."""
    _, high, width = folded(problem, layout is Layout.PLAIN)
    columns = _columns(width, shape.lanes, shape.vectors, shape.gathers)
    return Cut(-(-high.out // shape.rows), *columns, problem.group_out // shape.outputs)


def _columns(width: Side, lanes: int, count: int, gathers: bool = False) -> tuple[int, int, int]:
    """Vectors at the left edge, tiles of `count` vectors that need no care, and vectors that do or fill no tile."""
    stride = width.stride
    step = lanes * stride  # how far one vector moves in the input
    span = (width.kernel - 1) * width.dilation + step - stride + 1  # how far the last tap of a vector reaches ...
    span += 0 if gathers else lanes - 1  # ... and to the end of the vector that is loaded there
    lo = width.padding[0]
    vectors = -(-width.out // lanes)
    head = min(max(-(-lo // step), 0), vectors)
    good = min(width.out // lanes, (width.size + lo - span) // step + 1)  # vectors before the edge on the right
    inside = max(good - head, 0) // count
    return head, inside, vectors - inside * count


@dataclass(frozen=True, eq=False)
class Prepared:
    """A compiled kernel with all of its arguments but the tensors'."""

    kernel: cpu.Kernel
    tables: tuple[Tensor, ...]  # keeps alive what the addresses below point to
    addresses: tuple[int, ...]
    sizes: tuple[int, ...]
    tasks: int


def _masks(width: Side, shape: rows.Shape, parts: Cut) -> Tensor:
    """For each column at an edge, `pitch` masks: of what is stored, and of vectors from each place behind its first."""
    step = shape.lanes * width.stride
    column = torch.arange(parts.single)
    column = torch.where(column < parts.head, column, column + parts.inside * shape.vectors).view(-1, 1)
    place = column * step + torch.arange(shape.pitch - 1) - width.padding[0]
    stored = _bits_below(width.out - column * shape.lanes, shape.lanes)
    loaded = _bits_below(width.size - place, shape.lanes) & ~_bits_below(-place, shape.lanes)
    return torch.cat([stored, loaded], 1).to(torch.int16).flatten()


def _bits_below(count: Tensor, lanes: int) -> Tensor:
    """Integers whose first `count` bits are set, at most one a lane."""
    return (1 << count.clamp(0, lanes)) - 1


def _tables(request: Request, shape: rows.Shape, parts: Cut, sides: Sequence[Side]) -> tuple[Tensor, ...]:
    """Which element each place shows, for depth, rows and width; the masks; and the row of zeros, if one is needed."""
    (depth, high, width), mode = sides, request.problem.padding_mode
    taps = [engine.shown(depth, mode, k * depth.dilation, depth.out, depth.stride) for k in range(depth.kernel)]
    by_depth = torch.stack(taps, 1)  # [depth, tap]
    if shape.thick:  # before them: the first tap that shows an element, and how many do
        shows = (by_depth >= 0).to(torch.int64)
        by_depth = torch.cat([shows.argmax(1, keepdim=True), shows.sum(1, keepdim=True), by_depth], 1)
    first = (torch.arange(parts.blocks) * shape.rows).clamp(max=high.out - shape.rows) * high.stride
    chunk = torch.arange(shape.chunks).view(-1, 1) * (shape.inner * high.dilation)
    wanted = first.view(-1, 1, 1) + chunk + torch.tensor(shape.places)
    by_row = engine.shown(high, mode, 0, int(wanted.max()) + 1)[wanted]  # [block, chunk, place]
    by_width = by_depth[:0]
    if shape.sides == "table":
        last = (-(-width.out // shape.lanes) * shape.lanes - 1) * width.stride + (width.kernel - 1) * width.dilation
        by_width = engine.shown(width, mode, 0, last + 1)
    zeros = torch.zeros(width.size if bool((by_row < 0).any()) else 0, dtype=request.dtype)
    return by_depth, by_row, by_width, _masks(width, shape, parts), zeros


@lru_cache(1024)
def prepare(part: Part, choose: Choose, layout: Layout) -> Prepared:
    """The kernel and the tables of a part; a call only adds its tensors' addresses and strides."""
    request, problem, target = part.request, part.request.problem, cpu.Target.host()
    sides = depth, high, width = folded(problem, layout is Layout.PLAIN)
    shape = shape_of(part, target, choose(request, target, sides), layout)
    parts = cut(problem, shape, layout)
    sizes = {
        "groups": problem.groups,
        "group_in": problem.group_in,
        "group_out": problem.group_out,
        "lo": width.padding[0],
        "in_width": width.size,
        "out_depth": depth.out,
        "out_rows": high.out,
        "out_width": width.out,
        **parts._asdict(),
    }
    tables = _tables(request, shape, parts, sides)
    tasks = problem.batch * problem.groups * depth.out * parts.blocks
    ready = Prepared(
        kernel=cpu.compile(rows.text(shape), target),
        tables=tables,
        addresses=tuple(table.data_ptr() for table in tables),
        sizes=tuple(sizes[name] for name in rows.SIZES if name in sizes),
        tasks=tasks,
    )
    weigh(ready, sum(table.nbytes for table in tables))
    return ready


on_forget(prepare.cache_clear)


def bind(request: Request, tensors: Tensors, choose: Choose) -> Bound:
    """The call that fills a result, bias, residual and activation included; no input is copied, of any strides."""
    x, w, bias, _ = tensors
    bound = [_bind(part, request.problem.shape_of(request.direction.makes)[2:], x, choose) for part in _parts(request)]
    threads, size = request.threads, request.dtype.itemsize
    regular = w.is_contiguous() and (bias is None or bias.is_contiguous())

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, w, bias, residual = tensors
        if not regular:
            w_room, bias_room = carve(workspace, _buffers(request))
            w, bias = w_room.copy_(w), None if bias is None else bias_room.copy_(bias)
        given = (x.data_ptr(), w.data_ptr(), 0 if bias is None else bias.data_ptr())
        added, made = 0 if residual is None else residual.data_ptr(), out.data_ptr()
        jobs = [  # no two write to the same place
            (ready.kernel, (*given, added + first * size, made + first * size, *behind), ready.tasks, False)
            for ready, first, behind in bound
        ]
        launch_all(jobs, threads)

    return call


def _parts(request: Request) -> tuple[Part, ...]:
    return parts(request) or ()


def _bind(part: Part, made: Sequence[int], x: Tensor, choose: Choose) -> tuple[Prepared, int, tuple[int, ...]]:
    """A kernel, its first element of a result that is `made` so large, and its arguments behind the tensors."""
    problem = part.request.problem
    if x.is_contiguous() and not part.apart:
        layout, strides = Layout.PLAIN, _strides(problem)
    else:
        layout = Layout.ROWS if x.stride(-1) == 1 else Layout.SPREAD
        image, channel, *inner = x.stride()
        strides = (image, channel, *(0,) * (3 - len(inner)), *inner)
    ready = prepare(part, choose, layout)
    *outer, pixel = strides
    front = 3 - len(made)
    _, high, width = (1,) * front + tuple(made)
    start, step = (0,) * front + part.start, (1,) * front + part.step
    if layout is Layout.PLAIN:
        _, high, width = (side.out for side in folded(problem))
        start, step = (0, 0, 0), (1, 1, 1)
    first = (start[0] * high + start[1]) * width + start[2]
    steps = (math.prod(made), step[0] * high * width, step[1] * width)
    sizes = (*(stride * part.request.dtype.itemsize for stride in outer), pixel, *steps, *ready.sizes)
    return ready, first, (*ready.addresses, *sizes)


def _strides(problem: ConvProblem) -> tuple[int, ...]:
    """Of an input that is contiguous, as the kernel folds it: image, channel, depth, row, pixel."""
    _, high, width = folded(problem)
    return math.prod(problem.input_shape[1:]), math.prod(problem.spatial), high.size * width.size, width.size, 1


def _buffers(request: Request) -> tuple[Buffer, Buffer]:
    """Room for a weight and a bias that are not contiguous."""
    problem = request.problem
    channels = problem.shape_of(request.direction.makes)[1]
    return Buffer(problem.weight_shape, request.dtype), Buffer((channels,), request.dtype)


# -- estimates -------------------------------------------------------------------------------------------------------


def cost(request: Request, choose: Choose) -> Cost:
    """Work of the tiles as they are, idle lanes and rows too, and memory that is not hidden behind it."""
    each = [_part_cost(part, choose) for part in _parts(request)]
    threads = max(request.threads, 1)
    moved = moved_bytes(request)
    work, memory = sum(seconds for _, seconds in each), max(moved - CACHED_BYTES, 0) / BYTES_PER_SECOND / threads
    seconds = max(work, memory) + HIDDEN * min(work, memory)
    seconds += len(each) * (LAUNCH_S + (THREADS_S if threads > 1 else 0.0))
    return Cost(sum(multiplies for multiplies, _ in each), moved, workspace_bytes(_buffers(request)), seconds)


def _part_cost(part: Part, choose: Choose) -> tuple[int, float]:
    """Multiplies, idle lanes too, and seconds of one thread's share."""
    request, problem, target = part.request, part.request.problem, cpu.Target.host()
    depth, high, width = sides = folded(problem, not part.apart)
    tile = choose(request, target, sides)
    lanes, blocks = lanes_of(request, target, width), -(-high.out // tile.rows)
    _, inside, single = _columns(width, lanes, tile.vectors)
    planes = problem.batch * problem.groups * depth.out
    tasks = planes * blocks
    threads = min(max(request.threads, 1), max(tasks, 1))
    share = -(-tasks // threads) / max(tasks, 1)  # the largest
    work = planes * _cycles(request, target, sides, tile) * share / CYCLES_PER_SECOND
    sums = tasks * (inside * tile.vectors + single) * tile.rows * problem.group_out * lanes
    return sums * problem.group_in * problem.taps, work
