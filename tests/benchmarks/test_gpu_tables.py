"""The pages of GPUs are what their records say, each GPU and type by itself."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import measured
import pytest
import torch
from pretended import Pretended
from typer.testing import CliRunner

from plainconv import bench
from plainconv.bench import cuda
from plainconv.bench.peaks import Peaks
from plainconv.cli import app

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_tables.py"


@pytest.fixture(scope="module")
def tables():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("gpu_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def row(layer, ratio, last=1.0, called=0.5):
    """Ours takes 1 ms, 9 in channels_last, and the limit is half of that; torch's are so many times ours."""
    return measured.row(
        layer,
        torch={"contiguous": ratio * 1e-3, "channels_last": 9e-3 * last},
        ours={"contiguous": 1e-3, "channels_last": 9e-3},
        dtype="bfloat16",
        algorithms={"contiguous": "direct"},
        device="cuda",
        eager={"torch": measured.timing(called * 1e-3), "ours": measured.timing(1e-3)},
    )


def test_suites_that_most_is_asked_of_come_first(tables):
    order = tables.in_order()
    assert sorted(order) == sorted(bench.load())
    assert order.index("seed_mnist") < order.index("wavenet_k2") < order.index("hifigan_v1") < order.index("vgg19")


def leave(tables, results, gpu, suite, rows, precision="bfloat16"):
    peaks = Peaks(5e14, ((9, 1e-5), (1 << 30, 2.5e-4)), 1e-6)
    setting = bench.Setting("forward", torch.bfloat16, 1, peaks, device=cuda.Cuda(Pretended()))
    told = bench.as_records(rows, setting)
    told["machine"] |= {"gpu": gpu, "clock": "1755 MHz", "driver": "570.1"}
    path = tables.path_of(tables.folder_of(results, gpu), "forward", precision, suite)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(bench.as_json(told))
    return path


def test_two_gpus_never_share_a_table(tables, tmp_path):
    net = bench.load()["seed_mnist"]
    leave(tables, tmp_path, "NVIDIA H200", "seed_mnist", [row(net[0], 4.0), row(net[1], 1.0)])
    leave(tables, tmp_path, "NVIDIA A100-SXM4-80GB", "seed_mnist", [row(net[0], 3.0)])
    found = tables.read(tmp_path, "forward")
    assert list(found) == [("NVIDIA A100-SXM4-80GB", "bfloat16"), ("NVIDIA H200", "bfloat16")]
    text = tables.page("forward", found)
    first, second = text.split("## NVIDIA H200, bfloat16")
    assert "| seed_mnist | 1 | 3.00 | 2.00 ✓ | 3.00 |  | 1.00 |  | 3.00 (conv1) | 50% |  | memory 1 |" in first
    assert "| seed_mnist | 2 | 2.00 | 2.00 ✓ | 2.00 |  | 1.00 |  | 1.00 (conv2) | 50% |  | memory 2 |" in second
    assert "at 1755 MHz, driver 570.1" in second
    assert "500 TFLOP/s at the most, copies at 4295 GB/s" in second
    assert tables.read(tmp_path, "train") == {}


def test_what_is_asked_of_a_format_of_the_limit_and_of_calls(tables, tmp_path):
    dense = bench.load()["vgg19"][0]
    deep = next(layer for layer in bench.load()["mobilenet_v1_depthwise"] if layer.problem.groups > 1)
    tiny = bench.load()["tiny_call"][0]
    leave(tables, tmp_path, "one", "vgg19", [row(dense, 1.0, last=0.95)])
    large = dataclasses.replace(deep.problem, batch=10_000)
    leave(tables, tmp_path, "one", "mobilenet_v1_depthwise", [row(dataclasses.replace(deep, problem=large), 3.0)])
    leave(tables, tmp_path, "one", "tiny_call", [row(tiny, 0.8, called=0.3)])
    text = tables.page("forward", tables.read(tmp_path, "forward"))
    assert "| vgg19 | 1 | 1.00 |  | 1.00 | 1.10 | 0.95 | 0.90 ✓ |" in text
    assert "vgg19, contiguous, below what is asked: geomean 1.00 of 1.10." in text
    assert "| mobilenet_v1_depthwise: large depthwise layers | 1 | 3.00 |" in text
    assert f"| 3.00 ({deep.name}) | 50% | each 0.70 | memory 1 |" in text
    assert f"large depthwise layers, share of the limit, below what is asked: {deep.name} 0.50 of 0.70" in text
    assert "tiny_call, 1 of 1 lost" in text
    assert "| tiny_call | 1 | 300.0 | 1000.0 | 0.30 | each 0.33 | 0.30 (" in text
    assert "tiny_call, called from Python, below what is asked" in text


def test_only_what_is_missing_is_measured_and_only_while_there_is_time(tables, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        tables.subprocess, "run", lambda words, check: ran.append(words) or subprocess.CompletedProcess(words, 1)
    )
    leave(tables, tmp_path, "one", "a3c", [row(bench.load()["a3c"][0], 2.0)])
    asked = [("forward", "bfloat16", "a3c"), ("forward", "float32-tf32", "a3c"), ("train", "float32", "vgg19")]
    folder = tables.folder_of(tmp_path, "one")
    assert tables.measure(folder, "cuda:1", asked, False, "1", float("inf")) == 2
    assert ["--tf32" in words for words in ran] == [True, False]
    assert ["--exact" in words for words in ran] == [False, True]
    assert all(words[words.index("--device") + 1] == "cuda:1" for words in ran)
    ran.clear()
    assert tables.measure(folder, "cuda", asked, True, "1", 0.0) == 0
    assert ran == []


def test_records_of_the_command_make_a_page(tables, tmp_path, monkeypatch):
    def run(words, check):
        done = CliRunner().invoke(app, words[3:], catch_exceptions=False)
        return subprocess.CompletedProcess(words, done.exit_code)

    for name, value in {"LONG_S": 1e-4, "BUSY_S": 1e-4, "COPIES": (1 << 10, 1 << 12)}.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(cuda, "WIDE", dict.fromkeys(cuda.WIDE, 16))
    monkeypatch.setattr(cuda, "Gpu", lambda place: Pretended())
    monkeypatch.setattr("plainconv.cli._device", torch.device)
    monkeypatch.setattr(tables.subprocess, "run", run)
    monkeypatch.setattr(tables.torch.cuda, "get_device_name", lambda device: "none")
    words = ["--suite", "tiny_call", "--dtype", "float32", "--seconds", "0", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_tables.py", *words])
    assert tables.main() == 0
    (record,) = (tmp_path / "bench" / "none").glob("*.json")
    assert json.loads(record.read_text())["machine"]["gpu"] == "none"
    text = (tmp_path / "gpu_forward.md").read_text()
    assert "## none, float32\n" in text
    assert "Called from Python:" in text
    monkeypatch.setattr(sys, "argv", ["gpu_tables.py", "--check", "--results", str(tmp_path)])
    assert tables.main() == 0
    (tmp_path / "gpu_forward.md").write_text("something else")
    assert tables.main() == 1


def test_the_pages_are_what_the_records_say():
    assert subprocess.run([sys.executable, SCRIPT, "--check"], check=False).returncode == 0
