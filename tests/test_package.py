"""The package as a whole: floors, public names, what importing costs, and that torch's convolution is never called."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checks import FORWARD_ONLY
from torch.utils._python_dispatch import TorchDispatchMode

import plainconv

ROOT = Path(plainconv.__file__).parent
MODULES = {
    ".".join(("plainconv", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

# -- floors ----------------------------------------------------------------------------------------------------------

# A module imports only from floors below its own; a package's modules also from each other.
FLOORS = {
    "version": 0,
    "files": 0,
    "memory": 0,
    "problem": 0,
    "remember": 0,
    "border": 1,
    "onnx": 1,
    "settings": 1,
    "cpu": 1,
    "gpu": 1,
    "arguments": 1,
    "timing": 1,
    "reference": 2,
    "menu": 3,
    "measure": 4,
    "plan": 5,
    "ops": 6,
    "functional": 7,
    "nn": 8,
    "replace": 9,
    "inference": 10,
    "fuse": 11,
    "picture": 9,
    "train": 11,
    "bench": 11,
    "plots": 11,
    "compare": 12,
    "profiling": 12,
    "report": 12,
    "cli": 13,
    "__main__": 14,
}
# The command asks __main__ what to say when a library is missing; both are the same floor to everything else.
SAME_DOOR = {("cli", "__main__")}


def part(module: str) -> str:
    """The name in the table: the first one below plainconv; what `python -m` runs is a door, wherever it lies."""
    _, first, *rest = module.split(".")
    return "__main__" if rest[-1:] == ["__main__"] else first


def imports(path: Path) -> Iterator[str]:
    """Every module of plainconv that a file imports, at its top or in a function; "plainconv" is the package itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "plainconv")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are written in full"
            if (node.module or "").split(".")[0] == "plainconv":
                named = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name if name in MODULES else str(node.module) for name in named)


def test_every_module_has_a_floor():
    assert {part(module) for module in MODULES if module != "plainconv"} == set(FLOORS)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "plainconv"])
def test_a_module_imports_only_from_floors_below(module):
    for imported in imports(MODULES[module]):
        assert imported != "plainconv", "a module must not import the package that imports it"
        assert imported in MODULES
        mine, other = part(module), part(imported)
        inside_a_package = mine == other and MODULES[module].parent != ROOT
        assert inside_a_package or FLOORS[other] < FLOORS[mine] or (mine, other) in SAME_DOOR, f"{module} -> {imported}"


def test_the_core_is_reached_by_the_package():
    """The table is not beside the point: the package leads down to the ground."""
    reached, todo = set(), ["plainconv"]
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += imports(MODULES[module])
    assert {f"plainconv.{name}" for name in ("problem", "border", "menu", "plan", "ops", "functional", "nn")} <= reached
    outside = ("cli", "picture", "train", "compare", "report", "files")  # plots: by profile(...).plot() alone
    assert not {f"plainconv.{name}" for name in outside} & reached


def test_only_ops_knows_torch_library():
    for module, path in MODULES.items():
        named = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not {"torch.library.Library", "torch.ops.plainconv"} & named or module == "plainconv.ops"


def test_only_plots_imports_matplotlib():
    for module, path in MODULES.items():
        text = path.read_text()
        assert ("import matplotlib" in text or "from matplotlib" in text) == (module == "plainconv.plots")


# -- names -----------------------------------------------------------------------------------------------------------


def test_public_names():
    assert sorted(plainconv.__all__) == [
        "AlgorithmRefused",
        "__version__",
        "algorithms",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "explain",
        "functional",
        "get_allow_builtin",
        "get_max_workspace",
        "get_precision",
        "nn",
        "optimize",
        "prepack",
        "profile",
        "set_allow_builtin",
        "set_max_workspace",
        "set_precision",
        "swap",
        "tune",
        "tuning",
        "unswap",
    ]
    assert sorted(plainconv.nn.__all__) == [
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "ConvTranspose1d",
        "ConvTranspose2d",
        "ConvTranspose3d",
        "LazyConv1d",
        "LazyConv2d",
        "LazyConv3d",
        "LazyConvTranspose1d",
        "LazyConvTranspose2d",
        "LazyConvTranspose3d",
    ]
    for name in plainconv.__all__:
        assert getattr(plainconv, name) is not None


def test_no_module_bears_the_name_of_a_public_function():
    """Importing such a module would replace the function."""
    functions = {name for name in plainconv.__all__ if callable(getattr(plainconv, name))}
    assert not functions & {name for module in MODULES for name in module.split(".")}
    for package in ("plainconv.picture", "plainconv.train"):
        found = importlib.import_module(package)
        below = {module.rpartition(".")[2] for module in MODULES if module.startswith(f"{package}.")}
        assert not below & {name for name in vars(found) if callable(getattr(found, name))}


def test_every_public_function_and_class_says_what_it_is():
    for name in plainconv.__all__:
        assert name == "__version__" or getattr(plainconv, name).__doc__, name


# -- what importing costs --------------------------------------------------------------------------------------------


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_plainconv_needs_torch_alone():
    """Beyond what torch imports by itself: the standard library, torch, plainconv."""
    told = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import plainconv\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    added = set(told.split())
    assert "plainconv" in added
    assert added <= {"plainconv", "torch", *sys.stdlib_module_names}


def test_what_the_cpu_engine_needs_is_imported_by_the_first_call():
    """Asked by name, so that no import of theirs is among torch's own."""
    told = python(
        "import sys, torch, plainconv\n"
        "needed = {'llvmlite', 'platformdirs'}\n"
        "print(sorted(needed & set(sys.modules)))\n"
        "plainconv.conv1d(torch.ones(1, 1, 5), torch.ones(1, 1, 2))\n"
        "print('llvmlite' in sys.modules)"
    )
    assert told == "[]\nTrue\n"


def test_a_call_and_a_gradient_need_no_extra():
    told = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import plainconv\n"
        "layer = plainconv.nn.Conv2d(1, 1, 3, padding_mode='reflect', padding=1)\n"
        "layer(torch.ones(1, 1, 5, 5)).sum().backward()\n"
        "print(plainconv.explain(torch.ones(1, 1, 5, 5), layer.weight), file=sys.stderr)\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    strangers = {"matplotlib", "PIL", "typer", "rich", "sklearn", "jinja2", "triton", "numba", "onnx"}
    assert not strangers & set(told.split())


# -- plainconv computes ----------------------------------------------------------------------------------------------

TORCHS = {
    *(f"conv{d}d" for d in (1, 2, 3)),
    *(f"conv_transpose{d}d" for d in (1, 2, 3)),
    "convolution",
    "convolution_backward",
    "convolution_overrideable",
    "conv_tbc",
    "mkldnn_convolution",
    "cudnn_convolution",
    "thnn_conv2d",
    "slow_conv3d",
}
MEASURE_TORCH = ("plainconv.compare", "plainconv.profiling", "plainconv.bench.calls")  # on purpose
BUILTIN = "plainconv.menu.builtin"  # where it is allowed


def torchs_convolutions(path: Path) -> list[str]:
    """What a file takes out of torch by the name of a convolution."""
    tree, found = ast.parse(path.read_text()), []
    torchs = {"torch"}  # names that stand for torch or for one of its modules
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            torchs |= {alias.asname or "torch" for alias in node.names if alias.name.split(".")[0] == "torch"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            torchs |= {alias.asname or alias.name for alias in node.names}
            found += [alias.name for alias in node.names if alias.name in TORCHS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in TORCHS and ast.unparse(node).split(".")[0] in torchs:
            found.append(ast.unparse(node))
    return found


def test_no_module_takes_a_convolution_out_of_torch():
    assert all(torchs_convolutions(MODULES[module]) for module in MEASURE_TORCH), "this test would see it"
    for module, path in MODULES.items():
        if module not in (*MEASURE_TORCH, BUILTIN):
            assert torchs_convolutions(path) == [], module


class NoConvolutionOfTorchs(TorchDispatchMode):
    """Raises when any of torch's convolutions is called below."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "plainconv" and "conv" in name:
            raise AssertionError(f"{func} was called")
        return func(*args, **kwargs or {})


CALLS = [
    (f"{family}{dims}d", algorithm)
    for family in ("conv", "conv_transpose")
    for dims in (1, 2, 3)
    for algorithm in ("auto", *plainconv.algorithms())
    if algorithm != "builtin" and not (algorithm in FORWARD_ONLY and family == "conv_transpose")
    if (algorithm, dims) != ("separable", 1)
]


def sample(name: str, algorithm: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Input, weight, bias and groups that the algorithm serves."""
    dims, taps = int(name[-2]), 1 if algorithm == "pointwise" else 3
    groups = 4 if algorithm in ("depthwise", "separable") else 2
    tensors = torch.randn(2, 4, *(5,) * dims), torch.randn(4, 4 // groups, *(taps,) * dims), torch.randn(4)
    if algorithm == "separable":
        tensors[1].fill_(1 / 9)
    return tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2].requires_grad_(), groups


def test_the_guard_sees_torchs_convolution():
    with pytest.raises(AssertionError, match="was called"), NoConvolutionOfTorchs():
        torch.nn.functional.conv1d(torch.ones(1, 1, 3), torch.ones(1, 1, 2))


@pytest.mark.parametrize(("name", "algorithm"), CALLS)
def test_no_convolution_of_torchs_is_called_forward_or_backward(name, algorithm):
    x, w, b, groups = sample(name, algorithm)
    with NoConvolutionOfTorchs():
        result = getattr(plainconv, name)(x, w, b, groups=groups, padding=1, algorithm=algorithm)
        if algorithm in (*FORWARD_ONLY, "separable"):
            return
        gradients = torch.autograd.grad(result.square().sum(), (x, w, b), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients[:2]).backward()


@pytest.mark.parametrize("name", sorted({name for name, _ in CALLS}))
def test_none_is_called_in_the_plain_way_in(name):
    """No mode is on here, since a mode sends calls another way: torch's profiler tells."""
    names = [algorithm for called, algorithm in CALLS if called == name]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for algorithm in names:
            *tensors, groups = sample(name, algorithm)
            x, w, b = (tensor.detach() for tensor in tensors)
            getattr(plainconv, name)(x, w, b, groups=groups, padding_mode="circular", padding=1, algorithm=algorithm)
    called = {event.key for event in profile.key_averages()}
    assert any(key.startswith("aten::") for key in called)
    assert not [key for key in called if "conv" in key]


@pytest.mark.parametrize("name", [name for name in plainconv.nn.__all__ if not name.startswith("Lazy")])
def test_layers_do_not_call_it_either(name):
    for mode in ("zeros", "reflect"):
        layer = getattr(plainconv.nn, name)(4, 6, 3, padding=1, padding_mode=mode)
        with NoConvolutionOfTorchs():
            layer(torch.randn(2, 4, *(5,) * int(name[-2]))).sum().backward()
