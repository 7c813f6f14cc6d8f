"""Masks for processors that have none: all lanes at once where the mask is whole, else one lane after the other.

AVX-512 stores some lanes of a vector as quickly as all of them.  AVX2's instruction for it takes up to 42 steps (on
AMD's processors; A. Fog, "Instruction tables"), and for numbers of two bytes there is none, so LLVM writes a branch for
every lane; SSE and NEON have nothing at all, but their few lanes of float are best left to LLVM, as more branches cost
registers.  Most masks are tails', and most of these are whole.  Kernels know nothing of this: functions take the place
of LLVM's own, and are inlined.
"""

from __future__ import annotations

import re

_DECLARED = re.compile(r"^declare .* @llvm\.masked\.(store|load)\.v(\d+)(f32|f64|i16)\.p0\(.*\)$", re.MULTILINE)
_TYPES = {"f32": ("float", 4), "f64": ("double", 8), "i16": ("i16", 2)}

# The arguments are those of llvm.masked.store and load; {wide} is an integer of as many bits as the vector.
_STORE = """\
define internal void @masked.store.v{lanes}{short}.p0(<{lanes} x {type}> %value, ptr %to, i32 %align, \
<{lanes} x i1> %mask) alwaysinline nounwind {{
  %bits = bitcast <{lanes} x i1> %mask to i{lanes}
  %all = icmp eq i{lanes} %bits, -1
  br i1 %all, label %whole, label %part
whole:
  store <{lanes} x {type}> %value, ptr %to, align {size}
  ret void
part:
{part}}}"""

_SOME_LANES = """\
  call void @llvm.masked.store.v{lanes}{short}.p0(<{lanes} x {type}> %value, ptr %to, i32 {size}, <{lanes} x i1> %mask)
  ret void
"""

_EACH_LANE = """\
  %packed = bitcast <{lanes} x i16> %value to {wide}
  br label %lane
lane:
  %i = phi i64 [ 0, %part ], [ %next, %behind ]
  %rest = phi {wide} [ %packed, %part ], [ %shifted, %behind ]
  %left = phi i{lanes} [ %bits, %part ], [ %fewer, %behind ]
  %set = trunc i{lanes} %left to i1
  br i1 %set, label %one, label %behind
one:
  %number = trunc {wide} %rest to i16
  %at = getelementptr i16, ptr %to, i64 %i
  store i16 %number, ptr %at, align 2
  br label %behind
behind:
  %next = add nuw nsw i64 %i, 1
  %shifted = lshr {wide} %rest, 16
  %fewer = lshr i{lanes} %left, 1
  %more = icmp ne i{lanes} %fewer, 0
  br i1 %more, label %lane, label %done
done:
  ret void
"""

_LOAD = """\
define internal <{lanes} x i16> @masked.load.v{lanes}i16.p0(ptr %from, i32 %align, <{lanes} x i1> %mask, \
<{lanes} x i16> %zero) alwaysinline nounwind {{
  %bits = bitcast <{lanes} x i1> %mask to i{lanes}
  %all = icmp eq i{lanes} %bits, -1
  br i1 %all, label %whole, label %part
whole:
  %vector = load <{lanes} x i16>, ptr %from, align 2
  ret <{lanes} x i16> %vector
part:
  br label %lane
lane:
  %i = phi i64 [ {last}, %part ], [ %next, %behind ]
  %found = phi {wide} [ 0, %part ], [ %joined, %behind ]
  %left = phi i{lanes} [ %bits, %part ], [ %fewer, %behind ]
  %set = icmp slt i{lanes} %left, 0
  br i1 %set, label %one, label %behind
one:
  %at = getelementptr i16, ptr %from, i64 %i
  %number = load i16, ptr %at, align 2
  br label %behind
behind:
  %low = phi i16 [ 0, %lane ], [ %number, %one ]
  %shifted = shl {wide} %found, 16
  %widened = zext i16 %low to {wide}
  %joined = or {wide} %shifted, %widened
  %fewer = shl i{lanes} %left, 1
  %next = add nsw i64 %i, -1
  %more = icmp sge i64 %next, 0
  br i1 %more, label %lane, label %done
done:
  %result = bitcast {wide} %joined to <{lanes} x i16>
  ret <{lanes} x i16> %result
}}"""


def spelled_out(text: str, floats: bool) -> str:
    """A module for a processor without masks of its own: functions load and store halves, and store floats, too."""
    for found in reversed(list(_DECLARED.finditer(text))):
        what, lanes, short = found.groups()
        type_, size = _TYPES[short]
        if short != "i16" and (what == "load" or not floats):
            continue
        own = f"{what}.v{lanes}{short}.p0("
        names = {"lanes": lanes, "short": short, "type": type_, "size": size, "wide": f"i{int(lanes) * 16}"}
        if what == "load":
            function = _LOAD.format(last=int(lanes) - 1, **names)
        elif short == "i16":
            function = _STORE.format(part=_EACH_LANE.format(**names), **names)
        else:
            function = f"{found[0]}\n" + _STORE.format(part=_SOME_LANES.format(**names), **names)
        head, rest = text[: found.start()], text[found.end() :]
        text = head + function + rest.replace(f"@llvm.masked.{own}", f"@masked.{own}")
    return text
