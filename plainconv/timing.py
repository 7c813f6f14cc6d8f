"""How long a call takes, measured so that two calls can be compared, and on what machine.

The calls to compare take turns in one process on the same tensors: whatever slows the machine for a while slows all of
them. Each has been called once before the clock starts. The median stands for a call, the quartiles for its spread.

On a GPU there are two times of a call: until it is done, launches and all (`wall`), and what the device takes, to which
everything was sent beforehand (`on_device`).
"""

import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from statistics import quantiles
from time import perf_counter

import torch

from plainconv.version import __version__

HEAP = (32 << 20) - (64 << 10)  # bytes; of 32 MiB and more the C library always gives memory back to the system
AHEAD = 2_000_000  # cycles that a GPU is kept busy, at least, until what is timed is waiting for it
CYCLES = 4e9  # in a second: more than any GPU's clock has, and twice as many as most
LONG_S = 2e-4  # what is timed on a device lasts so long, at least; events tell half a microsecond
MOST_CALLS = 64  # of it
MOST_AHEAD_S = 0.05  # a GPU is not kept busy for longer: a call that took so long may have compiled first
PACKAGES = ("numpy", "pillow", "scikit-learn", "matplotlib")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the lower and the upper quartile, and how many calls they come from."""

    median_s: float
    low_s: float
    high_s: float
    calls: int

    def each(self, calls: int) -> "Timing":
        """Of one of so many calls that were timed together."""
        return replace(self, median_s=self.median_s / calls, low_s=self.low_s / calls, high_s=self.high_s / calls)


def wall(call: Callable[[], object]) -> float:
    """Seconds until a call is done, and what it left to a CUDA device."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else None
    start = perf_counter()
    call()
    if wait:
        wait()
    return perf_counter() - start


def elapsed(run: Callable[[], object], ahead: int = AHEAD) -> float:
    """Seconds that the current CUDA device works on what is sent to its current stream, after so many busy cycles.

    Once more, after more of them, where it may have waited for what was sent.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(ahead)  # else the clock would run while the first launch is on its way
    start.record()
    began = perf_counter()
    run()
    sent_s = perf_counter() - began
    end.record()
    end.synchronize()
    if sent_s > ahead / CYCLES and ahead < _cycles(MOST_AHEAD_S):
        return elapsed(run, _cycles(sent_s))
    return float(start.elapsed_time(end)) / 1e3


def on_device(call: Callable[[], object]) -> float:
    """Seconds that the current CUDA device works on a call, one of as many as take long enough to be told."""
    start = perf_counter()
    call()
    sent_s = perf_counter() - start  # until all of a call is under way
    once = elapsed(call, _cycles(sent_s))
    calls = min(math.ceil(LONG_S / max(once, 1e-9)), MOST_CALLS, int(MOST_AHEAD_S / max(sent_s, 1e-9)))
    if calls <= 1:
        return once

    def run() -> None:
        for _ in range(calls):
            call()

    return elapsed(run, _cycles(calls * sent_s)) / calls


def _cycles(seconds: float) -> int:
    """That a GPU is busy for so many seconds, or more."""
    return AHEAD + math.ceil(CYCLES * min(seconds, MOST_AHEAD_S))


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 4.0,
    least: int = 5,
    most: int = 200,
    turn_s: float = 0.0,
    clock: Callable[[Callable[[], object]], float] = wall,
) -> dict[str, Timing]:
    """Time calls in turn: each once in every round, or for a while.

    Args:
        calls: name -> what to call.
        seconds: no further round begins when so many have passed, ...
        least: ... but there are at least so many rounds (2 or more)
        most: and at most so many.
        turn_s: a call goes on until its turn has lasted so many seconds. The first call of a turn finds the caches as
            the others left them, so it counts only if it is the only one.
        clock: seconds of a call.

    Returns:
        name -> its timing.
    """
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        clock(call)
    end = perf_counter() + seconds
    for turn in range(most):
        if turn >= least and perf_counter() > end:
            break
        for name, call in calls.items():
            spent: list[float] = []
            while not spent or sum(spent) < turn_s:
                spent.append(clock(call))
            seen[name] += spent[1:] or spent
    return {name: _timing(spent) for name, spent in seen.items()}


def keep_freed_memory() -> None:
    """Let the C library keep what is freed later, as it does once so much was freed.

    Else torch's results would be fresh pages in some processes, and not in others.
    """
    torch.empty(HEAP, dtype=torch.uint8)


def machine() -> dict[str, str | int]:
    """What a measurement depends on: processor, cores, threads, GPU if there is one, system and versions."""
    found: dict[str, str | int] = {
        # Some processors that differ in this share a name.
        "processor": f"{processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "plainconv": __version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for package in PACKAGES:
        try:
            found[package] = version_of(package)
        except PackageNotFoundError:
            continue
    return found


def duration(seconds: float) -> str:
    """Seconds with a unit that suits: 0.00123 -> "1.23 ms"."""
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def _timing(spent: list[float]) -> Timing:
    low, median, high = quantiles(spent, n=4, method="inclusive")
    return Timing(median, low, high, len(spent))


def processor() -> str:
    """The processor's name as its system states it."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine()
