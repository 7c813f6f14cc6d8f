"""Prepack: the same results from a weight that was packed once, and copied."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from checks import BY_NAME, TORCHS, channels_last, compare, integers, product_of_lines, reals
from torch import nn
from torch.nn.utils import prune

import plainconv
from plainconv import inference
from plainconv.remember import forget

CASES = {
    "winograd": ((64, 64, 3, 3), (2, 64, 30, 30), {"padding": 1}),
    "few tiles": ((128, 96, 3, 3), (1, 96, 7, 7), {"padding": 1}),
    "pointwise": ((256, 64, 1, 1), (2, 64, 14, 14), {}),
    "stride": ((48, 40, 3, 3), (2, 40, 20, 20), {"padding": 1, "stride": 2}),
    "whole kernel": ((20, 16, 4, 4), (3, 16, 4, 4), {}),
    "depthwise": ((12, 1, 5, 5), (1, 12, 40, 50), {"groups": 12, "padding": 2, "padding_mode": "reflect"}),
    "groups": ((12, 4, 3, 3), (2, 8, 9, 9), {"groups": 2, "dilation": 2}),
    "no batch": ((5, 4, 3, 3), (4, 9, 9), {"padding": "same_upper", "stride": 2}),
    "1-D": ((6, 4, 5), (2, 4, 33), {"padding": "causal"}),
    "long": ((8, 8, 31), (1, 8, 300), {}),
    "3-D": ((6, 4, 3, 3, 3), (2, 4, 6, 7, 8), {"padding": ((1, 0), 1, (2, -1)), "padding_mode": "circular"}),
    "no image": ((6, 4, 3, 3), (0, 4, 9, 9), {}),
}
TRANSPOSED = {
    "stride": ((8, 6, 4, 4), (2, 8, 9, 9), {"stride": 2, "padding": 1, "output_padding": 1}),
    "winograd": ((32, 40, 3, 3), (2, 32, 20, 20), {"padding": 1}),
    "reflect": ((8, 6, 3, 3), (2, 8, 9, 9), {"padding": 1, "padding_mode": "reflect"}),
    "1-D": ((8, 4, 8), (3, 8, 20), {"stride": 4, "groups": 2}),
    "3-D": ((8, 6, 2, 3, 2), (1, 8, 4, 5, 6), {"stride": 2, "dilation": (1, 2, 1)}),
}
FUNCTIONS = {name: getattr(plainconv, name) for name in plainconv.__all__ if name.startswith("conv")}
ALL = [pytest.param(*case, False, id=name) for name, case in CASES.items()]
ALL += [pytest.param(*case, True, id=f"transposed {name}") for name, case in TRANSPOSED.items()]


def plain(weight, transposed):
    return FUNCTIONS[f"conv{'_transpose' if transposed else ''}{weight.dim() - 2}d"]


def last(tensor):
    return channels_last(tensor) if tensor.dim() in (4, 5) else tensor


def tensors(weight, input, options, transposed, dtype):
    bias = weight[1] * options.get("groups", 1) if transposed else weight[0]
    return reals(weight, dtype, 0), reals((bias,), dtype, 1), reals(input, dtype, 2)


# -- right -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "input", "options", "transposed"), ALL)
def test_the_same_as_the_plain_call(weight, input, options, transposed):
    for dtype, lies in ((torch.float32, last), (torch.float64, torch.Tensor.contiguous), (torch.bfloat16, last)):
        w, b, x = tensors(weight, input, options, transposed, dtype)
        x = lies(x)
        fast = plainconv.prepack(w, input, b, transposed=transposed, **options)
        asked = plain(w, transposed)(x, w, b, **options)
        for _ in range(2):
            y = fast(x)
            assert (y.shape, y.stride(), y.dtype) == (asked.shape, asked.stride(), asked.dtype)
            if fast.request.problem.batch and len(input) == len(weight):
                compare(BY_NAME[fast.algorithm], fast.request, y, x, w, b, to_the_bit=False)
            torch.testing.assert_close(y, asked, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-3)


def test_types_that_have_no_kernel():
    for dtype in (torch.int32, torch.complex64, torch.float16):
        w, x = integers((4, 3, 3, 3), dtype, 0), integers((2, 3, 8, 8), dtype, 1)
        assert torch.equal(plainconv.prepack(w, x.shape)(x), plainconv.conv2d(x, w))
    x, w = reals((1, 2, 9, 9), torch.complex64, 0), reals((3, 2, 3, 3), torch.complex64, 1).conj()
    torch.testing.assert_close(plainconv.prepack(w, x.shape)(x), plainconv.conv2d(x, w))


def test_other_sizes_formats_and_strides():
    w, b = reals((48, 32, 3, 3), torch.float32, 0), reals((48,), torch.float32, 1)
    fast = plainconv.prepack(w, (1, 32, 30, 30), b, padding=1)
    for size in ((1, 32, 30, 30), (3, 32, 41, 17), (32, 12, 9), (1, 32, 1, 1), (0, 32, 5, 5)):
        for lies in (torch.Tensor.contiguous, last, lambda t: t.mT.contiguous().mT):
            x = lies(reals(size, torch.float32, 2))
            y = plainconv.conv2d(x, w, b, padding=1)
            torch.testing.assert_close(fast(x), y, rtol=1e-4, atol=1e-4)
            assert fast(x).stride() == y.stride()
    assert len(fast._made) <= inference.MOST_MADE


def test_a_weight_in_channels_last_gives_results_that_are():
    w, x = last(reals((8, 6, 3, 3), torch.float32, 0)), reals((2, 6, 9, 9), torch.float32, 1)
    fast = plainconv.prepack(w, x.shape)
    assert fast.request.channels_last
    assert fast(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.vmap(fast)(x.unsqueeze(0))[0].is_contiguous(memory_format=torch.channels_last)


def test_ways_to_lay_the_weight_are_bounded(monkeypatch):
    monkeypatch.setattr(inference, "MOST_MADE", 1)
    w = reals((32, 32, 3, 3), torch.float32, 0)
    fast = plainconv.prepack(w, (1, 32, 40, 40), padding=1)
    sizes = [(1, 32, 40, 40), (1, 32, 7, 7), (1, 32, 2, 2), (2, 32, 3, 40)]
    for _ in range(2):
        for size in sizes:
            for lies in (torch.Tensor.contiguous, last):
                x = lies(reals(size, torch.float32, 2))
                torch.testing.assert_close(fast(x), plainconv.conv2d(x, w, padding=1), rtol=1e-4, atol=1e-4)
                assert len(fast._made) <= 1


def test_what_is_forgotten_is_made_again():
    w, x = reals((32, 32, 3, 3), torch.float32, 0), reals((1, 32, 20, 20), torch.float32, 1)
    fast = plainconv.prepack(w, x.shape)
    before = fast(x)
    forget()
    assert not fast._ready
    assert torch.equal(fast(x), before)
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        torch.testing.assert_close(fast(x), before)
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)


# -- a copy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_never_stale(case):
    """Nor are those that are bound after the layer has changed."""
    weight, input, options = case
    w, b, x = tensors(weight, input, options, False, torch.float32)
    more = reals((2 * input[0], *input[1:]), torch.float32, 3) if len(input) == len(weight) else x
    asked = [plain(w, False)(tensor, w, b, **options) for tensor in (x, more)]
    fast = plainconv.prepack(w, input, b, **options)
    w.fill_(float("nan")), b.fill_(float("nan"))
    for tensor, y in zip((x, more), asked, strict=True):
        torch.testing.assert_close(fast(tensor), y, rtol=1e-4, atol=1e-3)


def test_it_says_so():
    w = torch.zeros(32, 32, 3, 3)
    fast = plainconv.prepack(w, (1, 32, 20, 20))
    assert "its own copy of the weight" in repr(fast)
    assert "forward n1 c32 o32 x20x20 k3x3 float32 cpu prepacked" in repr(fast)
    assert f"by {fast.algorithm}" in repr(fast)
    assert "holds its own copy" in plainconv.prepack.__doc__
    assert fast.algorithm == "winograd"
    assert fast.nbytes > w.nbytes + 32 * 32 * 16 * 4


def test_it_is_a_module_without_parameters():
    layer, x = nn.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 9, 9)
    model = nn.Sequential(layer, nn.ReLU())
    with torch.no_grad():
        asked = model(x)
        model[0] = plainconv.prepack(layer, x.shape)
    assert not list(model.parameters())
    assert not model.state_dict()
    for changed in (model, model.double().float(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(changed(x), asked, rtol=1e-4, atol=1e-5)


def test_it_goes_when_nobody_holds_it():
    fast = plainconv.prepack(torch.ones(32, 32, 3, 3), (1, 32, 20, 20))
    gone = weakref.ref(fast)
    fast(torch.ones(1, 32, 20, 20))
    del fast
    gc.collect()
    assert gone() is None


# -- what is chosen --------------------------------------------------------------------------------------------------


def test_separable_is_chosen_by_values():
    w, x = product_of_lines(reals((3, 1, 31, 31), torch.float32, 0)), reals((1, 3, 200, 300), torch.float32, 1)
    fast = plainconv.prepack(w, x.shape, groups=3)
    assert fast.algorithm == "separable"
    torch.testing.assert_close(fast(x), plainconv.conv2d(x, w, groups=3), rtol=1e-3, atol=1e-3)
    assert plainconv.prepack(w, x.shape, groups=3, algorithm="depthwise").algorithm == "depthwise"
    w[1, 0, 3, 4] += 1
    other = plainconv.prepack(w, x.shape, groups=3)
    assert other.algorithm != "separable"
    torch.testing.assert_close(other(x), plainconv.conv2d(x, w, groups=3), rtol=1e-3, atol=1e-3)
    with pytest.raises(plainconv.AlgorithmRefused, match="of rank 1"):
        plainconv.prepack(w, x.shape, groups=3, algorithm="separable")


def test_settings_are_those_of_the_moment(monkeypatch):
    w = torch.zeros(4, 3, 3, 3)
    plainconv.set_max_workspace(1000)
    try:
        fast = plainconv.prepack(w, (1, 3, 9, 9))
    finally:
        plainconv.set_max_workspace(1 << 30)
    assert fast.request.max_workspace == 1000
    assert plainconv.prepack(w, (1, 3, 9, 9), max_workspace=5).request.max_workspace == 5


# -- layers ----------------------------------------------------------------------------------------------------------

LAYERS = [
    (lambda of: of.Conv1d(4, 6, 3, padding="same", padding_mode="replicate"), (2, 4, 20)),
    (lambda of: of.Conv2d(4, 6, 3, stride=2, padding=(2, 1), bias=False), (2, 4, 9, 9)),
    (lambda of: of.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", groups=2), (2, 4, 9, 9)),
    (lambda of: of.Conv3d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 6, 7)),
    (lambda of: of.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 20)),
    (lambda of: of.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 9, 9)),
    (lambda of: of.ConvTranspose3d(4, 6, 3), (2, 4, 5, 6, 7)),
]


@pytest.mark.parametrize("of", [nn, plainconv.nn], ids=["torch.nn", "plainconv.nn"])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
@torch.no_grad()
def test_layers(make, shape, of):
    layer, x = make(of), torch.randn(shape)
    torch.testing.assert_close(plainconv.prepack(layer, shape)(x), layer(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layers_of_other_kinds():
    x = torch.randn(2, 4, 9, 9)
    ours = plainconv.nn.Conv2d(4, 6, 3, padding=((1, 2), "same_lower"), algorithm="shift", max_workspace=1 << 20)
    fast = plainconv.prepack(ours, x.shape)
    assert (fast.algorithm, fast.request.max_workspace) == ("shift", 1 << 20)
    assert plainconv.prepack(ours, x.shape, algorithm="im2col").algorithm == "im2col"
    torch.testing.assert_close(fast(x), ours(x))
    swapped = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    asked = swapped(x)
    plainconv.swap(swapped, "im2col")
    fast = plainconv.prepack(swapped, x.shape)
    assert fast.algorithm == "im2col"
    torch.testing.assert_close(fast(x), asked)

    class Derived(nn.Conv2d):
        pass

    derived = Derived(4, 6, 3)
    torch.testing.assert_close(plainconv.prepack(derived, x.shape)(x), derived(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "of",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
        lambda layer: prune.l1_unstructured(nn.utils.weight_norm(layer), "weight_v", 0.5),
    ],
)
@torch.no_grad()
def test_a_weight_that_hooks_make_is_made_first(of):
    layer, x = of(nn.Conv2d(4, 8, 3)).eval(), torch.randn(1, 4, 9, 9)
    layer(x)
    for parameter in layer.parameters():
        parameter.add_(torch.rand_like(parameter))
    layer.train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    stale = layer.weight, layer.bias
    fast = plainconv.prepack(layer, x.shape)
    assert (layer.weight, layer.bias) == stale
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.training
    torch.testing.assert_close(fast(x), layer.eval()(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_weight_that_another_hook_may_make_is_refused():
    class Halved(nn.Conv2d):
        pass

    def halve(layer, _):
        layer.weight = layer.whole / 2

    layer, x = Halved(4, 8, 3), torch.randn(1, 4, 9, 9)
    layer.register_forward_pre_hook(lambda *_: None)
    torch.testing.assert_close(plainconv.prepack(layer, x.shape)(x), layer(x), rtol=1e-4, atol=1e-5)
    layer.whole = layer.weight
    del layer.weight
    layer.register_forward_pre_hook(halve)
    layer(x)
    with pytest.raises(TypeError, match="the weight of a Halved that is no parameter and may be made in each call by"):
        plainconv.prepack(layer, x.shape)


class Standardized(nn.Conv2d):
    def forward(self, input):
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class Ours(plainconv.nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) + 1


@torch.no_grad()
def test_what_is_refused():
    with pytest.raises(TypeError, match="Standardized has a forward of its own"):
        plainconv.prepack(Standardized(3, 3, 3), (1, 3, 9, 9))
    with pytest.raises(TypeError, match="Ours has a forward of its own"):
        plainconv.prepack(Ours(3, 3, 3), (1, 3, 9, 9))
    with pytest.raises(TypeError, match="Linear is no convolution layer"):
        plainconv.prepack(nn.Linear(3, 3), (1, 3))
    with pytest.raises(TypeError, match="has its own bias, stride"):
        plainconv.prepack(nn.Conv2d(3, 3, 3), (1, 3, 9, 9), stride=2)
    with pytest.raises(TypeError, match="must be a module or Tensor, not list"):
        plainconv.prepack([1], (1, 3, 9, 9))
    with pytest.raises(RuntimeError, match="LazyConv2d has no weight yet"):
        plainconv.prepack(nn.LazyConv2d(3, 3), (1, 3, 9, 9))
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3 channels"):
        plainconv.prepack(nn.Conv2d(4, 3, 3), (1, 3, 9, 9))
    with pytest.raises(ValueError, match="algorithm='fast' does not exist"):
        plainconv.prepack(torch.zeros(3, 3, 3, 3), (1, 3, 9, 9), algorithm="fast")
    with pytest.raises(ValueError, match="belongs to transposed=True"):
        plainconv.prepack(torch.zeros(3, 3, 3, 3), (1, 3, 9, 9), output_padding=1)
    with pytest.raises(plainconv.AlgorithmRefused, match="refuses forward"):
        plainconv.prepack(torch.zeros(3, 3, 5, 5), (1, 3, 9, 9), algorithm="winograd")
    fast = plainconv.prepack(torch.zeros(3, 3, 3, 3), (1, 3, 9, 9))
    with pytest.raises(RuntimeError, match="should be the same"):
        fast(torch.zeros(1, 3, 9, 9, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels"):
        fast(torch.zeros(1, 4, 9, 9))
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        fast([1])


# -- gradients, and whatever else watches ----------------------------------------------------------------------------


def test_gradients_are_refused():
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(1, 4, 9, 9)
    with pytest.raises(RuntimeError, match=r"has no gradients; call it within torch.no_grad\(\)"):
        plainconv.prepack(layer, x.shape)
    with torch.inference_mode():
        fast = plainconv.prepack(layer, x.shape)
    y = fast(x)
    assert not y.requires_grad
    asks = x.clone().requires_grad_()
    for tensor in (asks, asks.repeat(2, 1, 1, 1)):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="has no gradients"):
                fast(tensor)
            with torch.no_grad():
                assert torch.equal(fast(tensor)[:1], y)
            with torch.inference_mode():
                assert torch.equal(fast(tensor)[:1], y)


def test_what_watches_gets_the_plain_call():
    w, x = reals((6, 4, 3, 3), torch.float32, 0), reals((3, 2, 4, 9, 9), torch.float32, 1)
    fast = plainconv.prepack(w, x.shape[1:], padding=1)
    asked = plainconv.conv2d(x[0], w, padding=1)
    torch.testing.assert_close(torch.vmap(fast)(x)[0], asked)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x[0]).dtype is torch.bfloat16
    y, tangent = torch.func.jvp(fast, (x[0],), (x[1],))
    torch.testing.assert_close(y, asked)
    torch.testing.assert_close(tangent, plainconv.conv2d(x[1], w, padding=1))
    torch.testing.assert_close(fast(x[0]), asked)


@pytest.mark.slow
def test_it_is_compiled_in_one_graph():
    w, x = reals((6, 4, 3, 3), torch.float32, 0), reals((2, 4, 9, 9), torch.float32, 1)
    for transposed in (False, True):
        fast = plainconv.prepack(w if not transposed else w[:4], x.shape, transposed=transposed)
        compiled = torch.compile(lambda x, fast=fast: fast(x).relu(), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), fast(x).relu())


def test_several_threads_at_once():
    w, b = reals((64, 48, 3, 3), torch.float32, 0), reals((64,), torch.float32, 1)
    xs = [reals((1, 48, 10 + number % 5, 20), torch.float32, number) for number in range(10)]
    asked = [plainconv.conv2d(x, w, b) for x in xs]
    fast, found, start = plainconv.prepack(w, xs[0].shape, b), {}, threading.Barrier(6)

    def work(number):
        start.wait()
        found[number] = [fast(last(x) if number % 2 else x) for _ in range(5) for x in xs]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert len(found) == 6
    for made in found.values():
        for y, expected in zip(made, asked * 5, strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


# -- what comes behind -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu(0.2)", "gelu"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 9, 9), (8, 9, 9)], ids=["batch", "no batch"])
def test_an_activation_and_a_residual_are_added_behind(activation, channels_last, shape):
    layer, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(shape)
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    other = torch.randn(shape)
    with torch.no_grad():
        fast = plainconv.prepack(layer, shape, activation=activation)
        for residual in (None, other, x, None, other.transpose(-1, -2)):
            asked = TORCHS[activation](layer(x) + (0 if residual is None else residual))
            torch.testing.assert_close(fast(x, residual), asked, rtol=1e-4, atol=1e-5)


def test_a_residual_that_does_not_fit_and_an_unknown_activation():
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        fast = plainconv.prepack(layer, x.shape)
        with pytest.raises(RuntimeError, match=r"residual to have the shape of the result, \[1, 4, 4, 4\]"):
            fast(x, torch.randn(1, 4, 4, 5))
        with pytest.raises(RuntimeError, match=r"residual type .* should be the same"):
            fast(x, torch.randn(1, 4, 4, 4, dtype=torch.float64))
        with pytest.raises(ValueError, match="activation must be None or one of"):
            plainconv.prepack(layer, x.shape, activation="tanh")
        with pytest.raises(ValueError, match=r"activation='leaky_relu\(x\)' must have a finite number"):
            plainconv.prepack(layer, x.shape, activation="leaky_relu(x)")
    with pytest.raises(RuntimeError, match="has no gradients"):
        fast(x, torch.randn(1, 4, 4, 4, requires_grad=True))


@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_as_large_as_the_image_in_both_formats(first):
    """The columns of its matrix are in another order in each, and packed apart."""
    w, x = torch.randn(64, 64, 4, 4), torch.randn(3, 64, 4, 4)
    with torch.no_grad():
        fast, asked = plainconv.prepack(w, x.shape, memory_format=first), F.conv2d(x, w)
        for _ in range(2):
            for lies in (x, x.to(memory_format=torch.channels_last)):
                torch.testing.assert_close(fast(lies), asked, rtol=1e-4, atol=1e-3)
