"""How `fft` runs single channels in channels_last: two-dimensional transforms, lanes are channels.

A tile reads F places along each of the two dimensions and makes those of its outputs that have not wrapped; the kernel
costs what a kernel of one tap would (see plainconv/cpu/spectral.py).  Along a dimension of which one tile makes all
outputs, F may be shorter than what they read: places n and n + F are one, and that is no harm where both show padding
(or, in a circular border, the same element).  So 56 outputs of 31 taps, 15 places of padding before and behind, need 71
places and not 86.

Both directions are one: the gradient for the input reads the output, spread by the stride, and the kernel turned round.
Strides and dilation are places that show nothing.

Cost: about 5 F_h F_w log2(F_h F_w) operations for each tile of each channel, and once more for the kernel.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from plainconv.cpu import compile as cpu
from plainconv.cpu import spectral
from plainconv.cpu.launch import Job, launch_all
from plainconv.menu import engine
from plainconv.menu.base import (
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
from plainconv.menu.engine import STORED
from plainconv.problem import Direction, Request
from plainconv.remember import on_forget, weigh

# Measured on one core with AVX-512.
CYCLES_PER_SECOND = 3.66e9
PLACE = 2.5  # cycles of a pass of a transform, for each vector of complex numbers and halving of their count ...
PASS = 50.0  # ... and besides
BYTES_PER_SECOND = 25e9  # memory, all threads

LENGTHS = tuple(spectral.FACTORS)
MOST_LENGTHS = 2  # that are tried for a line longer than any tile


def why_not(request: Request) -> str | None:
    """The sentence for what this kernel does not serve."""
    problem = request.problem
    if sentence := engine.why_not_transformed(request):
        return sentence
    if not request.channels_last or problem.dims != 2 or (problem.group_in, problem.group_out) != (1, 1):
        return "it is for pictures in channels_last whose channels do not meet"
    if any((side.kernel - 1) * side.dilation + 1 >= max(LENGTHS) for side in engine.folded(problem, False)):
        return f"it is for kernels that span fewer than {max(LENGTHS)} places"
    return None


# -- places ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Line:
    """One dimension.

    shown  [places + extent - 1], the element of what is read that each place shows, or -1
    made   [places], the element of the result that a place is, or -1
    taps   [extent], the tap that stands at a place of the kernel, or -1
    """

    shown: Tensor
    made: Tensor
    taps: Tensor

    def outputs(self, length: int) -> int:
        """Places that a tile of this length makes; 0 if there can be none."""
        places, extent, span = len(self.made), len(self.taps), len(self.shown)
        wraps = max(span - length, 0)
        if max(places, extent) <= length and torch.equal(self.shown[:wraps], self.shown[span - wraps :]):
            return max(places, 1)
        return max(length - extent + 1, 0)

    def live(self, length: int) -> tuple[int, int]:
        """Places of all tiles that show an element, and places that are one of the result."""
        tiles = self.tiles(length)
        return int((tiles[0] >= 0).sum()), int((tiles[1] >= 0).sum())

    def tiles(self, length: int) -> tuple[Tensor, Tensor]:
        """[tile, length] of what is shown, and of what is made."""
        outputs = self.outputs(length)
        count = -(-len(self.made) // outputs)
        places = torch.arange(count).view(-1, 1) * outputs + torch.arange(length)
        made = _picked(self.made, places)
        made[:, outputs:] = -1
        return _picked(self.shown, places), made


def _picked(elements: Tensor, places: Tensor) -> Tensor:
    behind = torch.cat([elements, elements.new_full((1,), -1)])
    return behind[places.clamp(max=len(elements))]


@lru_cache(64)
def lines(request: Request) -> tuple[Line, Line]:
    """Rows and width."""
    problem = request.problem
    _, *sides = engine.folded(problem, False)
    found = []
    for side in sides:
        taps = torch.full(((side.kernel - 1) * side.dilation + 1,), -1, dtype=torch.int64)
        taps[:: side.dilation] = torch.arange(side.kernel)
        every = torch.arange(side.out) * side.stride
        if request.direction is Direction.FORWARD:
            made = torch.full((max((side.out - 1) * side.stride + 1, 0),), -1, dtype=torch.int64)
            made[every] = torch.arange(side.out)
            shown = engine.shown(side, problem.padding_mode, 0, len(made) + len(taps) - 1)
        else:
            # Place p of the padded output meets the turned kernel's first tap where the result has its element p.
            made, taps = torch.arange(side.size), taps.flip(0)
            shown = torch.full((side.size + len(taps) - 1,), -1, dtype=torch.int64)
            at = every + (len(taps) - 1 - side.padding[0])
            inside = (at >= 0) & (at < len(shown))
            shown[at[inside]] = torch.arange(side.out)[inside]
        found.append(Line(shown, made, taps))
    return found[0], found[1]


@lru_cache(4096)
def lengths(request: Request) -> tuple[int, int]:
    """F_h and F_w of least estimated time."""
    rows, width = lines(request)
    return min(itertools.product(_able(rows), _able(width)), key=lambda pair: (_cycles(request, pair), pair))


def _able(line: Line) -> list[int]:
    """What F may be.  Lines longer than any tile have but two, by their taps: a new size needs no new kernel."""
    able, extent = [n for n in LENGTHS if line.outputs(n)], len(line.taps)
    if line.outputs(LENGTHS[-1]) >= len(line.made):
        return able
    return sorted(able, key=lambda n: n * math.log2(n) / max(n - extent + 1, 1))[:MOST_LENGTHS]


# -- estimates -------------------------------------------------------------------------------------------------------


def _lanes(request: Request) -> int:
    size, channels = request.dtype.itemsize, request.problem.in_channels
    widest, least = cpu.Target.host().bits // 8 // size, 16 // size
    return min(widest, max(least, 1 << (channels - 1).bit_length()))


def _blocks(request: Request) -> int:
    return -(-request.problem.in_channels // _lanes(request))


def _passes(request: Request, pair: tuple[int, int]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Passes of transforms along rows and along columns, of one image and of a kernel that is not transformed yet."""
    (high, wide), (rows, width) = pair, lines(request)
    shown, made = rows.live(high)
    down, across = (
        -(-len(line.made) // line.outputs(length)) for line, length in zip((rows, width), pair, strict=True)
    )
    columns = spectral.columns(wide)
    weight = (0, 0) if request.packed else (len(rows.taps), 2 * columns)
    return (across * (shown + made), 4 * across * down * columns), weight


def _cycles(request: Request, pair: tuple[int, int]) -> float:
    """Of one thread."""
    high, wide = (PLACE * length * math.log2(length) + PASS for length in pair)
    image, weight = (along * wide + across * high for along, across in _passes(request, pair))
    register = _lanes(request) * request.dtype.itemsize / 64
    return register * _blocks(request) * (request.problem.batch * image + weight)


def cost(request: Request) -> Cost:
    """Of a request that `why_not` lets through."""
    pair, threads = lengths(request), max(request.threads, 1)
    moved = moved_bytes(request)
    (image, down), (taps, columns) = _passes(request, pair)
    images, (high, wide) = request.problem.batch, pair
    seconds = _cycles(request, pair) / CYCLES_PER_SECOND / threads + moved / BYTES_PER_SECOND
    multiplies = 4 * ((images * image + taps) * wide + (images * down + columns) * high) * request.problem.in_channels
    return Cost(int(multiplies), moved, workspace_bytes(_buffers(request)), seconds + engine.launches_s(threads))


def error(request: Request) -> float:
    """Of the transforms, whose numbers are as large as a tile's largest."""
    pair, problem = lengths(request), request.problem
    area = math.prod(pair)
    return 6 * math.log2(area) * math.sqrt(area / problem.taps) + summation_error(problem.terms(request.direction))


def _spectra(request: Request) -> Buffer:
    """Of the kernel."""
    high, wide = lengths(request)
    return Buffer((_blocks(request), spectral.columns(wide), high, 2, _lanes(request)), request.dtype)


def _buffers(request: Request) -> tuple[Buffer, Buffer]:
    """The kernel's spectra, unless they were made once, and scratch memory of each thread."""
    (high, wide), lanes, spectra = lengths(request), _lanes(request), _spectra(request)
    each = high // 2 * (wide + 1) * 2 * lanes + engine.padded(request.problem.taps, lanes) * lanes
    kept = Buffer((0,), request.dtype) if request.packed else spectra
    return kept, Buffer((max(request.threads, 1), each), request.dtype)


# -- a call ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prepared:
    """Two kernels, and the tables that each reads."""

    weight: cpu.Kernel
    image: cpu.Kernel
    of_weight: tuple[Tensor, ...]
    of_image: tuple[Tensor, ...]
    tiles: tuple[int, int]


def _roots(length: int, dtype: torch.dtype) -> Tensor:
    """[b, k_a, 2], the b k_a-th powers of the root of unity."""
    a, b = spectral.FACTORS[length]
    powers = torch.outer(torch.arange(b), torch.arange(a)) % length
    angles = powers.double() * (-2 * math.pi / length)
    return torch.stack([angles.cos(), angles.sin()], -1).to(dtype)


@lru_cache(1024)
def prepare(request: Request, spread: bool) -> Prepared:
    """Compiled kernels and tables; a call only adds what belongs to its tensors."""
    pair, both, target = lengths(request), lines(request), cpu.Target.host()
    image = spectral.Shape(
        element=STORED[request.dtype],
        lanes=_lanes(request),
        lengths=pair,
        weight=False,
        spread=spread,
        mask=request.problem.in_channels < _lanes(request),
        has_bias=request.has_bias,
    )
    weight = dataclasses.replace(image, weight=True, spread=False, has_bias=False)
    (row_shown, row_made), (width_shown, width_made) = (
        line.tiles(length) for line, length in zip(both, pair, strict=True)
    )
    taps = (_picked(line.taps, torch.arange(length)) for line, length in zip(both, pair, strict=True))
    always = (_roots(pair[0], request.dtype), _roots(pair[1], request.dtype), torch.zeros(64, dtype=request.dtype))
    nothing = torch.empty(0, dtype=torch.int64)
    ready = Prepared(
        weight=cpu.compile(spectral.text(weight), target),
        image=cpu.compile(spectral.text(image), target),
        of_weight=(*taps, nothing, nothing, *always),
        of_image=(row_shown, width_shown, row_made, width_made, *always),
        tiles=(len(row_made), len(width_made)),
    )
    weigh(ready, sum(table.nbytes for table in (*ready.of_weight, *ready.of_image)))
    return ready


on_forget(prepare.cache_clear)


def bind(request: Request, tensors: Tensors, made: Made | None = None) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these; made: see Algorithm.pack."""
    problem, threads, blocks, lanes = request.problem, max(request.threads, 1), _blocks(request), _lanes(request)
    _, c, rows, width = problem.shape_of(request.direction.makes)
    image, channel, row, pixel = tensors.first.stride()
    ready = prepare(request, c > 1 and channel != 1)
    buffers = _buffers(request)
    room, taps, tasks = buffers[1].shape[1], problem.taps, blocks * problem.batch * math.prod(ready.tiles)

    source = (image, row, pixel, channel, rows * width * c, width * c, c)
    image_sizes = (*source, c, problem.batch, *ready.tiles, taps, tasks, min(threads, tasks), room)
    of_taps = (0, problem.kernel[1] * lanes, lanes, taps, 0, 0, 0)
    weight_sizes = (*of_taps, c, 1, 1, 1, taps, blocks, min(threads, blocks), room)
    of_image, of_weight = ([table.data_ptr() for table in tables] for tables in (ready.of_image, ready.of_weight))

    def transform(w: Tensor, spectra: Tensor, scratch: Tensor) -> Job:
        given = (w.data_ptr(), spectra.data_ptr(), scratch.data_ptr(), 0, 0)
        return ready.weight, (*given, *of_weight, *weight_sizes), min(threads, blocks), False

    kept = None
    if made is not None:

        def fill(spectra: Tensor) -> None:
            scratch = torch.empty(buffers[1].shape, dtype=buffers[1].dtype)
            launch_all([transform(tensors.second.contiguous(), spectra, scratch)], threads)

        size = _spectra(request).bytes
        kept = made_once(made, (ready.weight, size), size, fill)

    def call(tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
        x, w, bias, _ = tensors
        spectra, scratch = carve(workspace, buffers)
        w, bias = w.contiguous(), None if bias is None else bias.contiguous()
        jobs = [] if kept is not None else [transform(w, spectra, scratch)]
        spectra = spectra if kept is None else kept
        added = 0 if bias is None else bias.data_ptr()
        given = (x.data_ptr(), spectra.data_ptr(), scratch.data_ptr(), added, out.data_ptr())
        launch_all([*jobs, (ready.image, (*given, *of_image, *image_sizes), min(threads, tasks), True)], threads)

    return call
