"""Where a kernel finds its taps in a weight: all of them in order, or in the opposite one, or those of a phase."""

from __future__ import annotations

from typing import NamedTuple


class Weight(NamedTuple):
    """A weight as it lies: [o, c, taps].

    turned     whether channels change places: it is [input channels, output channels, taps] then
    all_taps   that it has for two channels
    first      the number of the kernel's first tap among them
    steps      and from there to the next one along depth, rows and width
    """

    turned: bool
    all_taps: int
    first: int
    steps: tuple[int, int, int]
