"""Few channels, compiled for sm_80 and sm_90: every row of the tables fits and spills nothing."""

import pytest
import torch
from ahead import SHARED, TYPES, compiled, launched

from plainconv.gpu import launch, rows, taps
from plainconv.problem import ConvProblem, Direction

pytestmark = pytest.mark.skipif(launch.why_not() is not None, reason=str(launch.why_not()))

LAYERS = (
    "n8 c64 o64 x28x28 k3x3 p1 g64",
    "n8 c64 o64 x28x28 k7x7 s2 p3 g64",
    "n8 c3 o3 x64x64 k3x3 p1",
    "n8 c3 o64 x64x64 k7x7 s2 p3",
    "n8 c64 o2 x64x64 k5x5 p2",
    "n8 c16 o64 x28x28 k5x5 p2 g16",
    "n8 c64 o64 x1000 k4 p3 g64",
    "n8 c3 o3 x4000 k5 p2",
    "n8 c1 o16 x4000 k9 p4",
    "n8 c16 o16 x28x28 k3x3 p1 g16",
)


MAPS, WEIGHTS = (Direction.FORWARD, Direction.GRAD_INPUT), (Direction.GRAD_WEIGHT,)


@pytest.mark.parametrize(
    ("table", "directions", "last", "dims"),
    [
        pytest.param(rows.TILES_OF_LINES, MAPS, False, 1, id="lines"),
        pytest.param(rows.TILES_OF_ROWS, MAPS, False, 2, id="rows"),
        pytest.param(rows.TILES_BESIDE, MAPS, True, 2, id="beside each other"),
        pytest.param(taps.APART, WEIGHTS, False, 2, id="a sum for each tap"),
        pytest.param(taps.BESIDE, WEIGHTS, True, 2, id="a sum for each tap, beside each other"),
    ],
)
def test_the_layers_meet_every_row_of_the_tables(table, directions, last, dims):
    outputs = [row.outputs for row in table]
    met = {
        launched(text, direction, torch.float32, last)[0].constants["OUTPUTS"]
        for text in LAYERS
        if ConvProblem.parse(text).dims == dims
        for direction in directions
    }
    assert {next(most for most in outputs if n <= most) for n in met} == set(outputs)


@pytest.mark.parametrize("text", LAYERS)
@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, marks=() if (name, capability) == ("bfloat16", 90) else pytest.mark.slow)
        for name in TYPES
        for capability in SHARED
        if name != "float32 as TF32"
    ],
)
def test_they_spill_nothing(text, name, capability):
    for direction in Direction:
        for last in (False, True)[: ConvProblem.parse(text).dims]:
            told = compiled(*launched(text, direction, TYPES[name][0], last), capability)
            assert told.spilled == 0
            assert told.shared <= SHARED[capability]


def test_neighbouring_depthwise_channels_are_moved_at_once():
    told = compiled(*launched(LAYERS[0], Direction.FORWARD, torch.float32, True), 90)
    assert "ld.global.v4.b32" in told.ptx
    assert "st.global.v4.b32" in told.ptx
