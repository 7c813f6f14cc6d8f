"""Winograd: fewer multiplications for kernels of 2 or 3 taps, by way of sums and differences.

Along one dimension, m outputs of a kernel of 3 taps take m + 2 multiplications instead of 3 m: the patch of m + 2
inputs, the kernel, and the products are each multiplied by a fixed small matrix (plainconv/cpu/transforms.py has them).
Along two dimensions that is (m + 2)^2 for m^2 outputs: with m = 4 a quarter of the definition's 9 m^2.  With a stride
of 2, places (or, in the gradient for the input, results) and taps fall into two parts, each of which is of stride 1.

    Y  =  A^T [ sum over c of  (G w_c) * (B^T d_c) ]

The sums over channels are a matrix product for each of the (m + 2)^2 elements; what comes before and behind it is
linear in the channels alone, and is done block by block while the tiles are in the cache.  The gradient for the input
is the same convolution: taps in the opposite order, channels that change places, and a padding of k - 1 - lo.

Cost: n * o * c/g * (m + k - 1)^d multiplies for each m^d outputs, if the stride is 1.  The workspace is the transformed
weight, or, where all tiles are few, those tiles; and the tiles of a block for each thread.

S. Winograd, "Arithmetic complexity of computations", 1980; A. Lavin, S. Gray, "Fast algorithms for convolutional neural
networks", arXiv:1509.09308, 2015.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.cpu import compile as cpu
from plainconv.cpu import fourier, transforms
from plainconv.cpu import winograd as kernels
from plainconv.cpu.launch import launch_all
from plainconv.cpu.transforms import Along
from plainconv.menu import engine, tiled, winograd_weight
from plainconv.menu.axes import Work, work
from plainconv.menu.base import (
    ALIGNMENT,
    Algorithm,
    Bound,
    Buffer,
    Cost,
    Made,
    Tensors,
    carve,
    made_once,
    moved_bytes,
    summation_error,
    workspace_bytes,
)
from plainconv.menu.engine import STORED, Side, folded, padded
from plainconv.menu.fold import folding
from plainconv.menu.winograd_weight import MOST_TAPS
from plainconv.problem import Direction, Request
from plainconv.remember import on_forget, weigh

MOST_STRIDE = 2
NEAR_BYTES = 600 << 10  # of patches and sums of a block, which a core's own cache keeps
LEAST_TILES = 28  # of a block, for which the weight is read once
LEAST_SQUARES = 12  # the same of Fourier's tiles, whose patches are far larger
HELD_BYTES = 400 << 10  # of a weight that is multiplied as soon as it is made
FEW_TILES = 96  # that are not dealt to threads
MOST_SCALARS = 8  # of the registers of a product; each has its own address

# Cycles, measured on one core with AVX-512; each of a vector, or of a vector in each matrix.
CYCLES_PER_SECOND = 3.67e9
PRODUCT = 1.06  # multiplied and added
FAR_PATCHES = 1.4  # with patches from the cache that cores share
FAR_BYTES = 1 << 20
LEAST_SUMS = 8  # fewer wait for each other
STEP = 0.5  # and of the product's loop
FORTH = 13.0
BACK = 11.0
WEIGHT = 9.0
FAR_STORE = 15.0  # more, of a weight that is kept for all blocks
TILE = 20.0  # a product's beginning and end
BYTES_PER_SECOND = 16e9  # of memory
READ = 27e9  # of a weight that lies there transformed
CACHED = 60e9


class Form(NamedTuple):
    """What is multiplied, along depth, rows and width.

    tile      outputs of a tile
    patch     places that it reads
    numbers   products of those
    fourier   whether by discrete Fourier transforms, see plainconv.menu.fourier
    blocks    of the kernel's taps along the width, one tile apart: a tile multiplies the patches of as many
    along     if it is not by those, the transforms
    """

    tile: tuple[int, int, int]
    patch: tuple[int, int, int]
    numbers: tuple[int, int, int]
    fourier: bool = False
    blocks: int = 1
    along: tuple[Along, ...] = ()

    @property
    def step(self) -> tuple[int, int, int]:
        """Places from a tile to the next."""
        return transforms.three(along.step for along in self.along) if self.along else self.tile

    @property
    def matrices(self) -> int:
        """Numbers of a patch, each of which is a product of matrices."""
        return math.prod(self.numbers)


class Way(NamedTuple):
    """How a request is cut.

    tiles     how many there are, of an image
    scalars   x vectors: tiles and vectors of output channels, the registers of a product
    rows      of tiles, of a block, and cols: tiles of a row
    apart     whether patches are made before, for all tiles, and threads share the output channels
    held      vectors of input channels whose weight is made at a time, if apart
    parts     of the output channels, for which threads make the patches of a block again
    tasks     of the main kernel, and shares: threads
    """

    form: Form
    tiles: tuple[int, int, int]
    lanes: int
    scalars: int
    vectors: int
    rows: int
    cols: int
    apart: bool
    held: int
    parts: int
    tasks: int
    shares: int


def sides_of(seen: Work) -> tuple[Side, Side, Side]:
    """Depth, rows and width: places that are read, the padding before the first patch, and places that are made."""
    depth, high, width = folded(seen.request.problem, False)
    if not seen.turned:
        return depth, high, width
    return _turned(depth), _turned(high), _turned(width)


def _turned(side: Side) -> Side:
    first = transforms.turned_first(side.kernel, side.stride, side.padding[0] % side.stride)
    return side._replace(size=side.out, padding=(-first - side.padding[0] // side.stride, 0), out=side.size)


def _along(side: Side, outputs: int, turned: bool) -> Along:
    """The transforms along a dimension of the problem; outputs: of a tile, or of each of its parts."""
    if turned:
        return transforms.turned(outputs, side.kernel, side.stride, side.padding[0] % side.stride)
    return transforms.ahead(outputs, side.kernel, side.stride)


def _outputs(made: int, side: Side, sizes: Sequence[int], turned: bool) -> int:
    """Outputs of a tile along a dimension, of those: what takes the fewest products, and then the fewest digits."""
    if side.kernel <= side.stride:
        return 1

    def products(outputs: int) -> int:
        along = _along(side, outputs, turned)
        return -(-made // along.outputs) * along.products

    return min(sizes, key=products)


def forms(request: Request) -> tuple[Form, ...]:
    """What may be multiplied; all of it loses about as many digits."""
    seen, sides = work(request), folded(request.problem, False)
    moving = sum(side.kernel > 1 for side in sides)
    # In three dimensions, large tiles along all of them would lose too many digits; and in two with a stride, they
    # would have a hundred products, and a weight as much larger.
    few = [(moving > 1 and side.stride > 1) or (moving > 2 and not number) for number, side in enumerate(sides)]
    made = sides_of(seen)

    def form(sizes: tuple[int, ...]) -> Form:
        along = tuple(
            _along(side, _outputs(row.out, side, (2,) if small else sizes, seen.turned), seen.turned)
            for row, side, small in zip(made, sides, few, strict=True)
        )
        tile, patch = transforms.three(one.outputs for one in along), transforms.three(one.places for one in along)
        return Form(tile, patch, transforms.three(one.products for one in along), along=along)

    def products(form: Form) -> int:
        return form.matrices * math.prod(-(-row.out // size) for row, size in zip(made, form.tile, strict=True))

    if request.precision == "highest":
        return (form((2,)),)  # loses no more digits than a plain sum of as many products
    found = [form((2, 4))]
    if moving > 1 and all(side.kernel in (1, 3) and side.stride == 1 for side in sides):
        large = form((5,))  # along all of them: each mixture would be another kernel
        if products(large) < products(found[0]):  # of equals, the one that loses fewer digits
            found.append(large)
    if request.packed:
        found.append(form((2,)))
    return tuple(dict.fromkeys(found))


@lru_cache(4096)
def way(request: Request) -> Way:
    """How to cut a request: by the form of least estimated time."""

    def seconds(cut: Way) -> float:
        return cost(request, cut, FORTH, BACK, WEIGHT).seconds

    plain = min((cut_by(request, form) for form in forms(request)), key=seconds)
    if not (request.packed and plain.apart):
        return plain
    # A weight that is there already is larger than the one that it was made of, and has to be read.
    return min((plain, *(cut_by(request, form, whole=True) for form in forms(request))), key=seconds)


@lru_cache(4096)
def cut_by(request: Request, form: Form, whole: bool = False) -> Way:
    """How to cut a request whose form is settled; whole: the weight is transformed before, even for few tiles."""
    seen, target, tile = work(request), cpu.Target.host(), form.tile
    depth, high, width = sides_of(seen)
    size, threads = request.dtype.itemsize, max(request.threads, 1)
    tiles = -(-depth.out // tile[0]), -(-high.out // tile[1]), -(-width.out // tile[2])
    lanes = engine.lanes_of_outputs(seen.group_out, size, target)
    outputs = -(-seen.group_out // lanes)
    spare = target.registers - (2 if target.fma else 3)
    vectors = engine.vectors_of_outputs(outputs, spare, STEP)
    scalars = min(spare // vectors - 1, MOST_SCALARS)
    matrices, in_vectors = form.matrices, -(-seen.group_in // lanes)
    slabs = in_vectors * form.blocks
    out_tiles = -(-outputs // vectors)
    rows = seen.batch * tiles[0] * tiles[1]
    # With a group for each thread, a block of each stays in the thread's own cache, its patches as well.
    few = not whole and rows * tiles[2] <= FEW_TILES and seen.groups < max(threads, 2)
    if few and out_tiles * seen.groups >= threads and seen.group_in:
        held = max(1, min(HELD_BYTES // (matrices * _slab(lanes, vectors) * size), slabs))
        tasks = seen.groups * out_tiles
        shares = min(threads, tasks)
        return Way(form, tiles, lanes, scalars, vectors, rows, tiles[2], True, held, 1, tasks, shares)
    each = matrices * (in_vectors + vectors) * lanes * size
    most = max(NEAR_BYTES // each, LEAST_SQUARES if form.fourier else LEAST_TILES)
    cols = -(-tiles[2] // -(-tiles[2] // most))
    col_blocks = -(-tiles[2] // cols) if cols else 0
    blocks = -(-rows // max(most // max(cols, 1), 1))
    if col_blocks == 1:
        blocks = min(padded(blocks, threads // math.gcd(threads, seen.groups)), rows)
    height = -(-rows // max(blocks, 1))
    units = -(-rows // max(height, 1)) * col_blocks * seen.groups
    parts = max(min(out_tiles, -(-threads // max(units, 1))), 1)
    shares = max(min(threads, units * parts), 1)
    return Way(form, tiles, lanes, scalars, vectors, height, cols, False, 0, parts, units * parts, shares)


def _slab(lanes: int, vectors: int) -> int:
    """See plainconv.cpu.winograd.Shape.slab."""
    return (lanes * vectors | 1) * lanes


class Room(NamedTuple):
    """Elements of scratch memory: where the parts of each thread's begin, and sizes.

    patches, weight_tile, weight_group: of the patches of a block, and of the weight of a tile of outputs and of a group
    """

    strip: int
    columns: int
    sums: int
    made: int
    weight: int
    share: int
    patch: int
    patches: int
    sum_matrix: int
    weight_tile: int
    weight_group: int
    length: int
    made_length: int


@lru_cache(4096)
def _room(request: Request, cut: Way) -> Room:
    seen, (tile, patch, numbers, _, blocks, _), step = work(request), cut.form, cut.form.step
    lanes, matrices, vectors = cut.lanes, cut.form.matrices, -(-seen.group_in // cut.lanes)
    line = cut.cols + blocks - 1
    # Neighbours are an odd number of vectors apart, so that they do not meet in the same places of a cache.
    tiles, chunk = cut.rows * line + blocks - 1 + kernels.SMALL, matrices * _slab(lanes, cut.vectors)
    patch_size, sum_matrix = (vectors * matrices | 1) * lanes, (tiles * cut.vectors | 1) * lanes
    length = padded((line - 1) * step[2] + patch[2], lanes)
    made_length = padded(cut.cols * tile[2], lanes)
    begins, begin = [], 0
    for elements in (
        max(patch[0], numbers[0]) * patch[1] * length * lanes,
        numbers[1] * length * lanes,
        matrices * sum_matrix,
        tile[0] * tile[1] * made_length * lanes,
        cut.held * chunk,
    ):
        begins.append(begin)
        begin += padded(elements, ALIGNMENT // request.dtype.itemsize)
    weight_tile = vectors * blocks * chunk
    out_tiles = 0 if cut.apart else -(-seen.group_out // (cut.vectors * lanes))
    ends = (patch_size, tiles * patch_size, sum_matrix, weight_tile, weight_tile * out_tiles, length, made_length)
    return Room._make((*begins, begin, *ends))


def workspace(request: Request, cut: Way) -> tuple[int, int, int, int]:
    """Bytes of the transformed weight, of patches, of the threads' own; and of a weight whose taps are put in order.

    Fourier transforms want them so, of which there are many.
    """
    seen, room = work(request), _room(request, cut)
    patches = room.patches * (seen.groups if cut.apart else cut.shares)
    elements = (
        seen.groups * room.weight_group,
        patches,
        max(request.threads, 1) * room.share,
        math.prod(request.problem.weight_shape) if request.channels_last and cut.form.fourier else 0,
    )
    weight, patches, own, ordered = (padded(count * request.dtype.itemsize, ALIGNMENT) for count in elements)
    return (0, patches, own, 0) if request.packed else (weight, patches, own, ordered)


def block_bytes(request: Request, cut: Way) -> int:
    """Of the patches and the sums of a block."""
    room = _room(request, cut)
    return (room.patches + cut.form.matrices * room.sum_matrix) * request.dtype.itemsize


class Step(NamedTuple):
    """A kernel, what of its arguments is settled, and for how many threads it has shares."""

    kernel: cpu.Kernel
    settled: Tensor
    shares: int


@dataclass(frozen=True, eq=False)
class Prepared:
    """Compiled kernels, one after the other, with all of their arguments but the tensors'."""

    steps: tuple[Step, ...]
    tables: Tensor


@lru_cache(1024)
def prepare(request: Request, cut: Way, x_strides: tuple[int, ...], inside: bool) -> Prepared:
    """The kernels, the tables and the sizes of a request whose input has these strides.

    inside: whether the second dimension of the weight is innermost in it, and not its taps.
    """
    seen, room, target, form = work(request), _room(request, cut), cpu.Target.host(), cut.form
    sides = depth, high, width = sides_of(seen)
    element = STORED[request.dtype]
    x_depth, x_row, x_col = (0,) * (3 - len(x_strides[2:])) + x_strides[2:]
    x_channel = x_strides[1] if seen.in_channels > 1 else 1
    source = "table"
    if x_channel == 1 and seen.group_in > 1:
        source = "pixels"
    elif x_col == 1 and (seen.mode == "zeros" or max(width.padding) <= 0):
        source = "rows"
    taps = (depth.kernel, high.kernel, width.kernel)
    made = depth.out * high.out * width.out
    last = request.channels_last
    y_col = seen.out_channels if last else 1
    tables, addresses = _tables(seen.mode, sides, cut, room)
    rows = seen.batch * cut.tiles[0] * cut.tiles[1]
    col_blocks = -(-cut.tiles[2] // cut.cols) if cut.cols else 0
    blocks = -(-rows // cut.rows) * col_blocks if cut.rows else 0
    out_tiles = -(-seen.group_out // (cut.vectors * cut.lanes))
    in_vectors = -(-seen.group_in // cut.lanes)
    innermost = seen.group_out if seen.turned else seen.group_in  # if it is channels
    w_first, w_second, w_tap = innermost * seen.taps, *((1, innermost) if inside else (seen.taps, 1))
    w_output, w_channel = (w_second, w_first) if seen.turned else (w_first, w_second)
    sizes = {
        "share": room.share,
        "strip_at": room.strip,
        "columns_at": room.columns,
        "sums_at": room.sums,
        "made_at": room.made,
        "patches_share": 0 if cut.apart else room.patches,
        "patches_group": room.patches,
        "groups": seen.groups,
        "blocks": blocks,
        "col_blocks": col_blocks,
        "parts": cut.parts,
        "block_rows": cut.rows,
        "block_cols": cut.cols,
        "rows": rows,
        "cols": cut.tiles[2],
        "depth_tiles": cut.tiles[0],
        "high_tiles": cut.tiles[1],
        "group_in": seen.group_in,
        "group_out": seen.group_out,
        "in_vectors": in_vectors,
        "out_tiles": out_tiles,
        "x_image": x_strides[0],
        "x_channel": x_channel,
        "x_depth": x_depth,
        "x_row": x_row,
        "x_col": x_col,
        "in_width": width.size,
        "lo": width.padding[0],
        "y_image": seen.out_channels * made,
        "y_channel": 1 if last else made,
        "y_depth": high.out * width.out * y_col,
        "y_row": width.out * y_col,
        "y_col": y_col,
        "out_depth": depth.out,
        "out_rows": high.out,
        "out_width": width.out,
        "length": room.length,
        "made_length": room.made_length,
        "patch": room.patch,
        "w_group": seen.group_in * seen.group_out * seen.taps,
        "w_output": w_output,
        "w_channel": w_channel,
        "w_tap": w_tap,
        "weight_at": room.weight,
        "weight_group": room.weight_group,
        "weight_tile": room.weight_tile,
        "weight_matrix": (cut.held if cut.apart else in_vectors * form.blocks) * _slab(cut.lanes, cut.vectors),
        "sum_matrix": room.sum_matrix,
    }
    tasks = {"weight": seen.groups * -(-seen.group_out // cut.lanes), "all": cut.tasks}
    if cut.apart:
        tasks = {"forth": seen.groups * rows * in_vectors, "back": cut.tasks}
    steps = []
    for does, count in tasks.items():
        reads, makes, weighs = does in ("all", "forth"), does in ("all", "back"), does in ("weight", "back")
        shape = kernels.Shape(
            element=element,
            lanes=cut.lanes,
            tile=form.tile,
            taps=taps,
            along=form.along,
            source=source if reads else "",
            last=last and makes,
            scalars=cut.scalars if makes else 1,
            vectors=cut.vectors if makes or weighs else 1,
            turned=seen.turned and weighs,
            inside=inside and weighs,
            does=does,
            held=cut.held if does == "back" else 0,
            has_bias=request.has_bias and makes,
            has_residual=request.has_residual and makes,
            activation=request.activation if makes else None,
        )
        shares = max(min(request.threads, count), 1)
        numbers = {**sizes, "tasks": count, "shares": shares}
        settled = torch.tensor([*addresses, *(numbers[name] for name in kernels.SIZES)])
        steps.append(Step(cpu.compile(_text(shape, form), target), settled, shares))
    ready = Prepared(tuple(steps), tables)
    weigh(ready, tables.nbytes)
    return ready


on_forget(prepare.cache_clear)


def _text(shape: kernels.Shape, form: Form) -> str:
    if not form.fourier:
        return kernels.text(shape)
    depth, high, wide = shape.taps
    taps = depth, high, form.tile[2] if form.blocks > 1 else wide
    fields = {**vars(shape), "taps": taps}
    return fourier.text(fourier.Rows(**fields, lengths=form.patch, blocks=form.blocks, kernel=wide))


def _tables(mode: str, sides: tuple[Side, Side, Side], cut: Way, room: Room) -> tuple[Tensor, tuple[int, ...]]:
    """Which element each place of depth, rows and width shows, one table behind the other, and where each begins."""
    counts = [(tiles - 1) * m + n for tiles, m, n in zip(cut.tiles, cut.form.step, cut.form.patch, strict=True)]
    counts[2] += room.length
    parts = [engine.shown(side, mode, 0, max(count, 0)) for side, count in zip(sides, counts, strict=True)]
    return engine.joined(parts)


def _why_not(request: Request) -> str | None:
    problem = request.problem
    if request.dtype in (torch.bfloat16, torch.float16):
        named = str(request.dtype).removeprefix("torch.")
        return f"it loses digits of what it transforms, float32 or float64, and {named} has none to lose"
    if request.device == "cuda":
        return tiled.why_not(request)
    if sentence := engine.why_not(request):
        return sentence
    sides = folded(problem, False)
    if any(side.stride > MOST_STRIDE for side in sides) or set(problem.dilation) != {1}:
        return f"it is for strides up to {MOST_STRIDE} and no dilation"
    parts = [(side.kernel // side.stride, -(-side.kernel // side.stride)) for side in sides]
    if any(few < 1 or many > MOST_TAPS for few, many in parts) or all(many == 1 for _, many in parts):
        some = f"2 to {MOST_TAPS} taps (along some dimensions 1), or 2 to {2 * MOST_TAPS} with a stride of 2"
        return f"it is for kernels of {some}, and this one is {_times(problem.kernel)}"
    return winograd_weight.why_not(problem) if request.direction is Direction.GRAD_WEIGHT else None


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def growth(transforms: Sequence[Along]) -> float:
    """How much larger than a sum of products the numbers are that it is made of here, if all are independent.

    Along one dimension and for output i, its square is  sum over j of  A[i, j]^2 |G[j]|^2 |B[j]|^2 / taps of i.
    """
    product = 1.0
    for along in transforms:
        sizes = [sum(g * g for g in a) * sum(b * b for b in c) for a, c in zip(along.weights, along.forth, strict=True)]
        largest = 0.0
        for row in along.back:
            used = [column for a, column in zip(row, along.weights, strict=True) if a]
            taps = sum(map(any, zip(*used, strict=True)))
            largest = max(largest, float(sum(a * a * n for a, n in zip(row, sizes, strict=True))) / taps)
        product *= largest
    return math.sqrt(product)


def _error(request: Request) -> float:
    """Sums over channels (or tiles), of numbers that are larger than the result."""
    if request.device == "cuda":
        return growth(tiled.along_of(request)) * summation_error(tiled.terms(request))
    if request.direction is Direction.GRAD_WEIGHT:
        taps, tile, terms = winograd_weight.summed(request)
        return growth([transforms.ahead(k, m, 1) for k, m in zip(taps, tile, strict=True)]) * summation_error(terms)
    seen, form = work(request), way(request).form
    return growth(form.along) * summation_error(seen.group_in + sum(form.numbers))


def _cost(request: Request) -> Cost:
    if request.device == "cuda":
        return tiled.cost(request)
    if request.direction is Direction.GRAD_WEIGHT:
        return winograd_weight.cost(request)
    return cost(request, way(request), FORTH, BACK, WEIGHT)


def cost(request: Request, cut: Way, forth: float, back: float, weigh: float) -> Cost:
    """Cycles of transforms and products, and what the caches take; or memory, if that is longer; and the calls.

    forth, back, weigh: cycles of the transforms, for each vector of each matrix.
    """
    seen, target = work(request), cpu.Target.host()
    terms = seen.group_in * cut.form.blocks
    matrices, size = cut.form.matrices, request.dtype.itemsize
    in_vectors, outputs = -(-seen.group_in // cut.lanes), -(-seen.group_out // cut.lanes)
    out_tiles = -(-outputs // cut.vectors)
    tiles = seen.batch * math.prod(cut.tiles)
    weight = matrices * terms * out_tiles * cut.vectors * cut.lanes * size
    patches = _room(request, cut).patches * size
    # A block reads such a weight once, beside its products; Fourier transforms have few of those for each number.
    far = patches > FAR_BYTES or (cut.form.fourier and weight > FAR_BYTES and not cut.apart)
    product = FAR_PATCHES if far else PRODUCT

    def products(count: int) -> float:
        """Of so many tiles, for a tile of outputs and a matrix."""
        whole, left = divmod(count, cut.scalars)
        steps = ((cut.scalars, whole), (kernels.SMALL, -(-left // kernels.SMALL)))
        return sum(
            n * (terms * (product * max(scalars * cut.vectors, LEAST_SUMS) + STEP * cut.vectors) + TILE)
            for scalars, n in steps
        )

    each = max(cut.rows * cut.cols, 1)
    cycles = seen.groups * out_tiles * (tiles // each * products(each) + products(tiles % each))
    cycles += seen.groups * tiles * (forth * in_vectors * cut.parts + back * outputs)
    if cut.apart or not request.packed:
        stored = 0.0 if cut.apart or weight <= FAR_BYTES else FAR_STORE
        cycles += seen.groups * outputs * terms * (weigh + stored)
    register = cut.lanes * size * 8
    cycles *= matrices * engine.vector_cycles(register, target)
    busy = -(-cut.tasks // cut.shares) / cut.tasks if cut.tasks else 1.0  # the share of one thread
    moved = moved_bytes(request)
    computed = cycles * busy / CYCLES_PER_SECOND + moved / CACHED
    memory = moved / BYTES_PER_SECOND if moved >= 16 << 20 else 0.0
    if request.packed and not cut.apart:
        memory = max(memory, seen.groups * weight / READ)  # no cache keeps it until the next call
    seconds = max(computed, memory) + engine.launches_s(cut.shares)
    multiplies = seen.groups * tiles * matrices * terms * seen.group_out
    return Cost(multiplies, moved, sum(workspace(request, cut)), seconds)


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these."""
    if request.device == "cuda":
        return tiled.bind(request, tensors)
    if request.direction is Direction.GRAD_WEIGHT:
        return winograd_weight.bind(request, tensors)
    return bind_cut(request, way(request), tensors)


def pack(request: Request, tensors: Tensors, made: Made) -> Bound:
    """The same for a weight that stays: it is transformed once, unless that is done piece by piece in the product."""
    if request.device == "cuda":
        return tiled.bind(request, tensors, made)
    return bind_cut(request, way(request), tensors, made)


def bind_cut(request: Request, cut: Way, tensors: Tensors, made: Made | None = None) -> Bound:
    """The same, for a request that is cut already."""
    threads, w = request.threads, tensors.second
    inside = not (w.is_contiguous() or cut.form.fourier) and w.movedim(1, -1).is_contiguous()
    ready = prepare(request, cut, tensors.first.stride(), inside)
    weight_bytes, patches_bytes, own_bytes, ordered_bytes = workspace(request, cut)
    done, kept, ordered = 0, None, None
    if made is not None and cut.apart:
        ordered = w if inside else _ordered_once(w, made)
    elif made is not None:
        done, transform = 1, ready.steps[0]

        def fill(room: Tensor) -> None:
            w = tensors.second if inside else tensors.second.contiguous()
            given = (0, w.data_ptr(), room.data_ptr(), 0, 0, 0, 0, 0, transform.settled.data_ptr())
            launch_all([(transform.kernel, given, transform.shares, False)], threads)

        size = _room(request, cut).weight_group * work(request).groups * request.dtype.itemsize
        kept = made_once(made, (transform.kernel, size), size, fill)

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, w, bias, residual = tensors
        if ordered is not None:
            w = ordered
        elif ordered_bytes and not w.is_contiguous():
            w = carve(workspace[weight_bytes + patches_bytes + own_bytes :], [Buffer(w.shape, w.dtype)])[0].copy_(w)
        elif kept is None and not inside:
            w = w.contiguous()
        bias = None if bias is None else bias.contiguous()
        patches = workspace.data_ptr() + weight_bytes
        scratch = patches + patches_bytes
        given = (
            x.data_ptr(),
            w.data_ptr(),
            (workspace if kept is None else kept).data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            patches,
            scratch,
        )
        jobs = [
            (step.kernel, (*given, step.settled.data_ptr()), step.shares, number > 0)
            for number, step in enumerate(ready.steps[done:])
        ]
        launch_all(jobs, threads)

    return call


def _ordered_once(w: Tensor, made: Made) -> Tensor:
    """A weight that stays, with its taps side by side."""
    if w.is_contiguous():
        return w

    buffers = [Buffer(w.shape, w.dtype)]

    def fill(room: Tensor) -> None:
        carve(room, buffers)[0].copy_(w)

    return carve(made_once(made, "taps in order", workspace_bytes(buffers), fill), buffers)[0]


def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    """Fill `out`."""
    bind(request, tensors)(tensors, out, workspace)


ALGORITHM = folding(Algorithm("winograd", _why_not, _cost, _error, run, fuses=True, bind=bind, pack=pack))
