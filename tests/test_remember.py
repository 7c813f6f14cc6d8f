"""Tables are bounded in bytes: as soon as they are too many, all is forgotten, and calls make anew what they want."""

import gc

import pytest
import torch

import plainconv
from plainconv import functional, ops, remember
from plainconv.menu import channels, dense, lanes


@pytest.fixture(autouse=True)
def _forgotten():
    remember.forget()
    gc.collect()
    yield
    remember.forget()


class Owner:
    pass


def test_what_is_alive_is_counted_and_the_rest_is_not():
    one, two = Owner(), Owner()
    remember.weigh(one, remember.SMALL)
    remember.weigh(two, 2 * remember.SMALL)
    remember.weigh(Owner(), remember.SMALL - 1)
    assert sorted(remember._sizes.values()) == [remember.SMALL, 2 * remember.SMALL]
    del one
    assert list(remember._sizes.values()) == [2 * remember.SMALL]


def test_all_is_forgotten_when_it_becomes_too_much(monkeypatch):
    forgotten, owners = [], []
    monkeypatch.setattr(remember, "_clears", [lambda: forgotten.append(len(owners)), owners.clear])
    size = remember.MOST_BYTES // 4
    for _ in range(10):
        owner = Owner()
        remember.weigh(owner, size)
        owners.append(owner)
        del owner
        assert sum(remember._sizes.values()) <= remember.MOST_BYTES
    assert forgotten == [4, 4]


# The tables of each of the three kernels grow with one side of the picture.
@pytest.mark.parametrize(
    ("algorithm", "prepare", "wide"),
    [("direct", dense, True), ("narrow", lanes, True), ("depthwise", lanes, False), ("depthwise", channels, True)],
    ids=["direct", "narrow", "depthwise", "depthwise in channels_last"],
)
def test_the_tables_of_many_sizes_stay_within_the_bound(algorithm, prepare, wide, monkeypatch):
    """Without the bound, 24 sizes of 2 x 8 bytes a place would be 2 MB."""
    monkeypatch.setattr(remember, "MOST_BYTES", 400_000)
    groups = 1 if algorithm != "depthwise" else 2
    weight = torch.randn(2, 2 // groups, 3, 3)
    for number in range(24):
        long = 4000 + 37 * (number * 7 % 24)
        image = torch.randn(1, 2, 5, long) if wide else torch.randn(1, 2, long, 5)
        if prepare is channels:
            image = image.to(memory_format=torch.channels_last)
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2), "reflect")
        expected = torch.nn.functional.conv2d(padded, weight, groups=groups)
        for _ in range(2):
            result = plainconv.conv2d(
                image, weight, padding=2, padding_mode="reflect", groups=groups, algorithm=algorithm
            )
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        # What is alive is counted, so this is more than a count: tables that somebody still held would add up.
        assert 0 < sum(remember._sizes.values()) <= 400_000


def test_a_call_goes_on_when_all_is_forgotten_meanwhile():
    """What is bound holds its tables itself."""
    x, w = torch.randn(1, 2, 5000), torch.randn(3, 2, 3)
    expected = torch.nn.functional.conv1d(torch.nn.functional.pad(x, (1, 1), "reflect"), w)
    plainconv.conv1d(x, w, padding=1, padding_mode="reflect", algorithm="direct")
    (((_, call, _),),) = functional._READY.values()
    remember.forget()
    gc.collect()
    junk = [torch.full((5100,), -1, dtype=torch.int64) for _ in range(50)]  # where the tables were, if they were freed
    torch.testing.assert_close(call(x, w, None), expected, rtol=1e-4, atol=1e-4)
    assert len(junk) == 50


def test_everything_that_holds_tables_forgets():
    """Each of them alone would keep all tables alive."""
    plainconv.conv1d(torch.randn(1, 2, 5000), torch.randn(3, 2, 3), algorithm="direct")
    plainconv.conv1d(torch.randn(1, 2, 5000), torch.randn(3, 2, 3), algorithm="narrow")
    remember.forget()
    assert not functional._READY
    assert not ops._READY
    for module in (dense, lanes, channels):
        assert module.prepare.cache_info().currsize == 0
