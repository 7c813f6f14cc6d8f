"""Calls whose results are compared to the bit: between threads, with children of a fork, with spawned ones."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from checks import BY_NAME, channels_last, compare, product_of_lines
from torch import Tensor

import plainconv

FUNCTIONS: dict[int, Callable[..., Tensor]] = {1: plainconv.conv1d, 2: plainconv.conv2d, 3: plainconv.conv3d}


class Job(NamedTuple):
    """A call of the engine: sizes, options, whether the input is channels_last, and whether gradients are asked for."""

    algorithm: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    last: bool = False
    trains: bool = False

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.input))
        told = f"{self.algorithm} {sizes} {str(self.dtype)[6:]}"
        return told + " channels_last" * self.last + " trains" * self.trains

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(shape, generator=generator).to(self.dtype) for shape in (self.input, self.weight))
        if self.algorithm == "separable":
            w = product_of_lines(w)
        return (channels_last(x) if self.last else x), w

    def run(self, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        """The result; if it trains, the gradients of the input and the weight of half its squares' sum."""
        if not self.trains:
            return (self._call(x, w),)
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = self._call(x, w)
        return torch.autograd.grad(y, (x, w), y.detach())

    def check(self, results: tuple[Tensor, ...], x: Tensor, w: Tensor) -> None:
        """Against the definition, within what the algorithm claims."""
        given = {"forward": (x, w)}
        if self.trains:
            y = self._call(x, w)
            given = {"grad_input": (y, w), "grad_weight": (x, y)}
        for (direction, tensors), result in zip(given.items(), results, strict=True):
            told = plainconv.explain(x, w, algorithm=self.algorithm, direction=direction, **self.options)
            compare(BY_NAME[told.chosen], told.request, result, *tensors, to_the_bit=False)

    def _call(self, x: Tensor, w: Tensor) -> Tensor:
        return FUNCTIONS[x.dim() - 2](x, w, algorithm=self.algorithm, **self.options)


# Every kernel of the engine, contiguous and channels_last, some with tails of channels, lanes and rows.
JOBS = (
    Job("narrow", (2, 3, 37, 41), (5, 3, 3, 3), {"padding": 1}),
    Job("narrow", (2, 3, 301), (4, 3, 5), {"stride": 2}, torch.bfloat16),
    Job("narrow", (1, 2, 9, 11, 13), (3, 2, 3, 3, 3), {"padding": 1}, torch.float64),
    Job("depthwise", (2, 19, 29, 31), (19, 1, 3, 3), {"padding": 1, "groups": 19}),
    Job("depthwise", (2, 19, 29, 31), (19, 1, 5, 5), {"padding": 2, "groups": 19}, last=True),
    Job("narrow", (2, 16, 19, 21), (32, 4, 3, 3), {"padding": 1, "groups": 4}, last=True),
    Job("narrow", (2, 16, 19, 21), (16, 4, 3, 3), {"stride": 2, "groups": 4}, torch.bfloat16, last=True),
    Job("depthwise", (1, 24, 500), (24, 1, 4), {"padding": 3, "groups": 24}, torch.float16),
    Job("direct", (2, 24, 27, 30), (40, 24, 3, 3), {"padding": 1}),
    Job("direct", (2, 24, 27, 30), (40, 24, 3, 3), {"padding": 1}, last=True),
    Job("direct", (2, 26, 27, 30), (40, 13, 3, 3), {"stride": 2, "groups": 2}, torch.bfloat16),
    Job("direct", (2, 3, 37, 41), (40, 3, 5, 3), {"padding": 1, "stride": 2}, last=True),
    Job("direct", (2, 3, 27, 30), (24, 3, 3, 3), {"padding": 1}, torch.bfloat16, last=True),
    Job("direct", (1, 8, 9, 11, 13), (12, 8, 3, 3, 3), {"padding": 1}, last=True),
    Job("pointwise", (2, 48, 27, 30), (33, 48, 1, 1), {}),
    Job("pointwise", (2, 48, 27, 30), (33, 48, 1, 1), {"stride": 2}, torch.float64, last=True),
    Job("winograd", (2, 24, 27, 30), (40, 24, 3, 3), {"padding": 1}),
    Job("winograd", (2, 40, 9, 11), (24, 40, 3, 3), {"padding": 1, "stride": 2}, last=True),
    Job("fft", (2, 24, 27, 30), (17, 24, 7, 7), {"padding": 3}),
    Job("separable", (2, 5, 37, 41), (5, 1, 3, 3), {"padding": 1, "groups": 5}),
    Job("auto", (2, 16, 32, 32), (16, 16, 3, 3), {"padding": 1}),
    Job("narrow", (2, 3, 37, 41), (5, 3, 3, 3), {"padding": 1}, trains=True),
    Job("depthwise", (2, 19, 29, 31), (19, 1, 5, 5), {"padding": 2, "groups": 19}, last=True, trains=True),
    Job("direct", (2, 24, 17, 20), (24, 24, 3, 3), {"padding": 1, "stride": 2}, trains=True),
    Job("pointwise", (2, 48, 17, 20), (33, 48, 1, 1), {}, torch.bfloat16, trains=True),
    Job("winograd", (2, 24, 17, 20), (24, 24, 3, 3), {"padding": 1}, trains=True),
)
ENGINE = ("narrow", "depthwise", "direct", "pointwise", "winograd", "fft", "separable")
assert {job.algorithm for job in JOBS} == {*ENGINE, "auto"} <= {*BY_NAME, "auto"}


def digest(tensors: tuple[Tensor, ...]) -> str:
    """Of the values in order, to the bit; made without torch's threads."""
    told = hashlib.sha256()
    for tensor in tensors:
        as_it_lies = tensor.view(torch.int16) if tensor.itemsize == 2 else tensor  # numpy has no bfloat16
        told.update(as_it_lies.numpy().tobytes())
    return told.hexdigest()


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
