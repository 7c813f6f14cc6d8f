"""torch's switch for TF32 is part of what is asked, and may be thrown between two calls that are alike otherwise."""

import pytest
import torch

import plainconv
from plainconv import ops
from plainconv.problem import ConvProblem, Direction, Request

SWITCH = torch.backends.cudnn.conv


@pytest.fixture
def asked(monkeypatch):
    """Whether each plan that was made was one for TF32; the switch is one for tensors on the CPU, too."""
    seen, real = [], ops.plan
    monkeypatch.setattr(ops, "plan", lambda request, name: seen.append(request.tf32) or real(request, name))
    monkeypatch.setattr(ops, "_has_switch", lambda tensor: tensor.dtype is torch.float32)
    plainconv.plan.forget()
    before = SWITCH.fp32_precision
    SWITCH.fp32_precision = "ieee"
    yield seen
    SWITCH.fp32_precision = before
    plainconv.plan.forget()


def test_it_is_looked_at_in_every_call(asked):
    x, w = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)
    told = []
    for precision in ("ieee", "tf32", "ieee", "tf32"):
        SWITCH.fp32_precision = precision
        for _ in range(2):
            plainconv.conv2d(x, w)
            told.append(len(asked))
    assert asked == [False, True]
    assert told == [1, 1, 2, 2, 2, 2, 2, 2]
    plainconv.conv2d(x, w, precision="highest")
    assert asked[2:] == [False]


def test_it_is_looked_at_for_gradients_and_weights_that_stay(asked):
    x, w = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)
    layer = plainconv.prepack(plainconv.nn.Conv2d(2, 3, 3).requires_grad_(False), (1, 2, 5, 5))
    asks, weighs = x.clone().requires_grad_(), w.clone().requires_grad_()
    for call in (lambda: layer(x), lambda: plainconv.conv2d(asks, weighs).sum().backward()):
        SWITCH.fp32_precision = "ieee"
        call()
        assert set(asked) == {False}
        SWITCH.fp32_precision = "tf32"
        asked.clear()
        call()
        assert set(asked) == {True}
        asked[:] = [False]


def test_it_is_for_float32_on_a_gpu_alone():
    problem = ConvProblem.parse("n1 c2 o3 x8x8 k3x3")
    assert "as TF32" in str(Request(problem, Direction.FORWARD, torch.float32, "cuda", tf32=True))
    before = SWITCH.fp32_precision
    try:
        SWITCH.fp32_precision = "tf32"
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert not ops._rounds(torch.empty(1, dtype=dtype))
    finally:
        SWITCH.fp32_precision = before
