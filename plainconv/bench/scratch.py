"""How much memory a call of torch's takes for itself: what torch's own profiler sees of its allocator."""

from __future__ import annotations

from plainconv.bench.calls import Call

_MEMORY = "[memory]"


def torchs_peak(call: Call) -> int:
    """The most bytes that were allocated at once during a call, beyond the results that it returned.

    What oneDNN takes from the system by itself, past torch's allocator, is not seen.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == _MEMORY:
            held += event.nbytes()
            peak = max(peak, held)
    return max(peak - sum(tensor.nbytes for tensor in result), 0)
