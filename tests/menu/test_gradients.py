"""Derivatives through the engine itself, in float64, and training that repeats to the bit."""

import pytest
import torch
from checks import channels_last, reals
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import plainconv
from plainconv import plan as plans
from plainconv.menu import fft, fourier
from plainconv.problem import Direction

CONV = {1: plainconv.conv1d, 2: plainconv.conv2d, 3: plainconv.conv3d}
TRANSPOSED = {1: plainconv.conv_transpose1d, 2: plainconv.conv_transpose2d, 3: plainconv.conv_transpose3d}
# input, weight, options
CASES = {
    "direct": [
        ((2, 4, 6, 5), (6, 2, 3, 2), {"stride": (2, 1), "padding": 1, "groups": 2}),
        ((1, 3, 9), (4, 3, 3), {"dilation": 2, "padding": 2, "padding_mode": "reflect"}),
        ((1, 2, 4, 4, 5), (3, 2, 2, 3, 3), {"stride": 2, "padding": (1, 1, 2)}),
    ],
    "pointwise": [((2, 4, 5, 4), (6, 4, 1, 1), {}), ((1, 4, 7), (6, 2, 1), {"stride": 2, "groups": 2})],
    "narrow": [
        ((2, 3, 6, 7), (4, 3, 3, 3), {"padding": 1, "padding_mode": "circular"}),
        ((1, 2, 17), (2, 2, 3), {"stride": 2}),
        ((1, 2, 3, 4, 5), (2, 2, 3, 3, 3), {"padding": 1}),
    ],
    "depthwise": [
        ((2, 3, 6, 7), (3, 1, 3, 3), {"padding": 1, "groups": 3}),
        ((1, 3, 14), (3, 1, 4), {"stride": 2, "padding": (3,), "groups": 3}),
        ((1, 2, 3, 5, 4), (2, 1, 3, 3, 3), {"padding": 1, "groups": 2, "padding_mode": "replicate"}),
    ],
    "winograd": [
        ((2, 4, 6, 5), (6, 2, 3, 3), {"padding": 1, "groups": 2}),
        ((1, 3, 9), (4, 3, 3), {"padding": 2, "padding_mode": "reflect"}),
        ((1, 2, 3, 4, 5), (3, 2, 1, 3, 3), {"padding": (0, 1, 2)}),
        ((1, 3, 8, 9), (4, 3, 4, 3), {"stride": 2, "padding": 1}),
        ((2, 3, 15), (4, 3, 3), {"stride": 2, "padding": 2, "padding_mode": "circular"}),
    ],
    "fft": [
        ((1, 3, 9, 8), (2, 3, 5, 5), {"padding": 2}),
        ((1, 4, 23), (6, 2, 7), {"padding": 3, "groups": 2}),
        ((1, 2, 2, 7, 8), (2, 2, 1, 3, 5), {"padding": (0, 1, 2)}),
    ],
}
OF_TRANSPOSED = {
    "direct": [
        ((2, 4, *spatial), (4, 3, *kernel), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2})
        for spatial, kernel in (((3,), (3,)), ((3, 4), (3, 2)), ((3, 4, 2), (3, 2, 4)))
    ],
    "pointwise": [((2, 4, 3, 4), (4, 3, 1, 1), {"groups": 2})],
    "narrow": [
        ((1, 3, 4, 5), (3, 2, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
        ((1, 2, 9), (2, 3, 4), {"stride": 3}),
    ],
    "depthwise": [
        ((2, 3, 4, 5), (3, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 3}),
        ((1, 2, 3, 4, 3), (2, 1, 2, 3, 3), {"groups": 2}),
    ],
    "winograd": [
        ((2, 4, 5, 4), (4, 3, 3, 3), {"padding": 1, "groups": 2}),
        ((1, 3, 9), (3, 4, 3), {}),
        ((1, 2, 3, 4, 3), (2, 3, 3, 3, 3), {"padding": 1}),
    ],
    "fft": [((1, 3, 7, 6), (3, 2, 5, 5), {"padding": 2}), ((1, 4, 19), (4, 2, 7), {"groups": 2})],
}


def listed(cases):
    """Those of three dimensions that compile most wait for when there is time."""
    return [
        pytest.param(
            *(name, *case),
            id=f"{name}{len(case[0]) - 2}d",
            marks=[pytest.mark.slow] if len(case[0]) == 5 and name in ("winograd", "fft") else [],
        )
        for name, some in cases.items()
        for case in some
    ]


EACH, EACH_TRANSPOSED = listed(CASES), listed(OF_TRANSPOSED)


@pytest.fixture
def on_the_engine(monkeypatch):
    """Problems as small as these are tensor operations to `fft`: it uses the engine wherever that can serve.

    What comes back are the directions in which it did.
    """
    seen, bind = [], fourier.bind

    def served(request):
        able = fourier.why_not(request) is None
        return (fourier.cost(request), fourier) if able else (fft._cost_in_tensors(request), None)

    def bound(request, *how):
        seen.append(request.direction)
        return bind(request, *how)

    plans.forget()
    monkeypatch.setattr(fft, "_served", served)
    monkeypatch.setattr(fourier, "bind", bound)
    yield seen
    plans.forget()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("name", "x", "w", "options"), EACH)
def test_gradcheck(name, x, w, options, last, on_the_engine):
    if last and len(x) == 3:
        pytest.skip("no format of one dimension")
    if last and name == "narrow":
        # A vector holds a few whole groups, or is a part of one.
        channels = 4 * options.get("groups", 1)
        x, w = (x[0], channels, *x[2:]), (channels, 4, *w[2:])
    first, second, bias = (reals(shape, torch.float64, seed) for seed, shape in enumerate((x, w, w[:1])))
    first = channels_last(first) if last else first
    for tensor in (first, second, bias):
        tensor.requires_grad_()
    if (name == "winograd" and options.get("stride") == 2) or (name == "narrow" and last):
        second.requires_grad_(False)  # that gradient is refused

    def function(*tensors):
        return CONV[len(x) - 2](*tensors, **options, algorithm=name)

    assert gradcheck(function, (first, second, bias), check_forward_ad=True, check_batched_grad=False)
    assert gradgradcheck(function, (first, second, bias), check_fwd_over_rev=True, fast_mode=True)
    assert name != "fft" or set(on_the_engine) == {Direction.FORWARD, Direction.GRAD_INPUT}


@pytest.mark.parametrize(("name", "x", "w", "options"), EACH_TRANSPOSED)
def test_gradcheck_of_the_transposed(name, x, w, options, on_the_engine):
    sizes = (x, w, (w[1] * options.get("groups", 1),))
    tensors = tuple(reals(shape, torch.float64, seed).requires_grad_() for seed, shape in enumerate(sizes))

    def function(x, w, b):
        return TRANSPOSED[x.dim() - 2](x, w, b, **options, algorithm=name)

    assert gradcheck(function, tensors, check_forward_ad=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, fast_mode=True)
    assert name != "fft" or set(on_the_engine) == {Direction.FORWARD, Direction.GRAD_INPUT}


@pytest.mark.parametrize(("name", "x", "w", "options"), EACH)
def test_gradients_of_no_images(name, x, w, options):
    """Those of the weight and the bias are zeros, not what the memory held."""
    second, bias = (reals(shape, torch.float32, 0).requires_grad_() for shape in (w, w[:1]))
    if name == "winograd" and options.get("stride") == 2:
        second.requires_grad_(False)  # that gradient is refused
    first = torch.empty(0, *x[1:], requires_grad=True)
    CONV[len(x) - 2](first, second, bias, **options, algorithm=name).sum().backward()
    assert first.grad.shape == first.shape
    assert not bias.grad.any()
    assert second.grad is None or not second.grad.any()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_training_twice_gives_the_same_weights_to_the_bit(last):
    def weights():
        torch.manual_seed(3)
        net = nn.Sequential(
            plainconv.nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            plainconv.nn.Conv2d(16, 16, 3, padding=1, groups=16, stride=2),
            nn.ReLU(),
            plainconv.nn.Conv2d(16, 24, 1),
            nn.ReLU(),
            plainconv.nn.ConvTranspose2d(24, 5, 4, stride=2, padding=1),
        )
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(4):
            images = torch.randn(6, 3, 30, 34)
            images = channels_last(images) if last else images
            optimizer.zero_grad()
            (net(images) - 1).square().mean().backward()
            optimizer.step()
        return [parameter.detach().clone() for parameter in net.parameters()]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = weights(), weights()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(parameter.isnan().any() for parameter in first)
