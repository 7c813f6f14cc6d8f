"""What `narrow` and `depthwise` share: one kernel whose lanes are neighbours along the width, two shapes of its tile.

The problem is folded to three dimensions, (depth, rows, width): sizes of 1 go in front, and dimensions that the kernel
does not move along become one (a 1x1 convolution knows no lines, only one long row).  Borders are tables made once for
a problem, with the row of zeros that stands for every row outside; nothing is padded and nothing is copied, so there
is no workspace.  The kernel itself is in plainconv/cpu/rows.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.border import runs
from plainconv.cpu import compile as cpu
from plainconv.cpu import rows
from plainconv.cpu.launch import launch
from plainconv.menu.base import Bound, Cost, Tensors
from plainconv.problem import ConvProblem, Direction, Pair, Request

ELEMENTS = {torch.float32: "float", torch.float64: "double"}

# Rough speeds, measured on one core with AVX-512: they rank algorithms.
FMA_PER_SECOND = 3.0e9  # vectors multiplied and added, in a tile that is fed from registers
LOADS_PER_SECOND = 2.2e9  # vectors loaded, most of them across two cache lines
BYTES_PER_SECOND = 10e9  # memory, all threads
HIDDEN = 0.1  # of the shorter of work and memory, the part that the longer does not hide
TILE_S = 4e-9  # a tile's beginning and end
TASK_S = 8e-9  # a task's addresses
LAUNCH_S = 6e-6  # from Python to the kernel and back
THREADS_S = 4e-6  # waking torch's threads


class Tile(NamedTuple):
    """Output channels, rows and vectors whose sums a tile keeps in registers; whether rows share their loads."""

    outputs: int
    rows: int
    vectors: int
    shared_rows: bool


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
    if request.dtype not in ELEMENTS:
        return f"its kernels compute in float32 and float64, not {str(request.dtype).removeprefix('torch.')}"
    if request.channels_last and request.problem.dims > 1:
        return "its lanes are neighbours along the width, and channels_last has channels there"
    if request.problem.dims > 3:
        return "its loops are for at most three dimensions"
    return cpu.why_not()


# -- what a call needs -----------------------------------------------------------------------------------------------

Choose = Callable[[Request, cpu.Target], Tile]


def lanes_of(request: Request, target: cpu.Target) -> int:
    """Lanes of the narrowest register that holds a row of the output, else of the widest there is."""
    widest = target.bits // 8 // request.dtype.itemsize
    least = 16 // request.dtype.itemsize
    out = folded(request.problem)[2].out
    return min(widest, max(least, 1 << (out - 1).bit_length()))


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


def shape_of(request: Request, target: cpu.Target, tile: Tile) -> rows.Shape:
    """The kernel that serves a request with this tile."""
    problem = request.problem
    depth, high, width = folded(problem)
    bordered = problem.padding_mode != "zeros" and max(width.padding) > 0
    rest = problem.group_out % tile.outputs
    return rows.Shape(
        element=ELEMENTS[request.dtype],
        lanes=lanes_of(request, target),
        kernel=(depth.kernel, high.kernel, width.kernel),
        stride=(high.stride, width.stride),
        dilation=(high.dilation, width.dilation),
        sides="table" if bordered else "mask",
        one_channel=problem.group_in == 1,
        has_bias=request.has_bias,
        outputs=tile.outputs,
        rest=rest,
        rows=tile.rows,
        vectors=tile.vectors,
        shared_rows=tile.shared_rows,
    )


def cut(problem: ConvProblem, shape: rows.Shape) -> Cut:
    """Where along the width loads need no care, and how many tiles there are."""
    _, high, width = folded(problem)
    lanes, stride = shape.lanes, width.stride
    step = lanes * stride  # how far one vector moves in the input
    span = (width.kernel - 1) * width.dilation  # behind the first tap, a vector reads so far ...
    span += step if stride <= rows.PICKED_STRIDE else step - stride + 1  # ... and so much itself
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
    tables: Tensor  # keeps alive what the addresses below point to
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


def _tables(request: Request, shape: rows.Shape, blocks: int) -> tuple[Tensor, tuple[int, ...]]:
    """The tables of the three dimensions and the row of zeros, one behind the other, and where each begins."""
    problem = request.problem
    depth, high, width = folded(problem)
    mode = problem.padding_mode
    taps = [_shown(depth, mode, k * depth.dilation, depth.out, depth.stride) for k in range(depth.kernel)]
    by_depth = torch.stack(taps, 1).flatten()  # [depth, tap]
    last_row = (blocks * shape.rows - 1) * high.stride + (high.kernel - 1) * high.dilation
    rows_shown = _shown(high, mode, 0, last_row + 1)
    first = torch.arange(blocks).view(-1, 1, 1) * (shape.rows * high.stride)
    step = torch.arange(high.kernel // shape.inner).view(-1, 1) * high.dilation
    by_row = torch.full((blocks, len(step), shape.slots), -1)
    by_row[:, :, : len(shape.places)] = rows_shown[first + step + torch.tensor(shape.places)]
    by_row = by_row.flatten()  # [block, step, place]
    by_width = by_depth[:0]
    if shape.sides == "table":
        vectors = -(-width.out // shape.lanes)
        last = (vectors * shape.lanes - 1) * width.stride + (width.kernel - 1) * width.dilation
        by_width = _shown(width, mode, 0, last + 1)
    outside = bool((by_depth < 0).any() or (by_row < 0).any())
    zeros = torch.zeros(width.size if outside else 0, dtype=request.dtype)
    row_bytes = width.size * request.dtype.itemsize
    offsets = (
        torch.where(by_depth < 0, by_depth, by_depth * (high.size * row_bytes)),
        torch.where(by_row < 0, by_row, by_row * row_bytes),
        by_width,
    )
    parts = [*(offset.view(torch.uint8) for offset in offsets), zeros.view(torch.uint8)]
    tables = torch.cat(parts)
    begins, begin = [], tables.data_ptr()
    for part in parts:
        begins.append(begin)
        begin += len(part)
    return tables, tuple(begins)


@lru_cache(1024)
def prepare(request: Request, choose: Choose) -> Prepared:
    """The kernel and the tables of a request; a call only adds the addresses of its tensors."""
    problem, target = request.problem, cpu.Target.host()
    depth, high, width = folded(problem)
    shape = shape_of(request, target, choose(request, target))
    parts = cut(problem, shape)
    tables, addresses = _tables(request, shape, parts.blocks)
    sizes = {
        "groups": problem.groups,
        "group_in": problem.group_in,
        "group_out": problem.group_out,
        "in_channel": math.prod(problem.spatial),
        "in_width": width.size,
        "lo": width.padding[0],
        "out_depth": depth.out,
        "out_rows": high.out,
        "out_width": width.out,
        **parts._asdict(),
    }
    tasks = problem.batch * problem.groups * depth.out * parts.blocks
    kernel = cpu.compile(rows.text(shape), target)
    return Prepared(kernel, tables, addresses, tuple(sizes[name] for name in rows.SIZES), tasks)


def bind(request: Request, tensors: Tensors, choose: Choose) -> Bound:
    """The call that fills a result. The kernel reads rows that are contiguous: an input that is not is copied first."""
    ready = prepare(request, choose)
    whole = all(tensor is None or tensor.is_contiguous() for tensor in tensors[:3])
    kernel, behind, tasks, threads = ready.kernel, (*ready.addresses, *ready.sizes), ready.tasks, request.threads

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, w, bias, _ = tensors
        if not whole:
            x, w, bias = x.contiguous(), w.contiguous(), None if bias is None else bias.contiguous()
        pointers = (x.data_ptr(), w.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr())
        launch(kernel, (*pointers, *behind), tasks, threads)

    call.keeps = ready  # type: ignore[attr-defined]  # the tables that `behind` points to
    return call


# -- estimates -------------------------------------------------------------------------------------------------------


def cost(request: Request, choose: Choose) -> Cost:
    """Work of the tiles as they are, idle lanes and rows too, and memory; the longer hides most of the other."""
    problem, target = request.problem, cpu.Target.host()
    tile = choose(request, target)
    shape = shape_of(request, target, tile)
    parts = cut(problem, shape)
    tasks = problem.batch * problem.groups * folded(problem)[0].out * parts.blocks
    tiles = tasks * (parts.inside * shape.vectors + parts.single) * -(-problem.group_out // tile.outputs)
    steps = problem.group_in * shape.steps * shape.kernel[2]  # for each tile, of kx
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
    return Cost(sums * shape.lanes * problem.group_in * problem.taps, moved, 0, seconds)
