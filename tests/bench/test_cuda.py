"""Measuring on a GPU, all but the GPU: another one, whose graphs are only calls, stands in its place."""

import dataclasses
import json
import subprocess
import weakref

import pytest
import torch
from pretended import Pretended
from typer.testing import CliRunner

from plainconv import bench
from plainconv.bench import calls, check, cuda, run, suites
from plainconv.bench.cuda import Cuda, Graphs, Rotating
from plainconv.bench.peaks import Peaks
from plainconv.bench.suites import Layer
from plainconv.cli import app
from plainconv.problem import ConvProblem, Direction
from plainconv.timing import Timing, in_turn

PEAKS = Peaks(1e11, ((1 << 15, 1e-6), (1 << 28, 1e-2)), 1e-6)
PLAIN = Layer("tiny", "plain", ConvProblem.parse("n1 c3 o4 x9x8 k3x3 p1"))
UP = Layer("tiny", "up", ConvProblem.parse("n2 c4 o6 x8x9 k3x3 s2 p1"), transposed=True)
ROW = Layer("line", "row", ConvProblem.parse("n1 c4 o4 x20 k3 g4"))
SWITCH = torch.backends.cudnn.conv


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(cuda, "LONG_S", 1e-4)
    monkeypatch.setattr(cuda, "BUSY_S", 1e-4)
    monkeypatch.setattr(cuda, "COPIES", (1 << 10, 1 << 12))
    monkeypatch.setattr(cuda, "WIDE", dict.fromkeys(cuda.WIDE, 16))


def setting(direction="forward", dtype=torch.float32, **more):
    return bench.Setting(direction, dtype, 1, PEAKS, seconds=0.0, device=Cuda(Pretended()), **more)


@pytest.mark.parametrize("direction", calls.DIRECTIONS)
@pytest.mark.parametrize("layer", [PLAIN, UP, ROW], ids=lambda layer: layer.name)
def test_a_layer_is_timed_by_graphs_and_once_more_by_calls(layer, direction):
    given = setting(direction, regret=direction == "forward")
    row = bench.measure(layer, given)
    assert row.right
    assert set(row.torch) == set(row.ours) == set(calls.layouts(layer))
    assert given.device.gpu.captured >= 2 * (len(row.torch) + len(row.ours) + len(row.packed))
    assert set(row.eager) == {"torch", "ours"}
    assert row.eager_ratio == row.eager["torch"].median_s / row.eager["ours"].median_s
    assert (row.regret is None) == (direction != "forward")
    assert all(0 < timing.median_s < 0.1 for timing in (*row.torch.values(), *row.ours.values()))
    text = bench.table([row])
    assert "called from Python geomean" in text
    assert text.count(layer.name) >= 3, "a line in each of two tables, and the worst"
    told = json.loads(bench.as_json(bench.as_records([row], given)))
    assert bench.rows_of(told) == [row]
    assert told["machine"]["clock"] == "1 MHz"


def test_a_wrong_result_has_no_speed(monkeypatch):
    right = calls.ours

    def wrong(layer, direction, given, algorithm="auto"):
        call = right(layer, direction, given, algorithm)
        return lambda: (call()[0] + 0.01,)

    monkeypatch.setattr(calls, "ours", wrong)
    row = bench.measure(PLAIN, setting())
    assert (row.right, row.ours, row.eager, row.eager_ratio, row.ratio) == (False, {}, {}, None, None)
    assert "WRONG" in bench.table([row])


def test_layers_stay_whole_and_none_is_short(monkeypatch):
    monkeypatch.setattr(Layer, "cut", lambda layer: pytest.fail("cut"))
    row = bench.measure(ROW, setting())
    assert row.cut_from is None
    row.torch["contiguous"] = Timing(1e-6, 1e-6, 1e-6, 5)
    assert not dataclasses.replace(row, device="cuda").short
    assert dataclasses.replace(row, device="cpu").short


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=str)
def test_points_are_computed_where_the_tensors_are(direction):
    """On a device whose tensors have no values, and that refuses to meet those of the CPU."""
    problem = ConvProblem.parse("n2 c4 o6 x8x9 k3x3 s2 p1 g2")
    first, second = (torch.empty(problem.shape_of(role), device="meta") for role in direction.given)
    points = torch.empty(5, 4, dtype=torch.int64, device="meta")
    values, sums = check._map_points(problem, direction, first, second, points)
    assert values.device.type == sums.device.type == "meta"


# -- rotation --------------------------------------------------------------------------------------------------------


def test_tensors_in_rotation_are_more_than_the_cache_holds():
    gpu = Pretended()
    given = calls.tensors(PLAIN, torch.float32)
    size = sum(tensor.nbytes for tensor in given)
    copies = Cuda(gpu).copies(given)
    assert 9000 <= len(copies) * size < 9000 + size
    assert copies[0] is given
    assert all(torch.equal(a, b) for each in copies for a, b in zip(each, given, strict=True))
    assert len({tensor.data_ptr() for each in copies for tensor in each}) == 3 * len(copies)
    gpu.cache = lambda: 1 << 40
    assert len(Cuda(gpu).copies(given)) == cuda.MOST_COPIES
    gpu.free = lambda: 5 * cuda.SHARE * size
    assert len(Cuda(gpu).copies(given)) == 5
    gpu.free = lambda: 0
    assert len(Cuda(gpu).copies(given)) == 1
    gpu.free, gpu.cache = (lambda: 1 << 40), (lambda: 1)
    assert len(Cuda(gpu).copies(given)) == 2, "what was just read is not read again"


def test_each_copy_has_its_turn_and_a_time_is_that_of_one_call():
    seen, gpu = [], Pretended()
    spent = iter([3e-5, 1e-5, 2e-5])
    gpu.elapsed = lambda run: run() or next(spent)
    run, count = Graphs(gpu).ready([lambda: seen.append("a"), lambda: seen.append("b")])
    assert seen == ["a", "b"] * 4, "once to warm up, and three times to see how long that is"
    assert count == 20, "ten rounds of 10 us are 100"
    seen.clear()
    run()
    assert seen == ["a", "b"] * 10
    assert Timing(4.0, 2.0, 6.0, 5).each(2) == Timing(2.0, 1.0, 3.0, 5)


def test_not_endless_rounds(monkeypatch):
    gpu = Pretended()
    gpu.elapsed = lambda run: 0.0
    monkeypatch.setattr(cuda, "MOST_CALLS", 10)
    assert Graphs(gpu).ready([lambda: None] * 3).calls == 9
    assert Graphs(gpu).ready([lambda: None] * 30).calls == 30


def test_results_of_a_round_lie_apart():
    """What a call made is held until that copy's next turn."""
    alive, most = set(), []

    class Result:
        def __init__(self, name):
            alive.add(self)
            most.append(len(alive))
            self.name = name

        def __del__(self):
            alive.discard(self)

    Rotating(Pretended()).made([lambda: Result("a"), lambda: Result("b")], 3)()
    assert most[-1] >= 2


def test_tensors_live_as_long_as_what_replays_them():
    tensors = [torch.zeros(3), torch.zeros(3)]
    seen = [weakref.ref(tensor) for tensor in tensors]
    run, _ = Graphs(Pretended()).ready([lambda tensor=tensor: (tensor.add_(1),) for tensor in tensors])
    del tensors
    before = [each().sum().item() for each in seen]
    run()
    assert all(each().sum().item() > least for each, least in zip(seen, before, strict=True))
    del run
    assert [each() for each in seen] == [None, None]


def test_a_clock_of_its_own():
    asked = []
    timing = in_turn({"a": "work"}, seconds=0, clock=lambda call: asked.append(call) or 2.0)["a"]
    assert timing.median_s == 2.0
    assert set(asked) == {"work"}


# -- what cannot be measured -----------------------------------------------------------------------------------------


def refusing(monkeypatch, refused):
    """Graphs that capture all calls but those of which `refused` says so."""
    real = Graphs.ready

    def ready(clock, given):
        if refused(given):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return real(clock, given)

    monkeypatch.setattr(Graphs, "ready", ready)


def test_a_format_that_cannot_be_captured_is_not_timed(monkeypatch):
    seen = []
    refusing(monkeypatch, lambda given: seen.append(0) or len(seen) == 2)
    with pytest.warns(UserWarning, match="torch channels_last of plain is not timed: operation not permitted when"):
        row = bench.measure(PLAIN, setting())
    assert (set(row.torch), set(row.ours)) == ({"contiguous"}, {"contiguous", "channels_last"})
    assert row.ratio > 0
    assert row.ratio_in("channels_last") is None
    assert PLAIN.name in bench.table([row])


def test_an_algorithm_that_cannot_be_captured_is_left_out_of_the_regret(monkeypatch):
    real, refused = calls.ours, set()

    def ours(layer, direction, given, algorithm="auto"):
        call = real(layer, direction, given, algorithm)
        if algorithm != "auto":
            refused.add(call)
        return call

    monkeypatch.setattr(calls, "ours", ours)
    monkeypatch.setattr(run, "FAR", 1e9)
    refusing(monkeypatch, lambda given: refused.intersection(given))
    regret = bench.measure(PLAIN, setting(regret=True)).regret
    assert len(regret.seconds) == 1
    assert regret.left_out["reference"] == "operation not permitted when stream is capturing"


def test_a_layer_that_cannot_be_measured_does_not_end_the_run(monkeypatch):
    real, lost = calls.torchs, []

    def torchs(layer, direction, given):
        if layer is UP:
            raise torch.OutOfMemoryError("out of memory")
        return real(layer, direction, given)

    monkeypatch.setattr(calls, "torchs", torchs)
    rows, _ = bench.measure_all([PLAIN, UP, ROW], setting(), lost=lambda layer, error: lost.append((layer, str(error))))
    assert [row.layer for row in rows] == [PLAIN, ROW]
    assert lost == [(UP, "out of memory")]
    with pytest.raises(torch.OutOfMemoryError):
        bench.measure_all([UP], setting())


def test_the_command_keeps_the_others(tmp_path, monkeypatch):
    real = calls.torchs

    def torchs(layer, direction, given):
        if layer is UP:
            raise torch.OutOfMemoryError("out of memory")
        return real(layer, direction, given)

    for module in (suites, bench):
        monkeypatch.setattr(module, "load", lambda: {"tiny": (PLAIN, UP)})
    monkeypatch.setattr(calls, "torchs", torchs)
    monkeypatch.setattr(cuda, "Gpu", lambda place: Pretended())
    monkeypatch.setattr("plainconv.cli._device", torch.device)
    words = ["bench", "--suite", "tiny", "--device", "cuda", "--exact", "--seconds", "0", "--no-picture"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path)], catch_exceptions=False)
    assert (result.exit_code, "tiny up could not be measured: out of memory" in result.stderr) == (2, True)
    (path,) = tmp_path.glob("*.json")
    assert [row.layer.name for row in bench.rows_of(json.loads(path.read_text()))] == ["plain"]


# -- the machine -----------------------------------------------------------------------------------------------------


def test_the_machine_is_measured_by_the_same_clock_and_captured_once():
    place = Cuda(Pretended())
    found = place.peaks(torch.float32, 1, "train", 0.0)
    assert [size for size, _ in found.copies] == [1 << 10, 1 << 12]
    assert found.flops > 0
    assert found.call_s > 0
    captured, clocked = place.gpu.captured, place.gpu.clocked
    assert captured == 2 * (2 + 1 + 2)
    place.peaks(torch.float32, 1, "train", 0.0)
    assert place.gpu.captured == captured
    assert place.gpu.clocked == clocked + 3 * 5


def test_switches_are_thrown_for_a_while():
    before = (torch.backends.cudnn.benchmark, SWITCH.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    for tf32, precision in ((True, "tf32"), (False, "ieee")):
        place, seen = Cuda(Pretended(), tf32), []
        product = place._product
        place._product = lambda *given, product=product, seen=seen: (
            seen.append(torch.backends.cuda.matmul.fp32_precision) or product(*given)
        )
        with bench.alone(1, place):
            assert torch.backends.cudnn.benchmark
            assert SWITCH.fp32_precision == precision
            assert place.rounds(torch.float32) is tf32
            assert not place.rounds(torch.bfloat16)
            place.peaks(torch.float32, 1, "forward", 0.0)
            assert seen == [precision], "the limit is measured as convolutions are made"
            assert torch.backends.cuda.matmul.fp32_precision == before[2], "but our own products are not rounded"
    after = (torch.backends.cudnn.benchmark, SWITCH.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    assert after == before


def test_clocks_as_the_driver_tells_them(monkeypatch):
    asked = []

    def run(words, **_):
        asked.extend(words)
        return subprocess.CompletedProcess(words, 0, "570.1, 1755 MHz, 1980 MHz, 3201 MHz, 700.00 W\n")

    monkeypatch.setattr(cuda.subprocess, "run", run)
    assert cuda._clocks("7")["driver"] == "570.1"
    assert cuda._clocks("7")["power_limit"] == "700.00 W"
    assert "--id=GPU-7" in asked

    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(cuda.subprocess, "run", missing)
    assert cuda._clocks("7") == {}


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "load", lambda: {"tiny": (PLAIN,)})
    monkeypatch.setattr(bench, "load", lambda: {"tiny": (PLAIN,)})
    monkeypatch.setattr(cuda, "Gpu", lambda place: Pretended())
    monkeypatch.setattr("plainconv.cli._device", torch.device)
    words = ["bench", "--suite", "tiny", "--device", "cuda", "--exact", "--seconds", "0", "--no-picture"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.json")
    told = json.loads(path.read_text())
    assert "none, at 1 MHz, driver 1.2, " in bench.heading({**told, "device": "cuda"})
    assert "float32 as TF32, forward" in bench.heading({**told, "tf32": True})
    assert [path.name for path in tmp_path.iterdir()] == ["cuda-forward-float32-tiny.json"]
    result = CliRunner().invoke(app, [*words, "--against", "scipy"])
    assert (result.exit_code, result.stderr) == (2, "plainconv: --against compares on the CPU alone\n")
