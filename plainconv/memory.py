"""Memory of large results, and of large scratch, which is kept for the next when it is given back.

The C library gives 32 MiB and more back to the system at once, and less of it now and then.  The next result then is
fresh memory, and to touch each of its pages for the first time takes as long as to fill them.  Or it hands out other
memory than the last time, since it cuts what is aligned out of something larger, and no cache holds that any more.  So
large tensors lie in blocks of our own: a block is lent to a tensor, comes back when nothing uses the tensor's storage
any more, and is lent again to one of about its size, the last one first.  Blocks of 2 MiB and more are asked for in
pages so large, where the system has such.  At most MOST_KEPT bytes wait to be lent; those that have waited longest go
first.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 1 << 20  # bytes from which it is worth it: a few microseconds more than to ask the C library
MOST_KEPT = 256 << 20
_PAGE = 2 << 20

# Each change is one step, as blocks come back at any time and in any thread.
_waiting: dict[int, deque[tuple[int, mmap.mmap]]] = {}  # by size, those that came back, each with its turn
_most: dict[int, int] = {}  # by size, how many have waited at once since all were counted
_turns = itertools.count()
_loans: dict[int, _Loan] = {}


class _Loan(weakref.ref[memoryview]):
    """Says when a storage's view of a block is gone."""

    __slots__ = ("block",)
    block: mmap.mmap


def lent(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU with these sizes and dense strides; what is in it is anything."""
    count = 1
    for extent in shape:
        count *= extent
    block = _take(count * dtype.itemsize)
    view = memoryview(block)
    # The storage holds the view, and nothing else does.
    loan = _Loan(view, _returned)
    loan.block = block
    _loans[id(loan)] = loan
    return torch.frombuffer(view, dtype=dtype, count=count).as_strided_(shape, strides)


def _returned(loan: weakref.ref[memoryview]) -> None:
    _give_back(_loans.pop(id(loan)).block)


def _size(size: int) -> int:
    """Of the block for so many bytes: up to an eighth more, so that results of about one size share it."""
    step = max(_PAGE if size >= _PAGE else mmap.PAGESIZE, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step


def _take(size: int) -> mmap.mmap:
    """A block that waits and has not much more than so many bytes, or else a new one."""
    size = _size(size)
    try:
        return _waiting[size].pop()[1]
    except LookupError:
        pass
    if os.name != "posix":
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without large pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    size = len(block)
    if size > MOST_KEPT:  # for its sake all others would have to go
        return
    alike = _waiting.get(size)
    if alike is None:
        alike = _waiting.setdefault(size, deque())
    alike.append((next(_turns), block))
    if len(alike) > _most.get(size, 0):
        _most[size] = len(alike)
        if sum(size * count for size, count in tuple(_most.items())) > MOST_KEPT:
            _let_go()


def _let_go() -> None:
    """Of the blocks that wait, the oldest, until no more than MOST_KEPT bytes do."""
    while sum(size * len(alike) for size, alike in tuple(_waiting.items())) > MOST_KEPT:
        with contextlib.suppress(IndexError, ValueError):  # others take them meanwhile
            min((alike for alike in tuple(_waiting.values()) if alike), key=lambda alike: alike[0]).popleft()
    _most.update({size: len(alike) for size, alike in tuple(_waiting.items())})
