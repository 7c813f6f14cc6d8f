"""Derivatives through the engine itself, in float64, and training that repeats to the bit."""

import pytest
import torch
from checks import channels_last, reals
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import plainconv

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
    ],
}
EACH = [(name, *case) for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("name", "x", "w", "options"), EACH, ids=[f"{name}{len(x) - 2}d" for name, x, *_ in EACH])
def test_gradcheck(name, x, w, options, last):
    if last and (name == "narrow" or len(x) == 3):
        pytest.skip("no gradient of narrow for a weight, and no format of one dimension")
    first, second, bias = (reals(shape, torch.float64, seed) for seed, shape in enumerate((x, w, w[:1])))
    first = channels_last(first) if last else first
    tensors = tuple(tensor.requires_grad_() for tensor in (first, second, bias))

    def function(*tensors):
        return CONV[len(x) - 2](*tensors, **options, algorithm=name)

    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=False)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gradcheck_of_the_transposed(dims):
    sizes = ((2, 4, *(3, 4, 2)[:dims]), (4, 3, *(3, 2, 4)[:dims]), (6,))
    tensors = tuple(reals(shape, torch.float64, seed).requires_grad_() for seed, shape in enumerate(sizes))

    def function(x, w, b):
        return TRANSPOSED[dims](x, w, b, stride=2, padding=1, output_padding=1, groups=2, algorithm="direct")

    assert gradcheck(function, tensors, check_forward_ad=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


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
