"""Every row of the tables of blocks, compiled for sm_80 and sm_90: it fits, spills nothing, uses the matrix units."""

import pytest
import torch
from ahead import MATRIX_UNITS, SHARED, compiled
from interpreted import asked

from plainconv.gpu import launch
from plainconv.menu.base import compute_dtype
from plainconv.problem import Direction

pytestmark = pytest.mark.skipif(launch.why_not() is not None, reason=str(launch.why_not()))

TYPES = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "float32": (torch.float32, "ieee"),
    "float32 as TF32": (torch.float32, "tf32"),
    "float64": (torch.float64, "ieee"),
}
KINDS = ((Direction.FORWARD, True), (Direction.GRAD_INPUT, False))
# One of each kind is quick; the rest is for `make check`.
QUICK = {("bfloat16", 90), ("float32 as TF32", 80)}


def implicit(outputs, dtype, direction, last):
    """The launch for so many outputs of a typical layer, and its tensors."""
    request = asked(f"n8 c64 o{outputs} x28x28 k3x3 s2 p1", direction, dtype, channels_last=last, has_bias=True)
    if direction is Direction.GRAD_INPUT:
        request = asked(f"n8 c{outputs} o64 x28x28 k3x3 s2 p1", direction, dtype, channels_last=last, has_bias=True)
    lies = torch.channels_last if last else torch.contiguous_format
    read, made = (
        torch.empty(request.problem.shape_of(role), dtype=dtype, device="meta", memory_format=lies)
        for role in (direction.given[0], direction.makes)
    )
    return launch.implicit(request, read, made.stride()), (read, read, read, None, made)


def weights(outputs, dtype, last):
    """The same of the gradient for a weight."""
    request = asked(f"n8 c64 o{outputs} x28x28 k3x3 s2 p1", Direction.GRAD_WEIGHT, dtype, channels_last=last)
    lies = torch.channels_last if last else torch.contiguous_format
    x, y = (
        torch.empty(request.problem.shape_of(role), dtype=dtype, device="meta", memory_format=lies)
        for role in ("x", "y")
    )
    return launch.weights(request, x, y), (x, y, torch.empty(0, dtype=compute_dtype(dtype), device="meta"))


@pytest.mark.parametrize("row", launch.IMPLICIT, ids=lambda row: f"{row.outputs} outputs")
@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, marks=() if (name, capability) in QUICK else pytest.mark.slow)
        for name in TYPES
        for capability in SHARED
    ],
)
def test_every_row_fits_and_uses_the_matrix_units(row, name, capability):
    dtype, precision = TYPES[name]
    products = [implicit(row.outputs, dtype, direction, last) for direction, last in KINDS]
    products += [weights(row.outputs, dtype, last) for last in (True, False)]
    for product in products:
        told = compiled(*product, capability, precision)
        assert told.shared <= SHARED[capability]
        assert told.spilled == 0
        assert any(unit in told.ptx for unit in MATRIX_UNITS.values()) == (name != "float32")
        if dtype.itemsize == 2 and row.outputs >= 64:
            assert MATRIX_UNITS[capability] in told.ptx


def test_neighbouring_channels_are_moved_at_once():
    told = compiled(*implicit(64, torch.bfloat16, Direction.FORWARD, True), 90, "ieee")
    assert "cp.async.cg.shared.global" in told.ptx  # 16 bytes of it, past the registers
    assert "st.global.v4.b32" in told.ptx


def test_a_new_image_size_changes_no_constant():
    """All that we compile a kernel for; what Triton sees in numbers (1, multiples of 16, 2^31) is its own."""
    for last in (False, True):
        sizes = ("n1 c8 o16 x9x7 k3x3 s2 p1", "n64 c8 o16 x224x160 k3x3 s2 p1", "n3 c8 o16 x2x1 k3x3 s2 p1")
        for direction in (Direction.FORWARD, Direction.GRAD_INPUT):
            constants = []
            for text in sizes:
                request = asked(text, direction, channels_last=last)
                lies = torch.channels_last if last else torch.contiguous_format
                read = torch.empty(request.problem.shape_of(direction.given[0]), device="meta", memory_format=lies)
                made = torch.empty(request.problem.shape_of(direction.makes), device="meta", memory_format=lies)
                constants.append(launch.implicit(request, read, made.stride()).constants)
            assert constants[0] == constants[1] == constants[2]
            assert not {type(number) for number in launch.implicit(request, read, made.stride()).numbers} - {int, tuple}


def test_float32_follows_torchs_switch():
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            switch.fp32_precision = precision
            assert launch.precision(torch.float32) == precision
            assert launch.precision(torch.float64) == launch.precision(torch.bfloat16) == "ieee"
    finally:
        switch.fp32_precision = before
