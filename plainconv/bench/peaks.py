"""What the machine can do: products, copies, and the call itself, measured here and now with the same threads.

Two kernels, compiled like any other:

    arithmetic   r_i = r_i * m + a, in CHAINS registers that do not wait for each other, nothing else
    copy         blocks of memory, whole vectors; the time of a copy that reads and writes so many bytes in all

A layer can take no less than the longest of three: its operations at the first speed, a copy of as many bytes as its
three tensors have, and the shortest call of a convolution there is (one product; the faster of torch and plainconv).
Half types are computed in float32, so their arithmetic is that of float32.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from plainconv.bench.calls import CONTIGUOUS, ours, tensors, torchs
from plainconv.bench.suites import Layer
from plainconv.cpu.compile import Kernel, Target, compile
from plainconv.cpu.emit import Emit, Value
from plainconv.cpu.launch import launch
from plainconv.problem import ConvProblem

CHAINS = 12  # registers; more than latency times throughput of any processor known here
REPEATS = 100_000  # of all chains in one measurement: some hundred microseconds
ROUNDS = 25
BLOCK = 4096  # bytes that a thread copies at once
COPIES = tuple(1 << power for power in range(15, 29))  # bytes read and written: 32 KiB to 256 MiB


@dataclass(frozen=True)
class Limit:
    """The least time of a layer, and which of "arithmetic", "memory" and "call" asks for it."""

    seconds: float
    bound_by: str


@dataclass(frozen=True)
class Peaks:
    """What was measured.

    Attributes:
        flops: operations a second, two for each fused multiply-add.
        copies: (bytes read and written, seconds), rising.
        call_s: the shortest call of a convolution.
    """

    flops: float
    copies: tuple[tuple[int, float], ...]
    call_s: float

    def copy_s(self, size: int) -> float:
        """Seconds of a copy that moves `size` bytes: between two that were measured on the line through both."""
        sizes = [moved for moved, _ in self.copies]
        place = min(max(bisect.bisect_left(sizes, size), 1), len(sizes) - 1)
        (a, s), (b, t) = self.copies[place - 1 : place + 1]
        if size < sizes[0]:
            return s
        return s + (t - s) * (size - a) / (b - a)

    def limit(self, flop: float, size: int) -> Limit:
        """The least time of `flop` operations on tensors of `size` bytes."""
        each = {"arithmetic": flop / self.flops, "memory": self.copy_s(size), "call": self.call_s}
        bound_by = max(each, key=lambda name: each[name])
        return Limit(each[bound_by], bound_by)


def measured(dtype: torch.dtype, threads: int) -> Peaks:
    """Measure the machine, in about a second."""
    return Peaks(_flops(dtype, threads), tuple((size, _copy_s(size, threads)) for size in COPIES), _call_s(dtype))


def _flops(dtype: torch.dtype, threads: int) -> float:
    element, width = ("double", 8) if dtype == torch.float64 else ("float", 4)
    lanes = Target.host().bits // 8 // width
    kernel = _arithmetic(lanes, element)
    space = torch.ones((threads + 2) * 64, dtype=torch.float64)  # a cache line and more for each thread
    args = (space.data_ptr(), REPEATS)
    spent = _best(lambda: launch(kernel, args, threads, threads))
    return 2 * lanes * CHAINS * REPEATS * threads / spent


def _copy_s(size: int, threads: int) -> float:
    blocks = size // 2 // BLOCK
    source, target = torch.ones(2, blocks * BLOCK, dtype=torch.uint8)
    kernel, args = _copy(Target.host().bits // 32), (source.data_ptr(), target.data_ptr())
    return _best(lambda: launch(kernel, args, blocks, threads))


def _call_s(dtype: torch.dtype) -> float:
    one = Layer("", "one product", ConvProblem.parse("n1 c1 o1 x1x1 k1x1"))
    given = tensors(one, dtype).to(CONTIGUOUS)
    return min(_middle(make(one, "forward", given)) for make in (torchs, ours))


def _arithmetic(lanes: int, element: str) -> Kernel:
    e = Emit(lanes, element)
    space, repeats = e.arguments("ptr", "i64")
    own = e.at(space, e.begin * (256 // (4 if element == "float" else 8)))
    m, a = e.load(own), e.load(own, lanes)

    def step(_: Value, chains: list[Value]) -> list[Value]:
        return [e.fma(chain, m, a) for chain in chains]

    total = e.zero
    for chain in e.loop(repeats, [e.load(own)] * CHAINS, step):
        total = e.add(total, chain)
    e.store(total, own)
    return compile(e.module())


def _copy(lanes: int) -> Kernel:
    e = Emit(lanes)
    source, target = e.arguments("ptr", "ptr")
    vectors = 8  # in flight

    def step(i: Value, _: list[Value]) -> list[Value]:
        at = e.begin * (BLOCK // 4) + i * (vectors * lanes)
        loaded = [e.load(source, at + v * lanes) for v in range(vectors)]
        for v, value in enumerate(loaded):
            e.store(value, target, at + v * lanes)
        return []

    e.loop((e.end - e.begin) * (BLOCK // 4 // (vectors * lanes)), [], step)
    return compile(e.module())


def _best(call: Callable[[], object]) -> float:
    return min(_times(call))


def _middle(call: Callable[[], object]) -> float:
    return median(_times(call, 500))


def _times(call: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    spent = []
    for _ in range(rounds):
        start = perf_counter()
        call()
        spent.append(perf_counter() - start)
    return spent[1:]
