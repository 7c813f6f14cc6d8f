"""A small language for vector kernels: Python in, the text of an LLVM module out.

A kernel is written as Python functions that are run once, while it is built: `for` and `if` in Python unroll and
choose, `Emit.loop` and `Emit.when` become loops and branches of the machine code.  A value is an SSA name and its type;
Python's operators on values emit integer arithmetic.  Nothing here knows llvmlite, and the text alone is the identity
of a kernel: what does not change the text is not compiled twice.

    e = Emit(lanes=16)                                  # <16 x float>, one AVX-512 register
    x, y, n = e.arguments("ptr", "ptr", "i64")          # args[0], args[1], args[2]
    def step(i, _):
        at = e.begin + i
        e.store(e.fma(e.load(x, at * 16), two, e.zero), y, at * 16)
        return []
    e.loop(e.end - e.begin, [], step)
    text = e.module()                                   # define void @kernel(ptr %args, i64 %begin, i64 %end)

Offsets are 64-bit and count elements.  Tails are masks: `e.tail(left)` has its first `left` lanes set.

Memory may hold another type than the accumulators: `e.load(x, at, stored="bfloat")` and `e.store(y, out, at,
stored="bfloat")` convert on the way, and `e.broadcast(e.scalar(w, at, "bfloat"))` is a vector of one such number.
Widening is exact; narrowing rounds to the nearest, ties to even, keeps NaN, and flushes no denormals.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

SCALARS = {"float": 4, "double": 8, "half": 2, "bfloat": 2, "ptr": 8, "i64": 8, "i32": 4, "i16": 2, "i8": 1}
SUFFIX = {"float": "f32", "double": "f64", "half": "f16", "bfloat": "bf16", "i64": "i64", "i16": "i16", "i32": "i32"}
HALVES = ("half", "bfloat")  # types of memory only: they are computed with as float


Key = TypeVar("Key", bound=Hashable)


class _Processor(Protocol):
    """What of a compile.Target matters here."""

    @property
    def machine(self) -> str: ...
    def has(self, feature: str) -> bool: ...


def natives(target: _Processor) -> frozenset[str]:
    """What `Emit` may leave to a processor: "half" (converted by one instruction), "pairs" (bfloat dot products).

    A kernel that has "pairs" may add "flush": its sums know no denormals, so what it stores is rounded by one
    instruction that knows none either.
    """
    half = target.machine == "aarch64" or target.has("f16c")
    return frozenset({"half"} if half else ()) | frozenset({"pairs"} if target.has("avx512bf16") else ())


FOLDED = {  # operations on integers that are known while the kernel is built
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "udiv": operator.floordiv,
    "urem": operator.mod,
    "and": operator.and_,
}


@dataclass(frozen=True)
class Value:
    """An SSA name (or a constant) with its LLVM type; operators work on i64."""

    emit: Emit = field(repr=False, compare=False)
    text: str
    type: str

    def __add__(self, other: Value | int) -> Value:
        return self.emit.integer("add", self, other)

    def __sub__(self, other: Value | int) -> Value:
        return self.emit.integer("sub", self, other)

    def __mul__(self, other: Value | int) -> Value:
        return self.emit.integer("mul", self, other)

    def __floordiv__(self, other: Value | int) -> Value:
        """Of numbers that are not negative."""
        return self.emit.integer("udiv", self, other)

    def __mod__(self, other: Value | int) -> Value:
        """Of numbers that are not negative."""
        return self.emit.integer("urem", self, other)

    def __rsub__(self, other: Value | int) -> Value:
        return self.emit.integer("sub", other, self)

    __radd__ = __add__
    __rmul__ = __mul__

    def __lt__(self, other: Value | int) -> Value:
        return self.emit.compare("slt", self, other)

    def __gt__(self, other: Value | int) -> Value:
        return self.emit.compare("sgt", self, other)

    def __ge__(self, other: Value | int) -> Value:
        return self.emit.compare("sge", self, other)


class Emit:
    """Builds one kernel: void kernel(ptr args, i64 begin, i64 end), args an array of 64-bit pointers and integers.

    lanes: elements of a vector.  element: LLVM type of the accumulators, "float" or "double".
    native: `natives(target)`; without "half" such numbers are converted by integer arithmetic, which runs anywhere.
    """

    def __init__(self, lanes: int, element: str = "float", native: frozenset[str] = frozenset()) -> None:
        self.lanes, self.element, self.native = lanes, element, native
        self.vector = f"<{lanes} x {element}>"
        self._lines: list[str] = ["entry:"]
        self._declared: dict[str, str] = {}
        self._names = 0
        self._block = "entry"
        self.begin, self.end = Value(self, "%begin", "i64"), Value(self, "%end", "i64")
        self.zero = Value(self, "zeroinitializer", self.vector)

    # -- text --------------------------------------------------------------------------------------------------------

    def module(self) -> str:
        """The finished text."""
        declared = [f"declare {text}" for text in sorted(self._declared.values())]
        head = "define void @kernel(ptr %args, i64 %begin, i64 %end) nounwind {"
        return "\n".join([*declared, head, *self._lines, "  ret void", "}", ""])

    def _name(self) -> str:
        self._names += 1
        return f"%v{self._names}"

    def _emit(self, instruction: str, type_: str) -> Value:
        name = self._name()
        self._lines.append(f"  {name} = {instruction}")
        return Value(self, name, type_)

    def _label(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label

    def _call(self, function: str, type_: str, *arguments: Value) -> Value:
        given = ", ".join(f"{argument.type} {argument.text}" for argument in arguments)
        types = ", ".join(argument.type for argument in arguments)
        self._declared[function] = f"{type_} @{function}({types})"
        if type_ == "void":
            self._lines.append(f"  call void @{function}({given})")
            return Value(self, "", "void")
        return self._emit(f"call {type_} @{function}({given})", type_)

    # -- integers ----------------------------------------------------------------------------------------------------

    def arguments(self, *types: str, within: Value | None = None) -> list[Value]:
        """args[0], args[1], ... as values of these types, "ptr" or "i64"; or the same of another array like args."""
        values, array = [], within.text if within else "%args"
        for place, type_ in enumerate(types):
            address = self._emit(f"getelementptr i64, ptr {array}, i64 {place}", "ptr")
            values.append(self._emit(f"load {type_}, ptr {address.text}, !invariant.load !{{}}", type_))
        return values

    def number(self, value: Value | int) -> Value:
        """An i64, constant or not."""
        return value if isinstance(value, Value) else Value(self, str(value), "i64")

    def integer(self, operation: str, a: Value | int, b: Value | int) -> Value:
        """add, sub, mul, udiv, urem or and of two i64, folded where both are constants or one changes nothing."""
        a, b = self.number(a), self.number(b)
        known = a.text.lstrip("-").isdigit(), b.text.lstrip("-").isdigit()
        if all(known):
            return self.number(FOLDED[operation](int(a.text), int(b.text)))
        if (operation in ("add", "sub") and b.text == "0") or (operation in ("mul", "udiv") and b.text == "1"):
            return a
        if (operation == "add" and a.text == "0") or (operation == "mul" and a.text == "1"):
            return b
        flags = " nsw" if operation in ("add", "sub", "mul") else ""
        return self._emit(f"{operation}{flags} i64 {a.text}, {b.text}", "i64")

    def compare(self, relation: str, a: Value | int, b: Value | int) -> Value:
        """slt, sge, eq ... of two i64, an i1."""
        a, b = self.number(a), self.number(b)
        return self._emit(f"icmp {relation} i64 {a.text}, {b.text}", "i1")

    def least(self, a: Value | int, b: Value | int) -> Value:
        """The smaller of two i64."""
        return self._call("llvm.smin.i64", "i64", self.number(a), self.number(b))

    def most(self, a: Value | int, b: Value | int) -> Value:
        """The larger of two i64."""
        return self._call("llvm.smax.i64", "i64", self.number(a), self.number(b))

    def opaque(self, value: Value) -> Value:
        """The same number or address, of which LLVM knows nothing: it stays one sum, and is not taken apart again."""
        return self._emit(f'call {value.type} asm "", "=r,0"({value.type} {value.text})', value.type)

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        """a if the condition holds, else b."""
        return self._emit(f"select i1 {condition.text}, {a.type} {a.text}, {b.type} {b.text}", a.type)

    # -- control -----------------------------------------------------------------------------------------------------

    def loop(
        self, count: Value | int, carried: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
    ) -> list[Value]:
        """for i in range(count): carried = body(i, carried); the last carried values.

        The carried values stay in registers.  A count that is not constant may be zero.
        """
        count = self.number(count)
        constant = count.text.lstrip("-").isdigit()
        if constant and int(count.text) <= 0:
            return list(carried)
        if constant and int(count.text) == 1:
            return list(body(self.number(0), list(carried)))
        self._names += 1
        head, after = f"loop{self._names}", f"after{self._names}"
        before = self._block
        if constant:
            self._lines.append(f"  br label %{head}")
        else:
            some = self.compare("sgt", count, 0)
            self._lines.append(f"  br i1 {some.text}, label %{head}, label %{after}")
        self._label(head)
        i = Value(self, self._name(), "i64")
        inside = [Value(self, self._name(), value.type) for value in carried]
        place = len(self._lines)
        out = list(body(i, inside))
        following = self._emit(f"add nsw i64 {i.text}, 1", "i64")
        phis = [f"  {i.text} = phi i64 [ 0, %{before} ], [ {following.text}, %{self._block} ]"]
        phis += [
            f"  {value.text} = phi {value.type} [ {start.text}, %{before} ], [ {next_.text}, %{self._block} ]"
            for value, start, next_ in zip(inside, carried, out, strict=True)
        ]
        self._lines[place:place] = phis
        last = self._block
        again = self.compare("slt", following, count)
        self._lines.append(f"  br i1 {again.text}, label %{head}, label %{after}")
        self._label(after)
        if constant:
            return out
        joined = []
        for start, next_ in zip(carried, out, strict=True):
            phi = f"phi {start.type} [ {start.text}, %{before} ], [ {next_.text}, %{last} ]"
            joined.append(self._emit(phi, start.type))
        return joined

    def when(self, condition: Value, body: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
        """Run body's code if the condition holds, else otherwise's."""
        self._names += 1
        then, other, after = f"then{self._names}", f"else{self._names}", f"joined{self._names}"
        self._lines.append(f"  br i1 {condition.text}, label %{then}, label %{other if otherwise else after}")
        self._label(then)
        body()
        self._lines.append(f"  br label %{after}")
        if otherwise:
            self._label(other)
            otherwise()
            self._lines.append(f"  br label %{after}")
        self._label(after)

    def only_if(
        self, condition: Value, state: dict[Key, Value], changed: Iterable[Key], body: Callable[[], None]
    ) -> None:
        """Run body's code if the condition holds; it may put new values in state, under the keys that are `changed`."""
        self._names += 1
        then, after = f"then{self._names}", f"joined{self._names}"
        before, old = self._block, dict(state)
        self._lines.append(f"  br i1 {condition.text}, label %{then}, label %{after}")
        self._label(then)
        body()
        last = self._block
        self._lines.append(f"  br label %{after}")
        self._label(after)
        for key in changed:
            phi = f"[ {old[key].text}, %{before} ], [ {state[key].text}, %{last} ]"
            state[key] = self._emit(f"phi {old[key].type} {phi}", old[key].type)

    def enter(self, kernel: Value, args: Value, begin: Value | int, end: Value | int) -> None:
        """Call another kernel, at this address, on its tasks from begin to end."""
        begin, end = self.number(begin), self.number(end)
        given = f"ptr {args.text}, i64 {begin.text}, i64 {end.text}"
        self._lines.append(f"  call void {kernel.text}({given})")

    # -- memory ------------------------------------------------------------------------------------------------------

    def at(self, pointer: Value, offset: Value | int, type_: str | None = None) -> Value:
        """The address `offset` elements of `type_` (the accumulators' by default) behind a pointer."""
        offset = self.number(offset)
        if offset.text == "0":
            return pointer
        return self._emit(f"getelementptr {type_ or self.element}, ptr {pointer.text}, i64 {offset.text}", "ptr")

    def address(self, pointer: Value) -> Value:
        """A pointer as a number."""
        return self._emit(f"ptrtoint ptr {pointer.text} to i64", "i64")

    def scalar(self, pointer: Value, offset: Value | int = 0, type_: str | None = None) -> Value:
        """One element."""
        type_ = type_ or self.element
        address = self.at(pointer, offset, type_)
        return self._emit(f"load {type_}, ptr {address.text}, align {SCALARS[type_]}", type_)

    def put(self, value: Value, pointer: Value, offset: Value | int = 0) -> None:
        """Write one element, of the value's own type."""
        address = self.at(pointer, offset, value.type)
        self._lines.append(f"  store {value.type} {value.text}, ptr {address.text}, align {SCALARS[value.type]}")

    def stack(self, type_: str, count: int) -> Value:
        """Room for `count` elements on the stack, for as long as the kernel runs."""
        name = self._name()
        self._lines.insert(1, f"  {name} = alloca [{count} x {type_}], align 64")
        return Value(self, name, "ptr")

    def load(
        self, pointer: Value, offset: Value | int = 0, mask: Value | None = None, stored: str | None = None
    ) -> Value:
        """A vector of accumulators, read from elements of type `stored`; lanes outside the mask are zero, not read."""
        stored = stored or self.element
        # Half types are moved as integers: not every target has an instruction for a vector of them.
        return self.widen(self._load(self.at(pointer, offset, stored), _carrier(stored), mask), stored)

    def load_first(self, pointer: Value, offset: Value | int, count: int, stored: str | None = None) -> Value:
        """A vector of which only the first `count` lanes are needed: no more is read than a power of two of them."""
        whole, stored = self.lanes, stored or self.element
        few = 1 << (count - 1).bit_length()
        if few >= whole:
            return self.load(pointer, offset, None, stored)
        type_ = _carrier(stored)
        address, vector = self.at(pointer, offset, stored), f"<{few} x {type_}>"
        first = self._emit(f"load {vector}, ptr {address.text}, align {SCALARS[type_]}", vector)
        numbers = ", ".join(f"i32 {lane}" if lane < few else "i32 poison" for lane in range(whole))
        text = f"shufflevector {vector} {first.text}, {vector} poison, <{whole} x i32> <{numbers}>"
        return self.widen(self._emit(text, f"<{whole} x {type_}>"), stored)

    def _load(self, address: Value, type_: str, mask: Value | None) -> Value:
        vector, align = f"<{self.lanes} x {type_}>", SCALARS[type_]
        if mask is None:
            return self._emit(f"load {vector}, ptr {address.text}, align {align}", vector)
        name, alignment = f"llvm.masked.load.v{self.lanes}{SUFFIX[type_]}.p0", Value(self, str(align), "i32")
        return self._call(name, vector, address, alignment, mask, Value(self, "zeroinitializer", vector))

    def store(
        self,
        value: Value,
        pointer: Value,
        offset: Value | int = 0,
        mask: Value | None = None,
        stored: str | None = None,
    ) -> None:
        """Write a vector of accumulators as elements of type `stored`; lanes outside the mask are not touched."""
        stored = stored or self.element
        value, address, align = self.narrow(value, stored), self.at(pointer, offset, stored), SCALARS[stored]
        if mask is None:
            self._lines.append(f"  store {value.type} {value.text}, ptr {address.text}, align {align}")
            return
        suffix = f"v{self.lanes}{SUFFIX[_carrier(stored)]}.p0"
        self._call(f"llvm.masked.store.{suffix}", "void", value, address, Value(self, str(align), "i32"), mask)

    def stream(self, value: Value, pointer: Value, offset: Value | int = 0, stored: str | None = None) -> None:
        """`store` to memory itself, past the caches; the address is a multiple of the vector's size.

        Other threads may see it late: `fence` before the kernel ends.
        """
        stored = stored or self.element
        value, address = self.narrow(value, stored), self.at(pointer, offset, stored)
        align = self.lanes * SCALARS[stored]
        self._lines.append(
            f"  store {value.type} {value.text}, ptr {address.text}, align {align}, !nontemporal !{{i32 1}}"
        )

    def fence(self) -> None:
        """Wait until all that was stored can be seen by other threads."""
        self._lines.append("  fence seq_cst")

    def prefetch(self, address: Value, to: str = "read") -> None:
        """Ask for the line of the cache at an address, which need not exist, to "read" or to "write" it."""
        numbers = (Value(self, text, "i32") for text in ("1" if to == "write" else "0", "2", "1"))
        self._call("llvm.prefetch.p0", "void", address, *numbers)

    def carry(self, source: Value, to: Value, mask: Value, stored: str) -> None:
        """Copy a vector of elements as they are; those outside the mask are not read, and become zero."""
        value = self._load(source, _carrier(stored), mask)
        self._lines.append(f"  store {value.type} {value.text}, ptr {to.text}, align {SCALARS[stored]}")

    def move(self, to: Value, source: Value, size: Value) -> None:
        """Copy so many bytes; the two may overlap."""
        self._call("llvm.memmove.p0.p0.i64", "void", to, source, size, Value(self, "false", "i1"))

    def gather(self, pointer: Value, places: Value, mask: Value | None, type_: str | None = None) -> Value:
        """Lane i is element places[i]; lanes outside the mask are zero and are not read.

        `widen` makes accumulators of what was gathered as another type.
        """
        type_ = type_ or self.element
        pointers, vector = f"<{self.lanes} x ptr>", f"<{self.lanes} x {type_}>"
        each = self._emit(f"getelementptr {type_}, ptr {pointer.text}, {places.type} {places.text}", pointers)
        mask = mask or Value(self, "splat (i1 true)", f"<{self.lanes} x i1>")
        alignment, zero = Value(self, str(SCALARS[type_]), "i32"), Value(self, "zeroinitializer", vector)
        name = f"llvm.masked.gather.v{self.lanes}{SUFFIX[type_]}.v{self.lanes}p0"
        return self._call(name, vector, each, alignment, mask, zero)

    # -- lanes -------------------------------------------------------------------------------------------------------

    def tail(self, left: Value | int) -> Value:
        """A mask whose first `left` lanes are set (all, if left is larger)."""
        return self.mask(self._bits_below(left, self.lanes))

    def tail_of_pairs(self, left: Value | int) -> Value:
        """The same of the elements of pairs, two a lane (see `load_pairs`)."""
        return self.mask(self._bits_below(left, 2 * self.lanes), 2 * self.lanes)

    def within(self, first: Value | int, size: Value | int) -> Value:
        """A mask of the lanes i with 0 <= first + i < size."""
        return self.mask(self.bits_within(first, size))

    def bits_within(self, first: Value | int, size: Value | int) -> Value:
        """The same as bits of an integer, which can be kept in memory."""
        first = self.number(first)
        below, before = (self._bits_below(count, self.lanes) for count in (size - first, 0 - first))
        outside = self._emit(f"xor i64 {before.text}, -1", "i64")
        return self._emit(f"and i64 {below.text}, {outside.text}", "i64")

    def _bits_below(self, count: Value | int, most: int) -> Value:
        """An integer whose first `count` bits are set, at most so many."""
        count = self.least(self.most(count, 0), most)
        one_more = self._emit(f"shl i64 1, {count.text}", "i64")
        return self._emit(f"sub i64 {one_more.text}, 1", "i64")

    def mask(self, bits: Value, lanes: int | None = None) -> Value:
        """The lanes whose bits are set; lanes: how many there are, if not those of a vector of accumulators."""
        lanes = lanes or self.lanes
        narrow = self._emit(f"trunc i64 {bits.text} to i{lanes}", f"i{lanes}")
        mask = f"<{lanes} x i1>"
        return self._emit(f"bitcast {narrow.type} {narrow.text} to {mask}", mask)

    def load_mask(self, pointer: Value, offset: Value | int) -> Value:
        """The lanes whose bits are set in the i16 that lies `offset` places behind a pointer."""
        bits = self.scalar(pointer, offset, "i16")
        if self.lanes < 16:
            bits = self._cast("trunc", bits, f"i{self.lanes}")
        return self._cast("bitcast", bits, f"<{self.lanes} x i1>")

    def places(self, first: Value, step: Value | int) -> Value:
        """The integers first, first + step, ..., one a lane."""
        each = self._splat(first)
        if isinstance(step, int):
            steps = ", ".join(f"i64 {step * lane}" for lane in range(self.lanes))
            return self._emit(f"add {each.type} {each.text}, <{steps}>", each.type)
        lanes = Value(self, "<" + ", ".join(f"i64 {lane}" for lane in range(self.lanes)) + ">", each.type)
        return self.move_places(self.scale_places(lanes, step), first)

    def load_places(self, pointer: Value, offset: Value) -> Value:
        """A vector of i64, as `places` and `gather` speak of."""
        address, vector = self.at(pointer, offset, "i64"), f"<{self.lanes} x i64>"
        return self._emit(f"load {vector}, ptr {address.text}, align 8", vector)

    def move_places(self, places: Value, by: Value) -> Value:
        """Every place, moved by the same distance."""
        return self._emit(f"add {places.type} {places.text}, {self._splat(by).text}", places.type)

    def scale_places(self, places: Value, by: Value) -> Value:
        """Every place, multiplied by the same number."""
        return self._emit(f"mul {places.type} {places.text}, {self._splat(by).text}", places.type)

    def either(self, mask: Value, a: Value, b: Value) -> Value:
        """Lanes of a where the mask is set, else of b; a scalar stands for all lanes."""
        a, b = (v if v.type.startswith("<") else self._splat(v) for v in (a, b))
        return self._emit(f"select {mask.type} {mask.text}, {a.type} {a.text}, {b.type} {b.text}", a.type)

    def compare_lanes(self, relation: str, a: Value, b: Value | int) -> Value:
        """A mask of the lanes of integers where a has this relation to the scalar b."""
        other = self._splat(self.number(b))
        return self._emit(f"icmp {relation} {a.type} {a.text}, {other.text}", f"<{self.lanes} x i1>")

    def every(self, step: int, phase: int, parts: Sequence[Value]) -> Value:
        """Lanes phase, phase + step, ... of `step` vectors that lie side by side."""
        if step == 1:
            return parts[0]
        wanted = [divmod(phase + step * lane, self.lanes) for lane in range(self.lanes)]
        result = parts[0]
        for part in range(1, step):
            # The lanes that are right so far stay; those of this part come in.  From the first two parts both are new.
            left = [place if of == 0 else lane for lane, (of, place) in enumerate(wanted)] if part == 1 else None
            chosen = [
                self.lanes + place if of == part else (left[lane] if left else lane)
                for lane, (of, place) in enumerate(wanted)
            ]
            result = self._shuffle(result, parts[part], chosen)
        return result

    def spread(self, value: Value, step: int, part: int, mask: Value | None) -> tuple[Value, Value]:
        """The lanes of a vector, `step` places apart in as many vectors: which is in this one, and a mask of them.

        mask: of the lanes that are wanted, None for all.
        """
        places = [divmod(part * self.lanes + lane, step) for lane in range(self.lanes)]
        bits = ", ".join(f"i1 {str(not rest).lower()}" for _, rest in places)
        real = Value(self, f"<{bits}>", f"<{self.lanes} x i1>")
        lanes = [lane for lane, _ in places]
        if mask is not None:
            real = self._two("and", self._shuffle(mask, mask, lanes), real)
        return self._shuffle(value, value, lanes), real

    def transpose(self, rows: Sequence[Value]) -> list[Value]:
        """The columns of a square of vectors: in each round, halves of rows that are `step` apart change places."""
        rows, step = list(rows), 1
        while step < self.lanes:
            for i in range(self.lanes):
                if not i & step:
                    a, b = rows[i], rows[i + step]
                    upper = [lane if not lane & step else self.lanes + lane - step for lane in range(self.lanes)]
                    lower = [lane + step if not lane & step else self.lanes + lane for lane in range(self.lanes)]
                    rows[i], rows[i + step] = self._shuffle(a, b, upper), self._shuffle(a, b, lower)
            step *= 2
        return rows

    def sums_of(self, rows: Sequence[Value]) -> Value:
        """A vector whose lane i is the sum of all lanes of vector i, of at most as many as there are lanes."""
        step = 1
        rows = list(rows)
        while step < self.lanes:
            upper = [lane if not lane & step else self.lanes + lane - step for lane in range(self.lanes)]
            lower = [lane + step if not lane & step else self.lanes + lane for lane in range(self.lanes)]
            pairs = [(rows[i], rows[min(i + 1, len(rows) - 1)]) for i in range(0, len(rows), 2)]
            rows = [self.add(self._shuffle(a, b, upper), self._shuffle(a, b, lower)) for a, b in pairs]
            step *= 2
        return rows[0]

    def _shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """Lanes of a (0, 1, ...) and of b (counted on)."""
        numbers = ", ".join(f"i32 {lane}" for lane in lanes)
        text = f"{a.type} {a.text}, {b.type} {b.text}, <{self.lanes} x i32> <{numbers}>"
        return self._emit(f"shufflevector {text}", a.type)

    def pick(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """These lanes of two vectors that lie side by side: those of `b` are counted on from those of `a`."""
        numbers = ", ".join(f"i32 {lane}" for lane in lanes)
        operands = f"{a.type} {a.text}, {b.type} {b.text}"
        return self._emit(f"shufflevector {operands}, <{self.lanes} x i32> <{numbers}>", a.type)

    def interleave(self, parts: Sequence[Value]) -> list[Value]:
        """The first lanes of all parts, then their second lanes, ...; there are 1, 2, 4, ... of them."""
        if len(parts) == 1:
            return list(parts)
        lower = [lane // 2 + lane % 2 * self.lanes for lane in range(self.lanes)]
        upper = [lane + self.lanes // 2 for lane in lower]
        both = zip(self.interleave(parts[::2]), self.interleave(parts[1::2]), strict=True)
        return [self.pick(even, odd, lanes) for even, odd in both for lanes in (lower, upper)]

    def _splat(self, value: Value) -> Value:
        vector = f"<{self.lanes} x {value.type}>"
        one = self._emit(f"insertelement {vector} poison, {value.type} {value.text}, i32 0", vector)
        lanes = f"<{self.lanes} x i32> zeroinitializer"
        return self._emit(f"shufflevector {vector} {one.text}, {vector} poison, {lanes}", vector)

    # -- vectors -----------------------------------------------------------------------------------------------------

    def broadcast(self, value: Value) -> Value:
        """A vector of one scalar; one of a half type becomes accumulators."""
        if value.type == "bfloat":
            # The number in both halves of each lane, then the lower one shifted out: no detour by a scalar register.
            pair, twice = f"<{2 * self.lanes} x bfloat>", f"<{2 * self.lanes} x i32> zeroinitializer"
            one = self._emit(f"insertelement {pair} poison, bfloat {value.text}, i32 0", pair)
            both = self._emit(f"shufflevector {pair} {one.text}, {pair} poison, {twice}", pair)
            lanes = self._cast("bitcast", both, f"<{self.lanes} x i32>")
            return self._cast("bitcast", self._bits("shl", lanes, 16), self.vector)
        return self.widen(self._splat(value), value.type) if value.type == "half" else self._splat(value)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once if the processor can."""
        return self._call(f"llvm.fmuladd.v{self.lanes}{SUFFIX[self.element]}", self.vector, a, b, c)

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        return self._emit(f"fadd {self.vector} {a.text}, {b.text}", self.vector)

    def constant(self, number: float) -> Value:
        """A vector of one number, rounded to the accumulators' type."""
        if self.element == "float":
            (number,) = struct.unpack("f", struct.pack("f", number))
        (bits,) = struct.unpack("<Q", struct.pack("<d", number))
        return Value(self, f"splat ({self.element} 0x{bits:016X})", self.vector)

    def subtract(self, a: Value, b: Value) -> Value:
        """a - b."""
        return self._two("fsub", a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        """a * b."""
        return self._two("fmul", a, b)

    def divide(self, a: Value, b: Value) -> Value:
        """a / b."""
        return self._two("fdiv", a, b)

    def absolute(self, a: Value) -> Value:
        """|a|."""
        return self._call(f"llvm.fabs.v{self.lanes}{SUFFIX[self.element]}", self.vector, a)

    def less(self, a: Value, b: Value) -> Value:
        """A mask of the lanes with a < b; NaN is less than nothing, and nothing is less than NaN."""
        return self._emit(f"fcmp olt {self.vector} {a.text}, {b.text}", f"<{self.lanes} x i1>")

    def is_nan(self, a: Value) -> Value:
        """A mask of the lanes that are not numbers."""
        return self._emit(f"fcmp uno {self.vector} {a.text}, {a.text}", f"<{self.lanes} x i1>")

    def any(self, mask: Value) -> Value:
        """Whether any lane of a mask is set, an i1."""
        bits = self._cast("bitcast", mask, f"i{self.lanes}")
        return self._emit(f"icmp ne {bits.type} {bits.text}, 0", "i1")

    def whole(self, a: Value) -> Value:
        """a rounded to a whole number, ties to even, for |a| < 2**21 (double: 2**50)."""
        shift = self.constant(1.5 * 2.0**self._digits)  # behind it there is no room for a fraction
        return self.subtract(self.add(a, shift), shift)

    def power_of_two(self, whole: Value) -> Value:
        """2**whole, of whole numbers from -126 to 127 (double: from -1022 to 1023)."""
        bias, integer = (127, "i32") if self.element == "float" else (1023, "i64")
        # The sum ends in the bits of whole + bias: these become the exponent.
        sum_ = self.add(whole, self.constant(1.5 * 2.0**self._digits + bias))
        bits = self._cast("bitcast", sum_, f"<{self.lanes} x {integer}>")
        moved = self._emit(f"shl {bits.type} {bits.text}, splat ({integer} {self._digits})", bits.type)
        return self._cast("bitcast", moved, self.vector)

    @property
    def _digits(self) -> int:
        """Bits of a number behind its first one."""
        return 23 if self.element == "float" else 52

    # -- half types --------------------------------------------------------------------------------------------------

    def widen(self, value: Value, stored: str) -> Value:
        """Accumulators, from a vector or a scalar of type `stored` (or of the i16 that hold one); exact."""
        if stored == self.element:
            return value
        self._must_be_half(stored)
        wide = self._like(value, "i32")
        if stored == "half" and "half" in self.native:
            half = self._cast("bitcast", value, self._like(value, "half"))
            return self._cast("fpext", half, self._like(value, "float"))
        bits = self._cast("zext", self._cast("bitcast", value, self._like(value, "i16")), wide)
        if stored == "bfloat":
            return self._cast("bitcast", self._bits("shl", bits, 16), self._like(value, "float"))
        # F. Giesen, "Half to float done quick": move the exponent to its place, raise its bias from 15 to 127, and
        # once more for infinities and NaN; a denormal is what is left of 2**-14 + it when 2**-14 is taken away.
        shifted = self._bits("shl", self._bits("and", bits, 0x7FFF), 13)
        exponent = self._bits("and", shifted, 0x7C00 << 13)
        biased = self._bits("add", shifted, (127 - 15) << 23)
        infinite = self._bits("add", shifted, (255 - 31) << 23)
        smallest = self._cast("bitcast", self._bits("add", biased, 1 << 23), self._like(value, "float"))
        least = self._cast("bitcast", self._same(113 << 23, biased), self._like(value, "float"))
        denormal = self._cast("bitcast", self._two("fsub", smallest, least), wide)
        result = self._choose(self._relation("eq", exponent, 0x7C00 << 13), infinite, biased)
        result = self._choose(self._relation("eq", exponent, 0), denormal, result)
        sign = self._bits("shl", self._bits("and", bits, 0x8000), 16)
        return self._cast("bitcast", self._two("or", result, sign), self._like(value, "float"))

    def narrow(self, value: Value, stored: str) -> Value:
        """Accumulators, a vector or a scalar, as type `stored`: to the nearest, ties to even; NaN stays NaN.

        A vector of a half type is returned as the i16 that hold it, a scalar as what `put` writes.
        """
        if stored == self.element:
            return value
        self._must_be_half(stored)
        if stored == "half" and "half" in self.native:
            short = self._cast("fptrunc", value, self._like(value, "half"))
        elif stored == "half":
            short = self._cast("trunc", self._half_bits(value), self._like(value, "i16"))
        elif "flush" in self.native and value.type == self.vector and self.lanes in (8, 16):
            rounding = f"llvm.x86.avx512bf16.cvtneps2bf16.{32 * self.lanes}"
            short = self._call(rounding, f"<{self.lanes} x bfloat>", value)
        else:
            bits = self._cast("bitcast", value, self._like(value, "i32"))
            odd = self._bits("and", self._bits("lshr", bits, 16), 1)
            rounded = self._bits("lshr", self._two("add", self._bits("add", bits, 0x7FFF), odd), 16)
            nan = self._emit(f"fcmp uno {value.type} {value.text}, {value.text}", self._like(value, "i1"))
            chosen = self._choose(nan, self._same(0x7FC0, bits), rounded)
            short = self._cast("trunc", chosen, self._like(value, "i16"))
        return self._cast("bitcast", short, self._like(value, "i16") if value.type.startswith("<") else stored)

    def _half_bits(self, value: Value) -> Value:
        """The other way of the arithmetic in `widen`: i32 whose lower halves are the rounded numbers."""
        bits = self._cast("bitcast", value, self._like(value, "i32"))
        sign = self._bits("and", bits, -(1 << 31))
        size = self._two("xor", bits, sign)
        # Adding 1/2 puts the last digit of a denormal half at the last digit of the sum, which is then rounded.
        magic = ((127 - 15) + (23 - 10) + 1) << 23
        half = self._cast("bitcast", self._same(magic, bits), value.type)
        summed = self._two("fadd", self._cast("bitcast", size, value.type), half)
        denormal = self._bits("sub", self._cast("bitcast", summed, bits.type), magic)
        odd = self._bits("and", self._bits("lshr", size, 13), 1)
        rebiased = self._bits("add", size, ((15 - 127) << 23) + 0xFFF)
        normal = self._bits("lshr", self._two("add", rebiased, odd), 13)
        nan = self._relation("ugt", size, 255 << 23)
        infinite = self._choose(nan, self._same(0x7E00, bits), self._same(0x7C00, bits))
        result = self._choose(self._relation("ult", size, 113 << 23), denormal, normal)
        result = self._choose(self._relation("ult", size, (127 + 16) << 23), result, infinite)
        return self._two("or", result, self._bits("lshr", sign, 16))

    def load_pairs(self, pointer: Value, offset: Value | int = 0, mask: Value | None = None) -> Value:
        """For `dot_pairs`: lane i is the bfloat elements 2i and 2i + 1 behind `offset`, as one i32.

        mask: of lanes, or of elements (`tail_of_pairs`); those outside are zero, and are not read.
        """
        vector, address = f"<{self.lanes} x i32>", self.at(pointer, offset, "bfloat")
        if mask is None:
            return self._emit(f"load {vector}, ptr {address.text}, align 2", vector)
        count, _, _ = mask.type[1:].partition(" x ")
        loaded = vector if int(count) == self.lanes else f"<{count} x i16>"
        name, zero = f"llvm.masked.load.v{loaded[1:-1].replace(' x ', '')}.p0", Value(self, "zeroinitializer", loaded)
        return self._cast("bitcast", self._call(name, loaded, address, Value(self, "2", "i32"), mask, zero), vector)

    def pairs_of(self, first: Value, second: Value) -> Value:
        """For `dot_pairs`: two vectors of accumulators that were bfloat, as one of pairs."""
        low, high = (self._cast("bitcast", value, f"<{self.lanes} x i32>") for value in (first, second))
        return self._cast("bitcast", self._two("or", self._bits("lshr", low, 16), high), self.vector)

    def broadcast_pair(self, pointer: Value, offset: Value | int = 0) -> Value:
        """For `dot_pairs`: two neighbouring bfloat elements, in every lane."""
        address = self.at(pointer, offset, "bfloat")
        return self._splat(self._emit(f"load i32, ptr {address.text}, align 2", "i32"))

    def broadcast_alone(self, pointer: Value) -> Value:
        """For `dot_pairs`: a bfloat element and a zero, in every lane."""
        alone = self._emit(f"load i16, ptr {pointer.text}, align 2", "i16")
        return self._splat(self._cast("zext", alone, "i32"))

    def dot_pairs(self, acc: Value, a: Value, b: Value) -> Value:
        """acc + a[2i] * b[2i] + a[2i + 1] * b[2i + 1] in lane i, of pairs of bfloat; needs "pairs" in `native`.

        The processor flushes denormals here, of factors, products and sums, and rounds after each of the two additions.
        """
        if "pairs" not in self.native or self.element != "float":
            raise ValueError("dot_pairs needs float accumulators and a target that has avx512bf16")
        bits, pairs = 32 * self.lanes, f"<{2 * self.lanes} x bfloat>"
        a, b = self._cast("bitcast", a, pairs), self._cast("bitcast", b, pairs)
        return self._call(f"llvm.x86.avx512bf16.dpbf16ps.{bits}", self.vector, acc, a, b)

    def _must_be_half(self, stored: str) -> None:
        if stored not in HALVES or self.element != "float":
            raise ValueError(f"stored={stored!r} cannot be converted to accumulators of type {self.element!r}")

    # -- operations on whatever type: vectors or scalars -------------------------------------------------------------

    @staticmethod
    def _like(value: Value, scalar: str) -> str:
        """The type with as many elements as the value's, of another kind."""
        count, x, _ = value.type.partition(" x ")
        return f"{count} x {scalar}>" if x else scalar

    def _same(self, number: int, other: Value) -> Value:
        """An integer, in every lane if `other` is a vector."""
        vector = other.type.startswith("<")
        return Value(self, f"splat (i32 {number})" if vector else str(number), other.type)

    def _cast(self, operation: str, value: Value, type_: str) -> Value:
        if type_ == value.type:
            return value
        return self._emit(f"{operation} {value.type} {value.text} to {type_}", type_)

    def _two(self, operation: str, a: Value, b: Value) -> Value:
        return self._emit(f"{operation} {a.type} {a.text}, {b.text}", a.type)

    def _bits(self, operation: str, a: Value, number: int) -> Value:
        """An operation with a constant, on i32."""
        return self._two(operation, a, self._same(number, a))

    def _relation(self, relation: str, a: Value, number: int) -> Value:
        same = self._same(number, a)
        return self._emit(f"icmp {relation} {a.type} {a.text}, {same.text}", self._like(a, "i1"))

    def _choose(self, condition: Value, a: Value, b: Value) -> Value:
        choice = f"{condition.type} {condition.text}, {a.type} {a.text}, {b.type} {b.text}"
        return self._emit(f"select {choice}", a.type)


def _carrier(stored: str) -> str:
    """The type that elements are moved as."""
    return "i16" if stored in HALVES else stored
