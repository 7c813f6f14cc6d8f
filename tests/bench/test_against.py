"""Other libraries: right where they serve, one sentence where they do not."""

import pytest
import torch

from plainconv import bench
from plainconv.bench import against, calls
from plainconv.bench.against import LIBRARIES, call_of
from plainconv.bench.check import exact, judge
from plainconv.bench.peaks import Peaks
from plainconv.bench.suites import Layer
from plainconv.files import InputError
from plainconv.problem import ConvProblem, Direction

PROBLEMS = [
    "n1 c3 o4 x20x23 k3x3 s2x1 p1",
    "n2 c4 o4 x30 k5 d2 p2 g2",
    "n1 c2 o2 x6x7x8 k3x3x3 p1x0x1",
    "n1 c16 o16 x9x9 k3x3 g16",
]


def is_there(name):
    try:
        against.others([name])
    except InputError:
        return False
    return True


@pytest.mark.parametrize("name", [name for name in LIBRARIES if is_there(name)])
@pytest.mark.parametrize("text", PROBLEMS)
def test_what_is_installed_computes_the_same(name, text):
    layer = Layer("s", "l", ConvProblem.parse(text))
    for dtype in LIBRARIES[name].dtypes:
        given = calls.tensors(layer, dtype)
        call = call_of(LIBRARIES[name], layer, given, "forward", len(against.os.sched_getaffinity(0)))
        assert not isinstance(call, str), call
        (result,) = call()
        assert tuple(result.shape) == layer.output_shape
        assert result.dtype == dtype
        assert judge(result, exact(layer.problem, Direction.FORWARD, given.x, given.w), 100.0).right


def test_one_of_them_is_always_there():
    assert is_there("scipy"), "scikit-learn needs it"


def test_a_sentence_for_what_is_not_compared():
    layer = Layer("s", "l", ConvProblem.parse("n1 c3 o4 x9 k3"))
    scipy = LIBRARIES["scipy"]
    given = calls.tensors(layer, torch.float32)
    assert "gradients" in call_of(scipy, layer, given, "grad_input", 1)
    assert "not in bfloat16" in call_of(scipy, layer, calls.tensors(layer, torch.bfloat16), "forward", 1)
    wide = Layer("s", "l", ConvProblem.parse("n1 c32 o32 x9 k3"))
    assert "1024 pairs" in call_of(scipy, wide, calls.tensors(wide, torch.float32), "forward", 1)

    def no(*_):
        raise ValueError("not\nthis")

    assert call_of(against.Library(no, {}), layer, given, "forward", 1) == "it refuses: not this"


def test_names_and_packages(monkeypatch):
    with pytest.raises(InputError, match=r"^unknown library 'mkl'; libraries are onnxruntime, openvino, jax"):
        against.others(["mkl"])
    monkeypatch.setattr(against.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^--against opencv needs opencv-python-headless, which is not installed"):
        against.others(["opencv"])


def test_it_takes_turns_with_ours():
    layer = Layer("s", "l", ConvProblem.parse("n1 c3 o4 x9 k3"))
    peaks = Peaks(1e11, ((1 << 15, 1e-6), (1 << 28, 1e-2)), 1e-6)
    given = bench.Setting("forward", torch.float32, 1, peaks, seconds=0.0, against=against.others(["scipy"]))
    row = bench.measure(layer, given)
    assert set(row.against) == {"ours", "scipy"}
    assert row.ratio_to("scipy") == row.against["scipy"].median_s / row.against["ours"].median_s
    assert row.ratio_to("onnxruntime") is None
    assert "l: scipy" in bench.table([row])
    wrong = against.Library(lambda *_: lambda: (torch.zeros(1, 4, 7),), {})
    row = bench.measure(layer, bench.Setting("forward", torch.float32, 1, peaks, seconds=0.0, against={"zero": wrong}))
    assert row.against == {"zero": "its result is wrong"}
    assert "l: zero: its result is wrong" in bench.table([row])
