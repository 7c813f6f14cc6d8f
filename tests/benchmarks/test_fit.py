"""Fitting on choices whose best factors are known beforehand."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from plainconv.menu import fitted

ROOT = Path(__file__).parent.parent.parent
spec = importlib.util.spec_from_file_location("fit", ROOT / "benchmarks" / "fit.py")
fit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fit)


def choice(**seconds):
    return fit.Choice(
        {name: (math.log(estimate), math.log(measured)) for name, (estimate, measured) in seconds.items()}
    )


def test_regret_is_of_the_one_with_the_least_estimate():
    one = choice(a=(1.0, 4.0), b=(2.0, 2.0))
    assert one.regret({}) == pytest.approx(math.log(2))
    assert one.regret({"a": math.log(3)}) == 0
    assert one.off({"a": math.log(3)}) == pytest.approx([math.log(4 / 3), 0])


def test_the_factors_rank_as_the_measurements_do():
    known = [choice(a=(1.0 * k, 2.0 * k), b=(1.5 * k, 1.5 * k)) for k in (1, 2, 3)]
    factors = fit.fit(known)
    assert fit.loss(known, factors) < fit.loss(known, {})
    assert all(one.regret(factors) == 0 for one in known)


def test_where_everything_ranks_well_factors_only_follow_the_times():
    known = [choice(a=(1.0 * k, 1.2 * k), b=(10.0 * k, 10.0 * k)) for k in (1, 2, 3)]
    factors = fit.fit(known)
    assert math.exp(factors["a"]) == pytest.approx(1.2, rel=fit.STEP - 1)
    assert factors["b"] == 0


def test_the_records_of_the_repository_are_read():
    known = list(fit.samples(fit.RECORDS))
    assert {sample.request.dtype for sample in known} >= {torch.float32}
    assert any(len(sample.seconds) > 1 for sample in known)
    keys = {fitted.key(name, sample.request) for sample in known for name in sample.seconds}
    assert keys >= set(fitted.model().factors), "make fit wrote these factors from other records"
