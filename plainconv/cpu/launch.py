"""Run kernels over their tasks, on torch's own threads.

[0, tasks) is cut into contiguous shares of equal size, one for each thread: the t-th of n gets

    [t * tasks / n, (t + 1) * tasks / n)

A second pool beside torch's would fight it for the cores, so the OpenMP library that torch has loaded is asked for a
team (GOMP_parallel).  A few lines of IR, compiled like any kernel, are what Python calls, as a function of its own that
takes whole numbers, and what each thread of the team enters: Python is not involved, and the GIL is free.  The team may
turn out smaller than asked: the lines ask how large it is.

To wake a team takes as long as a small kernel, so several jobs can have one: each thread does its share of one job
after that of another, and waits for the others in between only where a job needs what was made before it.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue

import torch

from plainconv.cpu.compile import Kernel, compile

# objects: whole numbers: GOMP_parallel, omp_get_thread_num, omp_get_num_threads, GOMP_barrier, threads to ask for, and
# the jobs, each a kernel, its tasks, whether it waits, how many args it has, and these.
_DOOR = """
@_Py_NoneStruct = external global i8
declare i64 @PyLong_AsLongLong(ptr)
declare ptr @PyErr_Occurred()
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare void @Py_IncRef(ptr)

define internal void @work(ptr %numbers, i64 %number, i64 %size) {
entry:
  %end = load i64, ptr %numbers
  br label %loop
loop:
  %at = phi i64 [6, %entry], [%behind, %next]
  %more = icmp slt i64 %at, %end
  br i1 %more, label %job, label %done
job:
  %kernel.at = getelementptr i64, ptr %numbers, i64 %at
  %tasks.at = getelementptr i64, ptr %kernel.at, i64 1
  %waits.at = getelementptr i64, ptr %kernel.at, i64 2
  %count.at = getelementptr i64, ptr %kernel.at, i64 3
  %args = getelementptr i64, ptr %kernel.at, i64 4
  %kernel = load ptr, ptr %kernel.at
  %tasks = load i64, ptr %tasks.at
  %waits = load i64, ptr %waits.at
  %count = load i64, ptr %count.at
  %header = add i64 %at, 4
  %behind = add i64 %header, %count
  %needs = icmp ne i64 %waits, 0
  %several = icmp sgt i64 %size, 1
  %meets = and i1 %needs, %several
  br i1 %meets, label %meet, label %share
meet:
  %barrier.at = getelementptr i64, ptr %numbers, i64 4
  %barrier = load ptr, ptr %barrier.at
  call void %barrier()
  br label %share
share:
  %after = add i64 %number, 1
  %begin.of = mul i64 %number, %tasks
  %end.of = mul i64 %after, %tasks
  %first = sdiv i64 %begin.of, %size
  %last = sdiv i64 %end.of, %size
  %any = icmp slt i64 %first, %last
  br i1 %any, label %run, label %next
run:
  call void %kernel(ptr %args, i64 %first, i64 %last)
  br label %next
next:
  br label %loop
done:
  ret void
}

define internal void @member(ptr %numbers) {
  %number.at = getelementptr i64, ptr %numbers, i64 2
  %size.at = getelementptr i64, ptr %numbers, i64 3
  %number.fn = load ptr, ptr %number.at
  %size.fn = load ptr, ptr %size.at
  %number.32 = call i32 %number.fn()
  %size.32 = call i32 %size.fn()
  %number = sext i32 %number.32 to i64
  %size = sext i32 %size.32 to i64
  call void @work(ptr %numbers, i64 %number, i64 %size)
  ret void
}

define ptr @kernel(ptr %self, ptr %objects, i64 %count) {
entry:
  %end = add i64 %count, 1
  %numbers = alloca i64, i64 %end
  store i64 %end, ptr %numbers
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  %next = add i64 %i, 1
  %object.at = getelementptr ptr, ptr %objects, i64 %i
  %object = load ptr, ptr %object.at
  %number = call i64 @PyLong_AsLongLong(ptr %object)
  %to = getelementptr i64, ptr %numbers, i64 %next
  store i64 %number, ptr %to
  %more = icmp slt i64 %next, %count
  br i1 %more, label %loop, label %read
read:
  %error = call ptr @PyErr_Occurred()
  %fine = icmp eq ptr %error, null
  br i1 %fine, label %enter, label %fail
fail:
  ret ptr null
enter:
  %state = call ptr @PyEval_SaveThread()
  %threads.at = getelementptr i64, ptr %numbers, i64 5
  %threads = load i64, ptr %threads.at
  %several = icmp sgt i64 %threads, 1
  br i1 %several, label %team, label %alone
team:
  %parallel.at = getelementptr i64, ptr %numbers, i64 1
  %parallel = load ptr, ptr %parallel.at
  %threads.32 = trunc i64 %threads to i32
  call void %parallel(ptr @member, ptr %numbers, i32 %threads.32, i32 0)
  br label %leave
alone:
  call void @work(ptr %numbers, i64 0, i64 1)
  br label %leave
leave:
  call void @PyEval_RestoreThread(ptr %state)
  call void @Py_IncRef(ptr @_Py_NoneStruct)
  ret ptr @_Py_NoneStruct
}
"""


# A kernel, its args, how many tasks it has, and whether it waits until the jobs before it are done.
Job = tuple[Kernel, Sequence[int], int, bool]


def launch(kernel: Kernel, args: Sequence[int], tasks: int, threads: int) -> None:
    """Call `kernel` on all of [0, tasks), divided among at most `threads` threads; returns when all is done.

    The caller says how many (torch.get_num_threads(), as a rule), and keeps alive what the pointers in `args` point to.
    """
    if tasks <= 0:
        return
    if threads > tasks:
        threads = tasks
    door, team = _door(), _team_here() if threads > 1 else _ALONE
    if door is None or team is None:
        _without_team(kernel, args, tasks, threads)
    else:
        door(*team, threads, kernel.address, tasks, 0, len(args), *args)


def launch_all(jobs: Sequence[Job], threads: int) -> None:
    """The same for several jobs, by one team: a thread begins a job when it has done its share of the one before, or,
    if the job waits, when all have."""
    numbers: list[int] = []
    most = 0
    for kernel, args, tasks, waits in jobs:
        numbers += (kernel.address, tasks, waits, len(args))
        numbers += args
        if tasks > most:
            most = tasks
    if threads > most:
        threads = most
    door, team = _door(), _team_here() if threads > 1 else _ALONE
    if door is None or team is None:
        for kernel, args, tasks, _ in jobs:
            _without_team(kernel, args, tasks, threads)
    else:
        door(*team, threads, *numbers)


def pool() -> str:
    """Whose threads `launch` uses: "OpenMP" (torch's own) or "Python"."""
    return "OpenMP" if _team_here() else "Python"


# -- from Python to machine code -------------------------------------------------------------------------------------


class _Method(ctypes.Structure):
    """Python's description of a function that is machine code: PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_FASTCALL = 0x80  # METH_FASTCALL: self, an array of objects, how many
_keeps: list[object] = []  # what the function below is made of


@functools.cache
def _door() -> Callable[..., None] | None:
    """The lines above as a function of Python's; None where they find no Python to call.

    ctypes takes four times as long to call them.
    """
    try:
        kernel = compile(_DOOR)
        make = ctypes.pythonapi.PyCFunction_NewEx
    except (RuntimeError, AttributeError):
        return None
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    method = _Method(b"launch", kernel.address, _FASTCALL, None)
    _keeps.extend((kernel, method))
    door: Callable[..., None] = make(ctypes.addressof(method), None, None)
    return door


# -- torch's OpenMP --------------------------------------------------------------------------------------------------

_Team = tuple[int, int, int, int]  # addresses of GOMP_parallel, omp_get_thread_num, omp_get_num_threads, GOMP_barrier
_ALONE: _Team = (0, 0, 0, 0)


def _team_here() -> _Team | None:
    return None if _forked else _team()


@functools.cache
def _team() -> _Team | None:
    return _openmp() if _door() else None


def _openmp() -> _Team | None:
    """Those of the library that torch uses."""
    if os.name != "posix" or not torch.backends.openmp.is_available():
        return None
    # As the dynamic linker found them for torch: first what all of the process sees (LD_PRELOAD may have put another
    # OpenMP there), then what libtorch_cpu depends on.
    folder = Path(torch.__file__).parent / "lib"
    for path in (None, str(folder / "libtorch_cpu.so"), str(folder / "libtorch_cpu.dylib")):
        try:
            library = ctypes.CDLL(path, mode=ctypes.DEFAULT_MODE | os.RTLD_NOLOAD)
            asked = library.omp_get_thread_num, library.omp_get_num_threads
            functions = library.GOMP_parallel, *asked, library.GOMP_barrier
        except (OSError, AttributeError):
            continue
        parallel, number, size, barrier = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
        if parallel and number and size and barrier:
            return parallel, number, size, barrier
    return None


# -- the fallback ----------------------------------------------------------------------------------------------------


def _without_team(kernel: Kernel, args: Sequence[int], tasks: int, threads: int) -> None:
    packed = struct.pack(f"{len(args)}q", *args)
    if min(threads, tasks) > 1:
        _helpers.run(kernel, packed, tasks, min(threads, tasks))
    elif tasks > 0:
        kernel.call(packed, 0, tasks)


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
