"""Models that serve: swapped and optimized ones under many calls, sizes, threads, and in children of a fork."""

import gc
import multiprocessing
import os
import threading

import pytest
import torch
from torch import nn

import plainconv
from plainconv import functional, ops
from plainconv.inference import Prepacked

CALLS = 10_000
GROWTH = 4 << 20  # bytes; a megabyte would be 100 bytes a call


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, padding_mode="reflect"),
        nn.ConvTranspose2d(16, 8, 2, 2),
        nn.Conv2d(8, 4, 1),
    ).eval()


def swapped():
    model = small().requires_grad_(False)
    plainconv.swap(model)
    return model


def optimized():
    return plainconv.optimize(small(), torch.randn(1, 3, 16, 16))


MADE = {"swap": swapped, "optimize": optimized}


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system does not tell")
@pytest.mark.parametrize("kind", [*MADE, "training"])
def test_ten_thousand_calls_leave_nothing_behind(kind):
    model, x = MADE.get(kind, small)(), torch.randn(1, 3, 16, 16)
    if kind == "training":
        plainconv.swap(model)

    def call():
        if kind == "training":
            model(x).sum().backward()
        else:
            with torch.inference_mode():
                model(x)

    for _ in range(500):
        call()
    gc.collect()
    before = resident()
    for _ in range(CALLS):
        call()
    gc.collect()
    assert resident() - before < GROWTH


@pytest.mark.parametrize("kind", MADE)
def test_what_is_remembered_of_sizes_is_bounded(kind, monkeypatch):
    monkeypatch.setattr(ops, "MOST_READY", 8)
    model, asked = MADE[kind](), small()
    memories = [functional._READY, ops._READY] if kind == "swap" else []
    memories += [call._ready for call in model.modules() if isinstance(call, Prepacked)]
    assert memories
    for memory in memories:
        memory.clear()
    for size in range(8, 30):
        x = torch.randn(1, 3, size, 40 - size)
        with torch.no_grad():
            torch.testing.assert_close(model(x), asked(x), rtol=1e-4, atol=1e-5)
    assert max(map(len, memories)) <= 8


@pytest.mark.parametrize("kind", MADE)
def test_several_threads_call_one_model(kind):
    """Sizes come in another order in each, and for the first time; the same call has the same bits everywhere."""
    model, found, start = MADE[kind](), {}, threading.Barrier(4)
    xs = [torch.randn(1 + size % 2, 3, 10 + size, 20) for size in range(6)]

    def work(number):
        torch.set_num_threads(threads)  # torch counts them for each thread
        order = xs[number:] + xs[:number]
        start.wait()
        with torch.inference_mode():
            made = [model(x) for _ in range(3) for x in order][-len(xs) :]
        found[number] = made[len(xs) - number :] + made[: len(xs) - number]

    threads = torch.get_num_threads()
    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert len(found) == 4
    with torch.inference_mode():
        asked = [model(x) for x in xs]
    for made in found.values():
        assert all(map(torch.equal, made, asked))


def tell(model, x, queue):
    torch.set_num_threads(1)  # as a DataLoader's workers do: torch's own layers hang in a child that has more
    with torch.inference_mode():
        queue.put(model(x).tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("kind", MADE)
def test_a_forked_child_goes_on_with_the_model(kind):
    model, x = MADE[kind](), torch.randn(2, 3, 12, 14)
    with torch.inference_mode():
        asked = model(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=tell, args=(model, x, queue), daemon=True)
    child.start()
    found = torch.tensor(queue.get(timeout=60))
    child.join(timeout=60)
    assert child.exitcode == 0
    torch.testing.assert_close(found, asked, rtol=1e-5, atol=1e-5)
