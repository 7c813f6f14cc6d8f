"""Other libraries on the same layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from plainconv.bench.calls import Call, Tensors
from plainconv.bench.suites import Layer
from plainconv.files import InputError

Other = Callable[[Layer, Tensors], Call | str]  # the call, or a sentence why there is none

LIBRARIES: dict[str, Other] = {}


def others(names: Sequence[str]) -> dict[str, Other]:
    """Name -> what makes its calls; InputError for a name that is not known."""
    for name in names:
        if name not in LIBRARIES:
            raise InputError(f"unknown library {name!r}; libraries are {', '.join(LIBRARIES)}")
    return {name: LIBRARIES[name] for name in names}
