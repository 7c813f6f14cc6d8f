"""What each of several processes does in test_processes.py: python together.py FILE, with torchrun's variables set."""

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import plainconv
from plainconv.train import Data, Team, joined, layers, race

HOW = {"epochs": 2, "batch": 25, "every": 1}  # 25, 25 and 1 picture: shares of 13 and 12, and of 1 and none


def made_up(count=51, tested=21):
    generator = torch.Generator().manual_seed(0)

    def pictures(n):
        return torch.randn(n, 1, 28, 28, generator=generator), torch.arange(n) % 10

    return Data(*pictures(count), *pictures(tested))


def raced(team, **how):
    """Loss and accuracy of every step, with plainconv's layer and with torch's."""
    runs = race(layers(), made_up(), **HOW, **how, team=team)
    return {name: [(point.loss, point.accuracy) for point in points] for name, points in runs.items()}


def swapped(team, sharded=False):
    """The losses of a swapped model."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(6, 3, 8, 8, generator=generator), torch.randn(6, 2, generator=generator)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(180, 2))
    plainconv.swap(model)
    if team.size > 1 and sharded:
        mesh = dist.device_mesh.init_device_mesh("cpu", (team.size,))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    elif team.size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(team.share(x)), team.share(y))
        loss.backward()
        optimizer.step()
        losses.append(team.sum(loss.item(), x.device) / team.size)
    return losses


def first(team: Team, folder: Path) -> list[str]:
    """What is in a folder when it is this process' turn; then it leaves a file there."""
    with team.lead_first():
        there = sorted(path.name for path in folder.iterdir())
        (folder / str(team.rank)).touch()
    return there


def main(file: Path) -> None:
    torch.set_num_threads(1)
    gc.disable()  # only who asks for it collects
    folder = file.parent / "turns"
    folder.mkdir(exist_ok=True)
    with joined(torch.device("cpu")) as team:
        told = {
            "raced": raced(team, dropout=0.0),
            "dropped": raced(team)["torch"],
            "drawn": torch.rand(1).item(),  # what the generator of dropout gives next
            "ddp": swapped(team),
            "sharded": swapped(team, sharded=True),
            "first": first(team, folder),
        }
    told["left"] = sum(isinstance(net, nn.parallel.DistributedDataParallel) for net in gc.get_objects())
    file.with_suffix(f".{team.rank}").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # A device mesh keeps its group, and so gloo's threads, beyond destroy_process_group (torch 2.13): one that still
    # lets a tensor go while Python ends aborts the process.
    os._exit(0)
