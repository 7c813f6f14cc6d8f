"""What is applied to a result before it is stored, in the type of the sums; a NaN stays one."""

import triton
import triton.language as tl


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    """ACTIVATION: a name and its numbers, as `problem.read_activation` knows them; (None,): nothing is applied."""
    if ACTIVATION[0] == "relu":
        v = tl.where(v < 0, 0.0, v)
    elif ACTIVATION[0] == "relu6":
        v = _relu6(v)
    elif ACTIVATION[0] == "leaky_relu":
        v = tl.where(v > 0, v, ACTIVATION[1] * v)  # zeros are multiplied, too
    elif ACTIVATION[0] == "hardswish":
        v = v * _relu6(v + 3) / 6
    elif ACTIVATION[0] == "sigmoid":
        v = 1 / (1 + tl.exp(-v))
    elif ACTIVATION[0] == "silu":
        v = v / (1 + tl.exp(-v))
    elif ACTIVATION[0] == "gelu":
        v = v / 2 * (1 + tl.erf(v * 0.7071067811865476))
    return v


@triton.jit
def _relu6(v):
    return tl.where(v < 0, 0.0, tl.where(v > 6, 6.0, v))
