"""The GPU's kernels without a GPU: Triton's interpreter runs them as Python, on small CPU tensors.

Triton decides when it is imported whether functions are compiled or interpreted, so all of this runs in a process of
its own: `interpreted` of tests/gpu/conftest.py calls it there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from unittest import mock

import checks
import torch
from guarded import guarded_inside

from plainconv.gpu import matrices, parts, rows, taps, winograd
from plainconv.menu import implicit
from plainconv.menu.base import Made, Tensors
from plainconv.problem import ConvProblem, Direction, Request


def begin() -> None:
    """What the process does first."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    _teach_bfloat16()


def _teach_bfloat16() -> None:
    """Triton's interpreter multiplies matrices of bfloat16 by their bits, and cuts what it should round to bfloat16."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded(self, source, to):
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(bits, tl.bfloat16)

    def widened(self, a, b, *rest):
        a, b = (cast(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounded, widened


def asked(text: str, direction: Direction, dtype: torch.dtype = torch.float32, **more: object) -> Request:
    """A request as CUDA tensors make it."""
    return Request(ConvProblem.parse(text), direction, dtype, device="cuda", **more)  # type: ignore[arg-type]


def check(
    name: str,
    request: Request,
    values: Callable[..., torch.Tensor] = checks.integers,
    layout: Callable[..., torch.Tensor] | None = None,
    *,
    of_bias: Callable[..., torch.Tensor] | None = None,
    small: bool = False,
    blind: bool = False,
) -> None:
    """Hold an algorithm to the definition; small: in small tiles; blind: it sees not all taps.

    layout, of_bias: see checks.check.
    """
    algorithm = checks.BY_NAME[name]
    assert algorithm.why_not(request) is None, algorithm.why_not(request)
    if blind:
        algorithm = checks.dropping_a_tap(algorithm)
    with _small() if small else contextlib.nullcontext():
        checks.check(algorithm, request, values, layout, of_bias=of_bias)


@contextlib.contextmanager
def _small() -> Iterator[None]:
    """Tables of small tiles."""
    tiles = {
        "IMPLICIT": matrices.IMPLICIT[:1],
        "TILES": dict.fromkeys(matrices.TILES, (16, 16)),
        "SUMMED": dict.fromkeys(matrices.SUMMED, matrices.Summed(32, 32, 32, 16, 100)),
    }
    lines = {
        "TILES_OF_LINES": (rows.Tile(4, 16, 1, 2),),
        "TILES_OF_ROWS": (rows.Tile(4, 16, 2, 2),),
        "TILES_BESIDE": (rows.Tile(8, 4, 1, 2),),
    }
    sums = {"APART": (taps.Tile(4, 16, 6),), "BESIDE": (taps.Tile(8, 4, 6),)}
    with (
        mock.patch.multiple(parts, PROCESSORS=24, BEGIN=0, ADD=0, MOVED=math.inf),
        mock.patch.multiple(matrices, **tiles, TURNED=matrices.TURNED._replace(places=16, channels=16)),
        mock.patch.multiple(implicit, TURNED_FROM=(0, 0)),
        mock.patch.multiple(rows, **lines),
        mock.patch.multiple(taps, AT_ONCE=1, **sums),
        mock.patch.multiple(winograd, BESIDE=(4, 8), APART=(8, 4)),
    ):
        yield


def check_guarded(name: str, request: Request, *, small: bool = False) -> None:
    """The same between pages that end the process when they are touched, on either side."""
    with _small() if small else contextlib.nullcontext():
        _check_guarded(name, request)


def _check_guarded(name: str, request: Request) -> None:
    algorithm, makes = checks.BY_NAME[name], request.problem.shape_of(request.direction.makes)
    for at_end in (True, False):

        def held(tensor: torch.Tensor, inside: bool = request.channels_last, at_end: bool = at_end) -> torch.Tensor:
            return guarded_inside(tensor, inside, at_end=at_end)

        given = Tensors(*(None if tensor is None else held(tensor) for tensor in checks.given(request)))
        out = held(torch.full(makes, torch.nan, dtype=request.dtype))
        workspace = held(torch.zeros(algorithm.cost(request).workspace, dtype=torch.uint8), False)
        algorithm.run(request, given, out, workspace)
        checks.compare(algorithm, request, out, *given, to_the_bit=True)


def result(name: str, request: Request, *given: torch.Tensor) -> torch.Tensor:
    """What an algorithm makes of these tensors."""
    return checks.result_of(checks.BY_NAME[name], request, *given)


def check_packed(name: str, request: Request) -> None:
    """Of a weight that stays, what is made is made once, for calls of all sizes and for both directions."""
    algorithm, made = checks.BY_NAME[name], Made()
    packed = dataclasses.replace(request, packed=True)
    for seed in (0, 1):
        given = checks.given(request)
        call = algorithm.pack(packed, given, made)
        kept = dict(made)
        first = checks.given(request, seed=seed).first
        out = torch.full(request.problem.shape_of(request.direction.makes), torch.nan, dtype=request.dtype)
        workspace = torch.empty(algorithm.cost(packed).workspace, dtype=torch.uint8)
        call(given._replace(first=first, second=torch.full_like(given.second, torch.nan)), out, workspace)
        checks.compare(algorithm, request, out, first, given.second, to_the_bit=True)
        assert {key: id(tensor) for key, tensor in kept.items()} == {key: id(tensor) for key, tensor in made.items()}


def far(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, 2^31 numbers apart along the first dimension; the memory between is not touched."""
    strides = (1 << 31, *tensor[0].contiguous().stride())
    reach = (len(tensor) - 1) * strides[0] + tensor[0].numel()
    return torch.empty(reach, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)
