"""What the machine can do: plausible numbers, and the limit that follows."""

import pytest
import torch

from plainconv.bench import peaks
from plainconv.bench.peaks import Peaks, measured

MACHINE = Peaks(1e11, ((1000, 1e-6), (2000, 2e-6), (10000, 20e-6)), 5e-6)


def test_the_longest_of_three_is_the_limit():
    assert MACHINE.limit(1e6, 1000).bound_by == "arithmetic"
    assert MACHINE.limit(1e6, 1000).seconds == pytest.approx(1e-5)
    assert MACHINE.limit(1e3, 1000) == peaks.Limit(5e-6, "call")
    assert MACHINE.limit(1e3, 10000) == peaks.Limit(20e-6, "memory")


def test_between_and_beyond_what_was_measured():
    assert MACHINE.copy_s(10) == 1e-6
    assert MACHINE.copy_s(1500) == pytest.approx(1.5e-6)
    assert MACHINE.copy_s(2000) == pytest.approx(2e-6)
    assert MACHINE.copy_s(6000) == pytest.approx(11e-6)
    assert MACHINE.copy_s(18000) == pytest.approx(38e-6), "on as the last two lead"


def test_the_best_of_two():
    other = Peaks(2e11, ((1000, 2e-6), (2000, 1.5e-6), (10000, 20e-6)), 6e-6)
    assert MACHINE.best(other) == Peaks(2e11, ((1000, 1e-6), (2000, 1.5e-6), (10000, 20e-6)), 5e-6)


@pytest.mark.parametrize(
    ("dtype", "direction"), [(torch.float32, "train"), (torch.float64, "forward"), (torch.bfloat16, "grad_weight")]
)
def test_measured(dtype, direction, monkeypatch):
    monkeypatch.setattr(peaks, "COPIES", (1 << 15, 1 << 20))
    monkeypatch.setattr(peaks, "REPEATS", 100)
    found = measured(dtype, 1, direction, 0.01)
    assert 1e8 < found.flops < 1e14
    assert [size for size, _ in found.copies] == [1 << 15, 1 << 20]
    assert all(1e7 < size / spent < 1e13 for size, spent in found.copies)
    assert 0 < found.call_s < 1


def test_the_copy_copies():
    source, target = torch.arange(3 * peaks.BLOCK, dtype=torch.uint8), torch.zeros(3 * peaks.BLOCK, dtype=torch.uint8)
    kernel = peaks._copy(peaks.Target.host().bits // 32)
    peaks.launch(kernel, (source.data_ptr(), target.data_ptr()), 2, 2)
    assert torch.equal(target[: 2 * peaks.BLOCK], source[: 2 * peaks.BLOCK])
    assert not target[2 * peaks.BLOCK :].any()


def test_the_call_is_that_of_the_direction(monkeypatch):
    asked = []
    for side in ("torchs", "ours"):
        monkeypatch.setattr(peaks, side, lambda layer, direction, given: asked.append(direction) or (lambda: None))
    peaks._call_s("train", 0.0)
    assert asked == ["train", "train"]
