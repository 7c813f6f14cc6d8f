"""Timings: in turn, the first call not counted, the median and the quartiles."""

import pytest
import torch

from plainconv import timing
from plainconv.timing import duration, in_turn, machine


def test_calls_take_turns_after_one_call_that_is_not_counted():
    seen = []
    found = in_turn({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, seconds=0, least=3)
    assert seen == ["a", "b"] * 4
    assert found["a"].calls == found["b"].calls == 3


def test_no_more_rounds_than_allowed():
    assert in_turn({"a": lambda: None}, seconds=60, most=7)["a"].calls == 7


def test_the_median_and_the_quartiles(monkeypatch):
    turns = (t for i in range(5) for t in (0, 0, (5, 1, 4, 2, 3)[i]))  # now, start, stop
    ticks = iter([0, 9, 0, *turns])  # once before, and the end
    monkeypatch.setattr(timing, "perf_counter", lambda: float(next(ticks)))
    found = in_turn({"a": lambda: None}, seconds=1e9, least=0, most=5)["a"]
    assert (found.low_s, found.median_s, found.high_s) == (2, 3, 4)


def test_the_machine():
    found = machine()
    assert torch.backends.cpu.get_cpu_capability() in found["processor"]
    assert found["cores"] >= 1
    assert {"threads", "python", "torch", "plainconv", "numpy"} <= set(found)


def test_an_error_in_a_call_is_raised():
    with pytest.raises(ZeroDivisionError):
        in_turn({"a": lambda: 1 / 0})


def test_a_turn_may_last_and_its_first_call_does_not_count(monkeypatch):
    clock, seen = [0.0], []

    def call(name, spent):
        seen.append(name)
        clock[0] += spent

    monkeypatch.setattr(timing, "perf_counter", lambda: clock[0])
    calls = {"short": lambda: call("short", 1 if seen[-1] == "short" else 9), "long": lambda: call("long", 20)}
    seen.append("")
    found = in_turn(calls, seconds=0, least=2, turn_s=12)
    assert seen[3:] == [*["short"] * 4, "long"] * 2
    assert (found["short"].median_s, found["short"].calls) == (1, 6)
    assert (found["long"].median_s, found["long"].calls) == (20, 2)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0000012, "1.2 µs"), (0.00123, "1.23 ms"), (0.9994, "999 ms"), (12.34, "12.3 s"), (1230, "1,230 s")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said
