"""narrow and depthwise on a GPU, in the interpreter: every border, stride, format and type, and what is fused."""

import pytest
import torch
from checks import ACTIVATIONS, CASES, channels_inside, channels_last, expanded, integers, reals, spread
from interpreted import asked, check, check_guarded, far, result

from plainconv.gpu import rows
from plainconv.menu.base import FLOATS
from plainconv.problem import ConvProblem, Direction

directions = pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
maps = pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=["forward", "grad_input"])
formats = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
LAYOUTS = {False: None, True: channels_last}


def name(problem: ConvProblem, direction: Direction) -> str:
    summed = problem.group_out if direction is Direction.GRAD_INPUT else problem.group_in
    return "depthwise" if summed == 1 and problem.groups > 1 else "narrow"


def check_both(interpreted, text, direction, *rest, last=False, small=False, **more):
    request = asked(text, direction, channels_last=last, **more)
    interpreted(check, name(request.problem, direction), request, *rest, layout=LAYOUTS[last], small=small)


MORE = ("n2 c6 o3 x9x8 k4x3 s2x3 d3x2 p4x2 g3", "n1 c2 o2 x23x5 k9x2 d2x1 p8x1 g2")
TILES = (
    "n2 c12 o12 x9x7 k3x3 p1 g12",
    "n2 c12 o3 x5x6 k3x2 s2x1 p1",
    "n1 c18 o18 x4x3 k3x3 p1 g9",
    "n3 c5 o5 x3x5x2 k2x3x1 p1x1x0 g5",
)
# Each case in one direction and format, in turn; in the others it is slow.
EVERY = [
    pytest.param(text, direction, last, marks=() if (i + 2 * j + k) % 6 in (0, 3) else pytest.mark.slow)
    for i, text in enumerate([*CASES.values(), *MORE])
    for j, direction in enumerate(Direction)
    for k, last in enumerate((False, True))
    if min(ConvProblem.parse(text).group_in, ConvProblem.parse(text).group_out) <= 8
]


@pytest.mark.parametrize(("text", "direction", "last"), EVERY)
def test_every_border_stride_and_rank(text, direction, last, interpreted):
    check_both(interpreted, text, direction, last=last)


@directions
@formats
@pytest.mark.parametrize("text", TILES)
def test_many_tiles(text, direction, last, interpreted):
    check_both(interpreted, text, direction, last=last, small=True)


@directions
@formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_types(dtype, direction, last, interpreted):
    for text in ("n2 c8 o8 x7x6 k3x3 s1x2 p1 g8", "n1 c3 o4 x7x6 k3x3 p1"):
        check_both(interpreted, text, direction, reals, last=last, dtype=dtype)


@maps
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_fused(activation, direction, interpreted):
    last = list(ACTIVATIONS).index(activation) % 2 == 0
    more = {"has_bias": True, "has_residual": True, "activation": activation}
    dtype = torch.bfloat16 if last else torch.float32
    check_both(interpreted, "n2 c4 o6 x4x5 k2x3 s2x1 p1 g2", direction, reals, last=last, dtype=dtype, **more)


@directions
@pytest.mark.parametrize("layout", [spread, channels_last, channels_inside, far])
def test_tensors_that_lie_otherwise(layout, direction, interpreted):
    for last in (False, True):
        for text in ("n2 c2 o2 x4x5 k3x2 p1 s1x2", "n2 c2 o2 x4x5 k3x2 p1 s1x2 g2"):
            request = asked(text, direction, channels_last=last)
            interpreted(check, name(request.problem, direction), request, layout=layout)


@maps
@pytest.mark.parametrize("layout", [spread, expanded])
def test_a_bias_that_lies_otherwise(layout, direction, interpreted):
    for last, text in ((False, "n2 c6 o4 x4x5 k2x3 s2x1 p1 g2"), (True, "n2 c4 o4 x6x6 k3x3 p1 g4")):
        request = asked(text, direction, has_bias=True, channels_last=last)
        interpreted(check, name(request.problem, direction), request, of_bias=layout)


@directions
@formats
def test_nothing_outside_is_touched(direction, last, interpreted):
    for text in ("n2 c8 o8 x5x4 k3x3 s2 p1 g8", "n1 c3 o17 x7 k2 p0:3", "n2 c5 o4 x6x6 k1x1"):
        request = asked(text, direction, has_bias=True, channels_last=last)
        interpreted(check_guarded, name(request.problem, direction), request)


@formats
def test_the_gradient_of_a_bias_is_made_beside_that_of_the_weight(last, interpreted):
    check_both(interpreted, "n3 c4 o4 x4x5 k2x3 p1 g4", Direction.GRAD_WEIGHT, reals, last=last, has_bias=True)


@formats
def test_a_single_part_is_written_where_it_belongs(last, interpreted):
    for text in ("n2 c6 o12 x9x8 k3x2 p1 g3", "n2 c3 o4 x20x19 k3x3 p1"):
        check_both(interpreted, text, Direction.GRAD_WEIGHT, last=last, max_workspace=0)


@maps
@formats
@pytest.mark.parametrize(
    "text", ["n1 c2 o2 x13x19 k3x11 p1x5 g2", "n1 c2 o2 x700 k9 p4 g2", "n1 c3 o7 x13x14 k11x5 p5x2"]
)
def test_long_kernels_are_cut_into_blocks(text, direction, last, interpreted):
    check_both(interpreted, text, direction, last=last)


@pytest.mark.parametrize("last", [False, True])
def test_an_infinite_number_is_seen_by_no_other_place(last, interpreted):
    """A thread loads what any of its places sees."""
    for text, stride in (("n1 c2 o2 x9x21 k3x4 p1 g2", 1), ("n1 c2 o2 x9x21 k4x9 s2 p1 g2", 2)):
        request = asked(text, Direction.FORWARD, channels_last=last)
        x, w = (integers(request.problem.shape_of(role), torch.float32, seed=0) for role in "xw")
        x[:, :, 4, 10], w[w == 0] = torch.inf, 1
        made = interpreted(result, "depthwise", request, x, w)
        torch.testing.assert_close(made, torch.nn.functional.conv2d(x, w, None, stride, 1, groups=2), rtol=0, atol=0)


def test_quotients_are_exact():
    divisors = {2**k + e for k in range(31) for e in (-1, 0, 1)} | {7, 10, 1000, 641, 2**31 - 1}
    for d in divisors - {0}:
        _, by = rows.divisor(d)
        assert by >> 5 < 1 << 32
        for m in {0, 1, d - 1, d, 2 * d - 1, 2 * d, (1 << 31) // d * d - 1, (1 << 31) - 1}:
            if m < 1 << 31:  # as `quotient` of kernels/places.py
                assert (2 * m * (by >> 5) >> 32) >> (by & 31) == m // d, (m, d)


@directions
def test_a_missing_tap_is_seen(direction, interpreted):
    for text in (CASES["depthwise"], CASES["3x3"]):
        request = asked(text, direction)
        with pytest.raises(AssertionError, match="elements differ"):
            interpreted(check, name(request.problem, direction), request, blind=True)


def test_rows_that_a_tile_has_beyond_the_last_multiply_nothing(interpreted):
    """Tiles have four rows: the result has three, and the fourth would meet the last row of x, too."""
    x, y = torch.ones(1, 1, 5, 3), torch.ones(1, 1, 3, 3)
    x[..., 4, :] = torch.inf
    request = asked("n1 c1 o1 x5x3 k3x1", Direction.GRAD_WEIGHT)
    made = interpreted(result, "narrow", request, x, y)
    assert made.flatten().tolist() == [9, 9, torch.inf]
