"""The process in which kernels are interpreted."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import interpreted as kernels
import pytest

from plainconv.gpu import launch


@pytest.fixture(scope="session")
def interpreted():
    """A function that calls another, of tests/interpreted.py, where Triton's kernels are Python."""
    if sentence := launch.why_not():
        pytest.skip(sentence)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=kernels.begin) as process:
        yield lambda function, *given, **named: process.submit(function, *given, **named).result()
