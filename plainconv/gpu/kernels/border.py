"""Which element a place of a padded row shows; arithmetic for every padding mode, so no padded copy is ever made.

Counted from the first element, places before it are negative.  `end` is behind the last element that is left (negative
padding crops), `span` how many are left:

    zeros      q                    inside 0 <= q < end, else nothing (a zero)
    reflect    |q|                  and 2 (end - 1) - q behind the end
    replicate  min(max(q, 0), end - 1)
    circular   q + span before the first, q - span behind the end
"""

import triton
import triton.language as tl


@triton.jit
def shown(q, low, end, MODE: tl.constexpr):
    """The element that each place q shows, in range for every mode but zeros; low: the padding before the first."""
    if MODE == "reflect":
        q = tl.where(q < 0, -q, q)
        q = tl.where(q >= end, 2 * (end - 1) - q, q)
    elif MODE == "replicate":
        q = tl.minimum(tl.maximum(q, 0), end - 1)
    elif MODE == "circular":
        span = end + tl.minimum(low, 0)
        q = tl.where(q < 0, q + span, tl.where(q >= end, q - span, q))
    return q
