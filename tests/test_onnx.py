"""What torch.onnx.export makes of a swapped model, run by ONNX Runtime, with another batch than it was traced with."""

import io
import logging

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import plainconv
from plainconv.onnx import convolution
from plainconv.problem import Direction, Geometry

QUICK = ("2-D", "reflect", "transposed 2-D")
LAYERS = {
    "1-D": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 11)),
    "2-D": (nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=2), (4, 12, 9)),
    "3-D": (nn.Conv3d(2, 3, 2, bias=False), (2, 4, 5, 6)),
    "same": (nn.Conv2d(4, 6, (3, 4), padding="same"), (4, 7, 9)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 7, 9)),
    "replicate": (nn.Conv1d(4, 6, 5, padding=2, padding_mode="replicate"), (4, 9)),
    "circular": (nn.Conv2d(4, 6, 3, padding=(1, 0), padding_mode="circular"), (4, 7, 9)),
    "transposed 1-D": (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, groups=2), (4, 11)),
    "transposed 2-D": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2), (4, 5, 6)),
    "transposed 3-D": (nn.ConvTranspose3d(2, 2, 2, bias=False), (2, 4, 5, 3)),
}


def exported(model, x):
    """The model as ONNX, its batch open."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    file = io.BytesIO()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.onnx.export(model.eval(), (x,), dynamic_shapes=shapes, dynamo=True, verbose=False).save(file)
    made = onnx.load_model_from_string(file.getvalue())
    onnx.checker.check_model(made)
    return made


def run(made, x):
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(result)


def check(model, shape):
    """Export it, and run it with another batch; the types of its nodes."""
    made = exported(model, torch.randn(2, *shape))
    x = torch.randn(3, *shape)
    with torch.no_grad():
        torch.testing.assert_close(run(made, x), model(x), rtol=1e-4, atol=1e-5)
    return [node.op_type for node in made.graph.node]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAYERS])
def test_a_layer_becomes_standard_nodes(name):
    layer, shape = LAYERS[name]
    plainconv.swap(layer)
    kinds = check(layer, shape)
    assert kinds.count("ConvTranspose" if "transposed" in name else "Conv") == 1
    assert ("Pad" in kinds) == (name in ("reflect", "replicate", "circular"))


class Function(nn.Module):
    """A call of one of the functions, with a weight of its own."""

    def __init__(self, function, *shape, **how):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(6))
        self.function, self.how = function, how

    def forward(self, x):
        return self.function(x, self.weight, self.bias, **self.how)


def test_an_activation_is_a_node_behind():
    model = Function(plainconv.conv2d, 6, 4, 3, 3, activation="leaky_relu(0.2)")
    made = exported(model, torch.randn(2, 4, 7, 9))
    (node,) = (node for node in made.graph.node if node.op_type == "LeakyRelu")
    assert onnx.helper.get_node_attr_value(node, "alpha") == pytest.approx(0.2)
    x = torch.randn(3, 4, 7, 9)
    with torch.no_grad():
        torch.testing.assert_close(run(made, x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "shape", "how"),
    [
        (plainconv.conv2d, (6, 4, 3, 3), {"padding": ((-1, 2), "causal")}),
        (plainconv.conv_transpose2d, (4, 6, 3, 3), {"padding": ((-1, 2), (0, -3)), "stride": 2}),
    ],
)
def test_sides_that_crop(function, shape, how):
    check(Function(function, *shape, **how), (4, 7, 9))


def test_a_transposed_padding_mode_is_refused():
    geometry = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), 1, "reflect")
    with pytest.raises(NotImplementedError, match="ONNX has no transposed convolution with padding_mode='reflect'"):
        convolution(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), None, Direction.GRAD_INPUT, (1, 1, 4, 4), geometry)
