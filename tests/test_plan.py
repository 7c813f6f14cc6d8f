"""Which algorithm serves a call, and what is said about it."""

import dataclasses
import inspect
import re
import warnings

import pytest
import torch
from checks import BY_NAME, DIRECTIONS, problems, request
from hypothesis import given, settings
from hypothesis import strategies as st

import plainconv
from plainconv import plan as plans
from plainconv.menu import ALGORITHMS, fitted
from plainconv.menu.base import DTYPES, INTEGERS, AlgorithmRefused, Tensors
from plainconv.plan import check_algorithm, explain_request, plan
from plainconv.problem import ConvProblem, Direction, Request
from plainconv.timing import duration

SMALL = ConvProblem.parse("n1 c2 o3 x8x8 k3x3 p1")
directions = pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda direction: direction.value)


@pytest.fixture
def forget():
    plans.plan.cache_clear()
    yield
    plans.plan.cache_clear()


# -- threads ---------------------------------------------------------------------------------------------------------


@directions
def test_a_small_call_wakes_no_other_threads(direction):
    small, large = ConvProblem.parse("n1 c32 o32 x32 k2"), ConvProblem.parse("n4 c64 o64 x4000 k3")
    for problem, threads in ((small, 1), (large, 2)):
        asked = Request(problem, direction, torch.float32, threads=2)
        assert plan(asked).request == dataclasses.replace(asked, threads=threads)
        assert plan(asked).cost.seconds <= plan(dataclasses.replace(asked, threads=1)).cost.seconds


# -- names -----------------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_menu():
    assert plainconv.algorithms() == (
        *("loops", "shift", "im2col", "fft", "narrow", "depthwise", "separable", "direct", "pointwise", "winograd"),
        *("builtin", "reference"),
    )


@pytest.mark.parametrize("name", ["auto", *plainconv.algorithms()])
def test_every_name_is_taken(name):
    check_algorithm(name)


@pytest.mark.parametrize("name", ["Shift", "", "cook", "auto "])
def test_a_name_that_does_not_exist_is_a_value_error_that_lists_those_that_do(name):
    for call in (
        lambda: check_algorithm(name),
        lambda: plan(request(SMALL, Direction.FORWARD, torch.float32), name),
        lambda: plainconv.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2), algorithm=name),
        lambda: plainconv.nn.Conv2d(1, 1, 2, algorithm=name),
    ):
        with pytest.raises(ValueError, match="does not exist") as caught:
            call()
        assert repr(name) in str(caught.value)
        assert f"choose one of auto, {', '.join(plainconv.algorithms())}" in str(caught.value)


@directions
@pytest.mark.parametrize("name", plainconv.algorithms())
def test_a_name_forces_its_algorithm(name, direction):
    asked = request(SMALL, direction, torch.float32)
    if BY_NAME[name].why_not(asked):
        with pytest.raises(AlgorithmRefused):
            plan(asked, name)
        return
    chosen = plan(asked, name)
    assert chosen.algorithm is BY_NAME[name]
    cost = BY_NAME[name].cost(chosen.request)
    assert chosen.cost == cost._replace(seconds=cost.seconds * fitted.factor(name, chosen.request))


# -- refusals --------------------------------------------------------------------------------------------------------


@directions
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_fft_refuses_integers_with_its_sentence(dtype, direction):
    asked = request(SMALL, direction, dtype)
    with pytest.raises(AlgorithmRefused) as caught:
        plan(asked, "fft")
    assert f"algorithm='fft' refuses {asked}: the Fourier transform rounds" in str(caught.value)


def test_the_refusal_reaches_the_caller_of_a_function():
    with pytest.raises(AlgorithmRefused, match="the Fourier transform rounds"):
        plainconv.conv2d(*torch.ones(2, 1, 1, 3, 3, dtype=torch.int32), algorithm="fft")
    assert issubclass(AlgorithmRefused, RuntimeError)


def test_matrix_products_of_integers_are_refused_on_cuda():
    asked = request(SMALL, Direction.FORWARD, torch.int32, device="cuda")
    for name in ("shift", "im2col"):
        with pytest.raises(AlgorithmRefused, match=r"no matrix product of torch\.int32 on CUDA"):
            plan(asked, name)


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_loops_is_taken_only_where_it_is_named(dtype, direction):
    """It waits for values, and computes on the CPU: no graph captures it."""
    for products in (1, 2, 5, 10, 30, 100, 300):
        asked = request(ConvProblem.parse(f"n1 c1 o1 x{products} k1"), direction, dtype, device="cuda")
        told = plans.explain_request(asked)
        assert "loops" not in {told.chosen, told.chosen_packed}
        assert plans.explain_request(asked, "loops").chosen == "loops"
        (loops,) = (verdict for verdict in plans.ask(dataclasses.replace(asked, device="cpu")) if is_loops(verdict))
        assert loops.may_be_chosen


def is_loops(verdict):
    return verdict.algorithm.name == "loops"


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16, torch.float8_e4m3fn], ids=str)
def test_a_type_that_plainconv_does_not_know_is_named_beside_those_it_knows(dtype):
    with pytest.raises(NotImplementedError, match=r"not implemented for torch\.\w+; it knows float64, float32"):
        plan(request(SMALL, Direction.FORWARD, dtype))


def test_an_algorithm_that_raises_is_a_bug_that_is_seen(monkeypatch, forget):
    def broken(asked):
        raise ZeroDivisionError("a bug")

    menu = (*ALGORITHMS[:1], dataclasses.replace(ALGORITHMS[1], why_not=broken), *ALGORITHMS[2:])
    monkeypatch.setattr(plans, "ALGORITHMS", menu)
    with pytest.raises(ZeroDivisionError):
        plan(request(SMALL, Direction.FORWARD, torch.float32))


# -- auto ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    problem=problems(),
    direction=st.sampled_from(DIRECTIONS),
    dtype=st.sampled_from(DTYPES),
    device=st.sampled_from(("cpu", "cuda")),
    max_workspace=st.sampled_from((0, 1 << 10, 1 << 20, 1 << 30)),
)
def test_auto_never_fails_and_takes_the_least_estimate(problem, direction, dtype, device, max_workspace):
    asked = request(problem, direction, dtype, device=device, max_workspace=max_workspace)
    chosen = plan(asked)
    able = [verdict for verdict in plans.ask(asked) if verdict.may_be_chosen]
    assert chosen.cost.seconds == min(verdict.cost.seconds for verdict in able)
    assert chosen.cost.workspace <= max_workspace


@directions
def test_max_workspace_excludes(direction):
    asked = request(SMALL, direction, torch.float32)
    needs = {name: BY_NAME[name].cost(asked).workspace for name in ("shift", "im2col", "fft")}
    assert all(needs.values())
    for name in needs:
        tight = dataclasses.replace(asked, max_workspace=16)
        with pytest.raises(AlgorithmRefused, match=r"it needs .* of workspace, and 16 B are allowed"):
            plan(tight, name)
        assert plan(tight).cost.workspace <= 16


def test_a_large_kernel_and_a_small_one_are_served_differently():
    """The estimates must be able to tell: a picture under a 3x3 kernel, and under one of 101x101."""
    small = plan(request(ConvProblem.parse("n1 c3 o3 x512x512 k3x3 p1"), Direction.FORWARD, torch.float32))
    large = plan(request(ConvProblem.parse("n1 c3 o3 x512x512 k101x101 p50"), Direction.FORWARD, torch.float32))
    assert small.algorithm.name in ("shift", "im2col", "narrow")
    assert large.algorithm.name == "fft"


def test_choices_do_not_depend_on_values():
    """A request has no tensor in it, and nothing else is asked."""
    fields = {field.name: field.type for field in dataclasses.fields(Request)}
    assert not any("Tensor" in str(kind) for kind in fields.values())
    assert list(inspect.signature(plan.__wrapped__).parameters) == ["request", "name"]
    w = torch.ones(3, 2, 3, 3)
    said = {str(plainconv.explain(x, w, padding=1)) for x in (torch.zeros(1, 2, 8, 8), torch.full((1, 2, 8, 8), 1e30))}
    assert len(said) == 1


def test_a_plan_is_made_once(monkeypatch, forget):
    calls = []
    real = plans.ask
    monkeypatch.setattr(plans, "ask", lambda asked: calls.append(asked) or real(asked))
    asked = request(SMALL, Direction.FORWARD, torch.float32)
    assert plan(asked) is plan(request(ConvProblem.parse(str(SMALL)), Direction.FORWARD, torch.float32))
    assert calls == [asked]
    plan(dataclasses.replace(asked, channels_last=True))
    assert len(calls) == 2


def test_a_plan_runs():
    asked = request(SMALL, Direction.FORWARD, torch.float32, has_bias=True)
    x, w, bias = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3), torch.randn(3)
    out = torch.full((1, 3, 8, 8), float("nan"))
    plan(asked)(Tensors(x, w, bias), out)
    torch.testing.assert_close(out, torch.nn.functional.conv2d(x, w, bias, padding=1))


# -- warnings --------------------------------------------------------------------------------------------------------


def test_scratch_memory_is_kept_for_the_next_call_and_lent_to_one_at_a_time(monkeypatch):
    """A call in the middle of another (a signal handler, a finaliser) gets memory of its own."""
    seen = []

    def run(request, tensors, out, workspace):
        assert len(workspace) >= 1000
        workspace[:1000] = len(seen)
        seen.append(workspace.data_ptr())
        mine = len(seen) - 1
        if mine == 1:
            chosen(Tensors(x, x), y)
        assert (workspace[:1000] == mine).all()
        out.fill_(0)

    problem = ConvProblem.parse("n1 c1 o1 x1 k1")
    asked = Request(problem, Direction.FORWARD, torch.float32)
    algorithm = dataclasses.replace(BY_NAME["shift"], run=run, bind=None)
    cost = algorithm.cost(asked)._replace(workspace=1000)
    chosen, x, y = plans.Plan(asked, algorithm, cost), torch.ones(1, 1, 1), torch.empty(1, 1, 1)
    for _ in range(3):
        chosen(Tensors(x, x), y)
    assert seen[0] == seen[1] != seen[2]


def only_the_reference(problem):
    """A request for which nothing but the reference is quick enough to be chosen."""
    return request(problem, Direction.FORWARD, torch.int32, device="cuda")


def test_the_reference_warns_once_when_it_has_much_to_do(forget):
    much = only_the_reference(ConvProblem.parse("n64 c16 o16 x64x64 k3x3 p1"))
    assert much.problem.multiplies > 1e8
    with pytest.warns(UserWarning, match=r"reference has 6\.0e\+08 multiplies.*plainconv\.explain"):
        assert plan(much).algorithm.name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(much)


def test_no_warning_for_little_work_or_when_it_was_asked_for(forget):
    little = only_the_reference(ConvProblem.parse("n1 c8 o8 x32x32 k3x3 p1"))
    much = only_the_reference(ConvProblem.parse("n64 c16 o16 x64x64 k3x3 p1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan(little).algorithm.name == "reference"
        plan(much, "reference")


# -- explain ---------------------------------------------------------------------------------------------------------


def lines(explanation):
    return {line.split()[0]: line for line in str(explanation).splitlines()[2:]}


@directions
def test_the_table_has_every_algorithm_and_one_choice(direction):
    asked = request(SMALL, direction, torch.float32)
    explanation = explain_request(asked)
    head, columns, *_ = str(explanation).splitlines()
    assert head == str(asked)
    assert columns.split() == ["algorithm", "estimate", "measured", "prepacked", "workspace"]
    table = lines(explanation)
    assert tuple(table) == plainconv.algorithms()
    assert [name for name, line in table.items() if line.endswith("<- chosen")] == [explanation.chosen]
    assert explanation.chosen == plan(asked).algorithm.name
    assert repr(explanation) == str(explanation)


def test_the_table_has_the_sentence_why_not():
    table = lines(explain_request(request(SMALL, Direction.FORWARD, torch.int8, max_workspace=0)))
    assert "the Fourier transform rounds, and torch.int8 must be exact" in table["fft"]
    assert "of workspace, and 0 B are allowed" in table["shift"]
    assert table["fft"].split()[1:5] == ["-", "-", "-", "-"]


def test_the_table_tells_prepacked_from_plain():
    asked = request(ConvProblem.parse("n4 c256 o256 x28x28 k3x3 p1"), Direction.FORWARD, torch.float32)
    explanation = explain_request(asked)
    packed = {verdict.algorithm.name: verdict.seconds for verdict in explanation.packed if verdict.cost}
    plain = {verdict.algorithm.name: verdict.seconds for verdict in explanation.verdicts}
    assert packed["winograd"] < plain["winograd"]
    assert set(packed) == {"direct", "winograd", "fft"}
    table = lines(explanation)
    assert duration(packed["winograd"]) in table["winograd"]
    assert re.search(r"ms +- +- +[\d.]+ MiB$", table["im2col"])
    fast = plainconv.prepack(torch.zeros(256, 256, 3, 3), (4, 256, 28, 28), padding=1)
    assert explanation.chosen_packed == fast.algorithm
    assert explain_request(request(SMALL, Direction.GRAD_WEIGHT, torch.float32)).packed == ()


def test_the_table_of_a_forced_algorithm():
    assert explain_request(request(SMALL, Direction.FORWARD, torch.float32), "loops").chosen == "loops"
    refused = explain_request(request(SMALL, Direction.FORWARD, torch.int8), "fft")
    assert refused.chosen == ""
    assert "chosen" not in str(refused)


def test_explain_asks_about_the_very_call_and_its_gradients():
    x, w, bias = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3), torch.randn(3)
    said = plainconv.explain(x, w, bias, padding=1)
    assert said.request == request(SMALL, Direction.FORWARD, torch.float32, has_bias=True)
    assert plainconv.explain(x, w, bias, padding=1, direction="grad_weight").request.direction is Direction.GRAD_WEIGHT
    mirrored = plainconv.explain(torch.randn(1, 3, 8, 8), w, padding=1, transposed=True)
    assert mirrored.request == request(SMALL, Direction.GRAD_INPUT, torch.float32)
    with pytest.raises(ValueError, match="does not exist"):
        plainconv.explain(x, w, algorithm="none")
    with pytest.raises(RuntimeError, match="expected input"):
        plainconv.explain(torch.randn(1, 5, 8, 8), w)


def test_explain_computes_nothing(monkeypatch):
    def run(*_):
        raise AssertionError("explain ran an algorithm")

    monkeypatch.setattr(plans.Plan, "bind", run)
    x = torch.randn(1, 2, 8, 8)
    before = x.clone()
    plainconv.explain(x, torch.randn(3, 2, 3, 3))
    assert torch.equal(x, before)
