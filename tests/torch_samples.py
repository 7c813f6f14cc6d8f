"""torch's own samples for its six convolutions, and the one tolerance that results are held to.

A result may differ from the exact one by

    units * eps(type of the sums) * sum of |products|   +   eps(type of the result) * |exact|

where `units` is what the algorithm that served the call states (Algorithm.error). fft spreads its rounding over a whole
transform, so there the largest sum of |products| stands for all. Integers are exact: they wrap, as torch's do.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from checks import ROUNDING
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import ErrorInput, OpInfo, SampleInput

import plainconv
from plainconv.menu import ALGORITHMS
from plainconv.menu.base import compute_dtype
from plainconv.plan import Explanation

# torch.testing._internal froze torch's global switches for the whole process; other tests use them. (The module stands
# in another, so that the flag cannot be set by its name.)
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

FUNCTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
INFOS: dict[str, OpInfo] = {op.name.rpartition(".")[2]: op for op in op_db if op.name.rpartition(".")[2] in FUNCTIONS}
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


def samples(name: str, dtype: torch.dtype = torch.float64, *, requires_grad: bool = False) -> list[SampleInput]:
    """torch's samples for a function; the same at every call."""
    torch.manual_seed(0)
    return list(INFOS[name].sample_inputs("cpu", dtype, requires_grad))


def small(every: Sequence[SampleInput], numel: int = 80) -> list[SampleInput]:
    """Those whose input and weight have no more elements than `numel` together, but at least the three smallest."""

    def size(sample: SampleInput) -> int:
        return sample.input.numel() + sample.args[0].numel()

    least = sorted(every, key=size)[:3]
    return [sample for sample in every if size(sample) <= numel or any(sample is one for one in least)]


def error_samples(name: str) -> list[ErrorInput]:
    return list(INFOS[name].error_inputs("cpu"))


def call(function: Callable[..., Tensor], sample: SampleInput, **added: object) -> Tensor:
    return function(sample.input, *sample.args, **sample.kwargs, **added)


def explained(name: str, sample: SampleInput, algorithm: str) -> Explanation:
    """What plainconv says of the call."""
    return plainconv.explain(
        sample.input if sample.input.dim() == sample.args[0].dim() else sample.input.unsqueeze(0),
        *sample.args,
        **sample.kwargs,
        algorithm=algorithm,
        transposed="transpose" in name,
    )


def exact_result(function: Callable[..., Tensor], sample: SampleInput) -> tuple[Tensor, Tensor]:
    """torch's result in float64, complex128 or int64, and the sums of |products| (of no use for integers)."""
    dtype = sample.input.dtype
    wide = torch.int64 if dtype in INTEGERS else torch.complex128 if dtype.is_complex else torch.float64
    exact = call(function, sample.transform(lambda leaf: leaf.to(wide) if isinstance(leaf, Tensor) else leaf))
    absolute = call(function, sample.transform(lambda leaf: _absolute(leaf) if isinstance(leaf, Tensor) else leaf))
    return exact, absolute


def _absolute(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128).abs()


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def tolerance(dtype: torch.dtype, units: float, exact: Tensor, absolute: Tensor, *, spread: bool) -> Tensor:
    """The largest difference allowed for each element; see the top of this file."""
    magnitude = absolute.max() if spread and absolute.numel() else absolute
    tiny = torch.finfo(dtype).smallest_normal
    return units * eps(compute_dtype(dtype)) * magnitude + eps(dtype) * exact.abs() + tiny


def assert_within(ours: Tensor, exact: Tensor, absolute: Tensor, units: float, *, spread: bool = False) -> None:
    """ours, of any type, against an exact result in a wide type, elementwise."""
    assert ours.shape == exact.shape
    if ours.dtype in INTEGERS:
        assert torch.equal(ours, exact.to(ours.dtype))
        return
    off = (ours.to(exact.dtype) - exact).abs()
    allowed = tolerance(ours.dtype, units, exact, absolute, spread=spread)
    assert bool((off <= allowed).all()), f"off by {off.max():.3g}, allowed {allowed[off > allowed].max():.3g} there"


def assert_served(ours: Tensor, exact: Tensor, absolute: Tensor, explanation: Explanation) -> None:
    """The same, within the error that the algorithm which served the call states."""
    chosen = next(algorithm for algorithm in ALGORITHMS if algorithm.name == explanation.chosen)
    assert_within(ours, exact, absolute, chosen.error(explanation.request), spread=chosen.name in ROUNDING)


def torch_function(name: str) -> Callable[..., Tensor]:
    return getattr(F, name)


def our_function(name: str) -> Callable[..., Tensor]:
    return getattr(plainconv, name)
