"""Memory of large results: lent, given back, lent again, and bounded."""

import copy
import dataclasses
import gc
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from checks import request

import plainconv
from plainconv import memory
from plainconv.memory import lent
from plainconv.menu import ALGORITHMS
from plainconv.menu.base import Cost, Tensors
from plainconv.plan import LENT_SCRATCH, Plan
from plainconv.problem import ConvProblem, Direction

PAGE = memory._PAGE
FLOATS = PAGE // 4


@pytest.fixture(autouse=True)
def _nothing_waits():
    def forget():
        memory._waiting.clear()
        memory._most.clear()

    forget()
    yield
    forget()


def waiting():
    return [len(block) for alike in memory._waiting.values() for _, block in alike]


def test_a_result_has_what_was_asked_for_and_is_no_view():
    y = lent((2, 3, FLOATS), (3 * FLOATS, 1, 3), torch.float32)
    assert (y.shape, y.stride(), y.dtype) == ((2, 3, FLOATS), (3 * FLOATS, 1, 3), torch.float32)
    assert not y._is_view()
    assert y.data_ptr() % 64 == 0
    assert y.untyped_storage().nbytes() == 6 * PAGE


def test_a_result_that_is_larger_than_all_that_may_wait_does_not_take_their_place(monkeypatch):
    monkeypatch.setattr(memory, "MOST_KEPT", 4 * PAGE)
    small = [lent((FLOATS,), (1,), torch.float32) for _ in range(3)]
    huge = lent((5 * FLOATS,), (1,), torch.float32)
    del small, huge
    assert waiting() == [PAGE] * 3


def test_memory_is_lent_again_when_nothing_uses_it_any_more():
    y = lent((FLOATS,), (1,), torch.float32)
    first, part = y.data_ptr(), y[7:9].fill_(5.0)
    del y
    other = lent((FLOATS,), (1,), torch.float32)
    assert other.data_ptr() != first, "a view still uses it"
    assert part.tolist() == [5.0, 5.0]
    del part
    assert lent((FLOATS,), (1,), torch.float32).data_ptr() == first


@pytest.mark.parametrize("count", [FLOATS, FLOATS + 1, 3 * FLOATS // 2, 3 * FLOATS // 2 + 1, 5 * FLOATS - 1])
def test_memory_of_any_size_is_lent_again(count):
    first = lent((count,), (1,), torch.float32).data_ptr()
    assert lent((count,), (1,), torch.float32).data_ptr() == first


def test_what_was_given_back_last_is_lent_first():
    """The caches still hold it."""
    tensors = [lent((FLOATS,), (1,), torch.float32) for _ in range(3)]
    last = tensors[1].data_ptr()
    del tensors[2], tensors[0], tensors[0]
    assert lent((FLOATS,), (1,), torch.float32).data_ptr() == last


@pytest.mark.parametrize("size", [LENT_SCRATCH - 64, LENT_SCRATCH, 3 * LENT_SCRATCH // 2])
def test_scratch_of_any_size_is_the_same_in_the_next_call(size):
    """Else each call would find it in other places, which no cache holds."""
    seen = []

    def run(request, tensors, out, workspace):
        seen.append((workspace.data_ptr(), workspace.numel()))

    problem = ConvProblem.parse("n1 c1 o1 x4 k1")
    algorithm = dataclasses.replace(ALGORITHMS[0], run=run, bind=None, pack=None, fuses=True)
    chosen = Plan(request(problem, Direction.FORWARD, torch.float32), algorithm, Cost(1, 1, size, 1.0))
    x = torch.zeros(1, 1, 4)
    for _ in range(2):
        chosen(Tensors(x, x, None, None), x)
    assert seen[0][0] == seen[1][0]
    assert min(numel for _, numel in seen) >= size


def test_a_block_is_not_lent_to_results_much_smaller_than_it_or_larger():
    first = lent((4 * FLOATS,), (1,), torch.float32).data_ptr()
    small, large = (lent((count,), (1,), torch.float32) for count in (3 * FLOATS, 4 * FLOATS + 1))
    assert first not in (small.data_ptr(), large.data_ptr())


def test_what_waits_is_bounded_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(memory, "MOST_KEPT", 3 * PAGE)
    tensors = [lent((FLOATS,), (1,), torch.float32) for _ in range(5)]
    places = [each.data_ptr() for each in tensors]
    while tensors:
        del tensors[0]
    assert sum(waiting()) == 3 * PAGE
    again = [lent((FLOATS,), (1,), torch.float32) for _ in range(3)]
    assert {each.data_ptr() for each in again} == set(places[2:])


def test_what_waits_in_blocks_of_several_sizes_is_bounded_together(monkeypatch):
    monkeypatch.setattr(memory, "MOST_KEPT", 6 * PAGE)
    tensors = [lent((count * FLOATS,), (1,), torch.float32) for count in (2, 1, 3, 1, 2)]
    places = [each.data_ptr() for each in tensors]
    while tensors:
        del tensors[0]
    assert sorted(waiting()) == [PAGE, 2 * PAGE, 3 * PAGE]
    again = [lent((count * FLOATS,), (1,), torch.float32) for count in (2, 1, 3)]
    assert [each.data_ptr() for each in again] == [places[4], places[3], places[2]]
    assert not waiting()


@pytest.mark.parametrize("size", [memory.LARGE, PAGE - 4, 3 * PAGE, 100 * PAGE + 4])
def test_a_block_is_at_most_an_eighth_larger_and_a_page(size):
    block = memory._size(size)
    assert size <= block <= size + max(size // 8, PAGE if size > PAGE else 0)


def test_large_results_and_gradients_use_it(monkeypatch):
    seen = []
    monkeypatch.setattr("plainconv.ops.lent", lambda *how: seen.append(how[0]) or lent(*how))
    x, w = torch.randn(1, 16, 70000, requires_grad=True), torch.randn(16, 16, 3, requires_grad=True)
    y = plainconv.conv1d(x, w)
    y.backward(torch.ones_like(y))
    assert seen == [(1, 16, 69998), (1, 16, 70000)]
    theirs = torch.autograd.grad(torch.nn.functional.conv1d(x, w).sum(), (x, w))
    for ours, torchs in zip((x.grad, w.grad), theirs, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-3)
    kept = x.grad.clone()
    for _ in range(3):
        plainconv.conv1d(x, w).sum().backward()
    torch.testing.assert_close(x.grad, 4 * kept)


def test_a_result_can_be_copied_saved_shared_and_changed():
    y = lent((FLOATS,), (1,), torch.float32).fill_(2.0)
    assert copy.deepcopy(y).sum() == pickle.loads(pickle.dumps(y)).sum() == 2 * FLOATS
    y.requires_grad_().mul(3).sum().backward()
    with torch.no_grad():
        y += 1
    assert y.detach().share_memory_().sum() == 3 * FLOATS


def test_many_threads_at_once():
    wrong = []

    def work(mine):
        for _ in range(200):
            y = lent((FLOATS,), (1,), torch.float32)
            y[::4096] = mine
            if not (y[::4096] == mine).all():
                wrong.append(mine)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
    assert 1 <= len(waiting()) <= 16, "a thread asks for its next before it gives back"


def test_a_result_may_outlive_the_interpreter():
    code = """
import torch
from plainconv.memory import LARGE, lent
torch.kept = lent((LARGE,), (1,), torch.uint8)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
