"""results/gaussians.md from the record of benchmarks/gaussians.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from models_page import conditions, table
from tables import number

Record = dict[str, Any]
SIDES = {  # side -> its column
    "torch": "torch, NCHW",
    "torch channels_last": "torch, channels_last",
    "opencv": "OpenCV filter2D",
    "scipy": "SciPy oaconvolve",
    "separable": "`separable`",
    "prepacked": "prepacked",
    "auto": "`auto`",
}
OURS = ("separable", "prepacked", "auto")
ASKED = {"torch": 4.0, "opencv": 1.0, "scipy": 1.0}  # their time over that of the first of ours
THEIRS = {side: SIDES[side].partition(",")[0] for side in ASKED}


def page(record: Record) -> str:
    """Tables of times, ratios and errors; what misses its target; what cannot be had."""
    sizes = "x".join(map(str, record["picture"]))
    said = [
        f"{_name(kernel)}: `auto` takes {kernel['algorithms']['auto']}, prepack {kernel['algorithms']['prepacked']}"
        for kernel in record["kernels"]
    ]
    asked = ", ".join(f"{value:g} beside {THEIRS[side]}" for side, value in ASKED.items())
    text = [
        "# Gaussians over a picture",
        "Made by `make bench` ([benchmarks/gaussians.py](../benchmarks/gaussians.py)) from "
        "[gaussians.json](gaussians.json); [how to read it](../docs/benchmarks.md#gaussians).",
        *conditions({"": record}),
        f"A picture of {sizes}, each colour filtered by itself. `separable` tests in every call that the kernel is a "
        "product of lines, prepack has tested it beforehand, and `auto` never looks at values.",
        "## Milliseconds",
        "The median; \\* is a single call, of a side that takes seconds.",
        times(record),
        "## Their time over ours",
        f"torch in its better memory format. Of `separable` is asked: {asked}.",
        table(("Gaussian", "ours", *THEIRS.values()), _ratios(record)),
        "\n".join(f"- {line}" for line in said),
        "## Errors",
        "The largest distance from float64, as a share of the largest result.",
        _each(record, lambda kernel, side: f"{kernel['errors'][side]:.1e}"),
        "## What misses its target, or is slower",
        "\n".join(f"- {line}" for line in misses(record)) or "Nothing.",
    ]
    if absent := {f"{SIDES[side]}: {why}" for kernel in record["kernels"] for side, why in kernel["absent"].items()}:
        text += ["## What cannot be had", "\n".join(f"- {line}" for line in sorted(absent))]
    return "\n\n".join(text) + "\n"


def ratio(kernel: Record, ours: str, theirs: str) -> float | None:
    """Their time over ours; torch's in its better memory format."""
    sides = [side for side in kernel["timings"] if side.split()[0] == theirs]
    return min(_ms(kernel, side) for side in sides) / _ms(kernel, ours) if sides else None


def times(record: Record) -> str:
    """Milliseconds of every side."""

    def cell(kernel: Record, side: str) -> str:
        return f"{_ms(kernel, side):.1f}" + r" \*" * (kernel["timings"][side]["calls"] == 1)

    return _each(record, cell)


def misses(record: Record) -> list[str]:
    """What is asked of the first of ours and not reached, and where another of ours is slower than others."""
    return [
        f"{_name(kernel)}, {SIDES[ours]}: {number(found)} of {number(asked)} beside {THEIRS[theirs]}"
        for kernel in record["kernels"]
        for ours in OURS
        for theirs in ASKED
        if ours in kernel["timings"] and (found := ratio(kernel, ours, theirs)) is not None
        if found < (asked := ASKED[theirs] if ours == OURS[0] else 1.0)
    ]


def _name(kernel: Record) -> str:
    return f"{kernel['taps']}x{kernel['taps']}"


def _ms(kernel: Record, side: str) -> float:
    return kernel["timings"][side]["median_s"] * 1e3


def _each(record: Record, cell: Callable[[Record, str], str]) -> str:
    """A line for each kernel, a column for each side."""
    rows = [
        (_name(kernel), *(cell(kernel, side) if side in kernel["timings"] else "-" for side in SIDES))
        for kernel in record["kernels"]
    ]
    return table(("Gaussian", *SIDES.values()), rows)


def _ratios(record: Record) -> Iterator[Sequence[str]]:
    for kernel in record["kernels"]:
        for ours in OURS:
            cells = []
            for theirs, asked in ASKED.items():
                found = ratio(kernel, ours, theirs)
                reached = ours == OURS[0] and found is not None and found >= asked
                cells.append((number(found) or "-") + " ✓" * reached)
            yield _name(kernel), SIDES[ours], *cells
