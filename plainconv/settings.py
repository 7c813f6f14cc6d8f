"""What a user may say about the choice of an algorithm: in a call, or once for all calls.

What a call leaves open is taken from the settings of the process at that moment, and stays with the call: its
gradients are computed under the same settings, whatever is set in between.
"""

from __future__ import annotations

from operator import index
from typing import NamedTuple

from plainconv.problem import DEFAULT_MAX_WORKSPACE, DEFAULT_PRECISION, PRECISIONS

AUTO = "auto"


class Settings(NamedTuple):
    """The algorithm's name or "auto"; and what it may be: bytes of scratch memory, torch's own, and how precise."""

    algorithm: str = AUTO
    max_workspace: int = DEFAULT_MAX_WORKSPACE
    allow_builtin: bool = False
    precision: str = DEFAULT_PRECISION


current = Settings()  # those of the process


def resolve(algorithm: str, max_workspace: int | None, allow_builtin: bool | None, precision: str | None) -> Settings:
    """The settings of a call; None is what the process has. Raises TypeError or ValueError."""
    return Settings(
        algorithm,
        current.max_workspace if max_workspace is None else _bytes(max_workspace),
        current.allow_builtin if allow_builtin is None else _switch(allow_builtin),
        current.precision if precision is None else _precision(precision),
    )


def set_max_workspace(max_workspace: int) -> None:
    """Let no algorithm use more scratch memory than so many bytes, in calls that do not say `max_workspace=`.

    It holds for all threads of this process, from now on; at first it is 1 GiB.  Algorithms cut their work to fit, or
    refuse; `algorithm="reference"`, which serves what all others refuse, is not held to it.
    Raises TypeError or ValueError if it is not a whole number of bytes, 0 or more.
    """
    global current
    current = current._replace(max_workspace=_bytes(max_workspace))


def get_max_workspace() -> int:
    """Bytes of scratch memory that a call may use which does not say `max_workspace=`."""
    return current.max_workspace


def set_allow_builtin(allow_builtin: bool) -> None:
    """Let torch's own convolution be chosen, or not, in calls that do not say `allow_builtin=`.

    It holds for all threads of this process, from now on; at first it is False.  Raises TypeError if it is not a bool.
    """
    global current
    current = current._replace(allow_builtin=_switch(allow_builtin))


def get_allow_builtin() -> bool:
    """Whether torch's own convolution may be chosen in a call that does not say `allow_builtin=`."""
    return current.allow_builtin


def set_precision(precision: str) -> None:
    """Let the error of a result be larger than that of a plain sum ("high"), or not ("highest").

    It holds for calls that do not say `precision=`, in all threads of this process, from now on; at first it is "high".
    The names are those of torch.set_float32_matmul_precision.  Raises ValueError if it is another.
    """
    global current
    current = current._replace(precision=_precision(precision))


def get_precision() -> str:
    """The precision of a call that does not say `precision=`: "high" or "highest"."""
    return current.precision


def _bytes(value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"max_workspace must be an int, a number of bytes, but got {value!r}")
    if not 0 <= (count := index(value)) < 1 << 63:
        raise ValueError(f"max_workspace must be 0 or more bytes, and fit 64 bits, but got {value!r}")
    return count


def _switch(value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"allow_builtin must be True or False, but got {value!r}")
    return value


def _precision(value: str) -> str:
    if value not in PRECISIONS:
        known = " or ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision must be {known}, but got {value!r}")
    return value
