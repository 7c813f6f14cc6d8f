"""A kernel applied to a picture: plainconv.conv2d on each colour channel.

The channels are one batch of grey pictures, so the same kernel falls on each of them and none is mixed with another:

    x [c, 1, h, w]  *  weight [m, 1, kh, kw]  ->  y [c, m, h, w]
    filtered[c, h, w] = y[c, 0, h, w]                  for one matrix (m = 1)
                      = sqrt(sum_m y[c, m, h, w]^2)    for several

A kernel that is a product of lines (a Gaussian, a box, Sobel's) is a pass along each: algorithm="separable".

Outside the picture, `border` says what is there; then the result has the size of the picture.
"""

import torch
from torch import Tensor

from plainconv.files import InputError
from plainconv.functional import conv2d
from plainconv.menu.base import AlgorithmRefused
from plainconv.problem import PADDING_MODES
from plainconv.settings import AUTO

BORDERS = PADDING_MODES


def apply(pixels: Tensor, kernel: Tensor, *, border: str = "replicate", algorithm: str = "auto") -> Tensor:
    """Filter each colour channel with one kernel.

    Args:
        pixels: float [c, h, w], in any unit.
        kernel: float [m, kh, kw]; m matrices, see above. It is brought to the type and device of `pixels`.
        border: "zeros", "reflect", "replicate" or "circular": what lies outside the picture.
        algorithm: one of plainconv.algorithms(), or "auto": "separable" where that does not refuse the kernel.

    Returns:
        [c, h, w], the type, device and unit of `pixels`. A kernel of even size looks one pixel further to the right and
        down than to the left and up, as padding="same" in torch.

    Raises:
        InputError: no such border, or the picture is too small for this kernel and border.
        plainconv.AlgorithmRefused: the algorithm named cannot do this; it says why.
    """
    if border not in BORDERS:
        raise InputError(f"unknown border {border!r}; borders are {', '.join(BORDERS)}")
    reach = [size // 2 for size in kernel.shape[-2:]]
    limit = [size - (border == "reflect") for size in pixels.shape[-2:]]  # reflect does not repeat the edge pixel
    if border in ("reflect", "circular") and any(r > most for r, most in zip(reach, limit, strict=True)):
        size, of = ("x".join(map(str, t.shape[-2:])) for t in (pixels, kernel))
        raise InputError(f"a picture of {size} pixels is too small for a kernel of {of} with the border {border!r}")
    weight = kernel.to(pixels).unsqueeze(1)  # [m, 1, kh, kw]

    def filtered(algorithm: str) -> Tensor:  # [c, m, h, w]
        return conv2d(pixels.unsqueeze(1), weight, padding="same", padding_mode=border, algorithm=algorithm)

    try:
        y = filtered("separable" if algorithm == AUTO else algorithm)
    except AlgorithmRefused:
        if algorithm != AUTO:
            raise
        y = filtered(AUTO)
    return y[:, 0] if len(kernel) == 1 else torch.linalg.vector_norm(y, dim=1)
