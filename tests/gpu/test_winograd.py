"""winograd on a GPU, in the interpreter: every border, rank, format and type, what is fused, and how it is cut."""

import pytest
import torch
from checks import ACTIVATIONS, BY_NAME, channels_inside, channels_last, expanded, reals, spread
from interpreted import asked, check, check_guarded, check_packed, far

from plainconv.gpu import launch
from plainconv.menu import tiled
from plainconv.menu.base import carve, sum_error, workspace_bytes
from plainconv.plan import AlgorithmRefused, ask, plan
from plainconv.problem import Direction

directions = pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
maps = pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=["forward", "grad_input"])
formats = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
LAYOUTS = {False: None, True: channels_last}
CHUNKS = "n2 c2 o3 x300 k3 p1"  # 150 tiles
WAYS = {
    "3x3": "n2 c3 o4 x9x8 k3x3 p1",
    "a line": "n2 c5 o3 x13 k3 p1",
    "two taps": "n1 c3 o2 x7x5 k2x3 p0:1x2",
    "groups": "n2 c4 o6 x6x5 k1x3 p0x1 g2",
    "many tiles and channels": "n2 c20 o18 x2x23 k1x2 p0x1",
    "a depth": "n1 c2 o3 x4x3x6 k2x1x3 p1x0x1",
    "a depth with a stride": "n1 c4 o2 x9x3x6 k2x1x3 s2x1x1 d3x1x1 p2:1x0x1 g2",
    "padding wider than the input": "n1 c2 o2 x2x3 k1x3 p5x4",
    "negative padding": "n2 c2 o3 x9x9 k3x1 p-2:1x0:-3",
    "reflect": "n1 c2 o3 x6x7 k1x3 p0x3:2 mreflect",
    "replicate": "n1 c2 o2 x5x3 k3x1 p5:1x0 mreplicate",
    "circular": "n1 c2 o2 x5x4 k1x3 p0x4:1 mcircular",
    "a depth, circular, cropped": "n1 c2 o2 x4x4x6 k3x1x2 p2:1x0x-1:2 mcircular",
}
# Each case in one direction and format, in turn; in the others it is slow.
EVERY = [
    pytest.param(text, direction, last, marks=() if (i + 2 * j + k) % 6 in (0, 3) else pytest.mark.slow)
    for i, text in enumerate(WAYS.values())
    for j, direction in enumerate(Direction)
    for k, last in enumerate((False, True))
]


@pytest.mark.parametrize(("text", "direction", "last"), EVERY)
def test_every_border_and_rank(text, direction, last, interpreted):
    request = asked(text, direction, channels_last=last)
    interpreted(check, "winograd", request, reals, LAYOUTS[last], small=True)


@directions
@formats
def test_float64(direction, last, interpreted):
    request = asked("n2 c4 o8 x5x6 k1x3 p0x1 g2", direction, torch.float64, channels_last=last)
    interpreted(check, "winograd", request, reals, LAYOUTS[last])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_fused(activation, interpreted):
    number = list(ACTIVATIONS).index(activation)
    last, direction = number % 2 == 0, (Direction.FORWARD, Direction.GRAD_INPUT)[number // 2 % 2]
    more = {"has_bias": True, "has_residual": True, "activation": activation, "channels_last": last}
    interpreted(check, "winograd", asked("n2 c4 o6 x4x5 k1x2 p0x1 g2", direction, **more), reals, LAYOUTS[last])


@directions
@pytest.mark.parametrize("layout", [spread, channels_last, channels_inside, far])
def test_tensors_that_lie_otherwise(layout, direction, interpreted):
    last = layout in (spread, channels_inside)  # of the result
    request = asked("n2 c2 o2 x4x5 k1x3 p0x1 g2", direction, channels_last=last)
    interpreted(check, "winograd", request, reals, layout)


@maps
@pytest.mark.parametrize("layout", [spread, expanded])
def test_a_bias_that_lies_otherwise(layout, direction, interpreted):
    request = asked("n2 c4 o4 x4x5 k1x3 p0x1", direction, has_bias=True)
    interpreted(check, "winograd", request, reals, of_bias=layout)


@directions
@formats
def test_nothing_outside_is_touched(direction, last, interpreted):
    for text in ("n1 c8 o6 x5x4 k1x3 p0x1", "n1 c3 o17 x7 k2 p0:3", "n1 c2 o2 x3x2x3 k2x3x1 p1x2x0")[last:]:
        interpreted(check_guarded, "winograd", asked(text, direction, has_bias=True, channels_last=last))


@formats
def test_the_gradient_of_a_bias_is_made_beside_that_of_the_weight(last, interpreted):
    request = asked("n3 c4 o6 x4x5 k1x3 p0x1 g2", Direction.GRAD_WEIGHT, has_bias=True, channels_last=last)
    interpreted(check, "winograd", request, reals)


@directions
def test_in_as_many_chunks_as_there_is_room_for(direction, interpreted):
    whole = asked(CHUNKS, direction)
    request = asked(CHUNKS, direction, max_workspace=BY_NAME["winograd"].cost(whole).workspace // 2)
    assert tiled.cut_of(whole).counts == [150]
    assert tiled.cut_of(request).counts == [64, 64, 22]
    assert BY_NAME["winograd"].cost(request).workspace <= request.max_workspace
    interpreted(check, "winograd", request, reals)


@directions
def test_no_images(direction, interpreted):
    interpreted(check, "winograd", asked("n0 c2 o3 x5x6 k3x3 p1", direction, has_bias=True))


@maps
def test_a_weight_that_stays_is_transformed_once(direction, interpreted):
    for text in ("n2 c4 o6 x5x4 k1x3 p0x1", "n2 c4 o6 x5x4 k1x3 p0x1 mreflect"):
        interpreted(check_packed, "winograd", asked(text, direction))


@directions
def test_a_missing_tap_is_seen(direction, interpreted):
    with pytest.raises(AssertionError, match="elements beyond the stated error"):
        interpreted(check, "winograd", asked(WAYS["a line"], direction), reals, blind=True)


@directions
def test_highest_makes_smaller_tiles_whose_error_is_that_of_a_plain_sum(direction, interpreted):
    text, error = "n1 c16 o5 x29 k3 p1", BY_NAME["winograd"].error
    high, highest = (asked(text, direction, precision=precision) for precision in ("high", "highest"))
    assert error(highest) <= sum_error(highest) < error(high)
    assert (tiled.cut_of(high).tiles, tiled.cut_of(highest).tiles) == ((1, 8), (1, 15))
    interpreted(check, "winograd", highest, reals)


def test_highest_refuses_what_may_be_less_exact_than_a_plain_sum(monkeypatch):
    monkeypatch.setattr(launch, "why_not", lambda gpu: None)
    for text, directions in (
        ("n8 c64 o64 x28x28 k3x3 p1", [Direction.FORWARD, Direction.GRAD_INPUT]),
        ("n8 c64 o64 x28x28 k2x2 p1", []),
    ):
        asked_for = [asked(text, direction, precision="highest") for direction in Direction]
        exact = [one.direction for one in asked_for if BY_NAME["winograd"].error(one) <= sum_error(one)]
        assert exact == directions
        for one in asked_for:
            if one.direction not in directions:
                with pytest.raises(AlgorithmRefused, match="times that of a plain sum"):
                    plan(one, "winograd")


def test_sums_of_every_chunk_begin_where_kernels_expect_them():
    request = asked("n2 c3 o3 x300 k3 p1", Direction.GRAD_WEIGHT, max_workspace=0)
    rooms = tiled._rooms(request)
    _, _, sums, _ = carve(torch.empty(workspace_bytes(rooms), dtype=torch.uint8), rooms)
    assert len(sums) > 1
    assert all(row.data_ptr() % 16 == 0 for row in sums)


# -- what it says of itself ------------------------------------------------------------------------------------------


def test_what_is_refused_is_said(monkeypatch):
    monkeypatch.setattr(launch, "why_not", lambda gpu: None)
    for text, more, words in [
        ("n1 c2 o2 x8x8 k3x3", {"tf32": True}, "float32 may be rounded to TF32 here"),
        ("n1 c2 o2 x8x8 k3x3", {"dtype": torch.bfloat16}, "bfloat16 has none to lose"),
        ("n1 c2 o2 x8x8 k3x3", {"dtype": torch.int32}, "not int32"),
        ("n1 c2 o2 x8x8 k3x3 s2", {}, "without stride and dilation"),
        ("n1 c2 o2 x8x8 k3x3 d2", {}, "without stride and dilation"),
        ("n1 c2 o2 x8x8 k4x3", {}, "the kernel is 4x3"),
        ("n1 c2 o2 x8x8x8 k3x1x1", {}, "the kernel is 3x1x1"),
    ]:
        assert words in BY_NAME["winograd"].why_not(asked(text, Direction.FORWARD, **more))


@directions
def test_auto_takes_it_where_it_has_enough_fewer_products(direction, monkeypatch):
    monkeypatch.setattr(launch, "why_not", lambda gpu: None)
    wide, narrow, tiny = "n32 c256 o256 x28x28 k3x3 p1", "n32 c16 o16 x56x56 k3x3 p1", "n1 c256 o256 x7x7 k3x3 p1"
    chosen = {text: plan(asked(text, direction)).algorithm.name for text in (wide, narrow, tiny)}
    assert chosen[wide] == "winograd"
    assert "winograd" not in (chosen[narrow], chosen[tiny])
    assert plan(asked(wide, direction, tf32=True)).algorithm.name != "winograd"
    costs = {verdict.algorithm.name: verdict.cost for verdict in ask(asked(wide, direction))}
    assert 3.9 < costs["direct"].multiplies / costs["winograd"].multiplies <= 4


@directions
def test_large_images_are_cut_to_what_there_is_room_for(direction):
    for text in ("n1 c64 o64 x2160x3840 k3x3 p1", "n64 c64 o64 x16x112x112 k3x3x3 p1"):
        cost = BY_NAME["winograd"].cost(asked(text, direction))
        assert tiled.MOST_BYTES // 2 < cost.workspace < 2 * tiled.MOST_BYTES
