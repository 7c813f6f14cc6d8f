"""How the gradient for a weight is cut on a GPU, and which places simply go on; nothing is launched."""

import math

import pytest
import torch
from interpreted import asked

from plainconv.gpu import matrices, parts, taps
from plainconv.gpu.launch import strides, tiles
from plainconv.problem import FORMATS, ConvProblem, Direction

LAYERS = (
    "n8 c128 o128 x28x28 k3x3 p1",
    "n32 c256 o256 x56x56 k3x3 p1",
    "n1 c512 o512 x7x7 k3x3 p1",
    "n8 c64 o64 x56x56 k3x3 p1 g64",
    "n8 c3 o16 x64x64 k5x5 p2",
    "n1 c16 o16 x1 k1",
)


def cut(text, most=1 << 20, dtype=torch.bfloat16, last=True):
    request = asked(text, Direction.GRAD_WEIGHT, dtype, channels_last=last)
    of = taps.taps_of if min(request.problem.group_in, request.problem.group_out) <= 8 else matrices.split_of
    return of(request, most)


def steps_of(problem, found):
    """Of a sum for each tap, whose tiles have several rows."""
    *sides, high, wide = problem.out
    return tiles(problem.batch * math.prod(sides) * tiles(high, found.rows) * wide, found.tile.places)


@pytest.mark.parametrize("text", LAYERS)
def test_no_part_is_empty_and_none_is_too_many(text):
    for most in (1, 3, 1 << 20):
        found = cut(text, most)
        assert 1 <= found.parts <= most
        problem = ConvProblem.parse(text)
        places = problem.batch * math.prod(problem.out)
        steps = tiles(places, found.depth) if isinstance(found, matrices.Split) else steps_of(problem, found)
        assert (found.parts - 1) * found.part < steps <= found.parts * found.part


def test_parts_keep_processors_busy_in_whole_rounds():
    for text in LAYERS[:2]:
        found = cut(text)
        rounds = found.tiles * found.parts / parts.PROCESSORS
        assert rounds / math.ceil(rounds) > 0.9
    assert cut(LAYERS[1]).parts * cut(LAYERS[1]).tiles < 4 * parts.PROCESSORS, "all of them are written, and read"
    assert cut(LAYERS[5]).parts == 1, "nothing to cut"


def test_taps_are_beside_each_other_where_channels_are_few():
    for text, beside in (
        ("n8 c64 o64 x28x28 k3x3", 2),  # 10 of 9
        ("n8 c32 o32 x28x28 k5x5", 4),  # 28 of 25
        ("n8 c32 o32 x28x28 k1x1", 1),
        ("n8 c64 o64 x28 k3", 1),  # 4 of 3 would be too many
        ("n8 c200 o64 x28x28 k3x3", 1),
    ):
        assert cut(text).beside == beside
        assert cut(text).beside * cut(text).inputs <= matrices.SUMMED[2].channels


def meets(text, last, x=None, y=None):
    problem = ConvProblem.parse(text)
    lies = FORMATS[2 + problem.dims] if last else torch.contiguous_format
    made = (torch.empty(problem.shape_of(role), device="meta", memory_format=lies) for role in "xy")
    x, y = (given if given is not None else whole for given, whole in zip((x, y), made, strict=True))
    met = parts.Meeting.of(problem, strides(x.shape, x.stride()), strides(y.shape, y.stride()))
    return met.simply(problem, last, last)


def test_places_that_go_on_are_walked_in_fewer_dimensions():
    met = meets("n3 c16 o8 x5x7 k1x1", True)
    assert (met.images, met.size, met.dims, met.y_dims) == (105, (1, 1, 1), 0, 0)
    assert (met.of_x, met.of_y) == ((16, 0, 0, 0), (8, 0, 0, 0))
    met = meets("n3 c16 o8 x5x7 k1x1", False)
    assert (met.images, met.size, met.end, met.dims, met.y_dims) == (3, (1, 1, 35), (1, 1, 35), 1, 1)
    assert (met.of_x, met.of_y) == ((560, 0, 0, 1), (280, 0, 0, 1))
    for text in ("n3 c16 o8 x5x7 k1x1 p1", "n3 c16 o8 x5x7 k1x1 s2", "n3 c16 o8 x5x7 k3x3"):
        met = meets(text, True)
        assert (met.images, met.dims, met.y_dims) == (3, 2, 0)
        assert meets(text, False).y_dims == 1


def test_places_that_lie_apart_are_not():
    wide = torch.empty(3, 8, 5, 9, device="meta")[..., :7]
    assert meets("n3 c16 o8 x5x7 k1x1", False, y=wide).y_dims == 2
    every = torch.empty(3, 5, 7, 20, device="meta").permute(0, 3, 1, 2)[:, :16]
    assert meets("n3 c16 o8 x5x7 k1x1", True, x=every).of_x == (20, 0, 0, 0)


@pytest.mark.parametrize("last", [False, True])
def test_sizes_of_one_are_walked_like_all_others(last):
    for text in ("n1 c16 o8 x5x7 k1x1", "n3 c16 o8 x1x7 k1x1", "n3 c16 o8 x5x1 k1x1", "n1 c16 o8 x1x1 k1x1"):
        assert (meets(text, last).dims, meets(text, last).y_dims) == ((0, 0) if last else (1, 1))
