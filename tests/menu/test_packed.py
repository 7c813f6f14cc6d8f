"""A weight that was packed once: every algorithm that does so, held to the definition like all others."""

import dataclasses

import pytest
import torch
from checks import BY_NAME, CASES, check, given, integers, reals, refuses, request, result_of
from guarded import guarded

from plainconv.menu import ALGORITHMS, base
from plainconv.problem import ConvProblem, Direction

PACKING = [algorithm for algorithm in ALGORITHMS if algorithm.pack]
MORE = [  # channels that end within a vector, few and many tiles, one product for all images
    "n1 c33 o50 x7x7 k3x3 p1",
    "n1 c20 o200 x9x9 k3x3 p1",
    "n3 c17 o34 x20x20 k3x3 p1",
    "n2 c18 o40 x9x9 k3x3 s2 p1",
    "n3 c70 o65 x4x4 k4x4",
    "n2 c40 o33 x6x7 k1x1",
    "n1 c32 o64 x40 k3 p1",
    "n2 c8 o12 x4x6x5 k3x3x3 p1",
]
HALVES = (MORE[4], MORE[5], CASES["stride under kernel"], CASES["reflect"])


def once(algorithm, poisoned=False):
    """The same algorithm, by its pack; poisoned: what was made of the weight is all that is left of it."""

    def run(asked, tensors, out, workspace):
        made = {}
        given = tensors._replace(second=tensors.second.clone())
        call = algorithm.pack(asked, given, made)
        if made and poisoned:
            given.second.fill_(float("nan"))
        call(given, out, workspace)

    return dataclasses.replace(algorithm, run=run)


def test_some_do():
    assert {algorithm.name for algorithm in PACKING} == {"fft", "separable", "direct", "pointwise", "winograd"}


@pytest.mark.parametrize("algorithm", PACKING, ids=lambda algorithm: algorithm.name)
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=lambda d: d.value)
@pytest.mark.parametrize("text", [*CASES.values(), *MORE])
def test_every_case(algorithm, direction, text):
    kinds = [(torch.float32, direction is Direction.FORWARD)]
    if text in HALVES:
        kinds += [(torch.float64, False), (torch.float64, True)]
        kinds += [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)]
    ran = False
    for dtype, last in kinds:
        asked = request(ConvProblem.parse(text), direction, dtype, packed=True, channels_last=last, has_bias=last)
        if not refuses(algorithm, asked):
            check(once(algorithm, poisoned=True), asked, integers)
            check(once(algorithm), asked, reals)
            ran = True
    if not ran:
        pytest.skip("refused")


@pytest.mark.parametrize("name", ["direct", "winograd"])
def test_less_memory_and_time_is_asked_for(name):
    """That of the packed weight is not the workspace's, and packing is no part of the estimate."""
    text = "n1 c256 o256 x56x56 k3x3 p1"
    plain = request(ConvProblem.parse(text), Direction.FORWARD, torch.float32, channels_last=True)
    costs = [BY_NAME[name].cost(asked) for asked in (plain, dataclasses.replace(plain, packed=True))]
    assert costs[1].workspace <= costs[0].workspace / 2
    assert costs[1].seconds < costs[0].seconds


@pytest.mark.parametrize("name", ["direct", "winograd", "fft"])
def test_calls_of_other_sizes_share_what_was_made(name):
    algorithm, made = BY_NAME[name], {}
    for text in ("n1 c32 o48 x30x30 k3x3 p1", "n2 c32 o48 x46x30 k3x3 p1"):
        asked = request(ConvProblem.parse(text), Direction.FORWARD, torch.float32, packed=True, channels_last=True)
        tensors = given(asked, reals, 0)
        made_before = dict(made)
        algorithm.pack(asked, tensors, made)
    assert len(made) == 1
    assert made == made_before


def test_calls_that_see_other_taps_do_not():
    """3x3 taps of 5x5 on both pictures, and those of the first are others than those of the second."""
    algorithm, made = BY_NAME["direct"], {}
    for text in ("n1 c8 o8 x2x2 k5x5 p4:0", "n1 c8 o8 x2x2 k5x5 p0:4", "n1 c8 o8 x2x2 k5x5 p4:0"):
        asked = request(ConvProblem.parse(text), Direction.FORWARD, torch.float32, packed=True, channels_last=True)
        shared = dataclasses.replace(
            algorithm, run=lambda asked, tensors, *rooms: algorithm.pack(asked, tensors, made)(tensors, *rooms)
        )
        check(shared, asked, integers)
    assert len(made) == 2


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=lambda d: d.value)
@pytest.mark.parametrize("name", ["direct", "pointwise", "winograd", "fft"])
def test_nothing_outside_of_what_was_made_is_touched(name, direction, at_end, monkeypatch):
    """What is kept of a weight lies right before or right behind memory that faults, written and read."""
    held = []

    def lent(shape, strides, dtype):
        held.append(guarded(torch.full(shape, 0xFF, dtype=dtype), at_end=at_end))
        return held[-1]

    monkeypatch.setattr(base, "LARGE", 0)
    monkeypatch.setattr(base, "lent", lent)
    for text in MORE:
        for dtype, last in (
            (torch.float32, False),
            (torch.float32, True),
            (torch.float64, True),
            (torch.bfloat16, True),
        ):
            asked = request(ConvProblem.parse(text), direction, dtype, packed=True, channels_last=last)
            if not refuses(BY_NAME[name], asked):
                check(once(BY_NAME[name], poisoned=True), asked, integers)
    assert held, "nothing was made"


def test_a_wrong_weight_is_seen():
    """The checks above can fail: what is packed of another weight is not what is asked for."""
    asked = request(ConvProblem.parse("n1 c8 o8 x12x12 k3x3 p1"), Direction.FORWARD, torch.float32, packed=True)
    tensors = given(asked, integers, 0)
    made = {}
    BY_NAME["winograd"].pack(asked, tensors, made)

    def run(asked, tensors, out, workspace):
        BY_NAME["winograd"].pack(asked, tensors, made)(tensors, out, workspace)

    again, plain = dataclasses.replace(BY_NAME["winograd"], run=run), dataclasses.replace(asked, packed=False)
    assert torch.equal(result_of(again, asked, *tensors), result_of(BY_NAME["winograd"], plain, *tensors))
    with pytest.raises(AssertionError, match="beyond the stated error"):
        check(again, asked, integers, seed=1)
