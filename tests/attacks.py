"""What may happen to a file of a private folder (plainconv/cpu/store.py) between two processes, or to its writer."""

import io
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from plainconv.cpu import store

by_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def _another_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": _another_bit,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "cut in the head": lambda file: file.write_bytes(file.read_bytes()[:10]),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "another magic": lambda file: file.write_bytes(b"X" + file.read_bytes()[1:]),
}


def _half_written(stop: Callable[[], NoReturn]) -> None:
    class Half(io.FileIO):
        def write(self, content: Any) -> NoReturn:
            super().write(content[: len(content) // 2])
            stop()

    store.open = lambda at, mode: (Half if "w" in mode else open)(at, mode)  # type: ignore[attr-defined]


def _before_the_rename(stop: Callable[[], NoReturn]) -> None:
    os.replace = lambda *_, **__: stop()


def _behind_the_rename(stop: Callable[[], NoReturn]) -> None:
    rename = os.replace
    os.replace = lambda *how, **more: (rename(*how, **more), stop())


# Each makes a process stop there when it first writes a file.
MOMENTS = {
    "half written": _half_written,
    "before the rename": _before_the_rename,
    "behind the rename": _behind_the_rename,
}


def told_by(*codes: str) -> str:
    """What new processes print that run these at once."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    commands = [[sys.executable, "-c", code] for code in codes]
    each = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for command in commands]
    return "".join(process.communicate(timeout=120)[0] for process in each)


def killed(work: Callable[[], object], moment: str | None = None, after_s: float = 0.0) -> None:
    """Let a child do this over and over, and kill it at that moment of its first write, or so long after it began."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:

            def stop() -> NoReturn:
                os.write(writing, b"!")
                while True:
                    time.sleep(60)

            if moment:
                MOMENTS[moment](stop)
            else:
                os.write(writing, b"!")
            while True:
                work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        with open(reading, "rb") as told:
            assert told.read(1) == b"!", "the child ended by itself"
        time.sleep(after_s)
    finally:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
