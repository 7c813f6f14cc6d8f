"""How long the algorithms take on this machine: measured when someone asks for it, and remembered on disk.

A record is one measurement of one algorithm on one request.  It holds for the versions it was made with: the
algorithm's, plainconv's, torch's, and the processor with its features.  The records of a request are one file of a
private folder in the user's cache (plainconv/cpu/store.py), next to the compiled kernels.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import astuple
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plainconv.cpu import compile as cpu
from plainconv.cpu.store import Store, user_store
from plainconv.menu.base import Tensors
from plainconv.problem import DEFAULT_PRECISION, FORMATS, Request
from plainconv.timing import Timing, in_turn, on_device, processor, wall
from plainconv.version import __version__

SECONDS = 0.3  # for the algorithms of one request that are near the best
TURN_S = 2e-3  # how long an algorithm goes on before it is the next one's turn
NEAR = 2.0  # times the best
HOPELESS = 20.0  # an algorithm whose estimate is so many times the best time so far is not run, ...
HOPELESS_S = 0.05  # ... if it is estimated at so many seconds or more
MAX_HELD = 4096  # requests whose records are kept in memory, where the disk cannot keep them
_MAGIC = b"plainconv records 1\n"


class Record(NamedTuple):
    """One measurement: the algorithm's version, and its time; None if its estimate was too far behind to try."""

    version: int
    timing: Timing | None


class Candidate(NamedTuple):
    """What is measured: the seconds it is expected to take, and what makes the call that fills a result."""

    estimate_s: float
    bind: Callable[[Tensors], Callable[[Tensors, Tensor], None]]


# -- measuring -------------------------------------------------------------------------------------------------------

_one_at_a_time = threading.Lock()


@torch.no_grad()
def measure(request: Request, candidates: Mapping[str, Candidate]) -> dict[str, Timing | None]:
    """Time each candidate on tensors of its own making, in turn; None for those too slow to try.

    All are run a few times, those near the best again for SECONDS in all.  On a GPU it is the device that is timed:
    what comes between launches is alike for all, and in a graph or behind other work nothing does.
    """
    on_gpu = request.device == "cuda"
    # Its clock makes so many calls that the caches are warm.
    clock, turn_s = (on_device, 0.0) if on_gpu else (wall, TURN_S)
    # Looked up at every call: a child of a fork gets another one.
    with _one_at_a_time, torch.cuda.device(request.place) if on_gpu else nullcontext():
        tensors, out = _tensors(request)

        def bound(name: str) -> Callable[[], None]:
            call = candidates[name].bind(tensors)
            return lambda: call(tensors, out)

        found: dict[str, Timing | None] = {}
        best = float("inf")
        for name in sorted(candidates, key=lambda name: candidates[name].estimate_s):
            estimate = candidates[name].estimate_s
            if estimate > HOPELESS * best and estimate > HOPELESS_S:
                found[name] = None
                continue
            seen = in_turn({name: bound(name)}, seconds=0, least=2, clock=clock)[name]
            found[name], best = seen, min(best, seen.median_s)
        near = {name: bound(name) for name, seen in found.items() if seen and seen.median_s <= NEAR * best}
        return {**found, **in_turn(near, seconds=SECONDS, least=3, turn_s=turn_s, clock=clock)}


def _tensors(request: Request) -> tuple[Tensors, Tensor]:
    """Tensors for a request, and one for its result; the user's random numbers are left alone."""
    problem, direction = request.problem, request.direction
    generator = torch.Generator(request.place).manual_seed(0)

    def filled(shape: tuple[int, ...]) -> Tensor:
        made = empty(shape)
        if request.dtype.is_floating_point or request.dtype.is_complex:
            parts = torch.view_as_real(made) if request.dtype.is_complex else made
            parts.normal_(generator=generator)
        else:
            made.random_(0, 100, generator=generator)
        return made

    def empty(shape: tuple[int, ...]) -> Tensor:
        last = request.channels_last and len(shape) in FORMATS
        memory_format = FORMATS[len(shape)] if last else torch.contiguous_format
        return torch.empty(shape, dtype=request.dtype, device=request.place, memory_format=memory_format)

    made = problem.shape_of(direction.makes)
    first, second = (filled(problem.shape_of(role)) for role in direction.given)
    bias = filled(request.bias_shape) if request.has_bias else None
    return Tensors(first, second, bias, filled(made) if request.has_residual else None), empty(made)


def _after_fork_in_child() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.Lock()  # the thread that measured is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# -- records ---------------------------------------------------------------------------------------------------------


def known(request: Request) -> dict[str, Record]:
    """The records of a request, by algorithm."""
    name = _name(request)
    if name in _state.held:
        return _state.held[name]
    data = _state.store.read(name)
    if data is None:
        return {}
    try:
        return {algorithm: _record(*fields) for algorithm, fields in json.loads(data)["records"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        _state.store.reject(name, "holds no records")
        return {}


def keep(request: Request, records: Mapping[str, Record]) -> None:
    """Remember records of a request, beside those of other algorithms."""
    name, together = _name(request), {**known(request), **records}
    plain = {algorithm: (version, timing and astuple(timing)) for algorithm, (version, timing) in together.items()}
    if not _state.store.write(name, json.dumps({"request": _told(request), "records": plain}).encode()):
        if len(_state.held) >= MAX_HELD:
            _state.held.clear()
        _state.held[name] = together


def notes() -> tuple[str, ...]:
    """What of the records on disk was ignored or could not be kept, and why; one sentence each."""
    return _state.store.notes()


def _record(version: int, timing: list[Any] | None) -> Record:
    median_s, low_s, high_s, calls = timing or (0.0, 0.0, 0.0, 0)
    numbers = float(median_s), float(low_s), float(high_s)
    return Record(int(version), Timing(*numbers, int(calls)) if timing else None)


def _told(request: Request) -> dict[str, Any]:
    """All that a record depends on, but for the algorithm and its version."""
    return {
        "problem": str(request.problem),
        "direction": request.direction.value,
        "dtype": str(request.dtype),
        "device": _device(request.device, request.gpu if torch.cuda.is_available() else None),
        "channels_last": request.channels_last,
        "has_bias": request.has_bias,
        "has_residual": request.has_residual,
        "activation": request.activation,
        "threads": request.threads,
        "max_workspace": request.max_workspace,
        "plainconv": __version__,
        "torch": torch.__version__,
        **({"packed": True} if request.packed else {}),
        **({"tf32": True} if request.tf32 else {}),
        **({} if request.precision == DEFAULT_PRECISION else {"precision": request.precision}),
    }


def _name(request: Request) -> str:
    return hashlib.sha256(json.dumps(_told(request), sort_keys=True).encode()).hexdigest()


@functools.cache
def _device(device: str, gpu: int | None) -> str:
    """What does the work: the processor and its features, or that GPU, if there is one, and the Triton that compiles
    for it."""
    if device != "cpu":
        name = "" if gpu is None else torch.cuda.get_device_name(gpu)
        compilers = [each.version for each in distributions(name="triton")]
        return " ".join([device, name, *compilers])
    features = torch.backends.cpu.get_cpu_capability() if cpu.why_not() else cpu.Target.host().features
    return f"{processor()} {features}"


class _State:
    """Where records are kept: on disk, in a folder that is looked for on first use, else in memory."""

    def __init__(self, find: Callable[[], Store]) -> None:
        self._find = find
        self.held: dict[str, dict[str, Record]] = {}

    @functools.cached_property
    def store(self) -> Store:
        return self._find()


_state = _State(lambda: user_store("records", _MAGIC, "measurements"))


@contextmanager
def kept_in(folder: Path | None) -> Iterator[None]:
    """Keep records in another folder; for tests. It holds for the whole process. None: nothing is kept on disk."""
    global _state
    before, store = _state, Store(folder, _MAGIC)
    _state = _State(lambda: store)
    try:
        yield
    finally:
        _state = before
