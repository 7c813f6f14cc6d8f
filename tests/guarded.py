"""Memory between pages that cannot be touched: to read or write outside ends with a fault, not a wrong number."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0  # PROT_NONE
_NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which this module has no name for before Python 3.13
_LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: Tensor, *, at_end: bool) -> Tensor:
    """The same values, contiguous, so that memory ends (or begins) where the tensor does."""
    size = tensor.numel() * tensor.element_size()
    pages = max(-(-size // _PAGE), 1)
    region = mmap.mmap(-1, (pages + 2) * _PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for guard in (address, address + (pages + 1) * _PAGE):
        if _LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(_PAGE), _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = (pages + 1) * _PAGE - size if at_end else _PAGE
    if not size:
        return tensor.clone()
    flat = torch.frombuffer(region, dtype=tensor.dtype, count=math.prod(tensor.shape), offset=offset)
    return flat.view(tensor.shape).copy_(tensor)


def guarded_view(tensor: Tensor, *, at_end: bool, step: int = 1) -> Tensor:
    """The same values as part of something larger, every `step`-th element in each dimension.

    What the view does not show is NaN, and memory ends (or begins) with its last (or first) element.
    """
    around = guarded(tensor.new_full([step * size + 1 for size in tensor.shape], math.nan), at_end=at_end)
    spans = [step * (size - 1) + 1 for size in tensor.shape]  # from the first element to the last
    firsts = [size - span if at_end else 0 for size, span in zip(around.shape, spans, strict=True)]
    view = around[tuple(slice(first, first + span, step) for first, span in zip(firsts, spans, strict=True))]
    return view.copy_(tensor)


def far_apart(tensor: Tensor, dim: int) -> Tensor:
    """The same values, contiguous but for one dimension, whose places lie more than 2^31 elements apart.

    Pages that nobody touches take no memory.
    """
    strides = list(tensor.contiguous().stride())
    strides[dim] = (1 << 31) + 64
    count = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    region = mmap.mmap(-1, count * tensor.element_size(), flags=flags)
    whole = torch.frombuffer(region, dtype=tensor.dtype, count=count)
    return whole.as_strided(tensor.shape, strides).copy_(tensor)


def guarded_inside(tensor: Tensor, channels_last: bool, *, at_end: bool) -> Tensor:
    """The same, with channels side by side if there are any and they should be."""
    if not channels_last or tensor.dim() < 3:
        return guarded(tensor, at_end=at_end)
    return guarded(tensor.movedim(1, -1), at_end=at_end).movedim(-1, 1)


def guarded_tables(
    tables: Callable[..., tuple[Tensor, tuple[int, ...]]], held: list[Tensor], *, at_end: bool
) -> Callable[..., tuple[Tensor, tuple[int, ...]]]:
    """What makes tables one behind the other, so that each has guards of its own; they are put into `held`."""

    def apart(*how: Any) -> tuple[Tensor, tuple[int, ...]]:
        whole, begins = tables(*how)
        starts = [(begin - whole.data_ptr()) // 8 for begin in begins]
        parts = [guarded(whole[a:b], at_end=at_end) for a, b in zip(starts, [*starts[1:], len(whole)], strict=True)]
        held.extend(parts)
        return whole, tuple(part.data_ptr() for part in parts)

    return apart
