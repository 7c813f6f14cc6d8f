"""A tiny layer through everything, its record, its lines of text, and its bar."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from plainconv import bench, measure, plots
from plainconv.bench import calls, device, run
from plainconv.bench.peaks import Peaks
from plainconv.bench.records import geomean, peaks_of, seconds, sentence, size
from plainconv.bench.suites import Layer
from plainconv.cpu import compile
from plainconv.menu import ALGORITHMS
from plainconv.menu.base import compute_dtype
from plainconv.plan import forget
from plainconv.problem import ConvProblem
from plainconv.timing import Timing

PEAKS = Peaks(1e11, ((1 << 15, 1e-6), (1 << 28, 1e-2)), 1e-6)
PLAIN = Layer("tiny", "plain", ConvProblem.parse("n1 c3 o4 x9x8 k3x3 p1"))
TRANSPOSED = Layer("tiny", "up", ConvProblem.parse("n2 c4 o6 x8x9 k3x3 s2 p1"), transposed=True)
ROW = Layer("line", "row", ConvProblem.parse("n1 c4 o4 x20 k3 g4"))
DEPTHWISE = Layer("tiny", "depthwise", ConvProblem.parse("n1 c4 o4 x12x12 k3x3 g4"))


def setting(direction="forward", dtype=torch.float32, **more):
    return bench.Setting(direction, dtype, 1, PEAKS, seconds=0.0, **more)


@pytest.mark.parametrize("direction", calls.DIRECTIONS)
@pytest.mark.parametrize("layer", [PLAIN, TRANSPOSED, ROW], ids=lambda layer: layer.name)
def test_every_direction(layer, direction):
    row = bench.measure(layer, setting(direction))
    assert row.right
    assert set(row.torch) == set(row.ours) == set(row.checks) == set(calls.layouts(layer))
    packed = set(calls.layouts(layer)) if direction == "forward" else set()
    assert set(row.packed) == set(row.packed_algorithms) == set(row.packed_checks) == packed
    assert (row.packed_ratio is None) == (direction != "forward")
    assert row.ratio == row.torch[row.torch_best].median_s / row.ours[row.our_best].median_s
    assert all(row.ratio_in(layout) > 0 for layout in row.ours)
    assert row.first_call_s > 0
    assert row.torch_check.right
    assert row.flop == layer.flop * (3 if direction == "train" else 1)
    assert row.share == pytest.approx(row.limit_s / row.ours[row.our_best].median_s)
    chosen = row.algorithms[calls.CONTIGUOUS].split("/")
    assert len(chosen) == (3 if direction == "train" else 1)
    assert row.cut_from is None


@pytest.mark.parametrize("layer", [PLAIN, TRANSPOSED, ROW], ids=lambda layer: layer.name)
def test_both_sides_make_the_same(layer):
    given = calls.tensors(layer, torch.float64)
    for direction in calls.DIRECTIONS:
        theirs, own = (make(layer, direction, given)() for make in (calls.torchs, calls.ours))
        assert len(theirs) == len(own) == (3 if direction == "train" else 1)
        for a, b in zip(theirs, own, strict=True):
            assert torch.allclose(a, b)
    assert not given.x.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_type(dtype):
    row = bench.measure(PLAIN, setting(dtype=dtype))
    assert row.right
    assert row.dtype == str(dtype).removeprefix("torch.")
    assert (
        row.checks[calls.CONTIGUOUS].error <= torch.finfo(compute_dtype(dtype)).eps * 1e3 + torch.finfo(dtype).eps * 20
    )


@pytest.mark.parametrize("direction", ["forward", "train"])
def test_a_wrong_result_has_no_speed(direction, monkeypatch):
    right = calls.ours

    def wrong(layer, direction, given, algorithm="auto"):
        call = right(layer, direction, given, algorithm)
        return lambda: (*(t for t in call()[:-1]), call()[-1] + 0.01)

    monkeypatch.setattr(calls, "ours", wrong)
    row = bench.measure(PLAIN, setting(direction, regret=True))
    assert not row.right
    assert (row.ours, row.ratio, row.share, row.regret) == ({}, None, None, None)
    assert row.ratio_in("contiguous") is None
    said = bench.table([row])
    assert "WRONG" in said
    assert "no layer is right" in said
    assert bench.rows_of(json.loads(json.dumps(bench.as_records([row], setting(direction))))) == [row]


def test_a_long_layer_is_cut_and_says_so(monkeypatch):
    cut = Layer.cut
    monkeypatch.setattr(Layer, "cut", lambda layer: cut(layer, 1000.0))
    row = bench.measure(PLAIN, setting())
    assert row.cut_from == str(PLAIN.problem)
    assert row.layer.flop <= 1000
    assert f"plain (cut): over 4 GFLOP, it was {PLAIN.problem}" in bench.table([row])
    row = bench.measure(PLAIN, setting(full=True))
    assert (row.layer, row.cut_from) == (PLAIN, None)


def test_a_slow_format_is_called_a_few_times_only(monkeypatch):
    seen = {}

    def in_turn(timed, **how):
        seen.update(dict.fromkeys(timed, how))
        return {name: Timing(1.0, 1.0, 1.0, 1) for name in timed}

    spent = {"a": 1.0, "b": 2.9, "c": 3.1}
    monkeypatch.setattr(run, "in_turn", in_turn)
    monkeypatch.setattr(run, "_once", lambda call, clock: spent[call])
    sides = {"torch": {"x": ["a"], "y": ["b"]}, "ours": {"x": ["a"], "y": ["c"]}}
    run._timed(sides, 10.0, device.Wall())
    assert {name for name, how in seen.items() if how["seconds"] == 0} == {"ours y"}
    assert seen["torch y"]["seconds"] == 10.0


def test_regret():
    row = bench.measure(PLAIN, setting(regret=True))
    regret = row.regret
    chosen = row.algorithms[row.our_best]
    assert regret.value == regret.seconds[chosen] / regret.seconds[regret.best] >= 1
    assert "times the best" in regret.left_out["loops"]
    assert not set(regret.seconds) & set(regret.left_out)
    assert "plain: regret" in bench.table([row])


def test_the_regret_is_of_what_might_have_been_chosen():
    """separable looks at values, and refuses most."""
    regret = bench.measure(DEPTHWISE, setting(regret=True)).regret
    assert "separable" not in {*regret.seconds, *regret.left_out}
    assert "depthwise" in regret.seconds


def test_what_makes_a_gradient_but_not_its_result_is_left_out():
    layer = Layer("tiny", "to 3 channels", ConvProblem.parse("n2 c3 o128 x16x16 k4x4 s2 p1"), transposed=True)
    given, of = calls.tensors(layer, torch.float32).to(calls.CHANNELS_LAST), "grad_input"
    told, expected = run._explained(layer, of, given), run._expected(layer, of, given)
    regret = run._regret(layer, setting(of, regret=True), [given], told, expected)
    assert "refuses grad_input" in regret.left_out["narrow"]  # the layer's own result, a gradient of its problem


def test_the_machine_is_measured_after_each_layer_and_the_best_counts(monkeypatch):
    speeds = iter([5e10, 2e11, 1e11])
    monkeypatch.setattr(
        device, "measured", lambda dtype, threads, direction, seconds: dataclasses.replace(PEAKS, flops=next(speeds))
    )
    seen = []
    long = dataclasses.replace(PLAIN, problem=ConvProblem.parse("n1 c8 o8 x60x60 k5x5"))
    rows, after = bench.measure_all([long, ROW, long], setting(), lambda done, name: seen.append((done, name)))
    assert seen == [(0, "tiny plain"), (1, "line row"), (2, "tiny plain"), (3, "done")]
    assert after.peaks == dataclasses.replace(PEAKS, flops=2e11)
    assert [row.speed for row in rows] == [0.25, 1.0, 0.5]
    assert rows[0].bound_by == rows[2].bound_by == "arithmetic"
    assert rows[0].limit_s == rows[2].limit_s == pytest.approx(long.flop / 2e11)
    text = bench.table(rows)
    assert "plain: the machine ran at 25%" in text
    assert "row: the machine" not in text


def test_what_was_tuned_or_compiled_before_does_not_count():
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # a record holds for the threads it was made with
    given = calls.tensors(PLAIN, torch.float32)
    request = calls.explain(PLAIN, calls.Direction.FORWARD, given).request
    measure.keep(request, {"fft": measure.Record(algorithm("fft").version, Timing(1e-9, 1e-9, 1e-9, 5))})
    try:
        forget()
        assert calls.explain(PLAIN, calls.Direction.FORWARD, given).chosen == "fft"
        kernel = compile.compile(compile._NOTHING)
        with bench.alone(2) as threads:
            assert torch.get_num_threads() == threads == 2
            assert calls.explain(PLAIN, calls.Direction.FORWARD, given).chosen != "fft"
            assert compile.compile(compile._NOTHING) is not kernel
        assert calls.explain(PLAIN, calls.Direction.FORWARD, given).chosen == "fft"
    finally:
        torch.set_num_threads(1)
    with bench.alone(2):
        pass
    assert torch.get_num_threads() == 1 == before


def algorithm(name):
    return next(algorithm for algorithm in ALGORITHMS if algorithm.name == name)


# -- records ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    layers = (PLAIN, dataclasses.replace(TRANSPOSED, name="up"), ROW)
    return [bench.measure(layer, setting(regret=True)) for layer in layers]


def with_ratio(row, name, ratio):
    """The row of another layer, whose ratio is known."""
    ours = {"contiguous": Timing(1.0, 1.0, 1.0, 5)}
    torchs = {"contiguous": Timing(ratio, ratio, ratio, 5), "channels_last": Timing(9.0, 9.0, 9.0, 5)}
    layer = dataclasses.replace(row.layer, name=name)
    return dataclasses.replace(row, layer=layer, ours=ours, torch=torchs, regret=None, limit_s=0.5)


def test_records_read_back(rows):
    told = json.loads(bench.as_json(bench.as_records(rows, setting())))
    assert bench.rows_of(told) == rows
    assert peaks_of(told) == PEAKS
    assert {"processor", "torch", "python", "plainconv"} <= set(told["machine"])
    assert (told["threads"], told["direction"], told["dtype"]) == (1, "forward", "float32")
    assert told["rows"][0]["ratio"] == rows[0].ratio
    assert told["made"].startswith("20")
    assert "100 GFLOP/s" in bench.heading(told)


def test_older_records_have_no_prepacked_times(rows):
    told = bench.as_records(rows, setting())
    older = [{name: value for name, value in record.items() if "packed" not in name} for record in told["rows"]]
    read = bench.rows_of(json.loads(bench.as_json({**told, "rows": older})))
    assert [row.packed for row in read] == [{}] * len(rows)
    assert [row.packed_ratio for row in read] == [None] * len(rows)
    assert bench.summary(read)[0].packed is None
    assert "prepacked geomean" not in sentence(bench.summary(read)[0])
    assert "prepacked geomean" in sentence(bench.summary(rows)[0])
    assert bench.table(read)


def test_a_wrong_prepacked_result_has_no_speed(monkeypatch):
    right = calls.prepacked

    def wrong(layer, given):
        fast = right(layer, given)
        fast.register_forward_hook(lambda module, given, y: y + 0.01)
        return fast

    monkeypatch.setattr(calls, "prepacked", wrong)
    row = bench.measure(PLAIN, setting())
    assert (row.right, row.ours, row.packed, row.packed_ratio) == (False, {}, {}, None)
    assert all(check.right for check in row.checks.values())
    assert "WRONG" in bench.table([row])


def test_a_suite_in_a_line(rows):
    some = [
        with_ratio(rows[0], name, ratio)
        for name, ratio in (("a", 4.0), ("b", 0.5), ("c", 0.25), ("d", 1.5), ("e", 4 / 3))
    ]
    (total,) = bench.summary(some)
    assert (total.suite, total.layers, total.worst, total.worst_layer) == ("tiny", 5, 0.25, "c")
    assert total.geomean == pytest.approx(1.0)
    assert [row.layer.name for row in total.losses] == ["c", "b"]
    assert total.share == pytest.approx(0.5)
    assert total.most == pytest.approx(2.0)
    assert total.regret is None
    assert sentence(total).startswith("tiny: geomean 1.00, worst 0.25 (c), 2 of 5 layers lost")
    assert [total.suite for total in bench.summary(rows)] == ["tiny", "line"]


def test_a_table_has_a_line_for_each_layer(rows):
    text = bench.table([*rows, with_ratio(rows[0], "known", 4.0)])
    (line,) = (line for line in text.splitlines() if line.startswith("  known"))
    assert line.split("k3x3")[1].split()[1:][:7] == ["4s", "c", "1s", "c", "4.00", "4.00", "-"]
    assert text.count(": geomean") == 2 == text.count("limit, which is geomean") == text.count("; prepacked geomean")
    assert ("* torch finishes" in text) == any(row.short for row in rows)
    assert text.isascii()


def test_numbers_in_few_letters():
    assert [seconds(value) for value in (1.5e-6, 2.5e-3, 3.0)] == ["1.5us", "2.5ms", "3s"]
    assert [size(value) for value in (0, 100, 1536, 3 << 20, 1 << 30)] == ["0", "100B", "1.5K", "3M", "1G"]
    assert geomean([]) is None
    assert geomean([2, 8]) == pytest.approx(4)


def test_the_picture_has_a_bar_for_every_layer(rows, tmp_path):
    some = [with_ratio(rows[0], str(i), 2.0 if i % 3 else 0.5) for i in range(100)]
    wrong = {"name": "red", "ratio": None, "most": 3.0}
    shown = {**bench.drawn(bench.as_records(some, setting())), "other": [wrong]}
    (tmp_path / "bars.png").write_bytes(plots.bars(shown, "a title"))
    with Image.open(tmp_path / "bars.png") as image:
        assert image.format == "PNG"
        pixels = image.convert("RGB").getcolors(1 << 24)
    colours = {f"#{r:02x}{g:02x}{b:02x}": count for count, (r, g, b) in pixels}
    assert colours[plots.OURS] > colours[plots.LOSS] > 1000, "wins and losses in their own colours"
