"""The text of an LLVM IR module in, a kernel that can be called out.

A kernel is a module that defines

    define void @kernel(ptr %args, i64 %begin, i64 %end)

where args points to an array of i64, pointers and sizes alike, and [begin, end) are the tasks that this call shall do.
What the numbers mean is between the writer of the text and the caller.

    text --parse, optimise, emit--> object code --link--> address --ctypes--> Kernel

Object code is kept on disk (`store` says what is believed of it), under a key of everything that it depends on: text,
LLVM, processor and features.  Vectors are explicit in the text, so LLVM is asked neither to vectorise nor to unroll:
what was written is what runs.  Calling a kernel releases the GIL.

llvmlite and platformdirs are imported on first use.  One lock covers all of LLVM, and is held by whoever forks, so that
no child begins its life with LLVM half way through something.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plainconv.cpu.masks import spelled_out
from plainconv.cpu.store import Store, user_store

FORMAT = 2  # raised when the code below changes what is made of the same text
MAX_KERNELS = 512  # held in memory
_MAGIC = b"plainconv object code 1\n"
# LLVM keeps some kilobytes of every library that was ever linked, even after its code is gone; they are freed with
# their LLJIT, so one LLJIT serves only so many kernels.
_KERNELS_PER_JIT = 64

_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)  # releases the GIL

_NOTHING = "define void @kernel(ptr %args, i64 %begin, i64 %end) {\n  ret void\n}\n"


# -- targets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """What code is made for.

    triple    machine, vendor and system, in LLVM's words
    cpu       LLVM's name of the processor
    features  "+avx2,-avx512f,..."
    bits      of a vector register: 512 with AVX-512, 256 with AVX2 and FMA, 128 with SSE or NEON
    """

    triple: str
    cpu: str
    features: str
    bits: int

    @staticmethod
    def host(bits: int | None = None) -> Target:
        """The processor at hand; with `bits`, as if it had no wider vectors than that (512, 256 or 128)."""
        host = _host()
        if bits is None or bits == host.bits:
            return host
        if bits not in (128, 256, 512) or bits > host.bits:
            raise ValueError(f"this processor has vectors of {host.bits} bits: bits={bits} cannot be had")
        return Target(host.triple, host.cpu, _masked(host.features, bits), bits)

    @staticmethod
    def neon() -> Target:
        """A 64-bit ARM processor, to read the assembly that it would get."""
        return Target("aarch64-unknown-linux-gnu", "generic", "+neon", 128)

    @property
    def machine(self) -> str:
        """ "x86_64", "aarch64" and so on; "arm64" is Apple's name for the latter."""
        machine = self.triple.split("-", 1)[0]
        return "aarch64" if machine == "arm64" else machine

    def has(self, feature: str) -> bool:
        """Whether LLVM's `feature` ("fma", "f16c", "avx512bf16", ...) may be used."""
        return f"+{feature}" in self.features.split(",")

    @property
    def fma(self) -> bool:
        """Whether llvm.fma is one instruction; where it is not, it is a slow call for each element."""
        return self.machine == "aarch64" or self.has("fma")

    @property
    def masks(self) -> bool:
        """Whether vectors are stored, and those of half types loaded, under a mask as quickly as without."""
        return self.has("avx512bw") and self.has("avx512vl")

    @property
    def registers(self) -> int:
        """How many vector registers there are."""
        return 32 if self.bits == 512 or self.machine == "aarch64" else 16


def _masked(features: str, bits: int) -> str:
    """The features of a processor without wider vectors than `bits`."""
    if bits == 256:
        gone: tuple[str, ...] = ("avx512", "avx10", "amx")
    else:
        gone = ("avx", "amx", "fma", "f16c", "xop", "vaes", "vpclmulqdq")
    kept = [f for f in features.split(",") if not (f[0] == "+" and f[1:].startswith(gone))]
    # Switching the first of a family off switches off all that need it; the CPU's name would bring them back.
    return ",".join([*kept, *(f"-{name}" for name in (("avx512f",) if bits == 256 else ("avx", "fma4", "xop")))])


@functools.cache
def _host() -> Target:
    llvm = _llvm()
    with _lock():
        triple = str(llvm.get_process_triple())
        cpu = str(llvm.get_host_cpu_name())
        try:
            # A virtual machine can name a CPU whose features it hides: they are always said.
            features = str(llvm.get_host_cpu_features().flatten())
        except RuntimeError:  # not known on this system: the CPU's name must do
            features = ""
    host = Target(triple, cpu, features, 128)
    if host.machine != "x86_64":
        return host
    # LLVM would rather use half of the 512-bit registers on some processors.
    features += ",-prefer-256-bit"
    if all(host.has(f"avx512{part}") for part in ("f", "vl", "bw", "dq")):
        return Target(triple, cpu, features, 512)
    if host.has("avx2") and host.has("fma"):
        return Target(triple, cpu, _masked(features, 256), 256)
    return Target(triple, cpu, _masked(features, 128), 128)


# -- kernels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Kernel:
    """Machine code that can be called: kernel.call(args, begin, end), without the GIL.

    args are bytes that hold the array of i64, or its address. The code stays in memory as long as the kernel, or its
    `call`, is referenced.
    """

    call: Callable[[bytes | int, int, int], None]
    address: int
    from_disk: bool


def compile(text: str, target: Target | None = None) -> Kernel:
    """The kernel that `text` defines, from memory, from disk or newly made; RuntimeError if LLVM refuses the text."""
    target = target or Target.host()
    state, key = _state, _key(text, target)
    if kernel := state.held.get(key):
        return kernel
    with _lock():
        if kernel := state.held.get(key):  # another thread was quicker
            return kernel
        kernel = _from_disk(state.store, key)
        if kernel is None:
            code = _emit(text, target, assembly=False)
            assert isinstance(code, bytes)
            kernel = _link(code, from_disk=False)
            state.store.write(key, code)
    state.held.put(key, kernel)
    return kernel


def assembly(text: str, target: Target | None = None) -> str:
    """What `compile` makes of `text`, for a person or a test to read; any target of LLVM's will do."""
    target = target or Target.host()
    with _lock():
        code = _emit(text, target, assembly=True)
    assert isinstance(code, str)
    return code


def notes() -> tuple[str, ...]:
    """What of the object code on disk was ignored or could not be kept, and why; one sentence each."""
    _state.store.look()  # nothing may have been compiled yet
    return _state.store.notes()


@functools.cache
def why_not() -> str | None:
    """None if kernels can be compiled and run in this process, else one sentence."""
    if sys.maxsize < 1 << 32:
        return "kernels are written for processes of 64 bits, and this one has 32"
    try:
        _llvm()
    except (ImportError, OSError) as error:
        return f"llvmlite, which compiles the kernels, cannot be imported ({error}); pip install llvmlite"
    if refusal := _no_executable_memory():
        return f"this system lets no program make machine code and run it ({refusal})"
    try:
        with _lock():
            code = _emit(_NOTHING, Target.host(), assembly=False)
            assert isinstance(code, bytes)
            kernel = _link(code, from_disk=False)
        kernel.call(0, 0, 0)
    except (RuntimeError, OSError) as error:
        return f"LLVM cannot compile for this machine ({error})"
    return None


def _no_executable_memory() -> str | None:
    """Try what the linker will do: write to memory, then make it executable. It aborts the process where that fails."""
    if os.name != "posix":
        return None
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        with mmap.mmap(-1, mmap.PAGESIZE, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE) as page:
            page[0] = 0xC3
            view = ctypes.c_char.from_buffer(page)
            libc = ctypes.CDLL(None, use_errno=True)
            address, size = ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(mmap.PAGESIZE)
            refused = libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_EXEC)
            reason = os.strerror(ctypes.get_errno())
            del view  # the page cannot be closed while it is looked at
            return reason if refused else None
    except OSError as error:
        return error.strerror or str(error)


# -- memory and disk -------------------------------------------------------------------------------------------------


class _Held:
    """The kernels used last, at most `size`; whoever holds a dropped one can go on calling it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kernels: OrderedDict[str, Kernel] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: str) -> Kernel | None:
        with self.lock:
            kernel = self._kernels.get(key)
            if kernel is not None:
                self._kernels.move_to_end(key)
            return kernel

    def put(self, key: str, kernel: Kernel) -> None:
        dropped = []  # unloaded, if nobody else holds them, when the lock is free again
        with self.lock:
            self._kernels[key] = kernel
            while len(self._kernels) > self._size:
                dropped.append(self._kernels.popitem(last=False))

    def __len__(self) -> int:
        return len(self._kernels)


class _State:
    """Where kernels are kept: on disk, in a folder that is looked for on first use, and in memory."""

    def __init__(self, find: Callable[[], Store], held: _Held) -> None:
        self._find = find
        self.held = held

    @functools.cached_property
    def store(self) -> Store:
        return self._find()


_state = _State(lambda: user_store("kernels", _MAGIC, "compiled kernels"), _Held(MAX_KERNELS))


@contextmanager
def kept_in(folder: Path | None, max_kernels: int = MAX_KERNELS) -> Iterator[_State]:
    """Keep object code in another folder, and begin with no kernels in memory; for tests and measurements.

    It holds for the whole process, not for one thread. None: nothing is kept on disk.
    """
    global _state
    before, store = _state, Store(folder, _MAGIC)
    _state = _State(lambda: store, _Held(max_kernels))
    try:
        yield _state
    finally:
        _state = before


def _key(text: str, target: Target) -> str:
    """The name of the object code: a digest of all that it depends on."""
    llvm = _llvm()
    llvm_version = ".".join(map(str, llvm.llvm_version_info))
    parts = (str(FORMAT), llvm_version, target.triple, target.cpu, target.features, text)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _from_disk(store: Store, key: str) -> Kernel | None:
    code = store.read(key)
    if code is None:
        return None
    try:
        return _link(code, from_disk=True)
    except RuntimeError as error:
        store.reject(key, f"could not be linked ({error})")
        return None


# -- LLVM ------------------------------------------------------------------------------------------------------------

_llvm_lock = threading.RLock()


@contextmanager
def _lock() -> Iterator[None]:
    lock = _llvm_lock  # a child of a fork gets another one
    with lock:
        yield


@functools.cache
def _llvm() -> Any:
    """llvmlite.binding, made ready for this machine."""
    import llvmlite.binding as llvm

    with _lock():
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    return llvm


def _target_machine(target: Target) -> Any:
    llvm = _llvm()
    if target.triple != _host().triple:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(target.triple)
    # JITLink puts code and constants side by side, so 32-bit offsets reach; Windows' linker promises no such thing.
    model = "small" if _JIT_LINK else "jitdefault"
    return machine.create_target_machine(cpu=target.cpu, features=target.features, opt=3, reloc="pic", codemodel=model)


def _emit(text: str, target: Target, *, assembly: bool) -> bytes | str:
    """Object code, or assembly, of the module; a module of its own context, so that LLVM forgets all of it again."""
    llvm = _llvm()
    machine = _target_machine(target)
    if not target.masks:
        text = spelled_out(text, target.bits == 256)
    with llvm.create_context() as context, llvm.parse_assembly(text, context=context) as module:
        module.triple = target.triple
        module.data_layout = str(machine.target_data)
        module.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=3)
        options.loop_unrolling = options.loop_interleaving = False
        options.loop_vectorization = options.slp_vectorization = False
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        return machine.emit_assembly(module) if assembly else machine.emit_object(module)


_JIT_LINK = os.name != "nt"
_jit: Any = None
_linked = 0  # kernels, ever


def _link(code: bytes, *, from_disk: bool) -> Kernel:
    """Put object code into executable memory."""
    global _jit, _linked
    llvm = _llvm()
    if _linked % _KERNELS_PER_JIT == 0:  # the old one stays until its last kernel goes
        _jit = llvm.create_lljit_compiler(_target_machine(_host()), use_jit_link=_JIT_LINK, suppress_errors=True)
    _linked += 1
    # LLJIT finds the process's own symbols by itself: LLVM makes memset, memcpy or expf of some loops and calls.
    library = llvm.JITLibraryBuilder().add_object_img(code).export_symbol("kernel")
    tracker = library.link(_jit, f"kernel_{_linked}")
    call: Any = _SIGNATURE(tracker["kernel"])
    call.keeps = (tracker, _jit)  # the code is unloaded when the last reference to `call` goes
    return Kernel(call, tracker["kernel"], from_disk)


# -- fork ------------------------------------------------------------------------------------------------------------


def _llvmlite_lock() -> Any:
    """llvmlite's own lock, which it takes in every call, also when a kernel is unloaded; None if it is not imported."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    return getattr(getattr(ffi, "lib", None), "_lock", None)


_held_by_fork: list[Any] = []


def _before_fork() -> None:
    """Wait until no thread is inside LLVM, nor among the kernels in memory."""
    global _held_by_fork
    locks = [lock for lock in (_llvm_lock, _llvmlite_lock(), _state.held.lock) if lock is not None]
    for lock in locks:
        lock.__enter__()
    _held_by_fork = locks


def _after_fork() -> None:
    """The thread that forked holds the locks, in the parent and in the child: both let go."""
    global _held_by_fork
    locks, _held_by_fork = _held_by_fork, []
    for lock in reversed(locks):
        lock.__exit__(None, None, None)


def _after_fork_in_child() -> None:
    global _llvm_lock
    _after_fork()
    _llvm_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
