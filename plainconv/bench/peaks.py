"""What the machine can do: products, copies, and the call itself, measured here and now with the same threads.

Two kernels, compiled like any other:

    arithmetic   r_i = r_i * m + a in as many registers as there are, which do not wait for each other
    copy         blocks of memory, whole vectors; the time of a copy that reads and writes so many bytes in all

A layer can take no less than the longest of three: its operations at the first speed, a copy of as many bytes as its
three tensors have, and the shortest call there is of what is timed, a direction or a training step (one product; the
faster of torch and plainconv).
Half types are summed in float32, so their arithmetic is that of float32; for bfloat16 it is the processor's dot product
of pairs, r_i = r_i + m * a + n * b, where there is one.

A virtual machine may lose half of its speed for seconds, when its host runs two of its cores on one.  So the machine is
measured again after each layer, and the best of all counts.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from plainconv.bench.calls import CONTIGUOUS, ours, tensors, torchs
from plainconv.bench.suites import Layer
from plainconv.cpu.compile import Kernel, Target, compile
from plainconv.cpu.emit import SCALARS, Emit, Value, natives
from plainconv.cpu.launch import launch
from plainconv.problem import ConvProblem

SPARE = 4  # registers that are not summed in
REPEATS = 50_000  # of all registers in one call: some hundred microseconds
OWN = 4096  # bytes that each thread reads from and writes to, away from the others
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
        call_s: the shortest call of a convolution, in the direction that is timed.
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

    def best(self, other: Peaks) -> Peaks:
        """The better of both in everything; the copies are of the same sizes."""
        copies = tuple((size, min(s, t)) for (size, s), (_, t) in zip(self.copies, other.copies, strict=True))
        return Peaks(max(self.flops, other.flops), copies, min(self.call_s, other.call_s))

    def limit(self, flop: float, size: int) -> Limit:
        """The least time of `flop` operations on tensors of `size` bytes."""
        each = {"arithmetic": flop / self.flops, "memory": self.copy_s(size), "call": self.call_s}
        bound_by = max(each, key=lambda name: each[name])
        return Limit(each[bound_by], bound_by)


def measured(dtype: torch.dtype, threads: int, direction: str, seconds: float = 0.5) -> Peaks:
    """Measure the machine: the arithmetic for so many seconds, the call for a fifth, each copy for a tenth of that."""
    copies = tuple((size, _copy_s(size, threads, seconds / 10)) for size in COPIES)
    return Peaks(_flops(dtype, threads, seconds), copies, _call_s(direction, seconds / 5))


def _flops(dtype: torch.dtype, threads: int, seconds: float) -> float:
    host = Target.host()
    element, width = ("double", 8) if dtype == torch.float64 else ("float", 4)
    pairs = dtype == torch.bfloat16 and "pairs" in natives(host)
    lanes, chains = host.bits // 8 // width, host.registers - SPARE
    kernel = _arithmetic(lanes, element, chains, pairs)
    space = torch.zeros(threads * OWN // 8, dtype=torch.float64)
    args = (space.data_ptr(), REPEATS)
    spent = _best(lambda: launch(kernel, args, threads, threads), seconds)
    return (4 if pairs else 2) * lanes * chains * REPEATS * threads / spent


def _copy_s(size: int, threads: int, seconds: float) -> float:
    blocks = size // 2 // BLOCK
    source, target = torch.ones(2, blocks * BLOCK, dtype=torch.uint8)
    kernel, args = _copy(Target.host().bits // 32), (source.data_ptr(), target.data_ptr())
    return _best(lambda: launch(kernel, args, blocks, threads), seconds)


def _call_s(direction: str, seconds: float) -> float:
    one = Layer("", "one product", ConvProblem.parse("n1 c1 o1 x1x1 k1x1"))
    given = tensors(one, torch.float32).to(CONTIGUOUS)  # of any type: the least is asked for
    return min(_best(make(one, direction, given), seconds) for make in (torchs, ours))


def _arithmetic(lanes: int, element: str, chains: int, pairs: bool) -> Kernel:
    e = Emit(lanes, element, natives(Target.host()))
    space, repeats = e.arguments("ptr", "i64")
    own = e.at(space, e.begin * (OWN // SCALARS[element]))
    m, a = (e.load_pairs(own), e.load_pairs(own, lanes)) if pairs else (e.load(own), e.load(own, lanes))

    def step(_: Value, sums: list[Value]) -> list[Value]:
        return [e.dot_pairs(each, m, a) if pairs else e.fma(each, m, a) for each in sums]

    total = e.zero
    for each in e.loop(repeats, [e.load(own)] * chains, step):
        total = e.add(total, each)
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


def _best(call: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls of some time; of three at least."""
    spent: list[float] = []
    end = perf_counter() + seconds
    while len(spent) < 3 or perf_counter() < end:
        start = perf_counter()
        call()
        spent.append(perf_counter() - start)
    return min(spent)
