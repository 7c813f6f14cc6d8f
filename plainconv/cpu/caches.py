"""How large a core's own cache is: blocks are cut so that what is read again stays there."""

from __future__ import annotations

import os
from functools import cache

USUAL = 1 << 20  # bytes, where the system does not tell; what blocks were measured with
LEAST, MOST = 256 << 10, 2 << 20


@cache
def second() -> int:
    """Bytes of the second cache, of one core."""
    try:
        told = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, other systems no such name
        told = 0
    return min(max(told, LEAST), MOST) if told > 0 else USUAL
