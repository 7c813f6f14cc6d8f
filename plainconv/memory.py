"""Large tensors in large pages: memory that the system has to hand out first costs less in pieces of 2 MiB.

A result or scratch memory of 32 MiB and more is fresh in every call (the C library gives so much back at once), and to
touch each of its pages of 4 KiB for the first time takes longer than to fill them.  Linux gives pages of 2 MiB to who
asks, unless it is told to give them to all or to none.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

LARGE = 4 << 20  # bytes from which it is worth the call
_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def in_large_pages(tensor: Tensor) -> None:
    """Ask that the large pages which a fresh tensor on a CPU fills be given as such."""
    if tensor.nbytes >= LARGE and (ask := _asker()) is not None:
        begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        if end > begin:
            ask(begin, end - begin, _MADV_HUGEPAGE)  # what is refused stays in small pages


@functools.cache
def _asker() -> Callable[[int, int, int], int] | None:
    """madvise, if this system gives large pages to who asks."""
    try:
        if "[madvise]" not in _SETTING.read_text():
            return None
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
