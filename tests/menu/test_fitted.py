"""The factors that come with the package are those of algorithms that exist, and plans go by them."""

import dataclasses
import json

import pytest
import torch

from plainconv import bench
from plainconv.menu import ALGORITHMS, fitted
from plainconv.plan import explain_request, plan
from plainconv.problem import ConvProblem, Direction, Request
from plainconv.remember import forget

REQUEST = Request(ConvProblem.parse("n1 c8 o8 x20x20 k3x3"), Direction.FORWARD, torch.float32)


def test_the_file_names_what_there_is():
    model = fitted.model()
    names = {algorithm.name for algorithm in ALGORITHMS}
    assert set(model.suites) | set(model.held_out) <= set(bench.load())
    assert not set(model.suites) & set(model.held_out)
    assert model.held_out
    for key, factor in model.factors.items():
        name, direction, dtype = key.split()
        assert name in names
        assert Direction(direction)
        assert getattr(torch, dtype).is_floating_point
        assert 0.2 < factor < 5
    assert json.loads(fitted.PATH.read_text()) == json.loads(json.dumps(dataclasses.asdict(model)))


def test_a_factor_is_of_one_algorithm_direction_and_type_on_the_cpu(monkeypatch):
    monkeypatch.setattr(fitted, "model", lambda: fitted.Model((), (), {"shift forward float32": 3.0}))
    assert fitted.factor("shift", REQUEST) == 3
    for other in (
        dataclasses.replace(REQUEST, direction=Direction.GRAD_WEIGHT),
        dataclasses.replace(REQUEST, dtype=torch.float64),
        dataclasses.replace(REQUEST, device="cuda"),
    ):
        assert fitted.factor("shift", other) == 1
    assert fitted.factor("im2col", REQUEST) == 1


@pytest.mark.parametrize("favoured", ["shift", "im2col"])
def test_plans_go_by_the_factors(favoured, monkeypatch):
    raw = {a.name: a.cost(REQUEST).seconds for a in ALGORITHMS if a.why_not(REQUEST) is None}
    factors = {fitted.key(name, REQUEST): 1e3 for name in raw if name != favoured}
    monkeypatch.setattr(fitted, "model", lambda: fitted.Model((), (), factors))
    forget()
    try:
        assert plan(REQUEST).algorithm.name == favoured
        (verdict,) = (v for v in explain_request(REQUEST).verdicts if v.algorithm.name == "loops")
        assert verdict.cost.seconds == pytest.approx(1e3 * raw["loops"])
    finally:
        forget()
