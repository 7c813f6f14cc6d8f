"""Where machine code cannot be made, explain says so and the others serve; and it says what cache is ignored."""

import os
import subprocess
import sys

import pytest
import torch

import plainconv
from plainconv.cpu import compile as compiler

BEGINNING = """
import ctypes, sys, torch
x, w = torch.randn(2, 3, 20, 21), torch.randn(4, 3, 3, 3)
expected = torch.nn.functional.conv2d(x, w, padding=1)  # torch makes machine code too
if sys.argv[1] == "llvmlite":
    sys.modules["llvmlite"] = sys.modules["llvmlite.binding"] = None
elif ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE of Linux 6.3: no memory becomes executable
    sys.exit(77)
import plainconv
torch.testing.assert_close(plainconv.conv2d(x, w, padding=1), expected, rtol=1e-4, atol=1e-4)
try:
    plainconv.conv2d(x, w, algorithm="direct")
except plainconv.AlgorithmRefused as error:
    print("refused:", error)
print(plainconv.explain(x, w, padding=1))
"""


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("llvmlite", "llvmlite, which compiles the kernels, cannot be imported"),
        pytest.param(
            "memory",
            "this system lets no program make machine code and run it",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="forbids executable memory with prctl"),
        ),
    ],
)
def test_the_others_serve_and_explain_says_why(lacking, words):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", BEGINNING, lacking]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if done.returncode == 77:
        pytest.skip("this kernel cannot forbid it")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "refused:" in said[0]
    assert words in said[0]
    for name in ("narrow", "direct"):
        assert [line for line in said if line.startswith(f"{name} ") and words in line]
    assert [line for line in said if line.endswith("<- chosen")]


@pytest.mark.skipif(os.name != "posix", reason="modes of folders are POSIX's")
@pytest.mark.skipif(compiler.why_not() is not None, reason=str(compiler.why_not()))
def test_explain_says_that_a_folder_was_ignored(tmp_path):
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    x, w = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3)
    with compiler.kept_in(folder):
        plainconv.conv2d(x, w, algorithm="narrow")  # served all the same
        said = str(plainconv.explain(x, w))
    (note,) = [line for line in said.splitlines() if line.startswith("note: ")]
    assert str(folder) in note
    assert "others" in note
    assert list(folder.iterdir()) == []
