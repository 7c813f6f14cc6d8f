"""Measure every suite (forward in three types, both gradients, training), and write the tables of results/.

    make bench                                 or: python benchmarks/tables.py
    python benchmarks/tables.py --again        measure anew what is there already
    python benchmarks/tables.py --direction forward --dtype float32 --suite densenet seed_mnist
    python benchmarks/tables.py --write        only write the tables and pictures of the records that are there
    python benchmarks/tables.py --check        only say whether the tables are what the records give

Each suite runs alone, `plainconv bench --suite NAME` in a process of its own, and leaves one record in results/bench/;
a run that was interrupted goes on where it stopped.  From the records come a page for each direction
(results/forward.md, grad_input.md, grad_weight.md, train.md) and a picture for each type, and one of the errors of the
algorithms that transform (results/errors.md).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from plainconv import bench, plots
from plainconv.bench.check import Verdict
from plainconv.menu import fitted

RESULTS = Path(__file__).parent.parent / "results"
BOUNDS = RESULTS / "bounds.json"  # suite -> direction -> a sentence of ours, from profiles; docs/log.md has the figures
DIRECTIONS = {  # and the types of each
    "forward": ("float32", "float64", "bfloat16"),
    "grad_input": ("float32",),
    "grad_weight": ("float32",),
    "train": ("float32",),
}
TITLES = {
    "forward": "Forward",
    "grad_input": "The gradient for the input",
    "grad_weight": "The gradient for the weight",
    "train": "Forward and both gradients",
}
HEAD = (
    "suite",
    "layers",
    "geomean",
    "asked",
    "worst",
    "at the limit",
    "share of it",
    "bound by",
    "regret of auto",
    "worst",
)
TRANSFORMS = {"winograd", "fft"}  # whose sums are not of the products themselves
EXACT = 0.1  # units of eps
PACKED = ("prepacked", "asked")  # columns of what has them
Records = dict[str, dict[str, Any]]  # suite -> its record


def path_of(folder: Path, direction: str, dtype: str, suite: str) -> Path:
    """Where the record of a suite is."""
    return folder / "bench" / f"{direction}-{dtype}-{suite}.json"


def measure(
    folder: Path, direction: str, dtypes: Sequence[str], suites: Sequence[str], again: bool, more: Sequence[str]
) -> int:
    """Run what is not there yet; how many runs failed."""
    failed = 0
    for dtype in dtypes:
        for suite in suites:
            if again or not path_of(folder, direction, dtype, suite).exists():
                words = ["--suite", suite, "--direction", direction, "--dtype", dtype, "--no-picture"]
                words += ["--regret"] if direction != "train" and dtype == "float32" else []
                words += ["--out", str(folder / "bench"), *more]
                run = subprocess.run([sys.executable, "-m", "plainconv", "bench", *words], check=False)
                failed += run.returncode != 0
    return failed


def read(folder: Path, direction: str) -> dict[str, Records]:
    """Type -> the records of the suites, in their order."""
    found: dict[str, Records] = {}
    for dtype in DIRECTIONS[direction]:
        paths = {suite: path_of(folder, direction, dtype, suite) for suite in bench.load()}
        records = {suite: json.loads(path.read_text()) for suite, path in paths.items() if path.exists()}
        if records:
            found[dtype] = records
    return found


def page(direction: str, found: dict[str, Records]) -> str:
    """results/forward.md, or that of another direction."""
    text = [
        f"# {TITLES[direction]}: torch's time over ours",
        "Made by `make bench` from the records in [bench/](bench); [how to read it](../docs/benchmarks.md). "
        "Below each table: what misses its threshold, and what is slower than torch. Where the machine's limit is "
        f"below a target, and the target is not met, {bench.LIMIT_SHARE:.0%} of the limit count; the target then "
        "stands in brackets, and below the table is what such a share alone makes good. (The limit is that of the "
        "definition's products, and winograd and fft, which have fewer, may pass it.) A layer marked * is a call that "
        "torch finishes in under 25 us; after one marked † the machine ran at less than "
        f"{bench.SLOWED:.0%} of its arithmetic, since its host gave it less.",
    ]
    known: dict[str, dict[str, str]] = json.loads(BOUNDS.read_text())
    suites = dict.fromkeys(suite for records in found.values() for suite in records)
    bounds = [f"- {suite}: {known[suite][direction]}" for suite in suites if direction in known[suite]]
    text += ["## What bounds each suite", "\n".join(bounds)] if bounds else []
    for dtype, records in found.items():
        text += [f"## {dtype}", conditions(list(records.values())), table(records), *regrets(records)]
        text += [*misses(records), *spared(records), *losses(records)]
        text.append(f"![A bar for every layer in {dtype}]({direction}-{dtype}.png)")
    return "\n\n".join(text) + "\n"


def errors(found: dict[str, dict[str, Records]]) -> str:
    """results/errors.md, of the records of each direction; empty if nothing was transformed."""
    text = []
    for direction, types in found.items():
        for dtype, records in types.items():
            lines = [
                (suite, row, checks)
                for suite, told in records.items()
                for row in bench.rows_of(told)
                if (checks := transformed(row))
            ]
            if not lines:
                continue
            # As if nobody were closer than a tenth of eps: a few points of a small layer may be exact.
            times = [
                max(EXACT, *(check.units for check in checks)) / max(EXACT, row.torch_check.units)
                for _, row, checks in lines
            ]
            shares = [check.units / check.allowed for *_, checks in lines for check in checks]
            text.append(f"## {TITLES[direction]}, {dtype}")
            text.append(
                f"{len(lines)} layers: {geometric_mean(times):.1f} times torch's error as a geomean, {max(times):.0f} "
                f"times at the worst, and at most {max(shares):.0%} of what is allowed."
            )
            head = "| suite | layer | problem | algorithm | ours | torch's | allowed |\n" + "|---" * 7 + "|"
            text.append("\n".join([head, *(error_line(*line) for line in lines)]))
    if not text:
        return ""
    start = (
        "# The errors of winograd and fft, beside torch's\n\n"
        "Made by `make bench` from the records in [bench/](bench): every layer that went by an algorithm that "
        "transforms, plain or prepacked. An error is the largest distance from float64 in up to 2,000 points of the "
        "result, in units of eps times the largest sum of absolute products (in training the worst of three "
        "directions), in the worse layout. Allowed is what the algorithm states: "
        "[winograd](../docs/algorithms/winograd.md), [fft](../docs/algorithms/fft.md)."
    )
    return "\n\n".join([start, *text]) + "\n"


def transformed(row: bench.Row) -> list[Verdict]:
    """The checks of the layouts in which a row's convolution, or one of three, was transformed."""
    both = ((row.algorithms, row.checks), (row.packed_algorithms, row.packed_checks))
    return [
        checks[layout]
        for algorithms, checks in both
        for layout, names in algorithms.items()
        if TRANSFORMS & set(names.split("/")) and layout in checks
    ]


def error_line(suite: str, row: bench.Row, checks: Sequence[Verdict]) -> str:
    """A layer."""
    worst = max(checks, key=lambda check: check.units / check.allowed)
    names = dict.fromkeys((*row.algorithms.values(), *row.packed_algorithms.values()))
    shown = [name for name in names if TRANSFORMS & set(name.split("/"))]
    numbers = (worst.units, row.torch_check.units, worst.allowed)
    cells = (suite, row.layer.name, str(row.layer.problem), ", ".join(shown), *(f"{value:.2f}" for value in numbers))
    return f"| {' | '.join(cells)} |"


def conditions(records: Sequence[dict[str, Any]]) -> str:
    """Machine, threads, versions and dates, each kind once."""
    machines = {
        f"{told['machine']['processor']}, {told['machine']['cores']} cores, {told['threads']} threads, "
        f"torch {told['machine']['torch']}, Python {told['machine']['python']}"
        for told in records
    }
    peaks = sorted(told["peaks"]["flops"] / 1e9 for told in records)
    middle = peaks[len(peaks) // 2]
    return f"{'; '.join(sorted(machines))}; {middle:.0f} GFLOP/s at the most. {measured(records)} or a few calls."


def measured(records: Sequence[dict[str, Any]]) -> str:
    """When, and for how long."""
    days, spent = sorted(told["made"][:10] for told in records), sorted(told["seconds"] for told in records)
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    seconds = " to ".join(dict.fromkeys(f"{each:g}" for each in (spent[0], spent[-1])))
    return f"Measured {when}, each suite alone, each layer for {seconds} s"


def table(records: Records) -> str:
    """A line for each suite, and one for each part of it that has a threshold of its own."""
    rows = {suite: bench.rows_of(told) for suite, told in records.items()}
    verdicts = {suite: held(told) for suite, told in records.items()}
    packed = any(row.packed for each in rows.values() for row in each)
    asked = any(one.threshold.by == "prepacked" for each in verdicts.values() for one in each)
    head = [*HEAD[:4], *PACKED[: packed + asked], *HEAD[4:]]
    lines = []
    for suite in records:
        for of in dict.fromkeys(("layers", *(one.threshold.of for one in verdicts[suite]))):
            told = {one.threshold.by: cell(one) for one in verdicts[suite] if one.threshold.of == of}
            lines.append(line(part(suite, of), bench.picked(of, rows[suite]), told, packed + asked))
    return ruled(head, lines)


def ruled(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with a rule below its head."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def line(name: str, rows: Sequence[bench.Row], asked: Mapping[str, str], more: int) -> Sequence[str]:
    """Of some layers of a suite; of PACKED so many."""
    (total,) = bench.summary(rows)
    bound = Counter(row.bound_by for row in rows).most_common()
    return (
        name,
        str(total.layers),
        number(total.geomean),
        asked.get("ratio", ""),
        *(number(total.packed), asked.get("prepacked", ""))[:more],
        f"{number(total.worst)} ({total.worst_layer})",
        number(total.most),
        f"{total.share:.0%}" if total.share else "",
        ", ".join(f"{name} {count}" for name, count in bound),
        *([number(value) for value in total.regret] if total.regret else ["", ""]),
    )


def part(suite: str, of: str) -> str:
    """A suite, or some layers of it."""
    return suite if of == "layers" else f"{suite}: {of}"


def held(told: dict[str, Any]) -> list[bench.Held]:
    """What the thresholds say of a record."""
    rows = bench.rows_of(told)
    return bench.held(told["direction"], told["dtype"], rows[0].layer.suite, rows, rows[0].device)


def cell(one: bench.Held) -> str:
    """What counts, the target if that is another, and whether it is met by the mean and by every layer."""
    target = one.threshold.geomean
    limited = f" ({number(target)})" * (one.geomean.asked < target)
    return number(one.geomean.asked) + limited + " ✓" * one.good


def misses(records: Records) -> list[str]:
    """A paragraph for each suite that has anything below its thresholds."""
    text = []
    for suite, told in records.items():
        for one in held(told):
            if not one.good:
                words = [] if one.geomean.good else [f"geomean {one.geomean}"]
                words += [f"{marked(row)} {found}" for row, found in one.missed]
                text.append(f"{asked_of(suite, one)}, below what is asked: {', '.join(words)}.")
    return text


def spared(records: Records) -> list[str]:
    """A paragraph of what is below its target, but not below the share of the machine's limit that counts instead."""
    said = []
    for suite, told in records.items():
        for one in held(told):
            words = [f"geomean {number(one.geomean.value)} of {number(one.geomean.target)}"] * one.geomean.spared
            words += [f"{marked(row)} {number(found.value)} of {number(found.target)}" for row, found in one.spared]
            said += [f"{asked_of(suite, one)}: {', '.join(words)}"] * bool(words)
    return [
        f"Below the target, but not below {bench.LIMIT_SHARE:.0%} of the machine's limit: {'; '.join(said)}."
    ] * bool(said)


def asked_of(suite: str, one: bench.Held) -> str:
    """Whose threshold it is."""
    return part(suite, one.threshold.of) + f", {one.threshold.by}" * (one.threshold.by != "ratio")


def regrets(records: Records) -> list[str]:
    """What "auto" loses by its choices: in all suites, in those that no estimate was fitted to, and where too much."""
    totals = {suite: bench.summary(bench.rows_of(told))[0].regret for suite, told in records.items()}
    known = {suite: regret for suite, regret in totals.items() if regret}
    if not known:
        return []

    def told(suites: Sequence[str]) -> str:
        rows = [row for suite in suites for row in bench.rows_of(records[suite]) if row.regret]
        values = [row.regret.value for row in rows if row.regret]
        return f"{number(geometric_mean(values))} in {len(values)} layers, {number(max(values))} at the worst"

    text = f"Regret of auto: {told(list(known))}"
    if unseen := [suite for suite in fitted.model().held_out if suite in known]:
        text += f"; in {', '.join(unseen)}, which no estimate was fitted to: {told(unseen)}"
    over = [
        f"{suite} {number(mean)}, {number(worst)} at the worst"
        for suite, (mean, worst) in known.items()
        if mean > bench.REGRET[0] or worst > bench.REGRET[1]
    ]
    if over:
        text += f". More than {bench.REGRET[0]}, or {bench.REGRET[1]} at the worst: {'; '.join(over)}"
    return [f"{text}."]


def losses(records: Records) -> list[str]:
    """A paragraph for each suite that has layers slower than torch's, or wrong ones."""
    text = []
    for suite, told in records.items():
        (total,) = bench.summary(bench.rows_of(told))
        if total.losses:
            each = (f"{marked(row)} {number(row.ratio)}" for row in total.losses)
            text.append(f"{suite}, {len(total.losses)} of {total.layers} lost: {', '.join(each)}.")
        if total.red:
            text.append(f"{suite}, WRONG: {', '.join(row.layer.name for row in total.red)}.")
    return text


def marked(row: bench.Row) -> str:
    """The layer's name with the page's marks."""
    return row.layer.name + "*" * row.short + "†" * (row.speed < bench.SLOWED)


def number(value: float | None) -> str:
    """Two decimals, or nothing."""
    return "" if value is None else f"{value:.2f}"


def main() -> int:
    """Parse; measure, then write; or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--direction", nargs="*", default=list(DIRECTIONS), choices=list(DIRECTIONS))
    parser.add_argument("--dtype", nargs="*", default=DIRECTIONS["forward"], choices=DIRECTIONS["forward"])
    parser.add_argument("--suite", nargs="*", default=list(bench.load()), choices=list(bench.load()))
    parser.add_argument("--seconds", default="0.5", help="for each layer, about")
    parser.add_argument("--threads", help="default: as many as torch would take")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder")
    given = parser.parse_args()
    more = ["--seconds", given.seconds, *(["--threads", given.threads] if given.threads else [])]
    failed = 0
    for direction in given.direction:
        if not given.check and not given.write:
            dtypes = [dtype for dtype in DIRECTIONS[direction] if dtype in given.dtype]
            failed += measure(given.results, direction, dtypes, given.suite, given.again, more)
        found = read(given.results, direction)
        target = given.results / f"{direction}.md"
        if not found:
            continue
        if given.check:
            failed += not target.exists() or target.read_text() != page(direction, found)
        else:
            target.write_text(page(direction, found))
            draw(given.results, direction, found)
    if text := errors({direction: read(given.results, direction) for direction in DIRECTIONS}):
        target = given.results / "errors.md"
        if given.check:
            failed += not target.exists() or target.read_text() != text
        else:
            target.write_text(text)
    return int(failed > 0)


def draw(folder: Path, direction: str, found: dict[str, Records]) -> None:
    """A picture for each type."""
    for dtype, records in found.items():
        shown = {suite: layers for told in records.values() for suite, layers in bench.drawn(told).items()}
        title = f"{dtype}, {direction}: torch's time over ours; a mark is the machine's limit"
        (folder / f"{direction}-{dtype}.png").write_bytes(plots.bars(shown, title))


if __name__ == "__main__":
    sys.exit(main())
