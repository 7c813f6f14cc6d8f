"""Which convolutions of a model take its time, and what plainconv and torch need for each.

    print(plainconv.profile(model, images))

The model runs once while every call of a convolution is noted: the function, what it was given, and the layer it was
called in.  Then the model is timed as it is, and each kind of call is made again by itself, on tensors that lie alike
in memory, by plainconv and by torch in turn.  So it does not matter whose layers they are: those of a model that was
swapped, plainconv.nn's, torch's, or none at all (a function called in some forward).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from plainconv import functional, ops
from plainconv.inference import Prepacked
from plainconv.plan import Explanation
from plainconv.problem import ConvProblem, Direction
from plainconv.replace import check_model, check_weights
from plainconv.timing import Timing, duration, in_turn, keep_freed_memory

TURN_S = 2e-2  # how long a side goes on before it is the other's turn: torch's threads stay awake for a while
MODEL_S = 2.0  # how long the whole model is timed, about

_Function = Callable[..., Tensor]
_OURS: dict[_Function, _Function] = {
    functional.conv1d: F.conv1d,
    functional.conv2d: F.conv2d,
    functional.conv3d: F.conv3d,
    functional.conv_transpose1d: F.conv_transpose1d,
    functional.conv_transpose2d: F.conv_transpose2d,
    functional.conv_transpose3d: F.conv_transpose3d,
}
_TORCHS: dict[_Function, _Function] = {theirs: ours for ours, theirs in _OURS.items()}


@dataclass(frozen=True)
class Row:
    """The calls of one kind in one layer.

    Attributes:
        layer: the name in the model of the module that called, "" for the model itself.
        calls: how many in a run of the model.
        by: who computed them, "plainconv" or "torch".
        convolution: sizes and what else there is to say, as text.
        algorithm: plainconv's for such a call; "/" between those of a training step.
        ours, torchs: time of one call; torch has no counterpart to some paddings (None).
    """

    layer: str
    calls: int
    by: str
    convolution: str
    algorithm: str
    ours: Timing
    torchs: Timing | None

    @property
    def seconds(self) -> float:
        """Of all the calls, by whom they were computed."""
        timing = self.torchs if self.by == "torch" else self.ours
        assert timing is not None
        return self.calls * timing.median_s

    @property
    def ratio(self) -> float | None:
        """torch's time over ours."""
        return None if self.torchs is None else self.torchs.median_s / self.ours.median_s


@dataclass(frozen=True)
class Profile:
    """What a model's convolutions take; prints as a table, the longest first, and draws itself.

    Attributes:
        rows: one for each layer and kind of call, the longest first.
        model: the time of a whole run, as the model is.
        training: whether a run is forward and backward.
    """

    rows: tuple[Row, ...]
    model: Timing
    training: bool

    @property
    def share(self) -> float:
        """The part of the model's time that convolution takes: the calls' times by themselves over that of a run."""
        return sum(row.seconds for row in self.rows) / self.model.median_s

    def seconds_by(self, side: str) -> float:
        """What a run would take if all convolutions were "plainconv"'s, or all "torch"'s that it has."""
        saved = 0.0
        for row in self.rows:
            timing = row.ours if side == "plainconv" else row.torchs
            saved += 0.0 if timing is None else row.seconds - row.calls * timing.median_s
        return self.model.median_s - saved

    def plot(self) -> Any:
        """A matplotlib Figure: for each layer the time of its calls, torch's and plainconv's."""
        from plainconv.plots import convolutions

        drawn = [
            {
                "name": _named(row),
                "plainconv": row.calls * row.ours.median_s,
                "torch": row.calls * row.torchs.median_s if row.torchs else None,
            }
            for row in self.rows
        ]
        return convolutions(drawn, self._total())

    def _total(self) -> str:
        run = "a step forward and back" if self.training else "a run"
        told = f"convolution takes {self.share:.0%} of {duration(self.model.median_s)} for {run}"
        either = (f"{duration(self.seconds_by(side))} by {side}" for side in ("torch", "plainconv"))
        return f"{told}; all of it: {', '.join(either)}"

    def __str__(self) -> str:
        table = [("layer", "convolution", "calls", "by", "share", "torch", "plainconv", "ratio", "algorithm")]
        for row in self.rows:
            share, ratio = f"{row.seconds / self.model.median_s:.1%}", "-" if row.ratio is None else f"{row.ratio:.2f}x"
            torchs = duration(row.torchs.median_s) if row.torchs else "-"
            sides = share, torchs, duration(row.ours.median_s), ratio
            table.append((row.layer or "(the model)", row.convolution, str(row.calls), row.by, *sides, row.algorithm))
        wide = [max(map(len, column)) for column in zip(*table, strict=True)]
        right = {2, 4, 5, 6, 7}
        lines = [
            "  ".join(
                f"{cell:>{w}}" if i in right else f"{cell:<{w}}"
                for i, (cell, w) in enumerate(zip(row, wide, strict=True))
            )
            for row in table
        ]
        return "\n".join([*(line.rstrip() for line in lines), self._total()])

    __repr__ = __str__


def profile(model: nn.Module, *inputs: Any, training: bool = False, seconds: float = 0.3, **named: Any) -> Profile:
    """Measure which convolutions of a model take its time, which algorithm each gets, plainconv's time and torch's.

        plainconv.profile(model, images)                    # prints as a table
        plainconv.profile(model, images).plot()             # a matplotlib Figure
        plainconv.profile(model, images, training=True)     # forward and backward

    Args:
        model: any module, whose convolutions are torch's, plainconv's, or both; it is left as it was.
        inputs, named: what it is called with; it gets copies of all tensors, with gradients of their own.
        training: whether to run in training mode, forward and then backward from the sum of all outputs, instead of in
            evaluation mode without gradients.
        seconds: how long each kind of convolution is timed, about.

    A convolution is timed alone, on tensors of its own, which finds its weight in the caches more often than the model
    does; the shares are of the model's own time.  Padding that torch's layers do as an operation before is not counted.

    Returns:
        a Profile, which prints as a table.

    Raises:
        RuntimeError: the model is wrapped for training in parallel, or compiled, or has a lazy layer that was not
            called yet; or training within torch.inference_mode().
        TypeError: the model is no module, or has prepacked convolutions.
        Whatever the model raises.
    """
    check_model("profile", model)
    if any(isinstance(module, Prepacked) for module in model.modules()):
        raise TypeError(
            "profile sees calls of layers and functions, and convolutions of this model are prepacked; "
            "give it the model that it was made from"
        )
    check_weights("profile", model)
    if training and torch.is_inference_mode_enabled():
        raise RuntimeError("profile(training=True) needs gradients; call it outside of torch.inference_mode()")
    inputs, named = tree_map_only(Tensor, _copy, (inputs, named))
    run = partial(_step if training else _forward, model, inputs, named)
    with _as_it_was(model, training):
        with _names_of(model) as stack, _Noting(stack) as noting:
            run()
        keep_freed_memory()
        whole = in_turn({"model": run}, seconds=MODEL_S, least=3)["model"]
    measured: dict[_Call, _Measured] = {}
    rows = []
    for (layer, call), calls in noting.seen.items():
        if call not in measured:
            measured[call] = _measured(call, training, seconds)
        rows.append(Row(layer, calls, call.by, *measured[call]))
    return Profile(tuple(sorted(rows, key=lambda row: -row.seconds)), whole, training)


def _named(row: Row) -> str:
    return (row.layer or "(the model)") + (f" ({row.calls} calls)" if row.calls > 1 else "")


# -- running the model -----------------------------------------------------------------------------------------------


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _forward(model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    with torch.no_grad():
        model(*inputs, **named)


def _step(model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    with torch.enable_grad():
        made = [
            leaf for leaf in tree_leaves(model(*inputs, **named)) if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        torch.autograd.backward(made, [torch.ones_like(leaf) for leaf in made])


@contextmanager
def _as_it_was(model: nn.Module, training: bool) -> Iterator[None]:
    """Modes, buffers, gradients and random numbers are afterwards what they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with torch.random.fork_rng():
            model.train(training)
            for parameter, _ in gradients:
                parameter.grad = None
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for own, name, buffer, values in buffers:
                own[name] = buffer
                buffer.copy_(values)


@contextmanager
def _names_of(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running, the innermost last."""
    stack = [""]

    def leave(*_: Any) -> None:
        stack.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            before = module.register_forward_pre_hook(lambda *_, name=name: stack.append(name))
            hooks.callback(before.remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield stack


class _Like(NamedTuple):
    """How a tensor lies."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(tensor: Tensor, original: Tensor) -> _Like:
        return _Like(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, original.requires_grad)

    def filled(self) -> Tensor:
        """One that lies so; the user's random numbers are left alone."""
        size = 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        memory = torch.empty(max(size, 0), dtype=self.dtype, device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        if memory.is_floating_point() or memory.is_complex():
            (torch.view_as_real(memory) if memory.is_complex() else memory).normal_(generator=generator)
        else:
            memory.random_(0, 100, generator=generator)
        return memory.as_strided(self.shape, self.strides)


class _Call(NamedTuple):
    """A kind of call: plainconv's function, its tensors, its other arguments, and who computed it."""

    function: _Function
    input: _Like
    weight: _Like
    bias: _Like | None
    residual: _Like | None
    options: tuple[tuple[str, Any], ...]
    by: str


class _Noting(TorchFunctionMode):
    """Sees every call of the six functions, torch's and plainconv's."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack = stack
        self.seen: dict[tuple[str, _Call], int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)  # an error is the model's own
        if func in _OURS or func in _TORCHS:
            ours = _TORCHS.get(func, func)
            given = inspect.signature(ours).bind(*args, **kwargs).arguments
            key = self.stack[-1], _call(ours, "plainconv" if ours is func else "torch", **given)
            self.seen[key] = self.seen.get(key, 0) + 1
        return result


def _call(
    function: _Function,
    by: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    **options: Any,
) -> _Call:
    cast = input, weight, bias
    if torch.is_autocast_enabled(input.device.type):
        cast = ops.autocast(*cast)
    b = _Like.of(cast[2], bias) if bias is not None and cast[2] is not None else None
    frozen = tuple(sorted((name, _frozen(value)) for name, value in options.items()))
    r = None if residual is None else _Like.of(residual, residual)._replace(dtype=cast[0].dtype)
    return _Call(function, _Like.of(cast[0], input), _Like.of(cast[1], weight), b, r, frozen, by)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


# -- one kind of call ------------------------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """What the convolution is, plainconv's algorithms, and the time of one call."""

    convolution: str
    algorithm: str
    ours: Timing
    torchs: Timing | None


def _measured(call: _Call, training: bool, seconds: float) -> _Measured:
    options, transposed = dict(call.options), "transpose" in call.function.__name__
    likes = (call.input, call.weight, call.bias, call.residual)
    given = [None if like is None else like.filled() for like in likes]
    asks = [training and like is not None and like.requires_grad for like in likes]
    wanted = [Direction.FORWARD, *[Direction.GRAD_INPUT] * asks[0], *[Direction.GRAD_WEIGHT] * asks[1]]
    with torch.autocast(call.input.device.type, enabled=False):  # the types are those that it gave
        told = [_explained(given, transposed, way, options) for way in wanted]
        request = told[0].request
        sides: dict[str, _Function] = {"plainconv": lambda x, w, b, r: call.function(x, w, b, residual=r, **options)}
        if (theirs := _torchs(request.problem, transposed)) is not None:
            sides["torch"] = lambda x, w, b, r: functional.finished(theirs(x, w, b), options.get("activation"), r)
        calls = {name: _step_of(side, given, asks) for name, side in sides.items()}
        timings = in_turn(calls, seconds=seconds, turn_s=TURN_S)
    text = f"{'transposed ' * transposed}{request.problem}{' channels_last' * request.channels_last}"
    text += "" if request.dtype is torch.float32 else f" {str(request.dtype).removeprefix('torch.')}"
    return _Measured(text, "/".join(each.chosen for each in told), timings["plainconv"], timings.get("torch"))


def _explained(
    given: list[Tensor | None], transposed: bool, direction: Direction, options: dict[str, Any]
) -> Explanation:
    x, w, b, residual = given
    assert x is not None
    assert w is not None
    more: dict[str, Any] = {"transposed": transposed, "direction": direction.value, "residual": residual}
    return functional.explain(x, w, b, **options, **more)


def _step_of(function: _Function, given: list[Tensor | None], asks: list[bool]) -> Callable[[], object]:
    """A call, and the gradients that are asked for, as a training step makes them."""
    if not any(asks):
        return partial(function, *given)
    leaves = [None if tensor is None else tensor.detach() for tensor in given]
    wanted = [leaf.requires_grad_() for leaf, asked in zip(leaves, asks, strict=True) if leaf is not None and asked]
    cotangent = torch.ones_like(function(*leaves))

    def step() -> None:
        for leaf in wanted:
            leaf.grad = None
        with torch.enable_grad():
            function(*leaves).backward(cotangent)

    return step


def _torchs(problem: ConvProblem, transposed: bool) -> _Function | None:
    """The same by torch: its convolution, after its padding where it needs one; None if that is not all."""
    p = problem
    lo, hi = zip(*p.padding, strict=True)
    function = _OURS[getattr(functional, f"conv{'_transpose' * transposed}{p.dims}d")]
    plain = lo == hi and min(lo) >= 0 and p.padding_mode == "zeros"
    if transposed:
        if not plain:
            return None
        sizes = zip(p.spatial, p.out, p.kernel, p.stride, p.padding, p.dilation, strict=True)
        extra = [x - (y - 1) * s + sum(pair) - d * (k - 1) - 1 for x, y, k, s, pair, d in sizes]
        return lambda x, w, b=None: function(x, w, b, p.stride, lo, extra, p.groups, p.dilation)
    if plain:
        return lambda x, w, b=None: function(x, w, b, p.stride, lo, p.dilation, p.groups)
    sides = [side for pair in reversed(p.padding) for side in pair]  # the last dimension first
    crops, adds = [min(side, 0) for side in sides], [max(side, 0) for side in sides]
    mode = "constant" if p.padding_mode == "zeros" else p.padding_mode

    def padded(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        x = F.pad(x, crops) if any(crops) else x
        return function(F.pad(x, adds, mode), w, b, p.stride, 0, p.dilation, p.groups)

    return padded
