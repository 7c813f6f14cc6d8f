"""Other libraries on the same layers, forward: what each is called with, or a sentence why it is not.

Each is used as its own documents say. onnxruntime, openvino and opencv are given a network of one layer, whose weight
is a constant: they may lay it out for themselves beforehand, which a call of torch's or of ours does anew each time.
scipy has no channels, strides or groups: it correlates every pair of channels, on one thread.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from plainconv.bench.calls import Call, Tensors
from plainconv.bench.suites import Layer
from plainconv.border import inner
from plainconv.files import InputError

Other = Callable[[Layer, Tensors, int], Call | str]  # a layer, its tensors, threads -> the call, or why there is none

MOST_PAIRS = 256  # pairs of channels that scipy is given, over all images


def others(names: Sequence[str]) -> dict[str, Library]:
    """Name -> the library; InputError for a name that is not known, or whose package is not installed."""
    for name in names:
        if name not in LIBRARIES:
            raise InputError(f"unknown library {name!r}; libraries are {', '.join(LIBRARIES)}")
        for module, package in LIBRARIES[name].modules.items():
            if importlib.util.find_spec(module) is None:
                raise InputError(f"--against {name} needs {package}, which is not installed: pip install {package}")
    return {name: LIBRARIES[name] for name in names}


def call_of(library: Library, layer: Layer, given: Tensors, direction: str, threads: int) -> Call | str:
    """The call of another library, or one sentence why there is none; what the library itself raises is a sentence."""
    if direction != "forward" or layer.transposed:
        return "only convolutions themselves are compared, not their transposed form or their gradients"
    if given.x.dtype not in library.dtypes:
        known = " and ".join(str(dtype).removeprefix("torch.") for dtype in library.dtypes)
        return f"it is compared in {known}, not in {str(given.x.dtype).removeprefix('torch.')}"
    try:
        call = library.make(layer, given, threads)
        if not isinstance(call, str):
            call()
        return call
    except Exception as error:  # a library of others says no in its own way
        return f"it refuses: {' '.join(str(error).split())[:160]}"


def _onnxruntime(layer: Layer, given: Tensors, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(_onnx(layer, given), options, providers=["CPUExecutionProvider"])
    feed = {"x": given.x.numpy()}
    return lambda: (torch.from_numpy(session.run(None, feed)[0]),)


def _openvino(layer: Layer, given: Tensors, threads: int) -> Call:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}  # bfloat16 otherwise, where it can
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(_onnx(layer, given), b""), "CPU", settings)
    request, x = compiled.create_infer_request(), given.x.numpy()

    def call() -> tuple[torch.Tensor, ...]:
        request.infer({0: x}, share_inputs=True)
        return (torch.from_numpy(request.get_output_tensor(0).data),)

    return call


def _opencv(layer: Layer, given: Tensors, threads: int) -> Call:
    import cv2
    import numpy as np

    cv2.setNumThreads(threads)
    network = cv2.dnn.readNetFromONNX(np.frombuffer(_onnx(layer, given), np.uint8))
    x = given.x.numpy()

    def call() -> tuple[torch.Tensor, ...]:
        network.setInput(x)
        return (torch.from_numpy(network.forward()),)

    return call


def _jax(layer: Layer, given: Tensors, threads: int) -> Call | str:
    if threads != (cores := len(os.sched_getaffinity(0))):
        return f"it takes all {cores} cores and cannot be held to {threads} threads"
    import jax

    jax.config.update("jax_enable_x64", given.x.dtype == torch.float64)
    p = layer.problem
    letters = "DHW"[-p.dims :]
    x, w = jax.numpy.asarray(given.x.numpy()), jax.numpy.asarray(given.w.numpy())

    @jax.jit  # type: ignore[untyped-decorator]
    def convolve(x: Any, w: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x,
            w,
            p.stride,
            p.padding,
            rhs_dilation=p.dilation,
            dimension_numbers=(f"NC{letters}", f"OI{letters}", f"NC{letters}"),
            feature_group_count=p.groups,
        )

    return lambda: (torch.utils.dlpack.from_dlpack(convolve(x, w).block_until_ready()),)


def _scipy(layer: Layer, given: Tensors, threads: int) -> Call | str:
    import numpy as np
    import scipy.signal

    p = layer.problem
    pairs = p.batch * p.out_channels * p.group_in
    if pairs > MOST_PAIRS:
        return f"it has no channels, and {pairs} pairs of them one by one are no comparison"
    x = np.pad(given.x.numpy(), [(0, 0), (0, 0), *p.padding])
    spaced = torch.zeros(*p.weight_shape[:2], *(d * (k - 1) + 1 for k, d in zip(p.kernel, p.dilation, strict=True)))
    w = spaced.to(given.w.dtype).numpy()  # dilation as zeros between the taps
    w[inner(slice(None, None, d) for d in p.dilation)] = given.w.numpy()
    steps = tuple(slice(None, None, stride) for stride in p.stride)

    def call() -> tuple[torch.Tensor, ...]:
        y = np.empty(p.output_shape, x.dtype)
        for n in range(p.batch):
            for o in range(p.out_channels):
                first = o // p.group_out * p.group_in
                y[n, o] = scipy.signal.correlate(x[n, first : first + p.group_in], w[o], "valid")[(0, *steps)]
        return (torch.from_numpy(y),)

    return call


def _onnx(layer: Layer, given: Tensors) -> bytes:
    """A network of the one layer, weight included, as ONNX, in float32."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    p = layer.problem
    node = helper.make_node(
        "Conv",
        ["x", "w"],
        ["y"],
        kernel_shape=p.kernel,
        strides=p.stride,
        dilations=p.dilation,
        group=p.groups,
        pads=[*(lo for lo, _ in p.padding), *(hi for _, hi in p.padding)],
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, p.input_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, p.output_shape)],
        [numpy_helper.from_array(given.w.numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@dataclass(frozen=True)
class Library:
    """What makes its calls, the modules it takes with the packages that hold them, and the types it computes in."""

    make: Other
    modules: dict[str, str]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


LIBRARIES = {
    "onnxruntime": Library(_onnxruntime, {"onnxruntime": "onnxruntime", "onnx": "onnx"}),
    "openvino": Library(_openvino, {"openvino": "openvino", "onnx": "onnx"}),
    "jax": Library(_jax, {"jax": "jax"}, (torch.float32, torch.float64)),
    "scipy": Library(_scipy, {"scipy": "scipy"}, (torch.float32, torch.float64)),
    "opencv": Library(_opencv, {"cv2": "opencv-python-headless", "onnx": "onnx"}),
}
