"""A convolution as a value: its text, its shapes, and what it refuses."""

import copy
import dataclasses
import pickle

import pytest
import torch
from checks import CASES, problems
from hypothesis import assume, given
from hypothesis import strategies as st

from plainconv import reference
from plainconv.problem import (
    ACTIVATIONS,
    ConvProblem,
    Direction,
    Geometry,
    Request,
    out_size,
    out_spatial,
    read_activation,
)

# -- directions ------------------------------------------------------------------------------------------------------


def test_each_direction_makes_one_tensor_from_the_other_two():
    table = {direction: (direction.given, direction.makes) for direction in Direction}
    assert table == {
        Direction.FORWARD: (("x", "w"), "y"),
        Direction.GRAD_INPUT: (("y", "w"), "x"),
        Direction.GRAD_WEIGHT: (("x", "y"), "w"),
    }
    assert all({*given, makes} == {"x", "w", "y"} for given, makes in table.values())


@pytest.mark.parametrize("direction", Direction)
def test_a_direction_is_found_by_what_it_makes_and_stays_itself_in_copies(direction):
    assert Direction.making(direction.makes) is direction
    assert Direction(direction.value) is direction
    assert copy.deepcopy(direction) is direction
    assert {direction: 1}[pickle.loads(pickle.dumps(direction))] == 1


# -- the text form ---------------------------------------------------------------------------------------------------


@given(problems())
def test_the_text_reads_back(problem):
    assert ConvProblem.parse(str(problem)) == problem


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_the_texts_of_the_cases_read_back(text):
    problem = ConvProblem.parse(text)
    assert ConvProblem.parse(str(problem)) == problem


def test_text_of_a_plain_problem_names_only_what_is_not_plain():
    assert str(ConvProblem.parse("n2 c64 o64 x56x56 k3x3 s1x1 p1:1x1 d1 g1 mzeros")) == "n2 c64 o64 x56x56 k3x3 p1x1"
    full = "n1 c4 o2 x9x8 k3x2 s2x1 p-1:2x0 d1x3 g2 mreflect"
    assert str(ConvProblem.parse(full)) == full


def test_one_number_stands_for_every_dimension_and_order_does_not_matter():
    short = ConvProblem.parse("k3 x9x9x9 c1 o1 n1 s2 p1:0 d2")
    assert short == ConvProblem(1, 1, 1, (9, 9, 9), (3, 3, 3), (2, 2, 2), ((1, 0),) * 3, (2, 2, 2))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "lacks n, c, o, x, k"),
        ("n1 c1 o1 x5", "lacks k"),
        ("n1 c1 o1 x5 k3 q7", "'q7' is not one of"),
        ("n1 n2 c1 o1 x5 k3", "'n2' is not one of"),
        ("n1 c1 o1 x5 k3 s", "'s' is not one of"),
        ("n1 c1 o1 x5 k3 s1.5", "'s1.5' is not one of"),
        ("n1 c1 o1 x5xx5 k3", "invalid literal"),
        ("n1x2 c1 o1 x5 k3", "invalid literal"),
        ("n1 c1 o1 x5 k3 p1:2:3", "p1:2:3 is more than a pair"),
        ("n1 c1 o1 x5 k3 mmirror", "padding_mode must be one of"),
    ],
)
def test_text_that_is_no_problem_is_a_value_error_that_shows_it(text, told):
    with pytest.raises(ValueError, match="problem text") as caught:
        ConvProblem.parse(text)
    assert told in str(caught.value)


def test_text_with_too_few_or_too_many_sides_is_refused():
    with pytest.raises(RuntimeError, match="should have one length"):
        ConvProblem.parse("n1 c1 o1 x5x5 k3x3x3")


# -- shapes ----------------------------------------------------------------------------------------------------------


def torch_conv(problem, x, w):
    """torch's convolution of an x that is padded already."""
    function = getattr(torch.nn.functional, f"conv{problem.dims}d")
    return function(x, w, None, problem.stride, 0, problem.dilation, problem.groups)


@given(problems())
def test_shapes_are_torchs(problem):
    padded = torch.empty(problem.batch, problem.in_channels, *problem.padded, device="meta")
    w = torch.empty(problem.weight_shape, device="meta")
    assert problem.output_shape == tuple(torch_conv(problem, padded, w).shape)
    assert [problem.shape_of(role) for role in "xwy"] == [
        problem.input_shape,
        problem.weight_shape,
        problem.output_shape,
    ]
    assert problem == ConvProblem.between(problem.input_shape, problem.weight_shape, problem.geometry)


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 5), st.integers(0, 9), st.integers(1, 4))
def test_length_along_one_dimension_is_torchs(size, kernel, stride, padding, dilation):
    assume(size + 2 * padding > (kernel - 1) * dilation)
    x, w = torch.empty(1, 1, size, device="meta"), torch.empty(1, 1, kernel, device="meta")
    expected = torch.nn.functional.conv1d(x, w, None, stride, padding, dilation).shape[2]
    assert out_size(size, kernel, stride, (padding, padding), dilation) == expected
    geometry = Geometry((stride, 1), ((padding, padding), (0, 0)), (dilation, 1))
    assert out_spatial((size, 7), (kernel, 7), geometry) == (expected, 1)


@given(problems(modes=("zeros",)))
def test_multiplies_counts_the_products_of_the_definition(problem):
    """Ones everywhere, and a padding of ones: each product adds one."""
    padded = dataclasses.replace(problem, spatial=problem.padded, padding=((0, 0),) * problem.dims)
    x, w = (torch.ones(shape, dtype=torch.int64) for shape in (padded.input_shape, padded.weight_shape))
    assert reference.forward(padded, x, w).sum() == problem.multiplies == padded.multiplies


@given(problems())
def test_terms_is_how_many_products_an_element_sums_at_most(problem):
    ones = {role: torch.ones(problem.shape_of(role), dtype=torch.int64) for role in "xwy"}
    most = {
        Direction.FORWARD: reference.forward(problem, ones["x"], ones["w"]).max(),
        Direction.GRAD_INPUT: reference.grad_input(problem, ones["y"], ones["w"]).max(),
        Direction.GRAD_WEIGHT: reference.grad_weight(problem, ones["x"], ones["y"]).max(),
    }
    for direction, found in most.items():
        assert found <= problem.terms(direction), direction


def test_small_properties():
    problem = ConvProblem.parse("n2 c6 o4 x9x8 k3x2 s2x1 p1:0x0 d1x3 g2")
    assert (problem.dims, problem.taps, problem.group_in, problem.group_out) == (2, 6, 3, 2)
    assert problem.padded == (10, 8)
    assert problem.out == (4, 5)


# -- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("n1 c3 o4 x5 k3 g2", "in_channels=3 and out_channels=4 must be divisible by groups=2"),
        ("n1 c4 o3 x5 k3 g2", "must be divisible by groups=2"),
        ("n1 c4 o4 x5 k3 g0", "must be divisible by groups=0"),
        ("n1 c1 o1 x5 k3 p-3", "Kernel size can't be greater than actual input size"),
        ("n1 c1 o1 x5x5 k3x3 p-3:0x0", "Calculated padded input size per channel: (2 x 5). Kernel size: (3 x 3)"),
        ("n1 c1 o1 x2 k1 p-3:2", "negative padding (-3, 2) crops more than the input's 2 at dimension 2"),
        ("n1 c1 o1 x4 k1 p4 mreflect", "Padding size should be less than the corresponding input dimension"),
        ("n1 c1 o1 x4 k1 p5 mcircular", "Padding value causes wrapping around more than once."),
        ("n1 c1 o1 x4 k1 p-4:2 mreplicate", "dimension 2 is empty"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_a_sentence(text, told):
    try:
        with pytest.raises(RuntimeError) as caught:
            ConvProblem.parse(text)
    except ValueError as error:  # parse adds its text to ValueErrors only
        pytest.fail(f"ValueError instead: {error}")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "text", ["n1 c1 o1 x4 k3 p3 mreflect", "n1 c1 o1 x4 k3 p4 mcircular", "n1 c1 o1 x1 k3 p9 mreplicate"]
)
def test_the_widest_padding_that_a_mode_allows_is_allowed(text):
    assert ConvProblem.parse(text).out[0] > 0


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 3), st.integers(1, 3))
def test_a_kernel_too_large_is_refused_in_torchs_words(size, kernel, padding, dilation):
    assume(size + 2 * padding <= (kernel - 1) * dilation)
    with pytest.raises(RuntimeError) as theirs:
        torch.nn.functional.conv1d(torch.ones(1, 1, size), torch.ones(1, 1, kernel), None, 1, padding, dilation)
    with pytest.raises(RuntimeError) as ours:
        ConvProblem(1, 1, 1, (size,), (kernel,), (1,), ((padding, padding),), (dilation,))
    assert str(ours.value) == str(theirs.value)


def test_lengths_must_agree():
    with pytest.raises(RuntimeError, match="should have one length"):
        ConvProblem(1, 1, 1, (5, 5), (3,), (1, 1), ((0, 0), (0, 0)), (1, 1))


def test_an_unknown_padding_mode_is_a_value_error():
    with pytest.raises(ValueError, match=r"padding_mode must be one of .*'mirror'"):
        ConvProblem(1, 1, 1, (5,), (3,), (1,), ((0, 0),), (1,), 1, "mirror")


@pytest.mark.parametrize(("text", "kept"), [("x5 k3", False), ("x5x5 k3x3", True), ("x5x5x5 k3x3x3", True)])
def test_channels_last_is_of_two_and_three_dimensions(text, kept):
    asked = Request(ConvProblem.parse(f"n1 c2 o2 {text}"), Direction.FORWARD, torch.float32, channels_last=True)
    assert asked.channels_last is kept


def test_values_are_frozen_and_hash():
    problem = ConvProblem.parse("n1 c1 o1 x5 k3")
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.batch = 2
    assert len({problem, ConvProblem.parse("n1 c1 o1 x5 k3")}) == 1
    asked = Request(problem, Direction.GRAD_WEIGHT, torch.bfloat16)
    assert str(asked) == "grad_weight n1 c1 o1 x5 k3 bfloat16 cpu"
    assert hash(asked) == hash(pickle.loads(pickle.dumps(asked)))


# -- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers", "spelled"),
    [
        *((name, (), name) for name in ACTIVATIONS if name != "leaky_relu"),
        ("leaky_relu", (0.01,), "leaky_relu"),
        ("leaky_relu(0.010)", (0.01,), "leaky_relu"),
        ("leaky_relu(2)", (2.0,), "leaky_relu(2.0)"),
        ("leaky_relu( -.5 )", (-0.5,), "leaky_relu(-0.5)"),
        ("leaky_relu(0)", (0.0,), "leaky_relu(0.0)"),
        ("leaky_relu(-0)", (-0.0,), "leaky_relu(-0.0)"),
        ("leaky_relu(1E-3)", (0.001,), "leaky_relu(0.001)"),
    ],
)
def test_a_request_spells_an_activation_in_one_way(text, numbers, spelled):
    assert read_activation(text) == (text.partition("(")[0], numbers)
    asked = Request(ConvProblem.parse("n1 c1 o1 x1x1 k1x1"), Direction.FORWARD, torch.float32, activation=text)
    assert asked.activation == spelled
    assert read_activation(spelled) == read_activation(text)
    assert str(asked).endswith(f", {spelled}")


@pytest.mark.parametrize("slope", ["", "x", "nan", "-inf", "1e39", "0.1, 0.2", "0.1)"])
def test_a_slope_that_is_no_finite_number_is_refused(slope):
    with pytest.raises(ValueError, match=r"^activation='leaky_relu\(.*\)' must have a finite number \(in float32\)"):
        read_activation(f"leaky_relu({slope})")


@pytest.mark.parametrize("text", ["leaky_relu(0.1", "leaky_relu0.1", "relu(0.1)", "Leaky_relu(0.1)", "", 0.1])
def test_another_text_is_refused(text):
    with pytest.raises(ValueError, match=r"^activation must be None or one of .* or 'leaky_relu\(slope\)', but got"):
        read_activation(text)
