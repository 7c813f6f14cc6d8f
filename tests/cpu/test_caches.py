"""The second cache: what the system tells, within reason."""

import os

import pytest

from plainconv.cpu import caches


@pytest.mark.parametrize(
    ("told", "expected"),
    [(512, 512), (1024, 1024), (64, 256), (65536, 2048), (0, 1024), (-1, 1024)],
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
