"""Text to machine code: targets, the object code on disk under attack, and how long a kernel lives."""

import gc
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path

import platformdirs
import pytest
import torch
from attacks import DAMAGES, MOMENTS, by_fork, killed, told_by

from plainconv.cpu import compile as compiler
from plainconv.cpu import store as storage
from plainconv.cpu.compile import Target

HOST = Target.host()
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes of files are POSIX's")
x86 = pytest.mark.skipif(HOST.machine != "x86_64", reason="masks features of x86")


def scale(factor: float, lanes: int = 16) -> str:
    """y[i] = factor * x[i] + 1, a vector a task; args: x, y."""
    v = f"<{lanes} x float>"
    return f"""
declare {v} @llvm.fmuladd.v{lanes}f32({v}, {v}, {v})
define void @kernel(ptr %args, i64 %begin, i64 %end) {{
entry:
  %y.at = getelementptr i64, ptr %args, i64 1
  %x = load ptr, ptr %args
  %y = load ptr, ptr %y.at
  %any = icmp slt i64 %begin, %end
  br i1 %any, label %loop, label %done
loop:
  %i = phi i64 [%begin, %entry], [%next, %loop]
  %offset = mul i64 %i, {lanes}
  %from = getelementptr float, ptr %x, i64 %offset
  %to = getelementptr float, ptr %y, i64 %offset
  %v = load {v}, ptr %from, align 4
  %w = call {v} @llvm.fmuladd.v{lanes}f32({v} %v, {v} splat (float {factor:.1f}), {v} splat (float 1.0))
  store {v} %w, ptr %to, align 4
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %end
  br i1 %more, label %loop, label %done
done:
  ret void
}}
"""


def result(kernel: compiler.Kernel, lanes: int = 16) -> torch.Tensor:
    """What the kernel makes of 0, 1, 2, ...: three tasks of four, the last left NaN."""
    x, y = torch.arange(4.0 * lanes), torch.full((4 * lanes,), torch.nan)
    args = b"".join(t.data_ptr().to_bytes(8, sys.byteorder) for t in (x, y))
    kernel.call(args, 0, 3)
    assert y[3 * lanes :].isnan().all()
    return y[: 3 * lanes]


def expected(factor: float, lanes: int = 16) -> torch.Tensor:
    return torch.arange(3.0 * lanes) * factor + 1


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kernels"


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def compile_again(folder: Path, factor: float = 3.0) -> tuple[bool, tuple[str, ...]]:
    """As a new process would: whether the kernel came from disk, and what was said; its result must be right."""
    with compiler.kept_in(folder):
        kernel = compiler.compile(scale(factor))
        assert torch.equal(result(kernel), expected(factor))
        return kernel.from_disk, compiler.notes()


# -- targets ---------------------------------------------------------------------------------------------------------


def test_the_host_can_compile():
    assert compiler.why_not() is None


@x86
@pytest.mark.parametrize(
    ("bits", "mine", "wider"), [(512, "%zmm", "none"), (256, "%ymm", "%zmm"), (128, "%xmm", "%ymm")]
)
def test_each_width_of_x86_uses_its_registers_and_runs(bits, mine, wider, folder):
    if bits > HOST.bits:
        pytest.skip("this processor has no such vectors")
    target = Target.host(bits)
    text = compiler.assembly(scale(2.0), target)
    assert mine in text
    assert wider not in text
    assert ("vfmadd" in text) == target.fma == (bits > 128)
    with compiler.kept_in(folder):
        assert torch.equal(result(compiler.compile(scale(2.0), target)), expected(2.0))


def test_neon_is_emitted():
    text = compiler.assembly(scale(2.0, lanes=4), Target.neon())
    assert "fmla" in text
    assert ".4s" in text


def test_wider_than_the_host_is_refused():
    with pytest.raises(ValueError, match="cannot be had"):
        Target.host(1024)


@x86
def test_what_was_written_is_what_runs():
    """A loop over scalars is neither vectorised nor unrolled: its one product is there once."""
    text = compiler.assembly(scale(2.0, lanes=1), HOST)
    assert len(re.findall(r"\tv?f?n?(?:mul|madd\d*)ss\t", text)) == 1
    assert not re.search(r"\tv?f?n?(?:mul|madd\d*)ps\t", text)


def test_a_wrong_text_is_an_error_that_says_so():
    with pytest.raises(RuntimeError, match="expected"):
        compiler.compile("define void @kernel(ptr %args { ret }")


def test_loops_that_become_calls_of_libc_are_linked(folder):
    zeros = """
define void @kernel(ptr %args, i64 %begin, i64 %end) {
entry:
  %y = load ptr, ptr %args
  br label %loop
loop:
  %i = phi i64 [%begin, %entry], [%next, %loop]
  %to = getelementptr float, ptr %y, i64 %i
  store float 0.0, ptr %to
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %end
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""
    assert "memset" in compiler.assembly(zeros)
    y = torch.ones(40)
    with compiler.kept_in(folder):
        compiler.compile(zeros).call(y.data_ptr().to_bytes(8, sys.byteorder), 0, 39)
    assert y.sum() == 1


# -- object code on disk ---------------------------------------------------------------------------------------------


def test_the_second_process_loads_what_the_first_compiled(folder):
    assert compile_again(folder) == (False, ())
    assert compile_again(folder) == (True, ())
    assert compile_again(folder, 4.0)[0] is False


@posix
def test_folder_and_files_are_private(folder):
    before = os.umask(0)
    try:
        compile_again(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in files(folder)] == [0o600]


def test_the_key_names_all_that_the_code_depends_on(monkeypatch):
    keys = [compiler._key("a", HOST), compiler._key("b", HOST)]
    for field, value in (("triple", "x-y-z"), ("cpu", "other"), ("features", "+other")):
        values = {"triple": HOST.triple, "cpu": HOST.cpu, "features": HOST.features, field: value}
        keys.append(compiler._key("a", Target(bits=HOST.bits, **values)))
    monkeypatch.setattr(compiler, "FORMAT", compiler.FORMAT + 1)
    keys.append(compiler._key("a", HOST))
    monkeypatch.setattr(compiler._llvm(), "llvm_version_info", (0, 0, 0))
    keys.append(compiler._key("a", HOST))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("attack", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_ignored_and_rebuilt(folder, attack):
    compile_again(folder)
    attack(files(folder)[0])
    from_disk, said = compile_again(folder)
    assert not from_disk
    assert len(said) == 1
    assert "damaged" in said[0]
    assert compile_again(folder) == (True, ())


def test_a_file_of_another_key_is_ignored(folder):
    """Object code for another processor, under this one's name, would be an illegal instruction."""
    compile_again(folder, 5.0)
    (other,) = files(folder)
    compile_again(folder, 3.0)
    (mine,) = set(files(folder)) - {other}
    mine.write_bytes(other.read_bytes())
    from_disk, said = compile_again(folder, 3.0)
    assert not from_disk
    assert "not what its name says" in said[0]


def test_a_whole_file_that_does_not_link_is_ignored(folder):
    compile_again(folder)
    name = files(folder)[0].name
    with compiler.kept_in(folder) as state:
        state.store.write(name, b"\x7fELF of nothing")
    from_disk, said = compile_again(folder)
    assert not from_disk
    assert "linked" in said[0]


CHILD = """
import sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
import torch
from plainconv.cpu import compile as compiler
from test_compile import expected, result, scale
with compiler.kept_in(Path({folder!r})):
    for _ in range(2):
        for factor in range(6):
            assert torch.equal(result(compiler.compile(scale(factor))), expected(factor))
    assert compiler.notes() == (), compiler.notes()
print("right")
"""


def unfinished(folder: Path) -> list[Path]:
    return [file for file in files(folder) if file.suffix == ".part"]


@by_fork
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_writing_leaves_nothing_that_is_read(folder, moment):
    compile_again(folder)

    def work() -> None:
        with compiler.kept_in(folder):
            compiler.compile(scale(5))

    for _ in range(2):
        killed(work, moment)
        if moment == "behind the rename":
            break
    assert len(unfinished(folder)) == (0 if moment == "behind the rename" else 2)
    assert compile_again(folder, 5.0) == (moment == "behind the rename", ())
    assert compile_again(folder, 5.0) == compile_again(folder) == (True, ())


@by_fork
def test_killed_at_any_moment(folder):
    """Files that are written over and over are the old ones or the new ones, and what is left aside goes in time."""
    with compiler.kept_in(folder) as state:
        for factor in range(6):
            compiler.compile(scale(factor))
        code = {file.name: state.store.read(file.name) for file in files(folder)}
    store, moments = storage.Store(folder, compiler._MAGIC), random.Random(0)
    for _ in range(20):
        killed(lambda: [store.write(name, data) for name, data in code.items()], after_s=moments.uniform(0, 0.01))
        assert {name: store.read(name) for name in code} == code
    assert store.notes() == ()
    assert 0 < len(unfinished(folder)) <= 20
    assert told_by(CHILD.format(tests=str(Path(__file__).parent), folder=str(folder))) == "right\n"
    old, *young = unfinished(folder)
    os.utime(old, (0, 0))
    compile_again(folder, 9.0)  # the first write of a process tidies up
    assert unfinished(folder) == young  # other processes may be writing them now


def test_an_error_while_writing_leaves_nothing(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", full)
        from_disk, said = compile_again(folder)
    assert not from_disk
    assert "No space left" in said[0]
    assert files(folder) == []


@posix
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_ignored_and_rebuilt(folder, mode):
    compile_again(folder)
    files(folder)[0].chmod(mode)
    from_disk, said = compile_again(folder)
    assert not from_disk
    assert "written by others" in said[0]
    assert compile_again(folder) == (True, ())


@posix
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_a_folder_that_others_may_write_is_ignored(folder, mode):
    compile_again(folder)
    folder.chmod(mode)
    with compiler.kept_in(folder):
        (before,) = compiler.notes()  # and explain says so before anything is compiled
    from_disk, said = compile_again(folder)
    assert not from_disk
    assert "written by others" in said[0]
    assert said[0] == before


@posix
@pytest.mark.skipif(not ROOT, reason="only root can give files away")
def test_a_file_or_folder_of_another_owner_is_ignored(folder):
    compile_again(folder)
    os.chown(files(folder)[0], 12345, -1)
    from_disk, said = compile_again(folder)
    assert not from_disk
    assert "another user" in said[0]
    assert compile_again(folder) == (True, ())
    os.chown(folder, 12345, -1)
    from_disk, said = compile_again(folder)
    assert not from_disk
    assert "another user" in said[0]


@posix
@pytest.mark.skipif(not ROOT, reason="about root in another user's home")
def test_root_leaves_no_folder_in_another_users_home(tmp_path):
    os.chown(tmp_path, 12345, -1)
    assert "another user" in compile_again(tmp_path / "plainconv" / "kernels")[1][0]
    assert files(tmp_path) == []


@posix
def test_links_are_ignored(folder, tmp_path):
    compile_again(folder)
    (file,) = files(folder)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    from_disk, said = compile_again(folder)
    assert not from_disk
    assert "is a link" in said[0]
    assert not file.is_symlink()  # replaced, and what it pointed to is untouched
    assert compile_again(folder) == (True, ())
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    from_disk, said = compile_again(folder)
    assert not from_disk
    assert "is a link" in said[0]


@posix
def test_a_pipe_in_place_of_the_file_does_not_hold_us_up(folder):
    compile_again(folder)
    (file,) = files(folder)
    file.unlink()
    os.mkfifo(file)
    assert compile_again(folder)[0] is False
    assert compile_again(folder) == (True, ())


def test_a_folder_that_cannot_be_made_or_written(tmp_path, monkeypatch):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    from_disk, said = compile_again(blocked / "kernels")
    assert not from_disk
    assert "nothing could be kept" in said[-1]

    def read_only(*args, **kwargs):
        raise PermissionError(30, "Read-only file system")

    with monkeypatch.context() as patch:  # modes do not stop root
        patch.setattr(storage.Path, "mkdir", read_only)
        from_disk, said = compile_again(tmp_path / "kernels")
    assert "Read-only" in said[0]


@posix
@pytest.mark.parametrize("filled", [False, True])
def test_a_read_only_folder(filled):
    user = 65534 if ROOT else os.geteuid()  # modes do not stop root
    top = Path(tempfile.mkdtemp())  # pytest's own folders let nobody else in
    folder = top / "kernels"
    try:
        if filled:
            compile_again(folder)
            os.chown(files(folder)[0], user, -1)
        folder.mkdir(exist_ok=True)
        top.chmod(0o755)
        folder.chmod(0o500)
        os.chown(folder, user, -1)
        os.seteuid(user)
        from_disk, said = compile_again(folder)
    finally:
        if ROOT:
            os.seteuid(0)
        folder.chmod(0o700)
        shutil.rmtree(top)
    assert from_disk == filled
    if not filled:
        assert "could be kept" in said[0]


def test_nothing_is_kept_without_a_home(monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: Path("~/.cache/plainconv"))
    store = storage.user_store("kernels", b"magic", "compiled kernels")
    assert store.folder is None
    assert store.notes() == ("this user has no home folder, so compiled kernels are kept in memory only",)
    assert not store.write("name", b"data")
    assert store.read("name") is None


def test_the_folder_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(storage, "MAX_FILES", 3)
    monkeypatch.setattr(storage, "PRUNE_EVERY", 1)
    store = storage.Store(folder, b"magic")
    for number in range(9):
        assert store.write(f"{number}", b"data")
        os.utime(folder / f"{number}", (number, number))
    assert [file.name for file in files(folder)] == ["5", "6", "7", "8"]  # pruned before the last was written


def test_two_processes_at_once(folder):
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder))
    assert told_by(code, code) == "right\n" * 2
    assert len(files(folder)) == 6
    assert compile_again(folder, 4.0) == (True, ())


# -- memory ----------------------------------------------------------------------------------------------------------


def test_kernels_in_memory_are_bounded_and_the_oldest_goes(folder):
    with compiler.kept_in(folder, max_kernels=3) as state:
        refs = [weakref.ref(compiler.compile(scale(factor))) for factor in range(3)]
        compiler.compile(scale(0))  # used again: 1 is the oldest now
        compiler.compile(scale(3))
        gc.collect()
        assert [ref() is not None for ref in refs] == [True, False, True]
        assert len(state.held) == 3
        assert compiler.compile(scale(2)) is refs[2]()


def test_many_kernels_leave_no_memory_behind(folder):
    """LLVM keeps some 9 kB of every library ever linked; 640 of them would be 6 MB."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with compiler.kept_in(folder) as state:
        compiler.compile(scale(2))
        code = state.store.read(files(folder)[0].name)
    with compiler._lock():
        for _ in range(3 * compiler._KERNELS_PER_JIT):
            compiler._link(code, from_disk=True)
        before = resident()
        for _ in range(10 * compiler._KERNELS_PER_JIT):
            compiler._link(code, from_disk=True)
        grown = resident() - before
    assert grown < 3 << 20


def test_a_dropped_kernel_goes_on_running_until_it_is_done(folder):
    """The only reference left is the one of the running call."""
    flag, seen = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    waits = """
define void @kernel(ptr %args, i64 %begin, i64 %end) {
entry:
  %seen.at = getelementptr i64, ptr %args, i64 1
  %flag = load ptr, ptr %args
  %seen = load ptr, ptr %seen.at
  store atomic i64 1, ptr %seen monotonic, align 8
  br label %loop
loop:
  %value = load atomic i64, ptr %flag monotonic, align 8
  %more = icmp ne i64 %value, 0
  br i1 %more, label %loop, label %done
done:
  store atomic i64 2, ptr %seen monotonic, align 8
  ret void
}
"""
    args = b"".join(t.data_ptr().to_bytes(8, sys.byteorder) for t in (flag, seen))
    with compiler.kept_in(folder, max_kernels=1):
        thread = threading.Thread(target=lambda: compiler.compile(waits).call(args, 0, 1))
        thread.start()
        try:
            while seen.item() != 1:
                assert thread.is_alive()
            for factor in range(2 * compiler._KERNELS_PER_JIT):  # new code would take the place of what was unloaded
                compiler.compile(scale(factor))
            gc.collect()
        finally:
            flag[0] = 0
            thread.join(timeout=60)
    assert seen.item() == 2


def test_eight_threads_compile_and_call_at_once(folder):
    wrong = []

    def work() -> None:
        for factor in range(12):
            if not torch.equal(result(compiler.compile(scale(factor))), expected(factor)):
                wrong.append(factor)

    with compiler.kept_in(folder, max_kernels=4):
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
    assert wrong == []


# -- fork ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_children_compile_while_the_parent_does(folder):
    """A fork waits until LLVM is at rest: a child that inherited its lock, or half of its work, would hang."""
    stop = threading.Event()

    def work() -> None:
        factor = 0
        while not stop.is_set():
            factor += 1
            compiler.compile(scale(factor))

    with compiler.kept_in(folder, max_kernels=4):
        thread = threading.Thread(target=work)
        thread.start()
        try:
            for number in range(5):
                child = os.fork()
                if child == 0:
                    try:
                        right = torch.equal(result(compiler.compile(scale(1000 + number))), expected(1000 + number))
                        os._exit(0 if right else 1)
                    finally:
                        os._exit(2)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
            thread.join(timeout=60)


# -- where it cannot be had ------------------------------------------------------------------------------------------


@pytest.fixture
def asked_anew():
    cached = (compiler.why_not, compiler._llvm)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_without_llvmlite(monkeypatch):
    for name in ("llvmlite", "llvmlite.binding"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "llvmlite" in compiler.why_not()
    assert "pip install" in compiler.why_not()


@pytest.mark.skipif(sys.platform != "linux", reason="forbids executable memory with prctl")
def test_without_executable_memory():
    """Linux can forbid it for a process (PR_SET_MDWE, 6.3); the linker would abort it."""
    code = """
import ctypes
from plainconv.cpu.compile import why_not
print("forbidden" if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0 else "cannot")
print(why_not())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    first, said = done.stdout.splitlines()
    if first == "cannot":
        pytest.skip("this kernel cannot forbid it")
    assert "Permission denied" in said


def test_importing_the_compiler_does_not_import_llvmlite():
    code = "import sys, plainconv.cpu.compile, plainconv.cpu.launch; print('llvmlite' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "False\n", done.stderr
