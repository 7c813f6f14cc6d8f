"""What a kernel is told in numbers: 32 bits for what it counts, 64 for strides, and nothing is compiled for a value."""

import triton
import triton.language as tl


def kernel(function):
    """A kernel that is launched; numbers, annotated with their types, are not looked at when it is compiled.

    Triton would compile anew where one is 1, a multiple of 16, or has more bits than others before.
    """
    numbers = [name for name, kind in function.__annotations__.items() if kind in (tl.int32, tl.int64)]
    return triton.jit(do_not_specialize=numbers)(function)
