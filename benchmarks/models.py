"""Whole models beside torch, torch.compile, ONNX Runtime and OpenVINO: results/models.json and results/models.md.

    pip install -e ".[all,models]"
    make models                                       or: python benchmarks/models.py
    python benchmarks/models.py resnet50-8 regnet     some of them; the others' records stay
    python benchmarks/models.py --write               only write the page of the records that are there

All sides compute the same model with the same numbers, in one process, in turn, with the same number of threads.  What
cannot be had (a package that is not installed, a model without a graph) is said in words.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # the files beside this one, wherever it is started
import models_page
import sides
from networks import NETWORKS, Network
from parts import Calls, Watch
from sides import CONTIGUOUS, LAST, Absent, Given

from plainconv.timing import Timing, in_turn, keep_freed_memory, machine

RESULTS = Path(__file__).parent.parent / "results"
TURN_S = 0.15  # how long a side goes on: the threads of the one before are asleep by then
ROUNDS = 3  # at the least
PACKAGES = ("transformers", "onnxruntime", "openvino")

Record = dict[str, Any]


def measured(network: Network, batch: int, seconds: float) -> Record:
    """All that the page says of a model; `seconds` is for each of inference, training and the parts of both.

    Training is looked at in the first of the batches alone.
    """
    model, x = network.module(), network.input(batch)
    keep_freed_memory()
    with sides.given(model, x) as given:
        with torch.inference_mode():
            inference = _inference(given, seconds)
        training = {}
        if batch == network.batches[0]:
            training = {"training": _training(given, seconds), "gradients": _gradient_errors(given)}
        return {
            "input": list(x.shape),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **inference,
            **training,
            "threads": torch.get_num_threads(),
            "machine": machine(),
            "packages": {package: version(package) for package in PACKAGES if find_spec(package)},
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
        }


# -- inference -------------------------------------------------------------------------------------------------------


def _inference(given: Given, seconds: float) -> Record:
    layouts = [CONTIGUOUS, LAST] if given.x.dim() > 3 else [CONTIGUOUS]
    swapped = {layout: sides.swapped(given, layout) for layout in layouts}
    optimized = sides.optimized(given)
    made: dict[str, Callable[[], Callable[[], Any]]] = {
        "torch": lambda: sides.of_torch(given, CONTIGUOUS),
        "torch channels_last": lambda: sides.of_torch(given, LAST),
        "torch.compile": lambda: sides.of_compile(given),
        "onnxruntime": lambda: sides.of_onnxruntime(given),
        "openvino": lambda: sides.of_openvino(given),
        **{_side("swap", layout): lambda of=of: lambda: of[0](of[1]) for layout, of in swapped.items()},
        "optimize": lambda: lambda: optimized(given.x),
    }
    calls: dict[str, Callable[[], Any]] = {}
    absent: dict[str, str] = {}
    for name, make in made.items():
        try:
            calls[name] = make()
        except Absent as why:
            absent[name] = str(why)
    exact = copy.deepcopy(given.model).double()(given.x.double())
    errors = {name: _distance(call(), exact) for name, call in calls.items()}
    timings = in_turn(calls, seconds=seconds, turn_s=TURN_S, least=ROUNDS)
    best = _best(timings, layouts)
    parts = _parts(calls[best["torch"]], calls[best["swap"]], optimized, given.x, seconds)
    return {
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "absent": absent,
        "best": best,
        "parts": parts,
        "errors": errors,
        "optimized": {
            "calls": len(optimized.report.fused),
            "kept": dict(optimized.report.kept),
            "channels_last": optimized.report.channels_last,
            "plain": optimized.report.plain,
        },
    }


def _parts(torchs: Callable[[], Any], swapped: Callable[[], Any], optimized: Any, x: Tensor, seconds: float) -> Record:
    """What swap replaces, and what optimize replaces: seconds by torch and by plainconv, and shares of torch's run."""
    seen: dict[str, list[Seen]] = {name: [] for name in ("torch", "torch behind", "swap", "optimize")}
    taken_in = {function for functions, _ in optimized.report.fused.values() for function in functions}

    def by_torch() -> None:
        whole, watch = _watched(torchs, taken_in)
        seen["torch"].append(Seen(watch.convolution, whole))
        seen["torch behind"].append(Seen(watch.convolution + watch.behind, whole))

    def by_swap() -> None:
        whole, watch = _watched(swapped)
        seen["swap"].append(Seen(watch.convolution, whole))

    def by_optimize() -> None:
        calls = Calls(optimized)
        with calls.watched():
            whole = _seconds(lambda: optimized(x))
        seen["optimize"].append(Seen(calls.seconds, whole))

    in_turn({"torch": by_torch, "swap": by_swap, "optimize": by_optimize}, seconds=seconds, turn_s=TURN_S, least=ROUNDS)
    return {name: _middle(those) for name, those in seen.items()}


class Seen(NamedTuple):
    """Seconds of a part, and of a run."""

    part: float
    run: float


def _middle(those: list[Seen]) -> Record:
    return {
        "seconds": median(seen.part for seen in those),
        "share": median(seen.part / seen.run for seen in those),
    }


def _watched(call: Callable[[], Any], taken_in: Collection[str] = ()) -> tuple[float, Watch]:
    """Seconds of a call, and what is seen in another right after it: to watch takes time itself."""
    seconds = _seconds(call)
    with Watch(taken_in) as watch:
        call()
    return seconds, watch


def _seconds(call: Callable[[], Any]) -> float:
    begin = perf_counter()
    call()
    return perf_counter() - begin


def _best(timings: dict[str, Timing], layouts: list[str]) -> dict[str, str]:
    """The side in its quicker memory format, of torch and of swap."""
    return {
        of: min((_side(of, layout) for layout in layouts), key=lambda side: timings[side].median_s)
        for of in ("torch", "swap")
    }


def _side(of: str, layout: str) -> str:
    return of if layout == CONTIGUOUS else f"{of} {layout}"


# -- training --------------------------------------------------------------------------------------------------------


def _training(given: Given, seconds: float) -> Record:
    """A step of training, forward and backward, by torch and by plainconv."""
    layouts = [CONTIGUOUS, LAST] if given.x.dim() > 3 else [CONTIGUOUS]
    models = {_side("torch", layout): given.laid(layout) for layout in layouts}
    models |= {_side("swap", layout): sides.swapped(given, layout) for layout in layouts}
    steps = {name: _step(model.train(), x) for name, (model, x) in models.items()}
    timings = in_turn(steps, seconds=seconds, turn_s=TURN_S, least=ROUNDS)
    best = _best(timings, layouts)
    seen: dict[str, list[Seen]] = {of: [] for of in best}

    def watched(of: str) -> None:
        whole, watch = _watched(steps[best[of]])
        seen[of].append(Seen(watch.convolution, whole))

    in_turn({of: lambda of=of: watched(of) for of in best}, seconds=seconds, turn_s=TURN_S, least=ROUNDS)
    return {
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "best": best,
        "parts": {of: _middle(those) for of, those in seen.items()},
    }


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(x).square().mean().backward()

    return step


def _gradient_errors(given: Given) -> Record:
    """Of all parameters' gradients together, against float64; with the statistics that norms have for inference."""
    exact = _gradients(copy.deepcopy(given.model).double(), given.x.double())
    swapped, x = sides.swapped(given, CONTIGUOUS)
    return {
        "torch": _distance(_gradients(copy.deepcopy(given.model), given.x), exact),
        "swap": _distance(_gradients(swapped, x), exact),
    }


def _gradients(model: nn.Module, x: Tensor) -> Tensor:
    model(x).square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def _distance(found: Any, exact: Tensor) -> float:
    """Relative: the length of the difference over that of what is right."""
    return float((torch.as_tensor(found).double() - exact).norm() / exact.norm())


# -- records ---------------------------------------------------------------------------------------------------------


def _rows() -> dict[str, tuple[str, int]]:
    """Name of a record -> the network and the batch that it is of."""
    return {
        f"{name}-{batch}" if len(of.batches) > 1 else name: (name, batch)
        for name, of in NETWORKS.items()
        for batch in of.batches
    }


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(NETWORKS)}; default: all")] = None,
    seconds: Annotated[float, typer.Option(help="of each of four parts of a model's measurement, about")] = 8.0,
    threads: Annotated[int, typer.Option(help="of every side")] = 2,
    write: Annotated[bool, typer.Option("--write", help="only write the page of the records that are there")] = False,
    check: Annotated[bool, typer.Option("--check", help="only say whether the page is that of the records")] = False,
    out: Annotated[Path, typer.Option(help="the folder")] = RESULTS,
) -> None:
    """Measure models, and write results/models.json and results/models.md."""
    path, page = out / "models.json", out / "models.md"
    records: dict[str, Record] = json.loads(path.read_text()) if path.exists() else {}
    rows = _rows()
    if check:
        raise typer.Exit(int(not page.exists() or page.read_text() != models_page.page(records, rows)))
    torch.set_num_threads(threads)
    if unknown := {*(names or [])} - {*NETWORKS, *rows}:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    for row, (name, batch) in rows.items():
        if write or (names and not {name, row} & {*names}):
            continue
        if why := NETWORKS[name].why_not:
            records[row] = {"why_not": why}
            continue
        print(f"{row} ...", file=sys.stderr, flush=True)
        records[row] = measured(NETWORKS[name], batch, seconds)
        path.write_text(json.dumps(records, indent=1) + "\n")  # a run that is interrupted leaves what it had
    records = {row: records[row] for row in rows if row in records}
    path.write_text(json.dumps(records, indent=1) + "\n")
    page.write_text(models_page.page(records, rows))
    print(page.read_text())


if __name__ == "__main__":
    typer.run(main)
