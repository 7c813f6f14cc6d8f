"""How the GPU's launches are counted; nothing is launched."""

import dataclasses
import math
from importlib.metadata import PackageNotFoundError
from unittest import mock

import pytest
import torch
from checks import BY_NAME
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plainconv.gpu import launch, rows
from plainconv.menu import fft
from plainconv.menu.base import Tensors, kept_tensor
from plainconv.plan import plan
from plainconv.problem import ConvProblem, Direction, Request
from plainconv.remember import forget


def asked(text, direction=Direction.FORWARD, **more):
    return Request(ConvProblem.parse(text), direction, torch.float32, "cuda", **more)


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "text",
    ["n2 c3 o0 x8x8 k3x3", "n2 c0 o3 x8x8 k3x3", "n0 c3 o4 x8x8 k3x3", "n2 c4 o0 x8x8 k3x3 g4", "n2 c1 o0 x8 k3"],
)
def test_tensors_without_elements_have_a_cost(text, last, direction, monkeypatch):
    monkeypatch.setattr(launch, "why_not", lambda gpu: None)
    for name in ("direct", "narrow", "depthwise"):
        request = asked(text, direction, channels_last=last)
        if BY_NAME[name].why_not(request) is None:
            assert BY_NAME[name].cost(request).seconds > 0


def test_gpus_that_are_too_old_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "_no_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(8, 0), (7, 5), (12, 0)].__getitem__)
    for gpu, able in enumerate((True, False, True)):
        request = asked("n1 c64 o64 x8x8 k3x3", gpu=gpu)
        sentence = BY_NAME["direct"].why_not(request)
        assert sentence is None if able else "8.0 or newer, and cuda:1 has 7.5" in sentence
        assert (plan(request).algorithm.name == "direct") == able, "each GPU has its own plan"
    forget()


@pytest.fixture
def looked_for_again():
    """Triton and a compiler, before the test and after it."""
    for found in (launch._no_triton, launch._no_compiler):
        found.cache_clear()
    yield
    for found in (launch._no_triton, launch._no_compiler):
        found.cache_clear()


@pytest.mark.usefixtures("looked_for_again")
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("shutil.which", lambda name: None, "install gcc, or name one in CC"),
        ("torch.version.hip", "6.4", "this is torch for ROCm"),
        ("importlib.metadata.version", lambda name: "3.5.1", "3.5.1 is installed"),
        ("importlib.metadata.version", mock.Mock(side_effect=PackageNotFoundError), "plainconv[gpu]"),
    ],
)
def test_machines_that_cannot_launch_are_refused(name, value, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (9, 0))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(name, value)
    assert words in BY_NAME["direct"].why_not(asked("n1 c64 o64 x8x8 k3x3"))


def test_more_programs_than_a_launch_may_have_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "why_not", lambda gpu: None)
    for batch, able in ((500_000, True), (600_000, False)):
        request = asked(f"n{batch} c4096 o4096 x1 k1 g4096")
        sentence = BY_NAME["depthwise"].why_not(request)
        assert sentence is None if able else "at most 2147483647 tiles" in sentence


class Watched(TorchDispatchMode):
    """Notes operations that wait for values, or whose results lie elsewhere."""

    def __init__(self, device):
        super().__init__()
        self.device, self.names, self.bad = device, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        elsewhere = any(isinstance(t, torch.Tensor) and t.device.type != self.device for t in tree_leaves(made))
        if elsewhere or any(word in func.name() for word in ("_local_scalar_dense", "nonzero")):
            self.bad.append(func.name())
        return made


OPERATIONS = (
    "n2 c4 o6 x9x8 k3x3 s2x1 p1 d1x2 g2",
    "n2 c4 o6 x9x8 k3x3 p1 mreflect",
    "n2 c3 o4 x17 k5 s2 p2",
    "n2 c2 o3 x5x4x6 k3x2x3 p1",
)


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("name", ["shift", "im2col", "fft", "reference"])
@pytest.mark.parametrize("text", OPERATIONS)
def test_operations_stay_on_the_device_and_wait_for_no_value(text, name, direction):
    """As a graph has to capture them.  On tensors without values, which torch refuses to mix with those of the CPU."""
    request = dataclasses.replace(asked(text, direction), has_bias=True)
    problem = request.problem
    first, second = (torch.empty(problem.shape_of(role), device="meta") for role in direction.given)
    bias = torch.empty(request.bias_shape, device="meta")
    out = torch.empty(problem.shape_of(direction.makes), device="meta")
    tensors = Tensors(first, second, bias)
    call = plan(request, name).bind(tensors)
    call(tensors, out)
    with Watched("meta") as seen:
        call(tensors, out)
    assert seen.names
    assert seen.bad == []


def test_what_was_measured_on_a_cpu_is_not_in_the_estimates(monkeypatch):
    request = asked("n8 c64 o64 x64x64 k5x5")
    before = [fft._cost_in_tensors(each).seconds for each in (request, dataclasses.replace(request, device="cpu"))]
    monkeypatch.setattr(fft, "MEASURED", 2 * fft.MEASURED)
    after = [fft._cost_in_tensors(each).seconds for each in (request, dataclasses.replace(request, device="cpu"))]
    assert after[0] == before[0]
    assert after[1] > before[1]


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT])
def test_a_dilation_along_rows_of_one_tap_means_nothing(direction):
    near = asked("n8 c64 o64 x8x16000 k1x3 d1x512 p0x512 g64", direction)
    far = asked("n8 c64 o64 x8x16000 k1x3 d512x512 p0x512 g64", direction)
    tile = rows.Tile(1, 32, 4, 2)
    assert rows.starts_of(near, tile) == rows.starts_of(far, tile) == (1, 2, 8192)


@pytest.mark.parametrize("text", ["n1 c8 o8 x4x4096 k2x3 d16384x1 p8192x1 g8", "n1 c8 o8 x40x9 k5x3 s7x1 d9x1 p4x1 g8"])
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT])
def test_what_is_counted_has_no_more_places_than_are_let_in(text, direction):
    """Rows and columns are rounded up to the dilation, which the padded ones exceed: counts stay below 2^31."""
    request = asked(text, direction)
    problem, starts = request.problem, math.prod(rows.starts_of(request, rows.Tile(1, 32, 1, 1)))
    assert problem.batch * starts < 2 * problem.batch * max(math.prod(problem.padded), math.prod(problem.spatial))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_as_many_as_there_is_room_for(dtype):
    for text, name in (("n8 c64 o64 x28x28 k3x3 p1", "direct"), ("n8 c64 o64 x56x56 k3x3 p1 g64", "depthwise")):
        request = dataclasses.replace(asked(text, Direction.GRAD_WEIGHT), dtype=dtype)
        whole = math.prod(request.problem.weight_shape) * 4
        seen = []
        for room in (1 << 30, 5 * whole, whole, 0):
            allowed = dataclasses.replace(request, max_workspace=room)
            needs = BY_NAME[name].cost(allowed).workspace
            assert needs <= max(room, whole if dtype is torch.bfloat16 else 0)
            seen.append(needs)
        assert seen == sorted(seen, reverse=True)
        assert seen[1] == 5 * whole, "not fewer than there is room for"
        assert seen[-1] == (whole if dtype is torch.bfloat16 else 0), "a single part is the result itself"


def test_what_is_made_once_is_whole_before_others_see_it(monkeypatch):
    """Another stream would read it while this one still fills it."""
    made, seen = {}, []
    tensor = mock.Mock(is_cuda=True, device=torch.device("cuda", 1))
    stream = mock.Mock(synchronize=lambda: seen.append(dict(made)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream if device == tensor.device else None)
    for _ in range(2):
        assert kept_tensor(made, "key", lambda: tensor) is tensor
    assert seen == [{}]
    assert made == {"key": tensor}
