"""Several processes that train one net together: torch's DistributedDataParallel, started by torchrun.

    torchrun --nproc-per-node 2 -m plainconv.train --dataset mnist

Each of p processes takes a share of every batch of n pictures, and torch makes each gradient the mean of theirs. So
that this is the gradient of the mean loss over the whole batch, also where shares differ in size, process r sums up

    L_r = p / n * sum of l_i over its share,       and  (L_0 + ... + L_(p-1)) / p = (l_1 + ... + l_n) / n.

One process alone is the same with p = 1, and needs no group.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plainconv.files import InputError


@dataclass(frozen=True)
class Team:
    """The processes that train together, as one of them sees them: which it is, counted from 0, and of how many."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Every `size`-th of a batch's elements; none, if there are fewer than processes."""
        return batch[self.rank :: self.size]

    def sum(self, value: float, device: torch.device) -> float:
        """The sum of what all processes give here."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.item()

    def wrap(self, net: nn.Module) -> nn.Module:
        """The net, with gradients that are the means of all processes."""
        return net if self.size == 1 else DistributedDataParallel(net)

    @contextmanager
    def lead_first(self) -> Iterator[None]:
        """The block is run by the process that leads, and then by all others at once."""
        if not self.leads:
            dist.barrier()
        yield
        if self.leads and self.size > 1:
            dist.barrier()


ALONE = Team()


def local_device(name: str) -> str:
    """The device of this process: where torchrun started several, "cuda" is another GPU for each.

    Raises:
        InputError: several processes, and one GPU for all of them.
    """
    local = os.environ.get("LOCAL_RANK")
    if local is None or not name.startswith("cuda"):
        return name
    if name != "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"device {name!r} is one GPU, and each process needs its own: say cuda")
    return f"cuda:{local}" if name == "cuda" else name


@contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """The team of the processes that torchrun started, on this device of this one; else a team of one."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
        # Wrapped nets refer to themselves, and to the group: until they are collected its threads go on, and one that
        # still lets a tensor go while Python ends aborts the process.
        gc.collect()
