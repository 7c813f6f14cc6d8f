"""How `depthwise` serves channels_last: the kernel of plainconv/cpu/channels.py, its tiles, its tables, its cost.

Nothing is padded and no input is copied; the weight, packed by each thread for itself, is the workspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from plainconv.cpu import channels
from plainconv.cpu import compile as cpu
from plainconv.cpu.emit import natives
from plainconv.cpu.launch import launch
from plainconv.menu.base import Bound, Cost, Tensors
from plainconv.menu.lanes import Side, _shown, folded
from plainconv.problem import ConvProblem, Direction, Request
from plainconv.remember import on_forget, weigh

STORED = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat", torch.float16: "half"}
PIXELS = 7  # of a tile: the maps of most networks are 7 * 2^n wide
ROWS = 2  # and as many rows, where that many products are not too many
UNROLLED = 400  # products in a row, at most, where taps along the rows are unrolled
TASKS = 4  # for each thread, at least, so that shares come out even
SPAN = 128  # tiles along the width that a task has, at most

# Rough speeds, measured on one core with AVX-512: they rank algorithms.
FMA_PER_SECOND = 3.0e9  # vectors multiplied and added
LOADS_PER_SECOND = 3.0e9
BYTES_PER_SECOND = 10e9  # memory, all threads
CACHED_PER_SECOND = 30e9  # where input and output stay in a cache
CACHED = 16 << 20
HIDDEN = 0.1  # of the shorter of work and memory, the part that the longer does not hide
STEP_S = 2e-9  # an input row of a tile
TILE_S = 4e-9
STRIP_S = 15e-9
PACK_S = 0.4e-9  # a number of the weight
LAUNCH_S = 6e-6
THREADS_S = 4e-6


def why_not(request: Request) -> str | None:
    """The sentence for what the kernel does not do."""
    problem = request.problem
    if request.direction is not Direction.FORWARD:
        return f"its kernels make the output; {request.direction.value} is not written yet"
    if request.device != "cpu":
        return "its kernels are machine code of the CPU, and the tensors are on another device"
    if request.dtype not in STORED:
        return f"its kernels compute in floating point, not {str(request.dtype).removeprefix('torch.')}"
    if problem.group_out != 1:
        return f"in channels_last it is for one output channel a group, and here are {problem.group_out}"
    if problem.dims > 3:
        return "its loops are for at most three dimensions"
    return cpu.why_not()


# -- what a call needs -----------------------------------------------------------------------------------------------


@lru_cache(4096)
def shape_of(request: Request, target: cpu.Target, regular: bool = True) -> channels.Shape:
    """The kernel that serves a request; regular: whether nothing lies between the pixels of the input."""
    problem = request.problem
    depth, high, width = folded(problem, regular)
    stored = STORED[request.dtype]
    element = "double" if stored == "double" else "float"
    size = 8 if element == "double" else 4
    lanes = min(target.bits // 8 // size, max(16 // size, 1 << (problem.in_channels - 1).bit_length()))
    pixels = next(pixels for pixels in (PIXELS, 4, 2, 1) if pixels <= width.out)
    spare = target.registers - (2 if target.fma else 3)
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
        mask=problem.in_channels < lanes,
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

    kernel: cpu.Kernel
    tables: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    tasks: int


def _table(side: Side, mode: str) -> Tensor:
    """[out, kernel]: the element that a tap reads for each place of the output, or -1."""
    taps = [_shown(side, mode, k * side.dilation, side.out, side.stride) for k in range(side.kernel)]
    return torch.stack(taps, 1)


def _tables(request: Request, shape: channels.Shape, sides: tuple[Side, Side, Side]) -> tuple[Tensor, ...]:
    (depth, high, width), mode = sides, request.problem.padding_mode
    strips = -(-high.out // shape.rows)
    first = (torch.arange(strips) * shape.rows).clamp(max=high.out - shape.rows) * high.stride
    chunk = torch.arange(shape.chunks).view(-1, 1) * (shape.inner * high.dilation)
    wanted = first.view(-1, 1, 1) + chunk + torch.tensor(list(shape.meets))
    by_row = _shown(high, mode, 0, int(wanted.max()) + 1)[wanted]  # [strip, chunk, row]
    places = (width.out - 1) * width.stride + (width.kernel - 1) * width.dilation + 1
    zeros = torch.zeros(request.problem.in_channels + shape.lanes, dtype=request.dtype)
    return _table(depth, mode), by_row, _shown(width, mode, 0, places), zeros


def _cut(width: Side, shape: channels.Shape) -> tuple[int, int, int, int]:
    """Tiles of a row: at the left edge, inside, all of them, and the narrower ones that end it."""
    tiles, left = divmod(width.out, shape.pixels)
    step = shape.pixels * width.stride
    reads = (shape.pixels - 1) * width.stride + (width.kernel - 1) * width.dilation + 1  # places of a tile
    head = min(-(-max(width.padding[0], 0) // step), tiles)
    good = min((width.size + width.padding[0] - reads) // step + 1, tiles)  # tiles before the edge on the right
    return head, max(good - head, 0), tiles, -(-left // shape.ends) if left else 0


def _blocks(problem: ConvProblem, shape: channels.Shape) -> int:
    return -(-problem.in_channels // shape.lanes)


def _packed_bytes(request: Request, shape: channels.Shape) -> int:
    """Of the packed weight, in the type of the sums: each thread packs what it needs."""
    size = 8 if shape.element == "double" else 4
    return max(request.threads, 1) * _blocks(request.problem, shape) * shape.lanes * shape.all_taps * size


@lru_cache(1024)
def prepare(request: Request, regular: bool) -> Prepared:
    """The kernel and the tables of a request; a call only adds the addresses of its tensors and their strides."""
    problem, target = request.problem, cpu.Target.host()
    sides = depth, high, width = folded(problem, regular)
    shape = shape_of(request, target, regular)
    head, inside, tiles, ends = _cut(width, shape)
    strips, blocks, spans = -(-high.out // shape.rows), _blocks(problem, shape), -(-(tiles + ends) // SPAN)
    tasks = problem.batch * depth.out * strips * spans
    wanted = TASKS * request.threads if request.threads > 1 else 1
    groups = min(-(-wanted // tasks), blocks) if tasks else 1
    counts = (problem.in_channels, blocks, groups, tasks, max(request.threads, 1), spans, strips)
    ready = Prepared(
        kernel=cpu.compile(channels.text(shape), target),
        tables=_tables(request, shape, sides),
        sizes=(*counts, depth.out, high.out, width.out, width.padding[0], head, inside, tiles, ends),
        tasks=tasks * groups,
    )
    weigh(ready, sum(table.nbytes for table in ready.tables))
    return ready


on_forget(prepare.cache_clear)


def _strides(tensor: Tensor) -> tuple[int, int, int, int]:
    """Elements from an image, depth, row and pixel to the next."""
    image, _, *inner = tensor.stride()
    depth, row, pixel = (0,) * (3 - len(inner)) + tuple(inner)
    return image, depth, row, pixel


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a result, activation and residual included; an input whose channels lie apart is copied."""
    problem, x, threads = request.problem, tensors.first, request.threads
    apart = x.shape[1] > 1 and x.stride(1) != 1
    regular = apart or x.movedim(1, -1).is_contiguous()
    ready, c = prepare(request, regular), problem.in_channels
    _, high, width = folded(problem, regular)
    strides = _strides(x)
    if regular:
        strides = (math.prod(problem.input_shape[1:]), high.size * width.size * c, width.size * c, c)
    made = (math.prod(problem.output_shape[1:]), high.out * width.out * c, width.out * c, c)
    behind = (*(table.data_ptr() for table in ready.tables), *strides, *made, *ready.sizes)
    kernel, tasks = ready.kernel, ready.tasks

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, w, bias, residual = tensors
        if apart:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        w, bias = w.contiguous(), None if bias is None else bias.contiguous()
        ends = (0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr())
        pointers = (x.data_ptr(), w.data_ptr(), workspace.data_ptr(), *ends, out.data_ptr())
        launch(kernel, (*pointers, *behind), tasks, threads)

    call.keeps = ready  # type: ignore[attr-defined]  # the tables that `behind` points to
    return call


def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    """Fill `out`, which has the strides of channels_last, as the residual has."""
    bind(request, tensors)(tensors, out, workspace)


# -- estimates -------------------------------------------------------------------------------------------------------


def cost(request: Request) -> Cost:
    """Work of the tiles as they are, idle lanes too, and memory; the longer hides most of the other."""
    problem, target = request.problem, cpu.Target.host()
    depth, high, width = folded(problem)
    shape = shape_of(request, target)
    blocks = _blocks(problem, shape)
    _, _, tiles, ends = _cut(width, shape)
    strips = problem.batch * depth.out * -(-high.out // shape.rows)
    steps = strips * blocks * depth.kernel * shape.chunks
    sums = shape.rows * (tiles * shape.pixels + ends * shape.ends)  # of a strip
    products = steps * shape.inner * width.kernel * sums
    places = min(width.kernel + (shape.pixels - 1) * shape.stride[1], shape.pixels * width.kernel)
    loads = steps * (tiles + ends) * (len(shape.meets) * places + shape.inner * width.kernel)
    register = max(1.0, shape.lanes * (8 if shape.element == "double" else 4) * 8 / target.bits)
    work = register * max(products / FMA_PER_SECOND, loads / LOADS_PER_SECOND)
    work += (tiles + ends) * (steps * STEP_S + strips * blocks * TILE_S) + strips * STRIP_S
    threads = max(request.threads, 1)
    work = work / threads + problem.in_channels * shape.all_taps * PACK_S
    size = request.dtype.itemsize
    elements = sum(torch.Size(problem.shape_of(role)).numel() for role in ("x", "w", "y"))
    memory = size * elements / (BYTES_PER_SECOND if size * elements > CACHED else CACHED_PER_SECOND)
    seconds = max(work, memory) + HIDDEN * min(work, memory) + LAUNCH_S + (THREADS_S if threads > 1 else 0.0)
    return Cost(products * shape.lanes, size * elements, _packed_bytes(request, shape), seconds)
