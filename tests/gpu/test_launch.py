"""How the GPU's launches are counted; nothing is launched."""

import dataclasses
import math

import pytest
import torch
from checks import BY_NAME

from plainconv.gpu import launch, rows
from plainconv.problem import ConvProblem, Direction, Request


def asked(text, direction=Direction.FORWARD, **more):
    return Request(ConvProblem.parse(text), direction, torch.float32, "cuda", **more)


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "text",
    ["n2 c3 o0 x8x8 k3x3", "n2 c0 o3 x8x8 k3x3", "n0 c3 o4 x8x8 k3x3", "n2 c4 o0 x8x8 k3x3 g4", "n2 c1 o0 x8 k3"],
)
def test_tensors_without_elements_have_a_cost(text, last, direction, monkeypatch):
    monkeypatch.setattr(launch, "why_not", lambda: None)
    for name in ("direct", "narrow", "depthwise"):
        request = asked(text, direction, channels_last=last)
        if BY_NAME[name].why_not(request) is None:
            assert BY_NAME[name].cost(request).seconds > 0


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT])
def test_a_dilation_along_rows_of_one_tap_means_nothing(direction):
    near = asked("n8 c64 o64 x8x16000 k1x3 d1x512 p0x512 g64", direction)
    far = asked("n8 c64 o64 x8x16000 k1x3 d512x512 p0x512 g64", direction)
    assert rows.starts_of(near) == rows.starts_of(far) == 8 * 2 * 16000


@pytest.mark.parametrize("text", ["n1 c8 o8 x4x4096 k2x3 d16384x1 p8192x1 g8", "n1 c8 o8 x40x9 k5x3 s7x1 d9x1 p4x1 g8"])
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT])
def test_what_is_counted_has_no_more_places_than_are_let_in(text, direction):
    """Rows are rounded up to the dilation, which the padded rows exceed: counts stay below 2^31."""
    request = asked(text, direction)
    problem = request.problem
    assert rows.starts_of(request) < 2 * problem.batch * max(math.prod(problem.padded), math.prod(problem.spatial))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_as_many_as_there_is_room_for(dtype):
    for text, name in (("n8 c64 o64 x28x28 k3x3 p1", "direct"), ("n8 c64 o64 x28x28 k3x3 p1 g64", "depthwise")):
        request = dataclasses.replace(asked(text, Direction.GRAD_WEIGHT), dtype=dtype)
        whole = math.prod(request.problem.weight_shape) * 4
        seen = []
        for room in (1 << 30, 5 * whole, whole, 0):
            allowed = dataclasses.replace(request, max_workspace=room)
            needs = BY_NAME[name].cost(allowed).workspace
            assert needs <= max(room, whole if dtype is torch.bfloat16 else 0)
            seen.append(needs)
        assert seen == sorted(seen, reverse=True)
        assert seen[1] == 5 * whole, "not fewer than there is room for"
        assert seen[-1] == (whole if dtype is torch.bfloat16 else 0), "a single part is the result itself"
