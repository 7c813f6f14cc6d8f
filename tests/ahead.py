"""The GPU's kernels without a GPU: compiled to machine code ahead of time, to read what they need and what they use.

Triton asks a driver which GPU there is.  Another one answers here, and all else is as in a launch.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple
from unittest import mock

import torch
from interpreted import asked
from torch import Tensor

from plainconv.gpu import matrices, rows, taps
from plainconv.gpu.launch import Launch
from plainconv.menu import rolling
from plainconv.menu.base import compute_dtype
from plainconv.problem import FORMATS, Direction

# Bytes that a block of threads may have: 80 stands for 86 and 89, too, which run the same and have the least.
SHARED = {80: 99 << 10, 90: 227 << 10}
MATRIX_UNITS = {80: "mma.sync", 90: "wgmma.mma_async"}  # the older serve the newer, too, in small tiles

TYPES = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "float32 as TF32": (torch.float32, True),
    "float64": (torch.float64, False),
}  # and whether float32 may be rounded


_ASKED = itertools.count()


class Compiled(NamedTuple):
    """What a kernel needs: bytes of shared memory, registers of a thread, bytes that they spill to; and its text."""

    shared: int
    registers: int
    spilled: int
    ptx: str


def compiled(launch: Launch, tensors: tuple[Tensor | None, ...], capability: int) -> Compiled:
    """The kernel that such tensors would launch."""
    import triton

    with gpu(capability):
        made = launch.compiled(*tensors)
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{word}:(\d+)", told)[-1]) for word in ("REG", "STACK", "LOCAL"))
    return Compiled(made.metadata.shared, registers, stack + local, made.asm["ptx"])


def asked_for(launches: list[tuple[Launch, tuple[Tensor | None, ...]]]) -> set[str]:
    """What Triton would compile for these: one key for each kernel, and nothing is compiled."""
    import triton

    keys: set[str] = set()

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        keys.add(fn.name + key)
        return True  # it is taken care of

    new = f"asked {next(_ASKED)}"  # nothing was compiled for it before
    with gpu(90, new), mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note):
        for launch, tensors in launches:
            launch.compiled(*tensors)
    return keys


@contextmanager
def gpu(capability: int, name: str = "ahead") -> Iterator[mock.Mock]:
    """As if there were such a GPU; what is launched is noted by what is yielded, and nothing runs."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    named = {
        "get_current_device": f"{name} {capability}",  # kernels are remembered by it
        "get_current_stream": None,
        "get_current_target": GPUTarget("cuda", capability, 32),
        "utils.get_device_properties": {"max_shared_mem": SHARED[capability]},
        "utils.load_binary": (None, "function", 0, 0, 1024),  # no module, so none to unload
    }
    fake = mock.Mock(**{f"{name}.return_value": value for name, value in named.items()})
    with mock.patch.object(driver, "_active", fake):
        yield fake.launcher_cls.return_value


def typical(outputs: int, direction: Direction) -> str:
    """A layer with so many outputs."""
    c, o = (outputs, 64) if direction is Direction.GRAD_INPUT else (64, outputs)
    return f"n8 c{c} o{o} x28x28 k3x3 s2 p1"


def launched(
    text: str,
    direction: Direction,
    dtype: torch.dtype,
    last: bool,
    tf32: bool = False,
    *,
    lies: torch.memory_format | None = None,
    **more: Any,
) -> tuple[Launch, tuple[Tensor | None, ...]]:
    """The launch of an implicit matrix product, and its tensors; or of rolling rows, where channels are few.

    last: of the result; lies: how what is read does, by default as the result.
    """
    weighs = direction is Direction.GRAD_WEIGHT
    request = asked(text, direction, dtype, channels_last=last, has_bias=not weighs, tf32=tf32, **more)
    usual = FORMATS[2 + request.problem.dims] if request.channels_last else torch.contiguous_format
    x, w, y = (
        torch.empty(request.problem.shape_of(role), dtype=dtype, device="meta", memory_format=usual) for role in "xwy"
    )
    few = min(request.problem.group_in, request.problem.group_out) <= rolling.MOST_CHANNELS
    if weighs:
        cut, fill = (taps.taps_of, taps.taps) if few else (matrices.split_of, matrices.weights)
        return fill(request, cut(request, 1 << 20), x, y, (1, 1, 1, 1)), (x, y, w.to(compute_dtype(dtype)))
    read, made = (x, y) if direction is Direction.FORWARD else (y, x)
    read = read.contiguous(memory_format=lies or usual)
    tensors = read, w, w, made if request.has_residual else None, made
    if few:
        return rows.rolling(request, read, w, made.stride()), tensors
    return matrices.implicit(request, read, made.stride()), tensors
