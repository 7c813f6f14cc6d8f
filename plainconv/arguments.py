"""Every spelling of an argument becomes one value, once, and what is wrong with it is said in torch's words.

The functions here see shapes, never tensors, so that the answer for a given call can be remembered.  Sizes may be
torch.SymInt while torch traces; then no size is compared, so that none is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import torch

from plainconv.problem import PADDING_MODES, Geometry, Pair, out_spatial

Spec = int | str | Sequence[Any]  # what a user may write for stride, padding, dilation and output_padding
Shape = tuple[int, ...]

FAR = 1 << 63  # integers of torch's have 64 bits
CONV_PADDINGS = ("valid", "same", "same_upper", "same_lower", "causal")
TRANSPOSED_PADDINGS = ("same_upper", "same_lower", "causal")


class Spelled(NamedTuple):
    """The arguments of a call as the user wrote them, beside the shapes of its tensors (input_shape is batched)."""

    function: str  # for messages: "conv2d", "conv_transpose1d"
    dims: int
    input_shape: Shape
    weight_shape: Shape
    bias_shape: Shape | None
    stride: Spec
    padding: Spec
    output_padding: Spec
    dilation: Spec
    groups: int
    padding_mode: str

    @property
    def transposed(self) -> bool:
        return self.function.startswith("conv_transpose")


def settle(call: Spelled) -> tuple[Shape, Geometry]:
    """The shape of the result and the geometry of the convolution.

    A transposed convolution is GRAD_INPUT of the convolution with this geometry: its weight has that convolution's
    layout, its result that convolution's input shape, and output_padding is a smaller padding at the end.
    Raises RuntimeError, TypeError or ValueError, in torch's words where torch has them.
    """
    _check_weight(call)
    stride, dilation = _each(call, "stride"), _each(call, "dilation")
    extra, padding = _each(call, "output_padding"), padding_specs(call)
    groups = _integer(call, "groups", call.groups)
    _check_numbers(call, stride, dilation, groups)
    made = _check_channels(call, groups)
    _check_output_padding(extra, stride, dilation)
    sides = zip(padding, call.input_shape[2:], call.weight_shape[2:], stride, dilation, extra, strict=True)
    if call.transposed:
        pairs, spatial = zip(*(_transposed_side(*side) for side in sides), strict=True)
        _check_transposed_sizes(call, spatial)
        geometry = Geometry(stride, pairs, dilation, groups, call.padding_mode)
    else:
        geometry = Geometry(stride, tuple(_pair(*side[:5]) for side in sides), dilation, groups, call.padding_mode)
        spatial = out_spatial(call.input_shape[2:], call.weight_shape[2:], geometry)
        _check_spatial(call, spatial)
    return (call.input_shape[0], made, *spatial), geometry


# -- one dimension ---------------------------------------------------------------------------------------------------


def _pair(spec: Any, size: int, kernel: int, stride: int, dilation: int) -> Pair:
    """The padding (lo, hi) of one dimension of a convolution."""
    span = (kernel - 1) * dilation + 1
    if isinstance(spec, tuple):
        return spec[0], spec[1]
    if not isinstance(spec, str):
        return spec, spec
    if spec == "valid":
        return 0, 0
    if spec == "causal":
        return span - 1, 0
    if spec == "same":
        if stride != 1:
            raise RuntimeError("padding='same' is not supported for strided convolutions")
        total = span - 1
    else:  # ONNX: ceil(size / stride) outputs
        total = torch.sym_max((-(-size // stride) - 1) * stride + span - size, 0)
    less, more = total // 2, total - total // 2
    return (more, less) if spec == "same_lower" else (less, more)


def _transposed_side(spec: Any, size: int, kernel: int, stride: int, dilation: int, extra: int) -> tuple[Pair, int]:
    """The padding of the mirrored convolution, and the length of the result, for one dimension."""
    plain = (size - 1) * stride + (kernel - 1) * dilation + 1  # nothing cropped
    if isinstance(spec, str):  # ONNX: size * stride outputs
        length = size * stride
        total = torch.sym_max(plain + extra - length, 0)
        lo = {"same_upper": total // 2, "same_lower": total - total // 2, "causal": 0}[spec]
    else:
        lo, hi = spec if isinstance(spec, tuple) else (spec, spec)
        length = plain + extra - lo - hi
    return (lo, plain - length - lo), length


# -- spellings -------------------------------------------------------------------------------------------------------


def _integer(call: Spelled, name: str, value: Any) -> int:
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if not isinstance(value, bool):
        try:
            number = index(value)
        except TypeError:
            pass
        else:
            if not -FAR <= number < FAR:
                raise RuntimeError(
                    f"Overflow when unpacking long long: {call.function}(): argument '{name}' must fit 64 bits, "
                    f"but got {number}"
                )
            return number
    wanted = "int" if name == "groups" else "tuple of ints"
    raise TypeError(f"{call.function}(): argument '{name}' must be {wanted}, not {type(value).__name__}")


def _listed(call: Spelled, name: str, value: Any, length: int) -> list[Any]:
    """One entry for each dimension, out of one for all or a list."""
    if not isinstance(value, (tuple, list)):
        return [value] * length
    if len(value) == 1:
        return list(value) * length
    if len(value) != length:
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of {length} values to match the convolution "
            f"dimensions, but got {name}={list(value)}"
        )
    return list(value)


def _each(call: Spelled, name: str) -> Shape:
    return tuple(_integer(call, name, value) for value in _listed(call, name, getattr(call, name), call.dims))


def padding_specs(call: Spelled) -> list[int | Pair | str]:
    """The padding of each dimension: a number for both sides, a pair (lo, hi), or a name."""
    named = TRANSPOSED_PADDINGS if call.transposed else CONV_PADDINGS
    specs: list[int | Pair | str] = []
    for spec in _listed(call, "padding", call.padding, call.dims):
        if isinstance(spec, str):
            if spec not in named:
                _refuse_padding(call, spec, named)
            specs.append(spec)
        elif isinstance(spec, (tuple, list)):
            if len(spec) != 2:
                raise RuntimeError(
                    f"expected padding to be a pair (lo, hi) for each dimension, but got {spec} among them"
                )
            specs.append((_integer(call, "padding", spec[0]), _integer(call, "padding", spec[1])))
        else:
            both = _integer(call, "padding", spec)
            if not isinstance(both, torch.SymInt) and both < 0:
                raise RuntimeError(
                    "negative padding is not supported as a number; write a pair (lo, hi) for each dimension to crop"
                )
            specs.append(both)
    return specs


def _refuse_padding(call: Spelled, spec: str, named: tuple[str, ...]) -> None:
    known = ", ".join(map(repr, named))
    if call.transposed:
        raise TypeError(
            f"{call.function}(): argument 'padding' must be tuple of ints, not str ({spec!r} is not one of {known})"
        )
    raise RuntimeError(f"Invalid padding string: {spec!r}, should be one of {known}")


# -- checks ----------------------------------------------------------------------------------------------------------


def _check_weight(call: Spelled) -> None:
    shape = call.weight_shape
    if len(shape) < 3:
        raise RuntimeError("weight should have at least three dimensions")
    if len(shape) != call.dims + 2:
        if call.padding == "same":
            raise RuntimeError(
                f"Expected {len(shape)}-dimensional input for {len(shape)}-dimensional weight {list(shape)}, but got "
                f"{len(call.input_shape)}-dimensional input of size {list(call.input_shape)} instead"
            )
        _listed(call, "stride", _listed(call, "stride", call.stride, call.dims), len(shape) - 2)
        raise RuntimeError(
            f"expected weight of {call.function} to have {call.dims + 2} dimensions, but got size {list(shape)}"
        )
    if not torch.compiler.is_compiling() and any(size < 1 for size in shape[2:]):
        raise RuntimeError(f"kernel size should be greater than zero, but got weight of size {list(shape)}")


def _check_numbers(call: Spelled, stride: Shape, dilation: Shape, groups: int) -> None:
    if groups <= 0:
        raise RuntimeError("non-positive groups is not supported")
    if any(value <= 0 for value in stride):
        raise RuntimeError("non-positive stride is not supported")
    if any(value <= 0 for value in dilation):
        raise RuntimeError("dilation should be greater than zero")
    if call.padding_mode not in PADDING_MODES:
        known = ", ".join(map(repr, PADDING_MODES))
        raise ValueError(f"padding_mode must be one of {known}, but got padding_mode={call.padding_mode!r}")


def _check_channels(call: Spelled, groups: int) -> int:
    """The channels of the result."""
    weight, shape = list(call.weight_shape), list(call.input_shape)
    if weight[0] < groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, "
            f"but got weight of size {weight} instead"
        )
    if weight[0] % groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
            f"but got weight of size [{weight}] instead"
        )
    c, made = weight[1] * groups, weight[0]
    given, of_bias = f"Given groups={groups}", "Given"
    if call.transposed:
        c, made = made, c
        given = of_bias = "Given transposed=1"
        of_bias += ","
    if shape[1] != c:
        raise RuntimeError(
            f"{given}, weight of size {weight}, expected input{shape} to have {c} channels, "
            f"but got {shape[1]} channels instead"
        )
    if call.bias_shape is not None and tuple(call.bias_shape) != (made,):
        raise RuntimeError(
            f"{of_bias} weight of size {weight}, expected bias to be 1-dimensional with {made} elements, "
            f"but got bias of size {list(call.bias_shape)} instead"
        )
    return made


def _check_output_padding(extra: Shape, stride: Shape, dilation: Shape) -> None:
    if any(value < 0 for value in extra):
        raise RuntimeError("negative output_padding is not supported")
    if any(e >= s and e >= d for e, s, d in zip(extra, stride, dilation, strict=True)):
        names = ("depth", "height", "width")[-max(len(extra), 2) :]
        told = []
        for word, values, filler in (("output_padding", extra, 0), ("stride", stride, 1), ("dilation", dilation, 1)):
            filled = (filler,) * (len(names) - len(values)) + values  # torch sees 1-D as one row of a picture
            told += [f"{word}_{name}: {value}" for name, value in zip(names, filled, strict=True)]
        raise RuntimeError("output padding must be smaller than either stride or dilation, but got " + " ".join(told))


def _check_spatial(call: Spelled, spatial: Shape) -> None:
    if not torch.compiler.is_compiling() and 0 in call.input_shape[2:] and all(size > 0 for size in spatial):
        raise RuntimeError(
            f"Only zero batch or zero channel inputs are supported, but got input shape: {list(call.input_shape)}"
        )


def _check_transposed_sizes(call: Spelled, spatial: Shape) -> None:
    if torch.compiler.is_compiling():
        return
    if 0 in call.input_shape[2:]:
        raise RuntimeError(
            f"Only zero batch or zero channel inputs are supported, but got input shape: {list(call.input_shape)}"
        )
    if any(size <= 0 for size in spatial):
        raise RuntimeError(
            f"Given input size per channel: ({' x '.join(map(str, call.input_shape[2:]))}). "
            f"Calculated output size per channel: ({' x '.join(map(str, spatial))}). Output size is too small"
        )
