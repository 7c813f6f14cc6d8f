"""optimize: what is fused into a convolution, what is left alone, and results beside the model's own."""

import copy
import logging
import math
import pickle
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import plainconv
from plainconv import fuse, inference
from plainconv.fuse import Optimized
from plainconv.ops import is_channels_last


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def settle(model):
    """In evaluation mode, with statistics as of a model that has been trained."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


class Plain(nn.Module):
    """A function with some layers, as a model."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def same(model, fast, *args, **kwargs):
    with torch.no_grad():
        asked, found = model(*args, **kwargs), fast(*args, **kwargs)
    torch.testing.assert_close(found, asked, rtol=1e-4, atol=1e-5)


def fused(fast):
    return {name: functions for name, (functions, _) in fast.report.fused.items()}


def left(fast):
    """The functions of the graph that are not plainconv's."""
    names = (str(node.target) for node in fast.model.graph.nodes if node.op.startswith("call"))
    return [name for name in names if "plainconv" not in name and name != "_guards_fn"]


CONVOLUTIONS = {
    "1d": lambda: (nn.Conv1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), torch.randn(2, 4, 19)),
    "2d": lambda: (
        nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=False),
        nn.BatchNorm2d(6),
        torch.randn(2, 4, 9, 8),
    ),
    "3d": lambda: (nn.Conv3d(4, 6, 2, dilation=2), nn.BatchNorm3d(6), torch.randn(2, 4, 5, 6, 7)),
    "transposed 1d": lambda: (nn.ConvTranspose1d(4, 6, 3, 2), nn.BatchNorm1d(6), torch.randn(2, 4, 9)),
    "transposed 2d": lambda: (
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2),
        nn.BatchNorm2d(6, affine=False),
        torch.randn(2, 4, 5, 6),
    ),
    "transposed 3d": lambda: (nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6), torch.randn(2, 4, 3, 4, 3)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_batch_norm_is_folded_and_an_activation_fused(kind):
    conv, norm, x = CONVOLUTIONS[kind]()
    model = settle(nn.Sequential(conv, norm, nn.ReLU(inplace=True)))
    fast = plainconv.optimize(model, x)
    assert left(fast) == []
    (functions,) = fused(fast).values()
    assert functions == ("conv_transpose" if "transposed" in kind else "conv", "batch_norm", "relu")
    same(model, fast, x)


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "leaky_relu(0.2)": nn.LeakyReLU(0.2, inplace=True),
    "leaky_relu(-2.0)": nn.LeakyReLU(-2),
    "hardswish": nn.Hardswish(),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_fused(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), ACTIVATIONS[name]).eval()
    x = 3 * torch.randn(2, 3, 9, 9)
    fast = plainconv.optimize(model, x)
    assert list(fused(fast).values()) == [("conv", name)]
    same(model, fast, x)


@pytest.mark.parametrize(
    "layer", [nn.LeakyReLU(math.inf), nn.GELU("tanh"), nn.Hardtanh(-1, 6), nn.ELU(), nn.Softplus()]
)
def test_other_activations_stay_torchs(layer):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer).eval()
    x = 3 * torch.randn(2, 3, 9, 9)
    fast = plainconv.optimize(model, x)
    assert list(fused(fast).values()) == [("conv",)]
    assert len(left(fast)) == 1
    same(model, fast, x)


@pytest.mark.parametrize("last", [False, True])
def test_a_net_of_leaky_relus(last):
    def net(self, x):
        x = F.leaky_relu(self.norm(self.first(x)), 0.2)
        x = F.leaky_relu(self.second(x) + x, negative_slope=0.1, inplace=True)
        return nn.LeakyReLU(0.2)(self.up(x))

    layers = {"first": nn.Conv2d(3, 8, 3, 2, 1), "norm": nn.BatchNorm2d(8), "second": nn.Conv2d(8, 8, 1)}
    model = settle(Plain(net, **layers, up=nn.ConvTranspose2d(8, 3, 4, 2, 1)))
    x = torch.randn(2, 3, 12, 10).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    fast = plainconv.optimize(model, x)
    assert left(fast) == []
    assert list(fused(fast).values()) == [
        ("conv", "batch_norm", "leaky_relu(0.2)"),
        ("conv", "add", "leaky_relu(0.1)"),
        ("conv_transpose", "leaky_relu(0.2)"),
    ]
    same(model, fast, x)


def test_a_residual_is_fused_into_the_convolution_before_the_addition():
    def block(self, x):
        y = self.norm(self.second(F.relu(self.first(x))))
        y += x
        return F.relu(y)

    conv = [nn.Conv2d(6, 6, 3, padding=1) for _ in range(2)]
    model = settle(Plain(block, first=conv[0], second=conv[1], norm=nn.BatchNorm2d(6)))
    x = torch.randn(2, 6, 8, 8)
    fast = plainconv.optimize(model, x)
    assert fused(fast) == {"first": ("conv", "relu"), "second": ("conv", "batch_norm", "add", "relu")}
    assert left(fast) == []
    same(model, fast, x)
    same(model, fast, x.to(memory_format=torch.channels_last))


def test_of_two_convolutions_that_are_added_one_takes_the_other():
    model = Plain(lambda self, x: F.silu(self.a(x) + self.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1)).eval()
    x = torch.randn(1, 3, 5, 5)
    fast = plainconv.optimize(model, x)
    assert fused(fast) == {"a": ("conv", "add", "silu"), "b": ("conv",)}
    same(model, fast, x)


NOT_RESIDUALS = {
    "a number": lambda self, x: self.c(x) + 1.5,
    "scaled": lambda self, x: torch.add(self.c(x), x, alpha=2),
    "broadcast": lambda self, x: self.c(x) + x.mean((2, 3), keepdim=True),
    "itself": lambda self, x: (lambda y: y + y)(self.c(x)),
    "of a wider type": lambda self, x: self.c(x) + x.double(),
}


@pytest.mark.parametrize("kind", NOT_RESIDUALS)
def test_other_additions_stay_torchs(kind):
    model = Plain(NOT_RESIDUALS[kind], c=nn.Conv2d(3, 3, 3, padding=1)).eval()
    x = torch.randn(2, 3, 6, 6)
    fast = plainconv.optimize(model, x)
    assert fused(fast) == {"c": ("conv",)}
    same(model, fast, x)


def test_what_something_else_reads_is_not_taken_in():
    def twice(self, x):
        y = self.c(x)
        return F.relu(y), self.n(y)

    model = settle(Plain(twice, c=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 6, 6)
    fast = plainconv.optimize(model, x)
    assert fused(fast) == {"c": ("conv",)}
    same(model, fast, x)


def test_a_change_in_place_of_the_input_comes_when_it_came():
    def odd(self, x):
        x = x * 2
        y = self.c(x)
        z = F.relu_(x)  # after the convolution read it
        return F.relu(y + z)

    model = Plain(odd, c=nn.Conv2d(3, 3, 3, padding=1)).eval()
    x = torch.randn(2, 3, 6, 6)
    fast = plainconv.optimize(model, x)
    assert fused(fast) == {"c": ("conv", "add", "relu")}
    same(model, fast, x)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_by_a_mode_or_a_function_becomes_the_convolutions(mode):
    def padded(self, x):
        return self.b(F.pad(self.a(x), (0, 1, 2, 0), "constant" if mode == "zeros" else mode))

    model = Plain(padded, a=nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), b=nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(2, 3, 7, 8)
    fast = plainconv.optimize(model, x)
    assert fused(fast)["b"] == ("pad", "conv")
    assert left(fast) == []
    same(model, fast, x)


@pytest.mark.parametrize("pads", [((1, 1), {"value": 2.0}), ((1, 1, 1, 1, 1, 1), {})], ids=["ones", "of channels"])
def test_other_padding_stays_torchs(pads):
    model = Plain(lambda self, x: self.c(F.pad(x, pads[0], **pads[1])), c=nn.Conv2d(5, 4, 3)).eval()
    x = torch.randn(2, 5 if len(pads[0]) == 2 else 3, 7, 8)
    fast = plainconv.optimize(model, x)
    assert fused(fast) == {"c": ("conv",)}
    same(model, fast, x)


def test_a_parametrised_weight_is_computed_once():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
    model = nn.Sequential(layer, nn.BatchNorm1d(4)).eval()
    x = torch.randn(2, 4, 9)
    fast = plainconv.optimize(model, x)
    assert left(fast) == []
    same(model, fast, x)


def test_a_weight_that_depends_on_the_input_is_left_to_torch():
    model = Plain(lambda self, x: F.conv2d(self.c(x), x.mean((2, 3), keepdim=True)), c=nn.Conv2d(2, 2, 1)).eval()
    x = torch.randn(2, 2, 5, 5)
    fast = plainconv.optimize(model, x)
    assert list(fast.report.kept.values()) == ["its weight or bias is computed in each call"]
    same(model, fast, x)


def test_a_batch_norm_of_the_batch_stays_torchs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = torch.randn(2, 3, 6, 6)
    fast = plainconv.optimize(model, x)
    assert list(fused(fast).values()) == [("conv",)]
    same(model, fast, x)


def test_other_batches_and_sizes_and_formats():
    model = settle(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    fast = plainconv.optimize(model, torch.randn(1, 3, 12, 12))
    for shape in ((1, 3, 12, 12), (4, 3, 12, 12), (2, 3, 9, 20)):
        same(model, fast, torch.randn(shape))
        same(model, fast, torch.randn(shape).to(memory_format=torch.channels_last))


@pytest.fixture
def in_channels_last(monkeypatch):
    monkeypatch.setattr(fuse, "_faster_in_channels_last", lambda module, steps, args, kwargs: True)


@pytest.mark.usefixtures("in_channels_last")
def test_channels_last_begins_at_the_door_and_ends_there():
    seen = []
    look = Plain(lambda self, x: (x, x.view(x.shape[0], -1), x.permute(0, 2, 3, 1)))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), look).eval()
    x = torch.randn(2, 3, 28, 28)
    fast = plainconv.optimize(model, x)
    assert fast.report.channels_last
    for packed in (module for module in fast.modules() if isinstance(module, inference.Prepacked)):
        packed.register_forward_pre_hook(lambda _, given: seen.append(is_channels_last(given[0])))
    same(model, fast, x)
    assert seen == [True, True]
    with torch.no_grad():
        results = fast(x)
    assert results[0].is_contiguous()


@pytest.mark.usefixtures("in_channels_last")
def test_an_input_that_is_changed_or_returned_in_channels_last():
    def changes(self, x):
        y = self.c(x)
        x.add_(1)
        return y, x

    model = Plain(changes, c=nn.Conv2d(3, 4, 3)).eval()
    x = torch.randn(2, 3, 6, 6)
    before = x.clone()
    fast = plainconv.optimize(model, x)
    assert torch.equal(x, before), "the example is the caller's"
    mine, yours = x.clone(), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(fast(mine), model(yours), rtol=1e-4, atol=1e-5)
    assert torch.equal(mine, yours)
    assert fast(mine)[1].is_contiguous()


def test_the_choice_of_channels_last_is_that_of_the_estimates(monkeypatch):
    """Which of the two is quicker depends on the processor; that of three to three channels is known."""
    wide, x = nn.Conv2d(256, 256, 3, padding=1, groups=256).eval(), torch.randn(4, 256, 14, 14)
    estimates = []
    for like in (x, x.to(memory_format=torch.channels_last)):
        told = plainconv.explain(like, wide.weight, wide.bias, padding=1, groups=256)
        packed = {verdict.algorithm.name: verdict.seconds for verdict in (*told.verdicts, *told.packed)}
        estimates.append(packed[told.chosen_packed or told.chosen])
    assert plainconv.optimize(wide, x).report.channels_last == (estimates[1] < estimates[0])
    few = nn.Sequential(nn.Conv2d(3, 3, 3)).eval()
    assert not plainconv.optimize(few, torch.randn(1, 3, 64, 64)).report.channels_last
    monkeypatch.setattr(fuse._Step, "seconds", lambda step, channels_last: 1.0 if channels_last else 2.0)
    assert plainconv.optimize(few, torch.randn(1, 3, 64, 64)).report.channels_last


def test_a_model_that_does_something_else_with_one():
    model = Plain(lambda self, x: self.c(x) * 2 if x.shape[0] == 1 else self.c(x), c=nn.Conv2d(2, 3, 3)).eval()
    one, two = torch.randn(1, 2, 6, 6), torch.randn(2, 2, 6, 6)
    for example, other in ((one, two), (two, one)):
        fast = plainconv.optimize(model, example)
        same(model, fast, example)
        with pytest.raises(RuntimeError, match=r"call plainconv\.optimize again"), torch.no_grad():
            fast(other)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_without_a_batch(dims):
    """(C, L) is a batch of features to BatchNorm1d, and padding has one dimension less before it."""
    conv = getattr(nn, f"Conv{dims}d")(4, 9, 3, padding=1)
    norm = nn.BatchNorm1d(9) if dims == 1 else nn.Identity()
    model = settle(Plain(lambda self, x: self.n(self.c(F.pad(x, (1, 2)))), c=conv, n=norm))
    x = torch.randn(4, *range(6, 6 + dims))
    fast = plainconv.optimize(model, x)
    assert fused(fast) == {"c": ("conv",)}
    same(model, fast, x)


def test_buffers_that_a_call_changes():
    def counts(self, x):
        y = F.conv2d(x, self.weight * self.n)
        self.n.add_(1)
        return y

    model = Plain(counts, weight=nn.Parameter(torch.randn(4, 2, 3, 3)))
    model.register_buffer("n", torch.ones(()))
    x = torch.randn(1, 2, 6, 6)
    fast = plainconv.optimize(model.eval(), x)
    assert list(fast.report.kept.values()) == ["its weight or bias is computed in each call"]
    for _ in range(3):
        same(model, fast, x)


SHAPES_BY_VALUE = {
    "of the result": lambda self, x: (lambda y: y[y > 0.5])(self.c(x)),
    "a constant input": lambda self, x: self.c(x + self.d(self.p)),
}


@pytest.mark.parametrize("kind", SHAPES_BY_VALUE)
def test_shapes_that_are_known_only_by_running(kind):
    model = Plain(SHAPES_BY_VALUE[kind], c=nn.Conv2d(2, 3, 3), d=nn.Conv2d(2, 2, 1))
    model.p = nn.Parameter(torch.randn(1, 2, 6, 6))
    x = torch.randn(1, 2, 6, 6)
    same(model, plainconv.optimize(model.eval(), x), x)


def test_plainconvs_own_layers_take_in_what_follows():
    ours = plainconv.nn.Conv2d(3, 4, 3, padding=((1, 2), (0, 1)), padding_mode="reflect", stride=2)
    model = settle(nn.Sequential(ours, nn.BatchNorm2d(4), nn.ReLU(), plainconv.nn.ConvTranspose2d(4, 2, 2)))
    x = torch.randn(1, 3, 9, 8)
    fast = plainconv.optimize(model, x)
    assert fused(fast) == {"0": ("conv", "batch_norm", "relu")}
    assert list(fast.report.kept) == ["3"]
    same(model, fast, x)


def test_under_autocast():
    block = Plain(lambda self, x: F.relu(self.c(x) + x), c=nn.Conv2d(4, 4, 3, padding=1)).eval()
    x = torch.randn(2, 4, 6, 6)
    fast = plainconv.optimize(block, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fast(x).float(), block(x).float(), rtol=0.05, atol=0.05)


def test_inputs_by_name_and_results_of_any_form():
    model = Plain(lambda self, a, *, b: {"sum": self.c(a) + b, "list": [b]}, c=nn.Conv2d(2, 2, 1)).eval()
    given = {"a": torch.randn(2, 2, 3, 3), "b": torch.randn(2, 2, 3, 3)}
    fast = plainconv.optimize(model, given)
    same(model, fast, **given)


def test_names_come_in_any_order():
    def named(self, *, x, more, times):
        return self.c(x) * times + more["a"] - more["b"]

    model = Plain(named, c=nn.Conv2d(2, 3, 3)).eval()
    x, a, b = torch.randn(2, 2, 6, 6), torch.randn(2, 3, 4, 4), torch.randn(3, 1, 1)
    fast = plainconv.optimize(model, {"x": x, "more": {"a": a, "b": b}, "times": 2})
    same(model, fast, more={"b": b, "a": a}, times=2, x=x)
    with pytest.raises(RuntimeError, match="times == 2 does not hold"):
        fast(x=x, more={"a": a, "b": b}, times=3)
    for wrong in ({"x": x, "times": b}, {"x": None, "times": 2}):
        with pytest.raises(TypeError, match="with the arguments of its example"):
            fast(more={"b": b, "a": a}, **wrong)


def test_a_model_without_a_graph_is_prepacked_layer_by_layer(capfd):
    def branching(self, x):
        y = self.norm(self.c(x))
        return y * self.c.kernel_size[0] if y.sum().item() > 0 else -y

    model = settle(Plain(branching, c=nn.Conv2d(2, 3, 3), norm=nn.BatchNorm2d(3), unused=nn.Conv2d(2, 2, 1)))
    x = torch.randn(2, 2, 6, 6)
    fast = plainconv.optimize(model, x)
    assert capfd.readouterr() == ("", ""), "torch.export prints what it has of the graph"
    assert fused(fast) == {"c": ("conv",)}
    assert fast.report.kept == {"unused": "the example did not reach it, or only within a function as torch.cond"}
    assert fast.report.plain.startswith("torch.export says")
    for _ in range(4):
        same(model, fast, torch.randn(2, 2, 6, 6))
    with pytest.raises(RuntimeError) as error:
        fast(torch.randn(2, 3, 6, 6))
    assert error.value.__notes__ == ["in layer 'c'"]
    copied = copy.deepcopy(fast)
    assert copied.model.c.forward.__self__ is copied.model.c.prepacked is not fast.model.c.prepacked
    same(model, copied, x)


def test_layers_within_cond_and_autocast_are_told_by_name():
    def within(self, x):
        x = torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.c(x)

    layers = {name: nn.Conv2d(3, 3, 3, padding=1) for name in "abc"}
    fast = plainconv.optimize(Plain(within, **layers, unused=nn.Conv2d(3, 3, 1)).eval(), torch.randn(2, 3, 6, 6))
    assert fused(fast) == {"c": ("conv",)}
    assert "graph within the graph" in fast.report.kept["a"] == fast.report.kept["b"]
    assert fast.report.kept["unused"] == "the example did not reach it"


def test_without_a_graph_a_layer_that_refuses_or_does_not_fit_is_named():
    def branching(self, x):
        return self.c(x) if x.sum().item() < 1e9 else x

    model, x = Plain(branching, c=nn.Conv2d(2, 3, 1)).eval(), torch.randn(2, 2, 6, 6)
    with pytest.raises(plainconv.AlgorithmRefused, match="layer 'c': algorithm='winograd' refuses"):
        plainconv.optimize(model, x, algorithm="winograd")
    with pytest.raises(RuntimeError, match="to have 2 channels, but got 3 channels") as error:
        plainconv.optimize(model, torch.randn(2, 3, 6, 6))
    assert error.value.__notes__ == ["in layer 'c'"]


def test_without_a_graph_a_layer_that_is_told_its_size_stays():
    def branching(self, x):
        return self.up(self.c(x), [12, 12]) if x.sum().item() < 1e9 else x

    up = nn.ConvTranspose2d(3, 2, 3, stride=2)
    model = settle(Plain(branching, c=nn.Conv2d(2, 3, 3, padding=1, stride=2), up=up))
    x = torch.randn(2, 2, 10, 10)
    fast = plainconv.optimize(model, x)
    assert fast.report.kept == {"up": "it is called with an output_size"}
    same(model, fast, x)


def test_what_is_said_of_export_is_kept_from_stderr_by_one_thread_at_a_time():
    before = sys.stderr, logging.root.manager.disable

    def quiet():
        for _ in range(20):
            with fuse._quiet():
                time.sleep(1e-4)

    threads = [threading.Thread(target=quiet) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sys.stderr, logging.root.manager.disable) == before


def test_what_does_not_fit_names_the_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(200, 2))
    fast = plainconv.optimize(model.eval(), torch.randn(2, 3, 11, 11))
    with pytest.raises(RuntimeError, match=r"input\.size\(\)\[1\] == 3 does not hold") as error, torch.no_grad():
        fast(torch.randn(2, 5, 11, 11))
    (note,) = error.value.__notes__
    assert note.startswith("in layer '0': ")
    assert note.endswith("to have 3 channels, but got 5 channels instead")
    with pytest.raises(RuntimeError, match=r"weight type \(torch.FloatTensor\) should be") as error, torch.no_grad():
        fast(torch.randn(2, 3, 11, 11).double())
    assert error.value.__notes__ == ["in layer '0'"]
    with pytest.raises(RuntimeError, match="does not hold") as error, torch.no_grad():
        fast(torch.randn(2, 3, 12, 12))
    assert not hasattr(error.value, "__notes__"), "no convolution minds"


def test_what_is_fused_is_called_directly():
    fast = plainconv.optimize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 6, 6))
    calls = [fast.model.get_submodule(n.target) for n in fast.model.graph.nodes if n.op == "call_module"]
    assert [type(call) for call in calls if type(call).__name__ != "GuardsFn"] == [inference.Prepacked]


def test_the_model_is_left_as_it_is_and_never_followed():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 6, 6)
    fast = plainconv.optimize(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        found = fast(x)
        for parameter in model.parameters():
            assert parameter.requires_grad
            parameter.zero_()
        assert torch.equal(fast(x), found)


def test_swapped_models_are_fused_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    plainconv.swap(model)
    fast = plainconv.optimize(model, torch.randn(2, 3, 6, 6))
    assert fused(fast) == {"0": ("conv", "relu")}
    assert type(model[0]).__name__ == "PlainConv2d"


def test_what_it_refuses():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    x = torch.randn(1, 3, 6, 6)
    with pytest.raises(RuntimeError, match=r"training mode; call model.eval\(\) first"):
        plainconv.optimize(model, x)
    with pytest.raises(TypeError, match=r"argument 'model' must be torch.nn.Module, not int"):
        plainconv.optimize(3, x)
    with pytest.raises(ValueError, match="algorithm"):
        plainconv.optimize(model.eval(), x, algorithm="quick")
    fast = plainconv.optimize(model.eval(), x)
    with pytest.raises(RuntimeError, match="optimized for inputs like its example"), torch.no_grad():
        fast(torch.randn(1, 4, 6, 6))
    with pytest.raises(RuntimeError, match="no gradients"):
        fast(x.requires_grad_())
    with pytest.raises(RuntimeError, match="for inference"):
        fast.train()
    assert not fast.eval().training


def test_what_it_cannot_be_asked_for():
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    x = torch.randn(1, 3, 6, 6)
    fast = plainconv.optimize(model, x)
    for wrong in ((), (x, x), ([x],), (None,), (3,)):
        with pytest.raises(TypeError, match="with the arguments of its example"):
            fast(*wrong)
    for wrong in (x[0], x[0, 0, 0, 0], x[None]):
        with pytest.raises(RuntimeError, match=rf"for these 4 dimensions, and not {wrong.dim()}, does not hold"):
            fast(wrong)
    with pytest.raises(TypeError, match="optimized already"):
        plainconv.optimize(fast, x)
    with pytest.raises(TypeError, match="are prepacked"):
        plainconv.profile(fast, x)
    with pytest.raises(TypeError, match="pickle the model"):
        pickle.dumps(fast)
    with pytest.raises(RuntimeError, match=r"torch\.jit cannot compile what is optimized"):
        torch.jit.script(fast)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(fast)(x), fast(x))
    with pytest.raises(plainconv.AlgorithmRefused, match="layer '0': algorithm='winograd' refuses"):
        plainconv.optimize(model, x, algorithm="winograd")
    for lazy in (nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(affine=False)):
        with pytest.raises(RuntimeError, match=r"a Lazy\w+ has no weight yet; call the model once before"):
            plainconv.optimize(lazy.eval(), x)


def test_the_report_prints_as_a_table():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    fast = plainconv.optimize(model, torch.randn(1, 3, 6, 6), algorithm="shift")
    assert isinstance(fast, Optimized)
    assert str(fast.report) == "0  conv + batch_norm + relu, by shift\n1 prepacked, 0 kept"
    assert "by shift" in repr(fast)
