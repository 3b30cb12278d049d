"""Counts kernels by ``torch.profiler``."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LONGEST = 10


def profile_kernels(work: Callable[[], Any], times: int, *, cuda: bool) -> dict[str, Any]:
    """Per call of ``work``: how many kernels (without a GPU: operators), their time, and the longest by name."""
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            work()
        if cuda:
            torch.cuda.synchronize()
    calls: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    for event in profiler.events():
        if event.device_type == kind and not event.is_user_annotation:
            calls[event.name] += 1
            microseconds[event.name] += event.self_device_time_total if cuda else event.self_cpu_time_total
    longest = [
        {"name": name, "calls": calls[name] / times, "milliseconds": time / times / 1e3}
        for name, time in microseconds.most_common(LONGEST)
    ]
    return {"calls": calls.total() / times, "milliseconds": microseconds.total() / times / 1e3, "longest": longest}
