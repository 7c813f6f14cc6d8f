"""swap and unswap: what changes, what stays, and what else torch does with a model in between."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import plainconv

LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 11)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (2, 4, 9, 7)),
    "Conv3d": (lambda: nn.Conv3d(4, 2, (1, 3, 2), dilation=2, bias=False), (1, 4, 5, 8, 9)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (2, 4, 11)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 6)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 2, 2, groups=2), (1, 2, 4, 5, 3)),
    "LazyConv2d": (lambda: nn.LazyConv2d(6, 3), (2, 4, 9, 7)),
    "LazyConvTranspose1d": (lambda: nn.LazyConvTranspose1d(6, 3), (2, 4, 9)),
}


class Own(nn.Conv2d):
    """A subclass whose forward is torch's."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)
        self.algorithm = "of the user's"


class Ruled(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input):
        return super().forward(input) * 2


class Small(nn.Module):
    """A bit of everything, with a tied weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(Own(8), nn.ReLU(), Own(8))
        self.body[2].weight = self.body[0].weight
        self.ruled = Ruled(8, 4, 1)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)

    def forward(self, x):
        return self.up(self.ruled(self.body(self.norm(self.first(x)))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def x():
    return torch.randn(2, 3, 10, 12)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def swapped(model):
    return [name for name, module in model.named_modules() if type(module).__name__.startswith("Plain")]


# -- what changes and what stays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_torch_s_does_and_is_torch_s_again_after_unswap(name, monkeypatch):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    assert list(plainconv.swap(layer).changed) == [""]
    result = layer(x)
    assert isinstance(layer, getattr(nn, name.removeprefix("Lazy")))
    plainconv.unswap(layer)
    assert type(layer) is getattr(nn, name.removeprefix("Lazy"))
    close(result, layer(x))


def test_it_is_plainconv_that_computes(model, x, monkeypatch):
    plainconv.swap(model, exclude="ruled")
    model.ruled = nn.Identity()
    model.up = nn.Identity()
    monkeypatch.setattr(torch.nn.functional, "conv2d", None)
    model(x)
    monkeypatch.setattr(plainconv.functional, "_call", None)
    with pytest.raises(TypeError, match="NoneType"):
        model(x)


def test_everything_else_of_a_model_stays(model, x):
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model.first.register_forward_hook(lambda *_: seen.append(1))
    model.body.eval()
    held = {name: id(value) for name, value in model.named_parameters()}
    report = plainconv.swap(model)
    assert report.changed == {
        "first": ("Conv2d", "PlainConv2d"),
        "body.0": ("Own", "PlainOwn"),
        "body.2": ("Own", "PlainOwn"),
        "up": ("ConvTranspose2d", "PlainConvTranspose2d"),
    }
    assert report.kept == {"ruled": "Ruled has a forward of its own"}
    assert str(report).endswith("4 changed, 1 kept")
    assert {name: id(value) for name, value in model.named_parameters()} == held
    assert model.body[0].weight is model.body[2].weight
    assert (model.training, model.body.training) == (True, False)
    assert list(model.state_dict()) == list(before.state_dict())
    assert isinstance(model.body[0], Own)
    assert model.body[0].algorithm == "of the user's"
    before.body.eval()
    result, asked = model(x), before(x)
    close(result, asked)
    assert seen == [1]
    result.square().mean().backward()
    asked.square().mean().backward()
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        close(ours.grad, theirs.grad)
    weight = model.first.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.first.weight, weight)


def test_unswap_restores_the_very_classes(model):
    kinds, attributes = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    plainconv.swap(model)
    report = plainconv.unswap(model)
    assert len(report.changed) == 4
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert plainconv.unswap(model).changed == {}


def test_there_is_one_class_for_each_class():
    a, b = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 1)
    plainconv.swap(a)
    plainconv.swap(b)
    assert type(a) is type(b)
    assert plainconv.swap(a).kept == {"": "it is swapped already"}


@pytest.mark.parametrize(
    ("picks", "expected"),
    [
        ({"include": "body.*"}, ["body.0", "body.2"]),
        ({"include": ["first", nn.ConvTranspose2d]}, ["first", "up"]),
        ({"exclude": Own}, ["first", "up"]),
        ({"include": lambda name, layer: layer.kernel_size == (3, 3), "exclude": ("*.2",)}, ["first", "body.0"]),
    ],
)
def test_include_and_exclude(model, picks, expected):
    report = plainconv.swap(model, **picks)
    assert swapped(model) == list(report.changed) == expected


def test_the_algorithm_is_that_of_each_layer(model, x):
    plainconv.swap(model, "shift")
    with torch.no_grad():
        ours = model.first(x)
        assert torch.equal(
            ours, plainconv.conv2d(x, model.first.weight, model.first.bias, padding=1, algorithm="shift")
        )
    with pytest.raises(ValueError, match="algorithm='fast' does not exist"):
        plainconv.swap(model, "fast")


def test_a_generator_picks_for_all_layers(model):
    assert list(plainconv.swap(model, exclude=(name for name in ("first", "up"))).changed) == ["body.0", "body.2"]


def test_a_class_that_cannot_be_derived_from_is_kept():
    class Tagged(nn.Conv2d):
        def __init_subclass__(cls, *, tag, **how):
            super().__init_subclass__(**how)

    model = nn.Sequential(nn.Conv2d(1, 1, 1), Tagged(1, 1, 1))
    report = plainconv.swap(model)
    assert list(report.changed) == ["0"]
    assert "Tagged cannot be derived from: " in report.kept["1"]
    assert "tag" in report.kept["1"]


def test_a_layer_that_refuses_leaves_no_model_half_changed(x):
    class Alone(nn.Conv2d):
        def __init_subclass__(cls):
            raise ValueError("not mine")

    class Frozen(nn.Conv2d):
        def __setattr__(self, name, value):
            if name in ("_plainconv", "__class__"):
                raise AttributeError("frozen")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Frozen(3, 3, 1), Alone(3, 3, 1))
    asked = model(x)
    report = plainconv.swap(model)
    assert list(report.changed) == ["0", "1"]
    assert report.kept == {"2": "Alone cannot be derived from: not mine"}
    close(model(x), asked)
    plainconv.unswap(model)
    assert [type(layer) for layer in model] == [nn.Conv2d, Frozen, Alone]


def test_a_layer_that_is_made_of_a_swapped_class_computes_too(x):
    layer = nn.Conv2d(3, 4, 3)
    plainconv.swap(layer)
    made = type(layer)(3, 4, 3)
    ours = made(x)
    plainconv.unswap(made)
    close(ours, made(x))


def test_a_layer_of_plainconv_is_left():
    layer = plainconv.nn.Conv2d(1, 1, 1)
    assert plainconv.swap(layer).kept == {"": "it is plainconv's own layer"}
    assert plainconv.unswap(layer).kept == {"": "swap did not change it"}
    assert type(layer) is plainconv.nn.Conv2d


def test_a_forward_that_was_replaced_is_left():
    layer = nn.Conv2d(1, 1, 1)
    layer.forward = lambda x: x
    assert plainconv.swap(layer).kept == {"": "its forward was replaced"}


def test_a_wrong_shape_names_the_layer(model):
    plainconv.swap(model)
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels") as caught:
        model(torch.randn(1, 4, 8, 8))
    assert caught.value.__notes__ == ["in layer 'first', a PlainConv2d"]
    with pytest.raises(ValueError, match="requested an output size of") as caught:
        model.up(torch.randn(1, 4, 8, 8), output_size=[90, 90])
    assert caught.value.__notes__ == ["in layer 'up', a PlainConvTranspose2d"]


# -- parametrised layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrized", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrised_layer_gets_a_class_of_its_own(parametrized, x):
    torch.manual_seed(0)
    layer = parametrized(nn.Conv2d(3, 4, 3)).eval()
    twin, kind = copy.deepcopy(layer), type(layer)
    assert type(twin) is kind
    plainconv.swap(layer)
    assert type(twin) is kind
    assert parametrize.is_parametrized(layer, "weight")
    close(layer(x), twin(x))
    copied = copy.deepcopy(layer)
    assert type(copied) is type(layer)
    close(copied(x), twin(x))
    plainconv.unswap(layer)
    assert type(layer) is kind


def test_parametrisations_may_come_and_go_between(x):
    layer = plainconv.swap(layer := nn.Conv2d(3, 4, 3)) and layer
    parametrizations.weight_norm(layer)
    ours = layer(x)
    plainconv.unswap(layer)
    assert type(layer).__bases__ == (nn.Conv2d,)
    close(ours, layer(x))
    plainconv.swap(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer).__name__ == "PlainConv2d"
    close(ours, layer(x))
    plainconv.unswap(layer)
    assert type(layer) is nn.Conv2d


def test_the_older_weight_norm(x):
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    asked = layer(x)
    plainconv.swap(layer)
    close(layer(x), asked)


# -- what else is done with models -----------------------------------------------------------------------------------


def test_pickle_and_deepcopy(model, x):
    plainconv.swap(model, "shift")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert other.first._plainconv.algorithm == "shift"
        assert other.body[0].weight is other.body[2].weight
        assert torch.equal(other(x), model(x))
        plainconv.unswap(other)
        assert type(other.first) is nn.Conv2d


class Pictures(torch.utils.data.Dataset):
    """Pictures that a worker convolves."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(torch.full((3, 8, 8), float(index)))


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_workers_of_a_dataloader(model, start):
    plainconv.swap(model)
    asked = torch.stack([Pictures(model.first)[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(
        Pictures(model.first), batch_size=2, num_workers=2, multiprocessing_context=start
    )
    close(torch.cat(list(loader)), asked)


def test_torch_compile_in_one_graph(model, x):
    asked = model(x)
    plainconv.swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x), asked)
    compiled(x).sum().backward()
    assert model.first.weight.grad is not None


@pytest.mark.slow
def test_torch_compile_by_inductor(model, x):
    before = copy.deepcopy(model)
    plainconv.swap(model)
    result, asked = torch.compile(model, fullgraph=True)(x), before(x)
    close(result, asked)
    gradients = torch.autograd.grad(result.square().mean(), list(model.parameters()))
    for ours, theirs in zip(
        gradients, torch.autograd.grad(asked.square().mean(), list(before.parameters())), strict=True
    ):
        close(ours, theirs)


def test_a_compiled_model_notices_that_its_layers_were_swapped(model, x):
    graphs = []

    def backend(module, _):
        graphs.append(str(module.graph))
        return module.forward

    compiled = torch.compile(model, backend=backend)
    asked = compiled(x)
    plainconv.swap(model)
    close(compiled(x), asked)
    assert ["plainconv" in graph for graph in graphs] == [False, True]


def test_torch_export(model, x):
    plainconv.swap(model.eval())
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    targets = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert torch.ops.plainconv.forward.default in targets
    more = torch.randn(5, 3, 10, 12)
    close(exported.module()(more), model(more))


def test_autocast_and_the_scaler_of_gradients(model, x):
    plainconv.swap(model)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(x)
    assert result.dtype == torch.bfloat16
    before = model.first.weight.detach().clone()
    scaler.scale(result.float().square().mean()).backward()
    scaler.step(optimizer)
    assert model.first.weight.grad.isfinite().all()
    assert not torch.equal(model.first.weight, before)


def test_channels_last(model, x):
    asked = model(x)
    plainconv.swap(model)
    result = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert result.is_contiguous(memory_format=torch.channels_last)
    close(result, asked)


def test_gradient_checkpointing(model, x):
    plainconv.swap(model.eval())
    x.requires_grad_()
    (asked,) = torch.autograd.grad(model(x).sum(), x)
    (given,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), x)
    assert torch.equal(given, asked)


def test_symbolic_trace_takes_the_layers_as_leaves(model, x):
    plainconv.swap(model)
    traced = torch.fx.symbolic_trace(model)
    assert {"first", "up"} <= {node.target for node in traced.graph.nodes if node.op == "call_module"}
    close(traced(x), model(x))


# -- refusals --------------------------------------------------------------------------------------------------------


both = pytest.mark.parametrize("function", [plainconv.swap, plainconv.unswap])


@both
def test_it_comes_before_the_model_is_wrapped(model, function):
    for wrapped, told in (
        (nn.DataParallel(model), "DataParallel"),
        (torch.compile(model, backend="eager"), "compiled by torch.compile"),
        (nn.Sequential(nn.ReLU(), torch.jit.script(nn.Linear(1, 1))), "'1' is compiled by torch.jit"),
    ):
        with pytest.raises(RuntimeError, match=f"comes before .*{told} already; call it on the plain model"):
            function(wrapped)
    model.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"but the model has had its compile\(\) called"):
        function(model)
    with pytest.raises(TypeError, match=r"argument 'model' must be torch\.nn\.Module, not list"):
        function([model])


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@both
def test_training_in_parallel_comes_after_it(function, model, x, one_process):
    plainconv.swap(model)
    asked = model(x)
    wrapped = nn.parallel.DistributedDataParallel(model)
    close(wrapped(x), asked)
    wrapped(x).sum().backward()
    with pytest.raises(RuntimeError, match="the model is wrapped in DistributedDataParallel already"):
        function(wrapped)


@both
def test_sharding_comes_after_it(function, model, x, one_process):
    plainconv.swap(model.eval())
    asked = model(x)
    fully_shard(model.first, mesh=one_process)
    fully_shard(model, mesh=one_process)
    close(model(x), asked)
    model(x).sum().backward()
    assert isinstance(model.first.weight, DTensor)
    with pytest.raises(RuntimeError, match="the model is sharded by fully_shard already"):
        function(model)
    for part in (model.body, model.up):
        with pytest.raises(RuntimeError, match=r"is sharded \(its parameters are DTensors\) already"):
            function(part)


def test_a_distributed_tensor_is_told_to_unswap(model, x, one_process):
    plainconv.swap(model)
    with pytest.raises(NotImplementedError, match=r"a DTensor as input; leave such layers to torch \(plainconv.unswap"):
        model(distribute_tensor(x, one_process))


def test_torch_jit_is_told_to_unswap(model, x):
    plainconv.swap(model.eval())
    told = r"layer 'first', a PlainConv2d, which plainconv computes; call plainconv.unswap\(model\) first"
    with pytest.raises(RuntimeError, match=f"torch.jit cannot compile {told}"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match=f"torch.jit cannot trace {told}"):
        torch.jit.trace(model, x)
    plainconv.unswap(model)
    close(torch.jit.trace(model, x)(x), model(x))
