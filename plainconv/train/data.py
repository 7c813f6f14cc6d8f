"""The data: pictures of 28x28 in ten classes, whole in memory as tensors.

`digits` is embedded in scikit-learn: 1,797 pictures of 8x8, enlarged here. `mnist` and `fashion-mnist` are four idx
files each, 60,000 pictures to learn from and 10,000 to test with; they are downloaded only if they are not there.

Pictures are normalised, (level / white - mean) / deviation, with the two numbers of the part to learn from.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from plainconv.files import InputError
from plainconv.train.idx import fetch, read_idx

SIDE = 28
CLASSES = 10
DIGITS_TESTED = 360  # of the 1,797: a fifth


@dataclass(frozen=True)
class Source:
    """Where a dataset of idx files comes from.

    Attributes:
        url: the folder on the network.
        md5: file name -> checksum, in the order pictures and labels to learn from, pictures and labels to test with.
        mean, deviation: of the pixels to learn from, black 0 and white 1.
    """

    url: str
    md5: Mapping[str, str]
    mean: float
    deviation: float


FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _checksums(*md5: str) -> dict[str, str]:
    return dict(zip(FILES, md5, strict=True))


SOURCES: dict[str, Source] = {
    "mnist": Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        _checksums(
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        mean=0.1307,
        deviation=0.3081,
    ),
    "fashion-mnist": Source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        _checksums(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        mean=0.2860,
        deviation=0.3530,
    ),
}


@dataclass(frozen=True)
class Recipe:
    """How long a dataset is trained on where nobody says otherwise."""

    epochs: int
    batch: int


DATASETS: dict[str, Recipe] = {
    "digits": Recipe(epochs=40, batch=100),
    "mnist": Recipe(epochs=5, batch=1000),
    "fashion-mnist": Recipe(epochs=5, batch=1000),
}


@dataclass(frozen=True)
class Data:
    """Pictures float32 [n, 1, 28, 28], normalised, and labels int64 [n], 0 to 9: to learn from, and to test with."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device | str) -> "Data":
        """The same data on a device."""
        return Data(*(t.to(device) for t in (self.x, self.y, self.test_x, self.test_y)))


def load(name: str, folder: str | Path | None = None) -> Data:
    """Load a dataset into memory.

    Args:
        name: one of DATASETS.
        folder: where the idx files are, in folder/NAME or in the folder itself, packed (.gz) or not. Those that are not
            there are downloaded into folder/NAME. Default: the user's cache. `digits` needs none.

    Raises:
        InputError: no such dataset, a file that is damaged, or one that can neither be found nor downloaded.
        OSError: the disk is full and so on.
    """
    if name == "digits":
        return digits()
    if name not in SOURCES:
        raise InputError(f"unknown dataset {name!r}; datasets are {', '.join(DATASETS)}")
    source, folder = SOURCES[name], Path(folder) if folder is not None else default_folder()
    x, y, test_x, test_y = (read_idx(_find_or_fetch(source, file, name, folder)) for file in source.md5)
    for pictures, labels in ((x, y), (test_x, test_y)):
        if pictures.shape != (len(labels), SIDE, SIDE) or labels.dim() != 1 or not len(labels):
            sizes = f"{list(pictures.shape)} pictures and {list(labels.shape)} labels"
            raise InputError(f"{folder}: {sizes} do not belong together; expected n of {SIDE}x{SIDE} and n")
        if labels.max() >= CLASSES:
            raise InputError(f"{folder}: a label is {labels.max()}; expected 0 to {CLASSES - 1}")

    def normal(pictures: Tensor) -> Tensor:
        return pictures.float().div_(255).sub_(source.mean).div_(source.deviation).unsqueeze(1)  # [n, 1, 28, 28]

    return Data(normal(x), y.long(), normal(test_x), test_y.long())


def digits() -> Data:
    """scikit-learn's 1,797 digits, 8x8 enlarged to 28x28, in one fixed order: 1,437 to learn from, 360 to test with."""
    from sklearn.datasets import load_digits  # takes a second to import, and only this dataset needs it

    raw = load_digits()
    x = torch.from_numpy(raw.images).float().unsqueeze(1) / 16  # [n, 1, 8, 8], white is 1
    x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    y = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, learn = order[:DIGITS_TESTED], order[DIGITS_TESTED:]
    x = (x - x[learn].mean()) / x[learn].std()
    return Data(x[learn], y[learn], x[test], y[test])


def default_folder() -> Path:
    """The user's cache folder for downloads: $XDG_CACHE_HOME/plainconv, or ~/.cache/plainconv."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plainconv"


def _find_or_fetch(source: Source, file: str, name: str, folder: Path) -> Path:
    for place in (folder / name, folder):
        for path in (place / file, place / f"{file}.gz"):
            if path.is_file():
                return path
    path = folder / name / f"{file}.gz"
    fetch(f"{source.url}/{file}.gz", path, source.md5[file])
    return path
