"""How much memory a call of torch's takes for itself: every allocation that torch's allocator reports meanwhile."""

from __future__ import annotations

from typing import Any

import torch

from plainconv.bench.calls import Call


def torchs_peak(call: Call) -> int:
    """The most bytes that were allocated at once during a call, beyond the results that it returned.

    What oneDNN takes from the system by itself, past torch's allocator, is not seen.
    """
    # The newer profiler would do as well, but it writes lines of its own on stderr.
    profiler: Any = torch.autograd
    settings = torch._C._profiler._ExperimentalConfig()
    wanted = profiler.ProfilerConfig(profiler.ProfilerState.CPU, False, True, False, False, False, settings)
    profiler._enable_profiler_legacy(wanted)
    try:
        result = call()
    finally:
        threads = profiler._disable_profiler_legacy()
    held = peak = 0
    for event in (event for events in threads for event in events):
        if event.kind() == "memory_alloc":
            held += event.cpu_memory_usage()
            peak = max(peak, held)
    return max(peak - sum(tensor.nbytes for tensor in result), 0)
