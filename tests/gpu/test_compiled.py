"""Every row of the tables of blocks, compiled for sm_80 and sm_90: it fits, spills nothing, uses the matrix units."""

from unittest import mock

import pytest
import torch
from ahead import MATRIX_UNITS, SHARED, TYPES, asked_for, compiled, launched, typical
from checks import BY_NAME
from interpreted import asked

from plainconv.gpu import launch, matrices
from plainconv.menu.base import Tensors
from plainconv.problem import FORMATS, Direction

pytestmark = pytest.mark.skipif(launch.why_not() is not None, reason=str(launch.why_not()))

KINDS = (
    (Direction.FORWARD, True),
    (Direction.GRAD_INPUT, False),
    (Direction.GRAD_WEIGHT, True),
    (Direction.GRAD_WEIGHT, False),
)
# Which are read and written in other ways.
OTHERS = ((Direction.FORWARD, False), (Direction.GRAD_INPUT, True))
# One of each kind is quick; the rest is for `make check`.
QUICK = {("bfloat16", 90), ("float32 as TF32", 80)}


@pytest.mark.parametrize("row", matrices.IMPLICIT, ids=lambda row: f"{row.outputs} outputs")
@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, marks=() if (name, capability) in QUICK else pytest.mark.slow)
        for name in TYPES
        for capability in SHARED
    ],
)
def test_every_row_fits_and_uses_the_matrix_units(row, name, capability):
    check_rows(row, name, capability, KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("row", matrices.IMPLICIT, ids=lambda row: f"{row.outputs} outputs")
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("name", TYPES)
def test_every_row_fits_in_the_other_formats(row, name, capability):
    check_rows(row, name, capability, OTHERS)


def check_rows(row, name, capability, kinds):
    dtype, tf32 = TYPES[name]
    for direction, last in kinds:
        told = compiled(*launched(typical(row.outputs, direction), direction, dtype, last, tf32), capability)
        assert told.shared <= SHARED[capability]
        assert told.spilled == 0
        assert any(unit in told.ptx for unit in MATRIX_UNITS.values()) == (name != "float32")
        if dtype.itemsize == 2 and row.outputs >= 64:
            assert MATRIX_UNITS[capability] in told.ptx


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    "text", ["n2 c64 o128 x9x14x15 k3x3x3 s2 p1 mreflect", "n2 c64 o64 x9x14x15 k3x3x3 p1 mreflect g64"]
)
def test_the_worst_case_fits(text, name, capability):
    """All dimensions, a border that is computed, and all that is fused."""
    dtype, tf32 = TYPES[name]
    for last in (False, True):
        more = {"tf32": tf32, "has_residual": True, "activation": "gelu"}
        told = compiled(*launched(text, Direction.FORWARD, dtype, last, **more), capability)
        assert told.shared <= SHARED[capability]
        assert told.spilled == 0


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, marks=() if (name, capability) in QUICK else pytest.mark.slow)
        for name in ("bfloat16", "float32 as TF32")
        for capability in SHARED
    ],
)
@pytest.mark.parametrize("text", ["n8 c512 o255 x13x13 k1x1", "n2 c65 o130 x9x11 k3x3 p1"])
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
def test_neighbouring_channels_that_no_vector_divides_spill_nothing(direction, text, name, capability):
    dtype, tf32 = TYPES[name]
    told = compiled(*launched(text, direction, dtype, True, tf32), capability)
    assert told.spilled == 0
    assert told.shared <= SHARED[capability]


def test_neighbouring_channels_are_moved_at_once():
    told = compiled(*launched(typical(64, Direction.FORWARD), Direction.FORWARD, torch.bfloat16, True), 90)
    assert "cp.async.cg.shared.global" in told.ptx  # 16 bytes of it, past the registers
    assert "st.global.v4.b32" in told.ptx
    for text in (typical(128, Direction.GRAD_WEIGHT), "n8 c64 o128 x28x28 k1x1"):
        told = compiled(*launched(text, Direction.GRAD_WEIGHT, torch.bfloat16, True), 90)
        assert "cp.async.cg.shared.global" in told.ptx
        assert "ld.global" not in told.ptx


def turned(text, direction, dtype):
    """The two launches of a contiguous half type that is turned first, and their tensors."""
    request = asked(text, direction, dtype, has_bias=True)
    x, w, y = (torch.empty(request.problem.shape_of(role), dtype=dtype, device="meta") for role in "xwy")
    read, made = (x, y) if direction is Direction.FORWARD else (y, x)
    room = torch.empty(read.movedim(1, -1).shape, dtype=dtype, device="meta").movedim(-1, 1)
    tensors = room, w, w, None, made
    return [(matrices.turned(read), (read, room)), (matrices.implicit(request, room, made.stride()), tensors)]


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        pytest.param(TYPES[name][0], capability, marks=() if (name, capability) in QUICK else pytest.mark.slow)
        for name in ("bfloat16", "float16")
        for capability in SHARED
    ],
)
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=["forward", "grad_input"])
def test_what_is_turned_first_is_read_as_channels_last_is(direction, dtype, capability):
    for outputs in (32, 128):
        told = [compiled(*each, capability) for each in turned(typical(outputs, direction), direction, dtype)]
        assert all(each.spilled == 0 and each.shared <= SHARED[capability] for each in told)
        assert "st.global.v4.b32" in told[0].ptx
        assert "cp.async.cg.shared.global" in told[1].ptx


def test_a_slope_is_rounded_to_the_type_of_the_sums():
    for text in ("n2 c4 o6 x4x5 k2x3", "n2 c32 o32 x4x5 k2x3"):
        for dtype, bits in ((torch.float64, "0d3FB999999999999A"), (torch.bfloat16, "0f3DCCCCCD")):
            told = compiled(*launched(text, Direction.FORWARD, dtype, False, activation="leaky_relu(0.1)"), 80)
            assert bits in told.ptx


def test_products_are_added_in_one_instruction_whatever_triton_does_by_itself(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    for direction in (Direction.FORWARD, Direction.GRAD_WEIGHT):
        ptx = compiled(*launched("n8 c3 o3 x64x64 k3x1", direction, torch.float32, False), 80).ptx
        assert "fma.rn.f32" in ptx
        assert "mul.f32" not in ptx


SIZES = (
    "n1 c16 o16 x9x7 k3x3 s2 p1",
    "n16 c16 o16 x32x64 k3x3 s2 p1",
    "n3 c16 o16 x2x1 k3x3 s2 p1",
    "n1 c16 o16 x1x1 k3x3 s2 p16",
    "n2 c16 o16 x50000x50000 k3x3 s2 p0",
    "n5 c16 o16 x33x31 k3x3 s2 p2:1x1:16",
)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
def test_a_new_image_size_compiles_nothing(direction, last):
    """Batches, heights, widths, paddings; 1, multiples of 16, and strides of more than 32 bits among the numbers."""
    launches = [launched(text, direction, torch.bfloat16, last) for text in SIZES]
    assert any(number >> 31 > 0 for call, _ in launches for number in call.numbers)
    assert len(asked_for(launches)) == 1
    assert len(asked_for([launched(f"{text} g16", direction, torch.bfloat16, last) for text in SIZES])) == 1
    if direction is not Direction.GRAD_WEIGHT and not last:
        assert len(asked_for([each for text in SIZES for each in turned(text, direction, torch.bfloat16)])) == 2
    lines = [launched(text.split(" k")[0] + " k1x1", direction, torch.bfloat16, last) for text in SIZES]
    assert len(asked_for(lines)) == 1
    other = launched(SIZES[0].replace("k3x3", "k3x2"), direction, torch.bfloat16, last)
    assert len(asked_for([*launches, other])) == 2


# -- winograd --------------------------------------------------------------------------------------------------------


def in_a_call(text, direction, last, dtype=torch.float32, **more):
    """All that a call of winograd launches: the transforms' kernels, and the product's."""
    request = asked(text, direction, dtype, channels_last=last, has_bias=True, **more)
    lies = FORMATS[2 + request.problem.dims] if request.channels_last else torch.contiguous_format
    roles = *direction.given, direction.makes
    first, second, out = (
        torch.empty(request.problem.shape_of(role), dtype=dtype, device="meta", memory_format=lies) for role in roles
    )
    bias = torch.empty(request.bias_shape, dtype=dtype, device="meta")
    tensors = Tensors(first, second, bias, out if request.has_residual else None)
    workspace = torch.empty(BY_NAME["winograd"].cost(request).workspace, dtype=torch.uint8, device="meta")
    launches = []
    with mock.patch.object(launch.Launch, "__call__", lambda call, *given: launches.append((call, given))):
        BY_NAME["winograd"].run(request, tensors, out, workspace)
    return launches


PLAIN, DEEP = "n8 c64 o48 x28x28 k3x3 p1 mreflect", "n2 c64 o64 x9x14x15 k3x2x3 p1 mreflect"
LARGEST = [
    (text, direction, last, dtype, capability)
    for text, directions in ((PLAIN, Direction), (DEEP, [Direction.FORWARD]))
    for direction in directions
    for last in (False, True)
    for dtype in (torch.float32, torch.float64)
    for capability in SHARED
]
QUICK_KINDS = (Direction.FORWARD, False), (Direction.GRAD_WEIGHT, True)
QUICK_LARGEST = {(PLAIN, *kind, torch.float32, 90) for kind in QUICK_KINDS}


@pytest.mark.parametrize(
    ("text", "direction", "last", "dtype", "capability"),
    [pytest.param(*case, marks=() if case in QUICK_LARGEST else pytest.mark.slow) for case in LARGEST],
)
def test_winograd_spills_nothing(text, direction, last, dtype, capability):
    """With a border that is computed, and all that is fused."""
    if direction is Direction.GRAD_INPUT:
        text = text.removesuffix(" mreflect")
    more = {} if direction is Direction.GRAD_WEIGHT else {"has_residual": True, "activation": "gelu"}
    launches = in_a_call(text, direction, last, dtype, **more)
    assert len(launches) == 4
    for call, tensors in launches:
        told = compiled(call, tensors, capability)
        assert told.spilled == 0
        assert told.shared <= SHARED[capability]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
def test_a_new_image_size_compiles_no_kernel_of_winograd(direction, last):
    texts = [text.replace("k3x3 s2", "k2x3").replace("x50000x50000", "x5000x9000") for text in SIZES]
    launches = [in_a_call(text, direction, last, torch.float64) for text in texts]
    assert max(map(len, launches)) > 4, "the largest is cut"
    asked_first = asked_for(launches[0])
    assert len(asked_first) == 4
    assert asked_for([each for call in launches for each in call]) == asked_first
    other = in_a_call(texts[0].replace("k2x3", "k3x2"), direction, last, torch.float64)
    assert len(asked_for([*launches[0], *other])) == 7


def test_tf32_is_another_kernel():
    launches = [launched(SIZES[0], Direction.FORWARD, torch.float32, True, tf32) for tf32 in (False, True)]
    assert len(asked_for(launches)) == 2
