"""The layers are torch's own in everything but who computes."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from checks import EVERYWHERE
from torch import Tensor
from torch.nn.utils import parametrizations

import plainconv
from plainconv import nn

CONVS = ("Conv1d", "Conv2d", "Conv3d")
TRANSPOSED = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
LAYERS = CONVS + TRANSPOSED
MODES = ("zeros", "reflect", "replicate", "circular")

every_layer = pytest.mark.parametrize("name", LAYERS)


def theirs(name: str) -> type[torch.nn.Module]:
    return getattr(torch.nn, name)


def ours(name: str) -> type[torch.nn.Module]:
    return getattr(nn, name)


def dims_of(name: str) -> int:
    return int(name[-2])


def both(name: str, *args: object, **kwargs: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our layer and torch's, made with the same arguments under the same seed."""
    made = []
    for family in (ours, theirs):
        torch.manual_seed(0)
        made.append(family(name)(*args, **kwargs))
    return made[0], made[1]


def picture(name: str, channels: int = 4, size: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, channels, *(size,) * dims_of(name), dtype=dtype)


def assert_close(a: Tensor, b: Tensor) -> None:
    """Layers of a few dozen terms in float64."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


# -- what a layer is -------------------------------------------------------------------------------------------------


def test_there_is_one_for_each_of_torchs():
    assert set(nn.__all__) == {*LAYERS, *(f"Lazy{name}" for name in LAYERS)}


@pytest.mark.parametrize("name", nn.__all__)
def test_a_subclass_of_torchs_own(name):
    assert issubclass(ours(name), theirs(name))
    assert ours(name).__name__ == name
    assert ours(name).__module__ == "plainconv.nn"


OPTIONS = (
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2,), "padding": (0,), "bias": False},
    {"dilation": 2, "groups": 2},
    {"padding_mode": "zeros", "dtype": torch.float32},
    {"device": "cpu", "dtype": torch.complex128},
)


@every_layer
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_weights_attributes_repr_and_result_from_the_same_arguments(name, options):
    options = {"dtype": torch.float64} | options
    mine, torchs = both(name, 4, 6, 3, **options)
    assert list(mine.state_dict()) == list(torchs.state_dict())
    for key, value in torchs.state_dict().items():
        assert torch.equal(mine.state_dict()[key], value)
        assert mine.state_dict()[key].dtype == options["dtype"]
    assert repr(mine) == repr(torchs)
    added = {"algorithm", "max_workspace", "allow_builtin", "precision"}
    assert vars(mine).keys() - added == vars(torchs).keys()
    for key in torchs.__constants__:
        assert getattr(mine, key) == getattr(torchs, key)
    assert mine._reversed_padding_repeated_twice == torchs._reversed_padding_repeated_twice
    x = picture(name).to(options["dtype"])
    if options["dtype"] is torch.float32:
        assert torch.allclose(mine(x), torchs(x), rtol=1e-4, atol=1e-4)
    else:
        assert_close(mine(x), torchs(x))
    assert mine(x[0]).shape == torchs(x[0]).shape


@every_layer
def test_every_argument_by_position(name):
    if name in CONVS:
        args = (4, 6, 3, 2, 1, 2, 2, False, "circular", "cpu", torch.float64)
    else:
        args = (4, 6, 3, 2, 1, 1, 2, False, 2, "zeros", "cpu", torch.float64)
    mine, torchs = both(name, *args)
    assert repr(mine) == repr(torchs)
    x = picture(name)
    assert_close(mine(x), torchs(x))


@pytest.mark.parametrize("name", nn.__all__)
def test_every_argument_of_torchs_by_keyword(name):
    given = {
        "in_channels": 4,
        "out_channels": 6,
        "kernel_size": 3,
        "stride": 2,
        "padding": 1,
        "output_padding": 1,
        "dilation": 2,
        "groups": 2,
        "bias": False,
        "padding_mode": "zeros",
        "device": "cpu",
        "dtype": torch.float64,
    }
    options = {key: given[key] for key in inspect.signature(theirs(name)).parameters}  # a new one is a KeyError
    mine, torchs = both(name, **options)
    assert repr(mine) == repr(torchs)
    x = picture(name)
    torch.manual_seed(2)
    result = mine(x)
    torch.manual_seed(2)
    assert_close(result, torchs(x))


@every_layer
@pytest.mark.parametrize("given", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_dtype_and_device(name, given):
    layer = ours(name)(4, 6, 3, device="meta", dtype=given)
    assert layer.weight.is_meta
    assert layer.weight.dtype == layer.bias.dtype == given
    result = layer(torch.empty(2, 4, *(5,) * dims_of(name), device="meta", dtype=given))
    expected = theirs(name)(4, 6, 3, device="meta", dtype=given)(result.new_empty(2, 4, *(5,) * dims_of(name)))
    assert result.is_meta
    assert result.shape == expected.shape
    assert ours(name)(4, 6, 3).to(given).weight.dtype == given


# -- copies of it ----------------------------------------------------------------------------------------------------


@every_layer
def test_state_dict_goes_both_ways(name):
    x = picture(name)
    mine, torchs = ours(name)(4, 6, 3, dtype=torch.float64), theirs(name)(4, 6, 3, dtype=torch.float64)
    mine.load_state_dict(torchs.state_dict())
    assert_close(mine(x), torchs(x))
    mine = ours(name)(4, 6, 3, dtype=torch.float64)
    torchs.load_state_dict(mine.state_dict())
    assert_close(mine(x), torchs(x))


def saved(layer: torch.nn.Module) -> torch.nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved])
def test_copies_are_whole(name, copied):
    mode = "circular"
    layer = ours(name)(4, 6, 3, padding=((2, 1),) * dims_of(name), padding_mode=mode, algorithm="im2col")
    other = copied(layer)
    assert type(other) is type(layer)
    assert repr(other) == repr(layer)
    assert (other.algorithm, other.padding, other.padding_mode) == ("im2col", layer.padding, mode)
    x = picture(name, dtype=torch.float32)
    assert torch.equal(other(x), layer(x))
    assert other.weight.data_ptr() != layer.weight.data_ptr()


@every_layer
def test_weights_only_loading_of_a_state_dict(name, tmp_path):
    layer = ours(name)(4, 6, 3)
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    other = ours(name)(4, 6, 3)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other.weight, layer.weight)


# -- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [2, "same", "valid"])
def test_padding_modes_are_torchs(name, mode, padding):
    mine, torchs = both(name, 4, 6, 3, padding=padding, padding_mode=mode, dtype=torch.float64)
    assert repr(mine) == repr(torchs)
    x = picture(name)
    assert_close(mine(x), torchs(x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["same_upper", "same_lower", "causal", "pairs", "mixed"])
def test_paddings_that_torch_lacks(name, mode, padding):
    dims = dims_of(name)
    padding = {"pairs": ((2, 0), (-1, 2), (1, 1))[:dims], "mixed": ("causal", 1, (0, 2))[:dims]}.get(padding, padding)
    layer = ours(name)(4, 6, 3, padding=padding, padding_mode=mode, dtype=torch.float64)
    family = "conv_transpose" if name in TRANSPOSED else "conv"
    x = picture(name)
    function = getattr(plainconv, f"{family}{dims}d")
    expected = function(x, layer.weight, layer.bias, padding=padding, padding_mode=mode)
    assert torch.equal(layer(x), expected)
    assert layer.padding == padding
    assert f"padding={padding}" in repr(layer)
    assert ("padding_mode" in repr(layer)) == (mode != "zeros")


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_layer_is_the_adjoint_of_the_layer_with_its_weight(name):
    dims = dims_of(name)
    forward = ours(f"Conv{dims}d")(
        4, 6, 3, stride=2, padding=1, bias=False, padding_mode="reflect", dtype=torch.float64
    )
    back = ours(name)(6, 4, 3, stride=2, padding=1, bias=False, padding_mode="reflect", dtype=torch.float64)
    back.load_state_dict(forward.state_dict())
    x = picture(name, size=7).requires_grad_()
    y = forward(x)
    (gradient,) = torch.autograd.grad(y, x, y.detach())
    assert_close(back(y.detach()), gradient)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_output_size(name):
    dims = dims_of(name)
    mine, torchs = both(name, 4, 6, 3, stride=2, padding=1, dtype=torch.float64)
    x = picture(name, size=5)
    for wanted in ([9] * dims, [10] * dims, (10, 9, 10)[:dims], (2, 6, *[10] * dims)):
        assert_close(mine(x, wanted), torchs(x, wanted))
        assert_close(mine(x, output_size=wanted), torchs(x, output_size=wanted))
    assert_close(mine(x[0], [10] * dims), torchs(x[0], [10] * dims))
    for wanted in ([12] * dims, [8] * dims, [10] * (dims + 1)):
        messages = []
        for layer in (mine, torchs):
            with pytest.raises(ValueError, match=r"output_size must have|requested an output size") as error:
                layer(x, wanted)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("name", TRANSPOSED)
def test_output_size_with_pairs(name):
    dims = dims_of(name)
    layer = ours(name)(4, 6, 3, stride=2, padding=((0, 1),) * dims, dtype=torch.float64)
    x = picture(name, size=5)  # (5 - 1)*2 - 1 + 2 + 1 = 10, and 11 with an output_padding of 1
    assert layer(x, [10] * dims).shape[2:] == (10,) * dims
    assert layer(x, [11] * dims).shape[2:] == (11,) * dims
    with pytest.raises(ValueError, match="valid sizes range from"):
        layer(x, [12] * dims)
    named = ours(name)(4, 6, 3, stride=2, padding="causal", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"output_size=.* cannot be chosen with padding='causal'"):
        named(x, [10] * dims)


# -- algorithm -------------------------------------------------------------------------------------------------------


@every_layer
def test_algorithm(name, served):
    assert ours(name)(4, 6, 3).algorithm == "auto"
    assert "algorithm" not in repr(ours(name)(4, 6, 3))
    x = picture(name, size=4, dtype=torch.float32)
    for algorithm in EVERYWHERE:
        layer = ours(name)(4, 6, 3, algorithm=algorithm)
        assert repr(layer).endswith(f", algorithm={algorithm})")
        layer(x)
    assert [plan.algorithm.name for plan, _ in served] == list(EVERYWHERE)
    for family in (name, f"Lazy{name}"):
        with pytest.raises(ValueError, match="algorithm='quick' does not exist; choose one of auto, loops"):
            ours(family)(*(4, 6, 3)[family.startswith("Lazy") :], algorithm="quick")
    with pytest.raises(TypeError):
        ours(name)(4, 6, 3, 1, 0, 1, 1, True, 1, "zeros", None, None, "shift")


# -- lazy ------------------------------------------------------------------------------------------------------------


@every_layer
def test_lazy_layers_become_ours_and_keep_everything(name):
    layer = ours(f"Lazy{name}")(
        6, 3, stride=2, padding=((1, 0),) * dims_of(name), algorithm="shift", dtype=torch.float64
    )
    assert layer.has_uninitialized_params()
    torch.manual_seed(0)
    result = layer(picture(name))
    assert type(layer) is ours(name)
    assert layer.in_channels == 4
    assert (layer.algorithm, layer.padding) == ("shift", ((1, 0),) * dims_of(name))
    assert result.dtype == torch.float64
    assert repr(layer) == repr(
        ours(name)(4, 6, 3, stride=2, padding=((1, 0),) * dims_of(name), algorithm="shift", dtype=torch.float64)
    )


@every_layer
def test_lazy_layers_get_torchs_weights_and_result(name):
    x, found = picture(name), []
    for family in (ours, theirs):
        torch.manual_seed(0)
        layer = family(f"Lazy{name}")(6, 3, dtype=torch.float64)
        found.append((layer(x), layer.weight, layer.bias))
    (mine, weight, bias), (torchs, torchs_weight, torchs_bias) = found
    assert torch.equal(weight, torchs_weight)
    assert torch.equal(bias, torchs_bias)
    assert_close(mine, torchs)


@every_layer
def test_a_lazy_layer_loads_torchs_state_dict(name):
    torchs = theirs(name)(4, 6, 3, dtype=torch.float64)
    layer = ours(f"Lazy{name}")(6, 3, dtype=torch.float64)
    layer.load_state_dict(torchs.state_dict())
    x = picture(name)
    assert_close(layer(x), torchs(x))


# -- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Conv2d", "Conv3d", "ConvTranspose2d", "ConvTranspose3d"])
def test_a_channels_last_model_gives_channels_last(name):
    last = torch.channels_last if dims_of(name) == 2 else torch.channels_last_3d
    layer = ours(name)(4, 6, 3).to(memory_format=last)
    assert layer.weight.is_contiguous(memory_format=last)
    x = picture(name, dtype=torch.float32)
    result = layer(x)
    assert result.is_contiguous(memory_format=last)
    result.sum().backward()
    assert layer.weight.grad.is_contiguous(memory_format=last)
    plain = ours(name)(4, 6, 3)
    plain.load_state_dict(layer.state_dict())
    assert plain(x.to(memory_format=last)).is_contiguous(memory_format=last)


@every_layer
def test_gradients_of_a_training_step_are_torchs(name):
    mine, torchs = both(name, 4, 6, 3, stride=2, padding=1, dtype=torch.float64)
    for layer in (mine, torchs):
        torch.manual_seed(3)
        layer(picture(name)).tanh().square().sum().backward()
    for parameter, other in zip(mine.parameters(), torchs.parameters(), strict=True):
        assert_close(parameter.grad, other.grad)


@every_layer
def test_no_gradient_for_a_frozen_weight(name):
    layer = ours(name)(4, 6, 3, dtype=torch.float64)
    layer.weight.requires_grad_(False)
    layer(picture(name)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_hooks_parametrisations_and_functional_call():
    """What others hang onto a torch layer works on ours."""
    mine, torchs = both("Conv2d", 4, 6, 3, dtype=torch.float64)
    x, seen = picture("Conv2d"), []
    mine.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    mine(x)
    assert seen == [(2, 6, 4, 4)]
    doubled = {name: 2 * value for name, value in mine.named_parameters()}
    assert_close(torch.func.functional_call(mine, doubled, x), 2 * mine(x))
    for layer in (mine, torchs):
        parametrizations.weight_norm(layer)
    assert_close(mine(x), torchs(x))


def test_in_a_sequence_with_torchs_layers():
    def model(family) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            family.Conv2d(4, 8, 3, padding="same"),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            family.ConvTranspose2d(8, 2, 2, stride=2),
            torch.nn.BatchNorm2d(2),
        ).double()

    mine, torchs = model(nn), model(torch.nn)
    assert repr(mine) == repr(torchs)
    x = picture("Conv2d")
    assert_close(mine(x), torchs(x))


# -- errors ----------------------------------------------------------------------------------------------------------

WRONG = {
    "groups do not divide in_channels": ({"groups": 3}, True),
    "groups do not divide out_channels": ({"groups": 4}, True),
    "groups 0": ({"groups": 0}, True),
    "unknown padding_mode": ({"padding_mode": "mirror"}, False),
}


@every_layer
@pytest.mark.parametrize(("options", "same"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_torchs_value_errors(name, options, same):
    messages = []
    for family in (ours, theirs):
        with pytest.raises(ValueError, match=r"groups|padding.mode") as error:
            family(name)(4, 6, 3, **options)
        messages.append(str(error.value))
    if same or name in CONVS:
        # torch writes a set, whose order changes from run to run
        assert sorted(re.findall(r"[\w']+", messages[0])) == sorted(re.findall(r"[\w']+", messages[1]))
    else:
        assert messages[0].startswith("padding_mode must be one of {")
        assert messages[0].endswith("}, but got padding_mode='mirror'")


@pytest.mark.parametrize("name", CONVS)
def test_wrong_padding_strings(name):
    with pytest.raises(ValueError, match=r"Invalid padding string 'full', should be one of {.*'same_upper'.*}"):
        ours(name)(4, 6, 3, padding="full")
    with pytest.raises(ValueError, match="Invalid padding string 'full', should be one of"):
        theirs(name)(4, 6, 3, padding="full")
    for family in (ours, theirs):
        with pytest.raises(ValueError, match="padding='same' is not supported for strided convolutions"):
            family(name)(4, 6, 3, padding="same", stride=2)


@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("padding", ["same", "valid", "full"])
def test_padding_strings_that_transposed_layers_lack(name, padding):
    with pytest.raises(TypeError, match=f"must be tuple of ints, not str.*'{padding}' is not one of 'same_upper'"):
        ours(name)(4, 6, 3, padding=padding)


@every_layer
def test_missing_and_unknown_arguments(name):
    for family in (ours, theirs):
        with pytest.raises(TypeError, match="kernel_size"):
            family(name)(4, 6)
        with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
            family(name)(4, 6, 3, size=1)


@every_layer
def test_a_wrong_input_is_refused_in_torchs_words(name):
    mine, torchs = both(name, 4, 6, 3)
    for shape in ((2, 3, *(6,) * dims_of(name)), (6,) * dims_of(name)):
        messages = []
        for layer in (mine, torchs):
            with pytest.raises(RuntimeError, match="xpected") as error:
                layer(torch.randn(shape))
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_padding_mode_and_pairs_reach_the_function():
    """Against torch's pad, so that this file does not lean on plainconv's functions alone."""
    layer = nn.Conv2d(4, 6, 3, padding=((2, 0), (1, 3)), padding_mode="reflect", dtype=torch.float64)
    x = picture("Conv2d")
    padded = F.pad(x, (1, 3, 2, 0), mode="reflect")
    assert_close(layer(x), F.conv2d(padded, layer.weight, layer.bias))


@every_layer
def test_torch_jit_is_told_what_to_give_it_instead(name):
    mine, torchs = both(name, 4, 4, 3, dtype=torch.float64)
    x = picture(name)
    told = rf"plainconv\.nn\.{name}; give it torch\.nn\.{name} of the same arguments, with this layer's state_dict"
    for layer in (mine, torch.nn.Sequential(mine)):
        with pytest.raises(RuntimeError, match=f"torch.jit cannot compile {told}"):
            torch.jit.script(layer)
        with pytest.raises(RuntimeError, match=f"torch.jit cannot trace {told}"):
            torch.jit.trace(layer, x)
    assert_close(torch.jit.trace(mine.requires_grad_(False), x)(x), mine(x))  # no gradients: a function like any other
    torchs.load_state_dict(mine.state_dict())
    assert_close(torch.jit.trace(torchs, x)(x), mine(x))
