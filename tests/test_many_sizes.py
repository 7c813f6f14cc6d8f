"""A thousand sizes in a row: kernels are compiled for the first of them, and memory is bounded."""

import gc
from pathlib import Path

import pytest
import torch
from checks import channels_last

import plainconv
from plainconv import remember
from plainconv.cpu import compile as compiler

pytestmark = pytest.mark.skipif(compiler.why_not() is not None, reason=str(compiler.why_not()))

# Pictures of fewer rows have kernels of their own, at most one for each number of rows.
SIZES = [(32 + i * 7 % 60, 40 + i * 13 % 230) for i in range(1000)]
MOST_GROWTH = 64 << 20


def resident():
    """Bytes of this process that are in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture
def made(monkeypatch):
    """The keys of kernels that were compiled, in order; none is kept from other tests."""
    keys, real = [], compiler._emit

    def emit(text, target, **how):
        keys.append(compiler._key(text, target))
        return real(text, target, **how)

    monkeypatch.setattr(compiler, "_emit", emit)
    remember.forget()
    with compiler.kept_in(None):
        yield keys
    remember.forget()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of the process from /proc")
@pytest.mark.parametrize(
    ("algorithm", "channels", "taps", "groups", "last"),
    [
        ("narrow", 3, 3, 1, False),
        ("depthwise", 4, 3, 4, False),
        ("depthwise", 20, 3, 20, True),
        pytest.param("direct", 6, 3, 1, False, marks=pytest.mark.slow),
        pytest.param("direct", 6, 3, 1, True, marks=pytest.mark.slow),
        pytest.param("pointwise", 6, 1, 1, False, marks=pytest.mark.slow),
        pytest.param("pointwise", 6, 1, 1, True, marks=pytest.mark.slow),
    ],
)
def test_a_thousand_sizes(algorithm, channels, taps, groups, last, made):
    weight = torch.randn(channels, channels // groups, taps, taps)
    compiled, before = [], 0
    assert len(set(SIZES)) == len(SIZES)
    for number, (high, wide) in enumerate(SIZES):
        x = torch.randn(1 + number % 3, channels, high, wide)
        x = channels_last(x) if last else x
        found = plainconv.conv2d(x, weight, groups=groups, algorithm=algorithm)
        if number % 100 == 0:
            expected = torch.nn.functional.conv2d(x, weight, groups=groups)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            compiled.append(len(made))
        if number == 300:
            before = resident()
    assert len(made) == len(set(made)), "a kernel was compiled twice"
    assert 1 <= len(made) <= 16
    assert compiled[2] == compiled[-1], f"new sizes went on compiling: {compiled}"
    assert resident() - before < MOST_GROWTH
    assert sum(remember._sizes.values()) <= remember.MOST_BYTES
