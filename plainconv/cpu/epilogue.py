"""What every kernel does to its sums before they are stored: the residual is added, the activation applied.

    y  =  activation(sum + residual)

The sum begins with the bias.  All is vector arithmetic on the accumulators, without branches; half types are rounded
afterwards, once.  NaN gives NaN, and infinities give what torch's definitions give: x * gate(x) is NaN at -inf.

    exp(x)      2^n exp(r),  n = x / ln 2 rounded, |r| <= ln 2 / 2, exp(r) by its power series; 2^n in two factors, so
                that results fade into zero and infinity.  About 1 eps.
    sigmoid     1 / (1 + exp(-x)),  silu  x / (1 + exp(-x)).  About 2 eps.
    gelu        x Phi(x),  Phi the normal distribution.  With a = |x| and t = 1 / (1 + a / 5)

                    Phi(-a) = exp(-a^2 / 2) t G(t),  Phi(a) = 1 - Phi(-a)

                where G is smooth: a polynomial.  About 3 eps of x; for x < 0 its error is 5 eps (1 + x^2 / 2) of
                itself at most, where 1 + erf(x) has lost all digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from plainconv.cpu.emit import Emit, Value
from plainconv.problem import read_activation

# ln 2 in two parts: the first has so few digits that its product with n is exact.
_LN2 = {
    "float": (0.693359375, -2.12194440054690583e-4),
    "double": (6.93147180369123816490e-01, 1.90821492927058770002e-10),
}
_EXP_DEGREE = {"float": 7, "double": 13}  # the first term left out is below eps / 20 (double: eps / 40)
_EXP_RANGE = {"float": (-104.0, 89.0), "double": (-746.0, 710.0)}  # 0 before, infinity behind

# G(t) = Phi(-a) exp(a^2 / 2) / t, interpolated at the 10 (double: 23) Chebyshev nodes of the t that 0 <= a <= _FARTHEST
# gives, in 50 digits, as a polynomial of t moved to [-1, 1]; Phi(-_FARTHEST) is no normal number.  Its error is below
# 1.3e-8 (double: 1e-17) of its value.
_FARTHEST = {"float": 14.0, "double": 39.0}
_G = {
    "float": (
        0.1970388709141349, 0.14811392642214818, 0.08964543239300563, 0.0434554823312507, 0.01645665120382331,
        0.004568261161103098, 0.0007625927977782074, -2.822349117790256e-06, -3.349442089177824e-05,
        -4.903287256425193e-06,
    ),
    "double": (
        0.17033792891176727, 0.14024520173287322, 0.09679797914995926, 0.05544369442075121, 0.025734013027088016,
        0.00919458659510652, 0.002213075598044591, 0.00017254972400699507, -0.00010487029420733173,
        -3.864551313818672e-05, 8.942226209247295e-07, 3.5619701808142343e-06, 3.7129603081267644e-07,
        -3.168520392076192e-07, -5.902496730460374e-08, 3.2062108149079547e-08, 6.964534505223478e-09,
        -3.746242666048573e-09, -6.989277905610258e-10, 4.369695884786909e-10, 5.385968622089339e-11,
        -3.414412530965333e-11, -2.2349804897049853e-12,
    ),
}  # fmt: skip


def finish(e: Emit, total: Value, residual: Value | None, activation: str | None) -> Value:
    """A vector of results, from one of sums; activation as in Request."""
    if residual is not None:
        total = e.add(total, residual)
    if activation is None:
        return total
    name, numbers = read_activation(activation)
    return activate(e, name, total, *numbers)


def activate(e: Emit, name: str, x: Value, *numbers: float) -> Value:
    """The activation of that name, of each lane of x; numbers are its own."""
    zero = e.constant(0.0)
    match name:
        case "relu":
            return _at_least(e, x, zero)
        case "relu6":
            return _between(e, x, 0.0, 6.0)
        case "leaky_relu":
            return e.either(e.less(zero, x), x, e.multiply(x, e.constant(*numbers)))  # zeros are multiplied, too
        case "hardswish":
            gate = _between(e, e.add(x, e.constant(3.0)), 0.0, 6.0)
            return e.multiply(e.multiply(x, gate), e.constant(1 / 6))
        case "sigmoid":
            return e.divide(e.constant(1.0), _one_plus_exp_minus(e, x))
        case "silu":
            return e.divide(x, _one_plus_exp_minus(e, x))
        case "gelu":
            return e.multiply(x, normal_distribution(e, x))
    raise ValueError(f"activation={name!r} is not known")


def exp(e: Emit, x: Value) -> Value:
    """e**x."""
    high, low = _LN2[e.element]
    x = _between(e, x, *_EXP_RANGE[e.element])
    n = e.whole(e.multiply(x, e.constant(1 / math.log(2))))
    r = e.fma(n, e.constant(-low), e.fma(n, e.constant(-high), x))
    series = _polynomial(e, [1 / math.factorial(k) for k in range(_EXP_DEGREE[e.element] + 1)], r)
    half = e.whole(e.multiply(n, e.constant(0.5)))
    return e.multiply(e.multiply(series, e.power_of_two(half)), e.power_of_two(e.subtract(n, half)))


def normal_distribution(e: Emit, x: Value) -> Value:
    """Phi(x), the probability that a normally distributed number is less than x."""
    one, a = e.constant(1.0), e.absolute(x)
    t = e.divide(one, e.fma(_at_most(e, a, e.constant(_FARTHEST[e.element])), e.constant(0.2), one))
    least = 1 / (1 + 0.2 * _FARTHEST[e.element])
    scale = 2 / (1 - least)
    tail = e.multiply(t, _polynomial(e, _G[e.element], e.fma(t, e.constant(scale), e.constant(1 - scale))))
    tail = e.multiply(tail, exp(e, e.multiply(e.multiply(x, e.constant(-0.5)), x)))
    return e.either(e.less(x, e.constant(0.0)), tail, e.subtract(one, tail))


def _one_plus_exp_minus(e: Emit, x: Value) -> Value:
    return e.add(e.constant(1.0), exp(e, e.subtract(e.constant(0.0), x)))


def _polynomial(e: Emit, coefficients: Sequence[float], x: Value) -> Value:
    """coefficients[0] + coefficients[1] x + ..."""
    result = e.constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = e.fma(result, x, e.constant(coefficient))
    return result


# A NaN is not less than anything, so it stays.


def _at_least(e: Emit, x: Value, bound: Value) -> Value:
    return e.either(e.less(x, bound), bound, x)


def _at_most(e: Emit, x: Value, bound: Value) -> Value:
    return e.either(e.less(bound, x), bound, x)


def _between(e: Emit, x: Value, low: float, high: float) -> Value:
    return _at_most(e, _at_least(e, x, e.constant(low)), e.constant(high))
