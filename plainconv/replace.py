"""Put plainconv's convolution into a model that someone else wrote, and take it out again.

    plainconv.swap(model)      every convolution layer of it is computed by plainconv from now on
    plainconv.unswap(model)    and by torch again

A layer stays the object that it is: parameters, buffers, hooks, names and training mode are its own attributes, so the
optimizer, the state_dict and whoever else holds them see no change.  Only its class becomes another one, derived from
the one it had, in which the one method that calls torch's convolution calls plainconv's.  There is one such class for
each class that was met; instances are pickled and copied by the class they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from plainconv import functional
from plainconv import nn as layers
from plainconv.plan import check_algorithm
from plainconv.settings import AUTO

Pick = str | type[nn.Module] | Callable[[str, nn.Module], bool]

_FUNCTION: dict[type[nn.Module], Callable[..., Tensor]] = {  # torch's layer -> what computes it
    getattr(nn, f"Conv{kind}{dims}d"): getattr(functional, f"conv{under}{dims}d")
    for kind, under in (("", ""), ("Transpose", "_transpose"))
    for dims in (1, 2, 3)
}
_WRAPPERS = {  # a class of torch's that holds or replaces the model -> what it did
    "DistributedDataParallel": "wrapped in DistributedDataParallel",
    "DataParallel": "wrapped in DataParallel",
    "FullyShardedDataParallel": "wrapped in FullyShardedDataParallel",
    "FSDPModule": "sharded by fully_shard",
    "OptimizedModule": "compiled by torch.compile",
    "ScriptModule": "compiled by torch.jit",
}


@dataclass(frozen=True)
class Report:
    """What became of each convolution layer; it prints as a table.

    Attributes:
        changed: name of a layer in the model -> its class before and after.
        kept: name of a layer that is as it was -> why.
    """

    changed: Mapping[str, tuple[str, str]]
    kept: Mapping[str, str]

    def __str__(self) -> str:
        rows = [(name or "(the model)", f"{old} -> {new}") for name, (old, new) in self.changed.items()]
        rows += [(name or "(the model)", f"kept: {why}") for name, why in self.kept.items()]
        wide = max((len(name) for name, _ in rows), default=0)
        total = f"{len(self.changed)} changed, {len(self.kept)} kept"
        return "\n".join([*(f"{name:<{wide}}  {told}" for name, told in rows), total])

    __repr__ = __str__


def swap(
    model: nn.Module,
    algorithm: str = AUTO,
    *,
    include: Pick | Iterable[Pick] | None = None,
    exclude: Pick | Iterable[Pick] | None = None,
) -> Report:
    """Let plainconv compute the convolution layers of a model, in place.

    Layers of torch.nn, lazy and parametrised ones too, and subclasses of them whose forward is torch's own.

    Args:
        model: any module; itself a convolution layer, or with such in it.
        algorithm: for all layers that change, "auto" or one of plainconv.algorithms().
        include: only these layers; None: all.  A pattern for the layer's name in the model ("backbone.*"; the first one
            of a layer that has several), a class, a function of name and layer, or several of them.
        exclude: and not these.

    Returns:
        what changed, what did not, and why.

    Raises:
        RuntimeError: the model is wrapped for training in parallel, or compiled: swap comes before that.
        TypeError: the model is no module.
        ValueError: no such algorithm.
    """
    check_algorithm(algorithm)
    check_model("swap", model)
    included, excluded = _listed(include), _listed(exclude)
    kinds, kept = {}, {}
    for name, layer in _convolutions(model):
        why = _why_not(layer)
        if why is None and include is not None and not _picked(included, name, layer):
            why = "include does not name it"
        if why is None and _picked(excluded, name, layer):
            why = "exclude names it"
        if why is None:
            try:
                kinds[name] = layer, _swapped_of(type(layer))
            except Exception as error:  # of the class's own __init_subclass__
                why = f"{type(layer).__name__} cannot be derived from: {error}"
        if why is not None:
            kept[name] = why
    changed = {}
    for name, (layer, kind) in kinds.items():  # once all is known, so that an error leaves the model as it was
        old = type(layer)
        vars(layer)["_plainconv"] = _Held(name, algorithm)
        _become(layer, kind)
        changed[name] = old.__name__, type(layer).__name__
    return Report(changed, kept)


def unswap(model: nn.Module) -> Report:
    """Give the layers that swap changed the very classes that they had, in place.

    Returns what changed, and which convolution layers did not.
    Raises RuntimeError and TypeError as swap does.
    """
    check_model("unswap", model)
    changed, kept = {}, {}
    for name, layer in _convolutions(model):
        if not isinstance(layer, _Swapped):
            kept[name] = "swap did not change it"
            continue
        new: type[Any] = type(layer)
        _become(layer, _original_of(new))
        vars(layer).pop("_plainconv", None)
        changed[name] = new.__name__, type(layer).__name__
    return Report(changed, kept)


# -- what a layer is -------------------------------------------------------------------------------------------------


def _convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each once, under the first of its names."""
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd):
            yield name, module


def _why_not(layer: nn.Module) -> str | None:
    kind = type(layer)
    if isinstance(layer, _Swapped):
        return "it is swapped already"
    if isinstance(layer, layers._Layer):
        return "it is plainconv's own layer"
    if sentence := other_forward(layer):
        return sentence
    if (kind.__reduce_ex__, kind.__reduce__) != (object.__reduce_ex__, object.__reduce__):
        return f"{kind.__name__} has a way of its own to be pickled"
    return None


def other_forward(layer: nn.Module) -> str | None:
    """The sentence for what does not compute as the convolution layers of torch.nn or plainconv.nn do."""
    kind: type[Any] = type(layer)
    if (base := _base(kind)) is None:
        return f"{kind.__name__} is none of torch.nn's convolution layers"
    known: type[Any] = _original_of(kind) if isinstance(layer, _Swapped) else kind
    own: Any = next((ours for ours in known.__mro__ if ours.__module__ == layers.__name__), base)
    method = _method(base)
    if getattr(known, method) is not getattr(own, method) or known.forward is not own.forward:
        return f"{kind.__name__} has a forward of its own"
    if "forward" in vars(layer) or "_conv_forward" in vars(layer):
        return "its forward was replaced"
    return None


def algorithm_of(layer: nn.Module) -> str:
    """The algorithm that a layer of plainconv.nn, or one that was swapped, names; "auto" for all others."""
    if isinstance(layer, _Swapped):
        return layer._plainconv.algorithm
    named: str = getattr(layer, "algorithm", AUTO)
    return named


def _base(kind: type) -> type[nn.Module] | None:
    """Which of torch.nn's six it derives from."""
    return next((base for base in kind.__mro__ if base in _FUNCTION), None)


def _method(base: type[nn.Module]) -> str:
    """The one that calls torch's convolution."""
    return "forward" if issubclass(base, _ConvTransposeNd) else "_conv_forward"


def _listed(picks: Pick | Iterable[Pick] | None) -> list[Pick]:
    if picks is None:
        return []
    return [picks] if isinstance(picks, str) or callable(picks) else list(picks)


def _picked(picks: list[Pick], name: str, layer: nn.Module) -> bool:
    return any(_picks(pick, name, layer) for pick in picks)


def _picks(pick: Pick, name: str, layer: nn.Module) -> bool:
    if isinstance(pick, str):
        return fnmatchcase(name, pick)
    return isinstance(layer, pick) if isinstance(pick, type) else bool(pick(name, layer))


def check_model(function: str, model: nn.Module) -> None:
    """Raise TypeError, or RuntimeError if a model is wrapped, sharded or compiled: plainconv.`function` comes before.

    A model does not know what was made of it by DistributedDataParallel(model) or torch.compile(model), so there only
    what was made is refused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise RuntimeError(
                f"plainconv.{function} comes before a model is compiled, but {repr(name) if name else 'the model'} has "
                "had its compile() called; call it on the plain model"
            )
        names = [known.__name__ for known in type(module).__mro__ if known.__module__.startswith("torch.")]
        done = [_WRAPPERS[known] for known in names if known in _WRAPPERS]
        if any(type(value).__name__ == "DTensor" for value in module.parameters(recurse=False)):
            done.append("sharded (its parameters are DTensors)")  # of a child, by what was done to the whole
        if done:
            raise RuntimeError(
                f"plainconv.{function} comes before a model is wrapped, sharded or compiled, but "
                f"{repr(name) if name else 'the model'} is {done[0]} already; call it on the plain model"
            )


def check_weights(function: str, model: nn.Module) -> None:
    """Raise RuntimeError if a layer, as a lazy one, has its weights or buffers only from its first input on."""
    for name, module in model.named_modules():
        if any(map(is_lazy, chain(module.parameters(recurse=False), module.buffers(recurse=False)))):
            layer = f"layer {name!r}, a {type(module).__name__}," if name else f"a {type(module).__name__}"
            raise RuntimeError(f"{layer} has no weight yet; call the model once before plainconv.{function}")


# -- the classes -----------------------------------------------------------------------------------------------------


class _Held(NamedTuple):
    """What a swapped layer knows of the call that swapped it."""

    name: str
    algorithm: str


class _Swapped(nn.Module):
    """What marks the classes that swap makes, and how their instances are copied and pickled."""

    _original: type[nn.Module]
    _plainconv = _Held("", AUTO)  # of an instance that somebody makes of such a class

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Such a class cannot be found by its name; the one that it was derived from can.
        reduced: Any = super().__reduce_ex__(2)
        _, (kind,), *state = reduced
        return _new, (kind._original,), *state

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"torch.jit cannot compile {_told(self)}, which plainconv computes; call plainconv.unswap(model) first"
        )


def _new(original: type[nn.Module]) -> nn.Module:
    """An instance without its attributes, of the class that swap derives."""
    kind = _swapped_of(original)
    return kind.__new__(kind)


def _become(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Change its class, past a __setattr__ of its own that might raise when half the model has changed."""
    object.__setattr__(layer, "__class__", kind)


def _swapped_of(kind: type[Any]) -> type[nn.Module]:
    """The class that computes by plainconv what `kind` computes by torch."""
    if not _is_parametrized(kind):
        return _derived(kind)
    return _on(_derived(kind.__bases__[0]), kind, _original=kind)


def _original_of(kind: type[Any]) -> type[nn.Module]:
    """The class that it was made from; a new one, if parametrizations came or went since."""
    original: type[nn.Module] | None = vars(kind).get("_original")
    if not _is_parametrized(kind):
        assert original is not None
        return original
    if original is not None and _parametrized(original) == _parametrized(kind):
        return original
    (base,) = kind.__bases__
    return _on(_original_of(base), kind)


def _derived(kind: type[Any]) -> type[nn.Module]:
    """One for each class; it lives as long as somebody holds it."""
    for known in kind.__subclasses__():
        if issubclass(known, _Swapped) and vars(known).get("_original") is kind:
            return known
    base = _base(kind)
    assert base is not None
    own = {
        "__module__": kind.__module__,  # torch.fx takes the layers of torch.nn as leaves, by this name
        "__doc__": f"{kind.__name__}, computed by plainconv; see plainconv.swap.",
        "_original": kind,
        "_plainconv_function": staticmethod(_FUNCTION[base]),
        _method(base): _transposed if issubclass(base, _ConvTransposeNd) else _convolved,
    }
    if getattr(kind, "cls_to_become", None) is not None:  # a lazy layer becomes this one at its first input
        own["cls_to_become"] = _derived(kind.cls_to_become)
    return type(f"Plain{kind.__name__}", (_Swapped, kind), own)


# A parametrised layer has a class of its own, made by torch.nn.utils.parametrize: a property for each parametrised
# tensor, on the class that the layer had.  Copies of the layer share it, so it is never changed here: another is made.


def _is_parametrized(kind: type) -> bool:
    state = vars(kind).get("__getstate__")
    return state is not None and state.__module__ == parametrize.__name__


def _parametrized(kind: type) -> set[str]:
    """The names of its properties."""
    return {name for name, value in vars(kind).items() if isinstance(value, property)}


def _on(base: type[Any], kind: type[Any], **more: Any) -> type[nn.Module]:
    """The class of a parametrised layer, on another base."""
    left_out = {"__dict__", "__weakref__", "_original"}
    own = {name: value for name, value in vars(kind).items() if name not in left_out}
    return type(f"Parametrized{base.__name__}", (base,), own | more)


# -- their methods ---------------------------------------------------------------------------------------------------


def _convolved(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _call(self, input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _transposed(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    extra = self.output_padding
    if output_size is not None:
        sizes = self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        try:
            extra = self._output_padding(input, output_size, *sizes)
        except Exception as error:
            error.add_note(f"in {_told(self)}")
            raise
    return _call(self, input, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation)


def _call(self: Any, *arguments: Any) -> Tensor:
    function: Callable[..., Tensor] = self._plainconv_function
    mode, algorithm = self.padding_mode, self._plainconv.algorithm
    if torch.compiler.is_compiling():
        return function(*arguments, padding_mode=mode, algorithm=algorithm)
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            f"torch.jit cannot trace {_told(self)}, which plainconv computes; call plainconv.unswap(model) first, "
            "or say dynamo=True to torch.onnx.export"
        )
    try:
        return function(*arguments, padding_mode=mode, algorithm=algorithm)
    except Exception as error:
        error.add_note(f"in {_told(self)}")
        raise


def _told(layer: Any) -> str:
    kind, (name, _) = type(layer).__name__, layer._plainconv
    return f"layer {name!r}, a {kind}" if name else f"a {kind}"
