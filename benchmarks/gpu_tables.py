"""Measure the suites on a GPU, beside cuDNN at its best, and write results/gpu_forward.md and its like.

    python benchmarks/gpu_tables.py                                       forward, bfloat16
    python benchmarks/gpu_tables.py --direction forward train --dtype bfloat16 float32-tf32 --suite seed_mnist
    python benchmarks/gpu_tables.py --seconds 0.05 --minutes 15           begin no suite after so many minutes
    python benchmarks/gpu_tables.py --write                               only write the pages of the records
    python benchmarks/gpu_tables.py --check                               only say whether they are what these give

float32 is as it is, float32-tf32 is rounded to TF32 on both sides.  Each suite runs alone, `plainconv bench --device
cuda --suite NAME` in a process of its own, and leaves one record in a folder of results/bench/ that is named after the
GPU; what is there is not measured again without --again.  A page has a part for each GPU and type: two GPUs never share
a table.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from time import monotonic
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the file beside this one, wherever it is started
from tables import RESULTS, TITLES, Records, cell, held, losses, measured, misses, number, part, ruled

from plainconv import bench
from plainconv.bench.calls import CHANNELS_LAST, CONTIGUOUS
from plainconv.bench.thresholds import THRESHOLDS

PRECISIONS = {  # types as they are called here, and what `plainconv bench` is told
    "bfloat16": ("--dtype", "bfloat16"),
    "float16": ("--dtype", "float16"),
    "float32": ("--dtype", "float32", "--exact"),
    "float32-tf32": ("--dtype", "float32", "--tf32"),
}
HEAD = (
    "suite",
    "layers",
    "geomean",
    "asked",
    "contiguous",
    "asked",
    "channels_last",
    "asked",
    "worst",
    "share of the limit",
    "asked",
    "bound by",
)
CALLED = ("suite", "layers", "torch, µs", "ours, µs", "geomean", "asked", "worst")
TOLD = {  # of the machine: what a page says of each
    "clock": "at",
    "clock_at_most": "of at most",
    "memory_clock": "memory at",
    "power_limit": "at most",
    "driver": "driver",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "triton": "Triton",
    "torch": "torch",
    "plainconv": "plainconv",
}


def folder_of(results: Path, gpu: str) -> Path:
    """Where the records of a GPU are."""
    return results / "bench" / re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")


def path_of(folder: Path, direction: str, precision: str, suite: str) -> Path:
    """The record of a suite, as `plainconv bench` calls it."""
    return folder / f"cuda-{direction}-{precision}-{suite}.json"


def measure(
    folder: Path,
    device: str,
    asked: Iterable[tuple[str, str, str]],
    again: bool,
    seconds: str,
    until: float,
) -> int:
    """Run what is not there yet, of (direction, type, suite), as long as there is time; how many runs failed."""
    failed = 0
    for direction, precision, suite in asked:
        if monotonic() > until:
            print("the time is up; another run goes on from here")
            break
        if again or not path_of(folder, direction, precision, suite).exists():
            words = ["--suite", suite, "--device", device, "--direction", direction, *PRECISIONS[precision]]
            words += ["--seconds", seconds, "--no-picture", "--out", str(folder)]
            run = subprocess.run([sys.executable, "-m", "plainconv", "bench", *words], check=False)
            failed += run.returncode != 0
    return failed


def read(results: Path, direction: str) -> dict[tuple[str, str], Records]:
    """(GPU, type) -> the records of the suites, in their order; the GPU is what a record says it is."""
    found: dict[tuple[str, str], Records] = {}
    for precision in PRECISIONS:
        for suite in bench.load():
            for path in sorted((results / "bench").glob(f"*/{path_of(Path(), direction, precision, suite)}")):
                told = json.loads(path.read_text())
                found.setdefault((told["machine"]["gpu"], precision), {})[suite] = told
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


def page(direction: str, found: dict[tuple[str, str], Records]) -> str:
    """results/gpu_forward.md, or that of another direction."""
    text = [
        f"# {TITLES[direction]} on a GPU: cuDNN's time over ours",
        "Made by `python benchmarks/gpu_tables.py` from the records in [bench/](bench); "
        "[how to read it](../docs/benchmarks.md#on-a-gpu). Device time, each side in its faster memory format, cuDNN "
        "with its best plan (`torch.backends.cudnn.benchmark`); below that within one format. The share is of the "
        "least time that the GPU allows: products at the speed of `torch.matmul`, copies of memory, or a launch. Below "
        "each table: what misses its threshold, and what is slower than torch. The second table of each type has the "
        "same calls from Python, one after the other.",
    ]
    for (gpu, precision), records in found.items():
        text += [f"## {gpu}, {precision}", conditions(list(records.values())), table(records)]
        text += [*misses(records), *losses(records)]
        if lines := called(records):
            text += ["Called from Python:", lines]
    return "\n\n".join(text) + "\n"


def conditions(records: Sequence[dict[str, Any]]) -> str:
    """Clocks, versions, precision and dates, each kind once, and what the GPU can do."""
    kinds = dict.fromkeys(
        ", ".join(f"{word} {told['machine'][name]}" for name, word in TOLD.items() if name in told["machine"])
        for told in records
    )
    products = sorted(told["peaks"]["flops"] / 1e12 for told in records)
    copies = sorted(size / spent / 1e9 for told in records for size, spent in told["peaks"]["copies"][-1:])
    precision = records[0]["dtype"] + (" rounded to TF32, on both sides" if records[0]["tf32"] else "")
    return (
        f"{'; '.join(kinds)}. {precision}: {products[len(products) // 2]:.0f} TFLOP/s at the most, copies at "
        f"{copies[len(copies) // 2]:.0f} GB/s. {measured(records)} or a few replays."
    )


def table(records: Records) -> str:
    """A line for each suite, and one for each part of it that has a threshold of its own."""
    lines = []
    for suite, told in records.items():
        rows, verdicts = bench.rows_of(told), held(told)
        for of in dict.fromkeys(("layers", *(one.threshold.of for one in verdicts))):
            picked = bench.picked(of, rows)
            if picked:
                lines.append(_line(part(suite, of), picked, _asked(verdicts, of)))
    return ruled(HEAD, lines)


def _line(name: str, rows: Sequence[bench.Row], asked: dict[str, str]) -> Sequence[str]:
    (total,) = bench.summary(rows)
    bound = [row.bound_by for row in rows]
    return (
        name,
        str(total.layers),
        number(total.geomean),
        asked.get("ratio", ""),
        number(_mean(rows, lambda row: row.ratio_in(CONTIGUOUS))),
        asked.get("contiguous", ""),
        number(_mean(rows, lambda row: row.ratio_in(CHANNELS_LAST))),
        asked.get("channels_last", ""),
        f"{number(total.worst)} ({total.worst_layer})",
        f"{total.share:.0%}" if total.share else "",
        asked.get("share of the limit", ""),
        ", ".join(f"{name} {bound.count(name)}" for name in dict.fromkeys(bound)),
    )


def called(records: Records) -> str:
    """A line for each suite of calls from Python; nothing, if none was timed."""
    lines = []
    for suite, told in records.items():
        rows = [row for row in bench.rows_of(told) if row.eager_ratio is not None]
        if rows:
            asked = _asked(held(told), "layers")
            worst = min(rows, key=lambda row: row.eager_ratio or 0.0)
            sides = (_mean(rows, lambda row, side=side: 1e6 * row.eager[side].median_s) for side in ("torch", "ours"))
            ratio = number(_mean(rows, lambda row: row.eager_ratio)), asked.get("called from Python", "")
            last = f"{number(worst.eager_ratio)} ({worst.layer.name})"
            lines.append((suite, str(len(rows)), *(f"{us:.1f}" for us in sides), *ratio, last))
    return ruled(CALLED, lines) if lines else ""


def _asked(verdicts: Iterable[bench.Held], of: str) -> dict[str, str]:
    """What is asked of some layers of a suite, by what is measured: of their mean, or of each."""

    def told(one: bench.Held) -> str:
        return cell(one) if one.threshold.geomean else f"each {number(one.threshold.worst)}" + " ✓" * one.good

    return {one.threshold.by: told(one) for one in verdicts if one.threshold.of == of}


def _mean(rows: Iterable[bench.Row], of: Callable[[bench.Row], float | None]) -> float | None:
    values = [value for row in rows if (value := of(row)) is not None]
    return geometric_mean(values) if values else None


def in_order() -> list[str]:
    """All suites; those first that most is asked of."""
    asked = (name.partition(": ")[0] for _, name in THRESHOLDS["cuda"]["forward"])
    return list(dict.fromkeys((*asked, *bench.load())))


def main() -> int:
    """Parse; measure, then write; or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...")
    parser.add_argument("--direction", nargs="*", default=["forward"], choices=list(TITLES))
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"], choices=list(PRECISIONS))
    parser.add_argument("--suite", nargs="*", default=in_order(), choices=in_order())
    parser.add_argument("--seconds", default="0.5", help="for each layer, about")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no suite begins later")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder")
    given = parser.parse_args()
    failed = 0
    if not given.check and not given.write:
        folder = folder_of(given.results, torch.cuda.get_device_name(given.device))
        asked = ((way, kind, suite) for suite in given.suite for way in given.direction for kind in given.dtype)
        until = monotonic() + 60 * given.minutes
        failed += measure(folder, given.device, asked, given.again, given.seconds, until)
    for direction in TITLES:
        target = given.results / f"gpu_{direction}.md"
        if found := read(given.results, direction):
            text = page(direction, found)
            if not given.check:
                target.write_text(text)
            failed += given.check and (not target.exists() or target.read_text() != text)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
