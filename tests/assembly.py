"""Assembly, of x86 and of ARM, as a test reads it: products of vectors, and vectors that go to the stack."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from plainconv.cpu.compile import Target, why_not

_PRODUCT = re.compile(r"\t(?:vfn?m(?:add|sub)\d+p[sd]|v?mulp[sd]|vdpbf16ps|fml[as]\tv\d+\.(?:4s|2d),.*)\b")


def targets() -> list[Target]:
    """What this machine can be taken for, by the width of its vectors, and an ARM processor; none without LLVM.

    LLVM orders instructions as the processor's name says, and some orders need more than SSE's 16 registers (see
    docs/log.md): that of one name is looked at on every machine.
    """
    if why_not() is not None:
        return []
    host = Target.host()
    found = [Target.host(bits) for bits in (512, 256, 128) if bits <= host.bits] + [Target.neon()]
    return [replace(one, cpu="znver4") if one.bits == 128 and one.machine == "x86_64" else one for one in found]


def name(target: Target) -> str:
    return f"{target.machine}-{target.bits}"


every_target = pytest.mark.parametrize("target", targets(), ids=name)


def blocks(code: str) -> list[str]:
    return re.split(r"\n(?=\.L\w+:)", code)


def products(block: str) -> int:
    """How many vectors are multiplied."""
    return len(_PRODUCT.findall(block))


def loads(block: str) -> int:
    """How many vectors are read from memory, by themselves or as a factor."""
    alone = len(re.findall(r"\tv?mov[au]p[sd]\t.*\), %[xyz]mm\d+|\tldu?r\tq\d+, .*", block))
    factors = re.findall(r"\t(?:vfn?m\w+|v?mulp[sd])\t[^,\n]*\(.*\), %[xyz]mm", block)
    return alone + 2 * len(re.findall(r"\tldn?p\tq\d+, .*", block)) + len(factors)


def main_tile(code: str) -> str:
    """The block with the most products; the first of them: edges come later."""
    return max(blocks(code), key=products)


def spills(block: str, code: str) -> list[str]:
    """Vectors written to the stack; frame pointers count where the function has one."""
    rbp = "b" if "movq\t%rsp, %rbp" in code else ""
    x29 = "|x29" if re.search(r"\tx29, sp\b", code) else ""
    return re.findall(rf"\tv?mov\w+\t%[xyz]mm\d+, [-\d]*\(%r[s{rbp}]p.*|\tst[rpu]+\tq\d+, .*\[(?:sp{x29})\b.*", block)
