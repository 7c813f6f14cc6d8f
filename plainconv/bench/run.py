"""One layer through everything: first call, check against float64, timing beside torch, and what that is of the limit.

What a device does in its own way (device.py, cuda.py) is asked of it.

The sides are torch and plainconv ("auto"), each in the memory formats that torch has for the layer; they take turns in
one process on the same tensors.  A format in which a side is more than SLOW times slower than in its other one is
called a few times only, since the better of the two counts.  A layer whose result is not right has no speed.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from plainconv import measure as records
from plainconv.bench import calls
from plainconv.bench.against import Library, call_of
from plainconv.bench.calls import Call, Tensors
from plainconv.bench.check import Exact, Verdict, exact, judge
from plainconv.bench.device import Clock, Device, Host, Ready
from plainconv.bench.peaks import Peaks
from plainconv.bench.suites import Layer
from plainconv.cpu import compile
from plainconv.menu import ALGORITHMS
from plainconv.plan import Explanation
from plainconv.remember import forget
from plainconv.timing import Timing, in_turn

SLOW = 3.0  # times its other format: so slow that it does not matter how slow
TRIED, TRIED_S = 5, 0.2  # calls, and seconds, until it is known which format is slow
TURN_S = 2e-3  # how long a side goes on before it is the other's turn
AFTER_S = 0.03  # how long the machine's arithmetic is measured after each layer
SHORT_S = 25e-6  # a call that torch finishes in less is held to another threshold, and marked
OTHERS_CLAIM = 1000.0  # units of eps that another library's result may be off: it may transform and sum as it likes
BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}
FAR = 10.0  # an algorithm whose estimate is so many times the best's is not measured for the regret


@dataclass(frozen=True)
class Setting:
    """What all layers of a run have in common.

    Attributes:
        direction: one of calls.DIRECTIONS.
        dtype: of all tensors.
        threads: torch.get_num_threads() while it runs.
        peaks: the machine's, with so many threads.
        seconds: how long the sides of a layer are timed, about.
        regret: whether every able algorithm is timed as well.
        full: whether layers over 4 GFLOP stay whole.
        against: name -> another library to be timed beside.
        device: where.
    """

    direction: str
    dtype: torch.dtype
    threads: int
    peaks: Peaks
    seconds: float = 1.0
    regret: bool = False
    full: bool = False
    against: Mapping[str, Library] | None = None
    device: Device = field(default_factory=Host)


@dataclass(frozen=True)
class Regret:
    """auto's time over the best algorithm's, which that is, each one's median seconds, and why others were left out."""

    value: float
    best: str
    seconds: dict[str, float]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Row:
    """What was measured of one layer; times in seconds, memory in bytes, keys are memory formats.

    Attributes:
        layer: as measured.
        cut_from: the problem of the whole layer, if it was cut.
        direction, dtype: as asked.
        torch, ours: memory format -> timing; empty for ours if the result is wrong.
        algorithms: memory format -> the algorithm that "auto" took ("/" between the directions of "train").
        checks: memory format -> how far our result is off.
        torch_check: how far torch's contiguous result is off.
        limit_s, bound_by: the least time that the machine allows, and what asks for it.
        speed: the machine's arithmetic right after this layer, as a share of the best in the run.
        first_call_s: the first call of the process for this layer: planning and compiling included.
        scratch, torch_scratch: memory formats' best: workspace of our plan; what torch allocated beyond its result.
        regret: see Regret; None if not asked for.
        against: name -> its timing, or why there is none; "ours" is what took turns with them.
        device: its type.
        eager: "torch", "ours" -> the timing of calls from Python in the better format, where that is another one.
        packed, packed_algorithms, packed_checks: memory format -> the same of ours with a prepacked weight; empty where
            the direction is not forward (the timings too if a result is wrong).
    """

    layer: Layer
    cut_from: str | None
    direction: str
    dtype: str
    torch: dict[str, Timing]
    ours: dict[str, Timing]
    algorithms: dict[str, str]
    checks: dict[str, Verdict]
    torch_check: Verdict
    limit_s: float
    bound_by: str
    speed: float
    first_call_s: float
    scratch: int
    torch_scratch: int
    regret: Regret | None
    against: dict[str, Timing | str]
    packed: dict[str, Timing] = field(default_factory=dict)
    packed_algorithms: dict[str, str] = field(default_factory=dict)
    packed_checks: dict[str, Verdict] = field(default_factory=dict)
    device: str = "cpu"
    eager: dict[str, Timing] = field(default_factory=dict)

    def within(self, best: Peaks, then: Peaks) -> Row:
        """This row with the limit that the best peaks of the run give; `then` are those right after it."""
        times = 3 if self.direction == "train" else 1
        limit = best.limit(self.flop, self.bytes * times)
        speed = then.flops / best.flops
        return dataclasses.replace(self, limit_s=limit.seconds, bound_by=limit.bound_by, speed=speed)

    @property
    def right(self) -> bool:
        return all(check.right for checks in (self.checks, self.packed_checks) for check in checks.values())

    @property
    def torch_best(self) -> str:
        return best(self.torch)

    @property
    def our_best(self) -> str:
        return best(self.ours)

    @property
    def ratio(self) -> float | None:
        """torch's time in its best format over ours in our best; None if our result is wrong."""
        if not self.right:
            return None
        return self.torch[self.torch_best].median_s / self.ours[self.our_best].median_s

    def ratio_in(self, layout: str) -> float | None:
        """The same within one memory format; None if there is none, or if our result is wrong."""
        if not self.right or layout not in self.ours or layout not in self.torch:
            return None
        return self.torch[layout].median_s / self.ours[layout].median_s

    @property
    def packed_ratio(self) -> float | None:
        """torch's time in its best format over ours with a prepacked weight in its best; None if there is none."""
        if not self.right or not self.packed:
            return None
        return self.torch[self.torch_best].median_s / self.packed[best(self.packed)].median_s

    @property
    def eager_ratio(self) -> float | None:
        """torch's time over ours, of calls from Python; None if that was not measured."""
        return self.eager["torch"].median_s / self.eager["ours"].median_s if self.right and self.eager else None

    def ratio_to(self, library: str) -> float | None:
        """Another library's time over ours, which took turns with it; None if there is none, or if ours is wrong."""
        theirs, own = self.against.get(library), self.against.get("ours")
        if not self.right or not isinstance(theirs, Timing) or not isinstance(own, Timing):
            return None
        return theirs.median_s / own.median_s

    @property
    def flop(self) -> int:
        return self.layer.flop * (3 if self.direction == "train" else 1)

    @property
    def bytes(self) -> int:
        """Of input, weight and output."""
        shapes = (self.layer.input_shape, self.layer.problem.weight_shape, self.layer.output_shape)
        return sum(map(math.prod, shapes)) * int(getattr(torch, self.dtype).itemsize)

    @property
    def short(self) -> bool:
        """Whether torch finishes the call in under 25 us, on a CPU."""
        return self.device == "cpu" and self.torch[self.torch_best].median_s < SHORT_S

    @property
    def share(self) -> float | None:
        """The machine's least time over ours."""
        return self.limit_s / self.ours[self.our_best].median_s if self.right else None

    @property
    def most(self) -> float:
        """The ratio that would be reached at the machine's limit."""
        return self.most_in(self.torch_best)

    def most_in(self, layout: str) -> float:
        """The same of torch in one memory format; 0 if there is none."""
        return self.torch[layout].median_s / self.limit_s if layout in self.torch else 0.0


def best(timings: Mapping[str, Timing]) -> str:
    """The name with the shortest median."""
    return min(timings, key=lambda name: timings[name].median_s)


@contextmanager
def alone(threads: int, device: Device | None = None) -> Iterator[int]:
    """Measure with so many threads, no kernels but those that are compiled meanwhile, and no records of tuning."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with compile.kept_in(None), records.kept_in(None), (device or Host()).held():
            forget()
            yield threads
    finally:
        forget()
        torch.set_num_threads(before)


def _raised(layer: Layer, error: RuntimeError) -> None:
    raise error


def measure_all(
    layers: Sequence[Layer],
    setting: Setting,
    watch: Callable[[int, str], object] = lambda done, name: None,
    lost: Callable[[Layer, RuntimeError], object] = _raised,
) -> tuple[list[Row], Setting]:
    """Measure one layer after the other, and the machine after each.

    Args:
        layers: of any suites.
        setting: its peaks are those at the start.
        watch: called before each layer, and at the end, with how many are done and the name of the next.
        lost: told of a layer that cannot be measured, and why; the others are.

    Returns:
        the rows, and the setting with the best peaks of the run, within which all the rows are.
    """
    found: list[tuple[Row, Peaks]] = []
    best = setting.peaks
    for done, layer in enumerate(layers):
        watch(done, f"{layer.suite} {layer.name}")
        try:
            row = measure(layer, setting)
            then = setting.device.peaks(setting.dtype, setting.threads, setting.direction, AFTER_S)
        except RuntimeError as error:
            lost(layer, error)
            continue
        best = best.best(then)
        found.append((row, then))
    watch(len(layers), "done")
    return [row.within(best, then) for row, then in found], dataclasses.replace(setting, peaks=best)


def measure(layer: Layer, setting: Setting) -> Row:
    """Measure one layer; it takes a few times setting.seconds.

    Warns of what cannot be timed; RuntimeError, if that is all that torch has, or all that plainconv has.
    """
    whole, direction, device = layer, setting.direction, setting.device
    layer = whole if setting.full or device.whole else whole.cut()
    device.settle()
    copies = device.copies(given := calls.tensors(layer, setting.dtype, device=device.name))
    turning = {layout: [each.to(layout) for each in copies] for layout in calls.layouts(layer)}
    laid = {layout: many[0] for layout, many in turning.items()}
    torchs = {layout: [calls.torchs(layer, direction, each) for each in many] for layout, many in turning.items()}

    start = perf_counter()
    results = {calls.CONTIGUOUS: calls.ours(layer, direction, laid[calls.CONTIGUOUS])()}
    device.wait()
    first_call_s = perf_counter() - start
    ours = {layout: [calls.ours(layer, direction, each) for each in many] for layout, many in turning.items()}
    results |= {layout: call() for layout, (call, *_) in ours.items() if layout not in results}
    told = {layout: _explained(layer, direction, tensors) for layout, tensors in laid.items()}
    expected = _expected(layer, direction, given)
    checks = {layout: _judged(result, expected, told[layout]) for layout, result in results.items()}
    torch_check = _judged(torchs[calls.CONTIGUOUS][0](), expected, told[calls.CONTIGUOUS])
    packed = {
        layout: [calls.prepacked(layer, each) for each in many]
        for layout, many in turning.items()
        if direction == "forward"
    }
    packed_checks = {
        layout: judge(fast(laid[layout].x), expected[0], BY_NAME[fast.algorithm].error(fast.request))
        for layout, (fast, *_) in packed.items()
    }
    del results

    right = all(check.right for check in (*checks.values(), *packed_checks.values()))
    quick = {layout: list(map(_packed_call, many, turning[layout])) for layout, many in packed.items()}
    sides = {"torch": torchs, **({"ours": ours} if right else {}), **({"packed": quick} if right and quick else {})}
    timings, failed = _timed(sides, setting.seconds, device.clock)
    for key, sentence in failed.items():
        warnings.warn(f"{' '.join(key)} of {layer.name} is not timed: {sentence}", stacklevel=2)
    for side in ("torch", "ours"):
        if side in sides and not timings[side]:
            raise RuntimeError(f"{side} cannot be timed: {failed[side, calls.CONTIGUOUS]}")
    at_best = best(timings["ours"]) if right else calls.CONTIGUOUS
    eager: dict[str, dict[str, Timing]] = {}
    if right and device.eager:
        both = {"torch": {"": torchs[best(timings["torch"])]}, "ours": {"": ours[at_best]}}
        eager, _ = _timed(both, setting.seconds, device.eager)
    others = {
        name: call_of(library, layer, laid[calls.CONTIGUOUS], direction, setting.threads)
        for name, library in (setting.against or {}).items()
    }
    row = Row(
        layer=layer,
        cut_from=None if layer is whole else str(whole.problem),
        direction=direction,
        dtype=str(setting.dtype).removeprefix("torch."),
        torch=timings["torch"],
        ours=timings.get("ours", {}),
        algorithms={layout: "/".join(each.chosen for each in many) for layout, many in told.items()},
        checks=checks,
        torch_check=torch_check,
        limit_s=0.0,
        bound_by="",
        speed=1.0,
        first_call_s=first_call_s,
        scratch=max(_chosen(each).cost.workspace for each in told[at_best]),
        torch_scratch=device.scratch(torchs[best(timings["torch"])][0]),
        regret=_regret(layer, setting, turning[at_best], told[at_best], expected) if setting.regret and right else None,
        against=_others(others, expected, ours[at_best][0], setting.seconds) if right else {},
        packed=timings.get("packed", {}),
        packed_algorithms={layout: fast.algorithm for layout, (fast, *_) in packed.items()},
        packed_checks=packed_checks,
        device=torch.device(device.name).type,
        eager={side: of[""] for side, of in eager.items()} if all(eager.values()) else {},
    )
    return row.within(setting.peaks, setting.peaks)


def _packed_call(fast: Callable[[torch.Tensor], torch.Tensor], given: Tensors) -> Call:
    return lambda: (fast(given.x),)


def _timed(
    sides: Mapping[str, Mapping[str, Sequence[Call]]], seconds: float, clock: Clock
) -> tuple[dict[str, dict[str, Timing]], dict[tuple[str, str], str]]:
    """Side -> memory format -> timing of a call, given once for each copy of its tensors. All were called before.

    And why others cannot be timed: no graph captures them, or there is not enough memory.
    """
    ready, failed = _made_ready(sides, clock)
    once = {key: _once(one.run, clock) / one.calls for key, one in ready.items()}
    least = {side: min(spent for (of, _), spent in once.items() if of == side) for side, _ in ready}
    few = [key for key, spent in once.items() if spent > SLOW * least[key[0]]]
    a_round = sum(once[key] * one.calls for key, one in ready.items() if key not in few)

    def timed(keys: Iterable[tuple[str, str]], **how: Any) -> dict[str, Timing]:
        return in_turn({" ".join(key): ready[key].run for key in keys}, clock=clock.seconds, **how)

    timings = timed(few, seconds=0, least=2)
    timings |= timed(
        (key for key in ready if key not in few), seconds=seconds, least=5 if a_round < seconds else 2, turn_s=TURN_S
    )
    found: dict[str, dict[str, Timing]] = {side: {} for side in sides}
    for (side, layout), one in ready.items():
        found[side][layout] = timings[f"{side} {layout}"].each(one.calls)
    return found, failed


def _made_ready(
    sides: Mapping[str, Mapping[str, Sequence[Call]]], clock: Clock
) -> tuple[dict[tuple[str, str], Ready], dict[tuple[str, str], str]]:
    """What is timed, and why others are not, by side and memory format."""
    ready: dict[tuple[str, str], Ready] = {}
    failed: dict[tuple[str, str], str] = {}
    for side, group in sides.items():
        for layout, given in group.items():
            try:
                ready[side, layout] = clock.ready(given)
            except RuntimeError as error:
                failed[side, layout] = _sentence(error)
    return ready, failed


def _sentence(error: RuntimeError) -> str:
    """Its first line."""
    return str(error).partition("\n")[0]


def _once(run: Callable[[], object], clock: Clock) -> float:
    """Seconds of what is timed: the least of a few, for the first may find other pages of memory and other caches."""
    spent: list[float] = []
    while len(spent) < TRIED and sum(spent) < TRIED_S:
        spent.append(clock.seconds(run))
    return min(spent)


# -- right or wrong --------------------------------------------------------------------------------------------------


def _explained(layer: Layer, direction: str, given: Tensors) -> list[Explanation]:
    return [calls.explain(layer, each, given) for each in calls.directions(direction)]


def _expected(layer: Layer, direction: str, given: Tensors) -> list[Exact]:
    """Points of every tensor that the direction makes."""
    roles = dict(zip("ywx" if layer.transposed else "xwy", given, strict=True))
    found = []
    for each in calls.directions(direction):
        inner = layer.direction(each)
        first, second = (roles[role] for role in inner.given)
        found.append(exact(layer.problem, inner, first, second))
    return found


def _judged(result: Sequence[torch.Tensor], expected: Sequence[Exact], told: Sequence[Explanation]) -> Verdict:
    """The worst verdict of the tensors made."""
    verdicts = [
        judge(tensor, points, _chosen(each).algorithm.error(each.request))
        for tensor, points, each in zip(result, expected, told, strict=True)
    ]
    return min(verdicts, key=lambda verdict: (verdict.right, -verdict.units / verdict.allowed))


def _chosen(told: Explanation) -> Any:
    return next(verdict for verdict in told.verdicts if verdict.algorithm.name == told.chosen)


# -- regret ----------------------------------------------------------------------------------------------------------


def _regret(
    layer: Layer, setting: Setting, copies: Sequence[Tensors], told: Sequence[Explanation], expected: Sequence[Exact]
) -> Regret | None:
    """What might be chosen, beside "auto", in the memory format given; None for "train", which is three choices."""
    if setting.direction == "train":
        return None
    (explanation,) = told
    least = _chosen(explanation).cost.seconds

    def named(name: str) -> list[Call]:
        return [calls.ours(layer, setting.direction, given, name) for given in copies]

    timed = {"auto": named("auto")}
    left_out: dict[str, str] = {}
    for verdict in explanation.verdicts:
        name = verdict.algorithm.name
        if verdict.cost is None or not verdict.may_be_chosen:
            continue
        if verdict.cost.seconds > FAR * least:
            left_out[name] = f"its estimate is {verdict.cost.seconds / least:.0f} times the best"
            continue
        try:
            each = named(name)
            made = each[0]()[0]
        except RuntimeError as error:  # it makes this gradient, but not the result whose gradient it is; or no memory
            left_out[name] = _sentence(error)
            continue
        if not judge(made, expected[0], verdict.algorithm.error(explanation.request)).right:
            left_out[name] = "its result is wrong"
        elif name != explanation.chosen:
            timed[name] = each
    found, failed = _timed({"regret": timed}, setting.seconds, setting.device.clock)
    timings = found["regret"]
    if "auto" not in timings:
        return None
    left_out |= {name: sentence for (_, name), sentence in failed.items()}
    seconds = {explanation.chosen if name == "auto" else name: t.median_s for name, t in timings.items()}
    fastest = min(seconds, key=lambda name: seconds[name])
    return Regret(seconds[explanation.chosen] / seconds[fastest], fastest, seconds, left_out)


# -- other libraries -------------------------------------------------------------------------------------------------


def _others(
    made: Mapping[str, Call | str], expected: Sequence[Exact], our_call: Call, seconds: float
) -> dict[str, Timing | str]:
    """Timings of what other libraries make of the layer, each in turn with ours, or a sentence."""
    found: dict[str, Timing | str] = {name: call for name, call in made.items() if isinstance(call, str)}
    able = {name: call for name, call in made.items() if not isinstance(call, str)}
    for name, call in able.items():
        if not judge(call()[0], expected[0], OTHERS_CLAIM).right:
            found[name] = "its result is wrong"
    timed = {name: call for name, call in able.items() if name not in found}
    return {**found, **in_turn({"ours": our_call, **timed}, seconds=seconds, turn_s=TURN_S)} if timed else found
