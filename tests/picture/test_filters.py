"""Filters: each colour by itself, the size kept, the border as named."""

import numpy as np
import pytest
import torch

from plainconv.files import InputError
from plainconv.picture import BORDERS, KERNELS, apply, named_or_typed

PIXELS = torch.randint(0, 256, (3, 9, 11), generator=torch.Generator().manual_seed(0)).float()
NUMPY_NAMES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def by_hand(pixels, matrix, border):
    """The definition: lay the matrix on every pixel, multiply, add up."""
    kh, kw = matrix.shape
    before, after = ((kh - 1) // 2, (kw - 1) // 2), (kh // 2, kw // 2)
    around = [(0, 0), (before[0], after[0]), (before[1], after[1])]
    padded = np.pad(pixels.double().numpy(), around, mode=NUMPY_NAMES[border])
    result = np.zeros(pixels.shape)
    for y in range(pixels.shape[1]):
        for x in range(pixels.shape[2]):
            result[:, y, x] = (padded[:, y : y + kh, x : x + kw] * matrix.numpy()).sum((1, 2))
    return torch.from_numpy(result)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("kernel", ["emboss", "gaussian", "1 2; 3 4", "1 2 3 4", "1; 2; 3"])
def test_the_definition(kernel, border):
    matrices = named_or_typed(kernel)
    found = apply(PIXELS, matrices, border=border)
    assert found.shape == PIXELS.shape
    assert found.dtype == PIXELS.dtype
    assert torch.allclose(found.double(), by_hand(PIXELS, matrices[0], border), atol=1e-3)


def test_identity_changes_nothing():
    assert torch.equal(apply(PIXELS, named_or_typed("identity")), PIXELS)


def test_sobel_is_the_length_of_two_slopes():
    x, y = (by_hand(PIXELS, matrix, "replicate") for matrix in named_or_typed("sobel"))
    assert torch.allclose(apply(PIXELS, named_or_typed("sobel")).double(), torch.hypot(x, y), atol=1e-2)


def test_a_flat_picture_has_no_edges():
    assert not apply(torch.full((1, 6, 6), 200.0), named_or_typed("edge")).any()
    assert apply(torch.full((1, 6, 6), 200.0), named_or_typed("edge"), border="zeros").any()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2)])
def test_tiny_pictures(name, size):
    pixels = torch.rand(3, *size)
    assert apply(pixels, named_or_typed(name), border="replicate").shape == pixels.shape


def test_what_cannot_be_done_is_said():
    with pytest.raises(InputError, match="unknown border 'mirror'; borders are zeros, reflect"):
        apply(PIXELS, named_or_typed("edge"), border="mirror")
    for border in ("reflect", "circular"):
        with pytest.raises(InputError, match="2x2 pixels is too small for a kernel of 7x1"):
            apply(PIXELS[:, :2, :2], torch.ones(1, 7, 1), border=border)
    with pytest.raises(InputError, match="too small"):
        apply(PIXELS[:, :1, :1], torch.ones(1, 3, 3), border="reflect")
