"""Thresholds: which layers they pick, and when the machine's limit counts instead."""

import dataclasses

import measured
import pytest

from plainconv import bench
from plainconv.bench.thresholds import THRESHOLDS, held
from plainconv.timing import Timing

RIGHT = {"contiguous": measured.FINE}


def row(layer, torch_s, our_s, limit_s):
    return measured.row(layer, torch={"contiguous": torch_s}, ours={"contiguous": our_s}, limit_s=limit_s)


NET = bench.load()["seed_mnist"]  # held to 4, and 2 for the worst


def test_good_is_both_the_mean_and_each_layer():
    (one,) = held("forward", "float32", "seed_mnist", [row(NET[0], 4e-3, 1e-3, 1e-5), row(NET[1], 4e-3, 1e-3, 1e-5)])
    assert (one.good, one.geomean.asked, one.missed) == (True, 4, [])
    rows = [row(NET[0], 19e-3, 1e-3, 1e-5), row(NET[1], 1.9e-3, 1e-3, 1e-5)]
    (one,) = held("forward", "float32", "seed_mnist", rows)
    assert one.geomean.value == pytest.approx(19 / 10**0.5)
    assert not one.good
    assert [(missed.layer.name, found.asked) for missed, found in one.missed] == [(NET[1].name, 2)]
    (one,) = held("forward", "float32", "seed_mnist", [row(NET[0], 3.9e-3, 1e-3, 1e-5)])
    assert not one.good
    assert not one.missed


def test_the_machines_limit_counts_where_it_is_lower():
    (one,) = held("forward", "float32", "seed_mnist", [row(NET[0], 1.48e-3, 1e-3, 0.8e-3)])
    assert one.geomean.asked == pytest.approx(0.75 * 1.85)
    assert (one.good, one.geomean.spared) == (True, True)
    assert str(one.geomean) == "1.48 of 1.39 (4.00 but for the limit)"
    assert [str(found) for _, found in one.spared] == ["1.48 of 1.39 (2.00 but for the limit)"]
    (one,) = held("forward", "float32", "seed_mnist", [row(NET[0], 1.33e-3, 1e-3, 0.7e-3)])
    assert not one.good
    assert one.missed[0][1].asked == pytest.approx(0.75 * 1.9)
    assert (one.geomean.spared, one.spared) == (False, [])
    (one,) = held("forward", "float32", "seed_mnist", [row(NET[0], 3.9e-3, 1e-3, 0.9e-3)])
    assert one.geomean.asked == 4, "the limit is above it"
    (one,) = held("forward", "float32", "seed_mnist", [row(NET[0], 2.5e-3, 1e-3, 1.3e-3)])
    assert (one.good, one.geomean.asked) == (False, 4), "what passes the limit is held to the target"
    (one,) = held("forward", "float32", "seed_mnist", [row(NET[0], 4.1e-3, 1e-3, 2e-3)])
    assert (one.good, one.geomean.asked, one.geomean.spared) == (True, 4, False), "it is met beyond the limit"


def test_a_short_call_is_held_to_half():
    (one,) = held("forward", "float32", "seed_mnist", [row(NET[0], 20e-6, 38e-6, 1e-6)])
    assert not one.missed
    (one,) = held("forward", "float32", "seed_mnist", [row(NET[0], 20e-6, 42e-6, 1e-6)])
    assert one.missed[0][1].asked == 0.5


def test_some_thresholds_pick_layers():
    layers = bench.load()["hifigan_v1"]
    rows = [row(layer, 3e-3 if layer.transposed else 1.5e-3, 1e-3, 1e-5) for layer in layers]
    plain, transposed = held("forward", "float32", "hifigan_v1", rows)
    assert (plain.geomean.value, transposed.geomean.value) == (pytest.approx(1.5), pytest.approx(3))
    (train,) = held("train", "float32", "hifigan_v1", rows)
    assert train.geomean.value == pytest.approx(3)


def test_square_layers_of_stride_1_are_held_to_more_and_so_are_prepacked_ones():
    def packed(layer):
        square = layer.problem.kernel == (3, 3) and layer.problem.stride == (1, 1)
        quick = {"contiguous": Timing(4e-4, 4e-4, 4e-4, 5)}
        return dataclasses.replace(row(layer, 2.1e-3 if square else 1e-3, 1e-3, 1e-5), packed=quick)

    rows = [packed(layer) for layer in bench.load()["resnet50_v1.5_mlperf"]]
    verdicts = held("forward", "float32", "resnet50_v1.5_mlperf", rows)
    asked = {(one.threshold.of, one.threshold.by): one.geomean.asked for one in verdicts}
    square = "3x3 layers of stride 1"
    assert asked == {
        ("layers", "ratio"): 1.4,
        ("layers", "prepacked"): 1.6,
        (square, "ratio"): 2.2,
        (square, "prepacked"): 2.5,
    }
    assert [len(one.layers) for one in verdicts if one.threshold.of == square] == [4, 4]
    values = [one.geomean.value for one in verdicts if one.threshold.of == square]
    assert values == [pytest.approx(2.1), pytest.approx(5.25)]
    train = held("train", "float32", "resnet50_v1.5_mlperf", rows)
    assert [one.geomean.asked for one in train] == [1.2, 1.7]


def test_without_prepacked_times_nothing_is_said_of_them():
    told = held("forward", "float32", "densenet", [row(bench.load()["densenet"][0], 2e-3, 1e-3, 1e-5)])
    assert [one.threshold.by for one in told] == ["ratio"]


def test_wrong_layers_have_no_verdict():
    wrong = {"contiguous": dataclasses.replace(RIGHT["contiguous"], right=False)}
    assert held("forward", "float32", "seed_mnist", [dataclasses.replace(row(NET[0], 1, 1, 1), checks=wrong)]) == []


def test_the_suites_exist():
    asked = {suite for device in THRESHOLDS.values() for each in device.values() for _, suite in each}
    assert asked <= set(bench.load())


def test_what_is_asked_of_a_gpu_alone():
    def on_gpu(layer, torch_s, our_s, limit_s, **more):
        return dataclasses.replace(row(layer, torch_s, our_s, limit_s), device="cuda", **more)

    def timing(contiguous, last):
        each = {"contiguous": contiguous, "channels_last": last}
        return {layout: Timing(seconds, seconds, seconds, 5) for layout, seconds in each.items()}

    dense = bench.load()["vgg_a"][0]
    given = on_gpu(dense, 1, 1, 1e-9, torch=timing(2.2, 0.8), ours=timing(2, 1), dtype="bfloat16")
    contiguous, last = held("forward", "bfloat16", "vgg_a", [given], "cuda")
    assert (contiguous.geomean.value, contiguous.good) == (pytest.approx(1.1), True)
    assert (last.geomean.value, last.good) == (pytest.approx(0.8), False)
    assert held("forward", "float32", "vgg_a", [given], "cuda") == []

    layer = bench.load()["convnext"][0]
    large = dataclasses.replace(layer.problem, batch=4096, groups=layer.problem.in_channels)
    layer = dataclasses.replace(layer, problem=large)
    ratio, share = held("forward", "float32", "convnext", [on_gpu(layer, 4, 1, 0.69)], "cuda")
    assert ratio.good
    assert not share.good
    assert [found.asked for _, found in share.missed] == [0.7]
    small = dataclasses.replace(layer, problem=dataclasses.replace(large, batch=1))
    assert len(held("forward", "float32", "convnext", [on_gpu(small, 4, 1, 0.69)], "cuda")) == 1

    tiny = bench.load()["tiny_call"][0]
    eager = {"torch": Timing(1e-6, 1e-6, 1e-6, 5), "ours": Timing(3.1e-6, 3.1e-6, 3.1e-6, 5)}
    (one,) = held("forward", "float32", "tiny_call", [on_gpu(tiny, 1, 1, 1, eager=eager)], "cuda")
    assert not one.good
    assert one.geomean.value == pytest.approx(1 / 3.1)


def test_a_table_says_what_is_asked():
    text = bench.table([row(NET[0], 3.9e-3, 1e-3, 1e-5)])
    assert "layers, ratio: 3.90 of 4.00 asked\n" in text + "\n"
    text = bench.table([row(NET[0], 1.9e-3, 1e-3, 1e-3)])
    assert "layers, ratio: 1.90 of 1.42 (4.00 but for the limit) asked" in text
