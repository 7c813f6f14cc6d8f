"""max_workspace, allow_builtin, precision: by call, by layer and for the process; they stay with a call's gradients."""

import inspect
from dataclasses import replace

import pytest
import torch
from checks import BY_NAME, request

import plainconv
from plainconv import plan as plans
from plainconv import settings
from plainconv.menu.base import AlgorithmRefused, sum_error
from plainconv.plan import plan
from plainconv.problem import DEFAULT_MAX_WORKSPACE, ConvProblem, Direction

NAMES = [f"{family}{dims}d" for family in ("conv", "conv_transpose") for dims in (1, 2, 3)]
names = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setattr(settings, "current", settings.Settings())


def asked(served):
    return [plan.request for plan, _ in served]


def limits(request):
    return request.max_workspace, request.allow_builtin, request.precision


def tensors(name: str, requires_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    dims = int(name[-2])
    return tuple(torch.randn(2, 2, *(k,) * dims).requires_grad_(requires_grad) for k in (6, 3))


# -- where they are said ---------------------------------------------------------------------------------------------


def test_at_first():
    assert plainconv.get_max_workspace() == DEFAULT_MAX_WORKSPACE == 1 << 30
    assert plainconv.get_allow_builtin() is False
    assert plainconv.get_precision() == "high"


@names
def test_every_function_and_layer_takes_them_and_its_gradients_keep_them(name, served):
    function = getattr(plainconv, name)
    x, w = tensors(name, requires_grad=True)
    said = {"max_workspace": 1 << 16, "allow_builtin": True, "precision": "highest"}
    layer = getattr(plainconv.nn, name.replace("conv", "Conv").replace("_t", "T"))(2, 2, 3, **said)
    assert repr(layer).endswith(", max_workspace=65536, allow_builtin=True, precision=highest)")
    for call in (lambda: function(x, w, **said), lambda: layer(x)):
        served.clear()
        y = call()
        plainconv.set_max_workspace(1 << 20)  # what is set in between is for other calls
        y.sum().backward()
        plainconv.set_max_workspace(DEFAULT_MAX_WORKSPACE)
        assert len(served) == 3
        assert {limits(request) for request in asked(served)} == {(1 << 16, True, "highest")}
    served.clear()
    function(x, w)
    assert {limits(request) for request in asked(served)} == {(1 << 30, False, "high")}


@names
def test_the_process_speaks_where_the_call_does_not(name, served):
    function, (x, w) = getattr(plainconv, name), tensors(name)
    plainconv.set_max_workspace(12345)
    plainconv.set_allow_builtin(True)
    plainconv.set_precision("highest")
    assert (plainconv.get_max_workspace(), plainconv.get_allow_builtin()) == (12345, True)
    assert plainconv.get_precision() == "highest"
    function(x, w)
    function(x, w, max_workspace=0, allow_builtin=False, precision="high")
    assert [limits(request) for request in asked(served)] == [(12345, True, "highest"), (0, False, "high")]


@names
def test_they_are_keywords_that_are_none(name):
    parameters = inspect.signature(getattr(plainconv, name)).parameters
    for argument in ("max_workspace", "allow_builtin", "precision"):
        assert (parameters[argument].kind, parameters[argument].default) == (inspect.Parameter.KEYWORD_ONLY, None)


def test_lazy_layers_keep_them():
    layer = plainconv.nn.LazyConv2d(4, 3, max_workspace=0, allow_builtin=True, precision="highest")
    layer(torch.randn(1, 2, 5, 5))
    assert type(layer) is plainconv.nn.Conv2d
    assert (layer.max_workspace, layer.allow_builtin, layer.precision) == (0, True, "highest")


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ({"max_workspace": -1}, ValueError, "max_workspace must be 0 or more bytes, and fit 64 bits, but got -1"),
        ({"max_workspace": 1.5}, TypeError, "max_workspace must be an int, a number of bytes, but got 1.5"),
        ({"max_workspace": True}, TypeError, "max_workspace must be an int, a number of bytes, but got True"),
        ({"allow_builtin": 1}, TypeError, "allow_builtin must be True or False, but got 1"),
        ({"precision": "medium"}, ValueError, "precision must be 'highest' or 'high', but got 'medium'"),
        ({"precision": 1}, ValueError, "precision must be 'highest' or 'high', but got 1"),
    ],
    ids=str,
)
def test_wrong_ones_are_one_sentence(said, error, words):
    x, w = tensors("conv2d")
    (key, value), *_ = said.items()
    for call in (
        lambda: plainconv.conv2d(x, w, **said),
        lambda: plainconv.explain(x, w, **said),
        lambda: plainconv.nn.Conv2d(2, 2, 3, **said),
        lambda: plainconv.nn.LazyConv2d(2, 3, **said),
        lambda: getattr(plainconv, f"set_{key}")(value),
    ):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == words
    assert settings.current == settings.Settings()


# -- what they do ----------------------------------------------------------------------------------------------------


def test_max_workspace_refuses_by_name_and_excludes_from_auto(served):
    x, w = torch.randn(1, 8, 40, 40), torch.randn(8, 8, 3, 3)
    with pytest.raises(AlgorithmRefused, match=r"it needs .* of workspace, and 16 B are allowed"):
        plainconv.conv2d(x, w, algorithm="im2col", max_workspace=16)
    y = plainconv.conv2d(x, w, max_workspace=0)
    name = served[-1][0].algorithm.name
    assert BY_NAME[name].cost(served[-1][0].request).workspace == 0
    torch.testing.assert_close(y, plainconv.conv2d(x, w), rtol=1e-4, atol=1e-4)


def test_builtin_serves_where_it_is_allowed(served):
    x, w = torch.randn(1, 8, 40, 40), torch.randn(8, 8, 3, 3)
    with pytest.raises(AlgorithmRefused, match=r"allow_builtin=True, or plainconv\.set_allow_builtin\(True\)"):
        plainconv.conv2d(x, w, algorithm="builtin")
    y = plainconv.conv2d(x, w, algorithm="builtin", allow_builtin=True)
    assert served[-1][0].algorithm.name == "builtin"
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w))


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize(
    "text", ["n2 c64 o64 x28x28 k3x3 p1", "n1 c16 o16 x60 k3", "n1 c8 o8 x9x9x9 k3x3x3 p1", "n1 c1 o1 x900 k400 p200"]
)
def test_highest_lets_nothing_in_that_may_be_off_by_more_than_a_plain_sum(text, direction):
    asked = request(ConvProblem.parse(text), direction, torch.float32, precision="highest")
    for verdict in plans.ask(asked):
        if verdict.cost is not None:
            assert verdict.algorithm.error(asked) <= sum_error(asked)
    high = [v.algorithm for v in plans.ask(replace(asked, precision="high")) if v.cost]
    highest = [v.algorithm for v in plans.ask(asked) if v.cost]
    assert set(highest) < set(high)
    with pytest.raises(AlgorithmRefused, match=r"times that of a plain sum, and precision='highest' allows no more"):
        plan(asked, "fft")


def test_highest_keeps_torchs_own_from_rounding_to_tf32():
    problem = ConvProblem.parse("n1 c4 o4 x9x9 k3x3 p1")
    asked = request(problem, Direction.FORWARD, torch.float32, allow_builtin=True, precision="highest")
    builtin = BY_NAME["builtin"]
    assert builtin.why_not(asked) is None
    assert "round float32 to TF32" in builtin.why_not(replace(asked, device="cuda"))
    assert builtin.why_not(replace(asked, device="cuda", dtype=torch.float64)) is None


@pytest.mark.parametrize("name", ["shift", "im2col", "fft"])
def test_highest_lets_in_no_products_that_a_switch_may_round(name):
    problem = ConvProblem.parse("n1 c4 o4 x9x9 k3x3 p1")
    asked = request(problem, Direction.FORWARD, torch.float32, precision="highest")
    why_not = BY_NAME[name].why_not
    assert why_not(asked) is None
    assert "torch.matmul's, which may round float32 to TF32" in why_not(replace(asked, device="cuda"))
    assert why_not(replace(asked, device="cuda", dtype=torch.float64)) is None
    assert why_not(replace(asked, device="cuda", precision="high")) is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.complex64])
def test_highest_lets_the_definition_in(dtype):
    x, w = torch.ones(1, 4, 5, 5, dtype=dtype), torch.ones(2, 4, 4, 4, dtype=dtype)
    for name in ("loops", "reference"):
        assert (plainconv.conv2d(x, w, algorithm=name, precision="highest") == 64).all()


def test_highest_makes_smaller_tiles(served):
    """Of F(4,3) and F(2,3), with more of the digits."""
    x, w = torch.randn(1, 64, 28, 28, dtype=torch.float64), torch.randn(64, 64, 3, 3, dtype=torch.float64)
    exact = plainconv.conv2d(x, w, padding=1, algorithm="direct")
    errors = [
        (plainconv.conv2d(x.float(), w.float(), padding=1, precision=precision) - exact).norm() / exact.norm()
        for precision in ("high", "highest")
    ]
    assert [plan.algorithm.name for plan, _ in served[1:]] == ["winograd", "winograd"]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("direction", list(Direction))
def test_builtin_is_never_among_those_auto_chooses_from_unless_allowed(direction, monkeypatch):
    """However good its estimate is."""
    fast = BY_NAME["builtin"].cost
    monkeypatch.setattr(
        plans,
        "ALGORITHMS",
        tuple(
            type(a)(a.name, a.why_not, lambda r: fast(r)._replace(seconds=1e-12), a.error, a.run)
            if a.name == "builtin"
            else a
            for a in plans.ALGORITHMS
        ),
    )
    plan.cache_clear()
    problem = ConvProblem.parse("n1 c4 o4 x9x9 k3x3 p1")
    assert plan(request(problem, direction, torch.float32)).algorithm.name != "builtin"
    assert plan(request(problem, direction, torch.float32, allow_builtin=True)).algorithm.name == "builtin"
    plan.cache_clear()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n1 c1 o1 x9 k3 p1 mreflect", "pads with zeros, and the padding mode is reflect"),
        ("n1 c1 o1 x9 k3 p1:0", "pads both sides alike"),
        ("n1 c1 o1 x9 k3 p-1", "does not crop"),
        ("n1 c1 o1 x5x5x5x5 k1x1x1x1", "at most three dimensions"),
        ("n1 c3 o4 x8x8 k3x3 s1099511627776", "count in 32 bits"),
    ],
)
def test_what_builtin_refuses(text, words):
    for direction in Direction:
        asked = request(ConvProblem.parse(text), direction, torch.float32, allow_builtin=True)
        assert words in BY_NAME["builtin"].why_not(asked)
    integers = request(ConvProblem.parse("n1 c1 o1 x9 k3"), Direction.FORWARD, torch.int8, allow_builtin=True)
    assert "for floating types, not int8" in BY_NAME["builtin"].why_not(integers)


def test_explain_knows_them():
    x, w = tensors("conv2d")
    told = plainconv.explain(x, w, max_workspace=7, allow_builtin=True, precision="highest", direction="grad_weight")
    assert limits(told.request) == (7, True, "highest")
    assert str(told.request).endswith(", max_workspace=7, precision=highest")
    assert "serves only where it is allowed" in str(plainconv.explain(x, w))
    assert "serves only where it is allowed" not in str(told)


# -- traced ----------------------------------------------------------------------------------------------------------


def test_compiled_calls_and_their_gradients_carry_them(served):
    def step(x, w):
        return plainconv.conv2d(x, w, max_workspace=1 << 16, allow_builtin=True, precision="highest")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (6, 7):
        x, w = torch.randn(2, 2, size, 6, requires_grad=True), torch.randn(2, 2, 3, 3, requires_grad=True)
        served.clear()
        compiled(x, w).sum().backward()
        assert len(served) == 3
        assert {limits(request) for request in asked(served)} == {(1 << 16, True, "highest")}


def test_a_compiled_call_follows_the_process(served):
    compiled = torch.compile(plainconv.conv2d, fullgraph=True, backend="eager")
    x, w = tensors("conv2d")
    compiled(x, w)
    plainconv.set_max_workspace(4321)
    compiled(x, w)
    assert [request.max_workspace for request in asked(served)] == [1 << 30, 4321]


def test_an_exported_program_keeps_them(served):
    layer = plainconv.nn.Conv2d(2, 2, 3, max_workspace=1 << 16, allow_builtin=True, precision="highest")
    x = torch.randn(1, 2, 6, 6)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    assert {limits(request) for request in asked(served)} == {(1 << 16, True, "highest")}
