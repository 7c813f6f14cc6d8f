"""What `direct` and `pointwise` share: what their kernel is told, forward and in the gradient for the input.

The problem is folded to three dimensions, (depth, rows, width), and cut into blocks (plainconv/menu/cuts.py).  The
kernel itself is in plainconv/cpu/dense.py; tables and sizes are its arguments, so that a handful of kernels serves all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import compress, product
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.cpu import compile as cpu
from plainconv.cpu import dense, gather, pack
from plainconv.cpu.launch import Job, launch_all
from plainconv.menu import cuts, engine
from plainconv.menu.axes import Axes, Axis, Work, elements, inside, work
from plainconv.menu.base import ALIGNMENT, Bound, Buffer, Cost, Made, Tensors, carve, made_once, moved_bytes
from plainconv.menu.cuts import Kind, Layout, Reads, Strip
from plainconv.menu.engine import STORED, folded, padded
from plainconv.problem import Request
from plainconv.remember import on_forget, weigh

WAY_BYTES = 128 << 10  # memory so far apart meets in the same place of a core's own cache, ...
MEETING = 4  # ... half of which may be channels that are read where they lie

# Other than a strip that is gathered.
SOURCES = {Reads.INPUT: "none", Reads.LIST: "list", Reads.LINES: "lines", Reads.IMAGES: "images"}

# -- what a call needs -----------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """How the input lies in memory: whether its places follow each other at one distance, and the distances."""

    merge: bool
    channel: int
    depth: int
    row: int
    col: int


def _places_of(work: Work, x_strides: tuple[int, ...]) -> Places:
    sizes, strides = work.spatial, x_strides[2:]
    channel = x_strides[1] if work.in_channels > 1 else 1
    if (step := engine.step_of(sizes, strides)) is not None:
        _, high, width = work.axes()
        return Places(True, channel, step * width.size * high.size, step * width.size, step)
    depth, row, col = (0,) * (3 - len(strides)) + tuple(strides)
    return Places(False, channel, depth, row, col if sizes[-1] > 1 else 1)


def _source(work: Work, x: Places) -> tuple[str, Layout]:
    """How the kernel reads the input (see `dense.Shape`), and how the request is cut then."""
    is_ = cuts.kind(work)
    way = cuts.natural(work, x.merge)
    side_by_side = x.col == 1 if is_.places else x.channel == 1 or (way.reads is Reads.INPUT and not is_.pairs)
    if way.reads is Reads.LINES:
        side_by_side &= x.col == work.group_in
    if way.reads is not Reads.STRIP and side_by_side:
        return SOURCES[way.reads], way
    if way.reads is not Reads.STRIP:
        way = cuts.layout(work, x.merge, Reads.STRIP)
    if x.channel == 1 and not is_.places:
        return "pixels", way
    _, _, width = work.axes(x.merge)
    bordered = work.mode != "zeros" and max(width.padding) > 0
    return "rows" if x.col == 1 and width.stride <= gather.PICKED_STRIDE and not bordered else "table", way


def _asks(work: Work, way: Layout, source: str) -> int:
    """How many vectors of a channel a tile asks for ahead, if rows are read where they lie, else 0 (`dense.Shape`)."""
    if source != "rows" or not cuts.in_place(work):
        return 0
    return 1 if -(-work.group_out // way.tile.scalars) >= way.tile.vectors else way.tile.vectors


def _lies_to(work: Work, x: Places, way: Layout) -> int:
    """How much of a row may be read where it lies."""
    # Of channels that are a power of two apart, many meet in the same few places of a core's own cache.
    meeting = work.group_in * math.gcd(x.channel * cuts.kind(work).size, WAY_BYTES)
    width = work.axes(x.merge)[2]
    return width.size if way.strip.slots == 1 and meeting <= MEETING * WAY_BYTES else 0


class Packing(NamedTuple):
    """A weight seen as w[o, u, v], v side by side (see plainconv/cpu/pack.py), and bytes of it packed.

    pairs   where the other number of a pair is: "near", "far" or nowhere
    across  whether output channels are side by side, packed
    beside  whether they are already, as the weight lies: then v is not
    vectors of output channels (or output channels, if they are not) of a group, made up to whole tiles
    """

    pairs: str | None
    u_count: int
    v_count: int
    u_stride: int
    v_stride: int
    far: int
    r_u: int
    r_v: int
    across: bool
    beside: bool
    vectors: int
    bytes: int

    @property
    def lay(self) -> str:
        """What the kernel does with them."""
        return "copied" if self.beside else "transposed" if self.across else "kept"


def _packing(work: Work, way: Layout, channels_inside: bool) -> Packing | None:
    """None if the weight is used as it lies: its outputs are no lanes, and its pairs are side by side."""
    lines = way.reads is Reads.LINES
    is_, turned, apart = cuts.kind(work, lines), work.turned, cuts.apart(work.axes())
    if is_.places and not (apart or (is_.pairs and (work.taps > 1 or work.group_in % 2 or turned))):
        return None
    across = apart or not is_.places  # outputs side by side
    vectors, rows = work.group_out, work.group_out
    if across:
        vectors = -(-work.group_out // way.lanes)
        vectors = vectors | 1 if is_.places else padded(vectors, way.tile.vectors)
        rows = vectors * way.lanes
    size = work.groups * rows * is_.channels * is_.taps * is_.size
    near, taps, channels = "near" if is_.pairs else None, is_.taps, is_.channels
    if not (turned or is_.places) and (channels_inside or taps == 1 or lines):
        numbers = work.group_in * work.taps // taps
        return Packing(near, taps, channels, numbers, 1, 0, channels, 1, across, False, vectors, size)
    each = work.group_out * taps if turned else taps  # from a channel to the next
    r_u, r_v = (1, channels) if across else (taps, 1)
    pairs, step = ("far", 2) if is_.pairs else (None, 1)
    v_stride = work.group_out if channels_inside else 1
    return Packing(pairs, channels, taps, step * each, v_stride, each, r_u, r_v, across, channels_inside, vectors, size)


class Packs(NamedTuple):
    """The kernel that packs a tensor, with its arguments, and the bytes of scratch memory that it fills."""

    kernel: cpu.Kernel
    sizes: tuple[int, ...]
    tasks: int
    bytes: int

    def job(self, tensor: int, scratch: int) -> Job:
        """Pack what lies there."""
        return self.kernel, (tensor, scratch, *self.sizes), self.tasks, False

    def once(self, tensor: Tensor, made: Made, threads: int) -> Tensor:
        """The same of a tensor that stays, to be kept."""

        def fill(room: Tensor) -> None:
            launch_all([self.job(tensor.data_ptr(), room.data_ptr())], engine.movers(self.bytes, threads))

        return made_once(made, (self.kernel, self.sizes), self.bytes, fill)


def _packs(shape: pack.Shape, sizes: dict[str, int], bytes_: int) -> Packs:
    """Tasks are enough for some threads, even of a single vector, or of a single u."""
    u = sizes["u_count"]
    runs = sizes["vectors"] if u == 1 or sizes["w_u"] < sizes["w_output"] else 1
    splits = u if shape.lay == "copied" else max(min(cuts.PARTS // max(sizes["groups"] * runs, 1), u), 1)
    kernel = cpu.compile(pack.text(shape), cpu.Target.host())
    sizes |= {"runs": runs, "splits": splits}
    tasks = sizes["groups"] * splits * (1 if shape.lay == "copied" else runs)
    return Packs(kernel, tuple(sizes[name] for name in pack.SIZES), tasks, padded(bytes_, ALIGNMENT))


@dataclass(frozen=True, eq=False)
class Prepared:
    """Compiled kernels with all of their arguments but the tensors'."""

    kernel: cpu.Kernel
    settled: Tensor  # where the tables are, and the sizes
    tables: Tensor
    shares: int
    weight: Packs | None
    images: Packs | None


def _taps_of_weight(work: Work, w_strides: Sequence[int]) -> list[int]:
    places = product(*map(range, work.kernel))
    return [sum(k * stride for k, stride in zip(place, w_strides[2:], strict=True)) for place in places]


@lru_cache(1024)
def prepare(work: Work, x_strides: tuple[int, ...], w_strides: tuple[int, ...], channels_inside: bool) -> Prepared:
    """The kernels, the tables and the sizes of a request whose tensors lie so in memory.

    channels_inside: whether the second dimension of the weight is innermost, for a weight that is packed.
    """
    request, target, turned = work.request, cpu.Target.host(), work.turned
    x = _places_of(work, x_strides)
    axes = depth, high, width = work.axes(x.merge)
    source, way = _source(work, x)
    lines = source == "lines"
    is_ = cuts.kind(work, lines)
    strip, tile, lanes = way.strip, way.tile, way.lanes
    by_row, by_pixel = cuts.pitches(strip, lanes, is_.size, is_.channels)
    packing = _packing(work, way, channels_inside)
    apart = cuts.apart(axes)
    shape = dense.Shape(
        element=is_.element,
        stored=STORED[request.dtype],
        native=is_.native,
        pairs=is_.pairs,
        lanes=lanes,
        over="places" if is_.places else "outputs",
        source=source,
        stride=width.stride if source == "rows" else 1,
        asks=_asks(work, way, source),
        one_tap=len(strip.taps) == work.taps == 1 and not apart and depth.step == 1,  # phases may have none
        apart=apart,
        woven=cuts.woven(axes) if is_.places else 0,
        has_bias=request.has_bias,
        has_residual=request.has_residual,
        activation=request.activation,
        scalars=tile.scalars,
        vectors=tile.vectors,
    )
    per = 2 if is_.pairs else 1
    # Of the strip: from a place to the next, and from a channel (or a pair) to the next.
    place, channel = {"none": (x.col // per, x.channel), "pixels": (by_pixel, 1)}.get(source, (1, by_row))
    pixels, x_pixel, side_by_side = math.prod(work.spatial), x.col, padded(work.batch, lanes)
    if source == "images":
        col = is_.channels * side_by_side
        x = Places(True, pixels * col // max(work.group_in, 1), width.size * high.size * col, width.size * col, col)
        channel = side_by_side
    terms, columns = is_.channels * is_.taps, tile.vectors * lanes
    w_output, w_channel = (w_strides[1], w_strides[0]) if turned else w_strides[:2]
    w_group = w_strides[0] * (work.group_in if turned else work.group_out)
    wide = packing.vectors * lanes if packing is not None and is_.places else columns  # outputs that are side by side
    factors: dict[str, int]
    if packing is None:
        w_taps = _taps_of_weight(work, w_strides)
        factors = {"b_scalar": w_output // per, "b_channel": 1 if is_.pairs else w_channel, "b_group": w_group // per}
    elif not packing.across:
        w_taps = list(range(work.taps))
        factors = {"b_scalar": terms, "b_channel": work.taps, "b_group": work.group_out * terms}
    elif is_.places:
        w_taps = [tap * is_.channels * wide for tap in range(work.taps)]
        factors = {"b_scalar": 1, "b_channel": wide, "b_group": terms * wide}
    else:
        w_taps = [tap * is_.channels * columns for tap in range(is_.taps)]
        tiles = -(-work.group_out // columns)
        factors = {"a_channel": columns, "a_tile": terms * columns, "a_group": tiles * terms * columns}
    # The weight's taps in the order of the strip's.
    _, rows, cols = (axis.taps for axis in axes)
    sizes_of = [side.kernel for side in folded(request.problem, x.merge)]
    numbers = [
        (z.number * sizes_of[1] + r.number) * sizes_of[2] + c.number for z, r, c in product(depth.taps, rows, cols)
    ]
    along = 1  # numbers for each place of a row
    if lines:
        along = work.group_in
        whole, odd = divmod(along * len(width.taps), per)
        factors |= {
            "b_scalar": width.stride * along,
            "line_row": high.stride * strip.length,
            "line_taps": len(high.taps) * whole,
            "line_alone": len(high.taps) * odd,
        }
        begins = list(zip(w_taps, strip.taps, strict=True))
        taps = [
            (a + i * columns, b + i * per)
            for part in (range(whole), range(whole, whole + odd))
            for a, b in begins
            for i in part
        ]
    elif is_.places:
        factors |= {"a_channel": channel, "a_tile": columns}
        taps = [(shift * place, w_taps[number]) for shift, number in zip(strip.taps, numbers, strict=True)]
    else:
        factors |= {"b_scalar": place, "b_channel": channel}
        taps = [(w_taps[number], shift * place) for shift, number in zip(strip.taps, numbers, strict=True)]
    blocks = -(-high.out // way.rows), -(-width.out // way.cols)
    strip_bytes, share_bytes = _share(is_, way, source, by_row, by_pixel)
    made = depth.made * high.made * width.made
    planes = work.groups * (1 if source == "images" else work.batch)
    y_place = 1 if is_.places else work.out_channels
    sizes = {
        **dict.fromkeys(dense.SIZES, 0),
        "tasks": planes * depth.made * math.prod(blocks) * way.parts,
        "shares": way.shares,
        "share": share_bytes // is_.size,
        "entries": strip_bytes // is_.size,
        "planes": planes,
        "images": work.batch,
        "groups": work.groups,
        "group_in": work.group_in,
        "group_out": work.group_out,
        "x_image": x_strides[0],
        "x_channel": x.channel,
        "x_depth": x.depth,
        "x_row": x.row,
        "x_col": x.col,
        "ahead": _ahead(work, x, x_strides[0], way, (high, width)),
        "in_width": width.size * along,
        "lies_to": _lies_to(work, x, way),
        "y_image": work.out_channels * made,
        "y_channel": made if is_.places else 1,
        "y_place": y_place,
        "y_depth": high.made * width.made * y_place,
        "y_row": high.step * width.made * y_place,
        "y_col": width.step * y_place,
        "out_rows": high.out,
        "out_width": width.out,
        "made_width": width.made,
        "stride_depth": len(depth.taps),
        "stride_rows": high.stride,
        "stride_cols": width.stride * along,
        "lo": width.padding[0] * along,
        "block_rows": way.rows,
        "block_cols": way.cols,
        "row_blocks": blocks[0],
        "col_blocks": blocks[1],
        "parts": way.parts,
        "phase_count": len(cuts.phases(axes)),
        "slot_count": strip.slots,
        "slot_length": strip.length,
        "pitch": by_pixel if source == "pixels" else by_row,
        **factors,
    }
    zeros = work.group_in * request.dtype.itemsize if source == "list" else 0
    tables, addresses = _tables(work.mode, axes, way, source, taps, zeros, y_place)
    weight, images = None, None
    if packing is not None:
        pack_shape = pack.Shape(is_.element, STORED[request.dtype], is_.native, lanes, packing.pairs, packing.lay)
        pack_sizes = {
            "groups": work.groups,
            "outputs": work.group_out,
            "vectors": packing.vectors,
            "u_count": packing.u_count,
            "v_count": packing.v_count,
            "v_numbers": packing.u_stride if packing.pairs == "near" else 0,
            "w_group": w_group,
            "w_output": w_output,
            "w_u": packing.u_stride,
            "w_v": packing.v_stride,
            "w_far": packing.far,
            "alone": packing.u_count - 1 if work.group_in % 2 else -1,
            "r_u": packing.r_u,
            "r_v": packing.r_v,
            "width": wide,
        }
        weight = _packs(pack_shape, pack_sizes, packing.bytes)
    if source == "images":
        pack_shape = pack.Shape(
            is_.element, STORED[request.dtype], is_.native, lanes, "near" if is_.pairs else None, "transposed"
        )
        pack_sizes = {
            "groups": work.groups,
            "outputs": work.batch,
            "vectors": side_by_side // lanes,
            "u_count": pixels,
            "v_count": is_.channels,
            "v_numbers": work.group_in,
            "w_group": work.group_in,
            "w_output": x_strides[0],
            "w_u": x_pixel,
            "w_v": 1,
            "w_far": 0,
            "alone": -1,
            "r_u": is_.channels,
            "r_v": 1,
            "width": side_by_side,
        }
        images = _packs(pack_shape, pack_sizes, cuts.images_bytes(work, lanes))
    ready = Prepared(
        cpu.compile(dense.text(shape), target),
        torch.tensor([*addresses, *(sizes[name] for name in dense.SIZES)]),
        tables,
        way.shares,
        weight,
        images,
    )
    weigh(ready, tables.nbytes)
    return ready


on_forget(prepare.cache_clear)


def _ahead(work: Work, x: Places, image: int, way: Layout, sides: tuple[Axis, Axis]) -> int:
    """From what a block reads to what the next task's does, in elements of the input."""
    if work.groups > 1:
        return work.group_in * x.channel
    if work.batch > 1:
        return image
    high, width = sides
    return way.rows * high.stride * x.row if way.rows < high.out else way.cols * width.stride * x.col


def _tables(
    mode: str, axes: Axes, way: Layout, source: str, taps: list[tuple[int, int]], zeros: int, y_place: int
) -> tuple[Tensor, tuple[int, ...]]:
    """The tables of the kernel, one behind the other, and where each begins; those that it does not read are empty."""
    depth, high, width = axes
    blocks = -(-high.out // way.rows), -(-width.out // way.cols)
    rows = (blocks[0] * way.rows - 1) * high.stride + high.reach + 1
    cols = (blocks[1] * way.cols + way.strip.length + way.lanes) * width.stride + width.reach + 1
    read = {"none": 0, "rows": 2, "lines": 2}.get(source, 3)
    phases: list[tuple[int, ...]] = []
    places = torch.zeros(0, dtype=torch.int64)
    apart = cuts.apart(axes)
    if apart:
        taps, phases, places = _scattered(axes, way, taps, y_place)
    each = 1 if apart or source == "lines" else len(taps) // max(len(depth.taps), 1)
    numbers = [
        *(way.strip.rows(), taps, _reach(mode, depth, way.strip, each)),
        *(phases, elements(depth, mode) if read else []),
    ]
    parts = [
        *(torch.tensor(table, dtype=torch.int64).flatten() for table in numbers),
        engine.shown(high, mode, 0, rows if read else 0),
        engine.shown(width, mode, 0, cols if read == 3 else 0),
        places,
        torch.zeros(-(-zeros // 8), dtype=torch.int64),
    ]
    return engine.joined(parts)


def _scattered(
    axes: Axes, way: Layout, taps: list[tuple[int, int]], y_place: int
) -> tuple[list[tuple[int, int]], list[tuple[int, ...]], Tensor]:
    """Taps phase by phase, the phases (see `dense.PHASE`), and where the places of a block are from its corner on.

    A phase may have a column less than the first one, and then nothing for the last place of a whole row.
    """
    depth, high, width = axes
    of_all = list(product(depth.taps, high.taps, width.taps))
    by_phase: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for tap, (_, r, c) in zip(taps, of_all, strict=True):
        by_phase.setdefault((r.phase, c.phase), []).append(tap)
    found: list[tuple[int, int]] = []
    phases: list[tuple[int, ...]] = []
    whole = way.cols == width.out
    lengths = (width.out, width.out - 1) if whole else (width.out,)
    for row, col in cuts.phases(axes):
        begin = len(found)
        found += by_phase.get((row, col), [])
        each = (len(found) - begin) // max(len(depth.taps), 1)
        count = width.places(col)
        table = lengths.index(count) * way.rows * way.cols if whole else 0
        first = (row * width.made + col) * y_place
        phases.append((begin, each, first, high.places(row), width.out if whole else count, table))
    place = torch.arange(way.rows).view(-1, 1) * (high.step * width.made) + torch.arange(way.cols) * width.step
    place *= y_place
    there = [place.where(torch.arange(way.cols) < length, -1).flatten() for length in lengths]
    return found, phases, torch.cat([*there, torch.full((way.lanes,), -1)])


def _reach(mode: str, depth: Axis, strip: Strip, each: int) -> list[list[int]]:
    """For each depth of the output, which taps and rows of the strip are not wholly in the padding.

    each: taps of rows and width, in what is counted
    """
    reach = []
    for first, count in inside(depth, mode):
        shows = [first <= z < first + count for z, *_ in strip.runs]
        begin = sum(run[-1] for run in strip.runs[: shows.index(True)]) if True in shows else 0
        reach.append([first * each, count * each, begin, sum(run[-1] for run in compress(strip.runs, shows))])
    return reach


def _share(is_: Kind, way: Layout, source: str, by_row: int, by_pixel: int) -> tuple[int, int]:
    """Bytes of a strip, and of all scratch memory of a thread: the strip and the list of what to copy."""
    if source == "none":
        return 0, 0
    rows, length = way.strip.slots, way.strip.length
    if source in ("list", "images"):
        return 0, padded(8 * rows * length, ALIGNMENT)
    if source == "lines":
        strip, pixels = cuts.lines_bytes(is_, way.strip, way.lanes), False
    else:
        pixels = source == "pixels"
        strip = padded((rows * length * by_pixel if pixels else is_.channels * by_row) * is_.size, ALIGNMENT)
    copies = rows * (length if pixels else -(-length // way.lanes))
    return strip, strip + padded(8 * copies * gather.MOST_FIELDS, ALIGNMENT)


@lru_cache(4096)
def workspace_bytes(work: Work) -> int:
    """Scratch memory for tensors that lie in any way."""
    ways = {
        way(work, merge) for merge in (True, False) for way in (cuts.natural, partial(cuts.layout, reads=Reads.STRIP))
    }
    most = 0
    for way in ways:
        is_ = cuts.kind(work, way.reads is Reads.LINES)
        pitches = cuts.pitches(way.strip, way.lanes, is_.size, is_.channels)
        sources = {
            Reads.STRIP: ("rows", "pixels"),
            Reads.INPUT: ("none",),
            Reads.LIST: ("list",),
            Reads.LINES: ("lines",),
            Reads.IMAGES: ("images",),
        }[way.reads]
        share = max(_share(is_, way, source, *pitches)[1] for source in sources)
        packing = _packing(work, way, False)
        packed = [packing.bytes] if packing and not work.request.packed else []
        if way.reads is Reads.LINES and not work.request.packed:
            packed.append(math.prod(work.request.problem.weight_shape) * work.request.dtype.itemsize)  # put in order
        if way.reads is Reads.IMAGES:
            packed.append(cuts.images_bytes(work, way.lanes))
        most = max(most, way.shares * share + sum(padded(bytes_, ALIGNMENT) for bytes_ in packed))
    return most


def cost(request: Request) -> Cost:
    """Cycles of the kernel, or memory, whichever is longer, and the call."""
    seen, problem = work(request), request.problem
    way = cuts.natural(seen)
    packing = _packing(seen, way, False)
    moved = moved_bytes(request)
    cycles = way.cycles * _real(seen)
    if packing and not request.packed:
        cycles += (
            2
            * packing.bytes
            / (cuts.FAR_BYTES if packing.bytes > cuts.FAR_WEIGHT else cuts.NEAR_BYTES)
            / max(request.threads, 1)
        )
    seconds = (
        max(cycles / cuts.CYCLES_PER_SECOND, moved / (cuts.CACHED if moved < cuts.CACHE else cuts.BYTES_PER_SECOND))
        + cuts.LAUNCH_S
    )
    return Cost(problem.multiplies, moved, workspace_bytes(seen), seconds + cuts.THREADS_S * (way.shares > 1))


def _real(work: Work) -> float:
    """The share of a kernel's depth that is not in the padding."""
    depth = work.axes()[0]
    return sum(count for _, count in inside(depth, work.mode)) * depth.step / max(len(depth.taps) * depth.made, 1)


def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    """Fill `out`."""
    bind(request, tensors)(tensors, out, workspace)


def bind(request: Request, tensors: Tensors, made: Made | None = None) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these; made: see Algorithm.pack."""
    seen = work(request)
    x, w, bias, _ = tensors
    lines = _source(seen, _places_of(seen, x.stride()))[0] == "lines"
    is_ = cuts.kind(seen, lines)
    across = not is_.places or cuts.apart(seen.axes())
    inside_out = w.movedim(1, -1).is_contiguous()
    channels_inside = lines or (across and (seen.turned or not w.is_contiguous()) and inside_out)
    packs = is_.pairs or across
    copies_w = not inside_out if lines else packs and not channels_inside and not w.is_contiguous()
    copies_bias = bias is not None and not bias.is_contiguous()

    def ordered(w: Tensor) -> Tensor:
        return w.movedim(1, -1).contiguous().movedim(-1, 1) if lines else w.contiguous()

    w_strides = ordered(w).stride() if copies_w else w.stride()
    ready = prepare(seen, x.stride(), w_strides, channels_inside)
    settled, places = ready.settled.data_ptr(), is_.places
    packs_w, kept = ready.weight, None
    if made is not None and packs_w is not None:
        kept = packs_w.once(ordered(w) if copies_w else w, made, request.threads)
        packs_w, copies_w = None, False
    in_order = [Buffer((len(w), *w.shape[2:], w.shape[1]), w.dtype)] if lines and copies_w else []
    begin = sum(buffer.bytes for buffer in in_order)
    packed = sum(packs.bytes for packs in (packs_w, ready.images) if packs is not None)
    threads = request.threads if ready.shares > 1 else engine.movers(packed, request.threads)

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, w, bias, residual = tensors
        if in_order:
            w = carve(workspace, in_order)[0].movedim(-1, 1).copy_(w)
        elif copies_w:
            w = w.contiguous()
        if copies_bias and bias is not None:
            bias = bias.contiguous()
        scratch, weight = workspace.data_ptr() + begin, (w if kept is None else kept).data_ptr()
        pixels = x.data_ptr()
        jobs: list[Job] = []
        if packs_w is not None:
            jobs.append(packs_w.job(weight, scratch))
            weight, scratch = scratch, scratch + packs_w.bytes
        if ready.images is not None:
            jobs.append(ready.images.job(pixels, scratch))
            pixels, scratch = scratch, scratch + ready.images.bytes
        pointers = (
            pixels,
            weight,
            weight if places else pixels,
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            scratch,
            settled,
        )
        jobs.append((ready.kernel, pointers, ready.shares, bool(jobs)))
        launch_all(jobs, threads)

    return call
