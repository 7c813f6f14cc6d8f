"""Bad calls: torch's words where torch has words, sentences of our own where it has an internal error or nothing."""

import re
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, randn

import plainconv

SAME = "the same message"  # ours is torch's, letter for letter
AT_LEAST = "ours goes on"  # ours begins with torch's
AT_MOST = "theirs goes on"  # torch's begins with ours


class Bad(NamedTuple):
    """A call to refuse: what to compare our message with, or a sentence of our own; the same exception as torch's.

    theirs_differs: torch raises something else, or nothing.
    """

    arguments: SimpleNamespace
    told: str
    theirs_differs: bool = False


def bad(told: str, *args: object, differs: bool = False, **kwargs: object) -> Bad:
    return Bad(SimpleNamespace(args=args, kwargs=kwargs), told, differs)


def raised(function, call: Bad) -> Exception | None:
    try:
        function(*call.arguments.args, **call.arguments.kwargs)
    except Exception as error:
        return error
    return None


def check(name: str, call: Bad) -> None:
    ours, theirs = raised(getattr(plainconv, name), call), raised(getattr(F, name), call)
    assert ours is not None, "ours accepts this"
    if call.theirs_differs:
        assert type(ours) is not type(theirs) or str(ours) != str(theirs)
    else:
        assert type(ours) is type(theirs)
    if call.told == SAME:
        assert str(ours) == str(theirs)
    elif call.told == AT_LEAST:
        assert str(ours).startswith(str(theirs))
    elif call.told == AT_MOST:
        assert str(theirs).startswith(str(ours))
    else:
        assert re.fullmatch(call.told, str(ours)), str(ours)


x, w, b = randn(1, 4, 5, 5), randn(4, 3, 3, 3), randn(3)
must_be_the_same = r"Input type \(torch\.[\w.]+\) and (weight|bias) type \(torch\.[\w.]+\) should be the same"
int_tuple = r"conv_transpose2d\(\): argument '\w+' must be tuple of ints, not \w+"
must_be_tensor = r"conv(_transpose)?2d\(\): argument '\w+' must be Tensor, not \w+"

TRANSPOSED = {
    "stride 0": bad(SAME, x, w, stride=0),
    "stride -1": bad(SAME, x, w, stride=(1, -1)),
    "stride of three": bad(SAME, x, w, stride=(1, 1, 1)),
    "stride of none": bad(SAME, x, w, stride=()),
    "stride str": bad(SAME, x, w, stride="a"),
    "stride float": bad(SAME, x, w, stride=1.5),
    "stride whole float": bad(SAME, x, w, stride=1.0),
    "stride bool": bad(SAME, x, w, stride=True),
    "stride None": bad(SAME, x, w, stride=None),
    "stride float in a tuple": bad(int_tuple, x, w, stride=(1, 1.5)),
    "padding -1": bad(AT_LEAST, x, w, padding=-1),
    "padding of three": bad(SAME, x, w, padding=(1, 1, 1)),
    "padding float": bad(SAME, x, w, padding=1.5),
    "padding same": bad(AT_LEAST, x, w, padding="same"),
    "padding valid": bad(AT_LEAST, x, w, padding="valid"),
    "padding unknown": bad(AT_LEAST, x, w, padding="full"),
    "output_padding -1": bad(SAME, x, w, output_padding=-1),
    "output_padding of stride 1": bad(SAME, x, w, output_padding=1),
    "output_padding as large as the stride": bad(SAME, x, w, stride=2, output_padding=(0, 2)),
    "output_padding of three": bad(SAME, x, w, output_padding=(0, 0, 0)),
    "dilation 0": bad(AT_MOST, x, w, dilation=0),
    "dilation of three": bad(SAME, x, w, dilation=(1, 2, 3)),
    "groups 0": bad(SAME, x, w, groups=0),
    "groups -1": bad(SAME, x, w, groups=-1),
    "groups that do not divide": bad(SAME, x, w, groups=3),
    "more groups than channels": bad(SAME, x, w, groups=5),
    "groups float": bad(SAME, x, w, groups=1.5),
    "groups str": bad(SAME, x, w, groups="1"),
    "bias too long": bad(SAME, x, w, randn(4)),
    "bias of two dimensions": bad(SAME, x, w, randn(3, 1)),
    "bias of a group": bad(SAME, x, w, randn(3), groups=2),
    "wrong channels": bad(SAME, randn(1, 3, 5, 5), w),
    "no channels": bad(SAME, randn(1, 0, 5, 5), w),
    "input of two dimensions": bad(SAME, randn(5, 5), w),
    "input of five dimensions": bad(SAME, randn(1, 1, 4, 5, 5), w),
    "weight of two dimensions": bad(SAME, x, randn(4, 3)),
    "weight of three dimensions": bad(SAME, x, randn(4, 3, 3)),
    "weight of five dimensions": bad(SAME, x, randn(4, 3, 3, 3, 3)),
    "an empty kernel": bad(r"kernel size should be greater than zero, but got .*", x, randn(4, 3, 0, 3)),
    "an empty picture": bad(SAME, randn(1, 4, 0, 5), w),
    "nothing left": bad(SAME, randn(1, 4, 1, 1), w, padding=3),
    "less than nothing": bad(SAME, randn(1, 4, 1, 1), w, padding=2),
    "weight missing": bad(must_be_tensor, x, None),
    "input missing": bad(must_be_tensor, None, w),
    "bias a number": bad(must_be_tensor, x, w, 5),
    # torch: "expected scalar type Double but found Float", or a result after all.
    "types differ": bad(must_be_the_same, x.double(), w),
    "type of the bias differs": bad(must_be_the_same, x, w, b.double(), differs=True),
    "whole numbers and not": bad(must_be_the_same, x, w.int()),
    "devices differ": bad(must_be_the_same, x, w.to("meta"), differs=True),
    "bool": bad(r"plainconv is not implemented for torch\.bool; it knows float64, .*", x.bool(), w.bool()),
}

w = randn(3, 4, 3, 3)
invalid = r"conv2d\(\): argument '\w+' must be (tuple of ints|int), not \w+"  # torch prints all its signatures

FORWARD = {
    "stride 0": bad(SAME, x, w, stride=0),
    "stride of three": bad(SAME, x, w, stride=(1, 1, 1)),
    "stride of none": bad(SAME, x, w, stride=()),
    "stride str": bad(invalid, x, w, stride="a"),
    "stride float": bad(invalid, x, w, stride=2.0),
    "stride bool": bad(invalid, x, w, stride=True),
    "stride None": bad(invalid, x, w, stride=None),
    "stride float in a tuple": bad(invalid, x, w, stride=(1.0, 1)),
    "stride tensor": bad(invalid, x, w, stride=torch.tensor([1, 1])),
    "padding -1": bad(AT_LEAST, x, w, padding=-1),
    "padding (1, -1)": bad(AT_LEAST, x, w, padding=(1, -1)),
    "padding of three": bad(SAME, x, w, padding=(1, 1, 1)),
    "padding None": bad(invalid, x, w, padding=None),
    "padding unknown": bad(AT_LEAST, x, w, padding="full"),
    "padding same with a stride": bad(SAME, x, w, padding="same", stride=2),
    "padding same with one stride": bad(SAME, x, w, padding="same", stride=(1, 2)),
    "dilation 0": bad(AT_MOST, x, w, dilation=0),
    "dilation -1": bad(SAME, x, w, dilation=(1, -1)),
    "dilation of three": bad(SAME, x, w, dilation=(1, 2, 3)),
    "groups 0": bad(SAME, x, w, groups=0),
    "groups -1": bad(SAME, x, w, groups=-1, padding="same"),
    "groups that do not divide": bad(SAME, x, w, groups=2),
    "more groups than channels": bad(SAME, x, w, groups=5),
    "too many groups for the input": bad(SAME, x, randn(4, 4, 3, 3), groups=2),
    "groups float": bad(invalid, x, w, groups=1.0),
    "bias too long": bad(SAME, x, w, randn(4)),
    "bias of two dimensions": bad(SAME, x, w, randn(3, 1)),
    "wrong channels": bad(SAME, randn(1, 3, 5, 5), w),
    "input of two dimensions": bad(SAME, randn(5, 5), w),
    "input of five dimensions": bad(SAME, randn(1, 1, 4, 5, 5), w),
    "weight of two dimensions": bad(SAME, x, randn(4, 3)),
    "weight of three dimensions": bad(SAME, x, randn(4, 4, 3)),
    "weight of five dimensions": bad(SAME, x, randn(4, 4, 3, 3, 3)),
    "no output channels": bad(SAME, x, randn(0, 4, 3, 3)),
    "an empty kernel": bad(r"kernel size should be greater than zero, but got .*", x, randn(4, 4, 0, 3)),
    "kernel larger than the input": bad(SAME, x, randn(4, 4, 6, 3)),
    "kernel larger, valid": bad(SAME, x, randn(4, 4, 6, 3), padding="valid"),
    "kernel larger than the padded input": bad(SAME, x, randn(4, 4, 6, 7), padding=(0, 1)),
    "dilated kernel larger than the input": bad(SAME, x, w, dilation=3),
    "an empty picture": bad(SAME, randn(1, 4, 0, 5), w),
    "an empty picture, padded too little": bad(SAME, randn(1, 4, 0, 5), w, padding=1),
    "an empty picture, padded": bad(SAME, randn(1, 4, 0, 5), w, padding=2),
    "weight missing": bad(must_be_tensor, x, None),
    "input missing": bad(must_be_tensor, None, w),
    "bias a number": bad(must_be_tensor, x, w, 5),
    "types differ": bad(must_be_the_same, x.double(), w),
    "type of the bias differs": bad(must_be_the_same, x, w, randn(3).double()),
    "whole numbers and not": bad(must_be_the_same, x.int(), w),
    "devices differ": bad(must_be_the_same, x, w.to("meta"), differs=True),
    "bool": bad(r"plainconv is not implemented for torch\.bool; it knows float64, .*", x.bool(), w.bool()),
}

OTHER_DIMENSIONS = {
    "conv1d": [
        bad(SAME, randn(5), randn(4, 3, 3)),
        bad(SAME, randn(1, 3, 5), randn(4, 3, 3), stride=(1, 2)),
        bad(SAME, randn(1, 3, 5), randn(4, 3, 3), dilation=3),
        bad(SAME, randn(1, 3, 5), randn(4, 3, 3), randn(3)),
    ],
    "conv3d": [
        bad(SAME, randn(3, 5, 5), randn(4, 3, 3, 3, 3)),
        bad(SAME, randn(1, 3, 5, 5, 5), randn(4, 3, 3, 3, 3), padding=(1, 2)),
        bad(SAME, randn(1, 3, 5, 5, 5), randn(4, 3, 3, 6, 3)),
        bad(SAME, randn(1, 2, 5, 5, 5), randn(4, 3, 3, 3, 3)),
    ],
    "conv_transpose1d": [
        bad(SAME, randn(5), randn(3, 4, 3)),
        bad(SAME, randn(1, 3, 5), randn(3, 4, 3), output_padding=1),
        bad(SAME, randn(1, 3, 5), randn(3, 4, 3), stride=2, dilation=3, output_padding=3),
        bad(SAME, randn(1, 3, 5), randn(3, 4, 3), stride=(1, 2)),
        bad(SAME, randn(1, 2, 5), randn(3, 4, 3)),
    ],
    "conv_transpose3d": [
        bad(SAME, randn(3, 5, 5), randn(3, 4, 3, 3, 3)),
        bad(SAME, randn(1, 3, 5, 5, 5), randn(3, 4, 3, 3, 3), output_padding=1),
        bad(SAME, randn(1, 3, 5, 5, 5), randn(3, 4, 3, 3, 3), stride=(1, 2)),
        bad(SAME, randn(1, 3, 5, 5, 5), randn(3, 4, 3, 3, 3), randn(3)),
    ],
}


def test_there_are_enough_of_them():
    assert len(TRANSPOSED) >= 20
    assert len(FORWARD) >= 20
    assert sum(call.told == SAME for call in TRANSPOSED.values()) >= 25


@pytest.mark.parametrize("call", TRANSPOSED.values(), ids=TRANSPOSED)
def test_conv_transpose2d(call):
    check("conv_transpose2d", call)


@pytest.mark.parametrize("call", FORWARD.values(), ids=FORWARD)
def test_conv2d(call):
    check("conv2d", call)


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, calls in OTHER_DIMENSIONS.items() for call in calls])
def test_other_dimensions(name, call):
    check(name, call)


def test_what_python_calls_equal_is_kept_apart():
    """1 == 1.0 == True: a call that was remembered must not let the others in."""
    for call in ({"stride": 1}, {"stride": (1, 1)}, {"groups": 1}, {"padding": ((1, 1), (1, 1))}):
        plainconv.conv2d(x, w, **call)
    same = ({"stride": 1.0}, {"stride": True}, {"stride": (1, 1.0)}, {"groups": True}, {"padding": ((1, 1), (True, 1))})
    for call in same:
        with pytest.raises(TypeError, match=r"must be (tuple of ints|int), not"):
            plainconv.conv2d(x, w, **call)


# -- what torch does not have ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_extras(name):
    function, weight = getattr(plainconv, name), randn(4, 4, 3, 3)
    with pytest.raises(
        RuntimeError, match=re.escape("a pair (lo, hi) for each dimension, but got (1, 2, 3) among them")
    ):
        function(x, weight, padding=((1, 2, 3), 0))
    with pytest.raises(TypeError, match=f"{name}.*'padding' must be tuple of ints, not float"):
        function(x, weight, padding=((1, 1.5), 0))
    with pytest.raises(RuntimeError, match=re.escape("a list of 2 values")):
        function(x, weight, padding=((1, 1), 1, "causal"))
    with pytest.raises(ValueError, match="padding_mode must be one of 'zeros', 'reflect', 'replicate', 'circular'"):
        function(x, weight, padding=1, padding_mode="mirror")
    with pytest.raises(ValueError, match="algorithm='quick' does not exist; choose one of auto, ") as refused:
        function(x, weight, algorithm="quick")
    assert all(algorithm in str(refused.value) for algorithm in plainconv.algorithms())
    with pytest.raises(TypeError):
        function(x, weight, None, 1, 0, 0, 1, 1, "zeros")  # keyword-only


def test_strings_of_the_other_family():
    with pytest.raises(RuntimeError, match="Invalid padding string: 'upper', should be one of 'valid', 'same', "):
        plainconv.conv2d(x, w, padding=("upper", 1))
    with pytest.raises(TypeError, match="'same' is not one of 'same_upper', 'same_lower', 'causal'"):
        plainconv.conv_transpose2d(x, randn(4, 4, 3, 3), padding=("same", 1))


def test_borders_that_have_nothing_to_read():
    with pytest.raises(RuntimeError, match="Padding size should be less than the corresponding input dimension"):
        plainconv.conv2d(x, w, padding=5, padding_mode="reflect")
    plainconv.conv2d(x, w, padding=4, padding_mode="reflect")
    with pytest.raises(RuntimeError, match="wrapping around more than once"):
        plainconv.conv2d(x, w, padding=6, padding_mode="circular")
    plainconv.conv2d(x, w, padding=5, padding_mode="circular")
    with pytest.raises(RuntimeError, match="crops more than the input's 5 at dimension 2"):
        plainconv.conv2d(x, w, padding=((-6, 9), 0))
    with pytest.raises(RuntimeError, match="has nothing to read: dimension 3 is empty"):
        plainconv.conv2d(x, w, padding=(0, (-5, 9)), padding_mode="replicate")


STRANGE = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.flatten(1).to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[0]]),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
}
VECTORS = ("sparse_coo", "mkldnn", "quantized")  # the others have more dimensions than a bias


@pytest.mark.filterwarnings("ignore:.*(beta|prototype|deprecat).*")
@pytest.mark.parametrize(("kind", "place"), [*product(STRANGE, ["input", "weight"]), *product(VECTORS, ["bias"])])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_tensors_that_are_not_dense_are_refused_with_a_sentence(name, place, kind):
    given: dict[str, Tensor] = {"input": x, "weight": randn(4, 4, 3, 3), "bias": randn(4)}
    given[place] = STRANGE[kind](given[place])
    sentence = rf"{name}\(\) takes dense tensors, but got a tensor that is .*{kind} as {place}; convert it first: .*"
    with pytest.raises(NotImplementedError, match=sentence):
        getattr(plainconv, name)(**given)


def test_bool_is_refused_by_every_algorithm():
    for algorithm in ("auto", *plainconv.algorithms()):
        with pytest.raises(NotImplementedError, match=r"plainconv is not implemented for torch\.bool; it knows"):
            plainconv.conv2d(x.bool(), w.bool(), algorithm=algorithm)


def test_the_same_errors_are_raised_when_a_gradient_is_asked_for():
    """The way in is another one then."""
    with pytest.raises(NotImplementedError, match="dense"):
        plainconv.conv2d(x.to_sparse().requires_grad_(), w)
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3 channels"):
        plainconv.conv2d(randn(1, 3, 5, 5, requires_grad=True), w)
    with pytest.raises(plainconv.AlgorithmRefused, match="refuses forward"), torch.inference_mode():
        plainconv.conv2d(x.int(), w.int(), algorithm="fft")


def test_explain_raises_what_the_call_would():
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3 channels"):
        plainconv.explain(randn(1, 3, 5, 5), w)
    with pytest.raises(ValueError, match="algorithm='quick' does not exist"):
        plainconv.explain(x, w, algorithm="quick")
    with pytest.raises(TypeError, match="'weight' must be Tensor"):
        plainconv.explain(x, None)
    with pytest.raises(ValueError, match="sideways"):
        plainconv.explain(x, w, direction="sideways")
