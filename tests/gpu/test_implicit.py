"""direct and pointwise on a GPU, in the interpreter: every border, stride, format and type, and what is fused."""

import math

import pytest
import torch
import torch.nn.functional as F
from checks import ACTIVATIONS, CASES, channels_inside, channels_last, expanded, reals, spread
from interpreted import asked, check, check_guarded, check_packed, far, result

from plainconv.menu import implicit
from plainconv.menu.base import FLOATS
from plainconv.problem import ConvProblem, Direction

directions = pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
maps = pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=["forward", "grad_input"])
formats = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
LAYOUTS = {False: None, True: channels_last}
CHANNELS = "n2 c40 o35 x5x4 k3x2 s1x2 p1"
TILES = (
    CHANNELS,
    "n3 c36 o40 x5x7 k1x1 s2x1",
    "n3 c36 o20 x5x7 k1x1",
    "n2 c24 o40 x4x9 k3x2 s2x3 p1x2 d2x1 g2",
    "n3 c18 o9 x2x3x5 k1x3x2 p0x1x1",
    "n3 c9 o17 x4x5 k3x4 p1x2 mreflect",
)


def name(text: str) -> str:
    return "pointwise" if ConvProblem.parse(text).taps == 1 else "direct"


# Each case in one direction, in turn; in the others it is slow.
EVERY = [
    pytest.param(text, direction, marks=() if (i + j) % 3 == 0 else pytest.mark.slow, id=f"{case}-{direction.value}")
    for i, (case, text) in enumerate(CASES.items())
    for j, direction in enumerate(Direction)
]


@pytest.mark.parametrize(("text", "direction"), EVERY)
@formats
def test_every_border_stride_and_rank(text, direction, last, interpreted):
    interpreted(check, name(text), asked(text, direction, channels_last=last), layout=LAYOUTS[last])


@directions
@formats
@pytest.mark.parametrize("text", TILES)
def test_many_tiles_and_steps(text, direction, last, interpreted):
    interpreted(check, name(text), asked(text, direction, channels_last=last), layout=LAYOUTS[last], small=True)


@directions
@formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_types(dtype, direction, last, interpreted):
    request = asked("n2 c6 o16 x5x6 k3x3 s1x2 p1 g2", direction, dtype, channels_last=last)
    interpreted(check, "direct", request, layout=LAYOUTS[last])
    interpreted(check, "direct", request, reals, LAYOUTS[last])


@directions
@formats
def test_float32_that_may_be_rounded_to_tf32(direction, last, interpreted):
    """Whole numbers are exact in it; the interpreter rounds nothing."""
    for text in ("n2 c6 o16 x5x6 k3x3 s1x2 p1 g2", "n3 c36 o20 x5x7 k1x1", CHANNELS):
        request = asked(text, direction, channels_last=last, tf32=True)
        interpreted(check, name(text), request, layout=LAYOUTS[last], small=text is CHANNELS)


TURNED = ("n2 c40 o24 x5x4 k3x2 s1x2 p1 d2x1", "n3 c16 o32 x37 k3 p1 g2", "n2 c8 o8 x3x5x4 k2x1x2 s2x1x1 p1 mreflect")


@maps
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", TURNED)
def test_half_types_that_are_turned_first(text, dtype, direction, interpreted):
    interpreted(check, "direct", asked(text, direction, dtype), small=True)
    interpreted(check, "direct", asked(text, direction, dtype, has_bias=True), reals, small=True)
    interpreted(check_guarded, "direct", asked(text, direction, dtype), small=True)
    interpreted(check, "direct", asked(text, direction, dtype), layout=spread, small=True)


def test_what_is_turned_may_lie_far_apart_or_be_turned_already(interpreted):
    for layout in (far, channels_last):
        request = asked("n2 c8 o2 x4x5 k3x2 p1 s1x2", Direction.FORWARD, torch.bfloat16)
        interpreted(check, "direct", request, layout=layout, small=True)


def test_what_is_turned_is_known_by_sizes_and_has_room():
    def room(text, dtype=torch.bfloat16, **more):
        return implicit.cost(asked(text, Direction.FORWARD, dtype, **more)).workspace

    wide, weight, turned = "n8 c128 o128 x28x28 k3x3 p1", 128 * 128 * 9 * 2, 8 * 28 * 28 * 128 * 2
    assert room(wide) == weight + turned
    assert room(wide, packed=True) == turned
    assert room(wide, max_workspace=weight + turned) == weight
    assert room(wide, channels_last=True) == weight
    assert room(wide, torch.float32) == 2 * weight
    for few in ("n1 c128 o128 x28x28 k3x3 p1", "n64 c128 o128 x28x28 k1x1", "n8 c132 o128 x28x28 k3x3 p1"):
        assert room(few) < math.prod(ConvProblem.parse(few).input_shape) * 2 + weight


@maps
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_fused(activation, direction, interpreted):
    last = list(ACTIVATIONS).index(activation) % 2 == 0
    more = {"has_bias": True, "has_residual": True, "activation": activation, "channels_last": last}
    request = asked("n2 c4 o6 x4x5 k2x3 s2x1 p1 g2", direction, torch.bfloat16 if last else torch.float32, **more)
    interpreted(check, "direct", request, reals)


@directions
@pytest.mark.parametrize("layout", [spread, channels_last, channels_inside, far])
def test_tensors_that_lie_otherwise(layout, direction, interpreted):
    for last in (False, True):
        request = asked("n2 c2 o2 x4x5 k3x2 p1 s1x2", direction, channels_last=last)
        interpreted(check, "direct", request, layout=layout)


@maps
@pytest.mark.parametrize("layout", [spread, expanded])
def test_a_bias_that_lies_otherwise(layout, direction, interpreted):
    for last, text in ((False, "n2 c4 o6 x4x5 k2x3 s2x1 p1 g2"), (True, "n2 c5 o4 x6x6 k1x1")):
        request = asked(text, direction, has_bias=True, channels_last=last)
        interpreted(check, name(text), request, of_bias=layout)


@directions
@formats
def test_nothing_outside_is_touched(direction, last, interpreted):
    for text in ("n2 c8 o6 x5x4 k3x3 s2 p1", "n1 c3 o17 x7 k2 p0:3", "n2 c5 o4 x6x6 k1x1"):
        interpreted(check_guarded, name(text), asked(text, direction, has_bias=True, channels_last=last))


@formats
def test_the_gradient_of_a_bias_is_made_beside_that_of_the_weight(last, interpreted):
    for dtype in (torch.float32, torch.bfloat16):
        request = asked("n3 c4 o6 x4x5 k2x3 p1 g2", Direction.GRAD_WEIGHT, dtype, has_bias=True, channels_last=last)
        interpreted(check, "direct", request)
        interpreted(check, "direct", request, reals)


@formats
def test_a_single_part_is_written_where_it_belongs(last, interpreted):
    for text, room in ((CHANNELS, 0), ("n3 c4 o6 x9x8 k2x3 p1 g2", 0), ("n2 c3 o5 x4x5x3 k2x1x2 p1", 0)):
        request = asked(text, Direction.GRAD_WEIGHT, channels_last=last, max_workspace=room)
        interpreted(check, "direct", request, layout=LAYOUTS[last])
    request = asked(
        "n3 c4 o6 x9x8 k2x3 p1 g2", Direction.GRAD_WEIGHT, torch.bfloat16, channels_last=last, max_workspace=0
    )
    interpreted(check, "direct", request, reals, LAYOUTS[last])


@maps
def test_a_weight_that_stays_is_turned_once(direction, interpreted):
    for text in ("n2 c4 o6 x5x4 k3x3 p1", "n2 c4 o6 x5x4 k3x3 p1 mreflect"):
        interpreted(check_packed, "direct", asked(text, direction, torch.bfloat16))


@directions
def test_a_missing_tap_is_seen(direction, interpreted):
    with pytest.raises(AssertionError, match="elements differ"):
        interpreted(check, "direct", asked(CASES["groups"], direction), blind=True)


def test_padding_is_multiplied_and_a_nan_reaches_its_windows_alone(interpreted):
    request = asked("n1 c1 o1 x1x5 k1x3 p0x1", Direction.FORWARD)
    x, w = torch.zeros(1, 1, 1, 5), torch.ones(1, 1, 1, 3)
    x[..., 0] = math.nan
    made = interpreted(result, "direct", request, x, w)
    assert made.isnan().flatten().tolist() == [True, True, False, False, False]
    w[..., 0] = math.inf
    made = interpreted(result, "direct", request, torch.ones(1, 1, 1, 5), w)
    assert made.flatten().tolist()[1:] == [math.inf] * 4
    assert made[..., 0].isnan()


@pytest.mark.parametrize("slope", [0.1, 0.0, -0.0, -0.3, 7.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_slope_gives_what_torch_gives(slope, dtype, interpreted):
    edges = torch.tensor([math.nan, math.inf, -math.inf, -1e30], dtype=dtype)
    x, w = torch.cat([edges, torch.randn(60, dtype=dtype)]).view(1, 1, 8, 8), torch.ones(1, 1, 1, 1, dtype=dtype)
    request = asked("n1 c1 o1 x8x8 k1x1", Direction.FORWARD, dtype, activation=f"leaky_relu({slope})")
    made = interpreted(result, "pointwise", request, x, w)
    torch.testing.assert_close(made, F.leaky_relu(x, slope), rtol=0, atol=0, equal_nan=True)


def test_relu_keeps_a_nan(interpreted):
    x, w = torch.full((1, 1, 1, 2), math.nan), torch.ones(1, 1, 1, 1)
    for activation in ("relu", "relu6", "leaky_relu"):
        request = asked("n1 c1 o1 x1x2 k1x1", Direction.FORWARD, activation=activation)
        assert interpreted(result, "pointwise", request, x, w).isnan().all()
