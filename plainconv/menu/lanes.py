"""What `narrow` and `depthwise` share: one kernel whose lanes are neighbours along the width, two shapes of its tile.

The problem is folded to three dimensions, (depth, rows, width): sizes of 1 go in front, and dimensions that the kernel
does not move along become one (a 1x1 convolution knows no lines, only one long row).  Borders are tables made once for
a problem, with the row of zeros that stands for every row outside; nothing is padded and nothing is copied, so there
is no workspace.  The kernel itself is in plainconv/cpu/rows.py.
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

from plainconv.border import runs
from plainconv.cpu import compile as cpu
from plainconv.cpu import rows
from plainconv.cpu.emit import natives
from plainconv.cpu.launch import launch
from plainconv.menu.base import Bound, Buffer, Cost, Tensors, carve, compute_dtype, workspace_bytes
from plainconv.problem import ConvProblem, Direction, Pair, Request

STORED = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat", torch.float16: "half"}

# Rough speeds, measured on one core with AVX-512: they rank algorithms.
FMA_PER_SECOND = 3.0e9  # vectors multiplied and added, in a tile that is fed from registers
LOADS_PER_SECOND = 2.2e9  # vectors loaded, most of them across two cache lines
BYTES_PER_SECOND = 10e9  # memory, all threads
HIDDEN = 0.1  # of the shorter of work and memory, the part that the longer does not hide
TILE_S = 4e-9  # a tile's beginning and end
TASK_S = 8e-9  # a task's addresses
LAUNCH_S = 6e-6  # from Python to the kernel and back
THREADS_S = 4e-6  # waking torch's threads


# The tile is chosen by these, in cycles of a core in which a vector is multiplied and added in one.
ROWS = 14  # of a tile, at most
HIGH = (14, 7, 4, 2, 1)  # and of a high picture: the maps of most networks are 7 * 2^n high, and others leave few idle
INNER = 9  # taps of the rows that are unrolled, at most; of a longer kernel, as many in each turn
LOAD = 1.6  # a vector across two cache lines
HIDDEN_LOADS = 0.3  # of the shorter of loads and products, the part that the longer does not hide
BROADCAST = 1.3  # a weight
PLACE = 1.0  # the address of an input row
TASK = 40.0


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


class Side(NamedTuple):
    """One dimension of a folded problem."""

    size: int
    kernel: int
    stride: int
    padding: Pair
    dilation: int
    out: int

    @property
    def plain(self) -> bool:
        """Whether the kernel does not move along it."""
        return self.kernel == 1 and self.stride == 1 and self.padding == (0, 0)


@lru_cache(4096)
def folded(problem: ConvProblem, merge: bool = True) -> tuple[Side, Side, Side]:
    """Depth, rows and width of a problem of at most three dimensions; merge: plain neighbours become one dimension."""
    parts = (problem.spatial, problem.kernel, problem.stride, problem.padding, problem.dilation, problem.out)
    sides: list[Side] = []
    for part in zip(*parts, strict=True):
        side = Side(*part)
        if merge and sides and sides[-1].plain and side.plain:
            size = sides.pop().size * side.size
            side = side._replace(size=size, out=size)
        sides.append(side)
    one = Side(1, 1, 1, (0, 0), 1, 1)
    depth, high, width = (one,) * (3 - len(sides)) + tuple(sides)
    return depth, high, width


def why_not(request: Request) -> str | None:
    """The sentence for what no kernel of this kind does."""
    if request.direction is not Direction.FORWARD:
        return f"its kernels make the output; {request.direction.value} is not written yet"
    if request.device != "cpu":
        return "its kernels are machine code of the CPU, and the tensors are on another device"
    if request.dtype not in STORED:
        return f"its kernels compute in floating point, not {str(request.dtype).removeprefix('torch.')}"
    if request.channels_last and request.problem.dims > 1:
        return "its lanes are neighbours along the width, and channels_last has channels there"
    if request.problem.dims > 3:
        return "its loops are for at most three dimensions"
    return cpu.why_not()


# -- what a call needs -----------------------------------------------------------------------------------------------

Choose = Callable[[Request, cpu.Target], Tile]


def lanes_of(request: Request, target: cpu.Target) -> int:
    """Lanes of the narrowest register that holds a row of the output, else of the widest there is."""
    size = compute_dtype(request.dtype).itemsize
    widest, least = target.bits // 8 // size, 16 // size
    out = folded(request.problem)[2].out
    return min(widest, max(least, 1 << (out - 1).bit_length()))


def best_tile(request: Request, target: cpu.Target, most_outputs: int) -> Tile:
    """The tile that should be quickest, of those whose sums, weights and input fit the registers."""
    problem = request.problem
    high = folded(problem)[1]
    if high.out == 1:
        counts = [(1, vectors) for vectors in (8, 4, 2, 1)]
    else:
        low = high.out <= 2 * ROWS
        counts = [(count, 1) for count in (range(min(ROWS, high.out), 0, -1) if low else HIGH)]
    tiles = [
        Tile(outputs, count, vectors, inner)
        for outputs in {
            -(-problem.group_out // n) for n in range(1, problem.group_out + 1)
        }  # 7 are 4 and 3, not 6 and 1
        for count, vectors in counts
        for inner in {1, -(-high.kernel // -(-high.kernel // INNER))}
        if outputs <= most_outputs and _fits(Tile(outputs, count, vectors, inner), problem, target)
    ]
    return min(tiles, key=lambda tile: (_cycles(request, target, tile), tile))


def _fits(tile: Tile, problem: ConvProblem, target: cpu.Target) -> bool:
    """Whether sums and weights stay in registers; LLVM needs more room for what a stride picks, and around loops."""
    depth, _, width = folded(problem)
    picks = 1 < width.stride <= rows.PICKED_STRIDE
    crowded = picks + (depth.kernel > 1)
    sums, weights = tile.outputs * tile.rows * tile.vectors, tile.outputs * tile.inner
    if sums == 1:
        return True
    if picks and tile.outputs > 1 and (tile.outputs > 4 or tile.inner > 1):
        return False
    room = target.registers * 3 // 4 * 2**crowded // 3**crowded
    most_rows = -(-ROWS // 2 ** min(crowded, 1))
    return tile.rows <= most_rows and sums <= room and sums + weights + 3 + min(crowded, 1) <= target.registers


def _cycles(request: Request, target: cpu.Target, tile: Tile) -> float:
    """Of a column of one vector: rough, to compare tiles."""
    problem = request.problem
    _, high, width = folded(problem)
    picked = width.stride if width.stride <= rows.PICKED_STRIDE else 16
    places = min((tile.rows - 1) * high.stride + (tile.inner - 1) * high.dilation + 1, tile.rows * tile.inner)
    loaded = picked if picked > 1 else width.kernel  # of each place, for all taps along the width
    loads = places * tile.vectors * (loaded + (picked > 1)) * LOAD
    loads += tile.outputs * tile.inner * width.kernel * BROADCAST
    products = tile.outputs * tile.rows * tile.vectors * tile.inner * width.kernel
    products += places * tile.vectors * max(width.kernel - picked, 0) * (picked > 1)  # lanes that come from behind
    register = min(1.0, lanes_of(request, target) * compute_dtype(request.dtype).itemsize * 8 / 512)
    chunk = register * (max(products, loads) + HIDDEN_LOADS * min(products, loads)) + places * PLACE
    chunks = problem.group_in * math.prod(problem.kernel) / (high.kernel * width.kernel) * -(-high.kernel // tile.inner)
    times = -(-problem.group_out // tile.outputs) * -(-high.out // tile.rows) / tile.vectors
    return times * (chunks * chunk + TASK)


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


def shape_of(request: Request, target: cpu.Target, tile: Tile, layout: Layout = Layout.PLAIN) -> rows.Shape:
    """The kernel that serves a request with this tile."""
    problem = request.problem
    depth, high, width = folded(problem, layout is Layout.PLAIN)
    bordered = problem.padding_mode != "zeros" and max(width.padding) > 0
    rest = problem.group_out % tile.outputs
    return rows.Shape(
        element=STORED[compute_dtype(request.dtype)],
        stored=STORED[request.dtype],
        native=natives(target) & {"half"} if request.dtype is torch.float16 else frozenset(),
        lanes=lanes_of(request, target),
        kernel=(depth.kernel, high.kernel, width.kernel),
        thick=depth.kernel > 1 or depth.padding != (0, 0),
        stride=(high.stride, width.stride),
        dilation=(high.dilation, width.dilation),
        sides="table" if bordered else "mask",
        spread=layout is Layout.SPREAD,
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
    lanes, stride = shape.lanes, width.stride
    step = lanes * stride  # how far one vector moves in the input
    span = (width.kernel - 1) * width.dilation + step - stride + 1  # how far the last tap of a vector reaches ...
    span += 0 if shape.gathers else lanes - 1  # ... and to the end of the vector that is loaded there
    lo = width.padding[0]
    vectors = -(-width.out // lanes)
    head = min(max(-(-lo // step), 0), vectors)
    good = min(width.out // lanes, (width.size + lo - span) // step + 1)  # vectors before the edge on the right
    inside = max(good - head, 0) // shape.vectors
    return Cut(
        -(-high.out // shape.rows), head, inside, vectors - inside * shape.vectors, problem.group_out // shape.outputs
    )


@dataclass(frozen=True, eq=False)
class Prepared:
    """A compiled kernel with all of its arguments but the tensors'."""

    kernel: cpu.Kernel
    tables: tuple[Tensor, ...]  # keeps alive what the addresses below point to
    addresses: tuple[int, ...]
    sizes: tuple[int, ...]
    tasks: int


def _shown(side: Side, mode: str, start: int, count: int, step: int = 1) -> Tensor:
    """For places start, start + step, ... of the padded input, the element that each shows, or -1."""
    shown = torch.full((count,), -1, dtype=torch.int64)
    for run in runs(side.size, side.padding, mode, start, count, step):
        if run.source >= 0:
            shown[run.at : run.at + run.length] = run.source + run.step * torch.arange(run.length)
    return shown


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
    taps = [_shown(depth, mode, k * depth.dilation, depth.out, depth.stride) for k in range(depth.kernel)]
    by_depth = torch.stack(taps, 1)  # [depth, tap]
    if shape.thick:  # before them: the first tap that shows an element, and how many do
        shows = (by_depth >= 0).to(torch.int64)
        by_depth = torch.cat([shows.argmax(1, keepdim=True), shows.sum(1, keepdim=True), by_depth], 1)
    first = (torch.arange(parts.blocks) * shape.rows).clamp(max=high.out - shape.rows) * high.stride
    chunk = torch.arange(shape.chunks).view(-1, 1) * (shape.inner * high.dilation)
    wanted = first.view(-1, 1, 1) + chunk + torch.tensor(shape.places)
    by_row = _shown(high, mode, 0, int(wanted.max()) + 1)[wanted]  # [block, chunk, place]
    by_width = by_depth[:0]
    if shape.sides == "table":
        last = (-(-width.out // shape.lanes) * shape.lanes - 1) * width.stride + (width.kernel - 1) * width.dilation
        by_width = _shown(width, mode, 0, last + 1)
    zeros = torch.zeros(width.size if bool((by_row < 0).any()) else 0, dtype=request.dtype)
    return by_depth, by_row, by_width, _masks(width, shape, parts), zeros


@lru_cache(1024)
def prepare(request: Request, choose: Choose, layout: Layout) -> Prepared:
    """The kernel and the tables of a request; a call only adds its tensors' addresses and strides."""
    problem, target = request.problem, cpu.Target.host()
    sides = depth, high, width = folded(problem, layout is Layout.PLAIN)
    shape = shape_of(request, target, choose(request, target), layout)
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
    return Prepared(
        kernel=cpu.compile(rows.text(shape), target),
        tables=tables,
        addresses=tuple(table.data_ptr() for table in tables),
        sizes=tuple(sizes[name] for name in rows.SIZES if name in sizes),
        tasks=tasks,
    )


def bind(request: Request, tensors: Tensors, choose: Choose) -> Bound:
    """The call that fills a result, bias, residual and activation included; no input is copied, of any strides."""
    x, w, bias, _ = tensors
    if x.is_contiguous():
        layout, strides = Layout.PLAIN, _strides(request.problem)
    else:
        layout = Layout.ROWS if x.stride(-1) == 1 else Layout.SPREAD
        image, channel, *inner = x.stride()
        strides = (image, channel, *(0,) * (3 - len(inner)), *inner)
    ready = prepare(request, choose, layout)
    *outer, pixel = strides
    kernel, tasks, threads = ready.kernel, ready.tasks, request.threads
    behind = (*ready.addresses, *(stride * request.dtype.itemsize for stride in outer), pixel, *ready.sizes)
    regular = w.is_contiguous() and (bias is None or bias.is_contiguous())

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, w, bias, residual = tensors
        if not regular:
            w_room, bias_room = carve(workspace, _buffers(request))
            w, bias = w_room.copy_(w), None if bias is None else bias_room.copy_(bias)
        pointers = (
            x.data_ptr(),
            w.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
        )
        launch(kernel, (*pointers, *behind), tasks, threads)

    call.keeps = ready  # type: ignore[attr-defined]  # the tables that `behind` points to
    return call


def _strides(problem: ConvProblem) -> tuple[int, ...]:
    """Of an input that is contiguous, as the kernel folds it: image, channel, depth, row, pixel."""
    _, high, width = folded(problem)
    return math.prod(problem.input_shape[1:]), math.prod(problem.spatial), high.size * width.size, width.size, 1


def _buffers(request: Request) -> tuple[Buffer, Buffer]:
    """Room for a weight and a bias that are not contiguous."""
    problem = request.problem
    return Buffer(problem.weight_shape, request.dtype), Buffer((problem.out_channels,), request.dtype)


# -- estimates -------------------------------------------------------------------------------------------------------


def cost(request: Request, choose: Choose) -> Cost:
    """Work of the tiles as they are, idle lanes and rows too, and memory; the longer hides most of the other."""
    problem, target = request.problem, cpu.Target.host()
    tile = choose(request, target)
    shape = shape_of(request, target, tile)
    parts = cut(problem, shape)
    tasks = problem.batch * problem.groups * folded(problem)[0].out * parts.blocks
    tiles = tasks * (parts.inside * shape.vectors + parts.single) * -(-problem.group_out // tile.outputs)
    steps = problem.group_in * shape.kernel[0] * shape.chunks * shape.kernel[2]  # for each tile, of kx
    sums = tasks * (parts.inside * shape.vectors + parts.single) * shape.rows * problem.group_out
    products = sums * problem.group_in * problem.taps
    picked = shape.stride[1] if shape.stride[1] <= rows.PICKED_STRIDE else 2 * shape.lanes
    loads = tiles * steps * len(shape.places) * picked
    registers = max(1.0, shape.lanes * request.dtype.itemsize * 8 / target.bits)
    work = registers * max(products / FMA_PER_SECOND, (loads + products / 4) / LOADS_PER_SECOND)
    work += tiles * TILE_S + tasks * TASK_S
    threads = min(max(request.threads, 1), max(tasks, 1))
    size = request.dtype.itemsize
    moved = size * sum(math.prod(problem.shape_of(role)) for role in ("x", "w", "y"))
    work, memory = work / threads, moved / BYTES_PER_SECOND
    seconds = max(work, memory) + HIDDEN * min(work, memory) + LAUNCH_S + (THREADS_S if threads > 1 else 0.0)
    return Cost(
        sums * shape.lanes * problem.group_in * problem.taps, moved, workspace_bytes(_buffers(request)), seconds
    )
