"""Every algorithm on the menu, in every direction, held to the definition; see checks.py for the rules."""

import dataclasses
import os

import checks
import pytest
import torch
from checks import (
    BY_NAME,
    CASES,
    DIRECTIONS,
    FORWARD_ONLY,
    channels_last,
    check,
    compare,
    dropping_a_tap,
    integers,
    problems,
    reals,
    refuses,
    request,
    result_of,
    spread,
)
from checks import given as tensors_for
from hypothesis import given, settings
from hypothesis import strategies as st

from plainconv.menu import ALGORITHMS
from plainconv.menu.base import _IN_PLACE, COMPLEX, DTYPES, FLOATS, INTEGERS, Tensors
from plainconv.problem import ACTIVATIONS, ConvProblem, Direction, Request, read_activation

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.fixture
def threads():
    """As many threads as there are cores, or two."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(os.cpu_count() or 1, 2))
    yield
    torch.set_num_threads(before)


algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=BY_NAME)
directions = pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda d: d.value)
cases = pytest.mark.parametrize("text", CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def asked_for(algorithm, text, direction, dtype, **more):
    """The request, unless there is nothing to check."""
    asked = request(ConvProblem.parse(text), direction, dtype, allow_builtin=algorithm.name == "builtin", **more)
    if refuses(algorithm, asked):
        pytest.skip("refused, or too long for loops")
    return asked


# -- right -----------------------------------------------------------------------------------------------------------


@algorithms
@directions
@cases
def test_every_case(algorithm, direction, text):
    """float64, and float32 with a bias: exact on small integers, within the stated error on others."""
    asked = asked_for(algorithm, text, direction, torch.float64)
    check(algorithm, asked, integers)
    check(algorithm, asked, reals)
    with_bias = dataclasses.replace(asked, dtype=torch.float32, has_bias=True, channels_last=True)
    if refuses(algorithm, with_bias):
        with_bias = dataclasses.replace(with_bias, channels_last=False)
    check(algorithm, with_bias, integers)
    check(algorithm, with_bias, reals)


FOR_EVERY_DTYPE = ("n2 c3 o4 x9x8 k3x3 p1", "n2 c4 o2 x7x6 k2x3 s2x1 p1:2x0 d1x2 g2", "n2 c2 o3 x9 k4 p2:3 mreflect")


@algorithms
@directions
@dtypes
@pytest.mark.parametrize("text", FOR_EVERY_DTYPE)
def test_every_dtype(algorithm, direction, dtype, text):
    asked = asked_for(algorithm, text, direction, dtype, has_bias=True)
    check(algorithm, asked, integers)
    if dtype not in INTEGERS:
        check(algorithm, asked, reals)


@algorithms
@directions
@pytest.mark.parametrize("layout", [channels_last, spread], ids=["channels_last", "irregular"])
@pytest.mark.parametrize("text", [FOR_EVERY_DTYPE[1], "n1 c4 o2 x4x5x3 k2x3x2 p1:2x2x0:1 g2 mcircular"])
def test_views_of_every_kind(algorithm, direction, layout, text):
    for last in (False, True):
        check(
            algorithm, asked_for(algorithm, text, direction, torch.float32, channels_last=last), integers, layout=layout
        )


@algorithms
@directions
def test_conjugated_numbers_are_conjugated_once(algorithm, direction):
    """The operators hand over tensors whose conjugate bit is resolved; a lazy one would be read as it lies."""
    asked = asked_for(algorithm, "n2 c2 o3 x5x6 k3x2 p1", direction, torch.complex128)
    check(algorithm, asked, lambda *how: reals(*how).conj().resolve_conj())


@algorithms
@directions
@given(
    problem=problems(),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int8)),
    has_bias=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20)
def test_random_problems(algorithm, direction, problem, dtype, has_bias, last, seed):
    asked = request(problem, direction, dtype, has_bias=has_bias, channels_last=last)
    if not refuses(algorithm, asked):
        check(algorithm, asked, integers, seed=seed)
        if dtype not in INTEGERS:
            check(algorithm, asked, reals, seed=seed)


@pytest.mark.slow
@algorithms
@directions
@given(
    problem=problems(),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 1000),
    max_workspace=st.sampled_from((1 << 30, 1 << 14)),
)
@settings(max_examples=400)
def test_many_random_problems(algorithm, direction, problem, dtype, has_bias, last, seed, max_workspace):
    asked = request(problem, direction, dtype, has_bias=has_bias, channels_last=last, max_workspace=max_workspace)
    if not refuses(algorithm, asked):
        check(algorithm, asked, integers, seed=seed)
        if dtype not in INTEGERS:
            check(algorithm, asked, reals, seed=seed)


@algorithms
@directions
def test_integers_wrap_as_torchs_do(algorithm, direction):
    asked = asked_for(algorithm, "n2 c3 o2 x5x4 k3x3 p1", direction, torch.uint8)
    first, second, *_ = tensors_for(asked)
    assert int(first.max()) * int(second.max()) > 255, "the test would not see wrapping"
    check(algorithm, asked, integers)


# -- what comes behind -----------------------------------------------------------------------------------------------


def test_every_activation_has_its_operation_and_its_definition():
    defined = {read_activation(text)[0] for text in checks.ACTIVATIONS if text}
    assert set(ACTIVATIONS) == set(_IN_PLACE) == defined


@algorithms
@pytest.mark.parametrize(
    ("text", "activation"),
    [
        *((FOR_EVERY_DTYPE[1], activation) for activation in (None, *ACTIVATIONS, "leaky_relu(-0.5)")),
        (FOR_EVERY_DTYPE[2], "hardswish"),
    ],
)
def test_bias_residual_and_activation(algorithm, activation, text):
    """float32 and bfloat16, in both memory formats; the activation sees bias and residual."""
    for dtype in (torch.float32, torch.bfloat16):
        for last in (False, True):
            asked = request(
                ConvProblem.parse(text),
                Direction.FORWARD,
                dtype,
                channels_last=last,
                has_bias=True,
                has_residual=True,
                activation=activation,
            )
            if not refuses(algorithm, asked):
                check(algorithm, asked, integers)
                check(algorithm, asked, reals)
                if activation in (None, "gelu"):
                    check(algorithm, dataclasses.replace(asked, has_residual=False), reals)


@algorithms
@pytest.mark.parametrize("fault", [{"residual": None}, {"activation": None}], ids=str)
def test_a_forgotten_residual_or_activation_is_caught(algorithm, fault):
    asked = asked_for(
        algorithm, FOR_EVERY_DTYPE[1], Direction.FORWARD, torch.float32, has_residual=True, activation="hardswish"
    )
    tensors = tensors_for(asked, reals)
    done = dataclasses.replace(asked, activation=fault.get("activation", asked.activation))
    done = dataclasses.replace(done, has_residual="residual" not in fault)
    result = result_of(algorithm, done, *(tensors._replace(residual=None) if "residual" in fault else tensors))
    with pytest.raises(AssertionError, match="beyond the stated error"):
        compare(algorithm, asked, result, *tensors, to_the_bit=False)


def test_wrong_activations_are_refused_with_a_sentence():
    problem = ConvProblem.parse(FOR_EVERY_DTYPE[0])
    with pytest.raises(ValueError, match=r"activation must be None or one of \('relu', .*but got 'tanh'"):
        Request(problem, Direction.FORWARD, torch.float32, activation="tanh")
    with pytest.raises(ValueError, match=r"'relu' is for floating types, but the tensors are torch\.int8"):
        Request(problem, Direction.FORWARD, torch.int8, activation="relu")


# -- the checks can fail ---------------------------------------------------------------------------------------------


def an_element_less(algorithm):
    def run(asked, tensors, out, workspace):
        kept = out[(-1,) * out.dim()].clone()
        algorithm.run(asked, tensors, out, workspace)
        out[(-1,) * out.dim()] = kept

    return dataclasses.replace(algorithm, run=run)


def moved_by_one(algorithm):
    def run(asked, tensors, out, workspace):
        algorithm.run(asked, tensors, out, workspace)
        out.copy_(out.roll(1, -1))

    return dataclasses.replace(algorithm, run=run)


def without_its_bias(algorithm):
    def run(asked, tensors, out, workspace):
        bare = dataclasses.replace(asked, has_bias=False)
        algorithm.run(bare, tensors._replace(bias=None), out, workspace)

    return dataclasses.replace(algorithm, run=run)


def one_byte_too_far(algorithm):
    def run(asked, tensors, out, workspace):
        algorithm.run(asked, tensors, out, workspace)
        workspace.as_strided((len(workspace) + 1,), (1,))[-1] = 0

    return dataclasses.replace(algorithm, run=run)


def writing_into_its_input(algorithm):
    def run(asked, tensors, out, workspace):
        algorithm.run(asked, tensors, out, workspace)
        tensors[0].neg_()

    return dataclasses.replace(algorithm, run=run)


def a_little_off(algorithm):
    """Twice its stated error, on one element only."""

    def run(asked, tensors, out, workspace):
        algorithm.run(asked, tensors, out, workspace)
        absolute = [t if t is None else t.abs() for t in tensors]
        sums = torch.empty_like(out)
        BY_NAME["reference"].run(asked, Tensors(*absolute), sums, torch.empty(0, dtype=torch.uint8))
        at = tuple(int(i) for i in torch.unravel_index(sums.argmax(), sums.shape))
        out[at] += 2.1 * algorithm.error(asked) * torch.finfo(out.dtype).eps * sums[at]

    return dataclasses.replace(algorithm, run=run)


@algorithms
@directions
@cases
def test_an_algorithm_that_drops_a_tap_is_caught(algorithm, direction, text):
    """The meta-test: the very checks above, on algorithms that are blind to one tap."""
    asked = asked_for(algorithm, text, direction, torch.float32)
    for values in (integers, reals):
        with pytest.raises(AssertionError, match=r"elements (differ|beyond the stated error)") as caught:
            check(dropping_a_tap(algorithm), asked, values)
        assert str(asked.problem) in str(caught.value)


@algorithms
@directions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.int8], ids=str)
def test_a_dropped_tap_is_caught_in_every_kind_of_number(algorithm, direction, dtype):
    asked = asked_for(algorithm, FOR_EVERY_DTYPE[0], direction, dtype)
    for values in (integers, reals) if dtype not in INTEGERS else (integers,):
        with pytest.raises(AssertionError):
            check(dropping_a_tap(algorithm), asked, values)


@algorithms
@directions
@pytest.mark.parametrize(
    "fault",
    [an_element_less, moved_by_one, without_its_bias, one_byte_too_far, writing_into_its_input, a_little_off],
)
def test_other_faults_are_caught(algorithm, direction, fault):
    asked = asked_for(algorithm, FOR_EVERY_DTYPE[0], direction, torch.float32, has_bias=True)
    if fault is without_its_bias and asked.makes_bias and not algorithm.fuses:
        pytest.skip("what comes behind it makes the bias")
    check(algorithm, asked, reals)
    with pytest.raises(AssertionError):
        check(fault(algorithm), asked, reals)


def test_a_skipped_tap_inside_an_algorithm_is_caught(monkeypatch):
    """A fault in the code itself, not around it: shift forgets its first tap, im2col reads one tap twice."""
    from plainconv.menu import shift, strips

    asked = request(ConvProblem.parse(FOR_EVERY_DTYPE[0]), Direction.FORWARD, torch.float32)
    correct, taps = shift._moves, tuple(strips.taps(asked.problem))
    monkeypatch.setattr(shift, "_moves", lambda *at: (correct(*at)[1], *correct(*at)[1:]))
    with pytest.raises(AssertionError, match="elements differ"):
        check(BY_NAME["shift"], asked)
    from plainconv.menu import im2col

    monkeypatch.setattr(im2col, "_columns", lambda problem: strips.Strips((taps[1], *taps[1:]), (0, 0)))
    with pytest.raises(AssertionError, match="elements differ"):
        check(BY_NAME["im2col"], asked)


# -- slabs, tiles and bits -------------------------------------------------------------------------------------------

LARGE = ("n3 c5 o6 x61x53 k3x5 p1x2", "n2 c4 o6 x67x45 k5x3 s2x1 p2:1x3 d1x2 g2 mreflect", "n2 c3 o2 x701 k9 s2 p4")
cut = pytest.mark.parametrize("algorithm", [BY_NAME[name] for name in ("shift", "im2col", "fft")], ids=lambda a: a.name)


def pieces(algorithm, asked):
    """Into how many slabs or tiles the work is cut."""
    from plainconv.menu import fft, im2col, shift, strips

    if algorithm.name == "fft":
        tiles = fft._tiles(asked)
        counts = [-(-o // t) for o, t in zip(asked.problem.out, tiles.outputs, strict=True)]
        return torch.Size(counts).numel() * -(-asked.problem.batch // tiles.images)
    walk = {"shift": shift._phases, "im2col": im2col._columns}[algorithm.name](asked.problem)
    return strips.layout(asked, walk).slabs(asked.problem)


@directions
@pytest.mark.parametrize("name", ["shift", "im2col"])
@pytest.mark.parametrize("text", ["n1 c3 o4 x9x40 k3x3 p1", "n1 c2 o2 x4x17x30 k2x3x3 s1x2x1 p1 mreplicate"])
def test_a_tiny_workspace_cuts_every_dimension(name, direction, text):
    from plainconv.menu import im2col, shift, strips

    asked = dataclasses.replace(request(ConvProblem.parse(text), direction, torch.float32), max_workspace=4096)
    walk = {"shift": shift._phases, "im2col": im2col._columns}[name](asked.problem)
    assert strips.layout(asked, walk).block[1] < asked.problem.out[1]
    check(BY_NAME[name], asked, integers)
    check(BY_NAME[name], asked, reals)


@pytest.mark.parametrize("name", ["shift", "im2col"])
@pytest.mark.parametrize("text", ["n1 c256 o256 x64x64x64 k7x7x7 p3", "n1 c512 o512 x32x160x160 k3x3x3 p1"])
def test_wide_volumes_are_cut_until_the_workspace_holds_them(name, text):
    asked = request(ConvProblem.parse(text), Direction.FORWARD, torch.float32)
    assert BY_NAME[name].cost(asked).workspace <= asked.max_workspace


@directions
@pytest.mark.parametrize(
    "text",
    [
        "n1 c3 o4 x8x8 k3x3 s1099511627776",
        "n1 c1 o1 x9 k3 s268435456 p268435456 d268435456",
        "n1 c2 o2 x4x5x6 k3x1x3 s268435456 p268435456x0x268435456 d268435456 g2",
    ],
)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_huge_strides_and_paddings_cost_nothing(direction, text, last):
    """Neither the choice nor the work may depend on how far apart the places are that are never read."""
    asked = request(ConvProblem.parse(text), direction, torch.float32, channels_last=last)
    for algorithm in ALGORITHMS:
        if algorithm.why_not(asked) is None and algorithm.cost(asked).workspace < 1 << 20:
            check(algorithm, asked, integers)


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_a_stride_without_a_second_place_is_no_stride(name):
    text = {"pointwise": "n1 c2 o2 x9x5 k1x1", "depthwise": "n1 c2 o2 x9x5 k3x3 g2"}.get(name, "n1 c2 o3 x9x5 k3x3")
    asked = asked_for(BY_NAME[name], f"{text} s{1 << 40}", Direction.FORWARD, torch.float32)
    check(BY_NAME[name], asked)
    if name != "narrow":
        check(BY_NAME[name], dataclasses.replace(asked, channels_last=True))


@pytest.mark.parametrize("name", FORWARD_ONLY)
@pytest.mark.parametrize("far", [f"p{1 << 21}", f"p{1 << 21} s{1 << 21}", f"p{1 << 20} d{1 << 21}"])
def test_places_too_far_away_for_a_table_are_refused(name, far):
    if name == "pointwise" and "d" in far:
        pytest.skip("one tap has no dilation")
    shape = {"pointwise": "k1x1", "depthwise": "k2x2 g2"}.get(name, "k2x2")
    asked = request(ConvProblem.parse(f"n1 c2 o2 x9x5 {shape} {far}"), Direction.FORWARD, torch.float32)
    assert "skip more than 1048576 of them" in BY_NAME[name].why_not(asked)
    if name != "narrow":
        assert "skip more than 1048576" in BY_NAME[name].why_not(dataclasses.replace(asked, channels_last=True))


@cut
@directions
@pytest.mark.parametrize("text", LARGE)
def test_a_small_workspace_cuts_the_work_and_changes_nothing_else(algorithm, direction, text):
    whole = asked_for(algorithm, text, direction, torch.float32, has_bias=True)
    small = dataclasses.replace(whole, max_workspace=algorithm.cost(whole).workspace // 6)
    assert pieces(algorithm, small) > pieces(algorithm, whole)
    assert algorithm.cost(small).workspace < algorithm.cost(whole).workspace
    check(algorithm, small, integers)
    check(algorithm, small, reals)


@cut
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", LARGE)
def test_half_types_are_rounded_once_however_the_work_is_cut(algorithm, dtype, text):
    """Slabs overlap in GRAD_INPUT; sums that were rounded to a half type in between would show."""
    wide = asked_for(algorithm, text, Direction.GRAD_INPUT, torch.float32, has_bias=True)
    wide = dataclasses.replace(wide, max_workspace=algorithm.cost(wide).workspace // 6)
    half = dataclasses.replace(wide, dtype=dtype)
    assert pieces(algorithm, half) > 1
    tensors = tensors_for(half, reals)
    found = result_of(algorithm, half, *tensors)
    expected = result_of(algorithm, wide, *(tensor.float() for tensor in tensors[:3])).to(dtype)
    if pieces(algorithm, half) == pieces(algorithm, wide):
        assert torch.equal(found, expected)
    assert (found.float() - expected.float()).abs().max() <= torch.finfo(dtype).eps * expected.float().abs().max()
    assert (found != expected).float().mean() < 0.01, "more than one in a hundred differs: rounded twice"


@algorithms
@directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.usefixtures("threads")
def test_the_same_call_gives_the_same_bits(algorithm, direction, dtype):
    text = FOR_EVERY_DTYPE[1] if algorithm.name == "loops" else LARGE[1]
    asked = asked_for(algorithm, text, direction, dtype, has_bias=True)
    tensors = tensors_for(asked, reals)
    first, bias = result_of(algorithm, asked, *tensors), tensors.bias.clone()
    for _ in range(3):
        assert torch.equal(first, result_of(algorithm, asked, *tensors))
        assert torch.equal(bias, tensors.bias)


# -- unusual numbers -------------------------------------------------------------------------------------------------

EXACT_ABOUT_NAN = [BY_NAME[name] for name in ("loops", "shift", "im2col", "narrow", "depthwise", "reference")]
exact_about_nan = pytest.mark.parametrize("algorithm", EXACT_ABOUT_NAN, ids=lambda algorithm: algorithm.name)


@exact_about_nan
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "text",
    ["n2 c2 o3 x7x6 k3x3 p1", "n2 c2 o2 x9x8 k3x2 s2x3 d2x1 p2x1 mreflect", "n1 c4 o4 x7x7 k2x3 g2 p0:1x2:0"],
)
def test_a_nan_reaches_exactly_the_outputs_whose_window_covers_it(algorithm, value, text):
    asked = asked_for(algorithm, text, Direction.FORWARD, torch.float32)
    x, w, *_ = tensors_for(asked, lambda shape, dtype, seed: integers(shape, dtype, seed).abs() + 1)
    places = [
        (0, 0, 0, 0),
        (0, 1, 3, 2),
        (0, 0, 4, 3),
        (0, 1, 2, 5),
        (0, 1, *(size - 1 for size in asked.problem.spatial)),
    ]
    reached = 0
    for place in places:
        spot = torch.zeros_like(x)
        spot[place] = 1
        touched = result_of(BY_NAME["reference"], asked, spot, w, None) != 0
        assert not touched.all()
        reached += int(touched.any())
        broken = x.clone()
        broken[place] = value
        found = result_of(algorithm, asked, broken, w, None)
        assert torch.equal(~found.isfinite(), touched)
    assert reached >= 2, "a stride may skip one of the places, not all"


@exact_about_nan
def test_padding_is_a_zero_that_is_multiplied(algorithm):
    """An infinite weight over the padding gives NaN, as in torch."""
    asked = asked_for(algorithm, "n1 c1 o1 x3x3 k3x3 p1", Direction.FORWARD, torch.float32)
    x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    w[0, 0, 0, 0] = float("inf")
    out = torch.empty(1, 1, 3, 3)
    algorithm.run(asked, Tensors(x, w), out, torch.empty(algorithm.cost(asked).workspace, dtype=torch.uint8))
    expected = torch.nn.functional.conv2d(x, w, padding=1)
    assert expected.isnan().sum() == 5
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


SUMS = [BY_NAME[name] for name in ("loops", "im2col", "narrow", "depthwise", "direct", "pointwise")]
sums = pytest.mark.parametrize("algorithm", SUMS, ids=lambda algorithm: algorithm.name)


@sums
@directions
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "text",
    ["n2 c2 o3 x7x6 k3x3", "n1 c4 o4 x7x7 k3x2 s2x1 g4", "n2 c19 o5 x5x4 k1x1", "n2 c3 o4 x23 k3 d2 s2"],
)
def test_what_is_not_finite_reaches_what_it_is_multiplied_into(algorithm, direction, value, text):
    """Where no border is: whether a gradient's is multiplied, too, is not settled, and a weight's taps all meet it."""
    asked = asked_for(algorithm, text, direction, torch.float32)
    given = tensors_for(asked, lambda shape, dtype, seed: integers(shape, dtype, seed).abs() + 1)[:2]
    for which in (0,) if direction is Direction.GRAD_INPUT else (0, 1):
        count = given[which].numel()
        for place in (0, count // 3, count // 2, count - 1):
            broken = [tensor.clone() for tensor in given]
            broken[which].view(-1)[place] = value
            found, right = result_of(algorithm, asked, *broken), checks.exact(asked, *broken)
            assert torch.equal(found.isnan(), right.isnan())
            assert torch.equal(found.isinf(), right.isinf())


@sums
@directions
def test_denormal_numbers_are_kept(algorithm, direction):
    few = torch.tensor([1e-40, -3e-42, 1.4e-45, 1.0]).view(1, 1, 4)
    more, one = torch.nn.functional.pad(few, (0, 1)), torch.tensor([1.0, 0.0]).view(1, 1, 2)
    text, first, second, expected = {
        Direction.FORWARD: ("n1 c1 o1 x5 k2", more, one, few),
        Direction.GRAD_INPUT: ("n1 c1 o1 x5 k2", few, one, more),
        Direction.GRAD_WEIGHT: ("n1 c1 o1 x5 k4", more, one, few),
    }[direction]
    if algorithm.name == "pointwise":
        text, second, (first, expected) = "n1 c1 o1 x4 k1", one[..., :1], (few, few)
        if direction is Direction.GRAD_WEIGHT:
            text, first, expected = "n1 c4 o1 x1 k1", few.view(1, 4, 1), few.view(1, 4, 1)
    asked = asked_for(algorithm, text, direction, torch.float32)
    assert torch.equal(result_of(algorithm, asked, first, second), expected)


# -- sizes beyond 32 bits --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shift", "im2col"])
@directions
def test_offsets_beyond_two_to_the_31(name, direction):
    """int8 tensors of more than 2^31 elements; the result is compared where it ends."""
    length = (1 << 31) + 37
    problem = ConvProblem.parse(f"n1 c1 o1 x{length} k1 s{1 << 12}")
    asked = request(problem, direction, torch.int8)
    algorithm = BY_NAME[name]
    assert algorithm.why_not(asked) is None
    x, w = torch.zeros(problem.input_shape, dtype=torch.int8), torch.full(problem.weight_shape, 3, dtype=torch.int8)
    y = torch.zeros(problem.output_shape, dtype=torch.int8)
    last = (problem.out[0] - 1) << 12
    x[0, 0, last], y[0, 0, -1] = 5, 7
    tensors = {"x": x, "w": w, "y": y}
    out = tensors[direction.makes].fill_(0x5A)
    workspace = torch.empty(algorithm.cost(asked).workspace, dtype=torch.uint8)
    algorithm.run(asked, Tensors(*(tensors[role] for role in direction.given)), out, workspace)
    if direction is Direction.FORWARD:
        assert (out[0, 0, -1], out[0, 0, :-1].count_nonzero()) == (15, 0)
    elif direction is Direction.GRAD_INPUT:
        assert (out[0, 0, last], out.count_nonzero()) == (21, 1)
    else:
        assert out.item() == 35


# -- the contract ----------------------------------------------------------------------------------------------------


@algorithms
@directions
@given(problem=problems(), dtype=st.sampled_from(DTYPES), device=st.sampled_from(("cpu", "cuda")))
@settings(max_examples=40)
def test_what_an_algorithm_says_of_a_request(algorithm, direction, problem, dtype, device):
    asked = request(problem, direction, dtype, device=device)
    sentence = algorithm.why_not(asked)
    if sentence is not None:
        assert isinstance(sentence, str)
        assert len(sentence) > 20
        return
    cost = algorithm.cost(asked)
    assert cost == algorithm.cost(asked), "a pure function"
    assert cost.multiplies >= 0
    assert cost.workspace >= 0
    assert cost.seconds > 0
    assert algorithm.error(asked) >= 0


def test_the_menu():
    names = [algorithm.name for algorithm in ALGORITHMS]
    engine = ["narrow", "depthwise", "separable", "direct", "pointwise", "winograd"]
    assert names == ["loops", "shift", "im2col", "fft", *engine, "builtin", "reference"]
    assert len(set(FLOATS + COMPLEX + INTEGERS)) == len(DTYPES) == 12
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALGORITHMS[0].name = "other"


@directions
@dtypes
def test_the_reference_cannot_refuse(direction, dtype):
    for device in ("cpu", "cuda"):
        asked = request(ConvProblem.parse("n1 c1 o1 x3 k3"), direction, dtype, device=device, max_workspace=0)
        assert ALGORITHMS[-1].why_not(asked) is None
        assert ALGORITHMS[-1].cost(asked).workspace == 0
