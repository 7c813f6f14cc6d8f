"""Which algorithm serves a request, and why.

`plan(request)` asks every algorithm on the menu, ranks those that are able by their estimates, and remembers the
answer: a `Plan` is made once and called often.  A choice depends on the request alone, never on values.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from plainconv.menu import ALGORITHMS
from plainconv.menu.base import DTYPES, Algorithm, Cost, Tensors, finish, finish_seconds
from plainconv.problem import Request
from plainconv.settings import AUTO

SLOW_REFERENCE = 1e8  # multiplies from which the reference warns


class AlgorithmRefused(RuntimeError):
    """The algorithm that was asked for by name cannot serve this call; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """What one algorithm says of a request: its cost, or the sentence why it cannot."""

    algorithm: Algorithm
    cost: Cost | None
    why_not: str | None


@dataclass(frozen=True)
class Plan:
    """An algorithm chosen for a request; call it with the tensors and the result to fill."""

    request: Request
    algorithm: Algorithm
    cost: Cost

    def __call__(self, tensors: Tensors, out: Tensor) -> None:
        workspace = torch.empty(self.cost.workspace, dtype=torch.uint8, device=out.device)
        self.algorithm.run(self.request, tensors, out, workspace)
        if not self.algorithm.fuses:
            finish(self.request, tensors, out)


@dataclass(frozen=True)
class Explanation:
    """The verdict of every algorithm on one request, and which was chosen; prints as a table."""

    request: Request
    verdicts: tuple[Verdict, ...]
    chosen: str

    def __str__(self) -> str:
        rows = [("algorithm", "estimate", "workspace", "")]
        for verdict in self.verdicts:
            note = "<- chosen" if verdict.algorithm.name == self.chosen else ""
            if verdict.cost is None:
                rows.append((verdict.algorithm.name, "-", "-", verdict.why_not or ""))
            else:
                rows.append(
                    (verdict.algorithm.name, _seconds(verdict.cost.seconds), _bytes(verdict.cost.workspace), note)
                )
        lines = [
            f"{name:<10}  {estimate:>9}  {workspace:>9}  {note}".rstrip() for name, estimate, workspace, note in rows
        ]
        return "\n".join([str(self.request), *lines])

    __repr__ = __str__


def algorithms() -> tuple[str, ...]:
    """The names that `algorithm=` takes besides "auto", in the order of the menu."""
    return tuple(algorithm.name for algorithm in ALGORITHMS)


def check_algorithm(name: str) -> None:
    """Raise ValueError, naming those that exist, if there is no algorithm of this name."""
    if name != AUTO and name not in algorithms():
        known = ", ".join((AUTO, *algorithms()))
        raise ValueError(f"algorithm={name!r} does not exist; choose one of {known}")


def ask(request: Request) -> tuple[Verdict, ...]:
    """Every algorithm's verdict, in the order of the menu."""
    return tuple(_verdict(algorithm, request) for algorithm in ALGORITHMS)


@lru_cache(4096)
def plan(request: Request, name: str = AUTO) -> Plan:
    """The plan for a request: the ablest by estimate, or the algorithm that is named.

    Raises AlgorithmRefused if the named one cannot serve the request, ValueError if there is none of that name.
    """
    verdict = _choice(request, name)
    if verdict.cost is None:
        raise AlgorithmRefused(f"algorithm={name!r} refuses {request}: {verdict.why_not}")
    if name == AUTO:
        _warn_if_slow(verdict)
    return Plan(request, verdict.algorithm, verdict.cost)


def explain_request(request: Request, name: str = AUTO) -> Explanation:
    """The verdicts on a request, and which algorithm `name` leads to (none, if the one named refuses)."""
    choice = _choice(request, name)
    return Explanation(request, ask(request), choice.algorithm.name if choice.cost else "")


def _choice(request: Request, name: str) -> Verdict:
    check_algorithm(name)
    if name != AUTO:
        return _verdict(next(a for a in ALGORITHMS if a.name == name), request)
    return min((v for v in ask(request) if v.cost), key=lambda v: v.cost.seconds if v.cost else 0.0)


def _verdict(algorithm: Algorithm, request: Request) -> Verdict:
    if request.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise NotImplementedError(f"plainconv is not implemented for {request.dtype}; it knows {known}")
    if sentence := algorithm.why_not(request):
        return Verdict(algorithm, None, sentence)
    cost = algorithm.cost(request)
    if not algorithm.fuses:
        cost = cost._replace(seconds=cost.seconds + finish_seconds(request))
    if cost.workspace > request.max_workspace:
        sentence = f"it needs {_bytes(cost.workspace)} of workspace, and {_bytes(request.max_workspace)} are allowed"
        return Verdict(algorithm, None, sentence)
    return Verdict(algorithm, cost, None)


def _warn_if_slow(verdict: Verdict) -> None:
    if verdict.algorithm is ALGORITHMS[-1] and verdict.cost and verdict.cost.multiplies > SLOW_REFERENCE:
        warnings.warn(
            "no fast algorithm serves this call, and the reference has "
            f"{verdict.cost.multiplies:.1e} multiplies to do; plainconv.explain(...) says why",
            stacklevel=2,
        )


def _seconds(value: float) -> str:
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if value < 1000 * scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def _bytes(value: int) -> str:
    for unit, scale in (("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20)):
        if value < 1000 * scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / (1 << 30):.3g} GiB"
