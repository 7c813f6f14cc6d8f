"""Assembly, of x86 and of ARM, as a test reads it: products of vectors, and vectors that go to the stack."""

from __future__ import annotations

import re

from plainconv.cpu.compile import Target

_PRODUCT = re.compile(r"\t(?:vfn?m(?:add|sub)\d+p[sd]|v?mulp[sd]|vdpbf16ps|fml[as]\tv\d+\.(?:4s|2d),.*)\b")


def targets() -> list[Target]:
    """What this machine can be taken for, by the width of its vectors, and an ARM processor."""
    host = Target.host()
    return [Target.host(bits) for bits in (512, 256, 128) if bits <= host.bits] + [Target.neon()]


def name(target: Target) -> str:
    return f"{target.machine}-{target.bits}"


def blocks(code: str) -> list[str]:
    return re.split(r"\n(?=\.L\w+:)", code)


def products(block: str) -> int:
    """How many vectors are multiplied."""
    return len(_PRODUCT.findall(block))


def main_tile(code: str) -> str:
    """The block with the most products; the first of them: edges come later."""
    return max(blocks(code), key=products)


def spills(block: str, code: str) -> list[str]:
    """Vectors written to the stack; frame pointers count where the function has one."""
    rbp = "b" if "movq\t%rsp, %rbp" in code else ""
    x29 = "|x29" if re.search(r"\tx29, sp\b", code) else ""
    return re.findall(rf"\tv?mov\w+\t%[xyz]mm\d+, [-\d]*\(%r[s{rbp}]p.*|\tst[rpu]+\tq\d+, .*\[(?:sp{x29})\b.*", block)
