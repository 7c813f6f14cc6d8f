"""Builtin: torch's own convolution, for whoever wants it among the choices.

    FORWARD       convolution(x, w)             GRAD_INPUT   convolution(y, w, transposed)
    GRAD_WEIGHT   convolution_backward(y, x)

It is not plainconv's, so it serves only where it is allowed: allow_builtin=True, or plainconv.set_allow_builtin(True).
What it makes is copied into the result, since torch has no convolution that fills a given tensor.

Cost: what torch takes, its scratch memory included, which nobody is told.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plainconv.menu.base import (
    FLOATS,
    Algorithm,
    Cost,
    Tensors,
    machine,
    matrix_error,
    may_be_rounded,
    product_seconds,
)
from plainconv.problem import Direction, Request

CALL_S = 10e-6
LARGEST = (1 << 31) - 1  # sizes, strides and paddings beyond 32 bits are too much for the libraries beneath


def _why_not(request: Request) -> str | None:
    problem = request.problem
    if not request.allow_builtin:
        return (
            "it is torch's own convolution, and serves only where it is allowed: "
            "allow_builtin=True, or plainconv.set_allow_builtin(True)"
        )
    if sentence := may_be_rounded(request, "torch's own"):
        return sentence
    if problem.padding_mode != "zeros":
        return f"torch's convolution pads with zeros, and the padding mode is {problem.padding_mode}"
    if any(lo != hi for lo, hi in problem.padding):
        return "torch's convolution pads both sides alike, and here they differ"
    if any(lo < 0 for lo, _ in problem.padding):
        return "torch's convolution does not crop, and the padding is negative"
    if problem.dims > 3:
        return "torch's convolution has at most three dimensions"
    if request.dtype not in FLOATS:
        return f"torch's convolution is taken for floating types, not {str(request.dtype).removeprefix('torch.')}"
    if request.dtype is torch.float16 and request.device == "cpu":
        return "torch's convolution of float16 does not always sum in float32 on a CPU"
    elements = (math.prod(problem.shape_of(role)) for role in ("x", "w", "y"))
    if max(*elements, *problem.stride, *problem.dilation) > LARGEST:
        return "the libraries beneath torch's convolution count in 32 bits, and that is not enough here"
    return None


def _cost(request: Request) -> Cost:
    problem = request.problem
    moved = request.dtype.itemsize * sum(math.prod(problem.shape_of(role)) for role in ("x", "w", "y", "y"))
    work = product_seconds(request, problem.multiplies, problem.group_out, problem.group_in * problem.taps)
    return Cost(problem.multiplies, moved, 0, CALL_S + work + moved / machine(request).bytes)


def _run(request: Request, tensors: Tensors, out: Tensor, workspace: Tensor) -> None:
    problem = request.problem
    first, second, bias, _ = tensors
    padding = [lo for lo, _ in problem.padding]
    stride, dilation = list(problem.stride), list(problem.dilation)
    aten = torch.ops.aten
    if request.direction is Direction.GRAD_WEIGHT:
        # The weight is asked for its shape and memory format only.
        how = (stride, padding, dilation, False, [0], problem.groups, [False, True, False])
        made = aten.convolution_backward(second, first, out, None, *how)[1]
    elif request.direction is Direction.GRAD_INPUT:
        sides = zip(problem.padded, problem.kernel, problem.stride, problem.dilation, strict=True)
        unread = [(p - (k - 1) * d - 1) % s for p, k, s, d in sides]  # torch's output_padding
        made = aten.convolution(first, second, bias, stride, padding, dilation, True, unread, problem.groups)
    else:
        made = aten.convolution(first, second, bias, stride, padding, dilation, False, [0], problem.groups)
    out.copy_(made)


def _error(request: Request) -> float:
    """Without AVX-512, torch may add the taps of its gradient for the input in a half type."""
    error = matrix_error(request)
    wide = request.device != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    if wide or request.direction is not Direction.GRAD_INPUT or request.dtype.itemsize != 2:
        return error
    return error + request.problem.taps / 2 * torch.finfo(request.dtype).eps / torch.finfo(torch.float32).eps


ALGORITHM = Algorithm("builtin", _why_not, _cost, _error, _run)
