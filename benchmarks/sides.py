"""Who computes a model: torch in its memory formats, torch.compile, ONNX Runtime, OpenVINO, and plainconv.

A side is made once, and then is a call without arguments.  What cannot be had raises `Absent` with a sentence.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import plainconv
from plainconv.problem import FORMATS

CONTIGUOUS, LAST = "contiguous", "channels_last"


class Absent(Exception):
    """Why there is no such side."""


@dataclass
class Given:
    """A model in evaluation mode with its input, and the file that torch.onnx made of it, once asked for."""

    model: nn.Module
    x: Tensor
    folder: Path
    _onnx: Path | Absent | None = field(default=None, repr=False)

    def laid(self, layout: str) -> tuple[nn.Module, Tensor]:
        """A copy of the model, and the input, in a memory format."""
        model = copy.deepcopy(self.model)
        if layout == CONTIGUOUS:
            return model, self.x
        if self.x.dim() not in FORMATS:
            raise Absent("torch has no channels_last for it")
        memory_format = FORMATS[self.x.dim()]
        for parameter in model.parameters():
            if parameter.dim() == self.x.dim():
                parameter.data = parameter.data.contiguous(memory_format=memory_format)
        return model, self.x.contiguous(memory_format=memory_format)

    def onnx(self) -> Path:
        """The model as a file for other runtimes."""
        if self._onnx is None:
            self._onnx = self._exported()
        if isinstance(self._onnx, Absent):
            raise self._onnx
        return self._onnx

    def _exported(self) -> Path | Absent:
        path = self.folder / "model.onnx"
        try:
            with torch.no_grad(), quiet():
                torch.onnx.export(self.model, (self.x,), str(path), dynamo=True, verbose=False)
        except Exception as error:  # whatever it is that torch.onnx does not understand
            return Absent(f"torch.onnx.export says {_line(error)}")
        return path


@contextlib.contextmanager
def given(model: nn.Module, x: Tensor) -> Iterator[Given]:
    """What all sides are made from."""
    with tempfile.TemporaryDirectory() as folder:
        yield Given(model, x, Path(folder))


def of_torch(given: Given, layout: str) -> Callable[[], Any]:
    """torch as it is."""
    model, x = given.laid(layout)
    return lambda: model(x)


def of_compile(given: Given) -> Callable[[], Any]:
    """torch.compile, with the options that it has by default."""
    compiled = torch.compile(copy.deepcopy(given.model))
    try:
        with quiet():
            compiled(given.x)
    except Exception as error:  # whatever it is that torch.compile does not understand
        raise Absent(f"torch.compile says {_line(error)}") from None
    return lambda: compiled(given.x)


def of_onnxruntime(given: Given) -> Callable[[], Any]:
    """ONNX Runtime, all its optimisations, on the processor."""
    installed("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(given.onnx()), options, providers=["CPUExecutionProvider"])
    except Absent:
        raise
    except Exception as error:  # an operator that it lacks
        raise Absent(f"ONNX Runtime says {_line(error)}") from None
    inputs = {session.get_inputs()[0].name: given.x.numpy()}
    return lambda: session.run(None, inputs)[0]


def of_openvino(given: Given) -> Callable[[], Any]:
    """OpenVINO, tuned for the time of one call, in float32."""
    installed("openvino")
    import openvino

    asked = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    try:
        compiled = openvino.Core().compile_model(str(given.onnx()), "CPU", asked)
    except Absent:
        raise
    except Exception as error:  # an operator that it lacks
        raise Absent(f"OpenVINO says {_line(error)}") from None
    request, x = compiled.create_infer_request(), given.x.numpy()
    return lambda: request.infer([x], share_inputs=True)[0]


def swapped(given: Given, layout: str) -> tuple[nn.Module, Tensor]:
    """plainconv, in the place of the convolutions alone."""
    model, x = given.laid(layout)
    plainconv.swap(model)
    return model, x


def optimized(given: Given) -> Any:
    """plainconv, with all that can be done beforehand."""
    with quiet():
        return plainconv.optimize(given.model, given.x)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters write many pages of what concerns themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def installed(package: str) -> None:
    """Raises Absent where it is not."""
    if find_spec(package) is None:
        raise Absent(f"{package} is not installed")


def _line(error: Exception) -> str:
    """What it says of its cause, in one line."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0][:200] if lines else 'nothing more'}"
