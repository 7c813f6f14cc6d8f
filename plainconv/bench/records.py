"""Rows as plain data for JSON and back, and as text: one line a layer, one a suite."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from plainconv.bench.calls import CHANNELS_LAST, CONTIGUOUS
from plainconv.bench.check import Verdict
from plainconv.bench.peaks import Peaks
from plainconv.bench.run import Regret, Row, Setting, best
from plainconv.bench.suites import Layer
from plainconv.bench.thresholds import held
from plainconv.problem import ConvProblem
from plainconv.timing import Timing, machine

FORMAT = 1  # raised when the fields change their meaning

SHOWN_COPIES = (1 << 17, 1 << 20, 1 << 23, 1 << 28)  # bytes

SLOWED = 0.8  # a speed of the machine that a table mentions

_DERIVED = (
    "ratio",
    "packed_ratio",
    "eager_ratio",
    "right",
    "short",
    "share",
    "most",
    "flop",
)  # written for a reader, made again from the rest


@dataclass(frozen=True)
class Summary:
    """A suite in one line.

    Attributes:
        suite: its name.
        layers: how many were measured.
        geomean: of the layers' ratios, each layer once; None if none has one.
        worst, worst_layer: the least ratio, and whose it is.
        losses: layers with a ratio below 1, the worst first.
        red: layers whose result is wrong.
        most: the geomean if every layer ran at the machine's limit.
        share: the geomean of the layers' shares of that limit.
        regret: (geomean, worst) of auto's regret, or None.
        packed: the geomean with prepacked weights; None if that was not measured.
        eager: the same of calls from Python, on a GPU.
    """

    suite: str
    layers: int
    geomean: float | None
    worst: float | None
    worst_layer: str
    losses: tuple[Row, ...]
    red: tuple[Row, ...]
    most: float
    share: float | None
    regret: tuple[float, float] | None
    packed: float | None
    eager: float | None


def as_records(rows: Sequence[Row], setting: Setting) -> dict[str, Any]:
    """Everything about a run, ready for JSON."""
    return {
        "format": FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | setting.device.told(),
        "device": torch.device(setting.device.name).type,
        "direction": setting.direction,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "tf32": setting.device.rounds(setting.dtype),
        "threads": setting.threads,
        "seconds": setting.seconds,
        "peaks": asdict(setting.peaks),
        "rows": [_record(row) for row in rows],
    }


def as_json(records: Mapping[str, Any]) -> str:
    """The records as JSON, a line for each layer."""
    head = json.dumps({name: value for name, value in records.items() if name != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in records["rows"])
    return head.removesuffix("\n}") + ',\n "rows": [\n' + rows + "\n ]\n}\n"


def _record(row: Row) -> dict[str, Any]:
    fields = asdict(row)
    fields["layer"]["problem"] = str(row.layer.problem)
    return {**fields, **{name: getattr(row, name) for name in _DERIVED}}


def rows_of(records: Mapping[str, Any]) -> list[Row]:
    """The rows of what `as_records` made."""
    return [_row(dict(record)) for record in records["rows"]]


def drawn(records: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Suite -> its layers as a picture wants them: name, ratio, most."""
    suites: dict[str, list[dict[str, Any]]] = {}
    for record in records["rows"]:
        shown = {"name": record["layer"]["name"], "ratio": record["ratio"], "most": record["most"]}
        suites.setdefault(record["layer"]["suite"], []).append(shown)
    return suites


def peaks_of(records: Mapping[str, Any]) -> Peaks:
    """The machine's peaks in what `as_records` made."""
    told = records["peaks"]
    return Peaks(told["flops"], tuple((size, spent) for size, spent in told["copies"]), told["call_s"])


def _row(record: dict[str, Any]) -> Row:
    layer = record["layer"]
    record["layer"] = Layer(**{**layer, "problem": ConvProblem.parse(layer["problem"])})
    for side in ("torch", "ours", "packed"):  # older records know nothing of "packed"
        record[side] = {layout: Timing(**timing) for layout, timing in record.get(side, {}).items()}
    for checks in ("checks", "packed_checks"):
        record[checks] = {layout: Verdict(**check) for layout, check in record.get(checks, {}).items()}
    record["eager"] = {side: Timing(**timing) for side, timing in record.get("eager", {}).items()}
    record.setdefault("packed_algorithms", {})
    record.setdefault("device", "cpu")
    record["torch_check"] = Verdict(**record["torch_check"])
    record["regret"] = record["regret"] and Regret(**record["regret"])
    others = record["against"].items()
    record["against"] = {name: told if isinstance(told, str) else Timing(**told) for name, told in others}
    return Row(**{field.name: record[field.name] for field in dataclasses.fields(Row)})


# -- a suite in a line -----------------------------------------------------------------------------------------------


def summary(rows: Iterable[Row]) -> list[Summary]:
    """One summary for each suite, in the order of the rows."""
    suites: dict[str, list[Row]] = {}
    for row in rows:
        suites.setdefault(row.layer.suite, []).append(row)
    return [_summary(name, group) for name, group in suites.items()]


def _summary(name: str, rows: Sequence[Row]) -> Summary:
    ratios = [(row.ratio, row) for row in rows if row.ratio is not None]
    regrets = [row.regret.value for row in rows if row.regret]
    worst, worst_row = min(ratios, key=lambda pair: pair[0], default=(None, None))
    losses = sorted((pair for pair in ratios if pair[0] < 1), key=lambda pair: pair[0])
    return Summary(
        suite=name,
        layers=len(rows),
        geomean=geomean(ratio for ratio, _ in ratios),
        worst=worst,
        worst_layer=worst_row.layer.name if worst_row else "",
        losses=tuple(row for _, row in losses),
        red=tuple(row for row in rows if not row.right),
        most=geomean(row.most for row in rows) or 0.0,
        share=geomean(row.share for row in rows if row.share is not None),
        regret=(geomean(regrets) or 1.0, max(regrets)) if regrets else None,
        packed=geomean(row.packed_ratio for row in rows if row.packed_ratio is not None),
        eager=geomean(row.eager_ratio for row in rows if row.eager_ratio is not None),
    )


def geomean(values: Iterable[float]) -> float | None:
    """The geometric mean; None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


# -- text ------------------------------------------------------------------------------------------------------------

HEAD = (
    "layer",
    "problem",
    "torch",
    "ours",
    "ratio",
    "nchw",
    "last",
    "prepacked",
    "ratio",
    "GFLOP/s",
    "limit",
    "bound by",
    "algorithm",
    "first",
    "scratch",
    "torch's",
    "error",
)
EAGER_HEAD = ("layer", "problem", "torch", "ours", "ratio")


def heading(records: Mapping[str, Any]) -> str:
    """The machine (of a GPU, how its driver tells of it) and what it can do, in two lines."""
    told, peaks = records["machine"], peaks_of(records)
    speeds = ", ".join(
        f"{moved / spent / 1e9:.0f} GB/s at {size(moved)}" for moved, spent in peaks.copies if moved in SHOWN_COPIES
    )
    return (
        f"{_device(records)}, torch {told['torch']}, {records['dtype']}{' as TF32' * records.get('tf32', False)}, "
        f"{records['direction']}\n{peaks.flops / 1e9:.0f} GFLOP/s; a copy {speeds}; a call {seconds(peaks.call_s)}"
    )


def _device(records: Mapping[str, Any]) -> str:
    told = records["machine"]
    if records.get("device", "cpu") == "cpu":
        return f"{told['processor']}, {records['threads']} threads"
    words = {"clock": "at ", "driver": "driver ", "cudnn": "cuDNN ", "triton": "Triton "}
    return ", ".join([told["gpu"], *(f"{word}{told[name]}" for name, word in words.items() if name in told)])


def table(rows: Sequence[Row]) -> str:
    """A line for each layer, a line for each suite; docs/benchmarks.md says how to read it."""
    text = []
    for total in summary(rows):
        group = [row for row in rows if row.layer.suite == total.suite]
        text += [total.suite, _aligned([HEAD, *map(_cells, group)]), *_notes(group), sentence(total), *_asked(group)]
        if eager := [row for row in group if row.eager]:
            text += ["  the same, called from Python", _aligned([EAGER_HEAD, *map(_eager_cells, eager)])]
        text.append("")
    return "\n".join(text).rstrip()


def sentence(total: Summary) -> str:
    """A suite in a sentence."""
    if total.geomean is None or total.worst is None:
        return f"{total.suite}: no layer is right"
    said = (
        f"{total.suite}: geomean {total.geomean:.2f}, worst {total.worst:.2f} ({total.worst_layer}), "
        f"{len(total.losses)} of {total.layers} layers lost; "
        f"at {total.share or 0:.0%} of the machine's limit, which is geomean {total.most:.2f}"
    )
    if total.packed:
        said += f"; prepacked geomean {total.packed:.2f}"
    if total.eager:
        said += f"; called from Python geomean {total.eager:.2f}"
    if total.regret:
        said += f"; regret of auto {total.regret[0]:.2f}, worst {total.regret[1]:.2f}"
    if total.red:
        said += f"; WRONG: {', '.join(row.layer.name for row in total.red)}"
    return said


def _asked(rows: Sequence[Row]) -> list[str]:
    """A line for each threshold of a suite."""
    one = rows[0]
    said = []
    for each in held(one.direction, one.dtype, one.layer.suite, rows, one.device):
        missed = "".join(f", {row.layer.name} {found}" for row, found in each.missed)
        said.append(f"  {each.threshold.of}, {each.threshold.by}: {each.geomean} asked{missed}")
    return said


def _cells(row: Row) -> tuple[str, ...]:
    name = row.layer.name + ("*" if row.short else "") + (" (cut)" if row.cut_from else "")
    torch_s = row.torch[row.torch_best].median_s
    start = (name, str(row.layer.problem), f"{seconds(torch_s)} {_letter(row.torch_best)}")
    end = (seconds(row.first_call_s), size(row.scratch), size(row.torch_scratch), _error(row))
    if not row.right:
        return (*start, "WRONG", "", "", "", "", "", "", "", row.bound_by, _algorithm(row), *end)
    our_s = row.ours[row.our_best].median_s
    return (
        *start,
        f"{seconds(our_s)} {_letter(row.our_best)}",
        f"{row.ratio:.2f}",
        *(f"{ratio:.2f}" if ratio else "-" for ratio in map(row.ratio_in, (CONTIGUOUS, CHANNELS_LAST))),
        f"{seconds(row.packed[best(row.packed)].median_s)} {_letter(best(row.packed))}" if row.packed else "-",
        f"{row.packed_ratio:.2f}" if row.packed_ratio else "-",
        f"{row.flop / our_s / 1e9:.0f}",
        f"{row.share:.0%}",
        row.bound_by,
        _algorithm(row),
        *end,
    )


def _eager_cells(row: Row) -> tuple[str, ...]:
    theirs, own = (row.eager[side].median_s for side in ("torch", "ours"))
    return (row.layer.name, str(row.layer.problem), seconds(theirs), seconds(own), f"{row.eager_ratio:.2f}")


def _algorithm(row: Row) -> str:
    return row.algorithms[row.our_best if row.right else CONTIGUOUS]


def _letter(layout: str) -> str:
    return "c" if layout == CONTIGUOUS else "l"


def _error(row: Row) -> str:
    worst = max((*row.checks.values(), *row.packed_checks.values()), key=lambda check: check.units / check.allowed)
    return f"{worst.error:.1e} ({worst.units / worst.allowed:.2f})"


def _notes(rows: Sequence[Row]) -> list[str]:
    """What a table has no column for."""
    notes = [f"  {row.layer.name} (cut): over 4 GFLOP, it was {row.cut_from}" for row in rows if row.cut_from]
    notes += [
        f"  {row.layer.name}: the machine ran at {row.speed:.0%} of its arithmetic right after it"
        for row in rows
        if row.speed < SLOWED
    ]
    if any(row.short for row in rows):
        notes.append("  * torch finishes the call in under 25 us")
    for row in rows:
        if row.regret:
            each = sorted(row.regret.seconds.items(), key=lambda pair: pair[1])
            said = ", ".join(f"{name} {seconds(spent)}" for name, spent in each)
            out = "".join(f"; {name}: {why}" for name, why in row.regret.left_out.items())
            notes.append(f"  {row.layer.name}: regret {row.regret.value:.2f} ({said}{out})")
        for name, told in row.against.items():
            if isinstance(told, str):
                notes.append(f"  {row.layer.name}: {name}: {told}")
            elif name != "ours":
                notes.append(f"  {row.layer.name}: {name} {seconds(told.median_s)}, ratio {row.ratio_to(name):.2f}")
    return notes


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
        return "  " + "  ".join(left + right)

    return "\n".join(map(line, lines))


def seconds(value: float) -> str:
    """0.00123 -> "1.23ms"."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if value * factor < 1000:
            return f"{value * factor:.3g}{unit}"
    return f"{value:.3g}s"


def size(value: int) -> str:
    """1536 -> "1.5K"."""
    for scale, unit in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value}B" if value else "0"
