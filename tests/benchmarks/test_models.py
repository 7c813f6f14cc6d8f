"""The table of whole models, of tiny ones: every side computes the same, and the page says what was measured."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import plainconv

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def models():
    spec = importlib.util.spec_from_file_location("models", ROOT / "benchmarks" / "models.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


class Block(nn.Module):
    """A residual of what optimize takes in, and of what it does not."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return F.softplus(self.last(F.relu(self.norm(self.conv(x)) + x)))


@pytest.fixture
def tiny(models, monkeypatch):
    """A network, and no time for g++."""

    def of_compile(given):
        raise models.Absent("not in a test")

    monkeypatch.setattr(models.sides, "of_compile", of_compile)
    monkeypatch.setattr(models, "TURN_S", 0.0)
    return models.Network(Block, (3, 12, 12), (2,), needs="torch")


def test_a_model_is_measured_and_its_page_written(models, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "NETWORKS", {"tiny": tiny, "other": models.Network(Block, (3, 4, 4), needs="no_such")})
    (tmp_path / "models.json").write_text(json.dumps({"tiny": {"why_not": "of yesterday"}}))
    models.main([], seconds=0.0, threads=torch.get_num_threads(), out=tmp_path)  # all in one thread, as tests are
    records = json.loads((tmp_path / "models.json").read_text())
    record = records["tiny"]
    assert {"torch", "torch channels_last", "swap", "swap channels_last", "optimize"} <= set(record["timings"])
    assert max(record["errors"].values()) < 1e-6, "of every side, against float64"
    assert max(record["gradients"].values()) < 1e-6
    assert record["absent"]["torch.compile"] == "not in a test"
    assert all(of["why_not"] == "no_such is not installed" for name, of in records.items() if name == "other")
    parts = record["parts"]
    assert 0 < parts["torch"]["seconds"] < parts["torch behind"]["seconds"]
    assert all(min(of.values()) > 0 for of in (*parts.values(), *record["training"]["parts"].values()))
    text = (tmp_path / "models.md").read_text()
    assert "| tiny | 2x3x12x12 |" in text
    assert "- tiny, torch.compile: not in a test" in text
    assert "- other: no_such is not installed" in text
    assert "not measured yet" not in text
    table = models.models_page.summary(records)
    assert "| tiny | " in table
    assert "other" not in table
    assert "- tiny: 2 prepacked" in text
    with pytest.raises(models.typer.Exit) as told:
        models.main([], check=True, out=tmp_path)
    assert told.value.exit_code == 0
    (tmp_path / "models.md").write_text("something else")
    with pytest.raises(models.typer.Exit) as told:
        models.main([], check=True, out=tmp_path)
    assert told.value.exit_code == 1


def test_other_runtimes_are_told_when_they_cannot_take_it(models, tiny):
    class Odd(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    with models.sides.given(Odd(), torch.ones(1, 2, 3)) as given:
        for _ in range(2):
            with pytest.raises(models.Absent, match=r"torch\.onnx\.export says \w+: Could not guard on data"):
                models.sides.of_onnxruntime(given)
        with pytest.raises(models.Absent, match="torch has no channels_last for it"):
            models.sides.of_torch(given, models.LAST)


def test_a_part_is_convolution_and_what_follows_it(models, monkeypatch):
    """By a clock that goes on by one at each look."""
    parts = sys.modules["parts"]
    monkeypatch.setattr(parts, "perf_counter", iter(range(1000)).__next__)
    block, x = Block().eval(), torch.randn(1, 3, 6, 6)
    for swapped in (False, True):
        if swapped:
            plainconv.swap(block)
        with torch.no_grad(), parts.Watch({"conv", "batch_norm", "add", "relu"}) as watch:
            block(x)
            F.relu(x + x)
        assert (watch.convolution, watch.behind) == (2, 3), "two convolutions; a norm, an addition, an activation"
        with parts.Watch({"batch_norm"}) as watch:
            block(x).sum().backward()
        assert (watch.convolution, watch.behind) == (4, 1), "and two backward; of the others what is named"
    fast = plainconv.optimize(block, x)
    calls = parts.Calls(fast)
    with torch.no_grad(), calls.watched():
        fast(x)
    fast(x)
    assert calls.seconds == 2


def test_what_misses_its_target(models):
    page = models.models_page

    def record(torch_s, swap_s, optimize_s, **parts):
        timing = {"torch": torch_s, "swap": swap_s, "optimize": optimize_s, "openvino": 0.02}
        timings = {name: {"median_s": seconds} for name, seconds in timing.items()}
        best = {"torch": "torch", "swap": "swap"}
        made = {"torch": 0.05, "torch behind": 0.08, "swap": 0.025, "optimize": 0.04} | parts
        parts = {name: {"seconds": seconds, "share": seconds / torch_s} for name, seconds in made.items()}
        training = {"timings": timings, "best": best, "parts": parts | {"swap": {"seconds": 0.0375}}}
        return {"timings": timings, "best": best, "parts": parts, "training": training}

    fine = record(0.1, 0.075, 0.06)
    assert page.part(fine, "swap") == pytest.approx((0.5, 2.0))
    assert page.part(fine, "optimize") == pytest.approx((0.8, 2.0))
    assert page.part(fine, "training") == pytest.approx((0.5, 4 / 3))
    assert page.misses({"segformer": fine}) == [
        "training: its part is 1.33 times as fast in the geometric mean, of 1.40",
    ]
    told = page.misses({"resnet50-1": record(0.1, 0.104, 0.07, swap=0.02)})
    assert "resnet50-1, swap: 0.96 of torch's speed, of 0.97" in told
    assert "resnet50-1, swap: 0.96 where its part promises 1.43" in told
    assert "resnet50-1, optimize: 1.43 of 1.80" in told
    assert "resnet50-1: OpenVINO takes 29% of optimize's time" in told


def test_a_record_without_training_and_one_that_is_missing(models):
    page = models.models_page
    records = json.loads((RESULTS / "models.json").read_text())
    record = {name: of for name, of in records["resnet50-1"].items() if name not in ("training", "gradients")}
    text = page.page({"resnet50-8": record}, ["resnet50-1", "resnet50-8"])
    assert "- resnet50-1: not measured yet" in text
    assert "- resnet50-8: not" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("| resnet50-8") and line.endswith("| - | - |"))
    assert line.count("e-") == 3


def test_the_summary_names_who_is_quicker(models):
    timing = {"torch": 0.1, "torch channels_last": 0.09, "swap": 0.091, "optimize": 0.05, "openvino": 0.04}
    record = {
        "timings": {name: {"median_s": seconds} for name, seconds in timing.items()},
        "best": {"torch": "torch channels_last", "swap": "swap"},
        "parts": {name: {"seconds": 0.05, "share": 0.5} for name in ("torch", "torch behind", "swap", "optimize")},
        "errors": dict.fromkeys(timing, 1e-06),
    }
    told = models.models_page.summary({"net": record, "other": {"why_not": "no"}})
    assert "| net | 90.0 | - | - | 40.0 | 91.0 | 50.0 | 50% / 50% | 1e-06 / 1e-06 / 1e-06 |" in told
    assert told.splitlines()[-3:] == [
        "",
        "- swap is slower than torch: net 0.99",
        "- optimize is slower than OpenVINO: net 0.80",
    ]


def test_the_network_of_volumes(models):
    networks = sys.modules["networks"]
    network = networks.Network(networks.UNet3d, (1, 8, 8, 8), needs="torch")
    net, x = network.module(channels=(4, 8), classes=3), network.input(2)
    with torch.no_grad():
        asked = net(x)
        assert asked.shape == (2, 3, 8, 8, 8)
        fast = plainconv.optimize(net, x)
        assert sum("batch_norm" in functions for functions, _ in fast.report.fused.values()) == 6
        torch.testing.assert_close(fast(x), asked, rtol=1e-4, atol=1e-5)


TINY = {  # options that make a small network of each configuration, and a shape that it takes
    "resnet50": ({"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}, (3, 32, 32)),
    "convnext_tiny": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, (3, 32, 32)),
    "mobilenet_v2": ({"depth_multiplier": 0.25}, (3, 64, 64)),
    "regnet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}, (3, 32, 32)),
    "segformer": (
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
        (3, 32, 32),
    ),
    "wav2vec2_base": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "conv_dim": [8, 8],
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        (800,),
    ),
    "encodec": (
        {"num_filters": 2, "hidden_size": 8, "codebook_dim": 8, "codebook_size": 16, "upsampling_ratios": [4, 2]},
        (1, 800),
    ),
    "hifigan": (
        {
            "model_in_dim": 8,
            "upsample_initial_channel": 8,
            "upsample_rates": [2, 2],
            "upsample_kernel_sizes": [4, 4],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
        },
        (10, 8),
    ),
}


def test_every_configuration_has_a_small_one(models):
    assert set(models.NETWORKS) == {*TINY, "unet3d"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_transformers_configurations(models, name):
    pytest.importorskip("transformers")
    options, shape = TINY[name]
    model = models.NETWORKS[name].module(**options)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    with models.sides.given(model, x) as given:
        with torch.no_grad():
            exact = given.laid(models.CONTIGUOUS)[0].double()(x.double())
            swapped, same = models.sides.swapped(given, models.CONTIGUOUS)
            for found in (swapped(same), models.sides.optimized(given)(x)):
                assert models._distance(found, exact) < 2e-5
        errors = models._gradient_errors(given)
        assert errors["swap"] < 1e-4 + 4 * errors["torch"]


@pytest.mark.skipif(not (RESULTS / "models.json").exists(), reason="make models was not called yet")
def test_the_page_is_what_the_records_say(models):
    page = models.models_page.page(json.loads((RESULTS / "models.json").read_text()), models._rows())
    assert (RESULTS / "models.md").read_text() == page, "run python benchmarks/models.py --write"
