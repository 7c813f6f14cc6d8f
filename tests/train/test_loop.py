"""The loop: the same weights, batches and dropout for every layer, and honest points."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from plainconv.files import InputError
from plainconv.nn import Conv2d
from plainconv.train import Data, Net, fit, layers, loop, race, steps
from plainconv.train.loop import accuracy


def made_up(count=50, tested=20):
    generator = torch.Generator().manual_seed(0)

    def pictures(n):
        y = torch.arange(n) % 10
        x = torch.randn(n, 1, 28, 28, generator=generator) * 0.1
        for i, label in enumerate(y.tolist()):  # a bright bar whose place says the class
            x[i, 0, :, 2 * label + 4 : 2 * label + 6] += 2
        return x, y

    return Data(*pictures(count), *pictures(tested))


DATA = made_up()


def test_the_net_has_the_shapes_of_the_idea():
    net = Net(torch.nn.Conv2d)
    assert [tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")] == [
        (3, 1, 3, 3),
        (3, 3, 3, 3),
        (6, 3, 3, 3),
        (6, 6, 3, 3),
        (30, 96),
        (10, 30),
    ]
    assert torch.allclose(net(DATA.x[:4]).exp().sum(1), torch.ones(4))


def test_layers():
    assert list(layers()) == ["plainconv", "torch"]
    assert list(layers("torch")) == ["torch"]
    assert list(layers("ours", "shift")) == ["plainconv"]
    made = layers("ours", "shift")["plainconv"](1, 3, 3)
    assert isinstance(made, Conv2d)
    assert made.algorithm == "shift"
    with pytest.raises(InputError, match="unknown layer 'mine'; layers are ours, torch, both"):
        layers("mine")


def test_points_come_every_few_steps_and_at_the_end():
    points = list(fit(Net(torch.nn.Conv2d), DATA, epochs=2, batch=15, every=3))
    assert steps(DATA, 2, 15) == 8
    assert [point.step for point in points] == [3, 6, 8]
    assert all(a.seconds < b.seconds for a, b in pairwise(points))
    assert all(0 <= point.accuracy <= 1 for point in points)


def test_each_epoch_sees_each_picture_once_in_another_order():
    batches = list(loop._batches(DATA, epochs=2, batch=15, seed=3))
    assert [len(batch) for batch in batches] == [15, 15, 15, 5] * 2
    first, second = torch.cat(batches[:4]), torch.cat(batches[4:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert not torch.equal(first, second)


def test_runs_in_turn_are_the_runs_alone():
    """Neither the turns nor the random numbers drawn in between touch weights, batches or dropout."""
    both = {"a": torch.nn.Conv2d, "b": torch.nn.Conv2d}
    together = race(both, DATA, epochs=3, batch=25, seed=5, every=1, watch=lambda name, point: torch.rand(7))
    alone = race({"a": torch.nn.Conv2d}, DATA, epochs=3, batch=25, seed=5, every=2)
    other = race({"a": torch.nn.Conv2d}, DATA, epochs=3, batch=25, seed=6, every=2)
    assert [p.loss for p in together["a"]] == [p.loss for p in together["b"]]
    assert together["a"][-1].loss == pytest.approx(2 * alone["a"][-1].loss - together["a"][-2].loss)
    assert other["a"][-1].loss != alone["a"][-1].loss


def test_our_layer_learns_what_torch_s_learns():
    points = race(layers(), DATA, epochs=4, batch=10, seed=1)
    for ours, torchs in zip(points["plainconv"], points["torch"], strict=True):
        assert ours.step == torchs.step
        assert ours.loss == pytest.approx(torchs.loss, rel=1e-3)
    assert points["plainconv"][0].loss == pytest.approx(points["torch"][0].loss, rel=1e-5)


def test_the_net_learns():
    end = race({"torch": torch.nn.Conv2d}, made_up(200), epochs=30, batch=20)["torch"][-1]
    assert end.accuracy > 0.8


def test_dropout_is_off_in_the_test_and_on_again_after_it():
    class Watched(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            return torch.zeros(len(x), 10)

    net = Watched()
    accuracy(net, DATA)
    assert net.training
    net.eval()
    accuracy(net, DATA)
    assert not net.training


def test_accuracy_is_the_share_that_is_right(monkeypatch):
    monkeypatch.setattr(loop, "TEST_BATCH", 7)  # 20 test pictures: 7, 7, 6

    class Always(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 4), 10).float()

    assert accuracy(Always(), DATA) == pytest.approx(0.1)


def test_tests_are_not_in_the_seconds(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(loop, "perf_counter", lambda: float(next(clock)))
    points = list(fit(Net(torch.nn.Conv2d), DATA, epochs=1, batch=10, every=2))
    assert [point.seconds for point in points] == [2.0, 4.0, 5.0]  # one tick a step, however many tests


def test_watch_sees_every_point():
    seen = []
    runs = race(
        {"a": torch.nn.Conv2d, "b": partial(torch.nn.Conv2d, bias=False)},
        DATA,
        epochs=1,
        batch=10,
        every=2,
        watch=lambda name, point: seen.append((name, point)),
    )
    assert [name for name, _ in seen] == ["a", "b"] * 3
    assert [point for name, point in seen if name == "b"] == runs["b"]
