"""What a call allocates for itself."""

import torch

from plainconv.bench.scratch import torchs_peak


def test_what_is_held_at_once_counts_but_the_result_does_not():
    def call():
        one = torch.empty(1 << 20, dtype=torch.uint8)
        del one
        two, three = torch.empty(1 << 19, dtype=torch.uint8), torch.empty(1 << 18, dtype=torch.uint8)
        del two, three
        return (torch.empty(1 << 10, dtype=torch.uint8),)

    assert torchs_peak(call) == (1 << 20) - (1 << 10)
    assert torchs_peak(lambda: (torch.empty(100),)) == 0


def test_the_columns_of_float64_are_seen():
    x, w = torch.randn(1, 8, 32, 32, dtype=torch.float64), torch.randn(8, 8, 3, 3, dtype=torch.float64)
    columns = 8 * 9 * 30 * 30 * 8
    assert columns <= torchs_peak(lambda: (torch.nn.functional.conv2d(x, w),)) < 2 * columns
