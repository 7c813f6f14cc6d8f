"""What is applied to a result before it is stored, in the type of the sums; a NaN stays one."""

import triton
import triton.language as tl


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    """The activation of that name (None: nothing); leaky_relu has slope 0.01, gelu the error function."""
    if ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)
    elif ACTIVATION == "relu6":
        v = _relu6(v)
    elif ACTIVATION == "leaky_relu":
        v = tl.where(v < 0, 0.01 * v, v)
    elif ACTIVATION == "hardswish":
        v = v * _relu6(v + 3) / 6
    elif ACTIVATION == "sigmoid":
        v = 1 / (1 + tl.exp(-v))
    elif ACTIVATION == "silu":
        v = v / (1 + tl.exp(-v))
    elif ACTIVATION == "gelu":
        v = v / 2 * (1 + tl.erf(v * 0.7071067811865476))
    return v


@triton.jit
def _relu6(v):
    return tl.where(v < 0, 0.0, tl.where(v > 6, 6.0, v))
