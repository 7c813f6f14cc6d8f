"""Which algorithm serves a request, and why.

`plan(request)` asks every algorithm on the menu, ranks those that are able by what was measured on this machine, or by
their estimates where nothing was, and remembers the answer: a `Plan` is made once and called often.  A choice depends
on the request and the records alone, never on values.  Nothing is measured unless someone asks for it: `tune` and
`tuning`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from plainconv import measure
from plainconv.cpu import compile as cpu
from plainconv.measure import Candidate, Record
from plainconv.memory import lent
from plainconv.menu import ALGORITHMS, fitted
from plainconv.menu.base import (
    DTYPES,
    Algorithm,
    AlgorithmRefused,
    Bound,
    Cost,
    Made,
    Tensors,
    finish,
    finish_seconds,
    sum_error,
)
from plainconv.problem import Direction, Request
from plainconv.remember import forget, on_forget
from plainconv.settings import AUTO
from plainconv.timing import Timing, duration

SLOW_REFERENCE = 1e8  # multiplies from which the reference warns
SHORT_S = 25e-6  # an estimate below which one thread may be as quick as several


@dataclass(frozen=True)
class Verdict:
    """What one algorithm says of a request: its cost, or the sentence why it cannot; and its time, if that is known.

    threads: 1 where waking others takes longer than the work.
    by_name: whether it is taken only where it is named.
    """

    algorithm: Algorithm
    cost: Cost | None
    why_not: str | None
    timing: Timing | None = None
    threads: int = 1
    by_name: bool = False

    @property
    def may_be_chosen(self) -> bool:
        """Whether it is able, and need not be named."""
        return self.cost is not None and not self.by_name

    @property
    def seconds(self) -> float:
        """What a call will take, as far as is known."""
        if self.timing:
            return self.timing.median_s
        return self.cost.seconds if self.cost else float("inf")


LENT_SCRATCH = 2 << 20  # bytes of scratch memory from which it is lent to each call
_kept = threading.local()  # less stays with the thread, from call to call


def _take(size: int) -> Tensor:
    """The scratch memory that this thread keeps, if it is large enough, else new; while it is used, nobody keeps it."""
    workspace: Tensor | None = getattr(_kept, "workspace", None)
    if workspace is None or workspace.numel() < size:
        return torch.empty(size, dtype=torch.uint8)
    _kept.workspace = None
    return workspace


@dataclass(frozen=True)
class Plan:
    """An algorithm chosen for a request; call it with the tensors and the result to fill, or bind it once for many."""

    request: Request
    algorithm: Algorithm
    cost: Cost

    def __call__(self, tensors: Tensors, out: Tensor) -> None:
        self.bind(tensors)(tensors, out)

    def bind(self, tensors: Tensors) -> Callable[[Tensors, Tensor], None]:
        """The call, for tensors that have the strides of these; nothing is looked up in it twice."""
        return self.pack(tensors, {})

    def pack(self, tensors: Tensors, made: Made) -> Callable[[Tensors, Tensor], None]:
        """The same; of a packed request, what is made of the weight is looked for here, and kept here."""
        request, algorithm, size = self.request, self.algorithm, self.cost.workspace
        run: Bound = partial(algorithm.run, request)
        if request.packed and algorithm.pack:
            run = algorithm.pack(request, tensors, made)
        elif algorithm.bind:
            run = algorithm.bind(request, tensors)
        device = tensors.first.device
        kept = size < LENT_SCRATCH and device.type == "cpu"
        large = size >= LENT_SCRATCH and device.type == "cpu"
        unfinished = not algorithm.fuses and finish_seconds(request) > 0

        if not size and not unfinished:
            nothing = torch.empty(0, dtype=torch.uint8, device=device)
            return lambda tensors, out: run(tensors, out, nothing)

        def call(tensors: Tensors, out: Tensor) -> None:
            if large:
                workspace = lent((size,), (1,), torch.uint8)
            else:
                workspace = _take(size) if kept else torch.empty(size, dtype=torch.uint8, device=device)
            run(tensors, out, workspace)
            if kept:
                _kept.workspace = workspace
            if unfinished:
                finish(request, tensors, out)

        return call


@dataclass(frozen=True)
class Explanation:
    """The verdict of every algorithm on one request, and which was chosen; prints as a table.

    notes: what is the matter with the compiled kernels and the measurements on disk, one sentence each.
    packed: the verdicts of those that make something of the weight, if `prepack` has made it before, and
    chosen_packed: which it would choose (by sizes; values may allow `separable`); not of gradients for a weight.
    """

    request: Request
    verdicts: tuple[Verdict, ...]
    chosen: str
    notes: tuple[str, ...] = ()
    packed: tuple[Verdict, ...] = ()
    chosen_packed: str = ""

    def __str__(self) -> str:
        packed = {verdict.algorithm.name: duration(verdict.seconds) for verdict in self.packed if verdict.cost}
        rows = [("algorithm", "estimate", "measured", "prepacked", "workspace", "")]
        for verdict in self.verdicts:
            name, cost = verdict.algorithm.name, verdict.cost
            if cost is None:
                rows.append((name, "-", "-", "-", "-", verdict.why_not or ""))
                continue
            measured = duration(verdict.timing.median_s) if verdict.timing else "-"
            note = "<- chosen" if name == self.chosen else ""
            if name == self.chosen_packed != self.chosen:
                note = "<- chosen by prepack"
            rows.append((name, duration(cost.seconds), measured, packed.get(name, "-"), _bytes(cost.workspace), note))
        lines = [f"{row[0]:<10}" + "".join(f"  {cell:>9}" for cell in row[1:5]) + f"  {row[5]}" for row in rows]
        lines = [line.rstrip() for line in lines]
        return "\n".join([str(self.request), *lines, *(f"note: {note}" for note in self.notes)])

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
    records = measure.known(request)
    if request.packed:  # what a plain call took, a packed one does not exceed
        records = {**measure.known(replace(request, packed=False)), **records}
    return tuple(_verdict(algorithm, request, records) for algorithm in ALGORITHMS)


@lru_cache(4096)
def plan(request: Request, name: str = AUTO) -> Plan:
    """The plan for a request: the quickest by measurement or estimate, or the algorithm that is named.

    Raises AlgorithmRefused if the named one cannot serve the request, ValueError if there is none of that name.
    """
    if (report := _tuning) is not None and name == AUTO and request.problem.multiplies:
        report.tuned.append(_tune(request))
    verdict = _choice(request, name)
    if verdict.cost is None:
        raise AlgorithmRefused(f"algorithm={name!r} refuses {request}: {verdict.why_not}")
    if name == AUTO:
        _warn_if_slow(verdict)
    return Plan(replace(request, threads=verdict.threads), verdict.algorithm, verdict.cost)


on_forget(plan.cache_clear)


def explain_request(request: Request, name: str = AUTO) -> Explanation:
    """The verdicts on a request, and which algorithm `name` leads to (none, if the one named refuses)."""
    choice = _choice(request, name)
    notes = cpu.notes() + measure.notes()
    told = Explanation(request, ask(request), choice.algorithm.name if choice.cost else "", notes)
    if request.direction is Direction.GRAD_WEIGHT:
        return told
    stays = replace(request, packed=True)
    packed = tuple(verdict for verdict in ask(stays) if verdict.algorithm.pack)
    choice = _choice(stays, name)
    return replace(told, packed=packed, chosen_packed=choice.algorithm.name if choice.cost else "")


# -- tuning ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """What tuning found for one request: the algorithm by estimate, the one taken now, and the verdicts with times."""

    request: Request
    estimated: str
    chosen: str
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        timings = {verdict.algorithm.name: verdict.timing for verdict in self.verdicts if verdict.timing}
        told = f"{self.request}: {self.chosen} {duration(timings[self.chosen].median_s)}"
        if self.estimated == self.chosen:
            return told
        other = timings.get(self.estimated)
        return f"{told}, not {self.estimated}" + (f" {duration(other.median_s)}" if other else "")


@dataclass(frozen=True)
class Tuning:
    """What was met while tuning, in order; prints as one line for each request."""

    tuned: list[Tuned] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(map(str, self.tuned)) or "no convolution with algorithm='auto' was met"

    __repr__ = __str__


_tuning: Tuning | None = None


@contextmanager
def tuning() -> Iterator[Tuning]:
    """Measure, for every kind of call met in this block, the algorithms that can serve it, and take the quickest.

        with plainconv.tuning() as report:
            model(images).sum().backward()
        print(report)

    Each request (sizes, direction, type, memory format, threads, settings) is measured once, in the forward and in the
    backward pass, and remembered in the user's cache: later calls, of other processes too, go by it.  A request that
    was measured before is not measured again, nor is a call that names its algorithm.  Measuring takes about half a
    second a request, on tensors of its own, and only the algorithms take part that `max_workspace`, `allow_builtin`
    and `precision` let in.  It holds for all threads of the process.  Yields a report that grows, and prints as a line
    a request.
    """
    global _tuning
    forget()  # so that every call asks for its plan again
    before, _tuning = _tuning, Tuning()
    try:
        yield _tuning
    finally:
        _tuning = before


def tune(function: Callable[..., Any], *inputs: Any, **named: Any) -> Tuning:
    """Call a module or function once under `tuning`, and return what was found; the report prints.

    The call has its usual effects (a layer in training mode updates its statistics); gradients are tuned where it
    computes them: give it a function that does a whole training step.
    """
    with tuning() as report:
        function(*inputs, **named)
    return report


def _tune(request: Request) -> Tuned:
    """Measure the algorithms that can serve a request, unless all have records already, and keep the records."""
    able = [verdict for verdict in ask(request) if verdict.may_be_chosen]
    estimated = min(able, key=lambda verdict: verdict.cost.seconds if verdict.cost else 0.0)
    records = measure.known(request)
    versions = {verdict.algorithm.name: verdict.algorithm.version for verdict in able}
    if any(name not in records or records[name].version != version for name, version in versions.items()):
        candidates = {
            verdict.algorithm.name: Candidate(
                verdict.cost.seconds,
                Plan(replace(request, threads=verdict.threads), verdict.algorithm, verdict.cost).bind,
            )
            for verdict in able
            if verdict.cost
        }
        timings = measure.measure(request, candidates)
        measure.keep(request, {name: Record(versions[name], timing) for name, timing in timings.items()})
    return Tuned(request, estimated.algorithm.name, _choice(request, AUTO).algorithm.name, ask(request))


# -- verdicts --------------------------------------------------------------------------------------------------------


def _choice(request: Request, name: str) -> Verdict:
    check_algorithm(name)
    if name != AUTO:
        return _verdict(next(a for a in ALGORITHMS if a.name == name), request, {})
    return min((v for v in ask(request) if v.may_be_chosen), key=lambda v: v.seconds)


def _verdict(algorithm: Algorithm, request: Request, records: Mapping[str, Record]) -> Verdict:
    if request.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise NotImplementedError(f"plainconv is not implemented for {request.dtype}; it knows {known}")
    if sentence := algorithm.why_not(request):
        return Verdict(algorithm, None, sentence)
    if request.precision == "highest" and (ratio := algorithm.error(request) / sum_error(request)) > 1:
        sentence = f"its error may be {ratio:.3g} times that of a plain sum, and precision='highest' allows no more"
        return Verdict(algorithm, None, sentence)
    cost, threads = algorithm.cost(request), request.threads
    if threads > 1 and cost.seconds < SHORT_S:
        alone = algorithm.cost(replace(request, threads=1))
        if alone.seconds < cost.seconds:
            cost, threads = alone, 1
    behind = 0.0 if algorithm.fuses else finish_seconds(request)
    cost = cost._replace(seconds=cost.seconds * fitted.factor(algorithm.name, request) + behind)
    if cost.workspace > request.max_workspace:
        sentence = f"it needs {_bytes(cost.workspace)} of workspace, and {_bytes(request.max_workspace)} are allowed"
        return Verdict(algorithm, None, sentence)
    record = records.get(algorithm.name)
    timing = record.timing if record and record.version == algorithm.version else None
    by_name = algorithm.by_name or (algorithm.on_host and request.device != "cpu")
    return Verdict(algorithm, cost, None, timing, threads, by_name)


def _warn_if_slow(verdict: Verdict) -> None:
    if verdict.algorithm is ALGORITHMS[-1] and verdict.cost and verdict.cost.multiplies > SLOW_REFERENCE:
        warnings.warn(
            "no fast algorithm serves this call, and the reference has "
            f"{verdict.cost.multiplies:.1e} multiplies to do; plainconv.explain(...) says why",
            stacklevel=2,
        )


def _bytes(value: int) -> str:
    for unit, scale in (("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20)):
        if value < 1000 * scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / (1 << 30):.3g} GiB"
