"""Masks where a processor has none: what is stored and loaded is test_emit.py's; here, in how many steps."""

import pytest

from plainconv.cpu import compile as cpu
from plainconv.cpu.compile import Target
from plainconv.cpu.emit import Emit, natives
from plainconv.cpu.masks import spelled_out

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

WIDE = "+avx,+avx2,+fma,+f16c,+avx512f,+avx512vl,+avx512bw,+avx512dq"
TARGETS = {
    "avx512": Target("x86_64-unknown-linux-gnu", "x86-64-v4", WIDE, 512),
    "avx2": Target("x86_64-unknown-linux-gnu", "x86-64-v3", "+avx,+avx2,+fma,+f16c", 256),
    "sse": Target("x86_64-unknown-linux-gnu", "x86-64", "+sse2", 128),
    "neon": Target.neon(),
}


def tail(target, stored, load=False):
    """The text of a kernel that stores, or loads, the first lanes of a vector."""
    e = Emit(target.bits // 32, native=natives(target))
    x, y, left = e.arguments("ptr", "ptr", "i64")
    mask = e.tail(left)
    e.store(e.load(x, 0, mask if load else None, stored), y, 0, None if load else mask, stored)
    return e.module()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("load", [False, True], ids=["store", "load"])
@pytest.mark.parametrize("stored", ["float", "half", "bfloat"])
def test_only_avx512_takes_masks_as_they_are(target, stored, load):
    text = tail(target, stored, load)
    assert target.masks is (target.bits == 512)
    # AVX2 loads floats under a mask as quickly as without one.
    assert ("alwaysinline" in spelled_out(text, floats=True)) is (stored != "float" or not load)
    assert ("alwaysinline" in spelled_out(text, floats=False)) is (stored != "float")
    code = cpu.assembly(text, target)
    if target.masks:
        assert code.count("\n\tj") == 0


@pytest.mark.parametrize("target", ["avx2", "sse", "neon"])
@pytest.mark.parametrize("load", [False, True], ids=["store", "load"])
def test_lanes_of_half_types_are_no_branch_each(target, load):
    """Which lanes there are is asked in a loop."""
    code = cpu.assembly(tail(TARGETS[target], "half", load), TARGETS[target])
    branches = [line for line in code.splitlines() if line.startswith(("\tj", "\tb.", "\tcb", "\ttb"))]
    assert len(branches) <= 6
    assert "\tcall" not in code
    assert "\tbl\t" not in code


def test_a_whole_vector_is_stored_at_once():
    code = cpu.assembly(tail(TARGETS["avx2"], "float"), TARGETS["avx2"])
    assert code.count("vmaskmovps") == 1
    assert code.count("\tvmovups\t%ymm") == 1
