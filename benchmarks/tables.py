"""Measure every suite, forward, in float32, float64 and bfloat16, and write the tables of results/.

    make bench                                 or: python benchmarks/tables.py
    python benchmarks/tables.py --again        measure anew what is there already
    python benchmarks/tables.py --dtype float32 --suite densenet seed_mnist
    python benchmarks/tables.py --write        only write the tables and pictures of the records that are there
    python benchmarks/tables.py --check        only say whether the tables are what the records give

Each suite runs alone, `plainconv bench --suite NAME --regret` in a process of its own, and leaves one record in
results/bench/; a run that was interrupted goes on where it stopped. From the records come results/forward.md and one
picture for each type.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plainconv import bench, plots

RESULTS = Path(__file__).parent.parent / "results"
DTYPES = ("float32", "float64", "bfloat16")
HEAD = ("suite", "layers", "geomean", "worst", "at the limit", "share of it", "bound by", "regret of auto", "worst")


def path_of(folder: Path, dtype: str, suite: str) -> Path:
    """Where the record of a suite is."""
    return folder / "bench" / f"forward-{dtype}-{suite}.json"


def measure(folder: Path, dtypes: Sequence[str], suites: Sequence[str], again: bool, more: Sequence[str]) -> int:
    """Run what is not there yet; how many runs failed."""
    failed = 0
    for dtype in dtypes:
        for suite in suites:
            if again or not path_of(folder, dtype, suite).exists():
                words = ["--suite", suite, "--dtype", dtype, "--regret", "--no-picture", "--out", str(folder / "bench")]
                run = subprocess.run([sys.executable, "-m", "plainconv", "bench", *words, *more], check=False)
                failed += run.returncode != 0
    return failed


def read(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Type -> suite -> its record, in the order of the suites."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for dtype in DTYPES:
        paths = {suite: path_of(folder, dtype, suite) for suite in bench.load()}
        records = {suite: json.loads(path.read_text()) for suite, path in paths.items() if path.exists()}
        if records:
            found[dtype] = records
    return found


def page(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """results/forward.md."""
    text = [
        "# Forward: torch's time over ours",
        "Made by `make bench` from the records in [bench/](bench); [how to read it](../docs/benchmarks.md). "
        "Losses are listed below each table; a layer marked * is a call that torch finishes in under 25 us.",
    ]
    for dtype, records in found.items():
        text += [f"## {dtype}", conditions(list(records.values())), table(records), *losses(records)]
        text.append(f"![A bar for every layer in {dtype}](forward-{dtype}.png)")
    return "\n\n".join(text) + "\n"


def conditions(records: Sequence[dict[str, Any]]) -> str:
    """Machine, threads, versions and dates, each kind once."""
    machines = {
        f"{told['machine']['processor']}, {told['machine']['cores']} cores, {told['threads']} threads, "
        f"torch {told['machine']['torch']}, Python {told['machine']['python']}"
        for told in records
    }
    peaks = sorted(told["peaks"]["flops"] / 1e9 for told in records)
    days = sorted(told["made"][:10] for told in records)
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    middle = peaks[len(peaks) // 2]
    return f"{'; '.join(sorted(machines))}; {middle:.0f} GFLOP/s at the most. Measured {when}, each suite alone."


def table(records: dict[str, dict[str, Any]]) -> str:
    """A line for each suite."""
    lines: list[Sequence[str]] = [HEAD, ["---"] * len(HEAD)]
    for suite, told in records.items():
        rows = bench.rows_of(told)
        (total,) = bench.summary(rows)
        bound = Counter(row.bound_by for row in rows).most_common()
        regret = [f"{value:.2f}" for value in total.regret] if total.regret else ["", ""]
        lines.append(
            (
                suite,
                str(total.layers),
                number(total.geomean),
                f"{number(total.worst)} ({total.worst_layer})",
                number(total.most),
                f"{total.share:.0%}" if total.share else "",
                ", ".join(f"{name} {count}" for name, count in bound),
                *regret,
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def losses(records: dict[str, dict[str, Any]]) -> list[str]:
    """A paragraph for each suite that has layers slower than torch's, or wrong ones."""
    text = []
    for suite, told in records.items():
        (total,) = bench.summary(bench.rows_of(told))
        if total.losses:
            each = (f"{row.layer.name}{'*' * row.short} {number(row.ratio)}" for row in total.losses)
            text.append(f"{suite}, {len(total.losses)} of {total.layers} lost: {', '.join(each)}.")
        if total.red:
            text.append(f"{suite}, WRONG: {', '.join(row.layer.name for row in total.red)}.")
    return text


def number(value: float | None) -> str:
    """Two decimals, or nothing."""
    return "" if value is None else f"{value:.2f}"


def main() -> int:
    """Parse; measure, then write; or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--dtype", nargs="*", default=DTYPES, choices=DTYPES)
    parser.add_argument("--suite", nargs="*", default=list(bench.load()), choices=list(bench.load()))
    parser.add_argument("--seconds", default="0.5", help="for each layer, about")
    parser.add_argument("--threads", help="default: as many as torch would take")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder")
    given = parser.parse_args()
    target = given.results / "forward.md"
    if given.check:
        return int(not target.exists() or target.read_text() != page(read(given.results)))
    failed = 0
    if not given.write:
        more = ["--seconds", given.seconds, *(["--threads", given.threads] if given.threads else [])]
        failed = measure(given.results, given.dtype, given.suite, given.again, more)
    found = read(given.results)
    target.write_text(page(found))
    for dtype, records in found.items():
        shown = {suite: layers for told in records.values() for suite, layers in bench.drawn(told).items()}
        title = f"{dtype}, forward: torch's time over ours; a mark is the machine's limit"
        (given.results / f"forward-{dtype}.png").write_bytes(plots.bars(shown, title))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
