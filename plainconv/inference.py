"""Layers for inference: what is made of a weight that stays, packed or transformed, is made once and not in each call.

    fast = plainconv.prepack(layer, x.shape)
    y = fast(x)

The call holds a copy of the weight, so nothing that becomes of the layer afterwards can make it wrong.  For inputs of
another size or memory format it chooses again, and shares what was made of the weight wherever that is made alike.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from plainconv import functional, ops
from plainconv.arguments import Spec
from plainconv.functional import Options
from plainconv.menu import separable
from plainconv.menu.base import Made
from plainconv.plan import ask, check_algorithm, plan
from plainconv.problem import FORMATS, Request, settled_activation
from plainconv.remember import on_forget
from plainconv.replace import algorithm_of, other_forward
from plainconv.settings import AUTO, resolve

MOST_MADE = 4  # weights, packed or transformed in different ways, that a call on a CPU keeps
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")
_SETTINGS = ("algorithm", "max_workspace", "allow_builtin", "precision")
_MAKERS = (WeightNorm, SpectralNorm, BasePruningMethod)  # hooks of torch's that make a weight or a bias in each call
_Run = Callable[[Tensor, Tensor | None], Tensor]  # of an input, and a residual
_Ready = tuple[Callable[..., bool], bool, _Run]  # fits, whether it asks for a gradient, and runs
_alive: weakref.WeakSet[Any] = weakref.WeakSet()
_counting = threading.Lock()  # while some are counted, none may come


class Prepacked(nn.Module):
    """A convolution for inference, with a copy of the weight and the bias that it was made from; see `prepack`.

    It is a module, to stand where the layer stood, but it has no parameters and no buffers: what changes those of a
    model (an optimizer, load_state_dict, to, half) leaves it as it is, and it is not part of the state_dict.

    Attributes:
        request: what it was made for.
        algorithm: the name of the algorithm that serves that.
        layer: the name in a model of what it was made from, if somebody said it: errors have it as a note.
    """

    request: Request
    algorithm: str
    layer: str | None = None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        options: Options,
        activation: str | None,
        input: Tensor,
    ) -> None:
        super().__init__()
        name = f"conv_transpose{weight.dim() - 2}d" if transposed else f"conv{weight.dim() - 2}d"
        self._function, self._options, self._activation = getattr(functional, name), options, activation
        self._weight, self._bias, self._last = weight.contiguous(), bias, ops.is_channels_last(weight)
        self._ready: dict[Any, tuple[_Ready, ...]] = {}
        self._made: Made = {}
        _count(self)
        first, make, _ = self._settled(input)
        self.request = self._asked(first, make)
        self.algorithm = plan(self.request, make.settings.algorithm).algorithm.name
        if ops.watching(input, self._weight, self._bias) is ops.Watch.NOTHING:
            self._bind(input)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(convolution + bias + residual), of an input of the weight's type and device, and of any size.

        residual: of the result's shape and type.  There are no gradients.
        """
        if torch.compiler.is_compiling():
            return self._watched(input, residual)
        given = _given(input, residual)
        plain = type(input) in ops.PLAIN and (residual is None or type(residual) in ops.PLAIN)
        try:
            if plain and torch._C._get_tracing_state() is None:
                for fits, asks, run in self._ready.get(_key(input, residual), ()):
                    if fits(*given) and forward_ad._current_level < 0:
                        if asks:
                            _no_gradients(*given)
                        return run(input, residual)
                _no_gradients(*given)
                if all(ops.watching(tensor, self._weight, self._bias) is ops.Watch.NOTHING for tensor in given):
                    return self._bind(input, residual)(input, residual)
            return self._watched(input, residual)
        except Exception as error:
            if self.layer:
                error.add_note(f"in layer {self.layer!r}")
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds: its copy of the weight and the bias, and what was made of them."""
        own = self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)
        return own + sum(made.nbytes for made in self._made.values())

    def extra_repr(self) -> str:
        return f"{self.request}, by {self.algorithm}, {self.nbytes / 2**20:.3g} MiB with its own copy of the weight"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}, "_made": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _count(self)

    # -- how it is done ----------------------------------------------------------------------------------------------

    def _bind(self, input: Tensor, residual: Tensor | None = None) -> _Run:
        """The call for inputs and residuals like these, which is remembered."""
        first, make, batched = self._settled(input)
        behind = residual
        if residual is not None:
            functional.check_residual(residual, make.shape if batched else make.shape[1:], input)
            behind = residual if batched else residual.unsqueeze(0)
        made, weight, bias = self._made, self._weight, self._bias
        call = ops.ready(first, weight, bias, make, made, activation=self._activation, residual=behind).run
        if len(made) > MOST_MADE and not weight.is_cuda:  # there, streams and captured graphs may go on reading it
            last = list(made)[-1]
            self._made, self._ready = {last: made[last]}, {}

        if not batched:
            call = functional.unbatched(call)

        def found(input: Tensor, residual: Tensor | None) -> Tensor:
            return call(input, weight, bias, residual)

        given = _given(input, residual)
        asks = any(tensor.requires_grad for tensor in given)
        ops.remember(self._ready, _key(input, residual), (ops.guard(*given), asks, found))
        return found

    def _settled(self, input: Tensor) -> tuple[Tensor, ops.Make, bool]:
        """The input with a batch, what is to be made of it and by which algorithm, and whether it came with a batch."""
        weight = self._weight
        name = self._function.__name__
        first, make, batched = functional.settled(name, weight.dim() - 2, input, weight, self._bias, self._options)
        make = make._replace(channels_last=make.channels_last or self._last)
        if make.settings.algorithm == AUTO and self._is_separable(self._asked(first, make)):
            make = make._replace(settings=make.settings._replace(algorithm="separable"))
        return first, make, batched

    def _asked(self, first: Tensor, make: ops.Make) -> Request:
        asked = ops.request(make, first, self._weight, self._bias, make.direction)
        return replace(asked, packed=True, activation=self._activation)

    def _is_separable(self, request: Request) -> bool:
        """Whether passes along each dimension are estimated to be the quickest, and the kernel's values allow them."""
        if separable.ALGORITHM.why_not(request):
            return False
        verdicts = ask(request)
        ours = next(verdict for verdict in verdicts if verdict.algorithm is separable.ALGORITHM)
        quickest = ours.seconds < min(verdict.seconds for verdict in verdicts if verdict.may_be_chosen)
        return quickest and not isinstance(separable.lines(self._weight), str)

    def _watched(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """The same, by the plain call: under a transform, autocast or a mode, traced, or of a subclass."""
        _no_gradients(*_given(input, residual))
        weight = self._weight
        if self._last:
            weight = weight.contiguous(memory_format=FORMATS[weight.dim()])
        spelled = functional.spelled(self._function, self._options)
        behind = {"activation": self._activation, "residual": residual}
        result: Tensor = self._function(input, weight, self._bias, **spelled, **behind)
        return result


def _given(input: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
    """Each object once, as torch's guards ask for."""
    return (input,) if residual is None or residual is input else (input, residual)


def _key(input: Tensor, residual: Tensor | None) -> Any:
    """What calls are found by."""
    return input.shape, residual is None, residual is input, torch.get_num_threads()


def _count(prepacked: Prepacked) -> None:
    with _counting:
        _alive.add(prepacked)


def _forget() -> None:
    with _counting:
        alive = tuple(_alive)
    for prepacked in alive:
        prepacked._ready.clear()


on_forget(_forget)


def prepack(
    layer: nn.Module | Tensor,
    input_shape: Sequence[int],
    bias: Tensor | None = None,
    stride: Spec = 1,
    padding: Spec = 0,
    dilation: Spec = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = AUTO,
    max_workspace: int | None = None,
    allow_builtin: bool | None = None,
    precision: str | None = None,
    activation: str | None = None,
    output_padding: Spec = 0,
    transposed: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Prepacked:
    """A convolution for inference whose weight was packed or transformed once; call it as the layer is called.

    It is never stale: it holds its own copy of the weight and the bias, and what is done to the layer's afterwards is
    not seen; prepack again after that.  It may be called with inputs of other sizes and memory formats, which it
    chooses and packs for when they first come, and by several threads at once.  Gradients do not go through it.
    Where it knows that a depthwise kernel is a product of lines, it may choose "separable", too.

    Args:
        layer: a convolution layer of torch.nn or plainconv.nn, or a weight [o, c/groups, *kernel] (of a transposed
            convolution [o, c/groups, *kernel], too, with o the channels of its input).
        input_shape: of the inputs that it shall be quick for, (n, c, *spatial) or (c, *spatial).
        bias, stride, ..., output_padding, transposed: beside a weight, as of plainconv.conv2d and conv_transpose2d; a
            layer has its own.
        algorithm, max_workspace, allow_builtin, precision: as of plainconv.conv2d; by default those of the layer, if it
            has them.
        activation: as of plainconv.conv2d; a residual is given in the call.
        memory_format: in which the inputs will lie; by default as the weight does.

    Raises:
        RuntimeError: gradients are on and the weight or the bias asks for one; or as plainconv.conv2d.
        TypeError: a module that is no such layer, computes in another way, or whose weight may be made by a hook that
            is none of torch.nn.utils; or options that it has itself.
        ValueError, AlgorithmRefused: as plainconv.conv2d.
    """
    options = Options(
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        algorithm,
        max_workspace,
        allow_builtin,
        precision,
        output_padding,
    )
    weight = layer
    if isinstance(layer, nn.Module):
        if bias is not None or transposed or options != Options(1, 0, 1, 1, "zeros", *options[5:9]):
            raise TypeError("a layer has its own bias, stride, padding, ...; give its weight to choose others")
        weight, bias, transposed, options = _of_layer(layer, options)
    if not isinstance(weight, Tensor):
        raise TypeError(f"prepack(): argument 'layer' must be a module or Tensor, not {type(layer).__name__}")
    if weight.dim() not in (3, 4, 5):
        raise RuntimeError(f"expected weight to have 3, 4 or 5 dimensions, but got size {list(weight.shape)}")
    if options.output_padding != 0 and not transposed:
        raise ValueError(f"output_padding={output_padding!r} belongs to transposed=True")
    check_algorithm(options.algorithm)
    activation = settled_activation(activation, weight.dtype)
    chosen = resolve(*options[5:9])
    options = options._replace(**chosen._asdict())
    _no_gradients(weight, bias)
    with torch.inference_mode(False), torch.no_grad():
        own = [None if of is None else of.detach().clone().resolve_conj().resolve_neg() for of in (weight, bias)]
        if memory_format is None:
            last = ops.is_channels_last(weight) and len(input_shape) == weight.dim()
            memory_format = FORMATS[weight.dim()] if last else torch.contiguous_format
        like: Any = {"dtype": weight.dtype, "device": weight.device, "memory_format": memory_format}
        assert own[0] is not None
        return Prepacked(own[0], own[1], transposed, options, activation, torch.empty(tuple(input_shape), **like))


def _of_layer(layer: nn.Module, options: Options) -> tuple[Tensor, Tensor | None, bool, Options]:
    """The weight, the bias, whether it is transposed, and the options of a layer; what `options` says comes first."""
    if not isinstance(layer, _ConvNd) or (sentence := other_forward(layer)):
        sentence = sentence if isinstance(layer, _ConvNd) else f"{type(layer).__name__} is no convolution layer"
        raise TypeError(f"prepack takes convolution layers of torch.nn and plainconv.nn, but {sentence}")
    if any(map(is_lazy, layer.parameters())):
        raise RuntimeError(f"{type(layer).__name__} has no weight yet; call it once before prepack")
    own: dict[str, Any] = {name: getattr(layer, name) for name in _GEOMETRY}
    own |= {name: getattr(layer, name, None) for name in _SETTINGS} | {"algorithm": algorithm_of(layer)}
    own |= {name: said for name in _SETTINGS if (said := getattr(options, name)) not in (None, AUTO)}
    extra: Any = layer.output_padding if layer.transposed else 0
    made = _made_by_hooks(layer)
    weight, bias = (made.get(name, getattr(layer, name)) for name in ("weight", "bias"))
    return weight, bias, layer.transposed, Options(**own, output_padding=extra)


def _made_by_hooks(layer: _ConvNd) -> dict[str, Any]:
    """What hooks make before each call, as they would make it now in evaluation mode; the layer stays as it is."""
    hooks = layer._forward_pre_hooks.values()
    unknown = [hook for hook in hooks if not isinstance(hook, _MAKERS)]
    for name in ("weight", "bias"):
        if unknown and isinstance(vars(layer).get(name), Tensor):  # no parameter: somebody puts it there
            raise TypeError(
                f"prepack cannot know the {name} of a {type(layer).__name__} that is no parameter and may be made in "
                f"each call by the hook {unknown[0]!r}; remove the hook, or give the {name} itself"
            )
    like = nn.Module()
    vars(like).update(vars(layer), training=False)
    for hook in hooks:
        if isinstance(hook, _MAKERS):
            hook(like, ())
    return vars(like)


def _no_gradients(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "what is prepacked has no gradients; call it within torch.no_grad() or torch.inference_mode(), "
            "or give it tensors that ask for none"
        )
