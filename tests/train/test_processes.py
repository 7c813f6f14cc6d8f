"""Training across processes: the same losses as one process with the whole batch, whatever the shares."""

import json
import os
import socket
import subprocess
import sys

import pytest
import together
import torch
import torch.distributed as dist

from plainconv.files import InputError
from plainconv.train.processes import ALONE, Team, joined, local_device


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes tell, each; they have torchrun's variables, and are started once."""
    file = tmp_path_factory.mktemp("two") / "told"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    how = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    how["XDG_CACHE_HOME"] = file.parent / "cache"  # not the user's
    how["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    started = []
    for rank in range(2):
        variables = {name: str(value) for name, value in (how | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command = [sys.executable, "-X", "faulthandler", together.__file__, str(file)]
        started.append(subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=150)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    return [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(2)]


def test_two_processes_have_the_losses_of_one(two):
    alone = together.raced(ALONE, dropout=0.0)
    for told in two:
        for name, points in alone.items():
            assert [loss for loss, _ in told["raced"][name]] == pytest.approx([loss for loss, _ in points], abs=1e-5)
            assert [share for _, share in told["raced"][name]] == [share for _, share in points]
    assert len({loss for loss, _ in alone["plainconv"]}) == 6


def test_each_process_drops_other_numbers(two):
    assert two[0]["dropped"] == two[1]["dropped"] != two[0]["raced"]["torch"]
    assert two[0]["drawn"] != two[1]["drawn"]


@pytest.mark.parametrize("way", ["ddp", "sharded"])
def test_a_swapped_model_trains_in_two_processes_as_in_one(two, way):
    alone = together.swapped(ALONE)
    for told in two:
        assert told[way] == pytest.approx(alone, abs=1e-5)
    assert alone[2] < alone[0]


def test_no_net_is_left_that_would_keep_the_group(two):
    assert [told["left"] for told in two] == [0, 0]


def test_the_leader_is_first(two):
    leader, other = (told["first"] for told in two)
    assert leader == []
    assert other == ["0"]


def test_shares_are_the_batch():
    batch = torch.arange(7)
    shares = [Team(rank, 3).share(batch) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 2, 2]
    assert sorted(torch.cat(shares).tolist()) == batch.tolist()
    assert torch.equal(ALONE.share(batch), batch)


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with joined(torch.device("cpu")) as team:
        assert team is ALONE
        assert not dist.is_initialized()
    assert local_device("cuda") == "cuda"


def test_each_process_has_its_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (local_device("cuda"), local_device("cpu")) == ("cuda:3", "cpu")
    with pytest.raises(InputError, match="device 'cuda:1' is one GPU, and each process needs its own: say cuda"):
        local_device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert local_device("cuda:1") == "cuda:1"


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_has_the_losses_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["--epochs", "1", "--batch", "401", "--dropout", "0", "--layer", "ours", "--out"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    runs = {}
    for name, launcher in {"one": ["-m"], "two": [*torchrun, "-m"]}.items():
        out = tmp_path / f"{name}.json"
        command = [sys.executable, *launcher, "plainconv.train", *words, str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("plainconv") == 1, "one process speaks"
        runs[name] = json.loads(out.read_text())
    assert [runs[name]["processes"] for name in runs] == [1, 2]
    one, two = ([point["loss"] for point in run["runs"]["plainconv"]] for run in runs.values())
    assert len(one) == 1
    assert two == pytest.approx(one, abs=1e-5)
