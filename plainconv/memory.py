"""Memory of large results, and of large scratch, which is kept for the next when it is given back.

The C library gives 32 MiB and more back to the system at once, and less of it now and then.  The next result then is
fresh memory, and to touch each of its pages for the first time takes as long as to fill them; or memory that was used
long ago, which no cache holds any more.  So large tensors lie in blocks of our own: a block is lent to a tensor, comes
back when nothing uses the tensor's storage any more, and is lent again to one of about its size, the last one first.
Blocks are asked for in pages of 2 MiB, where the system has such.  At most MOST_KEPT bytes wait to be lent; those that
have waited longest go first.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 2 << 20  # bytes from which it is worth it: six microseconds more than to ask the C library
MOST_KEPT = 256 << 20
_PAGE = 2 << 20
_waiting: deque[mmap.mmap] = deque()  # each change is one step, as blocks come back at any time and in any thread


def lent(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU with these sizes and dense strides; what is in it is anything."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    block = _take(size)
    view = memoryview(block)
    # The storage holds the view, and nothing else does.
    weakref.finalize(view, _give_back, block).atexit = False
    storage = torch.frombuffer(view, dtype=torch.uint8, count=size).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)


def _take(size: int) -> mmap.mmap:
    """A block that waits and has not much more than so many bytes, or else a new one."""
    size = -(-size // _PAGE) * _PAGE
    for block in reversed(tuple(_waiting)):
        if size <= len(block) <= size + size // 4:
            with contextlib.suppress(ValueError):  # it is lent already
                _waiting.remove(block)
                return block
    if os.name != "posix":
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without large pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    if len(block) > MOST_KEPT:
        return
    _waiting.append(block)
    while sum(map(len, tuple(_waiting))) > MOST_KEPT:
        with contextlib.suppress(IndexError):
            _waiting.popleft()
