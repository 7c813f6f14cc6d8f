"""Datasets: found where they lie, normalised, downloaded only when missing."""

import gzip
import hashlib
import struct
from dataclasses import replace

import pytest
import torch

from plainconv.files import InputError
from plainconv.train import DATASETS, data
from plainconv.train.data import FILES, SOURCES, default_folder, load

CONTENT = dict(
    zip(
        FILES,
        (
            torch.arange(3 * 28 * 28).reshape(3, 28, 28) % 256,
            torch.tensor([1, 9, 0]),
            torch.full((2, 28, 28), 255),
            torch.tensor([5, 6]),
        ),
        strict=True,
    )
)


def idx(array):
    return struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape) + bytes(array.flatten().tolist())


def put(folder, content=CONTENT, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in content.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))


@pytest.fixture
def offline(monkeypatch):
    def fetch(url, path, md5):
        raise AssertionError(f"{url} must not be asked for")

    monkeypatch.setattr(data, "fetch", fetch)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("place", [".", "mnist"])
def test_files_that_are_there_are_read(tmp_path, offline, packed, place):
    put(tmp_path / place, packed=packed)
    found = load("mnist", tmp_path)
    assert found.x.shape == (3, 1, 28, 28)
    assert found.x.dtype == torch.float32
    assert found.y.tolist() == [1, 9, 0]
    assert found.y.dtype == torch.int64
    assert found.test_y.tolist() == [5, 6]
    assert torch.allclose(found.test_x, torch.tensor((1 - 0.1307) / 0.3081))
    assert found.x[0, 0, 0, 0].item() == pytest.approx(-0.1307 / 0.3081)


def test_the_folder_of_its_name_comes_first(tmp_path, offline):
    put(tmp_path, {**CONTENT, FILES[3]: torch.tensor([7, 8])})
    put(tmp_path / "mnist")
    assert load("mnist", tmp_path).test_y.tolist() == [5, 6]


def test_each_dataset_has_its_own_numbers_and_folder(tmp_path, offline):
    put(tmp_path / "mnist")
    put(tmp_path / "fashion-mnist", {**CONTENT, FILES[3]: torch.tensor([7, 8])})
    assert load("mnist", tmp_path).test_y.tolist() == [5, 6]
    fashion = load("fashion-mnist", tmp_path)
    assert fashion.test_y.tolist() == [7, 8]
    assert torch.allclose(fashion.test_x, torch.tensor((1 - 0.2860) / 0.3530))


def test_only_what_is_missing_is_downloaded(tmp_path, monkeypatch):
    put(tmp_path / "mnist")
    missing = tmp_path / "mnist" / f"{FILES[1]}.gz"
    content = missing.read_bytes()
    missing.unlink()
    asked = []

    def fetch(url, path, md5):
        asked.append((url, path, md5))
        path.write_bytes(content)

    monkeypatch.setattr(data, "fetch", fetch)
    assert load("mnist", tmp_path).y.tolist() == [1, 9, 0]
    url = "https://ossci-datasets.s3.amazonaws.com/mnist/train-labels-idx1-ubyte.gz"
    assert asked == [(url, missing, "d53e105ee54ea40749a09fcbcd1e9432")]


def test_a_download_from_a_server(tmp_path, monkeypatch):
    put(tmp_path / "published")
    published = {name: (tmp_path / "published" / f"{name}.gz").read_bytes() for name in FILES}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in published.items()}
    source = replace(SOURCES["mnist"], url=(tmp_path / "published").as_uri(), md5=md5)
    monkeypatch.setitem(SOURCES, "mnist", source)
    assert load("mnist", tmp_path / "cache").test_y.tolist() == [5, 6]
    assert len(list((tmp_path / "cache" / "mnist").iterdir())) == 4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({FILES[1]: torch.tensor([1, 9])}, "do not belong together"),
        ({FILES[0]: torch.zeros(3, 27, 28)}, "do not belong together"),
        ({FILES[2]: torch.zeros(0, 28, 28), FILES[3]: torch.zeros(0)}, "do not belong together"),
        ({FILES[3]: torch.tensor([5, 10])}, "a label is 10"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, offline, change, why):
    put(tmp_path, {name: array.int() for name, array in {**CONTENT, **change}.items()})
    with pytest.raises(InputError, match=why):
        load("mnist", tmp_path)


def test_digits(offline):
    found = load("digits")
    assert found.x.shape == (1437, 1, 28, 28)
    assert found.test_x.shape == (360, 1, 28, 28)
    assert found.x.mean().item() == pytest.approx(0, abs=1e-4)
    assert found.x.std().item() == pytest.approx(1, abs=1e-4)
    assert set(found.test_y.tolist()) == set(range(10))
    again = load("digits")
    assert torch.equal(again.test_x, found.test_x)


def test_names():
    assert set(DATASETS) == {"digits", "mnist", "fashion-mnist"}
    with pytest.raises(InputError, match="unknown dataset 'cifar'; datasets are digits, mnist, fashion-mnist"):
        load("cifar")


def test_the_default_folder_is_the_user_s_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "plainconv"
