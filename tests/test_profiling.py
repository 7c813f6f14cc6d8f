"""profile: what is noted of a model's convolutions, what is measured of each, and that the model stays as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import plainconv
from plainconv import profiling
from plainconv.problem import ConvProblem
from plainconv.timing import Timing


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(profiling, "MODEL_S", 0.0)
    monkeypatch.setattr(profiling, "TURN_S", 0.0)


class Odd(nn.Module):
    """A layer that is called twice, one that is tied to another's weight, and a convolution that is no layer's."""

    def __init__(self):
        super().__init__()
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Dropout(0.5), plainconv.nn.Conv2d(4, 8, 3, stride=2, padding=((0, 1), (1, 0))))
        self.up = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.fails = False

    def forward(self, x, scale=1.0):
        x = self.norm(self.again(self.again(x))) * scale
        x = F.conv2d(self.up(self.body(x)), weight=self.kernel)
        if self.fails:
            raise ValueError("as asked")
        return {"made": x, "count": 3}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Odd()


X = torch.randn(2, 4, 10, 12)
NOTED = {
    ("again", 2, "torch", "n2 c4 o4 x10x12 k3x3 p1x1"),
    ("body.1", 1, "plainconv", "n2 c4 o8 x10x12 k3x3 s2x2 p0:1x1:0"),
    ("up", 1, "torch", "transposed n2 c4 o8 x10x12 k4x4 s2x2 p1x1"),
    ("", 1, "torch", "n2 c4 o4 x10x12 k1x1"),
}


def noted(profile):
    return {(row.layer, row.calls, row.by, row.convolution) for row in profile.rows}


def test_every_convolution_is_noted_once_for_each_kind_and_layer(model):
    found = plainconv.profile(model, X, seconds=0)
    assert noted(found) == NOTED
    assert [row.seconds for row in found.rows] == sorted((row.seconds for row in found.rows), reverse=True)
    for row in found.rows:
        assert row.algorithm in plainconv.algorithms()
        assert row.ours.median_s > 0
        assert row.torchs.median_s > 0
        assert row.seconds == row.calls * (row.torchs if row.by == "torch" else row.ours).median_s
    assert found.share == pytest.approx(sum(row.seconds for row in found.rows) / found.model.median_s)


def test_a_swapped_model_is_computed_by_plainconv_and_named_algorithms_show(model):
    plainconv.swap(model, algorithm="shift", include="again")
    found = plainconv.profile(model, X, seconds=0)
    (again,) = (row for row in found.rows if row.layer == "again")
    assert (again.by, again.algorithm, again.calls) == ("plainconv", "shift", 2)
    assert noted(found) == {(*row[:2], "plainconv", row[3]) if row[0] == "again" else row for row in NOTED}
    assert type(model.again).__name__ == "PlainConv2d"


def test_training_names_the_algorithm_of_each_gradient(model):
    found = plainconv.profile(model, X, training=True, seconds=0, scale=2.0)
    assert {len(row.algorithm.split("/")) for row in found.rows} == {2, 3}
    model.requires_grad_(False)
    found = plainconv.profile(model, X, training=True, seconds=0)
    assert {len(row.algorithm.split("/")) for row in found.rows} == {1}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(model, training, fails):
    plainconv.swap(model, include="up")
    model.body.eval()
    model(X)["made"].sum().backward()
    model.fails = fails
    before, modes = copy.deepcopy(model), [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    if fails:
        with pytest.raises(ValueError, match="as asked"):
            plainconv.profile(model, X, training=training, seconds=0)
    else:
        plainconv.profile(model, X, training=training, seconds=0)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), gradients, strict=True))
    for name, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("training", [False, True])
def test_the_inputs_are_left_as_they_were(model, training):
    class Adding(nn.Module):
        def forward(self, x, by):
            return model(x.add_(by["more"]))

    asks = X.clone().requires_grad_()
    inputs = X.clone(), asks * 2  # no leaf
    before = [x.detach().clone() for x in inputs]
    by = {"more": torch.ones(4, 1, 1)}
    for x in inputs if training else inputs[:1]:
        plainconv.profile(nn.Sequential(model), x, training=training, seconds=0)
    plainconv.profile(Adding(), inputs[0], training=training, seconds=0, by=by)
    for x, values in zip(inputs, before, strict=True):
        assert torch.equal(x, values)
    assert asks.grad is None


def test_calls_are_replayed_on_tensors_that_lie_alike(model, served):
    last = X.to(memory_format=torch.channels_last)
    found = plainconv.profile(model.to(memory_format=torch.channels_last), last, seconds=0)
    assert all("channels_last" in row.convolution for row in found.rows)
    expanded = X[:1].expand(3, -1, -1, -1)
    like = profiling._Like.of(expanded, expanded)
    assert like.filled().stride() == expanded.stride()
    assert like.filled().shape == expanded.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = plainconv.profile(model, X, seconds=0)
    assert all("bfloat16" in row.convolution for row in found.rows)


SAME = [
    ("n2 c4 o6 x9x8 k3x2 s2 p1:0x0:2", False),
    ("n2 c4 o6 x9x8 k3x2 p-1:2x1:0", False),
    ("n2 c4 o6 x9 k3 p1 d2 mreflect", False),
    ("n2 c4 o6 x9x8 k3x3 p-1:2x1:0 g2 mreplicate", False),
    ("n1 c2 o2 x5x6x4 k3x3x3 p1 mcircular", False),
    ("n2 c4 o6 x10x8 k3x2 s2 p1x0", True),
]


@pytest.mark.parametrize(("text", "transposed"), SAME)
def test_torch_is_asked_for_the_same(text, transposed):
    problem = ConvProblem.parse(text)
    x, w = torch.randn(problem.output_shape if transposed else problem.input_shape), torch.randn(problem.weight_shape)
    bias = torch.randn(problem.in_channels if transposed else problem.out_channels)
    how = {"stride": problem.stride, "padding": problem.padding, "dilation": problem.dilation, "groups": problem.groups}
    if transposed:
        least = [
            (y - 1) * s - sum(p) + k
            for y, s, p, k in zip(problem.out, problem.stride, problem.padding, problem.kernel, strict=True)
        ]
        how["output_padding"] = tuple(size - short for size, short in zip(problem.spatial, least, strict=True))
        assert any(how["output_padding"])
    else:
        how["padding_mode"] = problem.padding_mode
    ours = getattr(plainconv, f"conv{'_transpose' * transposed}{problem.dims}d")(x, w, bias, **how)
    torch.testing.assert_close(profiling._torchs(problem, transposed)(x, w, bias), ours, rtol=1e-4, atol=1e-4)


def test_what_torch_has_not_has_no_time_of_torch_s():
    layer = plainconv.nn.ConvTranspose1d(2, 2, 3, padding=1, padding_mode="reflect")
    (row,) = plainconv.profile(layer, torch.randn(1, 2, 9), seconds=0).rows
    assert (row.torchs, row.ratio, row.layer, row.by) == (None, None, "", "plainconv")


def made_up():
    def row(layer, calls, by, ours, torchs):
        times = [seconds and Timing(seconds, seconds, seconds, 9) for seconds in (ours, torchs)]
        return profiling.Row(layer, calls, by, "n1 c1 o1 x9 k3", "direct", *times)

    rows = (
        row("stem", 2, "torch", 1e-3, 2e-3),
        row("", 1, "plainconv", 3e-3, 6e-3),
        row("last", 1, "plainconv", 1e-3, None),
    )
    return profiling.Profile(rows, Timing(1e-2, 1e-2, 1e-2, 9), False)


def test_it_prints_as_a_table():
    assert str(made_up()) == (
        "layer        convolution     calls  by         share  torch  plainconv  ratio  algorithm\n"
        "stem         n1 c1 o1 x9 k3      2  torch      40.0%   2 ms       1 ms  2.00x  direct\n"
        "(the model)  n1 c1 o1 x9 k3      1  plainconv  30.0%   6 ms       3 ms  2.00x  direct\n"
        "last         n1 c1 o1 x9 k3      1  plainconv  10.0%      -       1 ms      -  direct\n"
        "convolution takes 80% of 10 ms for a run; all of it: 13 ms by torch, 8 ms by plainconv"
    )


def test_it_draws_itself():
    figure = made_up().plot()
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["stem (2 calls)", "(the model)", "last"]
    bars = {container.get_label(): [bar.get_width() for bar in container] for container in axes.containers}
    assert bars == {"torch": [4e-3, 6e-3], "plainconv": [2e-3, 3e-3, 1e-3]}
    assert profiling.Profile((), Timing(1, 1, 1, 3), True).plot().axes


def test_no_convolution_is_no_error():
    assert plainconv.profile(nn.ReLU(), torch.ones(2), seconds=0).rows == ()


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"argument 'model' must be torch.nn.Module, not function"):
        plainconv.profile(F.relu, X)
    with pytest.raises(RuntimeError, match="profile comes before a model is wrapped, sharded or compiled"):
        plainconv.profile(nn.DataParallel(nn.Conv2d(4, 4, 3)), X)
    for lazy in (nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(affine=False)):
        with pytest.raises(RuntimeError, match=r"layer '0', a Lazy\w+, has no weight yet; call the model once"):
            plainconv.profile(nn.Sequential(lazy), X)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"call it outside of torch.inference_mode\(\)"):
        plainconv.profile(nn.Conv2d(4, 4, 3), X, training=True)
    with torch.inference_mode():
        assert plainconv.profile(nn.Conv2d(4, 4, 3), X, seconds=0).rows
