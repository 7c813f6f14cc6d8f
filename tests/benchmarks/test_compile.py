"""What compiling takes is measured of kernels that are compiled, and loading of kernels that are loaded."""

import importlib.util
from pathlib import Path

import pytest

from plainconv.cpu import compile as cpu

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compile.py"
pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason="no kernels here")


def test_kernels_are_compiled_once_and_then_loaded(tmp_path):
    spec = importlib.util.spec_from_file_location("compiling", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    made, loads = script.measure(script.requests(["seed_mnist"], 1), folder)
    assert len(made) == len(loads) == len(list(folder.iterdir())) > 3
    assert {one.by[1] for one in made} == {"forward", "grad_input", "grad_weight"}
    text = script.page(made, loads)
    assert f"| all |  |  | {len(made)} |" in text
