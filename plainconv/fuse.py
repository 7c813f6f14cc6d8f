"""A model for inference: what follows a convolution becomes part of it, and its weight is prepacked.

    fast = plainconv.optimize(model, x)
    y = fast(x)

torch.export writes the model down as a graph of functions without side effects.  In it,

    batch_norm(conv(x, w, b))         is  conv(x, s w, s (b - mean) + beta),  s = gamma / sqrt(variance + eps)
    activation(conv(x) + residual)    is one call, whose kernel adds and applies before it stores
    conv(pad(x))                      is a convolution with that padding mode

A convolution takes in what follows it for as long as nothing else reads what lies between.  All other functions stay
torch's own.  What is computed from parameters alone (weight_norm) is computed once.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from operator import attrgetter, eq
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import Dim, ShapesCollection
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map_only

from plainconv import functional
from plainconv.inference import Prepacked, prepack
from plainconv.ops import is_channels_last
from plainconv.plan import check_algorithm
from plainconv.problem import PADDING_MODES
from plainconv.replace import check_model, unswap
from plainconv.settings import AUTO

_aten = torch.ops.aten
_CONVOLUTIONS: dict[Any, bool] = {  # function -> whether it is transposed
    _aten.conv1d.default: False,
    _aten.conv2d.default: False,
    _aten.conv3d.default: False,
    _aten.conv1d.padding: False,
    _aten.conv2d.padding: False,
    _aten.conv3d.padding: False,
    _aten.conv_transpose1d.default: True,
    _aten.conv_transpose2d.input: True,
    _aten.conv_transpose3d.input: True,
}
_ACTIVATIONS: dict[Any, tuple[str, dict[str, Any]]] = {  # function -> its name, and what its arguments have to be
    _aten.relu.default: ("relu", {}),
    _aten.relu6.default: ("relu6", {}),
    _aten.hardtanh.default: ("relu6", {"min_val": 0, "max_val": 6}),
    _aten.leaky_relu.default: ("leaky_relu", {"negative_slope": 0.01}),
    _aten.hardswish.default: ("hardswish", {}),
    _aten.sigmoid.default: ("sigmoid", {}),
    _aten.silu.default: ("silu", {}),
    _aten.gelu.default: ("gelu", {"approximate": "none"}),
}
_NORM = _aten._native_batch_norm_legit_no_training.default
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Optimization:
    """What became of the convolutions of a model; it prints as a table.

    Attributes:
        fused: name of a layer -> the functions that are one call now, in their order, and the algorithm that serves it.
        kept: name of a layer -> why torch computes it still.
        channels_last: whether pictures are in that format from the first layer to the last.
        plain: None, or why the model could not be written as a graph; then layers are prepacked, and nothing is fused.
    """

    fused: Mapping[str, tuple[tuple[str, ...], str]]
    kept: Mapping[str, str]
    channels_last: bool
    plain: str | None

    def __str__(self) -> str:
        rows = [(name, f"{' + '.join(functions)}, by {by}") for name, (functions, by) in self.fused.items()]
        rows += [(name, f"kept: {why}") for name, why in self.kept.items()]
        rows = [(name or "(the model)", said) for name, said in rows]
        wide = max((len(name) for name, _ in rows), default=0)
        total = f"{len(self.fused)} prepacked, {len(self.kept)} kept" + ", in channels_last" * self.channels_last
        told = [total] if self.plain is None else [total, f"nothing is fused: {self.plain}"]
        return "\n".join([*(f"{name:<{wide}}  {said}" for name, said in rows), *told])

    __repr__ = __str__


class Optimized(nn.Module):
    """A model for inference, made by `optimize`; it holds copies of all weights, and has no gradients.

    Attributes:
        report: what became of each convolution.
    """

    report: Optimization

    def __init__(self, model: nn.Module, report: Optimization) -> None:
        super().__init__()
        self.model, self.report = model, report
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives for inputs like the example."""
        try:
            return self.model(*args, **kwargs)
        except AssertionError as error:  # torch.export's guards
            if not str(error).startswith("Guard failed"):
                raise
            raise RuntimeError(
                f"the model was optimized for inputs like its example, and for these {str(error)[:1].lower()}"
                f"{str(error)[1:]} does not hold; call plainconv.optimize again with such inputs"
            ) from None

    def train(self, mode: bool = True) -> Optimized:
        """Raises RuntimeError for mode=True: what is optimized stays in evaluation mode."""
        if mode:
            raise RuntimeError("what is optimized is for inference; train the model that it was made from")
        return self

    def extra_repr(self) -> str:
        return str(self.report)


def optimize(
    model: nn.Module, example_input: Tensor | tuple[Any, ...] | Mapping[str, Any], *, algorithm: str = AUTO
) -> Optimized:
    """A copy of a model for inference: batch-norms folded, activations and additions fused, weights prepacked.

    It is never stale: what becomes of the model afterwards is not seen.  Where torch.export cannot write the model as a
    graph, its convolution layers are prepacked, each by itself; the result's `report` says so, and what became of each.

    Args:
        model: in evaluation mode.
        example_input: one tensor, all positional arguments as a tuple, or keyword arguments as a mapping.
        algorithm: of all convolutions, "auto" or one of plainconv.algorithms().

    Returns:
        a module that is called as the model is, with inputs like the example; of another batch or size, where the model
        allows any.  Results differ by rounding: batch-norms are folded in float64 and rounded once, and algorithms
        differ by what plainconv.explain says.

    Raises:
        RuntimeError: the model is in training mode, wrapped or compiled.
        TypeError: the model is no module.
        ValueError: no such algorithm.
    """
    check_algorithm(algorithm)
    if isinstance(model, nn.Module) and model.training:
        raise RuntimeError("optimize is for inference, but the model is in training mode; call model.eval() first")
    args, kwargs = _arguments_of(example_input)
    with torch.inference_mode(False), torch.no_grad():
        check_model("optimize", model)
        model = copy.deepcopy(model).requires_grad_(False)
        unswap(model)
        try:
            graph = _written(model, args, kwargs)
        except Exception as error:  # whatever it is that torch.export does not understand
            line = (str(error).strip() or "nothing more").splitlines()[0]
            return _each_by_itself(model, args, kwargs, algorithm, f"torch.export says {type(error).__name__}: {line}")
        steps, kept = _fuse(graph, algorithm)
        last = _faster_in_channels_last(graph, steps.values(), args, kwargs)
        if last:
            _begin_in_channels_last(graph)
        graph(*args, **kwargs)  # each convolution packs when it meets its input
    told = {name: (step.functions, step.algorithm) for name, step in steps.items()}
    return Optimized(graph, Optimization(told, kept, last, None))


def _arguments_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


# -- the graph -------------------------------------------------------------------------------------------------------


def _written(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    """The model as a graph of functions without side effects; for any batch and size, if it allows that.

    torch.export takes a size of 1 for one that is always 1, so what is given a single picture is written for two.
    """
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if all(leaf.dim() > 2 and len(leaf) == 1 for leaf in given):
        with contextlib.suppress(Exception):
            two_args, two_kwargs = tree_map_only(Tensor, lambda leaf: torch.cat([leaf, leaf]), (args, kwargs))
            return _exported(model, two_args, two_kwargs, True)
    with contextlib.suppress(Exception):
        return _exported(model, args, kwargs, True)
    return _exported(model, args, kwargs, False)


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], any_size: bool) -> GraphModule:
    sizes = ShapesCollection()
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            sizes[leaf] = {dim: Dim.AUTO for dim, size in enumerate(leaf.shape) if size > 1}
    dynamic: Any = sizes if any_size else None
    program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic)
    graph = program.run_decompositions({}).module()
    assert isinstance(graph, GraphModule)
    return graph


def _faster_in_channels_last(
    module: GraphModule, steps: Iterable[_Step], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether the convolutions are estimated to be faster so, all together."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # to see the shape of what each is given
        args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        module(*args, **kwargs)
    plain, last = (sum(step.seconds(last) for step in steps) for last in (False, True))
    return last < plain


def _begin_in_channels_last(module: GraphModule) -> None:
    """Turn pictures into channels_last when they come, and back when they leave."""
    graph = module.graph
    for node in graph.nodes:
        if node.target in (_aten.view.default, _aten._unsafe_view.default):  # what lies otherwise has no such views
            node.target = _aten.reshape.default
        if node.op == "placeholder" and (rank := _rank(node)) in _FORMATS:
            users = [user for user in node.users if user.op != "call_module" or user.target != "_guards_fn"]
            with graph.inserting_after(node):
                turned = graph.call_method("contiguous", (node,), {"memory_format": _FORMATS[rank]})
            for user in users:
                user.replace_input_with(node, turned)
    (output,) = (node for node in graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        if _rank(node) in _FORMATS and node.op != "placeholder":
            with graph.inserting_before(output):
                output.replace_input_with(node, graph.call_method("contiguous", (node,)))
    graph.lint()
    module.recompile()


def _rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


# -- a convolution and what it takes in ------------------------------------------------------------------------------


class _Step(nn.Module):
    """activation(conv(input) + residual); its weight is packed when the first real input comes."""

    def __init__(self, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> None:
        super().__init__()
        self.functions: tuple[str, ...] = (_kind(options["transposed"]),)
        self.options = options
        self._given: tuple[Tensor, Tensor | None] | None = (weight, bias)  # until they are packed
        self._like: Tensor | None = None  # an input without memory
        self.packed: Prepacked | None = None

    @property
    def algorithm(self) -> str:
        assert self.packed is not None
        return self.packed.algorithm

    def scale(self, scale: Tensor, shift: Tensor) -> None:
        """Multiply each channel of the result, and move it; both [channels], float64."""
        assert self._given is not None
        weight, bias = self._given
        each = (-1, 1, *(1,) * (weight.dim() - 2))
        if self.options["transposed"]:  # [in, out / groups, *kernel]: the outputs of each group have their own
            grouped = weight.double().unflatten(0, (self.options["groups"], -1)).transpose(1, 2)
            wide = (grouped * scale.view(len(grouped), *each)).transpose(1, 2).flatten(0, 1)
        else:
            wide = weight.double() * scale.view(each)
        shift = shift if bias is None else bias.double() * scale + shift
        self._given = wide.to(weight.dtype), shift.to(weight.dtype)

    def seconds(self, channels_last: bool) -> float:
        """What it is estimated to take for inputs in this format."""
        assert self._given is not None
        assert self._like is not None
        usual = torch.contiguous_format
        memory_format = _FORMATS.get(self._like.dim(), usual) if channels_last else usual
        like = torch.empty_like(self._like, device=self._given[0].device, memory_format=memory_format)
        told = functional.explain(like, *self._given, **self.options)
        return next(verdict.seconds for verdict in told.verdicts if verdict.algorithm.name == told.chosen)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.packed is None:
            if isinstance(input, FakeTensor):
                return self._pretend(input)
            self.packed = self._pack(input)
        return self.packed(input, residual)

    def _pretend(self, input: Tensor) -> Tensor:
        assert self._given is not None
        self._like = torch.empty(input.shape, dtype=input.dtype, device="meta")
        weight, bias = self._given
        options = {name: value for name, value in self.options.items() if name != "transposed"}
        name = f"{_kind(self.options['transposed'])}{weight.dim() - 2}d"
        result: Tensor = getattr(functional, name)(input, weight, bias, **options)
        return result

    def _pack(self, input: Tensor) -> Prepacked:
        assert self._given is not None
        weight, bias = self._given
        self._given = None
        return prepack(weight, input.shape, bias, memory_format=_format(input), **self.options)


def _fuse(module: GraphModule, algorithm: str) -> tuple[dict[str, _Step], dict[str, str]]:
    """Let each convolution of the graph take in what it can; returns them, and why others were left, by layer."""
    steps: dict[str, _Step] = {}
    kept: dict[str, str] = {}
    constant = _Constants(module)
    for node in list(module.graph.nodes):
        if node.target not in _CONVOLUTIONS:
            continue
        name = _named(node, {*steps, *kept})
        given = _called(node)
        weight, bias = constant(given["weight"]), constant(given["bias"])
        if weight is None or (bias is None and given["bias"] is not None):
            kept[name] = "its weight or bias is computed from the input"
            continue
        steps[name] = _step(node, weight, bias, algorithm)
        _take_in(module, node, steps[name], constant)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return steps, kept


def _step(node: Node, weight: Tensor, bias: Tensor | None, algorithm: str) -> _Step:
    """The convolution by itself."""
    given, dims = _called(node), weight.dim() - 2
    options: dict[str, Any] = {"groups": given["groups"], "algorithm": algorithm}
    for name in ("stride", "padding", "dilation", "output_padding"):
        if name in given:
            value = given[name]
            options[name] = value if isinstance(value, str) else tuple(value) * (dims if len(value) == 1 else 1)
    return _Step(weight, bias, options | {"transposed": _CONVOLUTIONS[node.target]})


def _take_in(module: GraphModule, node: Node, step: _Step, constant: _Constants) -> None:
    """Put a call of the step in the place of the last function that it takes in."""
    graph, source, last, residual = module.graph, _called(node)["input"], node, None
    if (padding := _padding_of(source)) and not step.options["transposed"] and not any(step.options["padding"]):
        step.options |= padding
        step.functions = ("pad", *step.functions)
        source = _called(source)["self"]
    if (user := _only_user(last)) and user.target is _NORM and (norm := _norm_of(user, constant)):
        (last,) = user.users
        step.scale(*norm)
        step.functions += ("batch_norm",)
    if (user := _only_user(last)) and (residual := _residual_of(user, last)):
        last = user
        step.functions += ("add",)
    if (user := _only_user(last)) and (activation := _activation_of(user)):
        last = user
        step.options["activation"] = activation
        step.functions += (activation,)
    name = f"plainconv_{len([*module.named_children()])}"
    module.add_submodule(name, step)
    with graph.inserting_before(last):
        call = graph.call_module(name, (source,) if residual is None else (source, residual))
    call.meta = dict(last.meta)
    last.replace_all_uses_with(call)


class _Constants:
    """The values of nodes that depend on parameters and buffers alone."""

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._known: dict[Node, Any] = {}

    def __call__(self, node: Any) -> Tensor | None:
        """The tensor, or None if it is none or depends on more."""
        value = self._value(node) if isinstance(node, Node) else None
        return value if isinstance(value, Tensor) else None

    def _value(self, node: Node) -> Any:
        if node not in self._known:
            self._known[node] = self._computed(node)
        return self._known[node]

    def _computed(self, node: Node) -> Any:
        if node.op == "get_attr":
            return attrgetter(str(node.target))(self._module)
        tags = getattr(node.target, "tags", ())
        if node.op != "call_function" or not node.all_input_nodes or torch.Tag.nondeterministic_seeded in tags:
            return None
        if any(self._value(given) is None for given in node.all_input_nodes):
            return None
        function: Any = node.target
        args, kwargs = map_arg((node.args, node.kwargs), self._value)
        return function(*args, **kwargs)


# -- what a node says ------------------------------------------------------------------------------------------------


def _called(node: Node) -> dict[str, Any]:
    """The arguments of an operator by their names, with its defaults."""
    operator: Any = node.target
    known = operator._schema.arguments
    given = dict(zip((argument.name for argument in known), node.args, strict=False)) | dict(node.kwargs)
    return {argument.name: given.get(argument.name, argument.default_value) for argument in known}


def _only_user(node: Node) -> Node | None:
    """What reads it, if that is one function alone."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _named(node: Node, taken: set[str]) -> str:
    """The name of the module that the function was called in, or a new one."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    name = str(stack[-1][0]) if stack else node.name
    return name if name not in taken else next(f"{name} ({n})" for n in count(2) if f"{name} ({n})" not in taken)


def _padding_of(node: Any) -> dict[str, Any] | None:
    """padding= and padding_mode= that do what the function does, if it is a padding that nothing else reads."""
    if not isinstance(node, Node) or node.target is not _aten.pad.default or not _only_user(node):
        return None
    given, dims = _called(node), _rank(node) - 2
    sides, mode = given["pad"], given["mode"]
    if mode == "constant":
        mode = "zeros" if not given["value"] else None
    if mode not in PADDING_MODES or len(sides) > 2 * dims or not all(isinstance(side, int) for side in sides):
        return None
    pairs = [*zip(sides[::2], sides[1::2], strict=True), *[(0, 0)] * (dims - len(sides) // 2)]
    return {"padding": tuple(reversed(pairs)), "padding_mode": mode}


def _norm_of(node: Node, constant: _Constants) -> tuple[Tensor, Tensor] | None:
    """Scale and shift [channels] of a batch-norm whose statistics are not asked for, in float64."""
    given = _called(node)
    mean, variance = constant(given["running_mean"]), constant(given["running_var"])
    if mean is None or variance is None or len(node.users) != 1 or next(iter(node.users)).args[1] != 0:
        return None
    weight, bias = constant(given["weight"]), constant(given["bias"])
    scale = torch.rsqrt(variance.double() + given["eps"])
    scale = scale if weight is None else weight.double() * scale
    shift = -mean.double() * scale
    return scale, shift if bias is None else bias.double() + shift


def _residual_of(node: Node, other: Node) -> Node | None:
    """What an addition adds to the other, if it has that one's shape and type."""
    if node.target is not _aten.add.Tensor or _called(node)["alpha"] != 1:
        return None
    first, second = node.args
    added = second if first is other else first
    if not isinstance(added, Node) or added is other:
        return None
    mine, its = other.meta.get("val"), added.meta.get("val")
    if not isinstance(mine, Tensor) or not isinstance(its, Tensor) or its.dtype is not mine.dtype:
        return None
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # heavy; torch.export has it by now

    alike = its.dim() == mine.dim() and all(map(statically_known_true, map(eq, its.shape, mine.shape)))
    return added if alike else None


def _activation_of(node: Node) -> str | None:
    if node.target not in _ACTIVATIONS:
        return None
    name, asked = _ACTIVATIONS[node.target]
    given = _called(node)
    return name if all(given[argument] == value for argument, value in asked.items()) else None


# -- without a graph -------------------------------------------------------------------------------------------------


def _each_by_itself(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], algorithm: str, why: str
) -> Optimized:
    """The model as it is, with its convolution layers prepacked for what they are given first."""
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, _ConvNd)}
    inputs: dict[nn.Module, Tensor] = {}

    def see(layer: nn.Module, given: tuple[Any, ...]) -> None:
        inputs.setdefault(layer, given[0])

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    fused: dict[str, tuple[tuple[str, ...], str]] = {}
    kept: dict[str, str] = {}
    packed: dict[nn.Module, Prepacked] = {}
    for layer, name in layers.items():
        if layer not in inputs:
            kept[name] = "the example did not reach it"
            continue
        try:
            packed[layer] = prepack(
                layer, inputs[layer].shape, algorithm=algorithm, memory_format=_format(inputs[layer])
            )
        except TypeError as error:  # a layer with a forward of its own
            kept[name] = str(error)
        else:
            fused[name] = (_kind(layer.transposed),), packed[layer].algorithm
    for changed, call in packed.items():  # it stays what it is to those who read its attributes
        changed.forward = call.forward
    return Optimized(model, Optimization(fused, kept, False, why))


def _format(input: Tensor) -> torch.memory_format:
    return _FORMATS[input.dim()] if is_channels_last(input) else torch.contiguous_format


def _kind(transposed: bool) -> str:
    return "conv_transpose" if transposed else "conv"
