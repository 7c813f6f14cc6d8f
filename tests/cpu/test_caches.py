"""The second cache: what the system tells, within reason."""

import os

import pytest

from plainconv.cpu import caches


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (512 << 10, 512 << 10),
        (1 << 20, 1 << 20),
        (64 << 10, 256 << 10),
        (64 << 20, 2 << 20),
        (0, 1 << 20),
        (-1, 1 << 20),
    ],
)
def test_what_the_system_tells(told, expected, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: told << 10, raising=False)
    assert caches.second.__wrapped__() == expected << 10


@pytest.mark.parametrize("error", [AttributeError, OSError, ValueError])
def test_a_system_that_does_not_tell(error, monkeypatch):
    def refuse(name):
        raise error(name)

    monkeypatch.setattr(os, "sysconf", refuse, raising=False)
    assert caches.second.__wrapped__() == caches.USUAL
