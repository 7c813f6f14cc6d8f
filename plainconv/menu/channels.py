"""How `depthwise` serves channels_last: the kernel of plainconv/cpu/channels.py, its tiles, its tables, its cost.

Nothing is padded and nothing is copied; the weight, packed, is the workspace.
"""

from __future__ import annotations

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
TASKS = 4  # for each thread, at least, so that shares come out even
PACKED_ALONE = 1 << 15  # numbers of a weight that one thread packs sooner than others wake up

# Rough speeds, measured on one core with AVX-512: they rank algorithms.
FMA_PER_SECOND = 3.0e9  # vectors multiplied and added
LOADS_PER_SECOND = 3.0e9
BYTES_PER_SECOND = 10e9  # memory, all threads
CACHED_PER_SECOND = 30e9  # where input and output stay in a cache
CACHED = 16 << 20
HIDDEN = 0.1  # of the shorter of work and memory, the part that the longer does not hide
STEP_S = 2e-9  # an input row of a tile
TILE_S = 4e-9
ROW_S = 15e-9
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
def shape_of(request: Request, target: cpu.Target) -> channels.Shape:
    """The kernel that serves a request."""
    problem = request.problem
    depth, high, width = folded(problem, False)
    stored = STORED[request.dtype]
    element = "double" if stored == "double" else "float"
    size = 8 if element == "double" else 4
    lanes = min(target.bits // 8 // size, max(16 // size, 1 << (problem.in_channels - 1).bit_length()))
    # Two vectors halve what is spent on addresses, but the weights of a wide kernel need registers too.
    vectors = 2 if target.registers > 16 and width.kernel <= 4 and problem.in_channels >= 2 * lanes else 1
    pixels = next(pixels for pixels in (PIXELS, 4, 2, 1) if pixels <= width.out)
    spare = target.registers - pixels * vectors - (2 if target.fma else 3)
    left = problem.in_channels % (vectors * lanes)
    return channels.Shape(
        element=element,
        stored=stored,
        lanes=lanes,
        native=natives(target) if stored == "half" else frozenset(),
        kernel=(depth.kernel, high.kernel, width.kernel),
        stride=width.stride,
        dilation=width.dilation,
        vectors=vectors,
        whole=problem.in_channels >= vectors * lanes,
        rest="" if left == 0 else "full" if left % lanes == 0 else "mask",
        pixels=pixels,
        ends=min(pixels - 1, 2),
        taps=min(width.kernel, max(spare // vectors, 1)),
        has_bias=request.has_bias,
        has_residual=request.has_residual,
        activation=request.activation,
    )


@dataclass(frozen=True, eq=False)
class Prepared:
    """Compiled kernels with all of their arguments but the tensors' addresses and strides."""

    pack: cpu.Kernel
    kernel: cpu.Kernel
    packed_bytes: int  # of the workspace; behind them, a number for each block
    blocks: int
    pack_sizes: tuple[int, int]
    pack_threads: int
    tables: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    tasks: int


def _table(side: Side, mode: str) -> Tensor:
    """[out, kernel]: the element that a tap reads for each place of the output, or -1."""
    taps = [_shown(side, mode, k * side.dilation, side.out, side.stride) for k in range(side.kernel)]
    return torch.stack(taps, 1)


def _tables(problem: ConvProblem, shape: channels.Shape) -> tuple[Tensor, ...]:
    depth, high, width = folded(problem, False)
    mode = problem.padding_mode
    places = (width.out - 1) * width.stride + (width.kernel - 1) * width.dilation + 1
    zeros = torch.zeros(problem.in_channels + shape.lanes, dtype=torch.float64)  # whatever the type
    return _table(depth, mode), _table(high, mode), _shown(width, mode, 0, places), zeros


def _cut(width: Side, shape: channels.Shape) -> tuple[int, int, int, int]:
    """Tiles of a row: at the left edge, inside, at both edges, and the narrower ones that end it."""
    tiles, left = divmod(width.out, shape.pixels)
    step = shape.pixels * width.stride
    reads = (shape.pixels - 1) * width.stride + (width.kernel - 1) * width.dilation + 1  # places of a tile
    head = min(-(-max(width.padding[0], 0) // step), tiles)
    good = min((width.size + width.padding[0] - reads) // step + 1, tiles)  # tiles before the edge on the right
    inside = max(good - head, 0)
    return head, inside, tiles - inside, -(-left // shape.ends) if left else 0


def _blocks(problem: ConvProblem, shape: channels.Shape) -> tuple[int, int]:
    """Blocks of channels: whole ones, and those after them."""
    whole, left = divmod(problem.in_channels, shape.vectors * shape.lanes)
    return whole, -(-left // shape.lanes)


def _packed_bytes(problem: ConvProblem, shape: channels.Shape) -> int:
    """Of the packed weight, in the type of the sums."""
    whole, rest = _blocks(problem, shape)
    size = 8 if shape.element == "double" else 4
    return (whole * shape.vectors + rest) * shape.lanes * shape.all_taps * size


def _tasks(request: Request, blocks: int) -> tuple[int, int]:
    """How many groups the blocks of channels are dealt to, and how many parts the rows."""
    depth, high, _ = folded(request.problem, False)
    parts = -(-high.out // channels.ROWS)
    planes = request.problem.batch * depth.out
    wanted = TASKS * request.threads if request.threads > 1 else 1
    groups = min(-(-wanted // (planes * parts)), blocks)
    return groups, max(parts, min(-(-wanted // (planes * groups)), high.out))


@lru_cache(1024)
def prepare(request: Request) -> Prepared:
    """The kernels and the tables of a request; a call only adds the addresses of its tensors and their strides."""
    problem, target = request.problem, cpu.Target.host()
    depth, high, width = folded(problem, False)
    shape = shape_of(request, target)
    whole, rest = _blocks(problem, shape)
    planes = problem.batch * depth.out
    groups, parts = _tasks(request, whole + rest)
    counts = (problem.in_channels, whole, whole + rest, groups, parts, depth.out, high.out, width.out)
    weights = problem.in_channels * shape.all_taps
    ready = Prepared(
        pack=cpu.compile(channels.pack_text(shape), target),
        kernel=cpu.compile(channels.text(shape), target),
        packed_bytes=_packed_bytes(problem, shape),
        blocks=whole + rest,
        pack_sizes=(problem.in_channels, whole),
        pack_threads=1 if weights < PACKED_ALONE else request.threads,
        tables=_tables(problem, shape),
        sizes=(*counts, width.padding[0], *_cut(width, shape)),
        tasks=planes * parts * groups,
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
    ready, threads = prepare(request), request.threads
    apart = tensors.first.shape[1] > 1 and tensors.first.stride(1) != 1
    strides = () if apart else _strides(tensors.first)
    tables = tuple(table.data_ptr() for table in ready.tables)

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, w, bias, residual = tensors
        if apart:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        w, bias = w.contiguous(), None if bias is None else bias.contiguous()
        packed = workspace.data_ptr()
        bad = packed + ready.packed_bytes
        launch(ready.pack, (w.data_ptr(), packed, bad, *ready.pack_sizes), ready.blocks, ready.pack_threads)
        ends = (0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr())
        pointers = (x.data_ptr(), packed, bad, *ends, out.data_ptr(), *tables)
        sizes = (*(strides or _strides(x)), *_strides(out), *ready.sizes)
        launch(ready.kernel, (*pointers, *sizes), ready.tasks, threads)

    return call


def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    """Fill `out`, which has the strides of channels_last, as the residual has."""
    bind(request, tensors)(tensors, out, workspace)


# -- estimates -------------------------------------------------------------------------------------------------------


def cost(request: Request) -> Cost:
    """Work of the tiles as they are, idle lanes too, and memory; the longer hides most of the other."""
    problem, target = request.problem, cpu.Target.host()
    depth, high, width = folded(problem, False)
    shape = shape_of(request, target)
    whole, rest = _blocks(problem, shape)
    _, inside, edges, ends = _cut(width, shape)
    rows = problem.batch * depth.out * high.out
    vectors = whole * shape.vectors + rest
    steps = rows * shape.kernel[0] * shape.kernel[1]
    pixels = (inside + edges) * shape.pixels + ends * shape.ends
    products = steps * vectors * pixels * shape.kernel[2]
    places = min(shape.kernel[2] + (shape.pixels - 1) * shape.stride, shape.pixels * shape.kernel[2])
    loads = steps * vectors * (inside + edges + ends) * (places + shape.kernel[2])
    register = max(1.0, shape.lanes * (8 if shape.element == "double" else 4) * 8 / target.bits)
    tiles = (whole + rest) * (inside + edges + ends)
    work = register * max(products / FMA_PER_SECOND, loads / LOADS_PER_SECOND) + tiles * steps * STEP_S
    work += rows * (tiles * TILE_S + ROW_S)
    threads = max(request.threads, 1)
    work = work / threads + problem.in_channels * shape.all_taps * PACK_S
    size = request.dtype.itemsize
    elements = sum(torch.Size(problem.shape_of(role)).numel() for role in ("x", "w", "y"))
    memory = size * elements / (BYTES_PER_SECOND if size * elements > CACHED else CACHED_PER_SECOND)
    seconds = max(work, memory) + HIDDEN * min(work, memory) + LAUNCH_S + (THREADS_S if threads > 1 else 0.0)
    workspace = _packed_bytes(problem, shape) + 8 * (whole + rest)
    return Cost(products * shape.lanes, size * elements, workspace, seconds)
