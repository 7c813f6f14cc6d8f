"""What is timed: one direction of one layer, by torch and by plainconv, as a user would write it.

    forward      conv(x, w), or conv_transpose(x, w)
    grad_input   autograd.grad(y, x, g), the graph kept
    grad_weight  autograd.grad(y, w, g), the graph kept
    train        y = conv(x, w), then y.backward(g), x and w being leaves

Both sides are given the very same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plainconv import functional, inference
from plainconv.bench.suites import Layer
from plainconv.plan import Explanation
from plainconv.problem import FORMATS, Direction

DIRECTIONS = ("forward", "grad_input", "grad_weight", "train")
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"


Call = Callable[[], tuple[Tensor, ...]]  # what a direction makes: one tensor; y, dx and dw for "train"


class Tensors(NamedTuple):
    """A layer's input, weight, and the cotangent of its output."""

    x: Tensor
    w: Tensor
    g: Tensor

    def to(self, layout: str) -> Tensors:
        """The same values in a memory format, all three."""

        def convert(tensor: Tensor) -> Tensor:
            like = torch.contiguous_format if layout == CONTIGUOUS else FORMATS[tensor.dim()]
            return tensor.contiguous(memory_format=like)

        return Tensors(*map(convert, self))


def tensors(layer: Layer, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensors:
    """Normally distributed numbers, contiguous."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = (layer.input_shape, layer.problem.weight_shape, layer.output_shape)
    return Tensors(*(torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes))


def layouts(layer: Layer) -> tuple[str, ...]:
    """The memory formats that torch has for the layer's tensors."""
    return (CONTIGUOUS,) if layer.problem.dims == 1 else (CONTIGUOUS, CHANNELS_LAST)


def directions(direction: str) -> tuple[Direction, ...]:
    """Which directions of the layer a word stands for."""
    return tuple(Direction) if direction == "train" else (Direction(direction),)


def torchs(layer: Layer, direction: str, given: Tensors) -> Call:
    """torch's own convolution."""
    p = layer.problem
    stride, padding, dilation = p.stride, tuple(lo for lo, _ in p.padding), p.dilation
    if any(lo != hi for lo, hi in p.padding) or p.padding_mode != "zeros":
        raise ValueError(f"torch has no convolution with the padding of {p}")
    if layer.transposed:
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[p.dims - 1]
        output_padding = layer.output_padding

        def convolve(x: Tensor, w: Tensor) -> Tensor:
            return transposed(x, w, None, stride, padding, output_padding, p.groups, dilation)
    else:
        forward = (F.conv1d, F.conv2d, F.conv3d)[p.dims - 1]

        def convolve(x: Tensor, w: Tensor) -> Tensor:
            return forward(x, w, None, stride, padding, dilation, p.groups)

    return _call(convolve, direction, given)


def ours(layer: Layer, direction: str, given: Tensors, algorithm: str = "auto") -> Call:
    """plainconv's, by the algorithm named."""
    p = layer.problem
    stride, padding, dilation = p.stride, p.padding, p.dilation
    name = f"conv_transpose{p.dims}d" if layer.transposed else f"conv{p.dims}d"
    function: Callable[..., Tensor] = getattr(functional, name)
    if layer.transposed:
        output_padding = layer.output_padding

        def convolve(x: Tensor, w: Tensor) -> Tensor:
            return function(x, w, None, stride, padding, output_padding, p.groups, dilation, algorithm=algorithm)
    else:

        def convolve(x: Tensor, w: Tensor) -> Tensor:
            return function(x, w, None, stride, padding, dilation, p.groups, algorithm=algorithm)

    return _call(convolve, direction, given)


def prepacked(layer: Layer, given: Tensors) -> inference.Prepacked:
    """plainconv's for inference, made for this input and weight."""
    x = given.x
    memory_format = torch.contiguous_format if x.is_contiguous() else FORMATS[x.dim()]
    return inference.prepack(given.w, x.shape, memory_format=memory_format, **_options(layer))


def explain(layer: Layer, direction: Direction, given: Tensors) -> Explanation:
    """What every algorithm says of one direction of the layer."""
    return functional.explain(given.x, given.w, direction=direction.value, **_options(layer))


def _options(layer: Layer) -> dict[str, Any]:
    """What explain and prepack are told of a layer."""
    p = layer.problem
    return {
        "stride": p.stride,
        "padding": p.padding,
        "dilation": p.dilation,
        "groups": p.groups,
        "transposed": layer.transposed,
        "output_padding": layer.output_padding if layer.transposed else 0,
    }


def _call(convolve: Callable[[Tensor, Tensor], Tensor], direction: str, given: Tensors) -> Call:
    x, w, g = given
    if direction == "forward":
        return lambda: (convolve(x, w),)
    # Leaves of their own: the tensors that both sides share must not begin to require gradients.
    x = x.detach().requires_grad_(direction != "grad_weight")
    w = w.detach().requires_grad_(direction != "grad_input")
    if direction == "train":

        def train() -> tuple[Tensor, ...]:
            x.grad = w.grad = None  # as optimizers leave them
            y = convolve(x, w)
            y.backward(g)
            assert x.grad is not None
            assert w.grad is not None
            return y.detach(), x.grad, w.grad

        return train
    wanted = x if direction == "grad_input" else w
    y = convolve(x, w)
    return lambda: torch.autograd.grad(y, wanted, g, retain_graph=True)
