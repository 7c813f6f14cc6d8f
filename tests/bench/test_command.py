"""`plainconv bench`: the table, the record and the picture it leaves, and its errors in one line."""

import json

import pytest
from typer.testing import CliRunner

from plainconv import bench
from plainconv.bench import device, peaks, suites
from plainconv.bench.suites import Layer
from plainconv.cli import app
from plainconv.problem import ConvProblem

TINY = {
    "tiny": (Layer("tiny", "one", ConvProblem.parse("n1 c2 o2 x6x5 k3x3")),),
    "line": (Layer("line", "row", ConvProblem.parse("n1 c2 o2 x9 k3")),),
}


@pytest.fixture(autouse=True)
def _tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suites, "load", lambda: TINY)
    monkeypatch.setattr(bench, "load", lambda: TINY)
    monkeypatch.setattr(device, "measured", lambda *_: peaks.Peaks(1e11, ((1, 1e-6), (9, 1e-5)), 1e-6))


def run(*words):
    return CliRunner().invoke(app, ["bench", *words], catch_exceptions=False)


def test_a_run_leaves_a_record_and_a_picture(tmp_path):
    result = run("--suite", "tiny", "line", "--seconds", "0", "--threads", "1", "--dtype", "float64")
    assert result.exit_code == 0, result.output
    assert "tiny: geomean" in result.stdout
    assert "line: geomean" in result.stdout
    record = json.loads((tmp_path / "results" / "forward-float64-tiny+line.json").read_text())
    assert [row["layer"]["name"] for row in record["rows"]] == ["one", "row"]
    assert record["threads"] == 1
    assert bench.rows_of(record)[0].layer == TINY["tiny"][0]
    assert (tmp_path / "results" / "forward-float64-tiny+line.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_and_another_folder(tmp_path):
    words = ("--suite", "line", "--seconds", "0", "--no-picture", "--out", "a/b", "--direction", "train")
    assert run(*words).exit_code == 0
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["train-float32-line.json"]


def test_the_list():
    first, second = run("--list").stdout.splitlines()
    assert first.split() == ["tiny", "1", "layers,", "8.64e-07", "GFLOP"]
    assert second.split() == ["line", "1", "layers,", "1.68e-07", "GFLOP"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--suite", "line", "--direction", "train", "--regret"), "--regret is of one choice"),
        ((), "--suite says which suites to measure"),
        (("--suite", "big"), "unknown suite 'big'"),
        (("--suite", "tiny", "--dtype", "int8"), "unknown dtype 'int8'; dtypes are float32, float64"),
        (("--suite", "tiny", "--direction", "back"), "unknown direction 'back'"),
        (("--suite", "tiny", "--against", "mkl"), "unknown library 'mkl'"),
        (("--suite", "tiny", "--device", "cuda:77"), "device 'cuda:77' is not there; this machine has cpu"),
        (("--suite", "tiny", "--exact"), "--tf32 and --exact say how a GPU multiplies"),
        (("--suite", "tiny", "--out", "file"), "file is a file, not a folder"),
    ],
)
def test_errors_are_one_line(words, sentence, tmp_path):
    (tmp_path / "file").touch()
    result = run(*words)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
