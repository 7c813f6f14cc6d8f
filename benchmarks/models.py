"""Whole models beside torch, torch.compile, ONNX Runtime and OpenVINO: results/models.json and results/models.md.

    pip install -e ".[all,models]"
    make models                                       or: python benchmarks/models.py
    python benchmarks/models.py resnet50 regnet       some of them; the others' records stay
    python benchmarks/models.py --write               only write the page of the records that are there

All sides compute the same model with the same numbers, in one process, in turn, with the same number of threads.  What
cannot be had (a package that is not installed, a model without a graph) is said in words.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

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


def measured(network: Network, batch: int, seconds: float, **options: Any) -> Record:
    """All that the page says of a model; `seconds` is for each of inference, training and the parts of both."""
    model, x = network.module(**options), network.input(batch)
    keep_freed_memory()
    with sides.given(model, x) as given:
        with torch.inference_mode():
            inference = _inference(given, seconds)
        return {
            "input": list(x.shape),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **inference,
            "training": _training(given, seconds),
            "gradients": _gradient_errors(given),
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


def _parts(
    torchs: Callable[[], Any], swapped: Callable[[], Any], optimized: nn.Module, x: Tensor, seconds: float
) -> Record:
    """Seconds of what swap replaces, by torch and by plainconv, and of what optimize replaces."""
    seen: dict[str, list[float]] = {name: [] for name in ("torch", "torch behind", "swap", "optimize")}

    def by_torch() -> None:
        with Watch() as watch:
            torchs()
        seen["torch"].append(watch.convolution)
        seen["torch behind"].append(watch.convolution + watch.behind)

    def by_swap() -> None:
        with Watch() as watch:
            swapped()
        seen["swap"].append(watch.convolution)

    def by_optimize() -> None:
        calls = Calls(optimized)
        with calls.watched():
            optimized(x)
        seen["optimize"].append(calls.seconds)

    in_turn({"torch": by_torch, "swap": by_swap, "optimize": by_optimize}, seconds=seconds, turn_s=TURN_S, least=ROUNDS)
    return {name: median(spent) for name, spent in seen.items()}


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
    seen: dict[str, list[float]] = {of: [] for of in best}

    def watched(of: str) -> None:
        with Watch() as watch:
            steps[best[of]]()
        seen[of].append(watch.convolution)

    in_turn({of: lambda of=of: watched(of) for of in best}, seconds=seconds, turn_s=TURN_S, least=ROUNDS)
    return {
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "best": best,
        "parts": {of: median(spent) for of, spent in seen.items()},
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


def _row(name: str, batch: int) -> str:
    return f"{name}, {batch}" if len(NETWORKS[name].batches) > 1 else name


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(NETWORKS)}; default: all")] = None,
    seconds: Annotated[float, typer.Option(help="of each of four parts of a model's measurement, about")] = 8.0,
    threads: Annotated[int, typer.Option(help="of every side")] = 2,
    write: Annotated[bool, typer.Option("--write", help="only write the page of the records that are there")] = False,
    check: Annotated[bool, typer.Option("--check", help="only say whether the page is that of the records")] = False,
    out: Annotated[Path, typer.Option(help="the folder")] = RESULTS,
) -> None:
    """Measure models, and write results/models.json and results/models.md."""
    torch.set_num_threads(threads)
    path, page = out / "models.json", out / "models.md"
    records: dict[str, Record] = json.loads(path.read_text()) if path.exists() else {}
    if check:
        raise typer.Exit(int(page.read_text() != models_page.page(records)))
    if unknown := {*(names or [])} - {*NETWORKS}:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    rows = {_row(name, batch): (name, batch) for name, of in NETWORKS.items() for batch in of.batches}
    for row, (name, batch) in rows.items():
        if write or (names and name not in names):
            continue
        if why := NETWORKS[name].why_not:
            records.setdefault(row, {"why_not": why})
            continue
        print(f"{row} ...", file=sys.stderr, flush=True)
        records[row] = measured(NETWORKS[name], batch, seconds)
        path.write_text(json.dumps(records, indent=1) + "\n")  # a run that is interrupted leaves what it had
    records = {row: records[row] for row in rows if row in records}
    path.write_text(json.dumps(records, indent=1) + "\n")
    page.write_text(models_page.page(records))
    print(models_page.page(records))


if __name__ == "__main__":
    typer.run(main)
