"""torch.nn.functional's six convolutions, under the same names and with the same arguments, computed by plainconv.

What torch lacks, every function here has:

padding        besides int, tuple of int, "same" and "valid" (the last two not for the transposed ones, as in torch):
               pairs (lo, hi), one for each dimension, negative ones crop first; "same_upper" and "same_lower", ONNX's
               rule for any stride (ceil(size / stride) outputs, for transposed size * stride; an odd place goes behind
               or before); "causal", all padding before (for transposed, all cropping behind, size * stride outputs);
               a tuple may mix them, one entry for each dimension: ("causal", 1, (2, 0)).
padding_mode   "zeros", "reflect", "replicate" or "circular": what the padding shows.  The transposed functions do the
               adjoint: what falls into the border is added where the mode would have read.
algorithm      "auto", or one of plainconv.algorithms().
max_workspace  bytes of scratch memory that the algorithm may use; None: what plainconv.set_max_workspace says, 1 GiB at
               first.
allow_builtin  whether torch's own convolution may be chosen; None: what plainconv.set_allow_builtin says, at first no.
precision      "high", or "highest": then nothing serves whose error may exceed that of a sum of the products as they
               are (which leaves the smallest tiles of `winograd`, and hardly any `fft`); None: what
               plainconv.set_precision says, at first "high".
activation     None, "relu", "relu6", "leaky_relu" (slope 0.01), "leaky_relu(0.2)" (or any finite slope), "hardswish",
               "sigmoid", "silu" or "gelu" (with erf).
residual       a tensor of the result's shape, type and device.  What is made is
               activation(convolution + bias + residual),  both where the kernel stores its sums; if a gradient is asked
               for, or anything else watches (torch.compile, vmap, ...), by torch's own addition and activation behind
               the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from marshal import dumps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from plainconv import onnx, ops, settings
from plainconv.arguments import Spec, Spelled, settle
from plainconv.plan import Explanation, check_algorithm, explain_request
from plainconv.problem import Direction, Geometry, read_activation, settled_activation
from plainconv.remember import on_forget
from plainconv.settings import AUTO, resolve


@lru_cache(4096)
def _settle_once(call: Spelled, written: bytes) -> tuple[tuple[int, ...], Geometry]:
    """`written`, the arguments as bytes, keeps apart what Python calls equal: 1, 1.0 and True."""
    return settle(call)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Spec = 1,
    padding: Spec = 0,
    dilation: Spec = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = AUTO,
    max_workspace: int | None = None,
    allow_builtin: bool | None = None,
    precision: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A 1-D convolution; a drop-in for torch.nn.functional.conv1d.

    input: [n, c, length], or [c, length] without a batch.  weight: [o, c/groups, k].  bias: [o] or None.
    Everything else is as in conv2d.
    """
    options = (stride, padding, dilation, groups, padding_mode, algorithm, max_workspace, allow_builtin, precision, 0)
    return _call(conv1d, 1, input, weight, bias, options, activation, residual)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Spec = 1,
    padding: Spec = 0,
    dilation: Spec = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = AUTO,
    max_workspace: int | None = None,
    allow_builtin: bool | None = None,
    precision: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A 2-D convolution over an input of several channels; a drop-in for torch.nn.functional.conv2d.

    input: [n, c, h, w], or [c, h, w] without a batch.  weight: [o, c/groups, kh, kw].  bias: [o] or None.
    stride, dilation: int, or one for each dimension.  padding, padding_mode, algorithm, max_workspace, allow_builtin,
    precision, activation, residual: see plainconv.functional.

    Returns [n, o, out_h, out_w] of the input's type, with out = (size + lo + hi - dilation*(k-1) - 1) // stride + 1;
    channels_last if the input or the weight is.  Differentiable in input, weight and bias, to any order.
    Raises RuntimeError, in torch's words, if shapes or types do not fit; ValueError for an unknown padding_mode or
    algorithm; AlgorithmRefused if the algorithm named cannot serve the call.
    """
    options = (stride, padding, dilation, groups, padding_mode, algorithm, max_workspace, allow_builtin, precision, 0)
    return _call(conv2d, 2, input, weight, bias, options, activation, residual)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Spec = 1,
    padding: Spec = 0,
    dilation: Spec = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = AUTO,
    max_workspace: int | None = None,
    allow_builtin: bool | None = None,
    precision: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A 3-D convolution; a drop-in for torch.nn.functional.conv3d.

    input: [n, c, d, h, w], or [c, d, h, w] without a batch.  weight: [o, c/groups, kd, kh, kw].  bias: [o] or None.
    Everything else is as in conv2d.
    """
    options = (stride, padding, dilation, groups, padding_mode, algorithm, max_workspace, allow_builtin, precision, 0)
    return _call(conv3d, 3, input, weight, bias, options, activation, residual)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Spec = 1,
    padding: Spec = 0,
    output_padding: Spec = 0,
    groups: int = 1,
    dilation: Spec = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = AUTO,
    max_workspace: int | None = None,
    allow_builtin: bool | None = None,
    precision: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A 1-D transposed convolution; a drop-in for torch.nn.functional.conv_transpose1d.

    input: [n, o, length], or [o, length] without a batch.  weight: [o, c/groups, k].  bias: [c] or None.
    Everything else is as in conv_transpose2d.
    """
    options = (
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        algorithm,
        max_workspace,
        allow_builtin,
        precision,
        output_padding,
    )
    return _call(conv_transpose1d, 1, input, weight, bias, options, activation, residual)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Spec = 1,
    padding: Spec = 0,
    output_padding: Spec = 0,
    groups: int = 1,
    dilation: Spec = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = AUTO,
    max_workspace: int | None = None,
    allow_builtin: bool | None = None,
    precision: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A 2-D transposed convolution; a drop-in for torch.nn.functional.conv_transpose2d.

    It is the gradient of a convolution with respect to its input, with the very weight of that convolution.
    input: [n, o, h, w], or [o, h, w] without a batch.  weight: [o, c/groups, kh, kw].  bias: [c] or None.
    stride, dilation, output_padding: int, or one for each dimension.  padding, padding_mode, algorithm,
    max_workspace, allow_builtin, precision, activation, residual: see plainconv.functional.

    Returns [n, c, out_h, out_w] of the input's type, with
    out = (size - 1)*stride - lo - hi + dilation*(k-1) + output_padding + 1;
    channels_last if the input or the weight is.
    Differentiable in input, weight and bias, to any order.  Raises what conv2d raises.
    """
    options = (
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        algorithm,
        max_workspace,
        allow_builtin,
        precision,
        output_padding,
    )
    return _call(conv_transpose2d, 2, input, weight, bias, options, activation, residual)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Spec = 1,
    padding: Spec = 0,
    output_padding: Spec = 0,
    groups: int = 1,
    dilation: Spec = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = AUTO,
    max_workspace: int | None = None,
    allow_builtin: bool | None = None,
    precision: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A 3-D transposed convolution; a drop-in for torch.nn.functional.conv_transpose3d.

    input: [n, o, d, h, w], or [o, d, h, w] without a batch.  weight: [o, c/groups, kd, kh, kw].  bias: [c] or None.
    Everything else is as in conv_transpose2d.
    """
    options = (
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        algorithm,
        max_workspace,
        allow_builtin,
        precision,
        output_padding,
    )
    return _call(conv_transpose3d, 3, input, weight, bias, options, activation, residual)


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Spec = 1,
    padding: Spec = 0,
    dilation: Spec = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = AUTO,
    max_workspace: int | None = None,
    allow_builtin: bool | None = None,
    precision: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    output_padding: Spec = 0,
    transposed: bool = False,
    direction: str = "forward",
) -> Explanation:
    """What every algorithm says of a call, and which one would serve it; the answer prints as a table.

    The arguments are those of conv1d to conv3d, the dimensions are the weight's; transposed=True asks about
    conv_transpose instead.  direction: "forward", or "grad_input" or "grad_weight" for the call's gradients, in which
    nothing is fused.
    Computes nothing.  Raises what the call itself would raise, but for AlgorithmRefused.
    """
    _check_kinds("explain", input, weight, bias, residual)
    activation = settled_activation(activation, input.dtype)
    if weight.dim() not in (3, 4, 5):
        raise RuntimeError(f"expected weight to have 3, 4 or 5 dimensions, but got size {list(weight.shape)}")
    if output_padding != 0 and not transposed:
        raise ValueError(f"output_padding={output_padding!r} belongs to transposed=True")
    name = f"conv_transpose{weight.dim() - 2}d" if transposed else f"conv{weight.dim() - 2}d"
    options = Options(
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        algorithm,
        max_workspace,
        allow_builtin,
        precision,
        output_padding,
    )
    input, weight, bias = _autocast(input, weight, bias)
    first, make, _ = settled(name, weight.dim() - 2, input, weight, bias, options)
    if direction not in {known.value for known in Direction}:
        known = ", ".join(repr(known.value) for known in Direction)
        raise ValueError(f"direction must be one of {known}, but got {direction!r}")
    asked = Direction(direction)
    if transposed:  # the mirrored convolution has input and output exchanged
        mirror = {Direction.FORWARD: Direction.GRAD_INPUT, Direction.GRAD_INPUT: Direction.FORWARD}
        asked = mirror.get(asked, asked)
    request = ops.request(make, first, weight, bias, asked)
    if asked is make.direction:
        request = replace(request, activation=activation, has_residual=residual is not None)
    return explain_request(request, algorithm)


# -- the door --------------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What a call says besides its tensors."""

    stride: Spec
    padding: Spec
    dilation: Spec
    groups: int
    padding_mode: str
    algorithm: str
    max_workspace: int | None
    allow_builtin: bool | None
    precision: str | None
    output_padding: Spec = 0


def _call(
    function: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """All six functions; `options` are those of Options."""
    if activation is not None or residual is not None:
        return _finished(function, dims, input, weight, bias, options, activation, residual)
    if has_torch_function((input, weight, bias)):
        named = spelled(function, options)
        return handle_torch_function(function, (input, weight, bias), input, weight, bias, **named)
    if not torch.compiler.is_compiling():
        key = _key(function, input, weight, bias, options)
        for fits, run, recorded in _READY.get(key, ()):
            fitting = fits(input, weight) if bias is None else fits(input, weight, bias)
            if fitting and forward_ad._current_level < 0:
                return recorded(input, weight, bias) if torch.is_grad_enabled() else run(input, weight, bias)
        if (watch := ops.watching(input, weight, bias)) is not ops.Watch.ELSE:
            first, make, batched = settled(function.__name__, dims, input, weight, bias, Options(*options))
            call = ops.remembered(first, weight, bias, make)
            run, recorded = (way if batched else unbatched(way) for way in (call.run, call.recorded))
            if key is not None:
                given = (input, weight) if bias is None else (input, weight, bias)
                asks = any(tensor.requires_grad for tensor in given)
                ops.remember(_READY, key, (ops.guard(*given), run, recorded if asks else run))
            return recorded(input, weight, bias) if watch is ops.Watch.GRADIENT else run(input, weight, bias)
    _check_kinds(function.__name__, input, weight, bias)
    input, weight, bias = _autocast(input, weight, bias)
    first, make, batched = settled(function.__name__, dims, input, weight, bias, Options(*options))
    if onnx.exporting():
        result = onnx.convolution(first, weight, bias, make.direction, make.shape, make.geometry)
    else:
        result = ops.watched(first, weight, bias, make)
    return result if batched else result.squeeze(0)


def spelled(function: Callable[..., Tensor], options: tuple[Any, ...]) -> dict[str, Any]:
    """The options that one of the six functions has, by their names."""
    named = Options(*options)._asdict()
    if "transpose" not in function.__name__:
        del named["output_padding"]
    return named


_Run = Callable[..., Tensor]
_Fits = Callable[..., bool]
# Of calls that are alike in what the key says: what tells them apart, the plain call, and the one with gradients.
_READY: dict[Any, tuple[tuple[_Fits, _Run, _Run], ...]] = {}
on_forget(_READY.clear)


def _key(
    function: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
) -> Any:
    """All that a plain call depends on but its tensors, and sizes to find it by; None if that cannot be said."""
    if type(input) not in ops.PLAIN or type(weight) not in ops.PLAIN or torch._C._get_tracing_state() is not None:
        return None  # such sizes may be no numbers, and to ask for them may leave a trace
    if input is weight or input is bias or weight is bias:
        return None  # torch's guard tells objects apart
    try:
        return (
            function,
            input.shape,
            weight.shape,
            bias is None,
            dumps(options, 2),  # what Python calls equal it keeps apart: 1, 1.0 and True
            settings.current,
            torch.get_num_threads(),
        )
    except (ValueError, RuntimeError):  # options beyond numbers, text, lists and tuples; a nested tensor has no sizes
        return None


def unbatched(run: _Run) -> _Run:
    """The same for an input, and a residual, without a batch."""

    def call(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return run(input.unsqueeze(0), weight, bias).squeeze(0)
        return run(input.unsqueeze(0), weight, bias, residual.unsqueeze(0)).squeeze(0)

    return call


# -- what comes behind -----------------------------------------------------------------------------------------------

_ACTIVATION: dict[str, Callable[..., Tensor]] = {  # of a result and the numbers of the activation
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
}


def finished(result: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """activation(result + residual), by torch."""
    if residual is not None:
        result = result + residual
    if activation is None:
        return result
    name, numbers = read_activation(activation)
    return _ACTIVATION[name](result, *numbers)


def _finished(
    function: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """activation(convolution + bias + residual), as one call if nothing watches."""
    if has_torch_function((input, weight, bias, residual)):
        named = {**spelled(function, options), "activation": activation, "residual": residual}
        return handle_torch_function(function, (input, weight, bias, residual), input, weight, bias, **named)
    if not torch.compiler.is_compiling():
        own = residual is not None and residual is not input
        given = tuple(tensor for tensor in (input, weight, bias, residual if own else None) if tensor is not None)
        key = None if own and (residual is weight or residual is bias) else _key(function, input, weight, bias, options)
        key = (
            None if key is None or not isinstance(activation, str | None) else (key, activation, residual is None, own)
        )
        for fits, run, recorded in _READY.get(key, ()):
            if fits(*given) and forward_ad._current_level < 0:
                way = recorded if torch.is_grad_enabled() else run
                return way(input, weight, bias, residual)
    _check_kinds(function.__name__, input, weight, bias, residual)
    activation = settled_activation(activation, input.dtype)

    def apart(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        result = _call(function, dims, input, weight, bias, options)
        if residual is not None:
            residual = residual.to(result.dtype) if _casts(input) else residual
            check_residual(residual, result.shape, result)
        return finished(result, activation, residual)

    if torch.compiler.is_compiling() or any(
        ops.watching(tensor, weight, bias) is not ops.Watch.NOTHING
        for tensor in (input, residual)
        if tensor is not None
    ):
        return apart(input, weight, bias, residual)
    first, make, batched = settled(function.__name__, dims, input, weight, bias, Options(*options))
    if residual is not None:
        check_residual(residual, make.shape if batched else make.shape[1:], input)
    behind = residual if batched or residual is None else residual.unsqueeze(0)
    call = ops.remembered(first, weight, bias, make, activation=activation, residual=behind).run
    together = call if batched else unbatched(call)
    if key is not None:
        asks = any(tensor.requires_grad for tensor in given)
        ops.remember(_READY, key, (ops.guard(*given), together, apart if asks else together))
    return together(input, weight, bias, residual)


# -- checks ----------------------------------------------------------------------------------------------------------


def check_residual(residual: Tensor, shape: Sequence[int], input: Tensor) -> None:
    """Raise RuntimeError if it is not what can be added to a result of this shape, from this input."""
    if residual.dtype != input.dtype or residual.device != input.device:
        raise RuntimeError(f"Input type ({input.type()}) and residual type ({residual.type()}) should be the same")
    if tuple(residual.shape) != tuple(shape):
        raise RuntimeError(
            f"expected residual to have the shape of the result, {list(shape)}, but got {list(residual.shape)}"
        )


def _autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return ops.autocast(input, weight, bias) if _casts(input) else (input, weight, bias)


def _casts(input: Tensor) -> bool:
    return input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)


def settled(
    name: str, dims: int, input: Tensor, weight: Tensor, bias: Tensor | None, options: Options
) -> tuple[Tensor, ops.Make, bool]:
    """The input with a batch, what is to be made of it, and whether it came with a batch."""
    _check_types(input, weight, bias)
    rank = input.dim()
    if rank not in (dims + 1, dims + 2):
        raise RuntimeError(
            f"Expected {dims + 1}D (unbatched) or {dims + 2}D (batched) input to {name}, "
            f"but got input of size: {list(input.shape)}"
        )
    if rank == dims + 1:
        input = input.unsqueeze(0)
    stride, padding, dilation, groups, padding_mode, *_, output_padding = options
    bias_shape = None if bias is None else bias.shape
    call = Spelled(
        name,
        dims,
        input.shape,
        weight.shape,
        bias_shape,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        padding_mode,
    )
    if torch.compiler.is_compiling():
        shape, geometry = settle(call)
    else:
        spelled: Any = call[5:10]  # stride to groups
        try:
            shape, geometry = _settle_once(call, dumps(spelled, 2))
        except (TypeError, ValueError):  # what cannot be remembered, a list or a SymInt; or an error, raised again
            shape, geometry = settle(call)
    check_algorithm(options.algorithm)
    direction = Direction.GRAD_INPUT if call.transposed else Direction.FORWARD
    channels_last = ops.is_channels_last(input) or ops.is_channels_last(weight)
    chosen = resolve(options.algorithm, options.max_workspace, options.allow_builtin, options.precision)
    return input, ops.Make(direction, shape, geometry, channels_last, chosen), rank == dims + 2


def _check_kinds(name: str, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> None:
    for argument, value in (("input", input), ("weight", weight), ("bias", bias), ("residual", residual)):
        if value is None and argument in ("bias", "residual"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}(): argument '{argument}' must be Tensor, not {type(value).__name__}")
        if type(value).__name__ == "DTensor":
            raise NotImplementedError(
                f"{name}() takes tensors of one process, but got a DTensor as {argument}; leave such layers to torch "
                "(plainconv.unswap(model) before it is sharded, or exclude= of plainconv.swap), or take its to_local() "
                "or full_tensor()"
            )
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            kind = "nested" if value.is_nested else "quantized" if value.is_quantized else str(value.layout)
            raise NotImplementedError(
                f"{name}() takes dense tensors, but got a tensor that is {kind} as {argument}; "
                "convert it first: sparse and mkldnn with to_dense(), nested with to_padded_tensor(), "
                "quantized with dequantize()"
            )


def _check_types(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if input.dtype != weight.dtype or input.device != weight.device:
        raise RuntimeError(f"Input type ({input.type()}) and weight type ({weight.type()}) should be the same")
    if bias is not None and (input.dtype != bias.dtype or input.device != bias.device):
        raise RuntimeError(f"Input type ({input.type()}) and bias type ({bias.type()}) should be the same")
