"""Calls whose results are compared to the bit: between threads, with children of a fork, with spawned ones."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from checks import BY_NAME, channels_last
from torch import Tensor

import plainconv

FUNCTIONS: dict[int, Callable[..., Tensor]] = {1: plainconv.conv1d, 2: plainconv.conv2d, 3: plainconv.conv3d}
DEFINED: dict[int, Callable[..., Tensor]] = {
    1: torch.nn.functional.conv1d,
    2: torch.nn.functional.conv2d,
    3: torch.nn.functional.conv3d,
}


class Job(NamedTuple):
    """A call of the engine: sizes, options, and whether the input is channels_last."""

    algorithm: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    last: bool = False

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.input))
        return f"{self.algorithm} {sizes} {str(self.dtype)[6:]}{' channels_last' * self.last}"

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(shape, generator=generator).to(self.dtype) for shape in (self.input, self.weight))
        return (channels_last(x) if self.last else x), w

    def run(self, x: Tensor, w: Tensor) -> Tensor:
        return FUNCTIONS[x.dim() - 2](x, w, algorithm=self.algorithm, **self.options)

    def check(self, result: Tensor, x: Tensor, w: Tensor) -> None:
        """Against torch in float64; the tolerance is what narrow claims, as all of the engine does."""
        options = {name: value for name, value in self.options.items() if name != "bias"}
        exact, sums = (DEFINED[x.dim() - 2](a.double(), b.double(), **options) for a, b in ((x, w), (x.abs(), w.abs())))
        terms = w[0].numel()
        kept = torch.promote_types(self.dtype, torch.float32)
        bound = min(terms + 1.0, 6 * terms**0.5 + 2) * torch.finfo(kept).eps * sums
        if kept != self.dtype:
            bound = bound + torch.finfo(self.dtype).eps / 2 * sums
        assert bool(((result.double() - exact).abs() <= bound).all()), f"{self} is wrong"


# Every kernel of the engine, contiguous and channels_last, some with tails of channels, lanes and rows.
JOBS = (
    Job("narrow", (2, 3, 37, 41), (5, 3, 3, 3), {"padding": 1}),
    Job("narrow", (2, 3, 301), (4, 3, 5), {"stride": 2}, torch.bfloat16),
    Job("narrow", (1, 2, 9, 11, 13), (3, 2, 3, 3, 3), {"padding": 1}, torch.float64),
    Job("depthwise", (2, 19, 29, 31), (19, 1, 3, 3), {"padding": 1, "groups": 19}),
    Job("depthwise", (2, 19, 29, 31), (19, 1, 5, 5), {"padding": 2, "groups": 19}, last=True),
    Job("depthwise", (1, 24, 500), (24, 1, 4), {"padding": 3, "groups": 24}, torch.float16),
    Job("direct", (2, 24, 27, 30), (40, 24, 3, 3), {"padding": 1}),
    Job("direct", (2, 24, 27, 30), (40, 24, 3, 3), {"padding": 1}, last=True),
    Job("direct", (2, 26, 27, 30), (40, 13, 3, 3), {"stride": 2, "groups": 2}, torch.bfloat16),
    Job("direct", (1, 8, 9, 11, 13), (12, 8, 3, 3, 3), {"padding": 1}, last=True),
    Job("pointwise", (2, 48, 27, 30), (33, 48, 1, 1), {}),
    Job("pointwise", (2, 48, 27, 30), (33, 48, 1, 1), {"stride": 2}, torch.float64, last=True),
    Job("auto", (2, 16, 32, 32), (16, 16, 3, 3), {"padding": 1}),
)
ENGINE = ("narrow", "depthwise", "direct", "pointwise")
assert {job.algorithm for job in JOBS} == {*ENGINE, "auto"} <= {*BY_NAME, "auto"}


def digest(tensor: Tensor) -> str:
    """Of the values in order, to the bit; made without torch's threads."""
    as_it_lies = tensor.view(torch.int16) if tensor.itemsize == 2 else tensor  # numpy has no bfloat16
    return hashlib.sha256(as_it_lies.numpy().tobytes()).hexdigest()


@functools.cache
def tensors() -> list[tuple[Tensor, Tensor]]:
    """Of all jobs. A forked child inherits them: where its parent used several threads, torch itself would hang there,
    in any operation of its own that is large enough for them."""
    return [job.tensors() for job in JOBS]


def digests() -> list[str]:
    """Of the results of all jobs, with as many threads as torch has now."""
    return [digest(job.run(*given)) for job, given in zip(JOBS, tensors(), strict=True)]


def tell(threads: int, queue: Any) -> None:
    """What a child does: everything, as its own settings say."""
    torch.set_num_threads(threads)
    queue.put(digests())


class Convolved(torch.utils.data.Dataset[list[str]]):
    """A dataset whose items are results of convolutions."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[str]:
        return digests()
