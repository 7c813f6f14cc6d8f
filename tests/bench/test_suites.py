"""The suites: what torch would make of every layer, and what is cut from those that are too long."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from plainconv.bench import suites
from plainconv.bench.suites import CUT_FLOP, Layer, load, named
from plainconv.files import InputError
from plainconv.problem import ConvProblem, Direction

LAYERS = [layer for layers in load().values() for layer in layers]


def test_every_suite_has_layers_with_a_source():
    assert len(load()) == 43
    assert len(LAYERS) == 442
    assert all(layer.source and layer.name and layer.count >= 1 for layer in LAYERS)
    assert sum(layer.transposed for layer in LAYERS) == 13


def shape_by_torch(layer: Layer) -> tuple[int, ...]:
    p = layer.problem
    padding = [lo for lo, _ in p.padding]
    x, w = torch.empty(layer.input_shape, device="meta"), torch.empty(p.weight_shape, device="meta")
    if layer.transposed:
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[p.dims - 1]
        return function(x, w, None, p.stride, padding, layer.output_padding, p.groups, p.dilation).shape
    return (F.conv1d, F.conv2d, F.conv3d)[p.dims - 1](x, w, None, p.stride, padding, p.dilation, p.groups).shape


@pytest.mark.parametrize("cut", [False, True])
def test_torch_makes_the_same_shapes(cut):
    for layer in LAYERS:
        layer = layer.cut() if cut else layer
        assert shape_by_torch(layer) == layer.output_shape, layer


def test_known_layers():
    first = load()["resnet50_v1.5_mlperf"][0]
    assert str(first.problem) == "n1 c3 o64 x224x224 k7x7 s2x2 p3x3"
    assert first.flop == 2 * 112 * 112 * 64 * 3 * 49
    up = load()["dcgan_transposed"][1]
    assert (up.input_shape, up.output_shape) == ((64, 1024, 4, 4), (64, 512, 8, 8))
    assert up.direction(Direction.FORWARD) is Direction.GRAD_INPUT
    assert up.direction(Direction.GRAD_INPUT) is Direction.FORWARD
    assert up.direction(Direction.GRAD_WEIGHT) is Direction.GRAD_WEIGHT


def test_the_batch_is_cut_first_then_the_extent():
    whole = Layer("s", "l", ConvProblem.parse("n64 c64 o64 x112x112 k3x3 p1"))
    assert whole.cut(whole.flop) is whole
    fewer = whole.cut(whole.flop / 3)
    assert fewer.problem == dataclasses.replace(whole.problem, batch=21)
    smaller = whole.cut(whole.flop / 64 / 4)
    assert smaller.problem == dataclasses.replace(whole.problem, batch=1, spatial=(56, 56))
    least = whole.cut(1.0)
    assert least.problem == dataclasses.replace(whole.problem, batch=1, spatial=(1, 1))


def test_no_layer_is_over_the_limit_when_cut():
    for layer in LAYERS:
        cut = layer.cut()
        assert cut.flop <= CUT_FLOP
        assert (cut is layer) == (layer.flop <= CUT_FLOP)
        if cut is not layer:
            assert cut.flop > 0.4 * CUT_FLOP or cut.problem.batch == 1, "no more is cut than must be"


def test_names():
    assert named(["seed_mnist", "seed_mnist"]) == list(load()["seed_mnist"])
    with pytest.raises(InputError, match="unknown suite 'resnet'"):
        named(["resnet"])
    assert suites.load() is load()
