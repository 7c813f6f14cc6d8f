"""What the tests of the engine's algorithms share."""

import pytest

from plainconv.cpu import compile as cpu


@pytest.fixture
def as_if(monkeypatch, request):
    """A function that pretends the processor has vectors of so many bits, or is another one, to read its assembly.

    What was cut or compiled for others is forgotten before and behind, by `forget` of the module that asks.
    """
    host, forget = cpu.Target.host, request.module.forget

    def pretend(as_what):
        target = as_what if isinstance(as_what, cpu.Target) else host(as_what)
        monkeypatch.setattr(cpu.Target, "host", staticmethod(lambda: target))
        forget()

    yield pretend
    forget()
