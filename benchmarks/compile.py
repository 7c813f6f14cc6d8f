"""How long kernels take to compile, and to load from disk: all that "auto" asks for in the suites, in float32.

    python benchmarks/compile.py                        write results/compile.md
    python benchmarks/compile.py --suite seed_mnist     of some suites

Kernels are compiled into a folder of their own, which is empty at first; then all are forgotten and loaded from it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch

from plainconv import bench
from plainconv.bench import calls
from plainconv.cpu import compile as cpu
from plainconv.menu.base import Tensors
from plainconv.plan import plan
from plainconv.problem import Direction, Request
from plainconv.remember import forget
from plainconv.timing import processor

PAGE = Path(__file__).parent.parent / "results" / "compile.md"
HEAD = ("algorithm", "direction", "memory format", "kernels", "compiled, median", "longest", "loaded, median")


class Made(NamedTuple):
    """A kernel's text, who asked for it first, and seconds."""

    text: str
    by: tuple[str, str, str]
    seconds: float


def requests(suites: Sequence[str], threads: int) -> list[Request]:
    """Every direction of every layer, in the memory formats that torch has for it."""
    return [
        Request(layer.problem, way, torch.float32, channels_last=layout == calls.CHANNELS_LAST, threads=threads)
        for suite in suites
        for layer in map(bench.Layer.cut, bench.load()[suite])
        for way in Direction
        for layout in calls.layouts(layer)
    ]


def bind(asked: Request) -> None:
    """What the first call does before it computes."""
    shapes = (asked.problem.shape_of(role) for role in asked.direction.given)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if asked.channels_last else {}
    given = (torch.empty(shape, memory_format=formats.get(len(shape), torch.contiguous_format)) for shape in shapes)
    plan(asked).bind(Tensors(*given))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what comes back."""
    begin = time.perf_counter()
    made = call()
    return time.perf_counter() - begin, made


def measure(asked: Sequence[Request], folder: Path) -> tuple[list[Made], dict[str, float]]:
    """What was compiled, and text -> seconds of loading it."""
    made: list[Made] = []
    compiled = cpu.compile
    known: set[str] = set()

    def watched(text: str, target: cpu.Target | None = None) -> cpu.Kernel:
        seconds, kernel = timed(lambda: compiled(text, target))
        if text not in known:
            known.add(text)
            layout = calls.CHANNELS_LAST if one.channels_last else calls.CONTIGUOUS
            made.append(Made(text, (plan(one).algorithm.name, one.direction.value, layout), seconds))
        return kernel

    cpu.why_not()  # LLVM itself is loaded before
    forget()
    with cpu.kept_in(folder), mock.patch.object(cpu, "compile", watched):
        for one in asked:
            bind(one)
    with cpu.kept_in(folder):
        loads = {each.text: timed(lambda text=each.text: cpu.compile(text)) for each in made}
    assert all(kernel.from_disk for _, kernel in loads.values())
    forget()
    return made, {text: seconds for text, (seconds, _) in loads.items()}


def page(made: Sequence[Made], loads: dict[str, float]) -> str:
    """results/compile.md."""
    groups = {by: [one for one in made if one.by == by] for by in sorted({one.by for one in made})}
    lines: list[Sequence[str]] = [HEAD, ["---"] * len(HEAD)]
    lines += [(*by, *row(ones, loads)) for by, ones in groups.items()]
    lines += [("all", "", "", *row(made, loads))]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        "# Compiling\n\nMade by `make bench` ([benchmarks/compile.py](../benchmarks/compile.py)): every kernel that "
        "auto asks for in the suites, in float32, forward and for both gradients.\n\n"
        f"{processor()}, torch {torch.__version__}. Milliseconds.\n\n{table}\n"
    )


def row(made: Sequence[Made], loads: dict[str, float]) -> tuple[str, str, str, str]:
    """How many, and milliseconds."""
    seconds, loaded = [one.seconds for one in made], [loads[one.text] for one in made]
    return str(len(made)), f"{median(seconds) * 1e3:.0f}", f"{max(seconds) * 1e3:.0f}", f"{median(loaded) * 1e3:.2f}"


def main() -> int:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="*", default=list(bench.load()), choices=list(bench.load()))
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "kernels"
        folder.mkdir(mode=0o700)
        text = page(*measure(requests(given.suite, torch.get_num_threads()), folder))
    given.page.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
