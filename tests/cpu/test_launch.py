"""Shares and threads: torch's OpenMP pool, the fallback, several callers at once, forked and spawned children."""

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch

from plainconv.cpu import launch as launcher
from plainconv.cpu.compile import Kernel, compile
from plainconv.cpu.launch import launch, launch_all

# Adds 1 + scale to y[i] for each task, notes in shares[begin] where the share that begins there ends, and calls.
MARK = """
define void @kernel(ptr %args, i64 %begin, i64 %end) {
entry:
  %shares.at = getelementptr i64, ptr %args, i64 1
  %scale.at = getelementptr i64, ptr %args, i64 2
  %y = load ptr, ptr %args
  %shares = load ptr, ptr %shares.at
  %scale = load i64, ptr %scale.at
  %share = getelementptr i64, ptr %shares, i64 %begin
  store i64 %end, ptr %share
  %any = icmp slt i64 %begin, %end
  br i1 %any, label %loop, label %done
loop:
  %i = phi i64 [%begin, %entry], [%next, %loop]
  %at = getelementptr i64, ptr %y, i64 %i
  %old = load i64, ptr %at
  %more.of = add i64 %scale, 1
  %new = add i64 %old, %more.of
  store i64 %new, ptr %at
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %end
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""

# Every share waits until `count` of them run at once (or a long time is over), then notes how many there were.
MEET = """
define void @kernel(ptr %args, i64 %begin, i64 %end) {
entry:
  %count.at = getelementptr i64, ptr %args, i64 1
  %here = load ptr, ptr %args
  %count = load i64, ptr %count.at
  %old = atomicrmw add ptr %here, i64 1 seq_cst
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  %now = load atomic i64, ptr %here seq_cst, align 8
  %next = add i64 %i, 1
  %met = icmp sge i64 %now, %count
  %late = icmp sgt i64 %i, 20000000000
  %stop = or i1 %met, %late
  br i1 %stop, label %done, label %loop
done:
  ret void
}
"""

needs_openmp = pytest.mark.skipif(launcher._openmp() is None, reason="torch has no libgomp here")


@pytest.fixture(params=["OpenMP", "Python"])
def threads_of(request, monkeypatch):
    """Both pools, by turns."""
    if request.param == "Python":
        monkeypatch.setattr(launcher, "_forked", True)
    if launcher.pool() != request.param:
        pytest.skip("torch has no libgomp here")
    return request.param


def run(tasks: int, threads: int, scale: int = 4) -> list[tuple[int, int]]:
    """The shares that were done; each task must have been done once."""
    y, shares = torch.zeros(tasks + 1, dtype=torch.int64), torch.full((tasks + 1,), -1)
    launch(compile(MARK), (y.data_ptr(), shares.data_ptr(), scale), tasks, threads)
    assert torch.equal(y[:-1], torch.full((tasks,), scale + 1))
    assert y[-1] == 0
    return [(begin, end) for begin, end in enumerate(shares.tolist()) if end >= 0]


@pytest.mark.parametrize(
    ("tasks", "threads", "shares"),
    [
        (0, 2, []),
        (1, 2, [(0, 1)]),
        (7, 1, [(0, 7)]),
        (2, 8, [(0, 1), (1, 2)]),
        (7, 2, [(0, 3), (3, 7)]),
        (8, 4, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (1000, 3, [(0, 333), (333, 666), (666, 1000)]),
    ],
)
@pytest.mark.usefixtures("threads_of")
def test_shares_are_contiguous_and_equal(tasks, threads, shares):
    assert run(tasks, threads) == shares


# z[i] = y[tasks - 1 - i] + 1, after a while: what another thread has made.
TURN = """
define void @kernel(ptr %args, i64 %begin, i64 %end) {
entry:
  %z.at = getelementptr i64, ptr %args, i64 1
  %last.at = getelementptr i64, ptr %args, i64 2
  %slow.at = getelementptr i64, ptr %args, i64 3
  %y = load ptr, ptr %args
  %z = load ptr, ptr %z.at
  %last = load i64, ptr %last.at
  %slow = load i64, ptr %slow.at
  %late = icmp eq i64 %begin, 0
  br i1 %late, label %wait, label %loop
wait:
  %w = phi i64 [0, %entry], [%w.next, %wait]
  %w.next = add i64 %w, 1
  %seen = load volatile i64, ptr %slow.at
  %waiting = icmp slt i64 %w.next, %seen
  br i1 %waiting, label %wait, label %loop
loop:
  %i = phi i64 [%begin, %entry], [%begin, %wait], [%next, %loop]
  %from = sub i64 %last, %i
  %y.at = getelementptr i64, ptr %y, i64 %from
  %old = load i64, ptr %y.at
  %new = add i64 %old, 1
  %to = getelementptr i64, ptr %z, i64 %i
  store i64 %new, ptr %to
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %end
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.usefixtures("threads_of")
def test_a_job_that_waits_reads_what_all_threads_made(threads):
    """The first thread is slow in each job, and the last one reads what that makes."""
    rows = torch.zeros(9, 30, dtype=torch.int64)
    jobs = [
        (compile(TURN), (row.data_ptr(), row.data_ptr() + row.nbytes, 29, 100_000), 30, number > 0)
        for number, row in enumerate(rows[:-1])
    ]
    for _ in range(20):
        rows.fill_(-100)
        rows[0] = 0
        launch_all(jobs, threads)
        assert rows.tolist() == [[number] * 30 for number in range(9)]


@pytest.mark.usefixtures("threads_of")
def test_jobs_of_any_number_of_tasks():
    y, shares = torch.zeros(3, 8, dtype=torch.int64), torch.full((3, 8), -1)
    tasks = (7, 0, 1)
    jobs = [(compile(MARK), (y[i].data_ptr(), shares[i].data_ptr(), i), n, i == 2) for i, n in enumerate(tasks)]
    launch_all(jobs, 2)
    assert y.tolist() == [[i + 1] * n + [0] * (8 - n) for i, n in enumerate(tasks)]


def test_what_is_no_number_is_refused():
    with pytest.raises(TypeError):
        launch(compile(MARK), ("1", 2, 3), 1, 1)
    with pytest.raises(OverflowError):
        launch(compile(MARK), (1 << 64, 2, 3), 1, 1)


@pytest.mark.usefixtures("threads_of")
def test_shares_run_at_the_same_time():
    here = torch.zeros(1, dtype=torch.int64)
    launch(compile(MEET), (here.data_ptr(), 3), 3, 3)
    assert here.item() == 3


@pytest.mark.parametrize(("tasks", "threads"), [(5, 1), (1, 5), (0, 5), (5, 0)])
def test_one_thread_enters_no_pool(tasks, threads, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a pool was entered")

    monkeypatch.setattr(launcher, "_team", forbidden)
    monkeypatch.setattr(launcher._Helpers, "run", forbidden)
    run(tasks, threads)


@needs_openmp
def test_the_team_is_torchs_own():
    """The library asked is the one that torch's own loops run on: no second OpenMP came into the process."""
    assert launcher.pool() == "OpenMP"
    code = """
import torch
from plainconv.cpu import launch
def loaded():
    return {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
before = loaded()
assert launch.pool() == "OpenMP"
print(before and loaded() == before)
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "True\n", done.stderr


@needs_openmp
def test_a_team_smaller_than_asked_does_everything():
    """OMP_THREAD_LIMIT gives fewer threads than are asked for."""
    code = """
import torch
from plainconv.cpu import launch
from test_launch import run
assert launch.pool() == "OpenMP"
print(run(12, 4))
"""
    environment = {
        **os.environ,
        "OMP_THREAD_LIMIT": "2",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.path.dirname(__file__), *sys.path])),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "[(0, 6), (6, 12)]\n", done.stderr


@needs_openmp
@pytest.mark.parametrize(
    ("threads", "limit", "images", "kernel", "how"),
    [
        (6, 5, 1, 31, {"algorithm": "fft"}),
        (9, 8, 1, 3, {"algorithm": "depthwise"}),
        (9, 8, 2, 3, {"algorithm": "depthwise", "stride": 2}),
    ],
)
def test_scratch_is_not_shared_in_a_team_smaller_than_asked(threads, limit, images, kernel, how):
    code = f"""
import torch, plainconv
torch.manual_seed(0)
x = torch.randn({images}, 128, 56, 56).to(memory_format=torch.channels_last).requires_grad_()
w = torch.randn(128, 1, {kernel}, {kernel})
def made(threads):
    torch.set_num_threads(threads)
    y = plainconv.conv2d(x, w, padding={kernel // 2}, groups=128, **{how})
    return y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))
wanted = made(1)
print(all(torch.equal(*pair) for _ in range(10) for pair in zip(made({threads}), wanted)))
"""
    environment = {**os.environ, "OMP_THREAD_LIMIT": str(limit), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.usefixtures("threads_of")
def test_eight_python_threads_at_once():
    done = []

    def work() -> None:
        for tasks in range(2, 60):
            if len(run(tasks, 2, scale=tasks)) == 2:
                done.append(tasks)

    callers = [threading.Thread(target=work) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
        assert not caller.is_alive()
    assert len(done) == 8 * 58


def test_a_launch_ends_without_any_helper(monkeypatch):
    def no_more(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(launcher, "_forked", True)
    monkeypatch.setattr(launcher, "_helpers", launcher._Helpers())
    monkeypatch.setattr(threading.Thread, "start", no_more)
    assert run(6, 3) == [(0, 2), (2, 4), (4, 6)]


def test_an_interrupt_waits_for_the_helpers(monkeypatch):
    """The memory that helpers write to may be freed as soon as `launch` has raised."""
    begun, finish, events = threading.Event(), threading.Event(), []
    caller = threading.get_ident()

    def call(args, begin, end):
        if threading.get_ident() == caller:
            begun.wait(60)
            threading.Timer(0.2, finish.set).start()
            raise KeyboardInterrupt
        begun.set()
        finish.wait(60)
        events.append("helper done")

    monkeypatch.setattr(launcher, "_forked", True)
    with pytest.raises(KeyboardInterrupt):
        launch(Kernel(call, 0, False), (), 2, 2)
    assert events == ["helper done"]


# -- children --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_forked_child_of_a_parent_that_used_its_pool(threads):
    """libgomp would wait in the child for threads that only the parent has."""
    run(10, 2)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, repr((launcher.pool(), len(run(12, threads)))).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        assert pipe.read() == repr(("Python", threads))
    assert os.waitpid(child, 0)[1] == 0
    assert len(run(10, 2)) == 2  # and the parent goes on as before


def in_child(queue):
    queue.put((launcher.pool(), run(12, 2)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("method", sorted({"spawn", "fork"} & set(multiprocessing.get_all_start_methods())))
def test_a_child_of_multiprocessing(method):
    before = launcher.pool()
    run(10, 2)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    # The child imports this file by its name.
    sys.path.insert(0, os.path.dirname(__file__))
    try:
        import test_launch

        process = context.Process(target=test_launch.in_child, args=(queue,))
        process.start()
    finally:
        sys.path.pop(0)
    assert queue.get(timeout=120) == (before if method == "spawn" else "Python", [(0, 6), (6, 12)])
    process.join(timeout=60)
    assert process.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_imported_first_in_a_forked_child():
    """Whoever uses torch's pool and then forks may import plainconv only in the child."""
    code = """
import multiprocessing, torch
def child():
    from plainconv.cpu import launch
    print(launch.pool(), flush=True)
if __name__ == "__main__":
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "Python\n", done.stderr


class Convolved(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return len(run(10 + index, torch.get_num_threads()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_in_the_workers_of_a_dataloader():
    run(10, 2)
    counts = list(torch.utils.data.DataLoader(Convolved(), num_workers=2, batch_size=None, timeout=120))
    assert [int(count) for count in counts] == [1] * 4
