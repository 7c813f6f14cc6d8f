"""Pictures: read and write them, kernels as data, and filters made of plainconv.conv2d."""

from plainconv.picture.filters import BORDERS, apply
from plainconv.picture.io import Picture, read, write
from plainconv.picture.kernels import KERNELS, named_or_typed

__all__ = ["BORDERS", "KERNELS", "Picture", "apply", "named_or_typed", "read", "write"]
