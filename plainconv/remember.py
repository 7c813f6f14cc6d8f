"""What is remembered from call to call: bounded in number where it is kept, and in bytes here.

A kernel's tables say which element each place shows, so they are as long as a picture is wide and high; a thousand
lengths of audio would be gigabytes of them.  Whoever makes tables says how large they are; as soon as all that are
alive together exceed MOST_BYTES, everything is forgotten, and made again by the calls that want it.  A call that runs
holds what it needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

MOST_BYTES = 128 << 20
SMALL = 16 << 10  # tables of fewer bytes are bounded by their number

_sizes: dict[weakref.ref[object], int] = {}  # of the large ones that are alive; each change is one step of a dict
_clears: list[Callable[[], object]] = []


def on_forget(clear: Callable[[], object]) -> None:
    """Call this when everything is to be forgotten; for whoever remembers tables, or what was made of them."""
    _clears.append(clear)


def forget() -> None:
    """Forget everything: measurements have changed, or are about to, or tables became too many."""
    for clear in _clears:
        clear()


def weigh(owner: object, size: int) -> None:
    """Take note that `owner`, which was just made and is about to be remembered, holds tables of so many bytes."""
    if size < SMALL:
        return
    if sum(list(_sizes.values())) + size > MOST_BYTES:
        forget()
    _sizes[weakref.ref(owner, _sizes.pop)] = size
