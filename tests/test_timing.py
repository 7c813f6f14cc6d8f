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


class Queue:
    """Time as a CPU and a device spend it: the CPU sends work, which the device begins when it is free."""

    def __init__(self, monkeypatch):
        self.now = self.free_at = 0.0
        queue = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                queue.work(0.0)
                self.at = queue.free_at

            def synchronize(self):
                queue.now = max(queue.now, self.at)

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work(cycles / 2e9))
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def work(self, seconds):
        self.free_at = max(self.free_at, self.now) + seconds

    def call(self, sending, working):
        self.now += sending
        self.work(working)


@pytest.mark.parametrize("working", [3e-6, 3e-4, 0.1])
@pytest.mark.parametrize("sending", [1e-6, 4e-5, 2e-3])
def test_a_device_is_timed_and_not_what_sends_it_work(sending, working, monkeypatch):
    queue, calls = Queue(monkeypatch), []
    found = timing.on_device(lambda: calls.append(0) or queue.call(sending, working))
    assert found == pytest.approx(working)
    many = min(timing.MOST_CALLS, int(timing.MOST_AHEAD_S / sending))
    assert len(calls) == 2 if working > timing.LONG_S else len(calls) == 2 + many
    for more in (1e-4, 2e-2):
        assert timing.elapsed(lambda sending=more: queue.call(sending, working)) == pytest.approx(working)


def test_a_call_that_compiles_is_not_waited_for_as_long_once_more(monkeypatch):
    queue, spent = Queue(monkeypatch), iter([60.0, *[1e-5] * 99])
    assert timing.on_device(lambda: queue.call(next(spent), 1e-4)) == pytest.approx(1e-4)
    assert queue.now < 61


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0000012, "1.2 µs"), (0.00123, "1.23 ms"), (0.9994, "999 ms"), (12.34, "12.3 s"), (1230, "1,230 s")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said
