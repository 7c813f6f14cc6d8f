"""Where layers are measured: what the rest of the benchmark asks of a device, and the CPU, which is one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch

from plainconv.bench.calls import Call, Tensors
from plainconv.bench.peaks import Peaks, measured
from plainconv.bench.scratch import torchs_peak
from plainconv.timing import keep_freed_memory, wall


class Ready(NamedTuple):
    """What is timed in place of a call, and how many calls that makes."""

    run: Callable[[], object]
    calls: int


class Clock(Protocol):
    """How calls are timed."""

    def ready(self, calls: Sequence[Call]) -> Ready:
        """What to time of a call, given once for each copy of its tensors."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Of what is ready, all its calls together."""


class Device(Protocol):
    """Where tensors are, how calls are timed there, and what the machine can do.

    Attributes:
        name: torch's name of it.
        whole: whether layers of many operations stay whole.
        clock: how a side is timed.
        eager: how it is timed once more, as Python calls it; None if that is the same.
    """

    @property
    def name(self) -> str: ...
    @property
    def whole(self) -> bool: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def eager(self) -> Clock | None: ...

    def held(self) -> AbstractContextManager[object]:
        """As it is to be while everything is measured."""

    def settle(self) -> None:
        """What comes before each layer."""

    def wait(self) -> None:
        """Until all work is done."""

    def copies(self, given: Tensors) -> list[Tensors]:
        """These tensors, and as many copies as it takes that no cache holds the next ones."""

    def peaks(self, dtype: torch.dtype, threads: int, direction: str, seconds: float = 0.5) -> Peaks:
        """Measure what the machine can do: the arithmetic for so many seconds, the rest for shares of that."""

    def scratch(self, call: Call) -> int:
        """The most bytes that a call of torch's holds at once, beyond its results."""

    def rounds(self, dtype: torch.dtype) -> bool:
        """Whether both sides may round numbers of this type to TF32."""

    def told(self) -> dict[str, str | int]:
        """What a record says of it, beside what it says of every machine."""


class Wall:
    """One call, by the clock on the wall."""

    def ready(self, calls: Sequence[Call]) -> Ready:
        return Ready(calls[0], 1)

    def seconds(self, run: Callable[[], object]) -> float:
        return wall(run)


class Host:
    """The processor.  What a call leaves in its caches the next one finds there: of both sides alike."""

    name, whole, clock, eager = "cpu", False, Wall(), None

    def held(self) -> AbstractContextManager[object]:
        return nullcontext()

    def settle(self) -> None:
        keep_freed_memory()

    def wait(self) -> None:
        pass

    def copies(self, given: Tensors) -> list[Tensors]:
        return [given]

    def peaks(self, dtype: torch.dtype, threads: int, direction: str, seconds: float = 0.5) -> Peaks:
        return measured(dtype, threads, direction, seconds)

    def scratch(self, call: Call) -> int:
        return torchs_peak(call)

    def rounds(self, dtype: torch.dtype) -> bool:
        return False

    def told(self) -> dict[str, str | int]:
        return {}
