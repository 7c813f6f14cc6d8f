"""Points in float64: the same as the whole by definition, and red as soon as something is wrong."""

import dataclasses
import math

import checks
import pytest
import torch

from plainconv.bench import check
from plainconv.bench.check import exact, judge, sample
from plainconv.problem import ConvProblem, Direction, Request

CASES = {name: ConvProblem.parse(text) for name, text in checks.CASES.items() if " m" not in text}


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("name", CASES)
def test_points_are_those_of_the_definition(name, direction):
    asked = checks.request(CASES[name], direction, torch.float64)
    first, second = checks.given(asked, checks.reals)[:2]
    found = exact(CASES[name], direction, first, second)
    whole = checks.exact(asked, first, second)
    assert torch.allclose(found.values, whole[found.points.unbind(1)], rtol=1e-12, atol=1e-12)
    sums = checks.exact(asked, first.abs(), second.abs())
    assert found.largest == pytest.approx(float(sums[found.points.unbind(1)].max()))
    assert len(found.points) == min(whole.numel(), check.POINTS)


def test_other_borders_are_refused():
    problem = ConvProblem.parse("n1 c1 o1 x5 k3 p1 mreflect")
    with pytest.raises(ValueError, match="padding with zeros"):
        exact(problem, Direction.FORWARD, torch.ones(1, 1, 5), torch.ones(1, 1, 3))


def test_a_long_sum_is_looked_at_in_fewer_points(monkeypatch):
    monkeypatch.setattr(check, "PRODUCTS", 5 * 27)
    problem = ConvProblem.parse("n1 c3 o8 x20x20 k3x3")
    x, w = torch.randn(problem.input_shape), torch.randn(problem.weight_shape)
    assert len(exact(problem, Direction.FORWARD, x, w).values) == 5


def test_the_sample_has_the_corners_and_the_ends():
    shape = (3, 17, 40, 50)
    places = sample(shape, 2000)
    assert places.shape == (2000, 4)
    assert bool((places >= 0).all())
    assert bool((places < torch.tensor(shape)).all())
    assert places[0].tolist() == [0, 0, 0, 0]
    assert places[1].tolist() == [2, 16, 39, 49]
    for dim, size in enumerate(shape):
        assert int((places[:, dim] == size - 1).sum()) > 200
    assert torch.equal(places, sample(shape, 2000)), "the same places every time"
    assert sample((2, 3), 10).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", Direction)
def test_right_is_right_and_wrong_is_wrong(direction, dtype):
    problem = ConvProblem.parse("n2 c8 o16 x30x31 k3x3 p1")
    asked = checks.request(problem, direction, dtype)
    first, second = checks.given(asked, checks.reals)[:2]
    expected = exact(problem, direction, first, second)
    algorithm = checks.BY_NAME["im2col"]
    result = checks.result_of(algorithm, asked, first, second)
    verdict = judge(result, expected, algorithm.error(asked))
    assert verdict.right
    assert 0 < verdict.error < math.inf
    assert verdict.units < verdict.allowed
    wrong = checks.result_of(checks.dropping_a_tap(algorithm), asked, first, second)
    assert not judge(wrong, expected, algorithm.error(asked)).right
    result[0, 0] = math.nan  # among them the first corner, which is always looked at
    verdict = judge(result, expected, algorithm.error(asked))
    assert not verdict.right
    assert verdict.error == math.inf


def test_a_type_computed_in_a_narrower_one_is_seen():
    problem = ConvProblem.parse("n1 c8 o8 x12x12 k3x3")
    x, w = torch.randn(problem.input_shape, dtype=torch.float64), torch.randn(problem.weight_shape, dtype=torch.float64)
    expected = exact(problem, Direction.FORWARD, x, w)
    narrow = torch.nn.functional.conv2d(x.float(), w.float()).double()
    assert not judge(
        narrow, expected, checks.BY_NAME["shift"].error(checks.request(problem, Direction.FORWARD, torch.float64))
    ).right


def test_a_gradient_that_misses_an_image_is_wrong():
    """However many places are summed: the claim of the algorithm alone would let it pass."""
    problem = ConvProblem.parse("n1000 c1 o2 x24x24 k3x3 p1")
    asked = checks.request(problem, Direction.GRAD_WEIGHT, torch.float32)
    x, y = (torch.randn(problem.shape_of(role)) for role in ("x", "y"))
    algorithm, expected = checks.BY_NAME["im2col"], exact(problem, Direction.GRAD_WEIGHT, x, y)
    assert judge(checks.result_of(algorithm, asked, x, y), expected, algorithm.error(asked)).right
    y[77] = 0
    assert not judge(checks.result_of(algorithm, asked, x, y), expected, algorithm.error(asked)).right


def test_factors_cut_to_tf32_are_within_the_claim():
    """As matrix units take them: the last 13 bits are not looked at. A tap that is lost is seen all the same."""
    problem = ConvProblem.parse("n2 c64 o64 x14x14 k3x3 p1")
    request = Request(problem, Direction.FORWARD, torch.float32, "cuda", tf32=True)
    x, w = (torch.randn(problem.shape_of(role)) for role in "xw")
    expected = exact(problem, Direction.FORWARD, x, w)
    cut = [(t.view(torch.int32) & -(1 << 13)).view(torch.float32).double() for t in (x, w)]
    claim = checks.BY_NAME["direct"].error(request)
    made = torch.nn.functional.conv2d(*cut, padding=1).float()
    verdict = judge(made, expected, claim)
    assert verdict.right
    assert verdict.units > 1000, "it is off by what an exact product would not be"
    assert not judge(made, expected, checks.BY_NAME["direct"].error(dataclasses.replace(request, tf32=False))).right
    cut[1][..., 2, 2] = 0
    assert not judge(torch.nn.functional.conv2d(*cut, padding=1).float(), expected, claim).right
