"""plainconv: convolution for PyTorch, in plain Python.

import plainconv
y = plainconv.conv2d(x, w, padding="same")          # as torch.nn.functional.conv2d
layer = plainconv.nn.Conv2d(3, 16, 3)               # as torch.nn.Conv2d
print(plainconv.explain(x, w))                      # which algorithm, and why
"""

from plainconv import functional, nn
from plainconv.functional import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    explain,
)
from plainconv.fuse import optimize
from plainconv.inference import prepack
from plainconv.menu.base import AlgorithmRefused
from plainconv.plan import algorithms, tune, tuning
from plainconv.profiling import profile
from plainconv.replace import swap, unswap
from plainconv.settings import (
    get_allow_builtin,
    get_max_workspace,
    get_precision,
    set_allow_builtin,
    set_max_workspace,
    set_precision,
)
from plainconv.version import __version__

__all__ = [
    "AlgorithmRefused",
    "__version__",
    "algorithms",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "explain",
    "functional",
    "get_allow_builtin",
    "get_max_workspace",
    "get_precision",
    "nn",
    "optimize",
    "prepack",
    "profile",
    "set_allow_builtin",
    "set_max_workspace",
    "set_precision",
    "swap",
    "tune",
    "tuning",
    "unswap",
]
