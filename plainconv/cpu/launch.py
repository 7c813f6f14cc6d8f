"""Run a kernel over its tasks, on torch's own threads.

[0, tasks) is cut into contiguous shares of equal size, one for each thread: the t-th of n gets

    [t * tasks / n, (t + 1) * tasks / n)

A second pool beside torch's would fight it for the cores, so the OpenMP library that torch has loaded is asked for a
team (GOMP_parallel).  A few lines of IR, compiled like any kernel, are what each thread of the team enters: Python is
not involved, and the GIL is free.  The team may turn out smaller than asked: the lines ask how large it is.

Where torch has no such library, and in the children of a fork, a few Python threads serve; libgomp would wait forever
there for threads that only the parent has.  One thread, or one task, enters no pool at all.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import multiprocessing
import multiprocessing.context
import os
import struct
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch

from plainconv.cpu.compile import Kernel, compile

# args: GOMP_parallel, omp_get_thread_num, omp_get_num_threads, the kernel, its tasks, its args; end: threads to ask for
_TEAM = """
define internal void @share(ptr %args) {
  %number.at = getelementptr i64, ptr %args, i64 1
  %size.at = getelementptr i64, ptr %args, i64 2
  %kernel.at = getelementptr i64, ptr %args, i64 3
  %tasks.at = getelementptr i64, ptr %args, i64 4
  %inner = getelementptr i64, ptr %args, i64 5
  %number.fn = load ptr, ptr %number.at
  %size.fn = load ptr, ptr %size.at
  %kernel = load ptr, ptr %kernel.at
  %tasks = load i64, ptr %tasks.at
  %number.32 = call i32 %number.fn()
  %size.32 = call i32 %size.fn()
  %number = sext i32 %number.32 to i64
  %size = sext i32 %size.32 to i64
  %next = add i64 %number, 1
  %before = mul i64 %number, %tasks
  %behind = mul i64 %next, %tasks
  %begin = sdiv i64 %before, %size
  %end = sdiv i64 %behind, %size
  call void %kernel(ptr %inner, i64 %begin, i64 %end)
  ret void
}

define void @kernel(ptr %args, i64 %begin, i64 %end) {
  %parallel = load ptr, ptr %args
  %threads = trunc i64 %end to i32
  call void %parallel(ptr @share, ptr %args, i32 %threads, i32 0)
  ret void
}
"""


def launch(kernel: Kernel, args: Sequence[int], tasks: int, threads: int) -> None:
    """Call `kernel` on all of [0, tasks), divided among at most `threads` threads; returns when all is done.

    The caller says how many (torch.get_num_threads(), as a rule), and keeps alive what the pointers in `args` point to.
    """
    if threads <= 1 or tasks <= 1:
        if tasks > 0:
            kernel.call(_packer(len(args)).pack(*args), 0, tasks)
        return
    threads = min(threads, tasks)
    team = None if _forked else _team()
    if team is None:
        _helpers.run(kernel, _packer(len(args)).pack(*args), tasks, threads)
        return
    packed = _packer(5 + len(args)).pack(*team.functions, kernel.address, tasks, *args)
    team.kernel.call(packed, 0, threads)


@functools.cache
def _packer(count: int) -> struct.Struct:
    """Makes an array of i64, as kernels want it; the cheapest way from Python."""
    return struct.Struct(f"{count}q")


def pool() -> str:
    """Whose threads `launch` uses: "OpenMP" (torch's own) or "Python"."""
    return "Python" if _forked or _team() is None else "OpenMP"


# -- torch's OpenMP --------------------------------------------------------------------------------------------------


class _Team(NamedTuple):
    kernel: Kernel
    functions: tuple[int, int, int]


@functools.cache
def _team() -> _Team | None:
    functions = _openmp()
    return functions and _Team(compile(_TEAM), functions)


def _openmp() -> tuple[int, int, int] | None:
    """Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in the library that torch uses."""
    if os.name != "posix" or not torch.backends.openmp.is_available():
        return None
    # As the dynamic linker found them for torch: first what all of the process sees (LD_PRELOAD may have put another
    # OpenMP there), then what libtorch_cpu depends on.
    folder = Path(torch.__file__).parent / "lib"
    for path in (None, str(folder / "libtorch_cpu.so"), str(folder / "libtorch_cpu.dylib")):
        try:
            library = ctypes.CDLL(path, mode=ctypes.DEFAULT_MODE | os.RTLD_NOLOAD)
            functions = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
        except (OSError, AttributeError):
            continue
        first, second, third = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
        if first and second and third:
            return first, second, third
    return None


# -- the fallback ----------------------------------------------------------------------------------------------------


class _Job:
    """One launch: the shares that nobody has taken yet, and a lock for each helper that came, held while it works."""

    def __init__(self, kernel: Kernel, args: bytes, tasks: int, threads: int) -> None:
        self.kernel, self.args = kernel, args
        bounds = (t * tasks // threads for t in range(threads + 1))
        self.shares = deque(itertools.pairwise(bounds))
        self.working: list[threading.Lock] = []

    def help(self) -> None:
        lock = threading.Lock()
        with lock:
            self.working.append(lock)  # before a share is taken: see `wait`
            self.work()

    def work(self) -> None:
        while True:
            try:
                share = self.shares.popleft()
            except IndexError:
                return
            self.kernel.call(self.args, *share)

    def wait(self) -> None:
        """Until no helper works. Whoever took a share is in the list; whoever comes later finds none."""
        self.shares.clear()
        interrupt: BaseException | None = None
        for lock in tuple(self.working):
            while True:
                try:
                    lock.acquire()
                    break
                except BaseException as error:  # Ctrl-C: a helper must not be left writing to memory soon to be freed
                    interrupt = error
        if interrupt:
            raise interrupt


class _Helpers:
    """Python threads that help whoever asks; kernels run without the GIL.

    The caller takes shares like any helper, so a launch ends even if no helper can be had or all are busy elsewhere.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._count = 0
        self._lock = threading.Lock()

    def run(self, kernel: Kernel, args: bytes, tasks: int, threads: int) -> None:
        job = _Job(kernel, args, tasks, threads)
        self._grow(threads - 1)
        for _ in range(threads - 1):
            self._jobs.put(job)
        try:
            job.work()
        finally:
            job.wait()

    def _grow(self, count: int) -> None:
        with self._lock:
            while self._count < count:
                try:
                    threading.Thread(target=self._serve, name="plainconv", daemon=True).start()
                except RuntimeError:  # no more threads to be had, or the interpreter is shutting down
                    return
                self._count += 1

    def _serve(self) -> None:
        while True:
            self._jobs.get().help()


_helpers = _Helpers()


# -- fork ------------------------------------------------------------------------------------------------------------


def _is_child_of_fork() -> bool:
    """Whether multiprocessing forked this process, before this module was imported."""
    if multiprocessing.parent_process() is None:
        return False
    return not isinstance(multiprocessing.current_process(), multiprocessing.context.SpawnProcess)


_forked = _is_child_of_fork()


def _after_fork_in_child() -> None:
    global _forked, _helpers
    _forked = True
    _helpers = _Helpers()  # the parent's threads stayed with the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
