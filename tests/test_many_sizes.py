"""New sizes: kernels are compiled for the first of them, few for small ones, and memory is bounded."""

import ctypes
import gc
from pathlib import Path

import pytest
import torch
from checks import channels_last

import plainconv
from plainconv import memory, remember
from plainconv.cpu import compile as compiler

pytestmark = pytest.mark.skipif(compiler.why_not() is not None, reason=str(compiler.why_not()))

# Pictures of fewer rows have kernels of their own, at most one for each number of rows.
SIZES = [(32 + i * 7 % 60, 40 + i * 13 % 230) for i in range(1000)]
MOST_GROWTH = 64 << 20


def resident():
    """Bytes of this process that are in memory, but for what waits to be lent again, which has a bound of its own."""
    gc.collect()
    assert sum(size * len(alike) for size, alike in memory._waiting.items()) <= memory.MOST_KEPT
    memory._waiting.clear()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # what the C library keeps is not ours
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture
def made(monkeypatch):
    """The keys of kernels that were compiled, in order; none is kept from other tests."""
    keys, real = [], compiler._emit

    def emit(text, target, **how):
        keys.append(compiler._key(text, target))
        return real(text, target, **how)

    monkeypatch.setattr(compiler, "_emit", emit)
    remember.forget()
    with compiler.kept_in(None):
        yield keys
    remember.forget()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of the process from /proc")
@pytest.mark.parametrize(
    ("algorithm", "channels", "taps", "groups", "last", "back"),
    [
        ("narrow", 3, 3, 1, False, False),
        ("depthwise", 4, 3, 4, False, False),
        ("depthwise", 20, 3, 20, True, False),
        pytest.param("direct", 6, 3, 1, False, False, marks=pytest.mark.slow),
        pytest.param("direct", 6, 3, 1, True, False, marks=pytest.mark.slow),
        pytest.param("pointwise", 6, 1, 1, False, False, marks=pytest.mark.slow),
        pytest.param("pointwise", 6, 1, 1, True, False, marks=pytest.mark.slow),
        pytest.param("depthwise", 4, 3, 4, False, True, marks=pytest.mark.slow),
        pytest.param("depthwise", 20, 3, 20, True, True, marks=pytest.mark.slow),
        pytest.param("winograd", 16, 3, 1, False, False, marks=pytest.mark.slow),
        pytest.param("winograd", 16, 3, 1, True, False, marks=pytest.mark.slow),
        pytest.param("fft", 8, 7, 1, False, False, marks=pytest.mark.slow),
        pytest.param("auto", 6, 3, 1, False, True, marks=pytest.mark.slow),
    ],
)
def test_a_thousand_sizes(algorithm, channels, taps, groups, last, back, made):
    weight = torch.randn(channels, channels // groups, taps, taps, requires_grad=back)
    if algorithm == "winograd":  # its rounding is that of larger numbers: results near 1
        weight /= taps * channels**0.5
    compiled, before = [], 0
    assert len(set(SIZES)) == len(SIZES)
    for number, (high, wide) in enumerate(SIZES):
        x = torch.randn(1 + number % 3, channels, high, wide)
        x = (channels_last(x) if last else x).requires_grad_(back)
        found = plainconv.conv2d(x, weight, groups=groups, algorithm=algorithm)
        if back:
            found.backward(torch.ones_like(found))
        if number % 100 == 0:
            expected = torch.nn.functional.conv2d(x, weight, groups=groups)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            compiled.append(len(made))
        if number == 300:
            before = resident()
    assert len(made) == len(set(made)), "a kernel was compiled twice"
    assert 1 <= len(made) <= 16
    settled = 4 if algorithm in ("winograd", "fft") else 2  # tiles of some sizes come late
    assert compiled[settled] == compiled[-1], f"new sizes went on compiling: {compiled}"
    assert resident() - before < MOST_GROWTH
    assert sum(remember._sizes.values()) <= remember.MOST_BYTES


# Depths of all kinds; rows and columns as above.
VOLUMES = [(2 + i % 7, 17 + i * 7 % 29, 33 + i * 13 % 67) for i in range(1000)]


@pytest.mark.parametrize(
    ("algorithm", "weight", "groups", "last"),
    [
        ("depthwise", (4, 1, 3, 3, 3), 4, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("depthwise", (20, 1, 3, 3, 3), 20, True),
                ("direct", (6, 6, 3, 3, 3), 1, False),
                ("direct", (6, 6, 3, 3, 3), 1, True),
                ("narrow", (6, 3, 3, 3, 3), 1, False),
            )
        ),
    ],
)
def test_a_thousand_volumes(algorithm, weight, groups, last, made):
    """New sizes compile nothing but tiles of their own for small maps, which are few."""
    w, compiled = torch.randn(weight), []
    assert len(set(VOLUMES)) == len(VOLUMES)
    for number, size in enumerate(VOLUMES):
        x = torch.randn(1, weight[1] * groups, *size)
        x = channels_last(x) if last else x
        found = plainconv.conv3d(x, w, padding=1, groups=groups, algorithm=algorithm)
        if number % 200 == 0:
            expected = torch.nn.functional.conv3d(x, w, padding=1, groups=groups)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            compiled.append(len(made))
    assert len(made) == len(set(made)), "a kernel was compiled twice"
    assert 1 <= len(made) <= 16
    assert compiled[1] == len(made), f"new sizes went on compiling: {compiled}, {len(made)}"


# Larger than what has kernels of its own: see the last test. Rows of more than 16 vectors, of any width, ask ahead.
PICTURES = [(101 + i * 7 % 60, 103 + i * 13 % 150) for i in range(12)]
WIDE = [(high, 160 + wide) for high, wide in PICTURES]
LINES = [(6100 + i * 397 % 6000,) for i in range(12)]
GRADIENTS = "weight", "input"


def layer(name, x, weight, sizes, last=False, gradients=GRADIENTS, more=0, slow=False, **how):
    """A case: a function of plainconv's by its name, channels of its input, and the sizes that it meets.

    more: kernels that are made later; winograd adds up its weight's gradient in another way where one chunk is enough.
    """
    told = f"{how['algorithm']} {name} {'x'.join(map(str, weight))}{' channels_last' * last}"
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(name, x, weight, sizes, last, gradients, more, how, id=told, marks=marks)


@pytest.mark.parametrize(
    ("name", "channels", "weight", "sizes", "last", "gradients", "more", "how"),
    [
        layer("conv2d", 16, (16, 16, 3, 3), PICTURES, algorithm="auto", padding=1, more=1),
        layer("conv2d", 16, (16, 16, 3, 3), PICTURES, algorithm="auto", padding=1, last=True, more=1, slow=True),
        layer("conv2d", 16, (16, 16, 3, 3), PICTURES, algorithm="winograd", stride=2, gradients=("input",), slow=True),
        layer("conv2d", 8, (8, 1, 3, 3), WIDE, algorithm="auto", groups=8),
        layer("conv2d", 20, (20, 1, 3, 3), PICTURES, algorithm="auto", groups=20, last=True, slow=True),
        layer("conv2d", 3, (6, 3, 3, 3), WIDE, algorithm="narrow", slow=True),
        layer("conv2d", 24, (24, 24, 3, 3), PICTURES, algorithm="direct", last=True, slow=True),
        layer("conv2d", 16, (16, 16, 7, 7), PICTURES, algorithm="fft", gradients=("input",), slow=True),
        layer("conv2d", 3, (3, 1, 5, 5), WIDE, algorithm="separable", groups=3, gradients=("input",)),
        layer("conv1d", 16, (16, 16, 3), LINES, algorithm="direct", padding=1),
        layer("conv1d", 16, (16, 16, 3), LINES, algorithm="direct", stride=2, slow=True),
        layer("conv1d", 16, (16, 16, 3), LINES, algorithm="winograd", slow=True),
        layer("conv1d", 16, (16, 1, 3), LINES, algorithm="depthwise", groups=16),
        layer("conv1d", 3, (6, 3, 3), LINES, algorithm="narrow", slow=True),
        layer("conv1d", 16, (16, 16, 7), LINES, algorithm="fft", gradients=("input",)),
        layer("conv_transpose1d", 16, (16, 16, 16), LINES, algorithm="auto", stride=8, padding=4),
        layer("conv_transpose1d", 16, (16, 16, 4), LINES, algorithm="auto", stride=2, padding=1),
        layer("conv_transpose1d", 16, (16, 16, 3), LINES, algorithm="direct", padding=1, slow=True),
    ],
)
def test_a_new_size_compiles_nothing(name, channels, weight, sizes, last, gradients, more, how, made):
    w = torch.ones(weight) if how["algorithm"] == "separable" else torch.randn(weight)
    known = {key: value for key, value in how.items() if key != "algorithm"}
    first = 0
    for number, size in enumerate(sizes):
        x = torch.randn(1 + number % 2, channels, *size)
        x = channels_last(x) if last else x
        given = x.requires_grad_("input" in gradients), w.detach().requires_grad_("weight" in gradients)
        found = getattr(plainconv, name)(*given, **how)
        wanted = [tensor for tensor in given if tensor.requires_grad]
        made_of = torch.autograd.grad(found, wanted, torch.ones_like(found))
        if number == 0:
            first = len(made)
        if number in (0, len(sizes) - 1):
            expected = getattr(torch.nn.functional, name)(*given, **known)
            of_torch = torch.autograd.grad(expected, wanted, torch.ones_like(expected))
            for one, other in zip((found, *made_of), (expected, *of_torch), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.detach().abs().max()))
    assert first >= 1
    assert first <= len(made) <= first + more


SINGLE = {"algorithm": "fft", "groups": 16, "last": True}
LONG = [(117 + i * 37 % 200, 117 + i * 53 % 200) for i in range(40)]
SMALL = [(n, n) for n in range(4, 33)] + [(4 + i * 5 % 29, 4 + i * 7 % 29) for i in range(29)]


@pytest.mark.parametrize(
    ("name", "weight", "sizes", "how", "most"),
    [
        # Each number of vectors that a tile of a small result can have, and two widths of a vector; a pack for each.
        ("conv_transpose1d", (16, 16, 4), [(n,) for n in range(4, 300)], {"stride": 2}, 12),
        pytest.param("conv2d", (6, 6, 3, 3), SMALL, {"algorithm": "direct"}, 10, marks=pytest.mark.slow),
        pytest.param("conv2d", (6, 6, 1, 1), SMALL, {"algorithm": "pointwise"}, 10, marks=pytest.mark.slow),
        # Each number of pairs' scalars of few places, for two widths of a tile; and a pack.
        pytest.param(
            *("conv2d", (16, 16, 3, 3), SMALL, {"algorithm": "direct", "dtype": torch.bfloat16, "last": True}, 12),
            marks=pytest.mark.slow,
        ),
        # Each number of rows up to 14, and three widths of a vector for rows that are narrower than the widest.
        pytest.param("conv2d", (6, 3, 3, 3), SMALL, {"algorithm": "narrow"}, 28, marks=pytest.mark.slow),
        pytest.param(
            "conv2d", (4, 1, 3, 3), SMALL, {"algorithm": "depthwise", "groups": 4}, 28, marks=pytest.mark.slow
        ),
        # Tiles of 2 or 4 outputs along each dimension, for few tiles or many; two kernels of each.
        pytest.param("conv2d", (16, 16, 3, 3), SMALL, {"algorithm": "winograd"}, 16, marks=pytest.mark.slow),
        pytest.param("conv2d", (16, 16, 7, 7), SMALL, {"algorithm": "fft", "padding": 3}, 16, marks=pytest.mark.slow),
        # Five lengths along each dimension (16 to 48) while one tile makes all: 21 pairs, two kernels of each.
        pytest.param("conv2d", (16, 1, 13, 13), SMALL, {**SINGLE, "padding": 6}, 42, marks=pytest.mark.slow),
        # And longer than a tile: two along each, two kernels of each pair; and one to spare.
        pytest.param("conv2d", (16, 1, 21, 21), LONG, SINGLE, 9, marks=pytest.mark.slow),
        pytest.param("conv2d", (16, 16, 3, 3), SMALL, {"padding": 1}, 28, marks=pytest.mark.slow),
    ],
)
def test_small_sizes_have_few_kernels(name, weight, sizes, how, most, made):
    how = dict(how)
    dtype, last = how.pop("dtype", torch.float32), how.pop("last", False)
    w = torch.randn(weight).to(dtype)
    for number, size in enumerate(sizes):
        x = torch.randn(1 + number % 2, weight[1] * how.get("groups", 1), *size).to(dtype)
        x = channels_last(x) if last else x
        getattr(plainconv, name)(x, w, **how)
    assert 1 <= len(made) <= most, f"{len(made)} kernels"
