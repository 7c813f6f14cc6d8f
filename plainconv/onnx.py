"""Convolutions in an ONNX export, as the nodes that every runtime knows.

torch.onnx.export traces a model and asks each operator for what it is in ONNX; it does not know those of plainconv.  So
while it traces, a convolution is written as Conv or ConvTranspose, behind a padding of its own where the node has none
like it (other modes than zeros, and sides that crop).

ONNX, "Operator Schemas": Conv, ConvTranspose, Pad.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from plainconv.problem import Direction, Geometry


def exporting() -> bool:
    """Whether torch.onnx.export is tracing."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def convolution(
    first: Tensor, weight: Tensor, bias: Tensor | None, direction: Direction, shape: Any, geometry: Geometry
) -> Tensor:
    """FORWARD, or GRAD_INPUT (a transposed convolution), as a node: its result in shape and type alone.

    Raises NotImplementedError for a transposed convolution with a padding mode: no node computes it.
    """
    if direction is Direction.FORWARD:
        return _conv(first, weight, bias, shape, geometry)
    if geometry.padding_mode != "zeros":
        raise NotImplementedError(
            f"ONNX has no transposed convolution with padding_mode={geometry.padding_mode!r}; export one with 'zeros'"
        )
    return _conv_transpose(first, weight, bias, shape, geometry)


def _conv(x: Tensor, w: Tensor, bias: Tensor | None, shape: Any, geometry: Geometry) -> Tensor:
    pads = geometry.padding
    if geometry.padding_mode != "zeros" or any(side < 0 for pair in pads for side in pair):
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        flat = [side for pair in reversed(pads) for side in pair]
        x, pads = torch.nn.functional.pad(x, flat, mode), ((0, 0),) * len(pads)
    return _node("Conv", x, w, bias, shape, geometry, pads)


def _conv_transpose(y: Tensor, w: Tensor, bias: Tensor | None, shape: Any, geometry: Geometry) -> Tensor:
    pads = tuple((int(lo), int(hi)) for lo, hi in geometry.padding)  # how much is cropped
    if all(lo >= 0 for lo, _ in pads):
        more = [max(-hi, 0) for _, hi in pads]
        cropped = tuple((lo, max(hi, 0)) for lo, hi in pads)
        return _node("ConvTranspose", y, w, bias, shape, geometry, cropped, output_padding=more)
    whole = [size + lo + hi for size, (lo, hi) in zip(shape[2:], pads, strict=True)]
    nothing = ((0, 0),) * len(pads)
    made = _node("ConvTranspose", y, w, None, (*shape[:2], *whole), geometry, nothing)
    made = torch.nn.functional.pad(made, [-side for pair in reversed(pads) for side in pair])
    return made if bias is None else made + bias.view(-1, *(1,) * len(pads))


def _node(
    name: str, x: Tensor, w: Tensor, bias: Tensor | None, shape: Any, geometry: Geometry, pads: Any, **more: Any
) -> Tensor:
    attributes = {
        "kernel_shape": list(w.shape[2:]),
        "strides": list(geometry.stride),
        "dilations": list(geometry.dilation),
        "group": geometry.groups,
        "pads": [int(lo) for lo, _ in pads] + [int(hi) for _, hi in pads],  # all beginnings, then all ends
        **more,
    }
    inputs = (x, w) if bias is None else (x, w, bias)
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=x.dtype, shape=shape)
