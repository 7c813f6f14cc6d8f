"""FFT: sliding becomes multiplying, frequency by frequency.

For one row, y[t] = sum over k of x[t + k] w[k] is a correlation; its discrete Fourier transform is a product,

    FORWARD       Y(f) = sum over c of  X(f) W*(f)          with  W* = conj(F(conj(w))),  the transform backwards
    GRAD_INPUT    X(f) = sum over o of  Y(f) W(f)
    GRAD_WEIGHT   W(f) = sum over n of  X(f) Y*(f)

so a kernel of any size costs the same.  The sum over channels is one small matrix product for each frequency.
A transform of length F makes the row circular; only the first T = F - K + 1 outputs, K = (k-1)*dilation + 1, have not
wrapped.  So the output is cut into tiles of T: a tile reads F input places (overlap-save), and its adjoint adds F
places back (overlap-add).  Memory is a few tiles, however large the image.  A stride keeps every s-th output of a tile.
Tiles are transformed some together, like images of a batch: a call finds its roots of unity anew.

Where the engine is estimated to be quicker, it does the same: with short rows in registers, fourier.py, or for single
channels in channels_last in two dimensions at once, spectral.py.

Cost: F log F for each channel of each tile, and n * o * c/g * F multiplies; the error grows with log F, but is
relative to the largest sum (or product) of a tile, not to each.  A NaN or infinity spreads over its tile.
Source: Stockham, "High-speed convolution and correlation" (1966); Mathieu, Henaff and LeCun, arXiv:1312.5851 (2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import product
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from plainconv.border import Index, Run, gather, inner, runs, scatter_add
from plainconv.menu import fourier, spectral
from plainconv.menu.base import (
    INTEGERS,
    Algorithm,
    Bound,
    Buffer,
    Cost,
    Made,
    Tensors,
    carve,
    compute_dtype,
    machine,
    may_be_rounded,
    product_seconds,
    summation_error,
    workspace_bytes,
)
from plainconv.menu.strips import keeps_sums
from plainconv.problem import Direction, Request

TILE_ELEMENTS = 1 << 16  # a tile of one channel, at most, unless the kernel alone is larger
LINE = 1 << 13  # the same in one dimension, where shorter transforms stay in the first cache, ...
SPANS = 4  # ... or so many kernels, of which a tile keeps three quarters, ...
EVEN = 16  # ... and a multiple of this: MKL takes twice as long, and more, for powers of 3
TOGETHER = 1 << 19  # elements of tiles that are transformed in one call, which first finds its roots of unity
MEASURED = 0.475  # seconds over estimated ones, in the direction and the type in which they were
# Single channels in one dimension, in seconds of one core:
ROOTS = 4e-9  # of a call, for each place of a transform
PLACE = 0.11e-9  # of a place, for each halving of the transform
PRODUCT = 0.3e-9  # of a place of a product of spectra
COPIED = 0.4e-9  # of a place, to fill a tile or empty it
ENGINE = (fourier, spectral)  # ways to do it there
MATRIX_TERMS = 12  # from here a matrix product for each frequency pays for the rearranging it needs


class _Tiles(NamedTuple):
    """transform: F for each dimension; outputs: how many outputs a tile keeps; images, and tiles of each: how many go
    together."""

    transform: tuple[int, ...]
    outputs: tuple[int, ...]
    images: int
    tiles: int
    buffers: tuple[Buffer, ...]


class _Tile(NamedTuple):
    """made: the places of the output; kept: where in the tile they are; shown: what each place of the tile reads."""

    made: Index
    kept: Index
    shown: list[tuple[Run, ...]]


def _tile(request: Request, tiles: _Tiles, corner: Sequence[int]) -> _Tile:
    problem = request.problem
    counts = [min(t, o - at) for t, o, at in zip(tiles.outputs, problem.out, corner, strict=True)]
    sides = zip(problem.spatial, problem.padding, corner, problem.stride, tiles.transform, strict=True)
    return _Tile(
        inner(slice(at, at + count) for at, count in zip(corner, counts, strict=True)),
        inner(slice(0, (count - 1) * s + 1, s) for count, s in zip(counts, problem.stride, strict=True)),
        [runs(size, pair, problem.padding_mode, at * s, f) for size, pair, at, s, f in sides],
    )


@lru_cache(4096)
def fast_length(least: int) -> int:
    """The smallest length of at least `least` whose only prime factors are 2, 3 and 5."""
    best = 1 << max(least - 1, 0).bit_length()
    fives = 1
    while fives < best:
        odd = fives
        while odd < best:
            best = min(best, odd << max(-(-least // odd) - 1, 0).bit_length())
            odd *= 3
        fives *= 5
    return best


def _transform(extent: int, outputs: int, stride: int, limit: int, even: int) -> int:
    """The length F, a multiple of `even`, of least work for `outputs` places under a kernel that spans `extent`."""

    def fast(least: int) -> int:
        return even * fast_length(-(-least // even))

    if outputs == 1:
        return fast(extent)
    whole = fast((outputs - 1) * stride + extent)
    candidates = {whole} if whole <= limit else set()
    length = fast(max(extent + stride - 1, limit // 2))  # shorter tiles would be all overhead
    while length < whole and length <= max(limit, 2 * extent + stride):
        candidates.add(length)
        length = fast(length + max(1, length // 8))

    def work(length: int) -> tuple[float, int]:
        kept = (length - extent) // stride + 1
        return -(-outputs // kept) * length * math.log2(length + 1), length

    return min(candidates or {min(whole, fast(extent + stride - 1))}, key=work)


@lru_cache(1024)
def _tiles(request: Request) -> _Tiles:
    problem, dtype = request.problem, compute_dtype(request.dtype)
    extents = [(k - 1) * d + 1 for k, d in zip(problem.kernel, problem.dilation, strict=True)]
    limit, even = max(16, round(TILE_ELEMENTS ** (1 / problem.dims))), 1
    if problem.dims == 1:
        limit, even = max(LINE, SPANS * extents[0]), EVEN
    while True:
        sides = zip(extents, problem.out, problem.stride, strict=True)
        transform = tuple(_transform(extent, out, stride, limit, even) for extent, out, stride in sides)
        tiles = _with_buffers(request, dtype, extents, transform)
        if workspace_bytes(tiles.buffers) <= request.max_workspace // 2 or limit <= 16:
            return tiles
        limit //= 2


def _with_buffers(request: Request, dtype: torch.dtype, extents: list[int], transform: tuple[int, ...]) -> _Tiles:
    problem = request.problem
    sides = zip(transform, extents, problem.stride, problem.out, strict=True)
    outputs = tuple(min((f - extent) // s + 1, out) for f, extent, s, out in sides)
    half = (*transform[:-1], transform[-1] // 2 + 1)
    spectrum = transform if dtype.is_complex else half
    frequency = (
        dtype if dtype.is_complex else torch.complex(torch.empty(0, dtype=dtype), torch.empty(0, dtype=dtype)).dtype
    )
    channels = problem.in_channels + problem.out_channels
    an_image = channels * (math.prod(transform) * dtype.itemsize + math.prod(spectrum) * frequency.itemsize)
    sums = math.prod(problem.input_shape[1:]) * dtype.itemsize if keeps_sums(request) else 0
    images = max(1, min(problem.batch, (request.max_workspace // 8) // max(an_image + sums, 1), 4096))
    count = math.prod(-(-o // t) for o, t in zip(problem.out, outputs, strict=True))
    room = min(TOGETHER // max(channels * math.prod(transform), 1), request.max_workspace // 8 // max(an_image, 1))
    tiles = max(1, min(count, room // images))
    rows = images * tiles
    buffers = [
        Buffer((rows, problem.in_channels, *transform), dtype),
        Buffer((rows, problem.out_channels, *transform), dtype),
        Buffer((problem.out_channels, problem.group_in, *transform), dtype),
        Buffer((rows, problem.in_channels, *spectrum), frequency),
        Buffer((rows, problem.out_channels, *spectrum), frequency),
        Buffer((problem.out_channels, problem.group_in, *spectrum), frequency),
    ]
    if keeps_sums(request):
        buffers.append(Buffer((images, problem.in_channels, *problem.spatial), dtype))
    return _Tiles(transform, outputs, images, tiles, tuple(buffers))


def _to_frequencies(tensor: Tensor, dims: int, out: Tensor, mirrored: bool = False) -> None:
    """F(tensor), or conj(F(conj(tensor))), which is the transform run backwards."""
    axes = tuple(range(-dims, 0))
    if not tensor.is_complex():
        torch.fft.rfftn(tensor, dim=axes, out=out)
        if mirrored:
            torch.conj_physical(out, out=out)
    elif mirrored:
        torch.fft.ifftn(tensor, dim=axes, norm="forward", out=out)
    else:
        torch.fft.fftn(tensor, dim=axes, out=out)


def _from_frequencies(spectrum: Tensor, out: Tensor, dims: int) -> None:
    axes = tuple(range(-dims, 0))
    if out.is_complex():
        torch.fft.ifftn(spectrum, dim=axes, out=out)
    else:
        torch.fft.irfftn(spectrum, s=out.shape[-dims:], dim=axes, out=out)


def _run_in_tensors(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    problem, direction, dims = request.problem, request.direction, request.problem.dims
    tiles = _tiles(request)
    x_tiles, y_tiles, w_tile, x_spectra, y_spectra, w_spectrum, *sums = carve(workspace, tiles.buffers)
    role = {direction.given[0]: tensors.first, direction.given[1]: tensors.second, direction.makes: out}
    x, w, y, bias = role["x"], role["w"], role["y"], tensors.bias
    taps = inner(slice(0, (k - 1) * d + 1, d) for k, d in zip(problem.kernel, problem.dilation, strict=True))
    mirrored = direction is Direction.FORWARD

    if direction is Direction.GRAD_WEIGHT:
        w_spectrum.zero_()
    else:
        w_tile.zero_()
        w_tile[taps].copy_(w)
        _to_frequencies(w_tile, dims, w_spectrum, mirrored)
    ws = w_spectrum.unflatten(0, (problem.groups, -1))  # [g, o, c, *f]

    corners = product(*(range(0, o, t) for o, t in zip(problem.out, tiles.outputs, strict=True)))
    every = [_tile(request, tiles, corner) for corner in corners]
    for begin in range(0, problem.batch, tiles.images):
        some = slice(begin, min(begin + tiles.images, problem.batch))
        m = some.stop - some.start
        if direction is Direction.GRAD_INPUT:
            total = sums[0][:m] if sums else x[some]
            total.zero_() if bias is None else total.copy_(bias.view(-1, *(1,) * dims).expand_as(total))
        for at in range(0, len(every), tiles.tiles):
            near = every[at : at + tiles.tiles]
            rows = len(near) * m
            x_tile, y_tile, x_spectrum, y_spectrum = x_tiles[:rows], y_tiles[:rows], x_spectra[:rows], y_spectra[:rows]
            xs = x_spectrum.unflatten(1, (problem.groups, -1)).transpose(0, 1)  # [g, n, c, *f]
            ys = y_spectrum.unflatten(1, (problem.groups, -1)).transpose(0, 1)  # [g, n, o, *f]

            if direction is not Direction.GRAD_INPUT:
                for tile, part in zip(near, x_tile.split(m), strict=True):
                    gather(x[some], tile.shown, part)
                _to_frequencies(x_tile, dims, x_spectrum)
            if direction is not Direction.FORWARD:
                y_tile.zero_()
                for tile, part in zip(near, y_tile.split(m), strict=True):
                    part[tile.kept].copy_(y[some][tile.made])
                _to_frequencies(y_tile, dims, y_spectrum, direction is Direction.GRAD_WEIGHT)

            if direction is Direction.FORWARD:
                y_spectrum.zero_()
                _add_products(ys, xs, ws.transpose(1, 2))
                _from_frequencies(y_spectrum, y_tile, dims)
                if bias is not None:
                    y_tile.add_(bias.view(-1, *(1,) * dims))
                for tile, part in zip(near, y_tile.split(m), strict=True):
                    y[some][tile.made].copy_(part[tile.kept])
            elif direction is Direction.GRAD_INPUT:
                x_spectrum.zero_()
                _add_products(xs, ys, ws)
                _from_frequencies(x_spectrum, x_tile, dims)
                for tile, part in zip(near, x_tile.split(m), strict=True):
                    scatter_add(part, tile.shown, total)
            else:
                _add_products(ws, ys.transpose(1, 2), xs)
        if direction is Direction.GRAD_INPUT and sums:
            x[some].copy_(total)
    if direction is Direction.GRAD_WEIGHT:
        _from_frequencies(w_spectrum, w_tile, dims)
        w.copy_(w_tile[taps])


def _add_products(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into [g, i, j, *f] += sum over k of a [g, i, k, *f] * b [g, k, j, *f]; each may be a view."""
    i, k = a.shape[1:3]
    if k >= MATRIX_TERMS and i * b.shape[2] >= MATRIX_TERMS:
        per_frequency = a.flatten(3).permute(3, 0, 1, 2) @ b.flatten(3).permute(3, 0, 1, 2)  # [f, g, i, j]
        into += per_frequency.permute(1, 2, 3, 0).view(into.shape)
    else:
        for term in range(k):
            into.addcmul_(a[:, :, term, None], b[:, None, term])


def _why_not(request: Request) -> str | None:
    if request.dtype in INTEGERS:
        return f"the Fourier transform rounds, and {request.dtype} must be exact; use algorithm='im2col'"
    return may_be_rounded(request)


def _cost_in_tensors(request: Request) -> Cost:
    problem, tiles = request.problem, _tiles(request)
    count = math.prod(-(-o // t) for o, t in zip(problem.out, tiles.outputs, strict=True))
    area = math.prod(tiles.transform)
    rows = problem.batch * (problem.in_channels + problem.out_channels)
    transforms = 2.5 * area * math.log2(area + 1) * (count * rows + problem.out_channels * problem.group_in)
    products = 2 * area * count * problem.batch * problem.out_channels * problem.group_in  # 4 multiplies, half the f
    moved = 8 * count * rows * area * compute_dtype(request.dtype).itemsize
    if request.device == "cpu" and problem.dims == problem.group_in == problem.group_out == 1:
        seconds = _line_seconds(request, tiles, count)
    else:
        seconds = (
            count * math.ceil(problem.batch / tiles.images) * 40 * machine(request).call
            + product_seconds(request, 20 * transforms, 24, 24)
            + product_seconds(request, products, problem.group_out, problem.group_in) * 2
            + moved / machine(request).bytes
        )
        if request.device == "cpu" and request.direction is Direction.FORWARD and request.dtype is torch.float32:
            seconds *= MEASURED
    return Cost(int(transforms + products), moved, workspace_bytes(tiles.buffers), seconds + 1e-4)


def _line_seconds(request: Request, tiles: _Tiles, count: int) -> float:
    """Of `count` tiles of each image: single channels in one dimension."""
    problem, (length,), dtype = request.problem, tiles.transform, compute_dtype(request.dtype)
    blocks = math.ceil(problem.batch / tiles.images)
    calls = blocks * math.ceil(count / tiles.tiles)
    tensors = blocks * count * 4 + calls * 14 + 4
    rows = count * problem.batch * problem.out_channels
    each = (2 * rows + problem.out_channels) * (PLACE * math.log2(length) + COPIED) + rows * PRODUCT
    wide = dtype.itemsize / 4 * (2 if dtype.is_complex else 1)
    seconds = (2 * calls + 1) * length * ROOTS + each * length / max(request.threads, 1)
    return tensors * machine(request).call + wide * seconds


@lru_cache(4096)
def _served(request: Request) -> tuple[Cost, ModuleType | None]:
    """What it costs, and in which way on the engine; None: in tensor operations, if these are estimated quickest."""
    found, best = _cost_in_tensors(request), None
    for way in ENGINE:
        if way.why_not(request) is None:
            cost = way.cost(request)
            if cost.workspace <= request.max_workspace and cost.seconds < found.seconds:
                found, best = cost, way
    return found, best


def _cost(request: Request) -> Cost:
    return _served(request)[0]


def _error(request: Request) -> float:
    way = _served(request)[1]
    return way.error(request) if way else _error_in_tensors(request)


def _error_in_tensors(request: Request) -> float:
    problem, tiles = request.problem, _tiles(request)
    area, extent = math.prod(tiles.transform), math.prod(problem.kernel)
    return 6 * math.log2(area + 1) * math.sqrt(area / extent) + summation_error(problem.terms(request.direction))


def bind(request: Request, tensors: Tensors) -> Bound:
    """The call that fills a result, for tensors that lie in memory as these."""
    way = _served(request)[1]
    return way.bind(request, tensors) if way else partial(_run_in_tensors, request)


def pack(request: Request, tensors: Tensors, made: Made) -> Bound:
    """The same for a weight that stays: on the engine it is transformed once."""
    way = _served(request)[1]
    return way.bind(request, tensors, made) if way else partial(_run_in_tensors, request)


def run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    """Fill `out`."""
    bind(request, tensors)(tensors, out, workspace)


ALGORITHM = Algorithm("fft", _why_not, _cost, _error, run, version=4, bind=bind, pack=pack)
