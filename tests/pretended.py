"""A GPU for the benchmark where there is none: its graphs are only calls, and its clock is the one on the wall."""

import contextlib
import weakref

import torch

from plainconv.bench.scratch import torchs_peak
from plainconv.timing import wall


class Pretended:
    """What bench.cuda.Gpu is, on a CPU."""

    device = torch.device("cpu")

    def __init__(self):
        self.captured, self.clocked = 0, 0

    def held(self):
        return contextlib.nullcontext()

    def wait(self):
        pass

    def clear(self):
        pass

    def capture(self, fill):
        """As a graph, it keeps nothing of what it was captured from."""
        self.captured += 1
        kept = weakref.ref(fill)

        def replay():
            assert kept() is not None, "replayed on memory that was freed"
            kept()()

        return replay

    def elapsed(self, run):
        self.clocked += 1
        return wall(run)

    def cache(self):
        return 3000

    def free(self):
        return 1 << 30

    def peak(self, call):
        return torchs_peak(call)

    def told(self):
        return {"gpu": "none", "clock": "1 MHz", "driver": "1.2"}
