"""Gaussians over a picture beside torch, OpenCV and SciPy: results/gaussians.json and results/gaussians.md.

    pip install -e ".[all,gaussians]"
    python benchmarks/gaussians.py
    python benchmarks/gaussians.py --write     only write the page of the record that is there
    python benchmarks/gaussians.py --check     only say whether the page is that of the record

Every side filters each colour of the same float32 picture by the same kernel, with zeros around it, in one process, in
turn, with the same number of threads, and is compared with float64.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # the files beside this one, wherever it is started
import gaussians_page
from sides import Absent, installed

import plainconv
from plainconv.timing import Timing, in_turn, keep_freed_memory, machine

RESULTS = Path(__file__).parent.parent / "results"
COLOURS = 3
TAPS = (9, 31)
REACH = 3.0  # standard deviations to either side
TURN_S = 0.15  # how long a side goes on: the threads of the one before are asleep by then
ROUNDS = 3  # at the least
SLOW_S = 3.0  # a side that takes longer is called once, for its error, and that is its time
PACKAGES = ("cv2", "scipy")

Record = dict[str, Any]


def gaussian(taps: int) -> Tensor:
    """A kernel [taps, taps] whose sum is 1."""
    line = torch.linspace(-REACH, REACH, taps, dtype=torch.float64).square().mul(-0.5).exp()
    line /= line.sum()
    return torch.outer(line, line).float()


@dataclass(frozen=True)
class Given:
    """A picture [1, colours, height, width], and the kernel of every colour."""

    x: Tensor
    kernel: Tensor

    @property
    def weight(self) -> Tensor:
        return self.kernel.expand(self.x.shape[1], 1, *self.kernel.shape).contiguous()

    @property
    def options(self) -> dict[str, int]:
        return {"padding": len(self.kernel) // 2, "groups": self.x.shape[1]}

    def exact(self) -> Tensor:
        """The result in float64, by transforms: torch has nothing else for that which ends soon."""
        taps, (height, width) = len(self.kernel), self.x.shape[2:]
        around = (height + taps - 1, width + taps - 1)
        x, kernel = (torch.fft.rfft2(of.double(), around) for of in (self.x, self.kernel.flip(0, 1)))
        begin = taps // 2
        return torch.fft.irfft2(x * kernel, around)[..., begin : begin + height, begin : begin + width]


# -- who filters it: each is made once, and then is a call that gives an array [colours, height, width] ---------------

Side = Callable[[], Any]


def _torch(given: Given, memory_format: torch.memory_format) -> Side:
    x, w = (of.contiguous(memory_format=memory_format) for of in (given.x, given.weight))
    return lambda: F.conv2d(x, w, **given.options)[0]


def _opencv(given: Given) -> Side:
    installed("cv2")
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    pixels, kernel = given.x[0].permute(1, 2, 0).contiguous().numpy(), given.kernel.numpy()  # colours last, as it wants
    return lambda: cv2.filter2D(pixels, -1, kernel, borderType=cv2.BORDER_CONSTANT).transpose(2, 0, 1)


def _scipy(given: Given) -> Side:
    installed("scipy")
    from scipy.fft import set_workers
    from scipy.signal import oaconvolve

    x, kernel = given.x[0].numpy(), given.kernel.flip(0, 1)[None].numpy()

    def call() -> Any:
        with set_workers(torch.get_num_threads()):
            return oaconvolve(x, kernel, "same", axes=(1, 2))

    return call


def _plainconv(given: Given, algorithm: str) -> Side:
    x, w = given.x, given.weight
    return lambda: plainconv.conv2d(x, w, algorithm=algorithm, **given.options)[0]


def _prepacked(given: Given) -> Side:
    x, filtered = given.x, _packed(given)
    return lambda: filtered(x)[0]


def _packed(given: Given) -> plainconv.Prepacked:
    return plainconv.prepack(given.weight, given.x.shape, **given.options)


MADE: dict[str, Callable[[Given], Side]] = {
    "torch": lambda given: _torch(given, torch.contiguous_format),
    "torch channels_last": lambda given: _torch(given, torch.channels_last),
    "opencv": _opencv,
    "scipy": _scipy,
    "separable": lambda given: _plainconv(given, "separable"),
    "prepacked": _prepacked,
    "auto": lambda given: _plainconv(given, "auto"),
}


# -- records ---------------------------------------------------------------------------------------------------------


def measured(given: Given, seconds: float) -> Record:
    """Times and errors of every side for one kernel; `seconds` is for all sides together, about."""
    calls: dict[str, Side] = {}
    absent: dict[str, str] = {}
    for name, make in MADE.items():
        try:
            calls[name] = make(given)
        except Absent as why:
            absent[name] = str(why)
    exact = given.exact()[0]
    errors, slow = {}, {}
    for name, call in calls.items():
        begin = perf_counter()
        found = call()
        spent = perf_counter() - begin
        errors[name] = _distance(found, exact)
        if spent > SLOW_S:
            slow[name] = Timing(spent, spent, spent, 1)
    quick = {name: call for name, call in calls.items() if name not in slow}
    timings = slow | in_turn(quick, seconds=seconds, turn_s=TURN_S, least=ROUNDS)
    return {
        "taps": len(given.kernel),
        "timings": {name: asdict(timings[name]) for name in calls},
        "errors": errors,
        "absent": absent,
        "algorithms": {
            "auto": plainconv.explain(given.x, given.weight, **given.options).chosen,
            "prepacked": _packed(given).algorithm,
        },
    }


def _distance(found: Any, exact: Tensor) -> float:
    """The largest, as a share of the largest that is right."""
    found = torch.as_tensor(found)
    assert found.dtype == torch.float32
    return float((found - exact).abs().max() / exact.abs().max())


def main(
    seconds: Annotated[float, typer.Option(help="of each kernel's measurement, about")] = 15.0,
    threads: Annotated[int, typer.Option(help="of every side")] = 2,
    height: Annotated[int, typer.Option(help="of the picture")] = 1080,
    width: Annotated[int, typer.Option(help="of the picture")] = 1920,
    write: Annotated[bool, typer.Option("--write", help="only write the page of the record that is there")] = False,
    check: Annotated[bool, typer.Option("--check", help="only say whether the page is that of the record")] = False,
    out: Annotated[Path, typer.Option(help="the folder")] = RESULTS,
) -> None:
    """Measure, and write results/gaussians.json and results/gaussians.md."""
    path, page = out / "gaussians.json", out / "gaussians.md"
    if check:
        raise typer.Exit(int(page.read_text() != gaussians_page.page(json.loads(path.read_text()))))
    if not write:
        torch.set_num_threads(threads)
        keep_freed_memory()
        x = torch.rand(1, COLOURS, height, width, generator=torch.Generator().manual_seed(0))
        record = {
            "picture": list(x.shape[1:]),
            "kernels": [measured(Given(x, gaussian(taps)), seconds) for taps in TAPS],
            "threads": threads,
            "machine": machine(),
            "packages": {name: import_module(name).__version__ for name in PACKAGES if find_spec(name)},
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
    text = gaussians_page.page(json.loads(path.read_text()))
    page.write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
