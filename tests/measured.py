"""Rows of the benchmark that nobody measured."""

from plainconv import bench
from plainconv.bench.check import Verdict
from plainconv.timing import Timing

FINE = Verdict(1e-7, 1.0, 10.0, 100, True)


def timing(seconds):
    return Timing(seconds, seconds, seconds, 5)


def row(layer, torch, ours, **more):
    """A layer's, right and without regret; torch, ours: seconds by format."""
    told = {
        "cut_from": None,
        "direction": "forward",
        "dtype": "float32",
        "algorithms": {"contiguous": "shift"},
        "checks": {"contiguous": FINE},
        "torch_check": FINE,
        "limit_s": 5e-4,
        "bound_by": "memory",
        "speed": 1.0,
        "first_call_s": 0.1,
        "scratch": 0,
        "torch_scratch": 0,
        "regret": None,
        "against": {},
    }
    sides = ({layout: timing(seconds) for layout, seconds in side.items()} for side in (torch, ours))
    return bench.Row(layer, **dict(zip(("torch", "ours"), sides, strict=True)), **(told | more))
