"""The gradient for the input of a padding mode: by a frame and as a whole, and what a frame takes."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from checks import BY_NAME, check, compare, given, integers, product_of_lines, reals, refuses, request
from guarded import guarded, guarded_inside

from plainconv.menu import fold, winograd
from plainconv.menu.base import Tensors
from plainconv.problem import ConvProblem, Direction
from plainconv.remember import forget

FOLDING = ("narrow", "depthwise", "separable", "direct", "pointwise", "winograd")
TEXTS = {
    "reflect": "n2 c3 o4 x19x23 k3x3 p1 mreflect",
    "wide reflect, one side": "n1 c2 o3 x18x17 k5x5 p4:0x0:3 mreflect",
    "replicate": "n2 c4 o6 x13x16 k3x3 p2:3x4:1 g2 mreplicate",
    "circular": "n1 c3 o2 x14x15 k3x3 p3:1x2:4 mcircular",
    "stride and dilation": "n2 c2 o3 x20x21 k3x2 s2x3 d2x1 p3x2 mreflect",
    "stride over the kernel": "n1 c2 o2 x17x16 k2x2 s3 p2 mcircular",
    "cropped too": "n1 c3 o3 x16x18 k3x3 p-2:3x2:-1 mreflect",
    "depthwise": "n2 c6 o6 x17x19 k3x3 p1 g6 mreflect",
    "1-D": "n3 c4 o5 x40 k7 p3 mreflect",
    "3-D": "n1 c2 o3 x9x10x11 k3x3x3 p1x1:2x2 mreplicate",
    "one tap": "n2 c4 o3 x12x11 k1x1 p2 mcircular",
}
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["frame", "whole"])
def way(request, monkeypatch):
    """Only this way is known."""
    ways = fold._ways
    monkeypatch.setattr(fold, "_ways", lambda asked: ways(asked)[:1] if request.param == "frame" else ways(asked)[-1:])
    forget()
    yield request.param
    forget()


def asked_for(name, text, dtype, **more):
    asked = request(ConvProblem.parse(text), Direction.GRAD_INPUT, dtype, **more)
    if refuses(BY_NAME[name], asked):
        pytest.skip("refused")
    return asked


@pytest.mark.parametrize("name", FOLDING)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=["float32", "bfloat16", "float16"])
def test_both_ways(way, name, text, dtype):
    last = dtype is not torch.float16
    asked = asked_for(name, text, dtype)
    check(BY_NAME[name], asked, reals)
    full = dataclasses.replace(asked, has_bias=True, has_residual=True, activation="relu", channels_last=last)
    if not refuses(BY_NAME[name], full):
        check(BY_NAME[name], full, integers)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_nothing_outside_is_touched(way, text, dtype, last, at_end):
    """Every tensor and the workspace, right before or right behind memory that faults."""
    asked = request(ConvProblem.parse(text), Direction.GRAD_INPUT, dtype, channels_last=last, has_bias=True, threads=2)
    place = partial(guarded_inside, channels_last=asked.channels_last, at_end=at_end)
    for algorithm in map(BY_NAME.get, FOLDING):
        if refuses(algorithm, asked):
            continue
        first, second, bias, _ = given(asked, reals)
        second = product_of_lines(second) if algorithm.name == "separable" else second
        tensors = Tensors(*map(place, (first, second, bias)))
        out = place(torch.full(asked.problem.input_shape, torch.nan, dtype=dtype))
        workspace = guarded(torch.full((algorithm.cost(asked).workspace,), 0xFF, dtype=torch.uint8), at_end=at_end)
        algorithm.run(asked, tensors, out, workspace)
        compare(algorithm, asked, out, *tensors, to_the_bit=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["direct", "winograd"])
def test_both_ways_with_a_weight_that_stays(way, name, dtype):
    def run(asked, tensors, out, workspace):
        BY_NAME[name].pack(asked, tensors, {})(tensors, out, workspace)

    asked = asked_for(name, TEXTS["reflect"], dtype, packed=True, has_bias=True)
    check(dataclasses.replace(BY_NAME[name], run=run), asked, reals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("text", [TEXTS["reflect"], TEXTS["circular"], TEXTS["3-D"]])
def test_a_slab_that_is_missing_is_seen(monkeypatch, dtype, text):
    """The checks above can fail: each slab of a frame is needed."""
    ways, asked = fold._ways, asked_for("direct", text, dtype)
    slabs = [(i, j) for i, frame in enumerate(ways(asked)[0].frames) for j in range(len(frame.slabs))]
    assert len(slabs) == 2 * asked.problem.dims
    for i, j in slabs:

        def without(request, i=i, j=j):
            frames = list(ways(request)[0].frames)
            frames[i] = frames[i]._replace(slabs=frames[i].slabs[:j] + frames[i].slabs[j + 1 :])
            return (ways(request)[0]._replace(frames=tuple(frames)),)

        monkeypatch.setattr(fold, "_ways", without)
        forget()
        with pytest.raises(AssertionError, match=r"elements (differ|beyond)"):
            check(BY_NAME["direct"], asked, integers)
    forget()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_padded_copy_of_a_large_gradient(dtype, last):
    """The workspace is a part of the gradient; a padded one, in float32, would be more than all of it."""
    problem = ConvProblem.parse("n8 c64 o64 x112x112 k3x3 p1 mreflect")
    asked = request(problem, Direction.GRAD_INPUT, dtype, channels_last=last)
    size = math.prod(problem.input_shape) * 4
    assert BY_NAME["direct"].cost(asked).workspace < size / 4


def test_the_error_is_that_of_what_is_made():
    """winograd's forms are those of the slabs, or of the padded picture."""
    asked = request(ConvProblem.parse("n1 c64 o64 x32x32 k3x3 p1 mreflect"), Direction.GRAD_INPUT, torch.float32)
    exact = {max(winograd._error(each) for each in way.requests) for way in fold._ways(asked)}
    assert BY_NAME["winograd"].error(asked) in exact


def test_a_weight_that_stays_is_widened_once():
    made = {}
    for size in (40, 41, 42):
        problem = ConvProblem.parse(f"n1 c8 o8 x{size}x{size} k3x3 p1 mreflect")
        asked = request(problem, Direction.GRAD_INPUT, torch.bfloat16, packed=True)
        BY_NAME["direct"].pack(asked, given(asked, integers, 0), made)
    assert sum(tensor.dtype is torch.float32 for tensor in made.values()) == 1


@pytest.mark.parametrize(
    ("name", "dtype", "allowed"),
    [("winograd", torch.float32, 12 << 20), ("direct", torch.bfloat16, 4 << 20)],
    ids=["winograd", "direct"],
)
def test_the_whole_is_made_only_where_its_memory_is_allowed(name, dtype, allowed):
    """A weight so large that to read it for each slab takes longer."""
    free = request(ConvProblem.parse("n8 c256 o256 x14x14 k3x3 p1 mreflect"), Direction.GRAD_INPUT, dtype, threads=2)
    tight = dataclasses.replace(free, max_workspace=allowed)
    assert BY_NAME[name].cost(tight).workspace <= allowed < BY_NAME[name].cost(free).workspace
    assert BY_NAME[name].cost(free).seconds < BY_NAME[name].cost(tight).seconds
    check(BY_NAME[name], tight, integers)
