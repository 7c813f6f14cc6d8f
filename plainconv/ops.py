"""Convolution as torch operators: gradients, fake tensors, vmap, autocast - the only file that knows torch.library.

Three operators, plainconv::forward, grad_input and grad_weight, one for each direction.  Since convolution is linear
in each of its three tensors, one rule gives every derivative of every order: to differentiate the direction that
makes tensor m out of a and b, with respect to a, make a out of b and the cotangent of m,

    FORWARD(x, w)      cotangent g:  dx = GRAD_INPUT(g, w)    dw = GRAD_WEIGHT(x, g)
    GRAD_INPUT(y, w)   cotangent u:  dy = FORWARD(u, w)       dw = GRAD_WEIGHT(u, y)
    GRAD_WEIGHT(x, y)  cotangent v:  dx = GRAD_INPUT(y, v)    dy = FORWARD(x, v)

(for complex numbers b is conjugated), and a tangent goes through the direction itself.  The gradient of a bias is the
sum of the cotangent; in the backward of a plain FORWARD, GRAD_WEIGHT makes it in the same pass.  vmap folds the new
dimension into the batch, the input channels, the output channels or the groups, whichever the tensors that have it
share.

Three ways in, for one answer.  A plain call runs the plan at once, within a small autograd.Function if a gradient is
asked for.  A call that torch watches in any other way (a transform, a mode, forward AD) goes through a Function that
has rules for all of them, and costs more.  A traced one (torch.compile, torch.export) calls the operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards, _empty_strided_cpu  # type: ignore[attr-defined]
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import forward_ad

from plainconv.memory import LARGE, lent
from plainconv.menu.base import Made, Tensors, finish, sum_for_bias
from plainconv.plan import plan
from plainconv.problem import FORMATS, ConvProblem, Direction, Geometry, Request
from plainconv.remember import on_forget
from plainconv.settings import Settings

PLAIN = (Tensor, torch.nn.Parameter)
_Kept = TypeVar("_Kept")
_Run = Callable[..., Tensor]  # of the first, the second, the bias or None, and a residual, if there is one


class Make(NamedTuple):
    """What to make: the direction, the shape and memory format of the result, how the kernel moves, and by what.

    The settings are part of it, so that derivatives are made under those of the call.
    """

    direction: Direction
    shape: tuple[int, ...]
    geometry: Geometry
    channels_last: bool = False
    settings: Settings = Settings()

    def derivative(self, role: str, like: Tensor) -> Make:
        """The direction that makes tensor `role`, in the shape and format of `like`."""
        return Make(Direction.making(role), like.shape, self.geometry, is_channels_last(like), self.settings)

    def operands(self) -> tuple[Any, ...]:
        """The arguments of the operator that come after the tensors."""
        stride, padding, dilation, groups, mode = self.geometry
        flat = [side for pair in padding for side in pair]
        return list(self.shape), list(stride), flat, list(dilation), groups, mode, self.channels_last, *self.settings

    @staticmethod
    def of(direction: Direction, shape: Any, stride: Any, padding: Any, dilation: Any, *rest: Any) -> Make:
        groups, mode, channels_last, *settings = rest
        pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
        return Make(
            direction,
            tuple(shape),
            Geometry(tuple(stride), pairs, tuple(dilation), groups, mode),
            channels_last,
            Settings(*settings),
        )


def convolve(first: Tensor, second: Tensor, bias: Tensor | None, make: Make) -> Tensor:
    """The tensor that `make` describes, out of the two that its direction is given; differentiable in all three.

    `bias` [channels of the result] is added to it (None in GRAD_WEIGHT).
    """
    if not torch.compiler.is_compiling() and (watch := watching(first, second, bias)) is not Watch.ELSE:
        call = remembered(first, second, bias, make)
        return call.run(first, second, bias) if watch is Watch.NOTHING else call.recorded(first, second, bias)
    return watched(first, second, bias, make)


def watched(first: Tensor, second: Tensor, bias: Tensor | None, make: Make) -> Tensor:
    """The same for a call that may be watched by anything."""
    if torch.compiler.is_compiling():
        return _operate(first, second, bias, make)
    return _Convolution.apply(first, second, bias, make)  # type: ignore[no-untyped-call]


def _operate(first: Tensor, second: Tensor, bias: Tensor | None, make: Make) -> Tensor:
    return OPERATORS[make.direction](first, second, bias, *make.operands())


def is_channels_last(tensor: Tensor) -> bool:
    """Whether torch would suggest channels_last for a result made from this tensor (its suggest_memory_format)."""
    strides = tensor.stride()
    if len(strides) not in FORMATS or strides[1] > strides[-1]:
        return False
    # From the innermost dimension out, strides must grow; in a tie at the batch, torch prefers contiguous.
    least: int = 0
    for dim in (1, *range(len(strides) - 1, 1, -1), 0):
        if tensor.shape[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * max(tensor.shape[dim], 1)
    return True


# -- the plain way ---------------------------------------------------------------------------------------------------


def _plain_keys(device: str) -> Iterator[int]:
    """What torch dispatches a tensor by, if it is dense memory and nothing else: made in inference mode, or not."""
    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    inference = keys(getattr(key, device.upper())) | keys(getattr(key, f"Autocast{device.upper()}"))
    yield inference.raw_repr()
    yield (inference | keys(key.ADInplaceOrView) | keys(getattr(key, f"Autograd{device.upper()}"))).raw_repr()


# A conjugate or negative bit, another layout, a batch of vmap, a meta tensor: each adds a key or has other ones.
_PLAIN_KEYS = {keys: device for device in ("cpu", "cuda") for keys in _plain_keys(device)}
_keys_of = torch._C._dispatch_keys


class Watch(Enum):
    """What watches a call: nothing, a gradient of reverse mode alone, or something else (and perhaps that too)."""

    NOTHING = 0
    GRADIENT = 1
    ELSE = 2


def watching(first: Tensor, second: Tensor, bias: Tensor | None) -> Watch:
    """Whether this call may run at once: no subclass, no unusual storage, no forward-mode level, no functorch
    transform, no mode, no tracing, no autocast; and whether a gradient is asked for."""
    if type(first) not in PLAIN or type(second) not in PLAIN:
        return Watch.ELSE
    device = _PLAIN_KEYS.get(_keys_of(first).raw_repr())
    if device is None or _PLAIN_KEYS.get(_keys_of(second).raw_repr()) != device:
        return Watch.ELSE
    if bias is not None and (type(bias) not in PLAIN or _PLAIN_KEYS.get(_keys_of(bias).raw_repr()) != device):
        return Watch.ELSE
    if (
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled(device)
    ):
        return Watch.ELSE
    if torch.is_grad_enabled() and (
        first.requires_grad or second.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return Watch.GRADIENT
    return Watch.NOTHING


def guard(*tensors: Tensor) -> Callable[..., bool]:
    """What says of distinct tensors whether all that a call depends on, but their values, is as it is now for these.

    That is type, dtype, device, sizes, strides, requires_grad and dispatch keys of each, and what torch dispatches by
    in this thread: modes, transforms, autocast, inference mode, tracing.  Not in it: whether gradients are enabled, and
    a level of forward AD.  torch.compile guards its graphs by it, and one look is all it takes.
    """
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return check


class Call:
    """A call for tensors of certain sizes, strides and types, with all that depends on them looked up.

    run(first, second, bias) makes the result (GRAD_WEIGHT fills the bias, if there is one, with its gradient); recorded
    does too, and notes for autograd what its gradients need.
    """

    __slots__ = ("_derivatives", "make", "run")

    def __init__(self, make: Make, run: _Run) -> None:
        self.make, self.run = make, run
        self._derivatives: dict[str, Make] = {}

    def recorded(self, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
        return _record(first, second, bias, self)

    def backward(self, given: tuple[Tensor, Tensor, Tensor], wanted: tuple[bool, ...]) -> _Backward | None:
        """What was prepared for calls like this, and for the same gradients."""
        for ready in _BACKWARD.get((self, wanted, torch.get_num_threads()), ()):
            if ready.fits(*given):
                return ready
        return None

    def prepare(self, given: tuple[Tensor, Tensor, Tensor], wanted: tuple[bool, ...]) -> _Backward:
        """What makes those of the gradients of the first two and of the bias that are wanted, out of the first two and
        the cotangent; nothing may watch."""
        # What was saved for backward may lie otherwise than what was given: hooks pack and unpack it.
        cotangent = given[2]
        # What a forward call added to y has its gradient made beside that of w.
        beside = wanted[1] and wanted[2] and self.make.direction is Direction.FORWARD
        bias = cotangent.new_empty(cotangent.shape[1]) if beside else None
        ready = _Backward(
            guard(*given),
            self._gradient(0, given, None) if wanted[0] else None,
            self._gradient(1, given, bias) if wanted[1] else None,
            wanted[2],
            beside,
        )
        remember(_BACKWARD, (self, wanted, torch.get_num_threads()), ready)
        return ready

    def _gradient(self, of: int, given: Sequence[Tensor], bias: Tensor | None) -> tuple[_Run, int, int]:
        """What makes the gradient of one of the two, and which two of those given it is made out of."""
        roles = (*self.make.direction.given, self.make.direction.makes)
        make = self.derivative(roles[of], given[of])
        a, b = (roles.index(role) for role in make.direction.given)
        return remembered(given[a], given[b], bias, make).run, a, b

    def derivative(self, role: str, like: Tensor) -> Make:
        """As Make's: a given tensor has the same shape and strides in every call."""
        if role not in self._derivatives:
            self._derivatives[role] = self.make.derivative(role, like)
        return self._derivatives[role]


class _Backward(NamedTuple):
    """The gradients of a call; each of the two is made by a call of two of those given."""

    fits: Callable[..., bool]
    first: tuple[_Run, int, int] | None
    second: tuple[_Run, int, int] | None
    bias: bool
    beside: bool  # whether the bias' is made beside the second's

    def make(self, given: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of the first two and of the bias that are wanted, else None."""
        _, first, second, has_bias, beside = self
        cotangent = given[2]
        bias = cotangent.new_empty(cotangent.shape[1]) if has_bias else None
        of_first = of_second = None
        if first is not None:
            run, a, b = first
            of_first = run(given[a], given[b], None)
        if second is not None:
            run, a, b = second
            of_second = run(given[a], given[b], bias if beside else None)
        if bias is not None and not beside:
            sum_for_bias(cotangent, bias)
        return of_first, of_second, bias


def remembered(
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    make: Make,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Call:
    """Sizes become a problem, the problem a plan, and that a call: once for tensors that lie alike.

    activation, residual: what is fused behind the convolution, of the result's shape; such a call has no gradients.
    """
    lies = None if bias is None else bias.stride(), None if residual is None else residual.stride()
    sizes = (make, first.shape, first.stride(), second.shape, second.stride(), lies, activation)
    key = (*sizes, first.dtype, first.device, torch.get_num_threads())
    call = _READY.get(key)
    if call is None:
        call = ready(first, second, bias, make, activation=activation, residual=residual)
        if len(_READY) >= MOST_READY:
            _READY.clear()
        _READY[key] = call
    return call


def ready(
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    make: Make,
    made: Made | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Call:
    """The call for tensors of these sizes, strides and types.

    made: the second is a weight whose values stay, and this is what was made of it before.
    activation, residual: see `remembered`.
    """
    if not _has_switch(first):
        return _ready(first, second, bias, make, made, activation, residual)
    ways: dict[bool, _Run] = {}  # the switch may be thrown between two calls

    def way(first: Tensor, second: Tensor, bias: Tensor | None, residual: Tensor | None) -> _Run:
        tf32 = _rounds(first)
        if tf32 not in ways:
            ways[tf32] = _ready(first, second, bias, make, made, activation, residual).run
        return ways[tf32]

    def run(first: Tensor, second: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        return way(first, second, bias, residual)(first, second, bias, residual)

    way(first, second, bias, residual)
    return Call(make, run)


def _ready(
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    make: Make,
    made: Made | None,
    activation: str | None,
    residual: Tensor | None,
) -> Call:
    """The same, as torch's switch for TF32 stands now."""
    asked = request(make, first, second, bias, make.direction)
    if made is not None or activation is not None or residual is not None:
        asked = replace(asked, packed=made is not None, activation=activation, has_residual=residual is not None)
    chosen = plan(asked, make.settings.algorithm)
    empty = _empty(first, make)
    shape, strides, dtype, device = tuple(empty.shape), empty.stride(), first.dtype, first.device
    how = (shape, strides)
    on_cpu = device.type == "cpu"
    large = on_cpu and empty.nbytes >= LARGE
    if 0 in (*shape, *first.shape, *second.shape):

        def of_nothing(first: Tensor, second: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
            """The sum of no products, the bias, and what comes behind."""
            out = torch.empty_strided(*how, dtype=dtype, device=device).zero_()
            if bias is not None and not asked.makes_bias:
                out += bias.view(-1, *(1,) * (out.dim() - 2))
            finish(asked, Tensors(first, second, bias, residual), out)
            return out

        return Call(make, of_nothing)
    last = asked.channels_last
    loadable = _loadable(first, last), _loadable(second, last)
    as_they_lie = loadable[0] is first and loadable[1] is second
    alike = residual is None or residual.stride() == strides
    like = Tensors(*loadable, bias, residual if alike else empty)
    fill = chosen.bind(like) if made is None else chosen.pack(like, made)

    def run(first: Tensor, second: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        if large:
            out = lent(*how, dtype)
        elif on_cpu:
            out = _empty_strided_cpu(shape, strides, dtype)
        else:
            out = torch.empty_strided(*how, dtype=dtype, device=device)
        if not as_they_lie:
            first, second = _loadable(first, last), _loadable(second, last)
        if not alike and residual is not None:
            residual = torch.empty_strided(*how, dtype=dtype, device=device).copy_(residual)
        fill(_new(Tensors, (first, second, bias, residual)), out)
        return out

    return Call(make, run)


_new = tuple.__new__  # without a name for each element: half of the time


MOST_READY = 1024  # kinds of call that are remembered, here and at the door
MOST_ALIKE = 8  # of a kind, calls that guards tell apart
_READY: dict[Any, Call] = {}
_BACKWARD: dict[Any, tuple[_Backward, ...]] = {}
on_forget(_READY.clear)
on_forget(_BACKWARD.clear)


def remember(memory: dict[Any, tuple[_Kept, ...]], key: Any, call: _Kept) -> None:
    """Keep a call for the next of its kind; a full memory starts anew."""
    if len(memory) >= MOST_READY:
        memory.clear()
    memory[key] = (call, *memory.get(key, ())[: MOST_ALIKE - 1])


def _empty(like: Tensor, make: Make) -> Tensor:
    memory_format = FORMATS[len(make.shape)] if make.channels_last else torch.contiguous_format
    return torch.empty(make.shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def request(make: Make, first: Tensor, second: Tensor, bias: Tensor | None, direction: Direction) -> Request:
    """The request that a call sends to the planner, or the one of its gradients if `direction` is not make's own."""
    problem = _problem(make, first.shape, second.shape)
    threads = 1 if first.is_cuda else torch.get_num_threads()
    own = direction is make.direction
    beside = direction is Direction.GRAD_WEIGHT and make.direction is Direction.FORWARD  # the gradient of the bias, too
    like = {make.direction.given[0]: first, make.direction.given[1]: second}.get(direction.makes, first)
    channels_last = make.channels_last if own else is_channels_last(like)  # a gradient has its tensor's format
    if direction is Direction.GRAD_WEIGHT and problem.group_in == problem.group_out == 1:
        # Such a weight lies alike in both formats: how the input lies is what counts.
        channels_last = make.channels_last if make.direction is Direction.GRAD_INPUT else is_channels_last(first)
    return Request(
        problem,
        direction,
        first.dtype,
        first.device.type,
        channels_last,
        bias is not None and (own or beside),
        threads,
        make.settings.max_workspace,
        allow_builtin=make.settings.allow_builtin,
        tf32=make.settings.precision != "highest" and _rounds(first),
        precision=make.settings.precision,
        gpu=first.device.index or 0,
    )


def _has_switch(tensor: Tensor) -> bool:
    """Whether torch has a switch for how products of such tensors are rounded."""
    return tensor.is_cuda and tensor.dtype is torch.float32


def _rounds(tensor: Tensor) -> bool:
    """Whether it says that they may be rounded to TF32."""
    return _has_switch(tensor) and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _problem(make: Make, first: Sequence[int], second: Sequence[int]) -> ConvProblem:
    shapes = dict(zip(make.direction.given, (tuple(first), tuple(second)), strict=True))
    shapes[make.direction.makes] = make.shape
    problem = ConvProblem.between(shapes["x"], shapes["w"], make.geometry)
    for role, shape in shapes.items():
        if problem.shape_of(role) != tuple(shape):
            raise RuntimeError(
                f"tensor {role} of {problem} should have shape {problem.shape_of(role)}, got {tuple(shape)}"
            )
    return problem


def _loadable(tensor: Tensor, channels_last: bool) -> Tensor:
    """The same numbers, expanded (as the cotangent of a sum is) along no dimension that vectors lie along.

    Kernels take any strides, but neighbours that are one and the same number they look up each by itself.  So rows are
    written out: of the width, or in channels_last of channels, if those of the width are none.  Unless that would be
    the whole tensor.
    """
    along = 1 if channels_last else tensor.dim() - 1
    strides = tensor.stride()
    if strides[along] or (channels_last and strides[-1]):
        return tensor
    rows = tensor[tuple(slice(1 if step == 0 and dim != along else None) for dim, step in enumerate(strides))]
    if rows.numel() == tensor.numel():
        return tensor
    return rows.movedim(along, -1).contiguous().movedim(-1, along).expand(tensor.shape)


# -- autocast --------------------------------------------------------------------------------------------------------


def autocast(first: Tensor, second: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """torch's rule for convolutions under autocast: every floating type but float64 becomes the region's type."""
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype is not torch.float64 else tensor

    return cast(first), cast(second), None if bias is None else cast(bias)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """The products inside a kernel are in the types that the algorithm chose."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


# -- gradients -------------------------------------------------------------------------------------------------------


class _Recorded(torch.autograd.Function):
    """A call that nothing but a gradient of reverse mode watches: what setup_context costs, it does not pay."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        ctx.call, ctx.has_bias = call, bias is not None
        ctx.save_for_backward(first, second)
        return call.run(first, second, bias)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        call: Call = ctx.call
        given = (*ctx.saved_tensors, cotangent)
        wanted = (*_wanted(ctx), False)[:3]  # no bias, no node
        unwatched = not torch.is_grad_enabled() and forward_ad._current_level < 0
        ready = call.backward(given, wanted) if unwatched else None
        if ready is None:
            if watching(*given) is not Watch.NOTHING or cotangent.is_complex():
                ctx.make, ctx.derivative = call.make, call.derivative
                return _gradients(ctx, cotangent)
            ready = call.prepare(given, wanted)
        return *ready.make(given), None


# Function.apply looks for transforms, which `watching` has done.
_record: Callable[..., Tensor] = super(torch.autograd.Function, _Recorded).apply


class _Convolution(torch.autograd.Function):
    """All three directions and all their derivatives; `make` says which."""

    @staticmethod
    def forward(first: Tensor, second: Tensor, bias: Tensor | None, make: Make) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd(), _without_tracing():
            return _operate(first, second, bias, make)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Make], output: Tensor) -> None:
        first, second, bias, ctx.make = inputs
        ctx.derivative, ctx.has_bias = ctx.make.derivative, bias is not None
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        return _gradients(ctx, cotangent)

    @staticmethod
    def jvp(ctx: Any, first_t: Tensor | None, second_t: Tensor | None, bias_t: Tensor | None, _: None) -> Tensor:
        first, second = ctx.saved_tensors
        parts = []
        if first_t is not None:
            parts.append(convolve(first_t, second, bias_t, ctx.make))
            bias_t = None
        if second_t is not None:
            parts.append(convolve(first, second_t, bias_t, ctx.make))
            bias_t = None
        if bias_t is not None:
            shape = torch.Size(ctx.make.shape)
            parts.append(bias_t.view(-1, *(1,) * (len(shape) - 2)).expand(shape))
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return _vmap(convolve, info.batch_size, in_dims, *inputs)


class _OneLevel(torch.autograd.function._SingleLevelFunction):
    """The same for the operators, where torch.func has arrived at one level already (torch.compile over torch.func)."""

    forward, setup_context = _Convolution.forward, _Convolution.setup_context
    backward, jvp = _Convolution.backward, _Convolution.jvp


def _gradients(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    """The backward of all: those of the three gradients that are wanted."""
    first, second = ctx.saved_tensors
    gradients: list[Tensor | None] = [None, None]
    given = dict(zip(ctx.make.direction.given, (first, second), strict=True))
    wanted = _wanted(ctx)
    for i, (role, like) in enumerate(given.items()):
        if wanted[i]:
            other = {r: tensor.conj() for r, tensor in given.items() if r != role}
            other[ctx.make.direction.makes] = cotangent
            make = ctx.derivative(role, like)
            a, b = (other[r] for r in make.direction.given)
            gradients[i] = convolve(a, b, None, make)
    bias = cotangent.sum([0, *range(2, cotangent.dim())]) if ctx.has_bias and wanted[2] else None
    return gradients[0], gradients[1], bias, None


def _wanted(ctx: Any) -> tuple[bool, ...]:
    """Which gradients are needed: of what requires one, all that autograd.grad(y, x) did not leave out."""
    needs: tuple[bool, ...] = ctx.needs_input_grad
    if sum(needs) == 1:
        return needs
    nodes = zip(needs, ctx.next_functions, strict=False)  # what is no tensor has no node
    return tuple(needed and _is_run(node) for needed, (node, _) in nodes)


def _is_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that autograd.grad was asked for
        return True


def _without_tracing() -> contextlib.AbstractContextManager[Any]:
    """torch.jit.trace records the Function; it cannot record an operator with symbolic sizes."""
    state = torch._C._get_tracing_state()
    return contextlib.nullcontext() if state is None else _untraced(state)


@contextlib.contextmanager
def _untraced(state: Any) -> Iterator[None]:
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


# -- vmap ------------------------------------------------------------------------------------------------------------

# Which dimension of each tensor the letters n (batch), g (groups), c (input) and o (output channels of a group) are in.
_LETTERS = {"x": {"n": 0, "g": 1, "c": 1}, "w": {"g": 0, "o": 0, "c": 1}, "y": {"n": 0, "g": 1, "o": 1}}


def _vmap(
    convolve: Callable[[Tensor, Tensor, Tensor | None, Make], Tensor],
    size: int,
    in_dims: tuple[int | None, ...],
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    make: Make,
) -> tuple[Tensor, int]:
    """Fold the mapped dimension into a letter that the tensors which have it share, and that the other lacks.

    If x is not mapped that is o, without w it is n, without y it is c; if all are mapped, the groups.
    """
    given = dict(zip(make.direction.given, (first, second), strict=True))
    mapped = {r: d for r, d in zip(given, in_dims[:2], strict=True) if d is not None}
    if mapped:
        whole = [r for r in given if r not in mapped]
        letter = next(letter for letter in "nocg" if all(letter not in _LETTERS[r] for r in whole)) if whole else "g"
        groups, made = make.geometry.groups, make.direction.makes
        a, b = (
            _fold(tensor.movedim(mapped[r], 0), r, letter, groups) if r in mapped else tensor
            for r, tensor in given.items()
        )
        shape = tuple(s * size if dim == _LETTERS[made][letter] else s for dim, s in enumerate(make.shape))
        geometry = make.geometry._replace(groups=groups * size) if letter == "g" else make.geometry
        folded = convolve(a, b, None, make._replace(shape=shape, geometry=geometry))
        result = _unfold(folded, made, letter, groups, size)
    else:
        result = convolve(first, second, None, make).unsqueeze(0)
    if bias is not None:
        rows = bias.unsqueeze(0) if in_dims[2] is None else bias.movedim(in_dims[2], 0)
        result = result + rows.reshape(len(rows), 1, -1, *(1,) * (len(make.shape) - 2))
    return result, 0


def _fold(tensor: Tensor, role: str, letter: str, groups: int) -> Tensor:
    """[size, *shape of the role] -> the shape of the role with `size` times as much of the letter."""
    grouped, at = _LETTERS[role]["g"], list(_LETTERS[role]).index(letter)
    lettered = tensor.unflatten(1 + grouped, (groups, -1))  # [size, letters..., *spatial]
    return lettered.movedim(0, at).flatten(at, at + 1).flatten(grouped, grouped + 1)


def _unfold(tensor: Tensor, role: str, letter: str, groups: int, size: int) -> Tensor:
    """The inverse of _fold."""
    grouped, at = _LETTERS[role]["g"], list(_LETTERS[role]).index(letter)
    lettered = tensor.unflatten(grouped, (groups * size if letter == "g" else groups, -1))
    return lettered.unflatten(at, (size, -1)).movedim(at, 0).flatten(1 + grouped, 2 + grouped)


# -- the operators ---------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor? bias, SymInt[] size, int[] stride, SymInt[] padding, int[] dilation, int groups, "
    "str padding_mode, bool channels_last, str algorithm, int max_workspace, bool allow_builtin, str precision"
)
_LIBRARY = torch.library.Library("plainconv", "DEF")


def _define(direction: Direction) -> Callable[..., Tensor]:
    name = direction.value
    first_name, second_name = direction.given
    _LIBRARY.define(f"{name}(Tensor {first_name}, Tensor {second_name}, {_ARGUMENTS}) -> Tensor")

    def kernel(first: Tensor, second: Tensor, bias: Tensor | None, *operands: Any) -> Tensor:
        # functional.py has looked already; a graph that was changed since has not been there.
        own = first.dtype, first.device
        if (second.dtype, second.device) != own or (
            bias is not None and (bias.dtype, bias.device, *bias.shape) != (*own, operands[0][1])
        ):
            raise RuntimeError(
                f"plainconv::{name} takes tensors of one type and device, and a bias of one value a channel; got "
                f"{[(tuple(t.shape), t.dtype, str(t.device)) for t in (first, second, bias) if t is not None]}"
            )
        if bias is not None and direction is Direction.GRAD_WEIGHT:
            raise RuntimeError(f"plainconv::{name} adds no bias")
        with _without_autocast(first.device.type):
            return remembered(first, second, bias, Make.of(direction, *operands)).run(first, second, bias)

    def fake(first: Tensor, second: Tensor, bias: Tensor | None, *operands: Any) -> Tensor:
        make = Make.of(direction, *operands)
        sizes = (*first.shape, *second.shape, *make.shape, *operands[2])
        if not any(isinstance(size, torch.SymInt) for size in sizes):
            _problem(make, first.shape, second.shape)
        return _empty(first, make)

    def autograd(first: Tensor, second: Tensor, bias: Tensor | None, *operands: Any) -> Tensor:
        with enable_single_level_autograd_function():
            return _OneLevel.apply(first, second, bias, Make.of(direction, *operands))  # type: ignore[attr-defined]

    def vmap(info: Any, in_dims: Any, first: Tensor, second: Tensor, bias: Tensor | None, *operands: Any) -> Any:
        return _vmap(_operate, info.batch_size, in_dims, first, second, bias, Make.of(direction, *operands))

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)
    _LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"plainconv::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"plainconv::{name}", vmap, lib=_LIBRARY)
    operator: Callable[..., Tensor] = getattr(torch.ops.plainconv, name).default
    return operator


OPERATORS = {direction: _define(direction) for direction in Direction}
