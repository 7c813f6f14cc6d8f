"""results/models.md from the records of benchmarks/models.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import geometric_mean
from typing import Any

from parts import promise
from tables import number

Record = dict[str, Any]
Records = Mapping[str, Record]
SIDES = {  # side -> its column; swap is in its better memory format
    "torch": "torch, NCHW",
    "torch channels_last": "torch, channels_last",
    "torch.compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "swap": "plainconv swap",
    "optimize": "plainconv optimize",
}
KEPT = 0.95  # of what a part promises, the whole model has to be
LEAST = 0.97  # of torch's better memory format, no model may be below
PARTS = {"swap": 1.4, "optimize": 2.0, "training": 1.4}  # what the parts are asked to be, in the geometric mean
WHOLE = {"resnet50-1": 1.8, "resnet50-8": 1.8, "mobilenet_v2": 1.8, "regnet": 1.8}  # asked of optimize, in the whole
RUNTIMES = ("onnxruntime", "openvino")
BEATEN = {"swap": ("torch", "torch.compile"), "optimize": ("torch", "torch.compile", *RUNTIMES)}  # they should be


def page(records: Records, asked: Iterable[str]) -> str:
    """Tables of times, parts, training and errors; what misses its target; what is not there, of all that is asked."""
    had = {name: of for name, of in records.items() if "why_not" not in of}
    text = [
        "# Whole models",
        "Made by `make models` ([benchmarks/models.py](../benchmarks/models.py)) from [models.json](models.json); "
        "[how to read it](../docs/benchmarks.md#whole-models).",
        *conditions(had),
    ]
    if had:
        text += ["## Inference", _times(had), "## The part that is replaced", _parts(had)]
        if trained := _those(had, "training"):
            text += ["## A step of training", _training(trained)]
        text += ["## Errors", _errors(had), "## Optimized", _optimized(had)]
        text += ["## What misses its target", "\n".join(f"- {line}" for line in misses(had)) or "Nothing."]
    if said := [*_absent(records), *_missing(records, asked)]:
        text += ["## What is not here", "\n".join(f"- {line}" for line in said)]
    return "\n\n".join(text) + "\n"


def summary(records: Records) -> str:
    """A line for each model, and in which the others are quicker."""
    had = {name: of for name, of in records.items() if "why_not" not in of}
    sides = [side for side in SIDES if side != "torch channels_last"]
    rows = [
        (
            name,
            *(_cell(record, record["best"].get(side, side)) for side in sides),
            " / ".join(f"{part(record, of)[0]:.0%}" for of in ("swap", "optimize")),
            " / ".join(f"{record['errors'][record['best'].get(of, of)]:.0e}" for of in ("torch", "swap", "optimize")),
        )
        for name, record in had.items()
    ]
    names = ("torch", *(SIDES[side] for side in sides[1:]))
    times = table(("milliseconds", *names, "p of swap / optimize", "error of torch / swap / optimize"), rows)
    losses = []
    for of, others in BEATEN.items():
        for other in others:
            ratios = {name: _over(record, other, of) for name, record in had.items()}
            if slower := [f"{name} {number(ratio)}" for name, ratio in ratios.items() if ratio < 1]:
                losses.append(
                    f"- {of} is slower than {'torch' if other == 'torch' else SIDES[other]}: {', '.join(slower)}"
                )
    return "\n\n".join([times, *(["\n".join(losses)] if losses else [])])


def conditions(records: Records) -> list[str]:
    """Machine, threads, versions and dates, each kind once."""
    machines = {
        f"{of['machine']['processor']}, {of['machine']['cores']} cores, {of['threads']} threads for every side, "
        f"torch {of['machine']['torch']}, "
        + "".join(f"{package} {version}, " for package, version in of["packages"].items())
        + f"Python {of['machine']['python']}, float32"
        for of in records.values()
    }
    days = sorted(of["made"][:10] for of in records.values())
    when = " to ".join(sorted({*days[:1], *days[-1:]}))
    return [f"{'; '.join(sorted(machines))}. Measured {when}."] if records else []


def gain(record: Record, side: str) -> float:
    """torch's time, in its better memory format, over that of a side; swap's in its better one."""
    side = record["best"].get(side, side)
    return _ms(record, record["best"]["torch"]) / _ms(record, side)


def part(record: Record, of: str) -> tuple[float, float]:
    """p, the share of torch's run that is replaced by "swap", by "optimize", or in "training"; and s, its speed-up."""
    if of == "training":
        record, ours, torchs = record["training"], "swap", "torch"
    else:
        ours, torchs = of, "torch behind" if of == "optimize" else "torch"
    parts = record["parts"]
    return parts[torchs]["share"], parts[torchs]["seconds"] / parts[ours]["seconds"]


def whole(record: Record, of: str) -> float:
    """How many times as fast as torch the whole is."""
    return gain(record["training"], "swap") if of == "training" else gain(record, of)


def misses(records: Records) -> list[str]:
    """What is slower than torch, not what its part promises, or below what is asked."""
    lines = []
    for of, asked in PARTS.items():
        ratios = [part(record, of)[1] for record in _those(records, of).values()]
        if ratios and (mean := geometric_mean(ratios)) < asked:
            lines.append(f"{of}: its part is {number(mean)} times as fast in the geometric mean, of {number(asked)}")
    for name, record in records.items():
        for of in PARTS:
            if not _those({name: record}, of):
                continue
            found, promised = whole(record, of), promise(*part(record, of))
            if found < LEAST:
                lines.append(f"{name}, {of}: {number(found)} of torch's speed, of {number(LEAST)}")
            if found < KEPT * promised:
                lines.append(f"{name}, {of}: {number(found)} where its part promises {number(promised)}")
        if name in WHOLE and gain(record, "optimize") < WHOLE[name]:
            lines.append(f"{name}, optimize: {number(gain(record, 'optimize'))} of {number(WHOLE[name])}")
        for other in RUNTIMES:
            share = _over(record, other, "optimize")
            if name.startswith("resnet50") and share < 1:
                lines.append(f"{name}: {SIDES[other]} takes {share:.0%} of optimize's time")
    return lines


def _those(records: Records, of: str) -> Records:
    """The records that say something of "training"; the other parts are in all."""
    return {name: record for name, record in records.items() if of != "training" or of in record}


# -- tables ----------------------------------------------------------------------------------------------------------


def _ms(record: Record, side: str) -> float:
    return record["timings"][side]["median_s"] * 1e3


def _over(record: Record, other: str, of: str) -> float:
    """The time of another side over that of one, in the better memory formats; infinite if it cannot be had."""
    other, of = (record["best"].get(side, side) for side in (other, of))
    return _ms(record, other) / _ms(record, of) if other in record["timings"] else math.inf


def _cell(record: Record, side: str) -> str:
    return f"{_ms(record, side):.1f}" if side in record["timings"] else "-"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _mean(records: Records, of: Callable[[Record], float]) -> str:
    return number(geometric_mean(map(of, records.values())))


def _times(records: Records) -> str:
    """Milliseconds of a run."""

    rows = [
        (
            name,
            "x".join(map(str, record["input"])),
            *(_cell(record, record["best"]["swap"] if side == "swap" else side) for side in SIDES),
            number(gain(record, "swap")),
            number(gain(record, "optimize")),
        )
        for name, record in records.items()
    ]
    means = [_mean(records, lambda record, side=side: gain(record, side)) for side in ("swap", "optimize")]
    rows.append(("geometric mean", *[""] * (1 + len(SIDES)), *means))
    return "Milliseconds of a run, the median.\n\n" + table(
        ("model", "input", *SIDES.values(), "torch / swap", "torch / optimize"), rows
    )


def _told(record: Record, of: str) -> list[str]:
    (p, s), found = part(record, of), whole(record, of)
    kept = found / promise(p, s)
    return [f"{p:.0%}", number(s), number(promise(p, s)), number(found) + " ✓" * (kept >= KEPT)]


def _parts(records: Records) -> str:
    both = "swap", "optimize"
    head = [f"{of}: {what}" for of in both for what in ("p", "s", "promised", "whole")]
    rows = [(name, *(cell for of in both for cell in _told(record, of))) for name, record in records.items()]
    means = [_mean(records, lambda record, of=of: part(record, of)[1]) for of in both]
    rows.append(("geometric mean", "", means[0], "", "", "", means[1], "", ""))
    return table(("model", *head), rows)


def _training(records: Records) -> str:
    def cell(record: Record, side: str) -> str:
        return f"{_ms(record, side):.0f}" if side in record["timings"] else "-"

    rows = []
    for name, record in records.items():
        step = record["training"]
        times = cell(step, "torch"), cell(step, "torch channels_last"), cell(step, step["best"]["swap"])
        rows.append((name, *times, *_told(record, "training")))
    rows.append(("geometric mean", "", "", "", "", _mean(records, lambda record: part(record, "training")[1]), "", ""))
    head = ("model", "torch, NCHW", "torch, channels_last", "plainconv swap", "p", "s", "promised", "whole")
    return "Milliseconds of forward and backward, the median.\n\n" + table(head, rows)


def _errors(records: Records) -> str:
    def row(name: str, record: Record) -> tuple[str, ...]:
        errors, gradients = record["errors"], record.get("gradients", {})
        shown = (
            errors["torch"],
            errors[record["best"]["swap"]],
            errors["optimize"],
            gradients.get("torch"),
            gradients.get("swap"),
        )
        return (name, *("-" if error is None else f"{error:.1e}" for error in shown))

    head = ("model", "torch", "swap", "optimize", "gradients: torch", "gradients: swap")
    said = (
        "Float32 against the same model in float64: the length of the difference over the length of what is right. "
        "A gradient jumps where the argument of a ReLU changes its sign, so a small difference in front of one that is "
        "near 0 shows enlarged in the gradients, on every side; with a smooth activation in its place it does not."
    )
    return f"{said}\n\n" + table(head, [row(name, record) for name, record in records.items()])


def _optimized(records: Records) -> str:
    def line(name: str, of: Record) -> str:
        kept = f", {len(of['kept'])} kept ({'; '.join(sorted({*of['kept'].values()}))})" if of["kept"] else ""
        plain = f"; nothing is fused: {of['plain']}" if of["plain"] else ""
        return f"- {name}: {of['calls']} prepacked{kept}{', in channels_last' * of['channels_last']}{plain}"

    return "\n".join(line(name, record["optimized"]) for name, record in records.items())


def _missing(records: Records, asked: Iterable[str]) -> Iterable[str]:
    return (f"{name}: not measured yet" for name in asked if name not in records)


def _absent(records: Records) -> Iterable[str]:
    for name, record in records.items():
        if "why_not" in record:
            yield f"{name}: {record['why_not']}"
        for side, why in record.get("absent", {}).items():
            yield f"{name}, {SIDES.get(side, side)}: {why}"
