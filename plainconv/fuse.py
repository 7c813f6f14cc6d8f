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
import io
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from operator import attrgetter, eq
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ShapesCollection
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map_only

from plainconv import functional
from plainconv.inference import Prepacked, prepack
from plainconv.menu.base import AlgorithmRefused
from plainconv.ops import OPERATORS, is_channels_last
from plainconv.plan import check_algorithm
from plainconv.problem import FORMATS, PADDING_MODES, Direction, settled_activation
from plainconv.replace import check_model, check_weights, unswap
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
    OPERATORS[Direction.FORWARD]: False,  # of plainconv's own functions and layers
}
_OUR_TRANSPOSED = OPERATORS[Direction.GRAD_INPUT]
_ACTIVATIONS: dict[Any, tuple[str, dict[str, Any]]] = {  # function -> as activation=, and what its arguments have to be
    _aten.relu.default: ("relu", {}),
    _aten.relu6.default: ("relu6", {}),
    _aten.hardtanh.default: ("relu6", {"min_val": 0, "max_val": 6}),
    _aten.leaky_relu.default: ("leaky_relu({negative_slope})", {}),
    _aten.hardswish.default: ("hardswish", {}),
    _aten.sigmoid.default: ("sigmoid", {}),
    _aten.silu.default: ("silu", {}),
    _aten.gelu.default: ("gelu", {"approximate": "none"}),
}
_NORM = _aten._native_batch_norm_legit_no_training.default
_STRIDED = (_aten.as_strided.default, _aten.view_as_complex.default, _aten.view_as_real.default)  # they ask how it lies
_Shapes = tuple[tuple[int, ...] | None, ...]
_one_is_quiet = threading.RLock()


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

    def __init__(self, model: nn.Module, report: Optimization, shapes: _Shapes = (), one: bool = True) -> None:
        """shapes: of the example, where the graph is one for some sizes; one: whether it is right for a batch of 1."""
        super().__init__()
        self.model, self.report = model, report
        self._shapes, self._one = shapes, one
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives for inputs like the example."""
        if self._shapes:
            for leaf, shape in zip(_leaves((args, kwargs)), self._shapes, strict=False):
                self._check(leaf, shape)
        try:
            return self.model(*args, **kwargs)
        except AssertionError as error:  # torch.export's guards
            if str(error).startswith("Guard failed: "):
                told = _unlike(str(error).removeprefix("Guard failed: "))
                for note in self._notes_without_guards(args, kwargs):
                    told.add_note(note)
                raise told from None
            raise
        except ValueError as error:  # its reading of arguments
            if str(error).startswith(("Trying to flatten user inputs", "Ran into a kwarg keyword mismatch")):
                raise _other_form() from None
            raise

    def _check(self, leaf: Any, shape: tuple[int, ...] | None) -> None:
        """What torch.export's guards take for granted, or do not ask."""
        if not isinstance(leaf, Tensor) or shape is None:
            if isinstance(leaf, Tensor) or shape is not None:
                raise _other_form()
            return
        if leaf.dim() != len(shape):
            raise _unlike(f"{len(shape)} dimensions, and not {leaf.dim()},")
        if 1 in leaf.shape:  # a graph written for sizes of 2 and more says nothing of what the model does for 1
            for dim, (size, example) in enumerate(zip(leaf.shape, shape, strict=True)):
                if size == 1 != example and not (dim == 0 and self._one):
                    raise _unlike(f"a size of {example} at dimension {dim}, and not of 1,")

    def _notes_without_guards(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """What the first convolution says that these cannot come to, and its name; nothing, if there is none."""
        if not isinstance(self.model, GraphModule):
            return []
        unguarded = _Unguarded(self.model)
        unguarded.extra_traceback = False  # it would be written into the error
        try:
            with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
                args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
                unguarded.run(*tree_leaves((args, kwargs)), enable_io_processing=False)
        except Exception as error:
            return [f"{note}: {error}" for note in getattr(error, "__notes__", ())]
        return []

    def train(self, mode: bool = True) -> Optimized:
        """Raises RuntimeError for mode=True: what is optimized stays in evaluation mode."""
        if mode:
            raise RuntimeError("what is optimized is for inference; train the model that it was made from")
        return self

    def extra_repr(self) -> str:
        return str(self.report)

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimized:
        return Optimized(copy.deepcopy(self.model, memo), self.report, self._shapes, self._one)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError("torch.jit cannot compile what is optimized; give it the model that it was made from")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("what is optimized cannot be pickled; pickle the model, and optimize it where it was loaded")


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
        RuntimeError: the model is in training mode, wrapped, compiled, or has a lazy layer that was not called yet.
        TypeError: the model is no module, or is optimized already.
        ValueError, AlgorithmRefused: no such algorithm, or one that cannot serve a layer, which the message names.
    """
    check_algorithm(algorithm)
    check_model("optimize", model)
    if any(isinstance(module, Prepacked) for module in model.modules()):
        raise TypeError(
            "optimize takes a model as it is, and this one is optimized already; give what it was made from"
        )
    check_weights("optimize", model)
    if model.training:
        raise RuntimeError("optimize is for inference, but the model is in training mode; call model.eval() first")
    args, kwargs = _arguments_of(example_input)
    with torch.inference_mode(False), torch.no_grad():
        model = copy.deepcopy(model).requires_grad_(False)
        unswap(model)
        layers = {name for name, layer in model.named_modules() if isinstance(layer, _ConvNd)}
        try:
            graph, one = _written(model, args, kwargs)
        except Exception as error:  # whatever it is that torch.export does not understand
            line = (str(error).strip() or "nothing more").splitlines()[0]
            return _each_by_itself(model, args, kwargs, algorithm, f"torch.export says {type(error).__name__}: {line}")
        steps, kept = _fuse(graph, algorithm, layers)
        within = "it is called in a graph within the graph, as of torch.cond, where nothing is fused"
        kept |= dict.fromkeys(sorted(_read_within(graph, layers) - {*steps, *kept}), within)
        kept |= dict.fromkeys(sorted(layers - {*steps, *kept}), "the example did not reach it")
        last = _faster_in_channels_last(graph, steps.values(), args, kwargs)
        if last:
            _begin_in_channels_last(graph)
        _tried(graph, args, kwargs)  # each convolution packs when it meets its input
        for name, step in [*graph.named_children()]:
            if isinstance(step, _Step) and step.packed is not None:
                graph.add_module(name, step.packed)
    told = {name: (step.functions, step.algorithm) for name, step in steps.items()}
    return Optimized(graph, Optimization(told, kept, last, None), _shapes(args, kwargs), one)


class _Unguarded(Interpreter):
    """The graph, whatever it is given."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if target == "_guards_fn" else super().call_module(target, args, kwargs)


def _unlike(condition: str) -> RuntimeError:
    return RuntimeError(
        f"the model was optimized for inputs like its example, and for these {condition} does not hold; "
        "call plainconv.optimize again with such inputs"
    )


def _other_form() -> TypeError:
    return TypeError("what is optimized is called with the arguments of its example, in their form")


def _arguments_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


# -- the graph -------------------------------------------------------------------------------------------------------


def _written(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[GraphModule, bool]:
    """The model as a graph of functions without side effects; for any batch and size, if it allows that.

    torch.export takes a size of 1 for one that is always 1, so what is given a single picture is written for two; that
    is held to the model, which might do something else with one.  Returns whether it is right for a batch of 1, too.
    """
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    batched = bool(given) and all(leaf.dim() > 1 and len(leaf) == len(given[0]) for leaf in given)
    if batched and len(given[0]) == 1:
        with contextlib.suppress(Exception):
            graph = _exported(model, *tree_map_only(Tensor, lambda leaf: torch.cat([leaf, leaf]), (args, kwargs)))
            if _agree(model, graph, args, kwargs):
                return graph, True
    with contextlib.suppress(Exception):
        graph = _exported(model, args, kwargs)
        return graph, batched and _agree(model, graph, *tree_map_only(Tensor, lambda leaf: leaf[:1], (args, kwargs)))
    return _exported(model, args, kwargs, any_size=False), False


def _agree(model: nn.Module, graph: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether both give the same for an input, but for rounding."""
    try:
        asked, found = (tree_leaves(_tried(of, args, kwargs)) for of in (model, graph))
    except Exception:  # a model that takes no such batch
        return False

    def same(one: Any, other: Any) -> bool:
        if not isinstance(one, Tensor):
            return bool(one == other)
        return one.shape == other.shape and bool(torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True))

    return len(asked) == len(found) and all(map(same, asked, found))


def _tried(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What it gives; neither the arguments nor what the module keeps are changed by it."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
    try:
        return module(*args, **kwargs)
    finally:
        for buffer, values in before:
            buffer.copy_(values)


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Shapes:
    """Of all leaves of the arguments; None for what is no tensor."""
    return tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in _leaves((args, kwargs)))


def _leaves(given: Any) -> list[Any]:
    """As tree_leaves, but in one order whatever that of the names, as torch.export takes them."""
    if isinstance(given, dict):
        given = [given[name] for name in sorted(given, key=str)]
    if isinstance(given, (tuple, list)):
        return [leaf for part in given for leaf in _leaves(part)]
    return tree_leaves(given)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export tells in the log and on stderr, on many pages, what it then says in its error."""
    with _one_is_quiet:  # both are the whole process's: two would put each other's back
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            logging.disable(before)


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, any_size: bool = True) -> GraphModule:
    sizes = ShapesCollection()
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            sizes[leaf] = {dim: Dim.AUTO for dim, size in enumerate(leaf.shape) if size > 1}
    dynamic: Any = sizes if any_size else None
    with _quiet():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic)
        graph = program.run_decompositions({}).module()
    assert isinstance(graph, GraphModule)
    return graph


def _faster_in_channels_last(
    module: GraphModule, steps: Iterable[_Step], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether the convolutions are estimated to be faster so, all together; not if that cannot be known."""
    if any(node.target in _STRIDED for node in module.graph.nodes):
        return False
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # to see the shape of what each is given
            for step in steps:
                step.watches = True
            args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
            module(*args, **kwargs)
        plain, last = (sum(step.seconds(last) for step in steps) for last in (False, True))
    except Exception:  # shapes that depend on values
        return False
    finally:
        for step in steps:
            step.watches = False
    return last < plain


def _begin_in_channels_last(module: GraphModule) -> None:
    """Turn pictures into channels_last when they come, and back when they leave."""
    graph = module.graph
    for node in graph.nodes:
        if node.target in (_aten.view.default, _aten._unsafe_view.default):  # what lies otherwise has no such views
            node.target = _aten.reshape.default
        if node.op == "placeholder" and (rank := _rank(node)) in FORMATS:
            users = [user for user in node.users if not _keeps(user)]
            with graph.inserting_after(node):
                turned = graph.call_method("contiguous", (node,), {"memory_format": FORMATS[rank]})
            turned.meta["val"] = node.meta["val"]
            for user in users:
                user.replace_input_with(node, turned)
    (output,) = (node for node in graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        if _rank(node) in FORMATS and node.op != "placeholder" and node.meta["val"].is_contiguous():
            with graph.inserting_before(output):
                output.replace_input_with(node, graph.call_method("contiguous", (node,)))
    graph.lint()
    module.recompile()


def _keeps(node: Node) -> bool:
    """Whether it takes an input of the model for itself, and not for its values."""
    return node.op == "output" or node.target in ("_guards_fn", _aten.copy_.default)


def _rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


# -- a convolution and what it takes in ------------------------------------------------------------------------------


class _Step(nn.Module):
    """activation(conv(input) + residual); its weight is packed when the first real input comes."""

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> None:
        super().__init__()
        self.name = name
        self.functions: tuple[str, ...] = (_kind(options["transposed"]),)
        self.options = options
        self._given: tuple[Tensor, Tensor | None] | None = (weight, bias)  # until they are packed
        self._like: Tensor | None = None  # an input without memory
        self.watches = False  # whether it is called to see one
        self.packed: Prepacked | None = None

    @property
    def algorithm(self) -> str:
        assert self.packed is not None
        return self.packed.algorithm

    @property
    def dims(self) -> int:
        assert self._given is not None
        return self._given[0].dim() - 2

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
        memory_format = FORMATS.get(self._like.dim(), usual) if channels_last else usual
        like = torch.empty_like(self._like, device=self._given[0].device, memory_format=memory_format)
        told = functional.explain(like, *self._given, **self.options)
        seconds = {verdict.algorithm.name: verdict.seconds for verdict in (*told.verdicts, *told.packed)}
        return seconds.get(told.chosen_packed or told.chosen, float("inf"))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.watches:
            return self._pretend(input)
        if self.packed is None:
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
        return _prepacked(self.name, weight, input, bias=bias, **self.options)


def _prepacked(name: str, layer: nn.Module | Tensor, input: Tensor, **options: Any) -> Prepacked:
    """For inputs like this one; a refusal names the layer, and so do errors of its calls."""
    try:
        packed = prepack(layer, input.shape, memory_format=_format(input), **options)
    except AlgorithmRefused as error:
        raise AlgorithmRefused(f"layer {name!r}: {error}") from None
    packed.layer = name
    return packed


def _fuse(module: GraphModule, algorithm: str, layers: set[str]) -> tuple[dict[str, _Step], dict[str, str]]:
    """Let each convolution of the graph take in what it can; returns them, and why others were left, by layer."""
    steps: dict[str, _Step] = {}
    kept: dict[str, str] = {}
    constant = _Constants(module)
    for node in list(module.graph.nodes):
        if node.target not in _CONVOLUTIONS and node.target != _OUR_TRANSPOSED:
            continue
        name = _named(node, {*steps, *kept}, layers)
        if node.target == _OUR_TRANSPOSED:
            kept[name] = "it is plainconv's own transposed convolution, into which nothing is taken"
            continue
        given = _convolution(node)
        weight, bias = constant(given["weight"]), constant(given["bias"])
        if weight is None or (bias is None and given["bias"] is not None):
            kept[name] = "its weight or bias is computed in each call"
            continue
        steps[name] = _step(node, name, weight, bias, algorithm)
        _take_in(module, node, steps[name], constant)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return steps, kept


def _step(node: Node, name: str, weight: Tensor, bias: Tensor | None, algorithm: str) -> _Step:
    """The convolution by itself."""
    given, dims = _convolution(node), weight.dim() - 2
    options: dict[str, Any] = {"groups": given["groups"], "algorithm": algorithm}
    if "padding_mode" in given:
        options["padding_mode"] = given["padding_mode"]
    for option in ("stride", "padding", "dilation", "output_padding"):
        if option in given:
            value = given[option]
            options[option] = value if isinstance(value, str) else tuple(value) * (dims if len(value) == 1 else 1)
    return _Step(name, weight, bias, options | {"transposed": _CONVOLUTIONS[node.target]})


def _take_in(module: GraphModule, node: Node, step: _Step, constant: _Constants) -> None:
    """Put a call of the step in the place of the last function that it takes in."""
    graph, source, last, residual = module.graph, _convolution(node)["input"], node, None
    if (
        (padding := _padding_of(source, step.dims))
        and not step.options["transposed"]
        and not any(step.options["padding"])
    ):
        step.options |= padding
        step.functions = ("pad", *step.functions)
        source = _called(source)["self"]
    batched = _rank(node) == step.dims + 2  # without a batch, a norm's channels are not the convolution's
    if batched and (user := _only_user(last)) and user.target is _NORM and (norm := _norm_of(user, constant)):
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
        written = (node.args[0] for node in module.graph.nodes if node.target is _aten.copy_.default)
        self._changing = {node.target for node in written if isinstance(node, Node)}  # buffers that a call changes
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
            return None if node.target in self._changing else attrgetter(str(node.target))(self._module)
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


def _convolution(node: Node) -> dict[str, Any]:
    """The arguments of a convolution, as plainconv's functions call them."""
    given = _called(node)
    if node.target == OPERATORS[Direction.FORWARD]:
        sides = given["padding"]
        given |= {"input": given["x"], "weight": given["w"], "padding": [*zip(sides[::2], sides[1::2], strict=True)]}
    return given


def _only_user(node: Node) -> Node | None:
    """What reads it, if that is one function alone."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _named(node: Node, taken: set[str], layers: set[str]) -> str:
    """The name of the module that the function was called in, or a new one."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    name = str(stack[-1][0]) if stack else node.name
    if name not in layers:  # within torch.autocast, the graph does not know it; the weight may
        name = _layer_of(node.all_input_nodes[1], layers) or name
    return name if name not in taken else next(f"{name} ({n})" for n in count(2) if f"{name} ({n})" not in taken)


def _layer_of(node: Node, layers: set[str]) -> str | None:
    """The name of the layer that keeps the tensor, or the first of those that it is made of."""
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return next((name for name in layers if node.op == "get_attr" and str(node.target).startswith(f"{name}.")), None)


def _read_within(module: GraphModule, layers: set[str]) -> set[str]:
    """The layers whose tensors go into functions that have graphs of their own."""
    functions = (node for node in module.graph.nodes if isinstance(node.target, HigherOrderOperator))
    return {name for node in functions for given in node.all_input_nodes if (name := _layer_of(given, layers))}


def _padding_of(node: Any, dims: int) -> dict[str, Any] | None:
    """padding= and padding_mode= that do what the function does, if it is a padding that nothing else reads."""
    if not isinstance(node, Node) or node.target is not _aten.pad.default or not _only_user(node):
        return None
    given = _called(node)
    if _rank(node) != dims + 2:
        return None
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
    value = node.meta.get("val")
    if node.target not in _ACTIVATIONS or not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    text, asked = _ACTIVATIONS[node.target]
    given = _called(node)
    if any(given[argument] != wanted for argument, wanted in asked.items()):
        return None
    try:
        return settled_activation(text.format(**given), value.dtype)
    except ValueError:  # a slope that is computed, or not finite
        return None


# -- without a graph -------------------------------------------------------------------------------------------------


def _each_by_itself(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], algorithm: str, why: str
) -> Optimized:
    """The model as it is, with its convolution layers prepacked for what they are given first."""
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, _ConvNd)}
    inputs: dict[_ConvNd, Tensor] = {}
    sized: set[nn.Module] = set()

    running: list[str] = []

    def see(layer: _ConvNd, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # within torch.cond, which allows no change of what lies without
            return
        running.append(layers[layer])
        inputs.setdefault(layer, given[0] if given else named["input"])
        if any(size is not None for size in (*given[1:], named.get("output_size"))):
            sized.add(layer)

    def leave(*_: Any) -> None:
        if not torch.compiler.is_compiling():
            running.pop()

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        _tried(model, args, kwargs)
    except Exception as error:
        if running:
            error.add_note(f"in layer {running[-1]!r}")
        raise
    for hook in hooks:
        hook.remove()
    fused: dict[str, tuple[tuple[str, ...], str]] = {}
    kept: dict[str, str] = {}
    packed: dict[_ConvNd, Prepacked] = {}
    for layer, name in layers.items():
        if layer not in inputs:
            kept[name] = "the example did not reach it, or only within a function as torch.cond"
            continue
        if layer in sized:
            kept[name] = "it is called with an output_size"
            continue
        try:
            packed[layer] = _prepacked(name, layer, inputs[layer], algorithm=algorithm)
        except TypeError as error:  # a layer with a forward of its own
            kept[name] = str(error)
        else:
            fused[name] = (_kind(layer.transposed),), packed[layer].algorithm
    for changed, call in packed.items():  # it stays what it is to those who read its attributes
        changed.add_module("prepacked", call)
        changed.forward = call.__call__
    return Optimized(model, Optimization(fused, kept, False, why))


def _format(input: Tensor) -> torch.memory_format:
    return FORMATS[input.dim()] if is_channels_last(input) else torch.contiguous_format


def _kind(transposed: bool) -> str:
    return "conv_transpose" if transposed else "conv"
