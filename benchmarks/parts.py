"""Which part of a run is convolution and what may be fused into it, as it happens within the model.

A part is p of a run.  If it becomes s times as fast and nothing else changes, the whole becomes 1 / (1 - p + p / s)
times as fast: that is what a faster convolution promises, and the table says whether it is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from plainconv import functional
from plainconv.inference import Prepacked

_CONVOLUTIONS = {
    getattr(of, f"conv{way}{dims}d") for of in (F, functional) for way in ("", "_transpose") for dims in (1, 2, 3)
}
_BEHIND = {  # function -> the name by which optimize tells that it took it in
    **dict.fromkeys((F.batch_norm, torch.batch_norm), "batch_norm"),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__), "add"),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu), "relu"),
    **dict.fromkeys((F.relu6, F.hardtanh), "relu6"),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), "sigmoid"),
    **{function: function.__name__ for function in (F.leaky_relu, F.hardswish, F.silu, F.gelu)},
}
_PLACE = {"batch_norm": 1, "add": 2}  # behind a convolution, which is 0; an activation is the last


class Watch(TorchFunctionMode):
    """Sums the seconds of convolutions, and of norms, additions and activations that follow them.

    Attributes:
        convolution: seconds of the convolutions, forward, and backward where there is a backward.
        behind: seconds of those functions that follow them and are named, forward.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        super().__init__()
        self._names = names
        self.convolution = self.behind = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = perf_counter()
        result = func(*args, **(kwargs or {}))
        spent = perf_counter() - begin
        if func in _CONVOLUTIONS:
            place = 0
            self.convolution += spent
            self._watch_backward(result)
        elif (name := _BEHIND.get(func)) in self._names:
            place = _PLACE.get(str(name), 3)
            if not any(getattr(given, "_place_behind", place) < place for given in args[:2]):
                return result
            self.behind += spent
        else:
            return result
        result._place_behind = place
        return result

    def _watch_backward(self, result: Tensor) -> None:
        if result.grad_fn is None:
            return
        begin = 0.0

        def before(*_: Any) -> None:
            nonlocal begin
            begin = perf_counter()

        def after(*_: Any) -> None:
            self.convolution += perf_counter() - begin

        result.grad_fn.register_prehook(before)
        result.grad_fn.register_hook(after)


class Calls:
    """Sums the seconds of the calls that `optimize` made, which are layers."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        self._layers = [layer for layer in model.modules() if isinstance(layer, Prepacked)]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While this is on, they are."""
        begin = 0.0

        def before(*_: Any) -> None:
            nonlocal begin
            begin = perf_counter()

        def after(*_: Any) -> None:
            self.seconds += perf_counter() - begin

        with contextlib.ExitStack() as hooks:
            for layer in self._layers:
                hooks.callback(layer.register_forward_pre_hook(before).remove)
                hooks.callback(layer.register_forward_hook(after).remove)
            yield


def promise(p: float, s: float) -> float:
    """How many times as fast the whole becomes."""
    return 1 / (1 - p + p / s)
