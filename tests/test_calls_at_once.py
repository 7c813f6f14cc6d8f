"""The same call gives the same bits in eight threads at once, in forked and spawned children, and in workers."""

import multiprocessing
import os
import sys
import threading

import jobs
import pytest
import torch

from plainconv.cpu import compile as compiler

pytestmark = [
    pytest.mark.skipif(compiler.why_not() is not None, reason=str(compiler.why_not())),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("job", jobs.JOBS, ids=str)
def test_what_is_compared_is_right(job, threads):
    x, w = job.tensors()
    job.check(job.run(x, w), x, w)


def test_eight_threads_at_once(threads):
    """With no kernel in memory nor on disk, so that they compile at the same time too."""
    expected, found = jobs.digests(), {}
    start = threading.Barrier(8)

    def work(number):
        torch.set_num_threads(threads)  # torch counts them for each thread
        start.wait()
        found[number] = [jobs.digests() for _ in range(3)]

    with compiler.kept_in(None):
        workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=120)
    assert found == {number: [expected] * 3 for number in range(8)}


def told_by_child(method, threads):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=jobs.tell, args=(threads, queue))
    process.start()
    told = queue.get(timeout=120)
    process.join(timeout=60)
    assert process.exitcode == 0
    return told


@fork
def test_a_forked_child(threads):
    expected = jobs.digests()
    assert told_by_child("fork", threads) == expected
    with compiler.kept_in(None):  # and one that has everything to compile
        assert told_by_child("fork", threads) == expected
    assert jobs.digests() == expected, "the parent goes on as before"


def test_a_spawned_child(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # of its own, not the user's
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    assert told_by_child("spawn", torch.get_num_threads()) == jobs.digests()


@fork
def test_workers_of_a_dataloader():
    """Each has one thread; its items are those that the parent would make with one."""
    expected = jobs.digests()
    loader = torch.utils.data.DataLoader(jobs.Convolved(), num_workers=2, batch_size=None, timeout=120)
    assert list(loader) == [expected] * len(loader)
