"""The tables under results/ are what the records say, and are made suite by suite."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import measured
import pytest
import torch

from plainconv import bench
from plainconv.bench.check import Verdict
from plainconv.bench.peaks import Peaks
from plainconv.bench.run import Regret
from plainconv.menu import fitted
from plainconv.timing import Timing

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "tables.py"
FINE = measured.FINE


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(layer, ratio, right=True, regret=1.1):
    regret = Regret(regret, "narrow", {"shift": regret * 1e-3, "narrow": 1e-3}, {})
    return measured.row(
        layer,
        torch={"contiguous": ratio * 1e-3},
        ours={"contiguous": 1e-3} if right else {},
        checks={"contiguous": dataclasses.replace(FINE, right=right)},
        regret=regret if right else None,
    )


def leave(folder, suite, rows, dtype="float32"):
    peaks = Peaks(2e11, ((1, 1e-6), (9, 1e-5)), 1e-6)
    records = bench.as_records(rows, bench.Setting("forward", getattr(torch, dtype), 2, peaks))
    (folder / "bench").mkdir(exist_ok=True)
    (folder / "bench" / f"forward-{dtype}-{suite}.json").write_text(bench.as_json(records))


def test_the_page(tables, tmp_path):
    picture, net = bench.load()["seed_picture"], bench.load()["seed_mnist"]
    leave(tmp_path, "seed_mnist", [row(net[0], 4.0), row(net[1], 1.0)])
    leave(tmp_path, "seed_picture", [row(picture[0], 0.02), row(picture[1], 0.5), row(picture[2], 1.0, right=False)])
    found = tables.read(tmp_path, "forward")
    assert list(found) == ["float32"]
    assert list(found["float32"]) == ["seed_picture", "seed_mnist"], "in the order of the suites"
    text = tables.page("forward", found)
    assert "| seed_mnist | 2 | 2.00 | 4.00 | 1.00 (conv2) | 4.00 | 50% | memory 2 | 1.10 | 1.10 |" in text
    assert "seed_mnist, below what is asked: geomean 2.00 of 4.00, conv2 1.00 of 2.00." in text
    assert "seed_picture, 2 of 3 lost: filter 3 to 3, full HD* 0.02, filter 3 to 3, 600x512 0.50." in text
    assert "seed_picture, WRONG: filter depthwise, full HD." in text
    assert "seed_mnist, 0" not in text
    assert "seed_mnist, WRONG" not in text
    assert "2 threads" in text
    assert "200 GFLOP/s" in text


def test_prepacked_has_a_column_where_it_was_measured(tables, tmp_path):
    net, quick = bench.load()["seed_mnist"], {"contiguous": Timing(5e-4, 5e-4, 5e-4, 5)}
    leave(tmp_path, "seed_mnist", [dataclasses.replace(row(net[0], 4.0), packed=quick)])
    text = tables.page("forward", tables.read(tmp_path, "forward"))
    assert "| suite | layers | geomean | asked | prepacked | worst |" in text
    assert "| seed_mnist | 1 | 4.00 | 4.00 ✓ | 8.00 | 4.00 (conv1) |" in text


def test_a_part_of_a_suite_has_a_line_and_what_is_asked_of_prepacked_a_column(tables, tmp_path):
    strided, square = (bench.load()["resnet50_v1.5_mlperf"][at] for at in (0, 3))
    quick = {"contiguous": Timing(5e-4, 5e-4, 5e-4, 5)}
    rows = [dataclasses.replace(row(layer, 1.3), packed=quick, limit_s=0.97e-3) for layer in (strided, square)]
    leave(tmp_path, "resnet50_v1.5_mlperf", rows)
    text = tables.page("forward", tables.read(tmp_path, "forward"))
    assert "| suite | layers | geomean | asked | prepacked | asked | worst |" in text
    assert "| resnet50_v1.5_mlperf | 2 | 1.30 | 1.01 (1.40) ✓ | 2.60 | 1.60 ✓ |" in text
    assert "| resnet50_v1.5_mlperf: 3x3 layers of stride 1 | 1 | 1.30 | 1.01 (2.20) ✓ | 2.60 | 2.50 ✓ |" in text
    assert (
        "Below the target, but not below 75% of the machine's limit: resnet50_v1.5_mlperf: geomean 1.30 of 1.40; "
        "resnet50_v1.5_mlperf: 3x3 layers of stride 1: geomean 1.30 of 2.20."
    ) in text
    assert "below what is asked" not in text


def test_regret_is_told_of_all_and_of_the_suites_that_were_held_out(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables.fitted, "model", lambda: fitted.Model(("seed_picture",), ("seed_mnist", "a3c"), {}))
    picture, net = bench.load()["seed_picture"], bench.load()["seed_mnist"]
    leave(tmp_path, "seed_picture", [row(picture[0], 2.0, regret=1.0), row(picture[1], 2.0, right=False)])
    leave(tmp_path, "seed_mnist", [row(net[0], 4.0, regret=1.0), row(net[1], 4.0, regret=1.69)])
    text = tables.page("forward", tables.read(tmp_path, "forward"))
    assert (
        "Regret of auto: 1.19 in 3 layers, 1.69 at the worst; in seed_mnist, which no estimate was fitted to: 1.30 in "
        "2 layers, 1.69 at the worst. More than 1.15, or 1.5 at the worst: seed_mnist 1.30, 1.69 at the worst."
    ) in text


def test_a_layer_is_marked_after_which_the_machine_was_slow(tables, tmp_path):
    net = bench.load()["seed_mnist"]
    leave(tmp_path, "seed_mnist", [dataclasses.replace(row(net[0], 0.5), speed=0.5), row(net[1], 0.9)])
    text = tables.page("forward", tables.read(tmp_path, "forward"))
    assert "seed_mnist, 2 of 2 lost: conv1† 0.50, conv2 0.90." in text


def test_only_what_is_missing_is_measured(tables, tmp_path, monkeypatch):
    leave(tmp_path, "densenet", [row(bench.load()["densenet"][0], 2.0)])
    ran = []

    def run(words, check):
        ran.append(words)
        return subprocess.CompletedProcess(words, 1 if "a3c" in words else 0)

    monkeypatch.setattr(tables.subprocess, "run", run)
    assert (
        tables.measure(tmp_path, "forward", ["float32", "float64"], ["densenet", "a3c"], False, ["--seconds", "1"]) == 2
    )
    asked = [(words[words.index("--dtype") + 1], words[words.index("--suite") + 1]) for words in ran]
    assert asked == [("float32", "a3c"), ("float64", "densenet"), ("float64", "a3c")]
    assert all(words[-2:] == ["--seconds", "1"] for words in ran)
    assert ["--regret" in words for words in ran] == [True, False, False]
    assert tables.measure(tmp_path, "grad_weight", ["float32"], ["densenet"], False, []) == 0
    assert ran[-1][ran[-1].index("--direction") + 1] == "grad_weight", "forward's record is not taken for it"
    assert "--regret" in ran[-1]
    ran.clear()
    tables.measure(tmp_path, "forward", ["float32"], ["densenet"], True, [])
    assert len(ran) == 1


def test_errors_of_what_is_transformed_stand_beside_torchs(tables, tmp_path):
    net = bench.load()["seed_mnist"]
    ours, packed = (Verdict(1e-6, units, 50.0, 100, True) for units in (12.0, 30.0))
    by_winograd = {"algorithms": {"contiguous": "winograd"}, "checks": {"contiguous": ours}}
    leave(tmp_path, "seed_mnist", [dataclasses.replace(row(net[0], 4.0), **by_winograd), row(net[1], 2.0)])
    found = {"forward": tables.read(tmp_path, "forward")}
    text = tables.errors(found)
    assert "1 layers: 12.0 times torch's error as a geomean, 12 times at the worst, and at most 24% of what" in text
    assert f"| seed_mnist | conv1 | {net[0].problem} | winograd | 12.00 | 1.00 | 50.00 |" in text
    assert "conv2" not in text
    by_fft = {"packed_algorithms": {"contiguous": "fft"}, "packed_checks": {"contiguous": packed}}
    leave(tmp_path, "seed_mnist", [dataclasses.replace(row(net[0], 4.0), **by_fft)])
    text = tables.errors({"forward": tables.read(tmp_path, "forward")})
    assert f"| seed_mnist | conv1 | {net[0].problem} | fft | 30.00 | 1.00 | 50.00 |" in text
    leave(tmp_path, "seed_mnist", [row(net[0], 4.0)])
    assert not tables.errors({"forward": tables.read(tmp_path, "forward")})


def test_it_writes_and_checks(tmp_path):
    def tables(*words):
        return subprocess.run([sys.executable, SCRIPT, "--results", tmp_path, *words], check=False).returncode

    leave(tmp_path, "seed_mnist", [row(bench.load()["seed_mnist"][0], 4.0)])
    assert tables("--check") == 1
    assert tables("--write") == 0
    assert tables("--check") == 0
    assert (tmp_path / "forward-float32.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "forward.md").write_text("something else")
    assert tables("--check") == 1
    by_winograd = dataclasses.replace(row(bench.load()["seed_mnist"][0], 4.0), algorithms={"contiguous": "winograd"})
    leave(tmp_path, "seed_mnist", [by_winograd])
    assert tables("--write") == 0
    assert tables("--check") == 0
    (tmp_path / "errors.md").unlink()
    assert tables("--check") == 1


def test_every_suite_is_told_what_bounds_it(tables):
    known = json.loads(tables.BOUNDS.read_text())
    assert set(known) == set(bench.load())
    for told in known.values():
        assert {"forward", "train"} <= set(told) <= set(tables.DIRECTIONS)
        assert all(told.values())


def test_the_tables_are_what_the_records_say():
    assert subprocess.run([sys.executable, SCRIPT, "--check"], check=False).returncode == 0, "run make bench"
