"""A convolution as a value: its sizes, its shape arithmetic, and what is asked of it.

Convolution is one form that is linear in each of three tensors,

    input x [n, c, *spatial],  weight w [o, c/g, *kernel],  output y [n, o, *out],

and sums the products  x[n, c, y*stride + k*dilation - lo] * w[o, c, k]  paired with  y[n, o, y].  Given two of the
tensors, a `Direction` names the map to the third.  Nothing here computes with tensors: this is the ground floor, and
every other module speaks in these values.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
DEFAULT_MAX_WORKSPACE = 1 << 30
PRECISIONS = ("highest", "high")  # with "highest", no error is larger than that of a sum of products as they are
DEFAULT_PRECISION = "high"
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # channels_last, by a tensor's dimensions
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "hardswish", "sigmoid", "silu", "gelu")
LEAKY_SLOPE = 0.01  # of "leaky_relu" without a number

Pair = tuple[int, int]


def read_activation(activation: str) -> tuple[str, tuple[float, ...]]:
    """Which of ACTIVATIONS a text names, and its numbers: of leaky_relu the slope, of the others none.

    "leaky_relu(0.2)" has that slope, "leaky_relu" has LEAKY_SLOPE.  Raises ValueError for anything else.
    """
    if activation in ACTIVATIONS:
        return activation, (LEAKY_SLOPE,) if activation == "leaky_relu" else ()
    if not isinstance(activation, str) or not activation.startswith("leaky_relu(") or not activation.endswith(")"):
        raise ValueError(
            f"activation must be None or one of {ACTIVATIONS}, or 'leaky_relu(slope)', but got {activation!r}"
        )
    try:
        slope = float(activation[len("leaky_relu(") : -1])
    except ValueError:
        slope = math.nan
    if not abs(slope) <= torch.finfo(torch.float32).max:  # the sums of half types are float32, too
        raise ValueError(
            f"activation={activation!r} must have a finite number (in float32) as its slope, as 'leaky_relu(0.2)' has"
        )
    return "leaky_relu", (slope,)


def settled_activation(activation: str | None, dtype: torch.dtype) -> str | None:
    """The activation as a Request spells it, so that one slope is one text: "leaky_relu(0.20)" is "leaky_relu(0.2)".

    Raises ValueError if there is no such activation, or none for the type.
    """
    if activation is None:
        return None
    name, numbers = read_activation(activation)
    if not dtype.is_floating_point:
        raise ValueError(f"activation={activation!r} is for floating types, but the tensors are {dtype}")
    return name if numbers in ((), (LEAKY_SLOPE,)) else f"{name}({numbers[0]!r})"


class Direction(Enum):
    """Which of the three tensors is made out of the other two (`given`, in the order operators take them)."""

    FORWARD = "forward"
    GRAD_INPUT = "grad_input"
    GRAD_WEIGHT = "grad_weight"

    # Members are looked up in dictionaries on every call; identity is enough and much cheaper than Enum's own hash.
    __hash__ = object.__hash__

    @property
    def makes(self) -> str:
        return {"forward": "y", "grad_input": "x", "grad_weight": "w"}[self.value]

    @property
    def given(self) -> tuple[str, str]:
        return {"forward": ("x", "w"), "grad_input": ("y", "w"), "grad_weight": ("x", "y")}[self.value]

    @staticmethod
    def making(role: str) -> Direction:
        return _MAKING[role]


_MAKING = {direction.makes: direction for direction in Direction}


class Geometry(NamedTuple):
    """How the kernel moves over the input; everything about a convolution that is not the size of a tensor."""

    stride: tuple[int, ...]
    padding: tuple[Pair, ...]  # (lo, hi) for each dimension; negative crops
    dilation: tuple[int, ...]  # 1 means none
    groups: int = 1
    padding_mode: str = "zeros"


def out_size(size: int, kernel: int, stride: int, padding: Pair, dilation: int) -> int:
    """Length of the output along one dimension (works on torch.SymInt as well)."""
    return (size + padding[0] + padding[1] - dilation * (kernel - 1) - 1) // stride + 1


def out_spatial(spatial: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
    """Lengths of the output along every dimension (works on torch.SymInt as well)."""
    sides = zip(spatial, kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    return tuple(out_size(*side) for side in sides)


@dataclass(frozen=True, slots=True)
class ConvProblem:
    """One convolution: all sizes, as integers.

    `str(problem)` is a short text, "n2 c64 o64 x56x56 k3x3 s2 p1", and `ConvProblem.parse` reads it back.
    Raises RuntimeError, in torch's words where torch has them, if the sizes do not fit together.
    """

    batch: int
    in_channels: int
    out_channels: int
    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[Pair, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        lengths = {len(self.spatial), len(self.kernel), len(self.stride), len(self.padding), len(self.dilation)}
        if len(lengths) != 1:
            raise RuntimeError(f"spatial, kernel, stride, padding and dilation should have one length, got {self}")
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {PADDING_MODES}, but got padding_mode={self.padding_mode!r}")
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise RuntimeError(
                f"in_channels={self.in_channels} and out_channels={self.out_channels} "
                f"must be divisible by groups={self.groups}"
            )
        self._check_extents()
        self._check_borders()

    def _check_extents(self) -> None:
        padded = self.padded
        if any(
            p < k or p < (k - 1) * d + 1 or k < 1 for p, k, d in zip(padded, self.kernel, self.dilation, strict=True)
        ):
            extents = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))
            raise RuntimeError(
                f"Calculated padded input size per channel: ({' x '.join(map(str, padded))}). "
                f"Kernel size: ({' x '.join(map(str, extents))}). Kernel size can't be greater than actual input size"
            )

    def _check_borders(self) -> None:
        for dim, (size, (lo, hi)) in enumerate(zip(self.spatial, self.padding, strict=True)):
            inside = size + min(lo, 0) + min(hi, 0)
            if inside < 0:
                raise RuntimeError(
                    f"negative padding {(lo, hi)} crops more than the input's {size} at dimension {dim + 2}"
                )
            if self.padding_mode == "zeros" or max(lo, hi) <= 0:
                continue
            if self.padding_mode == "reflect" and max(lo, hi) >= inside:
                raise RuntimeError(
                    "Padding size should be less than the corresponding input dimension, but got: padding "
                    f"({lo}, {hi}) at dimension {dim + 2} of input {list(self.input_shape)}"
                )
            if self.padding_mode == "circular" and max(lo, hi) > inside:
                raise RuntimeError("Padding value causes wrapping around more than once.")
            if inside == 0:
                raise RuntimeError(
                    f"padding_mode={self.padding_mode!r} has nothing to read: dimension {dim + 2} is empty"
                )

    # -- shapes ------------------------------------------------------------------------------------------------------

    @property
    def dims(self) -> int:
        return len(self.spatial)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding, self.dilation, self.groups, self.padding_mode)

    @property
    def padded(self) -> tuple[int, ...]:
        return tuple(s + lo + hi for s, (lo, hi) in zip(self.spatial, self.padding, strict=True))

    @property
    def out(self) -> tuple[int, ...]:
        return out_spatial(self.spatial, self.kernel, self.geometry)

    @property
    def group_in(self) -> int:
        """Input channels of one group."""
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        """Output channels of one group."""
        return self.out_channels // self.groups

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.in_channels, *self.spatial)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.group_in, *self.kernel)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.out_channels, *self.out)

    def shape_of(self, role: str) -> tuple[int, ...]:
        """Shape of the tensor "x", "w" or "y"."""
        return {"x": self.input_shape, "w": self.weight_shape, "y": self.output_shape}[role]

    @property
    def multiplies(self) -> int:
        """Products summed by the definition, the same in every direction (padding counted)."""
        return self.batch * self.out_channels * math.prod(self.out) * self.group_in * self.taps

    def terms(self, direction: Direction) -> int:
        """Products summed into one element of the tensor that `direction` makes, at most."""
        if direction is Direction.FORWARD:
            return self.group_in * self.taps
        if direction is Direction.GRAD_WEIGHT:
            return self.batch * math.prod(self.out)
        # A border folds padded places onto one element: each side once, but replicate all of a side onto its edge.
        folds = 1
        if self.padding_mode != "zeros":
            for lo, hi in self.padding:
                places = 1 + max(lo, 0) + max(hi, 0)
                folds *= places if self.padding_mode == "replicate" else min(places, 3)
        return self.group_out * self.taps * folds

    @staticmethod
    def between(x_shape: tuple[int, ...], w_shape: tuple[int, ...], geometry: Geometry) -> ConvProblem:
        """The problem with an input of `x_shape` [n, c, *spatial] and a weight of `w_shape` [o, c/g, *kernel]."""
        return ConvProblem(x_shape[0], x_shape[1], w_shape[0], tuple(x_shape[2:]), tuple(w_shape[2:]), *geometry)

    # -- text --------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        def each(values: tuple[int, ...]) -> str:
            return "x".join(map(str, values))

        parts = [f"n{self.batch}", f"c{self.in_channels}", f"o{self.out_channels}"]
        parts += [f"x{each(self.spatial)}", f"k{each(self.kernel)}"]
        if set(self.stride) != {1}:
            parts.append(f"s{each(self.stride)}")
        if set(self.padding) != {(0, 0)}:
            parts.append("p" + "x".join(f"{lo}" if lo == hi else f"{lo}:{hi}" for lo, hi in self.padding))
        if set(self.dilation) != {1}:
            parts.append(f"d{each(self.dilation)}")
        if self.groups != 1:
            parts.append(f"g{self.groups}")
        if self.padding_mode != "zeros":
            parts.append(f"m{self.padding_mode}")
        return " ".join(parts)

    @staticmethod
    def parse(text: str) -> ConvProblem:
        """Read the text form: "n2 c64 o64 x56x56 k3x3 s2 p1:0 d1 g1 mreflect".

        s, p, d, g and m may be left out; one number stands for every dimension. Raises ValueError for anything else.
        """
        fields: dict[str, str] = {}
        for word in text.split():
            if not re.fullmatch(r"[ncogxksdp][-\dx:]+|m[a-z]+", word) or word[0] in fields:
                raise ValueError(f"problem text {text!r}: {word!r} is not one of n c o x k s p d g m with its value")
            fields[word[0]] = word[1:]
        if missing := [letter for letter in "ncoxk" if letter not in fields]:
            raise ValueError(f"problem text {text!r} lacks {', '.join(missing)}")
        try:
            spatial = tuple(int(v) for v in fields["x"].split("x"))

            def each(letter: str, default: str) -> list[str]:
                values = fields.get(letter, default).split("x")
                return values * len(spatial) if len(values) == 1 else values

            pairs = [[int(v) for v in side.split(":")] for side in each("p", "0")]
            if any(len(pair) > 2 for pair in pairs):
                raise ValueError(f"p{fields['p']} is more than a pair lo:hi for a dimension")
            return ConvProblem(
                int(fields["n"]),
                int(fields["c"]),
                int(fields["o"]),
                spatial,
                tuple(map(int, each("k", ""))),
                tuple(map(int, each("s", "1"))),
                tuple((pair[0], pair[-1]) for pair in pairs),
                tuple(map(int, each("d", "1"))),
                int(fields.get("g", "1")),
                fields.get("m", "zeros"),
            )
        except ValueError as error:
            raise ValueError(f"problem text {text!r}: {error}") from None


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that the choice of an algorithm may depend on; values of tensors are not among it.

    What is made is  activation(convolution + bias + residual),  each of the three if it is there: a bias has one value
    for each channel, a residual the shape and memory format of the result, and activation is one of ACTIVATIONS
    (gelu with erf) or "leaky_relu(slope)", spelled as `settled_activation` does.  GRAD_WEIGHT adds no bias: with one,
    it makes the gradient of the bias of y, too.  channels_last speaks of the result, and is never set where torch has
    no such format; max_workspace is in bytes; allow_builtin lets torch's own convolution compete.  packed: the weight
    stays from call to call, so that what is made of it alone is made once, and is no part of a call.
    tf32: float32 may be rounded to TF32 before it is multiplied, as torch's switch for convolutions on CUDA says, and
    precision, one of PRECISIONS, allows.  gpu: which one, where device is "cuda"; they may be of different kinds.
    """

    problem: ConvProblem
    direction: Direction
    dtype: torch.dtype
    device: str = "cpu"
    channels_last: bool = False
    has_bias: bool = False
    threads: int = 1
    max_workspace: int = DEFAULT_MAX_WORKSPACE
    activation: str | None = None
    has_residual: bool = False
    allow_builtin: bool = False
    packed: bool = False
    tf32: bool = False
    precision: str = DEFAULT_PRECISION
    gpu: int = 0

    def __post_init__(self) -> None:
        if self.problem.dims not in (2, 3):
            object.__setattr__(self, "channels_last", False)
        object.__setattr__(self, "activation", settled_activation(self.activation, self.dtype))

    @property
    def place(self) -> torch.device:
        """Where its tensors are."""
        return torch.device("cuda", self.gpu) if self.device == "cuda" else torch.device(self.device)

    @property
    def makes_bias(self) -> bool:
        """Whether the gradient of a bias is made beside that of the weight: the sum of y over images and places."""
        return self.has_bias and self.direction is Direction.GRAD_WEIGHT

    @property
    def bias_shape(self) -> tuple[int]:
        """Of the bias, or of its gradient."""
        return (self.problem.in_channels if self.direction is Direction.GRAD_INPUT else self.problem.out_channels,)

    def __str__(self) -> str:
        told = f"{self.direction.value} {self.problem} {str(self.dtype).removeprefix('torch.')} {self.device}"
        told += f":{self.gpu}" if self.gpu else ""
        told += " as TF32" if self.tf32 else ""
        told += " channels_last" if self.channels_last else ""
        told += " prepacked" if self.packed else ""
        told += " + bias" if self.has_bias else ""
        told += " + residual" if self.has_residual else ""
        told += "" if self.activation is None else f", {self.activation}"
        if self.max_workspace != DEFAULT_MAX_WORKSPACE:
            told += f", max_workspace={self.max_workspace}"
        return told if self.precision == DEFAULT_PRECISION else f"{told}, precision={self.precision}"
