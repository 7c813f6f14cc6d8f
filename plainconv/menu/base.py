"""The contract of an algorithm, and the few things that all of them need.

An algorithm is a frozen value: whether it can serve a request, what that costs, how exact it is, and the function
that does it.  The caller allocates the result and one block of scratch memory, exactly as large as `cost` said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plainconv.memory import LARGE, lent
from plainconv.problem import Request, read_activation

ALIGNMENT = 64  # bytes; one cache line, and one AVX-512 vector

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128, torch.complex32)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
DTYPES = FLOATS + COMPLEX + INTEGERS


class Tensors(NamedTuple):
    """What goes into the result: the two given tensors in the direction's order, and what is added to their product.

    The bias has one value for each channel of the result. A weight has none: GRAD_WEIGHT makes the gradient of the bias
    of y instead, beside the weight's, and writes it here.
    """

    first: Tensor
    second: Tensor
    bias: Tensor | None = None  # [channels of x or y]
    residual: Tensor | None = None  # of the result's shape and memory format


class Cost(NamedTuple):
    """What an algorithm expects of one call: multiplies, bytes moved, bytes of workspace, seconds."""

    multiplies: int
    bytes: int
    workspace: int
    seconds: float


class AlgorithmRefused(RuntimeError):
    """The algorithm that was asked for by name cannot serve this call; the message says why."""


Bound = Callable[[Tensors, Tensor, Tensor], None]  # run, without its request
Made = dict[Any, Tensor]  # what was made of a weight that stays, by how it was made


@dataclass(frozen=True)
class Algorithm:
    """One entry of the menu.

    name      the word a user gives to algorithm=
    why_not   None if it can serve the request, else one sentence for a person; never raises
    cost      a pure function of the request
    error     a bound for |result - exact| in units of eps(compute type) * sum of |products|, the sum being that of each
              element where products are summed as they are (then small integers are exact), else the largest
    run       fills `out` from the tensors, with `workspace` (uint8, at least cost(request).workspace bytes) as scratch
    version   raised when the code changes, so that old measurements are ignored
    fuses     whether run adds the residual, applies the activation and makes the gradient of a bias; else `finish` does
    bind      optional: run for a request and for tensors of the strides of those given, whose values are not looked at;
              what run would look up in every call is looked up once
    pack      optional: as bind, for a request that is `packed`: what is made of the weight alone is made now, or found
              in the memory given, where calls of other sizes may have left it (run and bind get no such request then)
    by_name   whether it is taken only where it is named: run looks at values, and raises AlgorithmRefused for some
    on_host   whether it computes on the CPU, whatever device tensors are on: on others it is taken only where it is
              named, for it waits for them, and no graph captures that
    """

    name: str
    why_not: Callable[[Request], str | None]
    cost: Callable[[Request], Cost]
    error: Callable[[Request], float]
    run: Callable[[Request, Tensors, Tensor, Tensor], None]
    version: int = 1
    fuses: bool = False
    bind: Callable[[Request, Tensors], Bound] | None = None
    pack: Callable[[Request, Tensors, Made], Bound] | None = None
    by_name: bool = False
    on_host: bool = False


def made_once(made: Made, key: Any, size: int, fill: Callable[[Tensor], None]) -> Tensor:
    """So many bytes that `fill` fills, unless they are there already under this key."""
    kept = made.get(key)
    if kept is None:
        kept = lent((size,), (1,), torch.uint8) if size >= LARGE else torch.empty(size, dtype=torch.uint8)
        fill(kept)
        made[key] = kept  # once it is whole: other threads may look for it
    return kept


def kept_tensor(made: Made, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """The same of a tensor that `make` makes, on any device."""
    kept = made.get(key)
    if kept is None:
        kept = make()
        if kept.is_cuda:  # made once it is whole: other streams may look for it
            torch.cuda.current_stream(kept.device).synchronize()
        made[key] = kept
    return kept


@contextmanager
def kept_apart(made: Made, mark: Hashable) -> Iterator[Made]:
    """What was made of a part of the weight, or of another order of it (the mark says which), to be added to."""
    own = {key[1]: kept for key, kept in tuple(made.items()) if key[0] == mark}
    yield own
    made.update({(mark, key): kept for key, kept in own.items()})


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: float32 for half types, complex64 for complex32, else the type itself."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return torch.complex64 if dtype is torch.complex32 else dtype


def sum_error(request: Request) -> float:
    """The `error` of an algorithm that sums the products of an element as they are, in any order."""
    return summation_error(request.problem.terms(request.direction))


def summation_error(terms: int) -> float:
    """Units of eps by which a floating-point sum of `terms` products may be off.

    Rounding errors behave like a random walk: Higham and Mary, "A new approach to probabilistic rounding error
    analysis" (2019), theorem 2.4, bound them by  lambda * sqrt(terms)  with probability above 1 - 2 exp(-lambda^2/2);
    lambda = 6 leaves one chance in 3e7.
    """
    return min(terms + 1.0, 6 * math.sqrt(terms) + 2)


# Units of eps: 10 of 23 bits are left of both factors, cut and not rounded, so that a product is off by 2^-9 of itself
# at most: 2^14 units. Six times that, since over the root of its terms a sum is held to it, too (bench/check.py).
_TF32 = 6 * 2.0**14


def matrix_error(request: Request) -> float:
    """The same of matrix units, which cut float32 to TF32 where they may."""
    return sum_error(request) + _TF32 * request.tf32


# -- what comes behind the convolution --------------------------------------------------------------------------------

_IN_PLACE: dict[str, Callable[..., Tensor]] = {  # of the result and the numbers of the activation
    "relu": torch.relu_,
    "relu6": lambda out: torch.nn.functional.relu6(out, inplace=True),
    "leaky_relu": torch.nn.functional.leaky_relu_,
    "hardswish": lambda out: torch.nn.functional.hardswish(out, inplace=True),
    "sigmoid": torch.sigmoid_,
    "silu": lambda out: torch.nn.functional.silu(out, inplace=True),
    "gelu": torch.ops.aten.gelu_,
}


def sum_for_bias(y: Tensor, bias: Tensor) -> None:
    """Fill the gradient of a bias with the sum of y's over images and places."""
    dims = [0, *range(2, y.dim())]
    if y.is_complex():  # torch sums no complex32
        y, bias = torch.view_as_real(y), torch.view_as_real(bias)
    torch.sum(y, dims, dtype=y.dtype, out=bias)


def finish(request: Request, tensors: Tensors, out: Tensor) -> None:
    """What an algorithm that does not fuse leaves: the gradient of a bias, the residual, the activation."""
    if tensors.bias is not None and request.makes_bias:
        sum_for_bias(tensors.second, tensors.bias)
    if tensors.residual is not None:
        out += tensors.residual
    if request.activation is not None:
        name, numbers = read_activation(request.activation)
        _IN_PLACE[name](out, *numbers)


def finish_seconds(request: Request) -> float:
    """Estimated time of `finish`; 0 where it has nothing to do."""
    passes = 3 * request.has_residual + 2 * (request.activation is not None)
    operations = request.has_residual + (request.activation is not None) + request.makes_bias
    moved = passes * math.prod(request.problem.shape_of(request.direction.makes))
    moved += request.makes_bias * math.prod(request.problem.output_shape)
    return operations * machine(request).call + moved * request.dtype.itemsize / machine(request).bytes


# -- arithmetic -----------------------------------------------------------------------------------------------------


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into [g, i, j] += a [g, i, k] @ b [g, k, j]; thin products are faster element by element."""
    if a.shape[2] == 1:
        into.addcmul_(a, b)
    elif len(a) == 1:
        into[0].addmm_(a[0], b[0])
    elif b.shape[2] == 1:
        into += (a * b.mT).sum(2, keepdim=True, dtype=into.dtype)
    else:
        into.baddbmm_(a, b)


# -- scratch memory --------------------------------------------------------------------------------------------------


class Buffer(NamedTuple):
    """A piece of workspace to be carved: its shape and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        exact = math.prod(self.shape) * self.dtype.itemsize
        return -(-exact // ALIGNMENT) * ALIGNMENT


def workspace_bytes(buffers: Sequence[Buffer]) -> int:
    """How much workspace `carve` needs for these buffers."""
    return sum(buffer.bytes for buffer in buffers)


def carve(workspace: Tensor, buffers: Sequence[Buffer]) -> list[Tensor]:
    """The buffers as views of the workspace, one after the other, uninitialised."""
    views, begin = [], 0
    for buffer in buffers:
        exact = math.prod(buffer.shape) * buffer.dtype.itemsize
        views.append(workspace[begin : begin + exact].view(buffer.dtype).view(buffer.shape))
        begin += buffer.bytes
    return views


def laid(flat: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """The beginning of a buffer as a tensor of this shape and memory format."""
    flat = flat[: math.prod(shape)]
    if not channels_last:
        return flat.view(shape)
    batch, channels, *inner = shape
    return flat.view(batch, *inner, channels).movedim(-1, 1)


# -- estimates -------------------------------------------------------------------------------------------------------


def moved_bytes(request: Request) -> int:
    """Of the three tensors, each once."""
    return request.dtype.itemsize * sum(math.prod(request.problem.shape_of(role)) for role in ("x", "w", "y"))


class Machine(NamedTuple):
    """Rough speeds that estimates are made of: they rank algorithms, they promise nothing."""

    multiplies: float  # per second and thread, float32 matrix product
    bytes: float  # per second, memory
    call: float  # seconds, one tensor operation


def machine(request: Request) -> Machine:
    """Typical speeds of the kind of device that the request names."""
    if request.device == "cuda":
        return Machine(10e12, 1.5e12, 8e-6)
    return Machine(35e9 * max(request.threads, 1), 10e9, 4e-6)


def product_seconds(request: Request, multiplies: float, m: int, k: int) -> float:
    """Estimated time of `add_product` with `multiplies` in all, whose short sides are m and k."""
    dtype = compute_dtype(request.dtype)
    m, k = max(m, 1), max(k, 1)  # a tensor may have no channels
    slowdown = dtype.itemsize / 4 * (2 if dtype.is_complex else 1)
    if dtype in INTEGERS:
        slowdown = 60.0  # torch multiplies integer matrices without a matrix library
    starved = 4.0 if min(m, k) == 1 and request.problem.groups > 1 else (max(1.0, 24 / m) * max(1.0, 24 / k)) ** 0.5
    return multiplies * slowdown * starved / machine(request).multiplies


def no_integers_on_cuda(request: Request) -> str | None:
    """A why_not for algorithms made of torch's matrix products."""
    if request.device == "cuda" and request.dtype in INTEGERS:
        return (
            f"torch has no matrix product of {request.dtype} on CUDA; use algorithm='reference', "
            "or convert to torch.float64"
        )
    return may_be_rounded(request)


def may_be_rounded(request: Request, products: str = "its products are torch.matmul's, which") -> str | None:
    """The same, of all types: torch's products follow switches that may be thrown after a choice."""
    of_singles = request.dtype in (torch.float32, torch.complex64)
    if request.precision == "highest" and request.device == "cuda" and of_singles:
        return f"{products} may round float32 to TF32 on CUDA, and precision='highest' does not allow it"
    return None
