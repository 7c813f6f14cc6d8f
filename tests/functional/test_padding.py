"""Paddings that torch lacks, against torch.nn.functional.pad and torch's convolution; transposed ones as adjoints.

Whole numbers in float64: whatever the order of the sums, results are equal.
"""

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from checks import EVERYWHERE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import plainconv

MODES = ("zeros", "reflect", "replicate", "circular")
DIMS = (1, 2, 3)
EXACT = tuple(name for name in EVERYWHERE if name != "fft")

every_dims = pytest.mark.parametrize("dims", DIMS)
every_mode = pytest.mark.parametrize("mode", MODES)


def whole(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).double()


def conv(dims: int):
    """An exact algorithm: "auto" may take fft."""
    return partial(getattr(plainconv, f"conv{dims}d"), algorithm="shift")


def conv_transpose(dims: int):
    return partial(getattr(plainconv, f"conv_transpose{dims}d"), algorithm="shift")


def torch_conv(dims: int):
    return getattr(F, f"conv{dims}d")


def padded(x: Tensor, pairs: tuple[tuple[int, int], ...], mode: str) -> Tensor:
    """torch's pad; negative sides are cropped first, so that a mode sees the cropped tensor only."""
    flat = [side for pair in reversed(pairs) for side in pair]
    x = F.pad(x, [min(side, 0) for side in flat])
    return F.pad(x, [max(side, 0) for side in flat], mode="constant" if mode == "zeros" else mode)


def same_pairs(size: int, kernel: int, stride: int, dilation: int, *, upper: bool) -> tuple[int, int]:
    """ONNX's rule, written down once more."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return (total // 2, total - total // 2) if upper else (total - total // 2, total // 2)


# -- convolution -----------------------------------------------------------------------------------------------------

PAIRS = ((0, 0), (1, 2), (3, 0), (0, 2), (-1, 0), (0, -2), (-2, 3), (2, -1), (-1, -1))


@every_dims
@every_mode
def test_pairs(dims, mode):
    """Every pair along the first dimension, another one along the others."""
    x, w = whole(2, 2, *(7, 6, 5)[:dims]), whole(3, 2, *(3, 2, 2)[:dims])
    for i, first in enumerate(PAIRS):
        pairs = (first, PAIRS[(i + 4) % len(PAIRS)], (1, 0))[:dims]
        for stride, dilation in ((1, 1), (2, 1), (1, 2)):
            extents = [(k - 1) * dilation + 1 for k in w.shape[2:]]
            if any(s + sum(pair) < e for s, pair, e in zip(x.shape[2:], pairs, extents, strict=True)):
                continue
            ours = conv(dims)(x, w, None, stride, pairs, dilation, padding_mode=mode)
            assert torch.equal(ours, torch_conv(dims)(padded(x, pairs, mode), w, None, stride, 0, dilation)), pairs


@every_mode
@pytest.mark.parametrize("algorithm", EXACT)
def test_pairs_by_every_algorithm(mode, algorithm):
    x, w, bias = whole(2, 4, 6, 7), whole(4, 2, 3, 2), whole(4)
    for pairs in (((1, 2), (3, 0)), ((-1, 2), (2, -2)), ((4, 4), (0, 5))):
        ours = conv(2)(x, w, bias, (2, 1), pairs, 1, 2, padding_mode=mode, algorithm=algorithm)
        assert torch.equal(ours, F.conv2d(padded(x, pairs, mode), w, bias, (2, 1), 0, 1, 2))


@every_dims
@every_mode
def test_gradients_through_a_border(dims, mode):
    x, w = whole(2, 2, *(6, 5, 4)[:dims]).requires_grad_(), whole(3, 2, *(3, 2, 2)[:dims]).requires_grad_()
    pairs = ((2, 1), (-1, 3), (1, 1))[:dims]
    found = []
    for result in (
        conv(dims)(x, w, stride=2, padding=pairs, padding_mode=mode),
        torch_conv(dims)(padded(x, pairs, mode), w, stride=2),
    ):
        found.append(torch.autograd.grad(result, (x, w), whole(*result.shape, seed=1)))
    assert all(map(torch.equal, *found))


@every_dims
def test_one_padding_mode_for_a_plain_padding(dims):
    """As torch.nn's layers do it."""
    x, w = whole(2, 2, *(6, 5, 4)[:dims]), whole(3, 2, *(3,) * dims)
    for mode in MODES:
        theirs = getattr(torch.nn, f"Conv{dims}d")(
            2, 3, 3, padding=2, bias=False, padding_mode=mode, dtype=torch.float64
        )
        theirs.weight.data = w
        assert torch.equal(conv(dims)(x, w, padding=2, padding_mode=mode), theirs(x))
        assert torch.equal(conv(dims)(x, w, padding=(2,), padding_mode=mode), theirs(x))


@every_dims
@every_mode
def test_same_and_valid_are_torchs(dims, mode):
    x = whole(2, 2, *(7, 6, 5)[:dims])
    for kernel, dilation in ((3, 1), (2, 1), (3, 2), (2, 2), (1, 1)):
        w = whole(3, 2, *(kernel,) * dims)
        assert torch.equal(
            conv(dims)(x, w, padding="valid", dilation=dilation, padding_mode=mode),
            torch_conv(dims)(x, w, padding="valid", dilation=dilation),
        )
        layer = getattr(torch.nn, f"Conv{dims}d")(
            2, 3, kernel, padding="same", dilation=dilation, bias=False, padding_mode=mode, dtype=torch.float64
        )
        layer.weight.data = w
        ours = conv(dims)(x, w, padding="same", dilation=dilation, padding_mode=mode)
        assert torch.equal(ours, layer(x))
        if mode == "zeros":
            assert torch.equal(ours, torch_conv(dims)(x, w, padding="same", dilation=dilation))


@every_dims
@pytest.mark.parametrize("upper", [True, False])
def test_same_upper_and_same_lower(dims, upper):
    name = "same_upper" if upper else "same_lower"
    for size, kernel, stride, dilation in product((5, 6, 7), (1, 2, 3, 4), (1, 2, 3), (1, 2)):
        x, w = whole(1, 2, *(size,) * dims), whole(2, 2, *(kernel,) * dims)
        pair = same_pairs(size, kernel, stride, dilation, upper=upper)
        ours = conv(dims)(x, w, stride=stride, dilation=dilation, padding=name)
        assert ours.shape[2:] == (-(-size // stride),) * dims
        assert torch.equal(ours, torch_conv(dims)(padded(x, (pair,) * dims, "zeros"), w, None, stride, 0, dilation))
        if dims == 3 and size == 5:
            break  # the dimensions do not know of each other


@every_dims
def test_same_upper_is_torchs_same_without_a_stride(dims):
    x, w = whole(1, 2, *(6,) * dims), whole(2, 2, *(4,) * dims)
    assert torch.equal(conv(dims)(x, w, padding="same_upper"), torch_conv(dims)(x, w, padding="same"))


@every_dims
def test_causal(dims):
    """No output sees what lies behind it."""
    x, w = whole(1, 2, *(6,) * dims), whole(2, 2, *(3,) * dims)
    for stride, dilation in ((1, 1), (2, 1), (1, 2), (3, 2)):
        ours = conv(dims)(x, w, stride=stride, dilation=dilation, padding="causal")
        pairs = ((2 * dilation, 0),) * dims
        assert torch.equal(ours, torch_conv(dims)(padded(x, pairs, "zeros"), w, None, stride, 0, dilation))
        assert ours.shape[2:] == (-(-6 // stride),) * dims
    later = x.clone()
    later[..., 3:] += 1
    ours, changed = (conv(dims)(each, w, padding="causal") for each in (x, later))
    assert torch.equal(ours[..., :3], changed[..., :3])
    assert not torch.equal(ours[..., 3:], changed[..., 3:])


def test_a_tuple_may_mix():
    x, w = whole(1, 2, 6, 7, 8), whole(2, 2, 3, 3, 2)
    pairs = ((4, 0), (1, 1), (2, 0))
    mixed = conv(3)(x, w, dilation=(2, 1, 1), padding=("causal", 1, (2, 0)))
    assert torch.equal(mixed, F.conv3d(padded(x, pairs, "zeros"), w, dilation=(2, 1, 1)))
    listed = conv(3)(x, w, dilation=(2, 1, 1), padding=["causal", 1, [2, 0]])
    assert torch.equal(mixed, listed)
    pairs = ((1, 1), (0, 0), (0, 1))
    mixed = conv(3)(x, w, padding=("same", "valid", "same_upper"))
    assert torch.equal(mixed, F.conv3d(padded(x, pairs, "zeros"), w))
    with pytest.raises(RuntimeError, match="'same' is not supported for strided"):
        conv(3)(x, w, stride=(2, 1, 1), padding=("same", 0, 0))
    conv(3)(x, w, stride=(1, 2, 1), padding=("same", 0, 0))


def test_one_pair_for_one_dimension():
    """A tuple of two numbers is two dimensions; a pair for conv1d stands in a tuple."""
    x, w = whole(1, 2, 6), whole(2, 2, 3)
    assert torch.equal(conv(1)(x, w, padding=((2, 0),)), F.conv1d(F.pad(x, (2, 0)), w))
    with pytest.raises(RuntimeError, match="a list of 1 values"):
        conv(1)(x, w, padding=(2, 0))
    x, w = whole(1, 2, 6, 6), whole(2, 2, 3, 3)
    assert torch.equal(conv(2)(x, w, padding=((2, 0),)), F.conv2d(F.pad(x, (2, 0, 2, 0)), w))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 9),
    pair=st.tuples(st.integers(-4, 8), st.integers(-4, 8)),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    mode=st.sampled_from(MODES),
)
def test_any_pair_in_any_mode(size, pair, kernel, stride, dilation, mode):
    """What torch's pad takes, ours takes, and what it refuses ours refuses."""
    x, w = whole(1, 1, size), whole(1, 1, kernel, seed=1)
    try:
        theirs = F.conv1d(padded(x, (pair,), mode), w, stride=stride, dilation=dilation)
    except (RuntimeError, IndexError):
        with pytest.raises(RuntimeError):
            conv(1)(x, w, stride=stride, dilation=dilation, padding=(pair,), padding_mode=mode)
        return
    ours = conv(1)(x, w, stride=stride, dilation=dilation, padding=(pair,), padding_mode=mode)
    assert torch.equal(ours, theirs)


# -- transposed ------------------------------------------------------------------------------------------------------


def assert_adjoint(
    dims: int, size: tuple[int, ...], kernel: tuple[int, ...], algorithm: str = "auto", **options
) -> None:
    """<conv(x, w), y> == <x, conv_transpose(y, w)> for an x of the size that conv_transpose gives y."""
    groups = options.get("groups", 1)
    w = whole(4, 6 // groups, *kernel, seed=2)
    shape = conv(dims)(whole(2, 6, *size), w, **options).shape
    y = whole(*shape, seed=3)
    reach = [  # what conv_transpose would give without output_padding, for one dimension after the other
        s - r for s, r in zip(size, conv_transpose(dims)(y, w, **options).shape[2:], strict=True)
    ]
    back = conv_transpose(dims)(y, w, **options, output_padding=tuple(reach), algorithm=algorithm)
    x = whole(*back.shape, seed=4)
    assert x.shape[2:] == size
    forward = conv(dims)(x, w, **options, algorithm=algorithm)
    assert float((forward * y).sum()) == float((x * back).sum())


@every_dims
@every_mode
def test_transposed_is_the_adjoint(dims, mode):
    size = (7, 6, 5)[:dims]
    kernel = (3, 2, 3)[:dims]
    for padding, stride, dilation, groups in (
        (1, 1, 1, 1),
        (((2, 0), (0, 3), (1, 2))[:dims], 1, 1, 2),
        (((2, 1), (1, 1), (0, 2))[:dims], 2, 1, 1),
        (((-1, 2), (3, -1), (-1, -1))[:dims], 1, 1, 2),
        (2, 3, 2, 1),
    ):
        how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
        assert_adjoint(dims, size, kernel, "shift", **how)  # exact: "auto" may take winograd


@every_mode
@pytest.mark.parametrize("algorithm", EXACT)
def test_transposed_is_the_adjoint_by_every_algorithm(mode, algorithm):
    options = {"stride": (2, 1), "padding": ((2, 1), (-1, 3)), "groups": 2, "padding_mode": mode}
    assert_adjoint(2, (6, 5), (3, 2), algorithm, **options)


@every_mode
def test_what_falls_into_the_border_is_added_where_the_mode_would_have_read(mode):
    """By hand: a single place of y, and a kernel of ones; the four modes send it to different places of the row."""
    y = torch.tensor([[[1.0, 0, 0, 0]]])  # its window covers the places -2, -1, 0 of a row of 4
    ours = conv_transpose(1)(y, torch.tensor([[[100.0, 10.0, 1.0]]]), padding=((2, 0),), padding_mode=mode)
    expected = {
        "zeros": [1, 0, 0, 0],
        "reflect": [1, 10, 100, 0],
        "replicate": [111, 0, 0, 0],
        "circular": [1, 0, 100, 10],
    }
    assert ours.tolist() == [[[float(value) for value in expected[mode]]]]


@every_dims
def test_plain_paddings_are_torchs(dims):
    """conv_transpose with pairs is torch's without padding, cropped."""
    y, w = whole(2, 4, *(4, 3, 3)[:dims]), whole(4, 3, *(3, 4, 2)[:dims])
    for stride, dilation in ((1, 1), (2, 1), (2, 2), (3, 2)):
        uncropped = getattr(F, f"conv_transpose{dims}d")(y, w, stride=stride, dilation=dilation)
        for pairs in (((1, 0),) * 3, ((0, 2), (1, 1), (0, 0)), ((-1, 0), (0, -2), (-1, 1))):
            pairs = pairs[:dims]
            ours = conv_transpose(dims)(y, w, stride=stride, padding=pairs, dilation=dilation)
            flat = [-side for pair in reversed(pairs) for side in pair]
            assert torch.equal(ours, F.pad(uncropped, flat)), (pairs, stride)


@every_dims
@every_mode
@pytest.mark.parametrize("padding", ["same_upper", "same_lower", "causal"])
def test_transposed_named_paddings_give_the_size_times_the_stride(dims, mode, padding):
    size = (5, 4, 6)[:dims]
    for kernel, stride, dilation in product((1, 2, 3, 4), (1, 2, 3), (1, 2)):
        if mode in ("reflect", "circular") and (kernel - 1) * dilation >= min(size) * stride:
            continue  # a border larger than the result
        y, w = whole(1, 2, *size), whole(2, 3, *(kernel,) * dims)
        ours = conv_transpose(dims)(y, w, stride=stride, dilation=dilation, padding=padding, padding_mode=mode)
        assert ours.shape == (1, 3, *(s * stride for s in size))
        if mode == "zeros":
            plain = getattr(F, f"conv_transpose{dims}d")(y, w, stride=stride, dilation=dilation)
            assert torch.equal(
                ours, F.pad(plain, [-side for pair in reversed(crops(plain, ours, padding)) for side in pair])
            )


def crops(plain: Tensor, ours: Tensor, padding: str) -> list[tuple[int, int]]:
    """ONNX's rule for what is too much: an odd one behind for same_upper, before for same_lower, all for causal."""
    pairs = []
    for long, short in zip(plain.shape[2:], ours.shape[2:], strict=True):
        total = max(long - short, 0)
        lo = {"same_upper": total // 2, "same_lower": total - total // 2, "causal": 0}[padding]
        pairs.append((lo, long - short - lo))
    return pairs


def test_same_upper_there_and_back():
    """With a stride that divides the size, the transposed is the adjoint of the same name; and causal too."""
    for padding, mode in product(("same_upper", "same_lower"), MODES):
        w = whole(4, 3, 3, 3)
        x, y = whole(2, 3, 8, 6), whole(2, 4, 4, 3, seed=1)
        forward = conv(2)(x, w, stride=2, padding=padding, padding_mode=mode)
        back = conv_transpose(2)(y, w, stride=2, padding=padding, padding_mode=mode)
        assert float((forward * y).sum()) == float((x * back).sum())


def test_causal_transposed_sees_no_later_input():
    w = whole(2, 2, 5)
    y = whole(1, 2, 6)
    later = y.clone()
    later[..., 3:] += 1
    ours, changed = (conv_transpose(1)(each, w, stride=2, padding="causal") for each in (y, later))
    assert ours.shape == (1, 2, 12)
    assert torch.equal(ours[..., :6], changed[..., :6])
    assert not torch.equal(ours[..., 6:], changed[..., 6:])


def test_mixed_paddings_transposed():
    y, w = whole(1, 2, 4, 4, 4), whole(2, 3, 4, 3, 2)
    mixed = conv_transpose(3)(y, w, stride=2, padding=("causal", 1, (2, 0)))
    plain = F.conv_transpose3d(y, w, stride=2)  # 10 x 9 x 8
    assert torch.equal(mixed, plain[:, :, :8, 1:8, 2:])


@every_dims
def test_output_padding(dims):
    y, w, bias = whole(2, 2, *(4, 3, 3)[:dims]), whole(2, 3, *(3, 2, 3)[:dims]), whole(3)
    for extra in product((0, 1, 2), repeat=dims):
        ours = conv_transpose(dims)(y, w, bias, 3, 1, extra)
        assert torch.equal(ours, getattr(F, f"conv_transpose{dims}d")(y, w, bias, 3, 1, extra))
        # It is no padding: the mirrored convolution drops these places, and a pair says the same.
        pairs = tuple((1, 1 - e) for e in extra)
        assert torch.equal(ours, conv_transpose(dims)(y, w, bias, 3, pairs))


@every_mode
def test_output_padding_with_a_border(mode):
    """The adjoint of a convolution whose last places no window reaches: they lie within the border or the input."""
    y, w = whole(1, 2, 3, 3), whole(2, 2, 3, 3)
    for extra in (0, 1):
        back = conv_transpose(2)(y, w, stride=2, padding=1, output_padding=extra, padding_mode=mode)
        x = whole(*back.shape, seed=5)
        assert x.shape[2:] == (5 + extra, 5 + extra)
        forward = F.conv2d(padded(x, ((1, 1), (1, 1)), mode), w, stride=2)
        assert float((forward * y).sum()) == float((x * back).sum())


def test_algorithms_agree_on_a_transposed_border_within_fft_error():
    y, w = torch.randn(2, 4, 5, 5), torch.randn(4, 3, 3, 3)
    for mode in MODES:
        options = {"stride": 2, "padding": ((2, 1), (0, 2)), "padding_mode": mode}
        exact = conv_transpose(2)(y.double(), w.double(), **options, algorithm="reference")
        for algorithm in EVERYWHERE:
            ours = conv_transpose(2)(y, w, **options, algorithm=algorithm)
            assert torch.allclose(ours.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
