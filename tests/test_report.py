"""The report: stands alone, tells what was measured, and is written whole."""

import json
import re
from base64 import b64decode
from io import BytesIO

import pytest
import torch
from PIL import Image

from plainconv import plots, report
from plainconv.picture import Picture
from plainconv.report import render, write_report


def timing(seconds):
    return {"median_s": seconds, "low_s": seconds * 0.9, "high_s": seconds * 1.2, "calls": 9}


def row(name, seconds, **more):
    timed = timing(seconds) if seconds else None
    usual = {"layout": "contiguous", "both": None, "scale": 1.0, "largest_error": 1e-5, "refused": None}
    return {"name": name, "timing": timed, **usual, **more}


def run(pace):
    return [{"step": 10 * i, "seconds": pace * i, "loss": 2.0 / i, "accuracy": 1 - 0.5 / i} for i in range(1, 6)]


RECORDS = {
    "made": "2026-01-02T03:04:05+00:00",
    "machine": {"processor": "A <fast> one", "cores": 2, "threads": 2, "python": "3.11", "torch": "2.13.0"},
    "filter": {
        "channels": 3,
        "height": 40,
        "width": 30,
        "kernel": [[[1.0]]],
        "device": "cpu",
        "picture": "cat & dog.png",
        "kernel_name": "emboss",
        "rows": [
            row("torch", 0.002),
            row("auto", 0.003),
            row("shift", 0.003),
            row("fft", None, refused="it is too small"),
            row("loops", 12.0, scale=130.0, largest_error=0.0),
        ],
    },
    "training": {
        "dataset": "digits",
        "learnt_from": 1437,
        "tested_with": 360,
        "epochs": 4,
        "batch": 100,
        "seed": 0,
        "device": "cpu",
        "runs": {"plainconv": run(0.2), "torch": run(0.1)},
    },
}
GALLERY = {"original": Picture(torch.full((3, 40, 30), 99.0)), "edge": Picture(torch.zeros(3, 40, 30))}
MADE = {"torch": Picture(torch.zeros(1, 8, 6), peak=65535), "shift": Picture(torch.zeros(3, 38, 28))}


@pytest.fixture(scope="module")
def page():
    return render(RECORDS, GALLERY, MADE)


def test_the_page_stands_alone(page):
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == len(GALLERY) + len(MADE) + 3
    for source in sources:
        kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", source).groups()
        with Image.open(BytesIO(b64decode(content))) as image:
            assert image.format.lower() == kind
            image.load()
    assert "url(" not in page
    assert "<script" not in page


def test_the_page_tells_what_was_measured(page):
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    for said in (
        "A &lt;fast&gt; one",
        "cat &amp; dog.png",
        "2 ms",
        "1.50×",
        "it is too small",
        "12 s *",
        "6,000×",
        "* loops filtered a cut-out only; its time is scaled by 130",
        "1,437 pictures",
        "90.0%",
        "2.00×",
        "20 ms",
    ):
        assert said in text, said


def test_the_deep_picture_is_shown_in_its_own_levels():
    uri = report.picture_uri(Picture(torch.full((1, 8, 8), 32768.0), peak=65535))
    with Image.open(BytesIO(b64decode(uri.partition(",")[2]))) as image:
        assert image.getpixel((4, 4)) in (127, 128)


def test_page_and_records_are_written(tmp_path):
    path = write_report(tmp_path, RECORDS, GALLERY, MADE)
    assert path == tmp_path / "report.html"
    assert json.loads((tmp_path / "records.json").read_text()) == RECORDS
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "records.json"}


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.json, "dumps", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, RECORDS, GALLERY, MADE)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.html", "old")]


def test_the_sample_photograph_is_there():
    with Image.open(plots.sample_photograph()) as image:
        assert image.size == (512, 600)
