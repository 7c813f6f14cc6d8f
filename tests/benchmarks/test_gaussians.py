"""The page of Gaussians: it is that of the record, and every side that is there computes the same."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gaussians():
    spec = importlib.util.spec_from_file_location("gaussians", ROOT / "benchmarks" / "gaussians.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules["gaussians"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def run(gaussians, folder, **options):
    """All in one thread, as tests are."""
    size = {"threads": torch.get_num_threads(), "height": 40, "width": 50}
    gaussians.main(seconds=0.0, out=folder, write=False, check=False, **size | options)
    return json.loads((folder / "gaussians.json").read_text()), (folder / "gaussians.md").read_text()


def is_page(gaussians, folder):
    with pytest.raises(gaussians.typer.Exit) as told:
        gaussians.main(check=True, out=folder)
    return told.value.exit_code == 0


def test_the_page_is_that_of_the_record(gaussians, tmp_path):
    assert is_page(gaussians, ROOT / "results"), "run benchmarks/gaussians.py --write"
    for name in ("gaussians.json", "gaussians.md"):
        (tmp_path / name).write_text((ROOT / "results" / name).read_text() + " ")
    assert not is_page(gaussians, tmp_path)
    gaussians.main(write=True, check=False, out=tmp_path)
    assert is_page(gaussians, tmp_path)


def test_a_picture_goes_through_every_side(gaussians, tmp_path, monkeypatch):
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    pytest.importorskip("scipy", reason="SciPy is not installed")
    monkeypatch.setattr(gaussians, "TURN_S", 0.0)
    record, text = run(gaussians, tmp_path)
    assert record["picture"] == [3, 40, 50]
    assert [kernel["taps"] for kernel in record["kernels"]] == [9, 31]
    for kernel in record["kernels"]:
        assert set(kernel["timings"]) == set(kernel["errors"]) == set(gaussians.gaussians_page.SIDES)
        assert max(kernel["errors"].values()) < 5e-6, "961 products, one after the other"
        assert kernel["algorithms"]["auto"] != "separable", "auto never looks at values"
    assert set(record["packages"]) == {"cv2", "scipy"}
    assert "What cannot be had" not in text
    assert is_page(gaussians, tmp_path)


def test_what_is_not_installed_is_said(gaussians, tmp_path, monkeypatch):
    monkeypatch.setattr(gaussians, "TURN_S", 0.0)
    monkeypatch.setattr(gaussians.sys.modules["sides"], "find_spec", lambda package: None)
    record, text = run(gaussians, tmp_path)
    assert all(set(kernel["absent"]) == {"opencv", "scipy"} for kernel in record["kernels"])
    assert "- OpenCV filter2D: cv2 is not installed" in text
    assert "- SciPy oaconvolve: scipy is not installed" in text


def test_what_takes_long_is_called_once(gaussians, monkeypatch):
    called = []

    def counted(given):
        return lambda: called.append(1) or given.exact()[0].float()

    given = gaussians.Given(torch.rand(1, 3, 20, 30), gaussians.gaussian(9))
    monkeypatch.setattr(gaussians, "MADE", {"torch": counted, "separable": gaussians.MADE["separable"]})
    monkeypatch.setattr(gaussians, "SLOW_S", 0.0)
    monkeypatch.setattr(gaussians, "in_turn", lambda calls, **how: {} if not calls else pytest.fail("not in turn"))
    record = gaussians.measured(given, 0.0)
    assert len(called) == 1
    assert [timing["calls"] for timing in record["timings"].values()] == [1, 1]
    assert r"| 9x9 | {} \*".format(f"{record['timings']['torch']['median_s'] * 1e3:.1f}") in (
        gaussians.gaussians_page.times({"kernels": [record]})
    )


def test_what_is_right_is_the_convolution_in_float64(gaussians):
    given = gaussians.Given(torch.rand(1, 3, 20, 30), torch.rand(5, 5))  # no symmetry
    right = F.conv2d(given.x.double(), given.weight.double(), **given.options)
    torch.testing.assert_close(given.exact(), right, rtol=1e-12, atol=0)


def test_what_misses_its_target(gaussians):
    page = gaussians.gaussians_page
    sides = {"torch": 9.0, "torch channels_last": 7.9, "opencv": 2.0, "scipy": 1.9, "separable": 2.0, "auto": 2.0}
    kernel = {"taps": 9, "timings": {side: {"median_s": seconds} for side, seconds in sides.items()}}
    assert page.ratio(kernel, "separable", "torch") == pytest.approx(3.95), "in the better memory format"
    assert page.misses({"kernels": [kernel]}) == [
        "9x9, `separable`: 3.95 of 4.00 beside torch",
        "9x9, `separable`: 0.95 of 1.00 beside SciPy oaconvolve",
        "9x9, `auto`: 0.95 of 1.00 beside SciPy oaconvolve",
    ]
