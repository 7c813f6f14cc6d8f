"""Views with irregular strides, inside larger memory that ends or begins with them: no kernel touches what is outside.

One problem for each kernel; contiguous tensors, tables and workspaces are placed so in the tests of the kernels.
"""

import sys

import pytest
import torch
from checks import BY_NAME, FOURIER, channels_last, compare, given, product_of_lines, reals, request
from guarded import far_apart, guarded, guarded_view

from plainconv.cpu import compile as cpu
from plainconv.menu.base import Tensors
from plainconv.problem import ConvProblem, Direction

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

# A kernel, and what sends it to the edges: borders, tails of channels and of rows, a stride.
KERNELS = {
    "direct": "n2 c5 o19 x9x21 k3x3 s2x1 p1",
    "pointwise": "n2 c7 o19 x9x21 k1x1",
    "narrow": "n2 c3 o5 x9x37 k3x3 p1",
    "depthwise": "n2 c19 o19 x9x37 k3x3 s1x2 p1 g19",
    "narrow, lanes of groups": "n2 c16 o16 x9x21 k3x3 s1x2 p1 g4",
    "separable": "n2 c3 o3 x19x37 k5x3 p1 g3",
    "fft": "n2 c5 o19 x19x21 k5x5 p2",
}
MAY_REFUSE = ("narrow", "narrow, lanes of groups", "separable", "fft")  # a layout, a direction or half types

VIEWS = {
    "a window": guarded_view,
    "a window of pixels": lambda t, at_end: guarded_view(t.movedim(1, -1), at_end=at_end).movedim(-1, 1),
    "every third element": lambda t, at_end: guarded_view(t, at_end=at_end, step=3),
    "inner ones first": lambda t, at_end: guarded_view(t.mT, at_end=at_end, step=2).mT,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("name", KERNELS)
def test_nothing_outside_a_view_is_touched(name, direction, last, dtype, view):
    check_view(name, KERNELS[name], direction, last, dtype, view)


FAR = KERNELS | {"winograd": "n2 c5 o19 x9x21 k3x3 p1"}


@pytest.mark.skipif(sys.platform != "linux", reason="memory that is only taken where it is touched")
@pytest.mark.parametrize("dim", range(4), ids=["images", "channels", "rows", "pixels"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("name", FAR)
def test_offsets_beyond_two_to_the_31(name, direction, last, dim):
    check_view(name, FAR[name], direction, last, torch.float32, lambda t, at_end: far_apart(t, dim))


def check_view(name, text, direction, last, dtype, view):
    algorithm = FOURIER if name == "fft" else BY_NAME[name.split(",")[0]]
    asked = request(ConvProblem.parse(text), direction, dtype, channels_last=last)
    if algorithm.why_not(asked) is not None:
        assert name in MAY_REFUSE
        pytest.skip(algorithm.why_not(asked))
    for at_end in (True, False):
        first, second = given(asked, reals)[:2]
        second = product_of_lines(second) if name == "separable" else second
        first, second = (view(tensor, at_end=at_end) for tensor in (first, second))
        out = torch.full(asked.problem.shape_of(direction.makes), torch.nan, dtype=dtype)
        out = channels_last(out) if last else out
        workspace = torch.full((algorithm.cost(asked).workspace,), 0xFF, dtype=torch.uint8)
        algorithm.run(asked, Tensors(first, second), out, guarded(workspace, at_end=at_end))
        compare(algorithm, asked, out, first, second, to_the_bit=False)
