"""The GPU's kernels without a GPU: compiled to machine code ahead of time, to read what they need and what they use."""

from __future__ import annotations

import re
import subprocess
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plainconv.gpu.launch import Launch

SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that a block of threads may have
MATRIX_UNITS = {80: "mma.sync", 90: "wgmma.mma_async"}  # the older serve the newer, too, in small tiles
_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Compiled(NamedTuple):
    """What a kernel needs: bytes of shared memory, registers of a thread, bytes that they spill to; and its text."""

    shared: int
    registers: int
    spilled: int
    ptx: str


def compiled(launch: Launch, tensors: tuple[Tensor | None, ...], capability: int, precision: str) -> Compiled:
    """The kernel for tensors of these types, aligned as torch allocates them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel
    given = dict(zip(kernel.arg_names, (*tensors, *launch.numbers), strict=False))
    named = {**launch.constants, "PRECISION": precision}
    constants = {name: named[name] for name in named if name in kernel.arg_names}
    constants |= {name: None for name, value in given.items() if value is None}
    types = {name: _type(value) for name, value in given.items()} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, value in enumerate(given.values()) if isinstance(value, Tensor)}
    made = triton.compile(
        ASTSource(kernel, types, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={name: value for name, value in named.items() if name not in constants},
    )
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{word}:(\d+)", told)[-1]) for word in ("REG", "STACK", "LOCAL"))
    return Compiled(made.metadata.shared, registers, stack + local, made.asm["ptx"])


def _type(value: Any) -> Any:
    """As a launch says it to the compiler."""
    if isinstance(value, tuple):
        return tuple(map(_type, value))
    return f"*{_NAMES[value.dtype]}" if isinstance(value, Tensor) else "i32"
