"""The command: what it writes, and its errors in one line with exit code 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from plainconv import measure
from plainconv.cli import app
from plainconv.plan import algorithms
from plainconv.version import __version__

ARRAY = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, with one picture in it, and with one thread."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(ARRAY).save("a.png")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*words):
    return CliRunner().invoke(app, words)


def refused(*words):
    """The one line that the command says before it exits with 2."""
    before = sorted(os.listdir())
    result = run(*words)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("plainconv: ")
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir()) == before
    return result.stderr


def process(program, **options):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, **options)


def test_version():
    assert run("--version").stdout.startswith(f"plainconv {__version__} (torch ")


def test_help_says_what_there_is():
    said = run("--help").stdout
    assert all(command in said for command in ("filter", "train", "compare", "algorithms", "explain"))


def test_filter_writes_a_picture_of_the_same_kind():
    result = run("filter", "a.png", "--kernel", "identity")
    assert result.exit_code == 0, result.output
    assert "a-identity.png: 20x24, 3 channels" in result.stdout
    with Image.open("a-identity.png") as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), ARRAY)


@pytest.mark.parametrize(
    "algorithm", ["auto", *(a for a in algorithms() if a not in ("pointwise", "separable", "builtin"))]
)
def test_every_algorithm_makes_the_same_picture(algorithm):
    result = run("filter", "a.png", "--kernel", "-2 -1 0; -1 1 1; 0 1 2", "--algorithm", algorithm, "--out", "b.png")
    assert result.exit_code == 0, result.output
    run("filter", "a.png", "--kernel", "emboss", "--out", "c.png")
    with Image.open("b.png") as typed, Image.open("c.png") as named:
        assert np.array_equal(np.asarray(typed), np.asarray(named))


def test_filter_without_a_picture_takes_the_sample():
    assert run("filter", "--kernel", "sobel", "--border", "zeros").exit_code == 0
    with Image.open("grace_hopper-sobel.jpg") as image:
        assert image.size == (512, 600)


def test_a_kernel_from_a_file():
    with open("mine.json", "w") as file:
        json.dump([[0, 0], [0, 1]], file)
    assert run("filter", "a.png", "--kernel", "mine.json").exit_code == 0
    assert os.path.exists("a-mine.png")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["filter", "none.png"], "none.png: No such file or directory"),
        (["filter", "."], "Is a directory"),
        (["filter", "a.png", "--kernel", "1 2; 3"], "not a rectangle"),
        (["filter", "a.png", "--kernel", "embos"], "named kernels are identity, emboss"),
        (["filter", "a.png", "--kernel", "none.json"], "none.json: No such file"),
        (["filter", "a.png", "--algorithm", "magic"], "'magic' does not exist; choose one of auto, loops, shift"),
        (["filter", "a.png", "--border", "mirror"], "borders are zeros, reflect"),
        (["filter", "a.png", "--device", "cuda:77"], "device 'cuda:77' is not there; this machine has cpu"),
        (["filter", "a.png", "--device", "toaster"], "device 'toaster' is not there"),
        (["filter", "a.png", "--device", "meta"], "device 'meta' is not there; this machine has cpu"),
        (["compare", "a.png", "--device", "meta"], "device 'meta' is not there; this machine has cpu"),
        (["filter", "a.png", "--out", "b.xyz"], "no picture format has the ending '.xyz'"),
        (["filter", "a.png", "--out", "none/b.png"], "none/b.png: No such file or directory"),
        (["train", "--dataset", "cifar"], "datasets are digits, mnist, fashion-mnist"),
        (["train", "--layer", "mine"], "layers are ours, torch, both"),
        (["train", "--algorithm", "magic"], "choose one of auto"),
        (["compare", "none.png"], "none.png: No such file"),
        (["compare", "a.png", "--dataset", "cifar"], "datasets are"),
        (["compare", "a.png", "--out", "a.png", "--epochs", "1"], "a.png: a.png is a file, not a folder"),
        (["compare", "a.png", "--out", "a.png/b/c", "--epochs", "1"], "a.png/b/c: a.png is a file, not a folder"),
        (["explain", "n1 c3"], "lacks"),
        (["explain", "n1 c3 o3 x2x2 k3x3"], "Kernel size can't be greater"),
        (["explain", "n1 c3 o3 x9x9 k3x3", "--direction", "up"], "directions are forward"),
    ],
)
def test_what_a_person_can_mend_is_one_line(words, why):
    assert why in refused(*words)


MISTYPED = [
    (["train", "--epochs", "0"], "Invalid value for '--epochs': "),
    (["train", "--epochs", "x"], "Invalid value for '--epochs': "),
    (["train", "--bogus"], "No such option: --bogus"),
    (["train", "--seed"], "--seed"),
    (["bogus"], "No such command 'bogus'"),
    (["filter", "a.png", "b.png"], "Got unexpected extra argument"),
    (["explain"], "Missing argument"),
    (["--bogus"], "No such option: --bogus"),
]


@pytest.mark.parametrize(("words", "why"), MISTYPED)
def test_what_does_not_parse_is_one_line(words, why):
    assert why in refused(*words)


def test_the_program_says_it_in_one_line_too():
    program = "import sys; from plainconv.__main__ import main; sys.argv = {!r}; main()"
    result = process(program.format(["plainconv", "train", "--epochs", "0"]))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("plainconv: Invalid value for '--epochs'")
    assert result.stderr.count("\n") == 1
    helped = process(program.format(["plainconv", "train", "--help"]))
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "--epochs" in helped.stdout
    alone = process(program.format(["plainconv"]))
    assert "explain" in alone.stdout + alone.stderr
    assert "plainconv: " not in alone.stderr


def test_stopped_by_a_person_is_one_line(monkeypatch):
    from plainconv import picture

    def stop(*args, **kwargs):
        raise typer.Abort

    monkeypatch.setattr(picture, "apply", stop)
    result = run("filter", "a.png")
    assert (result.exit_code, result.stderr) == (1, "plainconv: stopped\n")


def test_compare_with_a_kernel_that_the_picture_cannot_hold_is_one_line():
    Image.fromarray(ARRAY[:1, :1]).save("dot.png")
    assert refused("compare", "dot.png", "--epochs", "1", "--out", "deep/out") == (
        "plainconv: a picture of 1x1 pixels cannot hold a kernel of 3x3\n"
    )


@pytest.mark.parametrize(
    ("out", "why"), [("nodir/x.json", "nodir/x.json: there is no folder nodir"), (".", ".: not a regular file")]
)
def test_train_looks_at_its_target_before_it_trains(out, why, monkeypatch):
    from plainconv import train

    monkeypatch.setattr(train, "load", lambda *args: pytest.fail("too late"))
    assert why in refused("train", "--out", out)


def test_train_shows_its_table_even_if_the_records_cannot_be_written(monkeypatch):
    from plainconv import cli

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(cli, "write_whole", full)
    result = run("train", "--layer", "torch", "--epochs", "1", "--batch", "1437", "--out", "x.json")
    assert result.exit_code == 2
    assert "test accuracy" in result.stdout
    assert result.stderr.endswith("plainconv: x.json: No space left on device\n")


def test_a_broken_picture_is_one_line():
    with open("a.png", "r+b") as file:
        file.truncate(60)
    assert "a.png: not a picture that can be read" in refused("filter", "a.png")


def test_a_refusal_is_its_sentence(monkeypatch):
    from plainconv import AlgorithmRefused, picture

    def refuse(*args, **kwargs):
        raise AlgorithmRefused("shift refuses:\n it is tired")

    monkeypatch.setattr(picture, "apply", refuse)
    assert refused("filter", "a.png") == "plainconv: shift refuses: it is tired\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    from plainconv import picture

    monkeypatch.setattr(picture, "apply", lambda *args, **kwargs: 1 / 0)
    assert isinstance(run("filter", "a.png").exception, ZeroDivisionError)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_old_picture_and_nothing_else():
    Image.fromarray(ARRAY).save("b.png")
    old = Path("b.png").read_bytes()
    program = """if True:
        import resource, sys
        from plainconv.__main__ import main
        sys.argv = ["plainconv", "filter", "a.png", "--out", "b.png"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        main()"""
    result = process(program)
    assert result.returncode == 2, result.stderr
    assert result.stderr == "plainconv: b.png: File too large\n"
    assert Path("b.png").read_bytes() == old
    assert sorted(os.listdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("package", ["typer", "rich", "PIL", "numpy"])
def test_without_the_extra_it_says_what_to_install(package):
    program = f"import sys; sys.modules[{package!r}] = None; from plainconv.__main__ import main; main()"
    result = process(program)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        f'plainconv: the command needs {package}, which is not installed: pip install "plainconv[demo]"'
    )


@pytest.mark.parametrize(
    ("package", "words"), [("sklearn", ["train"]), ("matplotlib", ["filter"]), ("jinja2", ["compare", "a.png"])]
)
def test_what_is_needed_later_is_asked_for_in_the_same_words(package, words, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("plainconv.plots", "plainconv.report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert f'needs {package}, which is not installed: pip install "plainconv[demo]"' in refused(*words)


def test_train_tells_the_ends_and_keeps_the_records():
    result = run("train", "--epochs", "1", "--batch", "400", "--seed", "3", "--out", "runs.json")
    assert result.exit_code == 0, result.output
    assert "plainconv" in result.stdout
    assert "torch" in result.stdout
    with open("runs.json") as file:
        record = json.load(file)
    assert (record["dataset"], record["epochs"], record["batch"], record["seed"]) == ("digits", 1, 400, 3)
    assert [run[-1]["step"] for run in record["runs"].values()] == [4, 4]


def test_train_one_layer_with_one_algorithm():
    result = run("train", "--layer", "ours", "--algorithm", "shift", "--epochs", "1", "--batch", "1437")
    assert result.exit_code == 0, result.output
    assert "torch" not in result.stdout


def test_compare_writes_the_report():
    result = run("compare", "a.png", "--epochs", "1", "--batch", "400", "--seconds", "0", "--out", "deep/out")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == os.path.join("deep", "out", "report.html")
    assert sorted(os.listdir("deep/out")) == ["records.json", "report.html"]
    with open("deep/out/records.json") as file:
        records = json.load(file)
    assert records["filter"]["picture"] == "a.png"
    assert [row["name"] for row in records["filter"]["rows"]] == ["torch", "auto", *algorithms()]


def test_algorithms_and_explain():
    assert run("algorithms").stdout.split() == list(algorithms())
    said = run("explain", "n1 c3 o3 x600x512 k3x3").stdout
    assert all(name in said for name in algorithms())
    assert "chosen" in said


def test_tune(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    text = "n1 c2 o3 x8x9 k3x3 p1"
    with measure.kept_in(tmp_path / "records"):
        assert " -  " in run("explain", text).stdout
        said = run("tune", "--problem", text, "--threads", "1")
        assert said.exit_code == 0, said.output
        assert re.fullmatch(r"forward n1 c2 o3 x8x9 k3x3 p1x1 float32 cpu: \w+ [\d.]+ \wm?s(, not .*)?\n", said.stdout)
        assert len(os.listdir(tmp_path / "records")) == 1
        again = run("tune", "--problem", text, "--threads", "1").stdout
        assert again == said.stdout, "measured once"
        chosen = next(line for line in run("explain", text).stdout.splitlines() if "chosen" in line)
        assert chosen.split()[0] == said.stdout.split(": ")[1].split()[0]
        both = run("tune", "--suite", "seed_picture", "--problem", text, "--dtype", "float64", "--bias").stdout
        assert both.count("float64 cpu + bias: ") > 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--problem TEXT or --suite NAME says what to tune"),
        (["--problem", "n1"], "lacks c, o, x, k"),
        (["--suite", "none"], "unknown suite 'none'"),
        (["--problem", "n1 c1 o1 x3 k3", "--direction", "up"], "directions are forward"),
        (["--problem", "n1 c1 o1 x3 k3", "--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_tune_says_what_is_wrong(words, sentence):
    assert sentence in refused("tune", *words)
