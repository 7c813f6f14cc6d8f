"""ONNX's own vectors for Conv and ConvTranspose, out of the onnx wheel: its node tests and the models of its backend.

ONNX names things differently: pads are all beginnings, then all ends; auto_pad chooses pads from sizes; output_shape
chooses the pads of a ConvTranspose, total = stride*(size-1) + output_padding + span - output_shape, and where less is
asked for than nothing, the result grows behind.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from checks import EVERYWHERE
from onnx import numpy_helper
from onnx.backend.test.case import node as node_cases
from onnx.backend.test.case.node import conv, convtranspose
from onnx.backend.test.loader import load_model_tests
from torch import Tensor

import plainconv

OPERATORS = ("Conv", "ConvTranspose")
AUTO_PADS = {"SAME_UPPER": "same_upper", "SAME_LOWER": "same_lower", "VALID": 0}


class Vector(NamedTuple):
    operator: str
    attributes: dict[str, object]
    inputs: list[Tensor]
    output: Tensor
    rtol: float
    atol: float


def attributes_of(node: onnx.NodeProto) -> dict[str, object]:
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def tensor(value: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(value))


def read(path: Path) -> Tensor:
    return tensor(numpy_helper.to_array(onnx.load_tensor(path)))


def node_vectors() -> dict[str, Vector]:
    """Importing conv and convtranspose made their cases (and not those of all other operators)."""
    assert conv.Conv
    assert convtranspose.ConvTranspose
    found = {}
    for case in node_cases._NodeTestCases:
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].op_type in OPERATORS:
            ((inputs, outputs),) = case.data_sets
            given = [tensor(value) for value in inputs]
            found[case.name] = Vector(
                nodes[0].op_type, attributes_of(nodes[0]), given, tensor(outputs[0]), case.rtol, case.atol
            )
    return found


def model_vectors(kind: str) -> dict[str, Vector]:
    """Models of one convolution whose weights are stored in the model."""
    found = {}
    for case in load_model_tests(kind=kind):
        if "conv" not in case.name.lower() or case.model_dir is None:
            continue
        model = onnx.load(Path(case.model_dir) / "model.onnx")
        if [node.op_type for node in model.graph.node] not in (["Conv"], ["ConvTranspose"]):
            continue
        node = model.graph.node[0]
        stored = {one.name: tensor(numpy_helper.to_array(one)) for one in model.graph.initializer}
        named = [one.name for one in model.graph.input if one.name not in stored]
        for data in sorted(Path(case.model_dir).glob("test_data_set_*")):
            values = stored | {name: read(data / f"input_{i}.pb") for i, name in enumerate(named)}
            found[f"{case.name}_{data.name[-1]}"] = Vector(
                node.op_type,
                attributes_of(node),
                [values[name] for name in node.input],
                read(data / "output_0.pb"),
                case.rtol,
                case.atol,
            )
    return found


VECTORS = node_vectors() | model_vectors("pytorch-converted") | model_vectors("pytorch-operator")


def arguments(vector: Vector) -> dict[str, object]:
    """ONNX's attributes as plainconv's arguments."""
    attributes = vector.attributes
    x, w = vector.inputs[:2]
    dims = x.dim() - 2
    assert tuple(attributes.get("kernel_shape", w.shape[2:])) == tuple(w.shape[2:])
    stride = tuple(attributes.get("strides", [1] * dims))
    dilation = tuple(attributes.get("dilations", [1] * dims))
    pads = attributes.get("pads", [0] * (2 * dims))
    padding = AUTO_PADS.get(attributes.get("auto_pad", "NOTSET"), tuple(zip(pads[:dims], pads[dims:], strict=True)))
    given = {"stride": stride, "dilation": dilation, "groups": attributes.get("group", 1), "padding": padding}
    if vector.operator == "ConvTranspose":
        extra = tuple(attributes.get("output_padding", [0] * dims))
        if "output_shape" in attributes:
            sides = zip(
                x.shape[2:], w.shape[2:], stride, dilation, extra, attributes["output_shape"][-dims:], strict=True
            )
            totals = [s * (size - 1) + e + (k - 1) * d + 1 - wanted for size, k, s, d, e, wanted in sides]
            upper = attributes.get("auto_pad") == "SAME_UPPER"
            given["padding"] = tuple(shared(total, upper) for total in totals)
        given["output_padding"] = extra
    return given


def shared(total: int, upper: bool) -> tuple[int, int]:
    """ONNX: half in front and half behind; an odd one behind for SAME_UPPER, else in front."""
    if total < 0:
        return 0, total
    less, more = total // 2, total - total // 2
    return (less, more) if upper else (more, less)


def served(vector: Vector, algorithm: str = "auto") -> Tensor:
    dims = vector.inputs[0].dim() - 2
    family = "conv_transpose" if vector.operator == "ConvTranspose" else "conv"
    function = getattr(plainconv, f"{family}{dims}d")
    return function(*vector.inputs, **arguments(vector), algorithm=algorithm)


def test_the_wheel_has_what_it_had():
    """Without this, a wheel that moved its data would let everything below pass."""
    names = set(VECTORS)
    assert {"test_conv_with_strides_and_asymmetric_padding", "test_conv_with_autopad_same"} <= names
    assert {"test_convtranspose_output_shape", "test_convtranspose_kernel_shape", "test_convtranspose_pads"} <= names
    assert {"test_convtranspose_autopad_same", "test_convtranspose_1d", "test_convtranspose_3d"} <= names
    assert {"test_Conv1d_dilated_0", "test_Conv3d_stride_padding_0", "test_operator_convtranspose_0"} <= names
    assert sum(vector.operator == "Conv" for vector in VECTORS.values()) >= 30
    assert sum(vector.operator == "ConvTranspose" for vector in VECTORS.values()) >= 13


@pytest.mark.parametrize("name", sorted(VECTORS))
@pytest.mark.parametrize("algorithm", ["auto", *EVERYWHERE])
def test_vector(name, algorithm):
    vector = VECTORS[name]
    if algorithm == "loops" and vector.output.numel() * vector.inputs[1][0].numel() > 1e6:
        pytest.skip("Python loops would take minutes")
    ours = served(vector, algorithm)
    assert ours.dtype == vector.output.dtype
    assert ours.shape == vector.output.shape
    # The vectors are float32 with the tolerances of ONNX's own runner; whole numbers are met exactly but by fft.
    whole = all(torch.equal(t, t.round()) for t in (*vector.inputs, vector.output))
    if whole and algorithm != "fft":
        assert torch.equal(ours, vector.output)
    else:
        scale = float(vector.output.abs().max())
        assert torch.allclose(ours, vector.output, rtol=vector.rtol, atol=max(vector.atol, 1e-6 * scale))


def test_auto_pad_same_lower():
    """The wheel has no vector for it; the rule is SAME_UPPER's with the odd one in front."""
    x, w = torch.arange(25.0).view(1, 1, 5, 5), torch.arange(4.0).view(1, 1, 2, 2)
    upper = plainconv.conv2d(x, w, padding="same_upper")
    lower = plainconv.conv2d(x, w, padding="same_lower")
    assert torch.equal(upper, plainconv.conv2d(x, w, padding=((0, 1), (0, 1))))
    assert torch.equal(lower, plainconv.conv2d(x, w, padding=((1, 0), (1, 0))))
