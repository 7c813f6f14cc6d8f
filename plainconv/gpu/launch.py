"""Launches: what all kernels are told of sizes and strides; their tiles are in the files beside this one.

Triton compiles a kernel for the constants and types that it is given, and keeps it on disk.  Constants are what no
image size changes: the kernel's size, stride and dilation, the padding mode, the format, how many channels are moved at
once, the activation.  Sizes and strides are ordinary numbers.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plainconv.problem import ConvProblem, Direction, Request, read_activation

OLDEST = (3, 6)
TRITONS = ("triton", "pytorch-triton", "triton-windows")  # names of its packages
LEAST = (8, 0)  # compute capability: what the kernels are compiled for in the tests
VECTOR = 16  # bytes that a thread moves at once, at most
REGISTERS = 255  # of a thread, at most; left to choose, the assembler may spill, so that more threads run at once


class Blocks(NamedTuple):
    """How many outputs a tile of the result has, and how the work on it is spread."""

    outputs: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """In Triton's words.

        A product and the sum that it is added to are one instruction: Triton is about to do that only where it is told.
        """
        fused = {"enable_fp_fusion": True}
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": REGISTERS, **fused}


def why_not(gpu: int = 0) -> str | None:
    """The sentence, if there is no Triton to compile kernels with, or that GPU cannot run them; nothing is imported."""
    return _no_triton() or (_unfit(gpu) or _no_compiler() if torch.cuda.is_available() else None)


def _unfit(gpu: int) -> str | None:
    if torch.version.hip is not None:
        return "its kernels are for GPUs of NVIDIA, and this is torch for ROCm"
    found = torch.cuda.get_device_capability(gpu)
    if found >= LEAST:
        return None
    needed, has = (".".join(map(str, pair)) for pair in (LEAST, found))
    return f"its kernels need a GPU of compute capability {needed} or newer, and cuda:{gpu} has {has}"


@lru_cache(1)
def _no_triton() -> str | None:
    told = f"its kernels are compiled by Triton {'.'.join(map(str, OLDEST))} or newer"
    version = _version()
    if version is None:
        return f'{told}, which is not installed (pip install "plainconv[gpu]")'
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        return f"{told}, and {version} is installed"
    return None


def _version() -> str | None:
    for package in TRITONS:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return None


@lru_cache(1)
def _no_compiler() -> str | None:
    """Triton compiles what talks to the driver, too, on the machine where it runs."""
    if "CC" in os.environ or any(map(shutil.which, ("gcc", "clang"))):
        return None
    return "Triton needs a C compiler to launch its kernels, and there is none (install gcc, or name one in CC)"


_Again = Callable[[Sequence[int]], None]  # launches what was found, given where the tensors begin


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is told besides the tensors; call it with those.

    Triton finds the compiled kernel anew for every launch, which takes it longer than most small launches do.  So what
    it found is kept, for each device and for which of the tensors begin at a multiple of 16 bytes; the rest of what it
    looks at is the same in every call: types, numbers, and which tensors are None.
    """

    kernel: Any
    programs: int
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    _found: dict[tuple[int, ...], _Again] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, first: Tensor, *others: Tensor | None) -> None:
        device = first.get_device()  # -1 is the CPU
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):  # kernels go to the current device, and its current stream
                self._launch(device, first, *others)
        else:
            self._launch(device, first, *others)

    def compiled(self, first: Tensor, *others: Tensor | None) -> Any:
        """What a call with such tensors would launch."""
        with torch.cuda.device_of(first):
            return self._run((first, *others), warmup=True)

    def _launch(self, device: int, *tensors: Tensor | None) -> None:
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        key = (device, *[pointer % VECTOR == 0 for pointer in pointers])
        plain = _is_plain(self.kernel)
        if plain and key in self._found:
            self._found[key](pointers)
            return
        found = self._run(tensors, warmup=False)
        if plain and found is not None:  # what is interpreted is not compiled
            self._found[key] = self._again(found)

    def _run(self, tensors: tuple[Tensor | None, ...], warmup: bool) -> Any:
        return self.kernel.run(*tensors, *self.numbers, grid=(self.programs,), warmup=warmup, **self.constants)

    def _again(self, found: Any) -> _Again:
        """What launches a compiled kernel once more, in the words of JITFunction.run; pointers may be numbers."""
        from triton.runtime import driver

        run = found.run
        constants = (self.constants[name] for name in self.kernel.arg_names if name in self.constants)
        grid, told = (self.programs, 1, 1), (*self.numbers, *constants)

        def again(pointers: Sequence[int]) -> None:
            active = driver.active
            stream = active.get_current_stream(active.get_current_device())
            # Of `found`, and not kept apart from it: Triton unloads a kernel that nobody has any more.
            run(*grid, stream, found.function, found.packed_metadata, None, None, None, *pointers, *told)

        return again


def _is_plain(kernel: Any) -> bool:
    """Whether nobody told Triton to call hooks around launches, or to compile otherwise than it does by itself."""
    from triton import knobs

    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not (
        getattr(enter, "calls", enter)  # a chain of hooks, or one hook
        or getattr(leave, "calls", leave)
        or kernel.pre_run_hooks
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


def tiles(size: int, tile: int) -> int:
    """How many hold all."""
    return -(-size // tile)


def three(sides: Iterable[int], plain: int) -> tuple[int, ...]:
    """Depth, rows and width, of as many dimensions as there are."""
    given = tuple(sides)
    return (plain,) * (3 - len(given)) + given


def activation_of(request: Request) -> tuple[str | float | None, ...]:
    """What kernels are told of it: its name and its numbers."""
    if request.activation is None:
        return (None,)
    name, numbers = read_activation(request.activation)
    return (name, *numbers)


class Map(NamedTuple):
    """What FORWARD and GRAD_INPUT have alike."""

    inner: int  # channels of a group that are summed over
    outer: int  # those that are made
    end: tuple[int, ...]  # behind the last elements that are left, of what is read
    size: tuple[int, ...]  # of what is made
    period: tuple[int, ...]  # from one tap of a phase to the next
    places: tuple[int, ...]  # of the first phase, which has the most
    phases: int


def mapped(request: Request) -> Map:
    """That of a request."""
    problem = request.problem
    if request.direction is Direction.FORWARD:
        ones = (1,) * problem.dims
        return Map(problem.group_in, problem.group_out, ends(problem), problem.out, ones, problem.out, 1)
    period = tuple(s // math.gcd(s, d) for s, d in zip(problem.stride, problem.dilation, strict=True))
    places = tuple(map(tiles, problem.spatial, problem.stride))
    phases = math.prod(map(min, problem.spatial, problem.stride))
    return Map(problem.group_out, problem.group_in, problem.out, problem.spatial, period, places, phases)


def compiled_for(problem: ConvProblem) -> dict[str, Any]:
    """What all kernels are compiled for."""
    return {
        "KERNEL": three(problem.kernel, 1),
        "STRIDE": three(problem.stride, 1),
        "DILATION": three(problem.dilation, 1),
        "MODE": problem.padding_mode,
    }


def ends(problem: ConvProblem) -> tuple[int, ...]:
    """Behind the last elements of the input that negative padding leaves."""
    return tuple(size + min(hi, 0) for size, (_, hi) in zip(problem.spatial, problem.padding, strict=True))


def channels_last(tensor: Tensor, request: Request) -> bool:
    """Whether channels are neighbours; where a single channel or place is everyone's, the format of the result decides.

    Images of all sizes are to share kernels.
    """
    return tensor.stride(1) == 1 and (request.channels_last or tensor.stride(-1) != 1)


def strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Of image, depth, rows and width; 0 where there is only one."""
    image, _, *sides = (stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    return (image, *three(sides, 0))
