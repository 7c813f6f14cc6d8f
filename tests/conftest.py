"""Settings for every test: hypothesis repeats the same examples in every run, and times nothing.

One thread: the tensors are tiny, and threads that wait for each other made these tests eight times slower.
"""

import hypothesis
import pytest
import torch

from plainconv import measure
from plainconv import plan as plans
from plainconv.cpu import compile as compiler

hypothesis.settings.register_profile("plainconv", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("plainconv")
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _caches_in_folders_of_the_tests(tmp_path_factory):
    """No test reads or fills the user's cache."""
    with compiler.kept_in(tmp_path_factory.mktemp("kernels")), measure.kept_in(tmp_path_factory.mktemp("records")):
        yield


@pytest.fixture
def served(monkeypatch):
    """What runs, in order: the plan and its tensors."""
    seen, real = [], plans.Plan.bind

    def bind(plan, tensors):
        call = real(plan, tensors)

        def watched(tensors, out):
            seen.append((plan, tensors))
            call(tensors, out)

        return watched

    plans.forget()  # calls that were bound before
    monkeypatch.setattr(plans.Plan, "bind", bind)
    yield seen
    plans.forget()


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
