"""Fit the estimates that rank algorithms to what was measured, and say how well they rank.

    python benchmarks/fit.py            read results/bench, write plainconv/menu/fitted.json
    python benchmarks/fit.py --check    write nothing, only say

An algorithm's `cost` counts cycles and bytes.  What is left over is one factor for each direction, type and algorithm;
all of them together minimise, over the layers,

    mean of  log(seconds of the algorithm with the least  factor * estimate  /  seconds of the quickest)
    + PULL * mean of  |log(seconds / (factor * estimate))|

by one factor after the other, over and over, in steps of STEP.  Every third suite is held out.  The regret of "auto"
(the time of the algorithm with the least estimate over that of the quickest) is then told of the suites that were
fitted and of those that were not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import torch

from plainconv import bench
from plainconv.bench.calls import CHANNELS_LAST
from plainconv.bench.run import Row
from plainconv.menu import ALGORITHMS, fitted
from plainconv.problem import Direction, Request

RECORDS = Path(__file__).parent.parent / "results" / "bench"
HELD_OUT = 3  # every third suite
PULL = 0.02  # an estimate that ranks well may still be off; so much does that count
STEP = 1.04
REACH = 20  # steps, either way
ROUNDS = 4
MODEL = {algorithm.name: algorithm for algorithm in ALGORITHMS}

Factors = dict[str, float]


class Sample(NamedTuple):
    """One request, and seconds by algorithm."""

    suite: str
    request: Request
    seconds: dict[str, float]


def samples(folder: Path) -> Iterator[Sample]:
    """What the records know of single directions."""
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text())
        if told["direction"] != "train":
            for row in bench.rows_of(told):
                if row.right:
                    yield from _of_row(row, told["threads"])


def _of_row(row: Row, threads: int) -> Iterator[Sample]:
    for layout, timing in row.ours.items():
        direction = row.layer.direction(Direction(row.direction))
        last = layout == CHANNELS_LAST
        request = Request(row.layer.problem, direction, getattr(torch, row.dtype), "cpu", last, False, threads)
        seconds = {row.algorithms[layout]: timing.median_s}
        if row.regret and layout == row.our_best:
            seconds |= row.regret.seconds
        able = {
            name: value for name, value in seconds.items() if name in MODEL and MODEL[name].why_not(request) is None
        }
        if able:
            yield Sample(row.layer.suite, request, able)


class Choice(NamedTuple):
    """Of one sample, in logarithms: key -> (estimate without its factor, measured)."""

    logs: dict[str, tuple[float, float]]

    def regret(self, factors: Factors) -> float:
        """How much longer the one takes that the estimates prefer."""
        taken = min(self.logs, key=lambda key: self.logs[key][0] + factors.get(key, 0.0))
        return self.logs[taken][1] - min(measured for _, measured in self.logs.values())

    def off(self, factors: Factors) -> list[float]:
        return [abs(seconds - estimate - factors.get(key, 0.0)) for key, (estimate, seconds) in self.logs.items()]


def tabulated(known: Iterable[Sample]) -> list[Choice]:
    """Estimates are made once."""
    return [
        Choice(
            {
                fitted.key(name, sample.request): (
                    math.log(MODEL[name].cost(sample.request).seconds),
                    math.log(seconds),
                )
                for name, seconds in sample.seconds.items()
            }
        )
        for sample in known
    ]


def loss(known: Sequence[Choice], factors: Factors) -> float:
    """What is minimised."""
    return fmean(choice.regret(factors) for choice in known) + PULL * fmean(
        distance for choice in known for distance in choice.off(factors)
    )


def fit(known: Sequence[Choice]) -> Factors:
    """Key -> logarithm of its factor."""
    keys = sorted({key for choice in known for key in choice.logs})
    factors = dict.fromkeys(keys, 0.0)
    steps = sorted((i * math.log(STEP) for i in range(-REACH, REACH + 1)), key=abs)  # of equals, the nearest to none
    for _ in range(ROUNDS):
        for key in keys:
            touched = [choice for choice in known if key in choice.logs]
            factors[key] = min(steps, key=lambda step: loss(touched, {**factors, key: step}))
    return factors


def told(name: str, known: Sequence[Choice], factors: Factors) -> str:
    """A line: regret and how far estimates are off."""
    regret = [choice.regret(factors) for choice in known if len(choice.logs) > 1] or [0.0]
    off = median([distance for choice in known for distance in choice.off(factors)] or [0.0])
    return (
        f"{name:34} {len(regret):4} choices, regret {math.exp(fmean(regret)):.3f}, worst {math.exp(max(regret)):.2f}; "
        f"estimates off by {math.exp(off):.2f} in the middle"
    )


def main() -> int:
    """Fit, tell, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--records", type=Path, default=RECORDS, help="the folder of the records")
    given = parser.parse_args()
    known = list(samples(given.records))
    suites = sorted({sample.suite for sample in known})
    held = suites[HELD_OUT - 1 :: HELD_OUT]
    inside = tabulated(sample for sample in known if sample.suite not in held)
    outside = tabulated(sample for sample in known if sample.suite in held)
    factors = fit(inside)
    print(told("fitted suites, without factors", inside, {}))
    print(told("fitted suites", inside, factors))
    print(told("suites held out, without factors", outside, {}))
    print(told("suites held out", outside, factors))
    if not given.check:
        rounded = {key: round(math.exp(value), 3) for key, value in factors.items()}
        model = fitted.Model(tuple(s for s in suites if s not in held), tuple(held), rounded)
        fitted.PATH.write_text(json.dumps(dataclasses.asdict(model), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
