"""A kernel that was launched before is launched again as Triton does it, without asking Triton which one it is."""

import gc
import weakref
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from ahead import gpu
from checks import BY_NAME
from interpreted import asked

from plainconv.gpu import launch, rows
from plainconv.menu.base import Tensors
from plainconv.problem import Direction

pytestmark = pytest.mark.skipif(launch.why_not() is not None, reason=str(launch.why_not()))


class There(torch.Tensor):
    """A tensor on a GPU, as far as a launch can see."""

    device_index = 0

    def get_device(self):
        return self.device_index


def there(*shape, index=0, skip=0):
    """Elements; so many are skipped."""
    made = torch.zeros(skip + torch.Size(shape).numel())[skip:].view(shape).as_subclass(There)
    made.device_index = index
    return made


def filled(index=0, skip=0):
    """The launch of a small convolution, and its tensors."""
    request = asked("n1 c1 o1 x5x6 k1x1", Direction.FORWARD)
    x, w, y = there(1, 1, 5, 6, index=index, skip=skip), there(1, 1, 1, 1), there(1, 1, 5, 6)
    return rows.rolling(request, x, w, y.stride()), (x, w, None, None, y)


@pytest.fixture
def launched():
    """All that is launched, each with its arguments; there are two GPUs, and the first is the current one."""
    with gpu(90) as seen:
        from triton.runtime import driver

        current = [0]

        @contextmanager
        def device(index):
            current.append(index)
            yield
            current.pop()

        driver.active.get_current_device = lambda: current[-1]
        driver.active.get_current_stream = lambda index: f"stream of {index}"
        with mock.patch.multiple(torch.cuda, current_device=lambda: current[-1], device=device):
            yield seen


@pytest.fixture
def asks(monkeypatch):
    """How often Triton was asked which kernel it is."""
    from triton.runtime.jit import JITFunction

    seen, real = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda *given, **named: seen.append(0) or real(*given, **named))
    return seen


def numbers(args):
    """Of tensors where they begin."""
    return [arg.data_ptr() if isinstance(arg, torch.Tensor) else 0 if arg is None else arg for arg in args]


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_WEIGHT], ids=str)
@pytest.mark.parametrize(("name", "text"), [("narrow", "n1 c2 o1 x5x6 k1x1"), ("direct", "n1 c16 o16 x5x6 k1x1")])
def test_every_kernel_is_told_what_triton_tells_it(name, text, direction, launched, asks):
    request = asked(text, direction, has_bias=name == "direct" and direction is Direction.FORWARD)
    problem, algorithm = request.problem, BY_NAME[name]
    tensors = Tensors(*(there(*problem.shape_of(role)) for role in direction.given))
    if request.has_bias:
        tensors = tensors._replace(bias=there(*request.bias_shape))
    workspace, out = there(algorithm.cost(request).workspace).byte(), there(*problem.shape_of(direction.makes))
    call = algorithm.bind(request, tensors)
    call(tensors, out, workspace)
    call(tensors, out, workspace)
    assert len(asks) == 1
    first, second = (call.args for call in launched.call_args_list)
    assert first[:6] == second[:6], "grid, stream, function and its metadata"
    assert first[3] == "stream of 0"
    assert second[6:9] == (None, None, None), "no hooks, and nothing for them"
    assert first[9] is tensors.first
    assert list(second[9:]) == numbers(first[9:])


def test_tensors_that_begin_elsewhere_have_their_own_kernel(launched, asks):
    made, tensors = filled()
    for skip, asked_for in ((0, 1), (4, 1), (1, 2), (2, 2), (0, 2)):
        made(*filled(skip=skip)[1])
        assert len(asks) == asked_for, "a start is at a multiple of 16 bytes, or it is not"
    made(*tensors[:-1], filled(skip=1)[1][0])
    assert len(asks) == 3, "which of the tensors it is counts"


def test_each_device_has_its_own_kernel(launched, asks):
    made, _ = filled()
    for index, asked_for in ((0, 1), (1, 2), (0, 2), (1, 2)):
        made(*filled(index)[1])
        assert len(asks) == asked_for
    assert [call.args[3] for call in launched.call_args_list] == [f"stream of {index}" for index in (0, 1, 0, 1)]


def told(*_, **__):
    """A hook."""


HOOKS = {
    "launch_enter_hook": lambda knobs: mock.patch.object(knobs.runtime.launch_enter_hook, "calls", [told]),
    "launch_exit_hook": lambda knobs: mock.patch.object(knobs.runtime, "launch_exit_hook", told),
    "debug": lambda knobs: mock.patch.object(knobs.runtime, "debug", True),
    "instrumentation": lambda knobs: mock.patch.object(knobs.compilation, "instrumentation_mode", "any"),
    "before a run": lambda knobs: mock.patch.object(filled()[0].kernel, "pre_run_hooks", [told]),
}


@pytest.mark.parametrize("name", HOOKS)
def test_whoever_watches_launches_sees_them_all(name, launched, asks):
    from triton import knobs

    made, tensors = filled()
    made(*tensors)
    with HOOKS[name](knobs):
        made(*tensors)
        made(*tensors)
    assert len(asks) == 3
    made(*tensors)
    assert len(asks) == 3, "nobody watches any more"


def test_what_is_compiled_for_a_while_is_not_kept(launched, asks):
    from triton import knobs

    made, tensors = filled()
    with mock.patch.object(knobs.runtime, "debug", True):
        made(*tensors)
    made(*tensors)
    assert len(asks) == 2


class Loaded:
    """What Triton compiled, as far as a launch can see; when nobody has it any more, Triton unloads it."""

    function, packed_metadata = "function", "metadata"

    @property
    def run(self):
        return lambda *given: None


def test_a_kernel_that_is_launched_again_stays_loaded(launched):
    found = Loaded()
    alive, again = weakref.ref(found), filled()[0]._again(found)
    del found
    gc.collect()
    again((0, 0, 0, 0, 0))
    assert alive() is not None
