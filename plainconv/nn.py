"""torch.nn's convolution layers, computed by plainconv: change the import, keep everything else.

Each class is a subclass of torch's of the same name: the constructor, the initialisation, the parameters, the
state_dict and the repr are torch's own, and `isinstance` holds.  Added are the keywords `algorithm="auto"`,
`max_workspace=None`, `allow_builtin=None` and `precision=None`, the paddings of plainconv.functional that torch lacks,
and padding modes for the transposed layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from plainconv import functional
from plainconv.arguments import CONV_PADDINGS, Spelled, padding_specs
from plainconv.plan import check_algorithm
from plainconv.problem import PADDING_MODES
from plainconv.settings import AUTO, resolve

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
]


class _Layer(_ConvNd):
    """What all layers add to torch's: the settings, and the paddings and modes that torch's constructor refuses."""

    function: Callable[..., Tensor]
    algorithm: str = AUTO
    max_workspace: int | None = None
    allow_builtin: bool | None = None
    precision: str | None = None

    def __init__(
        self,
        *args: Any,
        algorithm: str = AUTO,
        max_workspace: int | None = None,
        allow_builtin: bool | None = None,
        precision: str | None = None,
        **kwargs: Any,
    ) -> None:
        _check(algorithm, max_workspace, allow_builtin, precision)
        try:
            given = inspect.signature(super().__init__).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.__init__(): {error}") from None
        padding, mode = given.arguments.get("padding", 0), given.arguments.get("padding_mode", "zeros")
        transposed = "transpose" in type(self).function.__name__
        if mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {_braced(PADDING_MODES)}, but got padding_mode='{mode}'")
        added = _is_added(padding, transposed)
        if added:
            padding = _checked(type(self).function.__name__, padding)
            given.arguments["padding"] = 0
        if transposed and mode != "zeros":
            given.arguments["padding_mode"] = "zeros"
        super().__init__(*given.args, **given.kwargs)
        self.algorithm, self.max_workspace = algorithm, max_workspace
        self.allow_builtin, self.precision = allow_builtin, precision
        self.padding_mode = mode
        if added:
            self.padding = padding

    def extra_repr(self) -> str:
        told: str = super().extra_repr()  # type: ignore[no-untyped-call]
        told += "" if self.algorithm == AUTO else f", algorithm={self.algorithm}"
        told += "" if self.max_workspace is None else f", max_workspace={self.max_workspace}"
        told += "" if self.allow_builtin is None else f", allow_builtin={self.allow_builtin}"
        return told if self.precision is None else f"{told}, precision={self.precision}"

    def __prepare_scriptable__(self) -> Any:
        raise _beyond_jit(self, "compile")


def _beyond_jit(layer: _Layer, does: str) -> RuntimeError:
    name = type(layer).__name__
    return RuntimeError(
        f"torch.jit cannot {does} plainconv.nn.{name}; give it torch.nn.{name} of the same arguments, with this "
        "layer's state_dict, or use torch.export (torch.onnx.export with dynamo=True)"
    )


def _called(layer: _Layer, *arguments: Any) -> Tensor:
    try:
        return type(layer).function(
            *arguments,
            padding_mode=layer.padding_mode,
            algorithm=layer.algorithm,
            max_workspace=layer.max_workspace,
            allow_builtin=layer.allow_builtin,
            precision=layer.precision,
        )
    except RuntimeError as error:
        if str(error).startswith("Cannot insert a Tensor that requires grad as a constant"):  # frozen ones it may
            raise _beyond_jit(layer, "trace") from None
        raise


def _check(algorithm: str, max_workspace: int | None, allow_builtin: bool | None, precision: str | None) -> None:
    check_algorithm(algorithm)
    resolve(algorithm, max_workspace, allow_builtin, precision)


def _braced(words: tuple[str, ...]) -> str:
    """As torch writes a set, in an order that stays."""
    return "{" + ", ".join(map(repr, words)) + "}"


def _is_added(padding: Any, transposed: bool) -> bool:
    """Whether torch's constructor does not know this padding."""
    if isinstance(padding, str):
        return transposed or padding not in ("same", "valid")
    return isinstance(padding, (tuple, list)) and any(isinstance(side, (tuple, list, str)) for side in padding)


def _checked(function: str, padding: Any) -> Any:
    dims = int(function[-2])
    if isinstance(padding, str) and "transpose" not in function and padding not in CONV_PADDINGS:
        raise ValueError(f"Invalid padding string {padding!r}, should be one of {_braced(CONV_PADDINGS)}")
    specs = padding_specs(Spelled(function, dims, (), (), None, 1, padding, 0, 1, 1, "zeros"))
    return padding if isinstance(padding, str) else tuple(specs)


class _Conv(_Layer):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _called(self, input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _ConvTranspose(_Layer, _ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        extra = self.output_padding if output_size is None else self._output_padding_for(input, output_size)
        sizes = self.stride, self.padding, extra, self.groups, self.dilation
        return _called(self, input, self.weight, self.bias, *sizes)

    def _output_padding_for(self, input: Tensor, output_size: list[int]) -> list[int]:
        dims = len(self.kernel_size)
        specs = [self.padding] * dims if isinstance(self.padding, str) else self.padding
        if any(isinstance(spec, str) for spec in specs):
            raise ValueError(
                f"output_size={list(output_size)} cannot be chosen with padding={self.padding!r}, "
                "which makes it the input's size times the stride; use numbers or pairs"
            )
        halves: list[Any] = [_half(sum(s)) if isinstance(s, tuple) else s for s in specs]  # torch takes each twice
        extra = self._output_padding(
            input, output_size, list(self.stride), halves, list(self.kernel_size), dims, list(self.dilation)
        )
        return [int(value) for value in extra]


def _half(total: int) -> int | float:
    return total / 2 if total % 2 else total // 2


class _Lazy:
    """torch's lazy constructors do not know the settings; everything else they pass on."""

    def __init__(
        self,
        *args: Any,
        algorithm: str = AUTO,
        max_workspace: int | None = None,
        allow_builtin: bool | None = None,
        precision: str | None = None,
        **kwargs: Any,
    ) -> None:
        _check(algorithm, max_workspace, allow_builtin, precision)
        super().__init__(*args, **kwargs)
        self.algorithm, self.max_workspace = algorithm, max_workspace
        self.allow_builtin, self.precision = allow_builtin, precision


class Conv1d(_Conv, torch.nn.Conv1d):
    """torch.nn.Conv1d, computed by plainconv.conv1d; see torch's for the arguments."""

    function = staticmethod(functional.conv1d)


class Conv2d(_Conv, torch.nn.Conv2d):
    """torch.nn.Conv2d, computed by plainconv.conv2d; see torch's for the arguments."""

    function = staticmethod(functional.conv2d)


class Conv3d(_Conv, torch.nn.Conv3d):
    """torch.nn.Conv3d, computed by plainconv.conv3d; see torch's for the arguments."""

    function = staticmethod(functional.conv3d)


class ConvTranspose1d(_ConvTranspose, torch.nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d, computed by plainconv.conv_transpose1d; see torch's for the arguments."""

    function = staticmethod(functional.conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, torch.nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d, computed by plainconv.conv_transpose2d; see torch's for the arguments."""

    function = staticmethod(functional.conv_transpose2d)


class ConvTranspose3d(_ConvTranspose, torch.nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d, computed by plainconv.conv_transpose3d; see torch's for the arguments."""

    function = staticmethod(functional.conv_transpose3d)


class LazyConv1d(_Lazy, torch.nn.LazyConv1d, Conv1d):  # type: ignore[misc]
    """torch.nn.LazyConv1d that becomes a plainconv.nn.Conv1d at its first input."""

    cls_to_become = Conv1d


class LazyConv2d(_Lazy, torch.nn.LazyConv2d, Conv2d):  # type: ignore[misc]
    """torch.nn.LazyConv2d that becomes a plainconv.nn.Conv2d at its first input."""

    cls_to_become = Conv2d


class LazyConv3d(_Lazy, torch.nn.LazyConv3d, Conv3d):  # type: ignore[misc]
    """torch.nn.LazyConv3d that becomes a plainconv.nn.Conv3d at its first input."""

    cls_to_become = Conv3d


class LazyConvTranspose1d(_Lazy, torch.nn.LazyConvTranspose1d, ConvTranspose1d):  # type: ignore[misc]
    """torch.nn.LazyConvTranspose1d that becomes a plainconv.nn.ConvTranspose1d at its first input."""

    cls_to_become = ConvTranspose1d


class LazyConvTranspose2d(_Lazy, torch.nn.LazyConvTranspose2d, ConvTranspose2d):  # type: ignore[misc]
    """torch.nn.LazyConvTranspose2d that becomes a plainconv.nn.ConvTranspose2d at its first input."""

    cls_to_become = ConvTranspose2d


class LazyConvTranspose3d(_Lazy, torch.nn.LazyConvTranspose3d, ConvTranspose3d):  # type: ignore[misc]
    """torch.nn.LazyConvTranspose3d that becomes a plainconv.nn.ConvTranspose3d at its first input."""

    cls_to_become = ConvTranspose3d
