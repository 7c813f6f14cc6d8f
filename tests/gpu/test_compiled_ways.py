"""Every rank, padding mode and format, compiled for sm_80 or sm_90: what the interpreter runs, Triton compiles."""

import pytest
import torch
from ahead import SHARED, compiled, launched

from plainconv.gpu import launch
from plainconv.problem import PADDING_MODES, Direction

pytestmark = pytest.mark.skipif(launch.why_not() is not None, reason=str(launch.why_not()))

CHANNELS = {"many channels": "c64 o64", "few channels": "c3 o4"}
RANKS = {1: "x900 k3 s2 p2 d2", 2: "x28x30 k3x3 s2x1 p2x1 d2x1", 3: "x9x14x15 k3x2x3 s1x2x1 p1x1x2 d1x1x2"}
QUICK = (2, "reflect")
WAYS = [
    pytest.param(channels, dims, mode, marks=() if (dims, mode) == QUICK else pytest.mark.slow)
    for channels in CHANNELS
    for dims in RANKS
    for mode in PADDING_MODES
]


@pytest.mark.parametrize(("channels", "dims", "mode"), WAYS)
def test_every_rank_and_padding_mode(channels, dims, mode):
    """In turn for one kind of GPU or the other; the gradient for an input is that of zeros, see menu/fold.py."""
    capability = list(SHARED)[PADDING_MODES.index(mode) % 2]
    dtype = torch.bfloat16 if channels == "many channels" else torch.float32
    for direction in Direction:
        if direction is Direction.GRAD_INPUT and mode != "zeros":
            continue
        for last in (False, True)[:dims]:
            text = f"n2 {CHANNELS[channels]} {RANKS[dims]} m{mode}"
            told = compiled(*launched(text, direction, dtype, last), capability)
            assert told.spilled == 0
            assert told.shared <= SHARED[capability]


@pytest.mark.slow
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_the_largest_kernel(last, direction):
    told = compiled(*launched("n2 c64 o64 x31x31 k31x31 p15 g64", direction, torch.bfloat16, last), 90)
    assert told.spilled == 0


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=["forward", "grad_input"])
def test_what_is_read_and_what_is_made_may_lie_differently(direction, capability):
    for channels in CHANNELS.values():
        call, tensors = launched(
            f"n2 {channels} {RANKS[2]}", direction, torch.float32, True, lies=torch.contiguous_format
        )
        assert call.constants["READ_LAST"] != call.constants["MADE_LAST"]
        assert compiled(call, tensors, capability).spilled == 0
