"""Separable: a depthwise kernel that is a product of lines is a pass along each dimension.

    w[o, i, j]  =  u[o, i] v[o, j]
    y[o, h, w]  =  sum over i of  u[o, i] t[o, h + i, w],      t[o, h, w]  =  sum over j of  v[o, j] x[o // m, h, w + j]

so k + k products do for k * k: a Gaussian, a box or Sobel's kernels are such (of rank 1).  In three dimensions a pass
along the depth goes before.  The values of the kernel decide whether it is one; they are tested in each call, and what
is none is refused: so `auto` never takes this algorithm.

The lines through the largest element w[o, p, q] are taken for u and v:  u[i] = w[i, q],  v[j] = w[p, j] / w[p, q].
Where w is a product of rounded lines, rounded itself, all w[i, j] are u[i] v[j] within a few eps of it.

The passes are those of plainconv/cpu/rows.py, on planes of one channel.  What the first makes is a strip of rows that
stays in the second cache until the second pass has read it (plainconv/cpu/separable.py).  Its rows are those of the
padded input: so borders end in the first pass, and whatever their mode, the second knows none.  The gradient for the
input is the same, of the parts that plainconv/menu/parts.py makes: a part of a product of lines is a product of theirs.

Cost: n * o * out * (sum of the kernel's sizes) multiplies.  The workspace is a strip for each thread; in three
dimensions also what the pass along the depth makes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from plainconv.cpu import compile as cpu
from plainconv.cpu import rows
from plainconv.cpu import separable as kernels
from plainconv.cpu.launch import launch
from plainconv.cpu.weight import Weight
from plainconv.menu import engine, lanes
from plainconv.menu.base import (
    Algorithm,
    AlgorithmRefused,
    Bound,
    Buffer,
    Cost,
    Made,
    Tensors,
    carve,
    moved_bytes,
    summation_error,
    workspace_bytes,
)
from plainconv.menu.engine import folded
from plainconv.menu.fold import folding
from plainconv.menu.parts import Part, parts
from plainconv.problem import ConvProblem, Direction, Request
from plainconv.remember import on_forget, weigh

# Units of eps that an element of the kernel may lie from the product of its lines, and more if it is small beside the
# largest: exp of a rounded number is off by as many as that is large.
TOLERANCE = 8
NEAR_BYTES = 384 << 10  # of a strip: it stays in the second cache
LINE = 64  # bytes of a line of the cache

# Estimates, in cycles of a vector: see menu/lanes.py.
LOAD = 1.6
STEP = 5.0
CYCLES_PER_SECOND = 3.66e9
BYTES_PER_SECOND = 13e9


# -- the lines of a kernel -------------------------------------------------------------------------------------------


def lines(w: Tensor) -> tuple[Tensor, ...] | str:
    """The line along each dimension whose product each kernel [o, c, *kernel] is, or the sentence why one is none.

    They are [o * c, taps]; that of the rows has the kernel's size, the others 1 where it is largest.
    """
    kernel = w.shape[2:]
    flat = w.flatten(0, 1).flatten(1)
    at = flat.abs().argmax(1, True)
    pivot = flat.gather(1, at)
    pivot += pivot == 0
    product, found = w.new_ones(1, 1), []
    for dim, taps in enumerate(kernel):
        step = math.prod(kernel[dim + 1 :])
        through = at - at // step % taps * step + torch.arange(0, taps * step, step)
        line = flat.gather(1, through)  # [o, taps]
        found.append(line if dim == len(kernel) - 2 else line / pivot)
        product = (product.unsqueeze(2) * found[-1].unsqueeze(1)).flatten(1)
    number = torch.finfo(w.dtype)
    least = 4 * number.tiny * number.eps  # where numbers have fewer digits
    size = product.abs()
    powers = size.clamp(min=number.tiny).log_()
    allowed = (powers.amax(1, keepdim=True) - powers).add_(TOLERANCE).mul_(size).mul_(number.eps).add_(least)
    off = product.sub_(flat).abs_()
    if bool((off <= allowed).all()):  # what is not finite is NaN by now
        return tuple(found)
    if not bool(flat.isfinite().all()):
        return "its kernel has numbers that are not finite"
    where = int((off > allowed).any(1).nonzero()[0])
    far = float(off[where].max())
    told = f"its kernel is no product of lines (of rank 1): that of channel {where} is off by {far:.2g}"
    return f"{told}; leave algorithm= at 'auto'"


# -- the passes ------------------------------------------------------------------------------------------------------


def _row(request: Request, target: cpu.Target, sides: lanes.Sides) -> lanes.Tile:
    """Vectors side by side, as many as stay in registers: LLVM loads ahead, and without fma products wait."""
    vectors = (8 if target.bits == 512 else 6) if target.fma else 2
    return lanes.Tile(1, 1, vectors, 1)


def _tile(request: Request, target: cpu.Target, sides: lanes.Sides) -> lanes.Tile:
    return lanes.best_tile(request, target, sides, 1)


@dataclass(frozen=True, eq=False)
class Passes:
    """A part of the result.

    along    the pass along the depth of all channels, or None
    taps     those of the line along the depth that it has
    across   the pass along the width, of one plane: from rows of the input to rows of the padded input
    down     that along the rows
    planes   images, output channels, and planes of each
    block    rows of the result that are made together
    band     blocks of a task, and
    bands    tasks of a plane
    pitch    elements from a row of the strip to the next
    rows     of the strip
    """

    part: Part
    along: Request | None
    taps: tuple[int, ...]
    across: Part
    down: Part
    planes: tuple[int, int, int]
    block: int
    band: int
    bands: int
    pitch: int
    rows: int

    @property
    def tasks(self) -> int:
        return math.prod(self.planes) * self.bands

    def shares(self, threads: int) -> int:
        return max(min(threads, self.tasks), 1)

    def buffers(self, request: Request) -> tuple[Buffer, Buffer]:
        """Every thread's strip, and what the pass along the depth makes."""
        strips = Buffer((self.shares(request.threads), self.rows * self.pitch), request.dtype)
        return strips, Buffer(self.along.problem.output_shape if self.along else (0,), request.dtype)


@lru_cache(1024)
def _passes(request: Request) -> tuple[Passes, ...]:
    return tuple(_made(request, part) for part in parts(request) or ())


def _made(request: Request, part: Part) -> Passes:
    problem, whole, target = part.request.problem, request.problem.kernel, cpu.Target.host()
    steps = part.weight.steps[3 - problem.dims :]
    sizes = [math.prod(whole[dim + 1 :]) for dim in range(problem.dims)]
    firsts = [part.weight.first // size % taps for size, taps in zip(sizes, whole, strict=True)]
    apart = [step // size for size, step in zip(sizes, steps, strict=True)]

    def plane(dim: int, spatial: tuple[int, ...], what: Request) -> Part:
        """One pass of one plane, along this dimension of two."""
        axis = problem.dims - 2 + dim

        def only(values: tuple[int, ...]) -> tuple[int, int]:
            return (1, values[axis]) if dim else (values[axis], 1)

        padding, mode = (problem.padding[-2:], problem.padding_mode) if dim else (((0, 0), (0, 0)), "zeros")
        kernel, stride, dilation = map(only, (problem.kernel, problem.stride, problem.dilation))
        one = ConvProblem(1, 1, 1, spatial, kernel, stride, padding, dilation, 1, mode)
        to_next = (0, 0, apart[axis]) if dim else (0, apart[axis], 0)
        place = ((0, 0), (1, 1)) if dim else (part.start[-2:], part.step[-2:])
        request = dataclasses.replace(what, problem=one, direction=Direction.FORWARD)
        return Part(request, Weight(False, whole[axis], firsts[axis], to_next), *place)

    bare = dataclasses.replace(part.request, has_bias=False, has_residual=False, activation=None)
    along, between = None, problem
    if not folded(problem, False)[0].plain:
        between = _along(problem)
        along = dataclasses.replace(bare, problem=between)
    across = plane(1, problem.spatial[-2:], bare)
    down = plane(0, across.request.problem.out, part.request)
    _, high, _ = sides = folded(down.request.problem, False)
    block = min(_tile(down.request, target, sides).rows, high.out)
    size = request.dtype.itemsize
    pitch = (-(-across.request.problem.out[1] * size // LINE) | 1) * LINE // size
    reach = (high.kernel - 1) * high.dilation + 1
    fitting = NEAR_BYTES // (pitch * size) - reach
    blocks = -(-high.out // block)
    band = max(min(fitting // (block * high.stride), blocks), 1)
    depth = math.prod(between.out[:-2])
    return Passes(
        part,
        along,
        tuple(firsts[0] + i * apart[0] for i in range(problem.kernel[0])),
        across,
        down,
        (problem.batch, problem.out_channels, depth),
        block,
        band,
        -(-blocks // band),
        pitch,
        (band * block - 1) * high.stride + reach,
    )


def _along(problem: ConvProblem) -> ConvProblem:
    """The pass along the depth of a problem: its other dimensions stay as they are."""

    def first(values: tuple[int, ...]) -> tuple[int, ...]:
        return (values[0], 1, 1)

    return dataclasses.replace(
        problem,
        kernel=first(problem.kernel),
        stride=first(problem.stride),
        padding=(problem.padding[0], (0, 0), (0, 0)),
        dilation=first(problem.dilation),
    )


@dataclass(frozen=True, eq=False)
class Prepared:
    """The kernel of a part, those that it calls and their settled arguments, and its own around the tensors'."""

    kernel: cpu.Kernel
    called: tuple[lanes.Prepared, lanes.Prepared]
    settled: tuple[Tensor, ...]
    addresses: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int  # element of the result


@lru_cache(1024)
def _prepare(request: Request, number: int, x_strides: tuple[int, ...]) -> Prepared:
    """Part `number` of a request, whose planes are read with these strides."""
    passes, size = _passes(request)[number], request.dtype.itemsize
    part, problem = passes.part, passes.part.request.problem
    made = request.problem.shape_of(request.direction.makes)[2:]
    high, width = made[-2:]
    layout = lanes.Layout.ROWS if x_strides[-1] == 1 else lanes.Layout.SPREAD
    across = lanes.prepare(passes.across, _row, layout)
    down = lanes.prepare(passes.down, _tile, lanes.Layout.ROWS)
    settled = _settled(
        (across, (x_strides[-2] * size, x_strides[-1], passes.pitch)),
        (down, (passes.pitch * size, 1, part.step[-2] * width)),
    )
    along = passes.down.request.problem
    depth_step, depth_start = (part.step[0], part.start[0]) if problem.dims == 3 else (0, 0)
    sizes = {
        "size": size,
        "shares": passes.shares(request.threads),
        "strip": passes.rows * passes.pitch * size,
        "tasks": passes.tasks,
        "bands": passes.bands,
        "depth": passes.planes[2],
        "out_channels": problem.out_channels,
        "multiplier": 1 if passes.along else problem.group_out,
        "x_image": x_strides[0] * size,
        "x_channel": x_strides[1] * size,
        "x_depth": x_strides[2] * size if problem.dims == 3 else 0,
        "y_channel": math.prod(made) * size,
        "y_depth": depth_step * high * width * size,
        "across_taps": passes.across.weight.all_taps,
        "down_taps": passes.down.weight.all_taps,
        "pitch": passes.pitch * size,
        "band": passes.band,
        "block": passes.block,
        "blocks": -(-along.out[0] // passes.block),
        "out_rows": along.out[0],
        "stride": folded(along, False)[1].stride,
        "reach": (along.kernel[0] - 1) * along.dilation[0],
    }
    ready = Prepared(
        cpu.compile(kernels.text()),
        (across, down),
        settled,
        (across.kernel.address, down.kernel.address, *(table.data_ptr() for table in settled)),
        tuple(sizes[name] for name in kernels.SIZES),
        (depth_start * high + part.start[-2]) * width + part.start[-1],
    )
    weigh(ready, sum(table.nbytes for table in settled))
    return ready


def _settled(*passes: tuple[lanes.Prepared, tuple[int, int, int]]) -> tuple[Tensor, ...]:
    """The arguments of each pass: bytes from a row that it reads to the next, elements from a pixel of it to the next,
    and from a row that it makes; the tensors' addresses are left out."""
    pointers = (0,) * (len(rows.POINTERS) - len(passes[0][0].addresses))
    return tuple(
        # image, channel, depth, row, pixel of what is read; channel, depth, row of what is made
        torch.tensor((*pointers, *pass_.addresses, 0, 0, 0, row, pixel, 0, 0, made, *pass_.sizes))
        for pass_, (row, pixel, made) in passes
    )


on_forget(_passes.cache_clear)
on_forget(_prepare.cache_clear)


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a result; it refuses kernels that are no product of lines."""
    return _bound(request, tensors, None)


def pack(request: Request, tensors: Tensors, made: Made) -> Bound:
    """The same for this kernel, which is tested and taken apart once, now."""
    return _bound(request, tensors, _found(request, tensors.second))


def _found(request: Request, w: Tensor) -> tuple[Tensor, ...]:
    found = lines(w)
    if isinstance(found, str):
        raise AlgorithmRefused(f"algorithm='separable' refuses {request}: {found}")
    return found


def _bound(request: Request, tensors: Tensors, kept: tuple[Tensor, ...] | None) -> Bound:
    each = [_bind(request, number, tensors.first) for number in range(len(_passes(request)))]

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        found = kept or _found(request, tensors.second)
        bias = None if tensors.bias is None else tensors.bias.contiguous()
        for run in each:
            run(tensors._replace(bias=bias), found, out, workspace)

    return call


def _bind(request: Request, number: int, x: Tensor) -> Callable[[Tensors, tuple[Tensor, ...], Tensor, Tensor], None]:
    """The call that fills a part of a result, from the lines of the kernel."""
    passes = _passes(request)[number]
    buffers, size, threads, along = passes.buffers(request), request.dtype.itemsize, request.threads, None
    if passes.along:
        of = Tensors(x, x.new_empty(passes.along.problem.weight_shape))
        along = lanes.bind(passes.along, of, _tile)
        x = torch.empty(buffers[1].shape, device="meta")
    ready = _prepare(request, number, x.stride())

    def run(tensors: Tensors, found: tuple[Tensor, ...], out: Tensor, workspace: Tensor) -> None:
        x, _, bias, residual = tensors
        *depth, down, across = found
        strips, between = carve(workspace, buffers)
        if along:
            line = depth[0][:, passes.taps].contiguous()
            along(Tensors(x, line.view(of.second.shape)), between, workspace[:0])
            x = between
        begin = ready.first * size
        pointers = (
            x.data_ptr(),
            across.data_ptr(),
            down.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr() + begin,
            out.data_ptr() + begin,
            strips.data_ptr(),
        )
        launch(ready.kernel, (*ready.addresses, *pointers, *ready.sizes), passes.shares(threads), threads)

    return run


def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    """Fill `out`."""
    bind(request, tensors)(tensors, out, workspace)


# -- the entry -------------------------------------------------------------------------------------------------------


def _why_not(request: Request) -> str | None:
    problem = request.problem
    if request.direction is Direction.GRAD_WEIGHT:
        return "it uses that a weight is a product of lines, and the gradient for a weight is none"
    if request.dtype in (torch.bfloat16, torch.float16):
        named = str(request.dtype).removeprefix("torch.")
        return f"what the first pass makes would be rounded to {named}, and so the result twice"
    if problem.dims == 1:
        return "it makes two passes of a kernel that has two dimensions or more"
    summed, word = problem.group_in, "input"
    if request.direction is Direction.GRAD_INPUT:
        summed, word = problem.group_out, "output"
    if summed != 1:
        return f"it is for one {word} channel a group, and here are {summed}"
    return lanes.why_not(request)


def _error(request: Request) -> float:
    """That of the lines, and of each pass' sums; a padding mode's gradient adds what it folds."""
    problem = request.problem
    folds = problem.terms(request.direction) // problem.taps
    return TOLERANCE + math.log(problem.taps) + 1 + sum(summation_error(taps) for taps in (*problem.kernel, folds))


def _cost(request: Request) -> Cost:
    """Products and loads of both passes, or memory, whichever is longer, and the calls."""
    size, threads = request.dtype.itemsize, max(request.threads, 1)
    lanes_ = cpu.Target.host().bits // 8 // size
    multiplies, cycles, moved, workspace, seconds = 0, 0.0, moved_bytes(request), 0, 0.0
    for passes in _passes(request):
        for part, load in ((passes.across, LOAD), (passes.down, 1.0)):
            problem = part.request.problem
            vectors = math.prod(passes.planes) * problem.out[0] * -(-problem.out[1] // lanes_)
            cycles += vectors * (problem.taps * load + STEP)
            multiplies += vectors * lanes_ * problem.taps
        workspace = max(workspace, workspace_bytes(passes.buffers(request)))
        seconds += engine.launches_s(passes.shares(threads))
        if passes.along:
            cost = lanes.cost(passes.along, _tile)
            multiplies, seconds = multiplies + cost.multiplies, seconds + cost.seconds
            moved += 2 * passes.buffers(request)[1].bytes
    seconds += max(cycles / CYCLES_PER_SECOND / threads, moved / BYTES_PER_SECOND / threads)
    return Cost(multiplies, moved, workspace, seconds)


ALGORITHM = folding(
    Algorithm("separable", _why_not, _cost, _error, run, fuses=True, bind=bind, pack=pack, by_name=True)
)
