"""Kernels as data: the named ones, rows typed at a prompt, and JSON files.

A kernel is a float64 tensor [m, kh, kw]. One matrix (m = 1) is a plain filter. Several are measured together: the
filtered pixel is the length of the vector of their m answers, as Sobel's two slopes give the steepness of an edge.

As everywhere in torch the matrix is laid on the picture as it is written, not mirrored (cross-correlation).
"""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from plainconv.files import InputError

Matrix = Sequence[Sequence[float]]

SOBEL_X = ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1))
SOBEL_Y = ((-1, -2, -1), (0, 0, 0), (1, 2, 1))
BINOMIAL = (1, 4, 6, 4, 1)

KERNELS: dict[str, tuple[Matrix, ...]] = {
    "identity": (((0, 0, 0), (0, 1, 0), (0, 0, 0)),),
    "emboss": (((-2, -1, 0), (-1, 1, 1), (0, 1, 2)),),
    "sharpen": (((0, -1, 0), (-1, 5, -1), (0, -1, 0)),),
    "edge": (((0, 1, 0), (1, -4, 1), (0, 1, 0)),),
    "blur": (tuple((1 / 9,) * 3 for _ in range(3)),),
    "gaussian": (tuple(tuple(a * b / 256 for b in BINOMIAL) for a in BINOMIAL),),
    "sobel": (SOBEL_X, SOBEL_Y),
}


def named_or_typed(text: str) -> Tensor:
    """The kernel a person means.

    Args:
        text: a name in KERNELS; or the path of a JSON file (its name ends in .json) that holds a list of rows; or rows
            as typed, a semicolon or a new line between rows, a space or a comma between numbers:
            "0 -1 0; -1 5 -1; 0 -1 0". Fractions such as 1/9 are numbers.

    Returns:
        float64 [m, kh, kw]; m is 1 but for sobel, which has 2.

    Raises:
        InputError: no such name or file, or its rows are not a rectangle of finite numbers.
    """
    if text in KERNELS:
        return torch.tensor(KERNELS[text], dtype=torch.float64)
    if text.lower().endswith(".json"):
        return _matrix(_read_json(text), text)
    if text.strip("; \n") and not any(mark.isdigit() for mark in text):
        raise InputError(f"unknown kernel {text!r}; named kernels are {', '.join(KERNELS)}")
    rows = text.replace("\n", ";").strip("; ").split(";")
    return _matrix([row.replace(",", " ").split() for row in rows] if any(rows) else [], repr(text))


def _read_json(path: str) -> object:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # JSON's own error, and UnicodeDecodeError
        raise InputError(f"{path}: not JSON ({error})") from error


def _matrix(rows: object, source: str) -> Tensor:
    """Rows of numbers -> float64 [1, kh, kw], or the reason why not."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise InputError(f"the kernel in {source} is not a list of rows")
    if not rows or not any(rows):
        raise InputError(f"the kernel in {source} is empty")
    numbers = [[_number(entry, source) for entry in row] for row in rows]
    if len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows)
        raise InputError(f"the kernel in {source} is not a rectangle: its rows have {lengths} numbers")
    return torch.tensor([numbers], dtype=torch.float64)


def _number(entry: object, source: str) -> float:
    try:
        if not isinstance(entry, bool) and isinstance(entry, str | int | float):
            return float(Fraction(entry))  # refuses nan and inf, too
    except (ValueError, OverflowError, ZeroDivisionError):
        pass
    raise InputError(f"the kernel in {source} has an entry that is not a number: {entry!r}")
