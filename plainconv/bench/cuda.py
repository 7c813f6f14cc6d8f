"""Measuring on a GPU: device time, by replaying CUDA graphs on tensors in rotation; and eager calls.

A call is captured into a graph, once for each copy of its tensors, as many of them as take three times the room of the
GPU's cache, and so often that a replay is long.  Nothing of Python and of launches is in that time, on either side, and
no input lies in the cache.  Results lie in as many places.  The eager clock calls from Python in the same order, and
waits at the end only.

torch is given its best: cuDNN tries its plans (benchmark=True) before anything is captured.  float32 is rounded to TF32
or not as torch's switch for convolutions says, on both sides alike.

The limits: products of large matrices of the same type, by torch.matmul, with the same switch; copies of memory, in
rotation, too; the shortest convolution there is.

`Gpu` is all that needs a GPU.  Everything else runs as well on another one, whose graphs are only calls.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from time import perf_counter
from typing import Any

import torch

from plainconv.bench.calls import CONTIGUOUS, Call, Tensors, ours, tensors, torchs
from plainconv.bench.device import Clock, Device, Host, Ready
from plainconv.bench.peaks import Peaks
from plainconv.bench.suites import Layer
from plainconv.problem import ConvProblem
from plainconv.timing import elapsed, wall

CACHES = 3  # times the cache's size: what tensors in rotation take
MOST_COPIES = 256
SHARE = 16  # of the free memory: what all copies may take, before layouts, results and graphs
LONG_S = 2e-3  # how long what is timed lasts, at least
MOST_CALLS = 2048  # of it
WIDE = {2: 8192, 4: 4096, 8: 4096}  # rows and columns of the matrices, by bytes of a number
COPIES = tuple(1 << power for power in range(16, 31, 2))  # bytes read and written: 64 KiB to 1 GiB
BUSY_S = 1.0  # how long it works while it is asked for its clocks
ASKED = {  # nvidia-smi's names, and ours
    "driver_version": "driver",
    "clocks.sm": "clock",
    "clocks.max.sm": "clock_at_most",
    "clocks.mem": "memory_clock",
    "power.limit": "power_limit",
}


class Gpu:
    """A CUDA device; all work goes to a stream of its own, which graphs are captured from."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.stream: Any = torch.cuda.Stream(self.device)

    def held(self) -> AbstractContextManager[object]:
        """Everything goes to this device, and to the stream."""
        return torch.cuda.stream(self.stream)

    def wait(self) -> None:
        """Until all work is done."""
        torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Give back memory that nobody uses."""
        torch.cuda.empty_cache()

    def capture(self, fill: Callable[[], object]) -> Callable[[], object]:
        """The same work, to be replayed; all of it was done once before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            fill()
        return graph.replay

    def elapsed(self, run: Callable[[], object]) -> float:
        """Seconds on the device."""
        return elapsed(run)

    def cache(self) -> int:
        """Bytes of the cache that all processors share."""
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def free(self) -> int:
        """Bytes of memory."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def peak(self, call: Call) -> int:
        """The most bytes that were allocated at once during a call, beyond the results that it returned."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call()
        most = torch.cuda.max_memory_allocated(self.device) - before
        return int(max(most - sum(tensor.nbytes for tensor in result), 0))

    def told(self) -> dict[str, str | int]:
        """Names, sizes, versions and clocks."""
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory": properties.total_memory,
            "gpu_cache": self.cache(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            **_clocks(str(properties.uuid)),
        }


def _clocks(uuid: str) -> dict[str, str]:
    """The driver and the clocks as nvidia-smi tells them; nothing where it is not there."""
    words = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(ASKED.values(), (word.strip() for word in said.split(",")), strict=False))


class Rotating:
    """Calls one after the other, each copy of the tensors in its turn, until that is long."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def ready(self, calls: Sequence[Call]) -> Ready:
        for call in calls:  # what is compiled, chosen or allocated once
            call()
        self.gpu.wait()
        once = self.made(calls, 1)
        spent = min(self.seconds(once) for _ in range(3))
        del once
        rounds = max(1, min(math.ceil(LONG_S / max(spent, 1e-9)), MOST_CALLS // len(calls)))
        return Ready(self.made(calls, rounds), rounds * len(calls))

    def made(self, calls: Sequence[Call], rounds: int) -> Callable[[], object]:
        """So many rounds of the calls; what they make is kept until it is that copy's turn again."""

        def run() -> None:
            kept: list[object] = [None] * len(calls)
            for _ in range(rounds):
                for i, call in enumerate(calls):
                    kept[i] = call()

        return run

    def seconds(self, run: Callable[[], object]) -> float:
        return wall(run)


class Graphs(Rotating):
    """The same, captured and replayed: what the device takes."""

    def made(self, calls: Sequence[Call], rounds: int) -> Callable[[], object]:
        captured = super().made(calls, rounds)
        return partial(_replay, self.gpu.capture(captured), captured)

    def seconds(self, run: Callable[[], object]) -> float:
        return self.gpu.elapsed(run)


def _replay(graph: Callable[[], object], _captured: object) -> None:
    """A graph keeps none of the tensors outside of its own memory: what it was captured from has to live as long."""
    graph()


class Cuda:
    """A GPU as the benchmark sees it; tf32: throw torch's switch for convolutions first, None: leave it."""

    whole = True

    def __init__(self, gpu: Gpu, tf32: bool | None = None) -> None:
        self.gpu, self.tf32, self.name = gpu, tf32, str(gpu.device)
        self.clock: Clock = Graphs(gpu)
        self.eager: Clock | None = Rotating(gpu)
        self._limits: dict[object, Ready] = {}  # graphs of what the machine is measured by, made once

    @contextmanager
    def held(self) -> Iterator[None]:
        switches: list[tuple[Any, str, object]] = [(torch.backends.cudnn, "benchmark", True)]
        if self.tf32 is not None:
            switches.append((_switch(), "fp32_precision", "tf32" if self.tf32 else "ieee"))
        with _thrown(switches), self.gpu.held():
            yield

    def settle(self) -> None:
        self.gpu.clear()

    def wait(self) -> None:
        self.gpu.wait()

    def copies(self, given: Tensors) -> list[Tensors]:
        return [given, *(Tensors(*(t.clone() for t in given)) for _ in range(1, self._copies(_bytes(given))))]

    def _copies(self, size: int) -> int:
        enough = max(2, math.ceil(CACHES * self.gpu.cache() / max(size, 1)))
        return max(1, min(enough, MOST_COPIES, self.gpu.free() // SHARE // max(size, 1)))

    def peaks(self, dtype: torch.dtype, threads: int, direction: str, seconds: float = 0.5) -> Peaks:
        wide = WIDE[dtype.itemsize]
        copies = tuple((size, self._best(size, partial(self._copy, size), seconds / 10)) for size in COPIES)
        with _thrown([(torch.backends.cuda.matmul, "fp32_precision", _precision())]):
            product = self._best(dtype, partial(self._product, dtype, wide), seconds)
        calls = [
            self._best((make, direction), partial(self._call, make, direction), seconds / 5) for make in (torchs, ours)
        ]
        return Peaks(2 * wide**3 / product, copies, min(calls))

    def _best(self, key: object, make: Callable[[], list[Call]], seconds: float) -> float:
        """The shortest of the times of a call; of three at least."""
        if key not in self._limits:
            self._limits[key] = self.clock.ready(make())
        run, calls = self._limits[key]
        spent: list[float] = []
        end = perf_counter() + seconds
        while len(spent) < 3 or perf_counter() < end:
            spent.append(self.clock.seconds(run) / calls)
        return min(spent)

    def _copy(self, size: int) -> list[Call]:
        def one() -> Call:
            source, target = torch.zeros(2, size // 2, dtype=torch.uint8, device=self.gpu.device)
            return lambda: (target.copy_(source),)

        return [one() for _ in range(self._copies(size))]

    def _product(self, dtype: torch.dtype, wide: int) -> list[Call]:
        a, b = torch.randn(2, wide, wide, device=self.gpu.device).to(dtype)
        return [lambda: (torch.matmul(a, b),)]

    def _call(self, make: Callable[[Layer, str, Tensors], Call], direction: str) -> list[Call]:
        one = Layer("", "one product", ConvProblem.parse("n1 c1 o1 x1x1 k1x1"))
        return [make(one, direction, tensors(one, torch.float32, device=self.name).to(CONTIGUOUS))]

    def scratch(self, call: Call) -> int:
        return self.gpu.peak(call)

    def rounds(self, dtype: torch.dtype) -> bool:
        return dtype is torch.float32 and _precision() == "tf32"

    def told(self) -> dict[str, str | int]:
        """Asked while it works: at rest its clocks are low."""
        for run, _ in [ready for key, ready in self._limits.items() if isinstance(key, torch.dtype)][:1]:
            for _ in range(math.ceil(BUSY_S / max(self.clock.seconds(run), 1e-9))):
                run()
        found = self.gpu.told()
        self.gpu.wait()
        try:
            return {**found, "triton": version_of("triton")}
        except PackageNotFoundError:
            return found


def device_of(place: torch.device, tf32: bool | None = None) -> Device:
    """The CPU or a GPU, which is there; tf32: see `Cuda`."""
    return Cuda(Gpu(place), tf32) if place.type == "cuda" else Host()


def _switch() -> Any:
    """torch's own for how convolutions of float32 are rounded."""
    return torch.backends.cudnn.conv  # type: ignore[attr-defined]


def _precision() -> str:
    return str(_switch().fp32_precision)


@contextmanager
def _thrown(switches: Sequence[tuple[Any, str, object]]) -> Iterator[None]:
    """Attributes set for a while."""
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in switches]
    try:
        for holder, name, value in switches:
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def _bytes(given: Tensors) -> int:
    return sum(tensor.nbytes for tensor in given)
