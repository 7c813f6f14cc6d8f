"""Separable: kernels that are products of lines, and those that are none."""

import dataclasses

import assembly
import pytest
import torch
from checks import (
    BY_NAME,
    check,
    compare,
    given,
    integers,
    product_of_lines,
    reals,
    request,
    result_of,
    spread,
)
from guarded import guarded
from torch.autograd import gradcheck, gradgradcheck

import plainconv
from plainconv.cpu import compile as cpu
from plainconv.cpu import rows
from plainconv.menu import lanes, separable
from plainconv.menu.base import Tensors
from plainconv.menu.engine import folded
from plainconv.picture import KERNELS, apply, named_or_typed
from plainconv.problem import ConvProblem, Direction

BITS = [bits for bits in (512, 256, 128) if cpu.why_not() is None and bits <= cpu.Target.host().bits]
SEPARABLE = BY_NAME["separable"]
FORWARD, GRAD_INPUT = Direction.FORWARD, Direction.GRAD_INPUT
EACH = {
    "several bands": "n2 c2 o2 x133x110 k9x9 p4 g2",
    "a tall kernel, a band for each block": "n1 c1 o1 x90x140 k39x5 p19x2",
    "rows that are skipped": "n1 c2 o2 x150x101 k3x5 s5x2 p1 g2",
    "multiplier": "n2 c3 o6 x40x50 k5x3 p2x1 g3",
    "dilation and stride": "n1 c2 o2 x61x90 k4x5 s2x3 d3x2 p3:5x4:0 g2",
    "reflect": "n1 c2 o2 x150x40 k7x5 p3x2 g2 mreflect",
    "replicate, stride": "n1 c2 o2 x31x40 k3x4 s2 p5x4 g2 mreplicate",
    "circular": "n1 c1 o1 x45x33 k5x5 p5x3 mcircular",
    "cropped": "n1 c2 o2 x30x40 k3x3 p-2:1x1:-3 g2",
    "a line": "n1 c2 o2 x30x40 k1x9 p0x4 g2",
    "a column": "n1 c2 o2 x30x40 k9x1 p4x0 g2",
    "3-D": "n2 c2 o2 x7x20x33 k3x3x5 p1 g2",
    "3-D, multiplier, strides": "n1 c2 o4 x7x20x33 k2x3x4 s2x1x3 p1 g2",
    "3-D, nothing along the depth": "n1 c2 o2 x4x20x33 k1x3x5 p0x1x2 g2",
    "3-D, depth alone cropped": "n1 c2 o2 x6x20x33 k1x3x5 p-1:1x1x2 g2 mreplicate",
}
FEW_BYTES = 24 << 10  # of a strip, so that small pictures have several bands
each = pytest.mark.parametrize("name", EACH)


@pytest.fixture
def low_strips(monkeypatch):
    def forget():
        separable._passes.cache_clear()
        separable._prepare.cache_clear()

    monkeypatch.setattr(separable, "NEAR_BYTES", FEW_BYTES)
    forget()
    yield
    forget()


def gaussian(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As people write it: one exponential of both distances."""
    along = torch.arange(size, dtype=dtype) - size // 2
    bell = torch.exp(-(along[:, None] ** 2 + along**2) / (2 * (size / 6) ** 2))
    return bell / bell.sum()


@each
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("low_strips")
def test_outputs_and_gradients_for_the_input(name, threads):
    for direction in (FORWARD, GRAD_INPUT):
        asked = request(ConvProblem.parse(EACH[name]), direction, torch.float32, threads=threads, has_bias=True)
        if SEPARABLE.why_not(asked) is None:
            check(SEPARABLE, asked, reals)
            check(SEPARABLE, asked, integers, layout=spread)
        else:
            assert asked.problem.group_out > 1 or "skipped" in name


def test_an_activation_and_a_residual_come_behind_the_last_pass():
    asked = request(ConvProblem.parse(EACH["multiplier"]), FORWARD, torch.float64, has_bias=True, has_residual=True)
    check(SEPARABLE, dataclasses.replace(asked, activation="gelu"), reals)


@pytest.mark.usefixtures("low_strips")
def test_the_cases_meet_what_they_are_for():
    def passes(name):
        return separable._passes(request(ConvProblem.parse(EACH[name]), FORWARD, torch.float32))[0]

    assert passes("several bands").bands > 3
    assert passes("a tall kernel, a band for each block").band == 1 < passes("several bands").band
    assert passes("rows that are skipped").bands > 1
    assert passes("3-D").along
    assert not passes("3-D, nothing along the depth").along


@pytest.mark.usefixtures("low_strips")
def test_how_many_threads_there_are_changes_no_bit():
    problem = ConvProblem.parse(EACH["several bands"])
    one, three = (request(problem, FORWARD, torch.float32, threads=threads) for threads in (1, 3))
    x, w, *_ = given(one, reals)
    w = product_of_lines(w)
    assert torch.equal(result_of(SEPARABLE, one, x, w), result_of(SEPARABLE, three, x, w))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("direction", [FORWARD, GRAD_INPUT], ids=lambda direction: direction.value)
@pytest.mark.parametrize("bits", BITS)
@each
@pytest.mark.usefixtures("low_strips")
def test_nothing_outside_is_read_or_written(name, bits, direction, dtype, at_end, monkeypatch):
    """Every tensor, the lines, all tables and the workspace, right before and right behind memory that faults."""
    target = cpu.Target.host(bits)
    monkeypatch.setattr(cpu.Target, "host", staticmethod(lambda: target))
    monkeypatch.setattr(lanes, "prepare", lanes.prepare.__wrapped__)
    asked = request(ConvProblem.parse(EACH[name]), direction, dtype, threads=2, has_bias=True, has_residual=True)
    if SEPARABLE.why_not(asked) is not None or (direction is GRAD_INPUT and asked.problem.padding_mode != "zeros"):
        pytest.skip("not served, or by way of a padded gradient")
    held = set()

    def guard(module, name):
        make = getattr(module, name)

        def placed(*how):
            held.add(name)
            return tuple(guarded(tensor, at_end=at_end) for tensor in make(*how))

        monkeypatch.setattr(module, name, placed)

    for module, called in ((lanes, "_tables"), (separable, "_settled"), (separable, "lines")):
        guard(module, called)
    tensors = given(asked, reals)._replace(second=product_of_lines(given(asked, reals).second))
    tensors = Tensors(*(guarded(tensor, at_end=at_end) for tensor in tensors))
    out = guarded(torch.full(asked.problem.shape_of(direction.makes), torch.nan, dtype=dtype), at_end=at_end)
    workspace = guarded(torch.full((SEPARABLE.cost(asked).workspace,), 0xFF, dtype=torch.uint8), at_end=at_end)
    SEPARABLE.run(asked, tensors, out, workspace)
    assert held == {"_tables", "_settled", "lines"}
    compare(SEPARABLE, asked, out, *tensors, to_the_bit=False)


@assembly.every_target
@pytest.mark.parametrize("text", ["n1 c1 o1 x1080x1920 k3x3 p1", "n1 c1 o1 x1080x1920 k9x9 p4"])
def test_the_sums_stay_in_registers(text, target, monkeypatch):
    monkeypatch.setattr(cpu.Target, "host", staticmethod(lambda: target))
    separable._passes.cache_clear()
    (passes,) = separable._passes(request(ConvProblem.parse(text), FORWARD, torch.float32))
    separable._passes.cache_clear()
    for part, tile_of in ((passes.across, separable._row), (passes.down, separable._tile)):
        shape = lanes.shape_of(part, target, tile_of(part.request, target, folded(part.request.problem)))
        code = cpu.assembly(rows.text(shape), target)
        inside = assembly.main_tile(code)
        assert assembly.products(inside) > 1
        assert not assembly.spills(inside, code), "a vector is written to the stack"


# -- which kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 5, 9, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussians_are_products_of_lines(size, dtype):
    w = gaussian(size, dtype).expand(2, 1, size, size)
    down, across = separable.lines(w)
    torch.testing.assert_close(down[:, :, None] * across[:, None], w[:, 0], rtol=1e-5, atol=0)


def test_gaussians_of_one_exponential_are():
    """exp of a large number is off by as many units as that is large."""
    far = torch.arange(-31, 32) ** 2
    for deviation in (3, 5, 8, 31):
        kernel = torch.exp(-(far[:, None] + far) / (2 * deviation**2))
        assert not isinstance(separable.lines((kernel / kernel.sum())[None, None]), str)
    kernel[40, 3] *= 1 + 40 * torch.finfo(torch.float32).eps
    assert "of rank 1" in separable.lines(kernel[None, None])


def test_boxes_and_sobels_are_and_a_kernel_of_zeros_is():
    for name in ("blur", "gaussian", "sobel", "identity"):
        assert not isinstance(separable.lines(torch.tensor(KERNELS[name], dtype=torch.float64).unsqueeze(1)), str)
    for name in ("emboss", "sharpen", "edge"):
        assert "of rank 1" in separable.lines(torch.tensor(KERNELS[name], dtype=torch.float64).unsqueeze(1))
    x = torch.randn(1, 2, 6, 7)
    w = torch.stack([torch.zeros(1, 3, 3), torch.ones(1, 3, 3)])
    y = plainconv.conv2d(x, w, groups=2, algorithm="separable")
    assert not y[:, 0].any()
    assert y[:, 1].all()


def test_a_few_eps_are_allowed_and_no_more():
    eps = torch.finfo(torch.float32).eps
    w = torch.ones(3, 1, 5, 7)
    w[1, 0, 2, 3] += 6 * eps
    assert not isinstance(separable.lines(w), str)
    w[1, 0, 2, 3] += 20 * eps
    assert "that of channel 1 is off by" in separable.lines(w)
    w[1, 0, 2, 3] = 1
    w[2, 0, 4, 6] = 0  # small beside the rest, or a dropped tap: it is relative to the element
    assert "that of channel 2 is off by" in separable.lines(w)
    w[2, 0, 4, 6] = 1e-30
    assert "that of channel 2 is off by" in separable.lines(w)


def test_denormal_numbers_have_fewer_digits():
    along = torch.tensor([1e-25, 3e-15, 1.0, 7e-16, 2e-27])
    assert not isinstance(separable.lines(torch.outer(along, along).view(1, 1, 5, 5)), str)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    w = torch.ones(2, 1, 3, 3)
    w[1, 0, 0, 1] = value
    with pytest.raises(plainconv.AlgorithmRefused, match=r"refuses forward .* has numbers that are not finite"):
        plainconv.conv2d(torch.ones(1, 2, 5, 5), w, groups=2, algorithm="separable")


def test_other_kernels_are_refused_in_every_call():
    x, w = torch.ones(1, 1, 5, 5), torch.ones(1, 1, 3, 3)
    plainconv.conv2d(x, w, algorithm="separable")
    w[0, 0, 1, 1] = 5
    for _ in range(2):
        with pytest.raises(plainconv.AlgorithmRefused, match="no product of lines"):
            plainconv.conv2d(x, w, algorithm="separable")


@pytest.mark.parametrize(
    ("text", "direction", "dtype", "why"),
    [
        ("n1 c4 o2 x9x9 k3x3 g2", FORWARD, torch.float32, "one input channel a group, and here are 2"),
        ("n1 c1 o1 x9x9 k3x3 p1x1 mreflect", Direction.GRAD_INPUT, torch.bfloat16, "would be rounded to bfloat16"),
        ("n1 c2 o4 x9x9 k3x3 g2", GRAD_INPUT, torch.float32, "one output channel a group, and here are 2"),
        ("n1 c2 o2 x9x9 k3x3 g2", Direction.GRAD_WEIGHT, torch.float32, "the gradient for a weight is none"),
        ("n1 c2 o2 x9x9 k3x3 g2", FORWARD, torch.bfloat16, "rounded to bfloat16, and so the result twice"),
        ("n1 c2 o2 x9 k3 g2", FORWARD, torch.float32, "two dimensions or more"),
        ("n1 c2 o2 x9x9 k2x2 s3 g2", GRAD_INPUT, torch.float32, "no output reaches some places"),
    ],
)
def test_what_is_refused_whatever_the_values(text, direction, dtype, why):
    assert why in SEPARABLE.why_not(request(ConvProblem.parse(text), direction, dtype))


def test_auto_never_takes_it():
    """Though its estimate is the lowest."""
    x, w = torch.empty(1, 3, 500, 500), torch.empty(3, 1, 31, 31)
    told = plainconv.explain(x, w, groups=3)
    ours = next(verdict for verdict in told.verdicts if verdict.algorithm is SEPARABLE)
    assert ours.cost
    assert ours.seconds < min(v.seconds for v in told.verdicts if v.cost and v.algorithm is not SEPARABLE)
    assert told.chosen != "separable"
    assert plainconv.explain(x, w, groups=3, algorithm="separable").chosen == "separable"


# -- gradients, NaN, pictures ----------------------------------------------------------------------------------------


def test_gradients_of_the_input():
    w = product_of_lines(reals((3, 1, 3, 4), torch.float64, 1))

    def function(x):
        return plainconv.conv2d(x, w, stride=(1, 2), padding=1, groups=3, padding_mode="reflect", algorithm="separable")

    x = reals((2, 3, 6, 7), torch.float64, 0).requires_grad_()
    assert gradcheck(function, x, check_forward_ad=True)
    assert gradgradcheck(function, x, check_fwd_over_rev=True)


def test_the_gradient_for_the_weight_is_refused():
    x, w = torch.randn(1, 2, 6, 7), torch.ones(2, 1, 3, 3, requires_grad=True)
    y = plainconv.conv2d(x, w, groups=2, algorithm="separable")
    with pytest.raises(plainconv.AlgorithmRefused, match="refuses grad_weight"):
        y.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_reaches_exactly_the_outputs_whose_window_covers_it(value):
    x, w = torch.randn(1, 1, 30, 40), gaussian(5).view(1, 1, 5, 5)
    x[0, 0, 12, 17] = value
    broken = ~plainconv.conv2d(x, w, algorithm="separable").isfinite()
    assert torch.equal(broken[0, 0].nonzero(), (torch.ones(5, 5).nonzero() + torch.tensor([8, 13])))


@pytest.mark.parametrize("name", KERNELS)
def test_filters_take_it_where_the_kernel_is_one(name, monkeypatch):
    taken = []

    def conv2d(*given, algorithm, **how):
        y = plainconv.conv2d(*given, algorithm=algorithm, **how)
        taken.append(algorithm)  # if it was not refused
        return y

    monkeypatch.setattr("plainconv.picture.filters.conv2d", conv2d)
    pixels = torch.rand(3, 20, 30)
    apply(pixels, named_or_typed(name))
    assert taken == ["auto" if name in ("emboss", "sharpen", "edge") else "separable"]
    with pytest.raises(plainconv.AlgorithmRefused):
        apply(pixels, named_or_typed("edge"), algorithm="separable")
