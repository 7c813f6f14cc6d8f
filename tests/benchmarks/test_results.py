"""What the project claims of itself, held to the records in results/."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "results"


def load(name):
    return json.loads((RESULTS / name).read_text())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mnist_ends_within_a_point_of_torch_and_above_93_percent(seed):
    record = load(f"mnist-seed-{seed}.json")
    assert (record["dataset"], record["epochs"], record["batch"], record["seed"]) == ("mnist", 5, 1000, seed)
    ours, theirs = (record["runs"][name][-1]["accuracy"] for name in ("plainconv", "torch"))
    assert abs(ours - theirs) < 0.01
    assert min(ours, theirs) > 0.93


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_epoch_of_mnist_takes_at_most_two_fifths_of_torchs_time(seed):
    runs = load(f"mnist-seed-{seed}.json")["runs"]
    ours, theirs = (runs[name][-1]["seconds"] for name in ("plainconv", "torch"))
    assert ours <= 0.4 * theirs


def test_digits_end_above_90_percent():
    training = load("compare.json")["training"]
    assert training["dataset"] == "digits"
    assert min(points[-1]["accuracy"] for points in training["runs"].values()) > 0.9


def test_shift_is_never_slower_than_the_seed():
    records = load("shift_against_seed.json")["records"]
    assert len(records) == 18
    assert min(record["ratio"] for record in records) >= 1


def test_a_swapped_or_optimized_resnet_is_within_1e_5_of_float64():
    nets = [of for name, of in load("models.json").items() if name.startswith("resnet50")]
    errors = {side: error for of in nets for side, error in of["errors"].items() if side.startswith(("swap", "opt"))}
    assert {"swap", "optimize"} <= set(errors)
    assert max(errors.values()) < 1e-5


def test_winograd_changes_the_loss_less_than_another_seed_does():
    curves = load("loss_curves.json")["curves"]
    assert [(curve["net"], len(curve["winograd"])) for curve in curves] == [("mnist", 18), ("resnet", 50)]
    for curve in curves:
        assert curve["algorithm_gap"] < curve["seed_gap"] / 10
        assert curve["winograd"][-1] < curve["winograd"][0] / 2
