"""The comparison: every algorithm on the same problem, its error against float64."""

import pytest
import torch
import torch.nn.functional as F

from plainconv import compare
from plainconv.compare import BEYOND, CUT, compare_filters, cut_out, spread
from plainconv.files import InputError
from plainconv.menu.base import AlgorithmRefused
from plainconv.picture import KERNELS, Picture, named_or_typed
from plainconv.plan import algorithms
from plainconv.timing import Timing

PIXELS = torch.randint(0, 256, (3, 60, 70), generator=torch.Generator().manual_seed(0)).float()


def test_spread_leads_each_channel_to_itself():
    weight = spread(named_or_typed("emboss"), 3)
    assert weight.shape == (3, 3, 3, 3)
    y = F.conv2d(PIXELS[None].double(), weight)
    alone = F.conv2d(PIXELS[:, None].double(), named_or_typed("emboss")[None])
    assert torch.equal(y[0], alone[:, 0])


@pytest.mark.parametrize("kernel", ["emboss", "sobel"])
def test_rows(kernel):
    rows, made = compare_filters(Picture(PIXELS), named_or_typed(kernel), seconds=0)
    assert [row.name for row in rows] == ["torch", "auto", *algorithms()]
    refused = {row.name: row.refused for row in rows if row.refused}
    not_for_it = {"depthwise", "separable", "pointwise", "builtin"}
    assert set(refused) <= not_for_it, "a dense 3x3 convolution here, and torch's own is not allowed"
    assert list(made) == [row.name for row in rows if not row.refused]
    for row in (row for row in rows if not row.refused):
        assert row.largest_error < 0.01
        assert row.timing == min(row.both.values(), key=lambda timing: timing.median_s)
        assert row.layout in ("contiguous", "channels_last")
        whole = made["torch"].pixels if row.name != "loops" else cut_out(made["torch"].pixels)
        if row.name != "loops":
            assert torch.allclose(made[row.name].pixels, whole, atol=0.01)
    assert made["torch"].pixels.shape == (3, 58, 68)
    assert made["loops"].pixels.shape == (3, CUT - 2, CUT - 2)
    scales = {row.name: row.scale for row in rows if not row.refused}
    assert scales.pop("loops") == pytest.approx(58 * 68 / (CUT - 2) ** 2)
    assert set(scales.values()) == {1.0}


@pytest.mark.parametrize(("kh", "kw"), [(33, 33), (40, 2), (41, 3)])
def test_the_cut_out_holds_a_large_kernel(kh, kw):
    kernel = torch.rand(1, kh, kw, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / (kh * kw)
    rows, made = compare_filters(Picture(PIXELS[:1, :41, :45]), kernel, seconds=0)
    assert max(row.largest_error for row in rows) < 0.01
    height, width = min(max(CUT, kh + BEYOND), 41), min(max(CUT, kw + BEYOND), 45)
    assert made["loops"].pixels.shape == (1, height - kh + 1, width - kw + 1)
    scale = next(row.scale for row in rows if row.name == "loops")
    assert scale == pytest.approx((42 - kh) * (46 - kw) / made["loops"].pixels.numel())


@pytest.mark.parametrize(("kh", "kw"), [(61, 1), (1, 71)])
def test_a_kernel_that_the_picture_cannot_hold(kh, kw):
    with pytest.raises(InputError, match=f"picture of 70x60 pixels cannot hold a kernel of {kw}x{kh}"):
        compare_filters(Picture(PIXELS), torch.ones(1, kh, kw), seconds=0)


def test_the_better_layout_counts_and_the_time_of_a_cut_out_is_scaled(monkeypatch):
    def in_turn(calls, seconds):
        return {name: Timing(*[2.0 if "last" in name else 3.0] * 3, calls=1) for name in calls}

    monkeypatch.setattr(compare, "in_turn", in_turn)
    rows = {row.name: row for row in compare_filters(Picture(PIXELS), named_or_typed("edge"))[0]}
    assert rows["shift"].layout == rows["loops"].layout == "channels_last"
    assert rows["shift"].timing.median_s == 2
    assert rows["loops"].timing.median_s == pytest.approx(2 * rows["loops"].scale)


def test_an_error_is_seen(monkeypatch):
    monkeypatch.setattr(compare, "conv2d", lambda x, w, algorithm: F.conv2d(x, w) + 3 * (algorithm == "shift"))
    rows, _ = compare_filters(Picture(PIXELS), named_or_typed("edge"), seconds=0)
    errors = {row.name: row.largest_error for row in rows}
    assert errors.pop("shift") == pytest.approx(3)
    assert max(errors.values()) < 0.01


def test_a_refusal_is_a_row(monkeypatch):
    def refuse(x, w, algorithm):
        if algorithm == "fft":
            raise AlgorithmRefused("not today")
        return F.conv2d(x, w)

    monkeypatch.setattr(compare, "conv2d", refuse)
    rows, made = compare_filters(Picture(PIXELS), named_or_typed("edge"), seconds=0)
    refused = {row.name: row.refused for row in rows if row.refused}
    assert refused == {"fft": "not today"}
    assert "fft" not in made


def test_named_kernels_are_all_in_the_gallery():
    from plainconv.train import Data

    few = Data(torch.zeros(4, 1, 28, 28), torch.zeros(4).long(), torch.zeros(2, 1, 28, 28), torch.zeros(2).long())
    found = compare.compare(Picture(PIXELS), named_or_typed("edge"), few, epochs=1, batch=2, seconds=0)
    assert set(found.gallery) == {"original", *KERNELS} - {"identity"}
    assert set(found.records) == {"made", "machine", "filter", "training"}
    assert [point["step"] for point in found.records["training"]["runs"]["plainconv"]] == [2]
