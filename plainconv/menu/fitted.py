"""What measurements say of the estimates: a factor for each algorithm, direction and type, from benchmarks/fit.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from plainconv.problem import Request

PATH = Path(__file__).with_name("fitted.json")


@dataclass(frozen=True)
class Model:
    """The suites that the factors were fitted to, those that were held out, and key -> factor."""

    suites: tuple[str, ...]
    held_out: tuple[str, ...]
    factors: dict[str, float]


def key(name: str, request: Request) -> str:
    """What a factor depends on."""
    return f"{name} {request.direction.value} {str(request.dtype).removeprefix('torch.')}"


@cache
def model() -> Model:
    """The model that comes with the package."""
    return Model(**json.loads(PATH.read_text()))


def factor(name: str, request: Request) -> float:
    """Measured seconds over estimated ones, for the algorithm of that name; 1 where nothing was measured."""
    return model().factors.get(key(name, request), 1.0) if request.device == "cpu" else 1.0
