"""Kernels: the idea's values, and what a person types."""

import json

import pytest
import torch

from plainconv.files import InputError
from plainconv.picture import KERNELS, named_or_typed


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("identity", [[0, 0, 0], [0, 1, 0], [0, 0, 0]]),
        ("emboss", [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]),
        ("sharpen", [[0, -1, 0], [-1, 5, -1], [0, -1, 0]]),
        ("edge", [[0, 1, 0], [1, -4, 1], [0, 1, 0]]),
    ],
)
def test_the_idea_s_kernels(name, rows):
    assert torch.equal(named_or_typed(name), torch.tensor([rows], dtype=torch.float64))


@pytest.mark.parametrize(("name", "total"), [("blur", 1), ("gaussian", 1), ("sobel", 0), ("edge", 0), ("emboss", 1)])
def test_sums(name, total):
    assert torch.allclose(named_or_typed(name).sum((1, 2)), torch.tensor(float(total), dtype=torch.float64))


def test_sobel_is_two_kernels_one_the_other_turned():
    x, y = named_or_typed("sobel")
    assert torch.equal(x.T, y)


@pytest.mark.parametrize(
    "text",
    ["0 -1 0; -1 5 -1; 0 -1 0", "0,-1,0;-1,5,-1;0,-1,0", " 0 -1 0\n-1 5 -1\n0 -1 0\n", "0 -1 0; -1 5e0 -1; 0 -1 0/3;"],
)
def test_rows_typed(text):
    assert torch.equal(named_or_typed(text), named_or_typed("sharpen"))


def test_other_shapes_and_fractions():
    assert named_or_typed("1").shape == (1, 1, 1)
    assert torch.equal(named_or_typed("1/4 -.5"), torch.tensor([[[0.25, -0.5]]], dtype=torch.float64))
    assert named_or_typed("1; 2; 3; 4").shape == (1, 4, 1)


def test_json(tmp_path):
    path = tmp_path / "kernel.json"
    path.write_text(json.dumps([[0, 0.5], [1, 2], [3, -4]]))
    assert torch.equal(named_or_typed(str(path)), torch.tensor([[[0, 0.5], [1, 2], [3, -4]]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1 2; 3", "not a rectangle: its rows have 2, 1"),
        ("1 2;; 3 4", "not a rectangle"),
        ("1 x; 3 4", "not a number: 'x'"),
        ("1 nan; 3 4", "not a number: 'nan'"),
        ("1 1e999; 3 4", "not a number"),
        ("1 1/0", "not a number"),
        ("", "empty"),
        (" ; ", "empty"),
        ("embos", "unknown kernel 'embos'; named kernels are identity, emboss"),
    ],
)
def test_what_is_no_kernel_is_said(text, why):
    with pytest.raises(InputError, match=why):
        named_or_typed(text)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[[1, 2], [3]]", "not a rectangle"),
        ("[]", "empty"),
        ("[[]]", "empty"),
        ('{"kernel": 1}', "not a list of rows"),
        ("[1, 2]", "not a list of rows"),
        ("[[1, true]]", "not a number: True"),
        ("[[1, null]]", "not a number: None"),
        ("[[1, NaN]]", "not a number: nan"),
        ("[[1, Infinity]]", "not a number: inf"),
        ("[[1,", "not JSON"),
        ("\xff", "not JSON"),
    ],
)
def test_json_that_is_no_kernel_is_said(tmp_path, content, why):
    path = tmp_path / "kernel.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=why):
        named_or_typed(str(path))


def test_json_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        named_or_typed(str(tmp_path / "none.json"))


def test_names_are_complete():
    assert set(KERNELS) == {"emboss", "sharpen", "edge", "identity", "blur", "gaussian", "sobel"}
