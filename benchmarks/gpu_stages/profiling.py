"""Counts kernels by ``torch.profiler``; without a GPU, the operators that would launch one there."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

LONGEST = 10
WITHOUT_KERNEL = (
    "detach",
    "alias",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "scalar_tensor",
    "lift_fresh",
    "_unsafe_view",
)


class Operators(TorchDispatchMode):
    """Counts operators and their time on the host, views and empty tensors left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.microseconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in WITHOUT_KERNEL:
            self.calls[str(func)] += 1
            self.microseconds[str(func)] += int(1e6 * (time.perf_counter() - started))
        return result


def profile_kernels(work: Callable[[], Any], times: int, *, cuda: bool) -> dict[str, Any]:
    """Per call of ``work``: how many kernels (without a GPU: operators), their time, and the longest by name."""
    calls: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    if cuda:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(times):
                work()
            torch.cuda.synchronize()
        for event in profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
                calls[event.name] += 1
                microseconds[event.name] += event.self_device_time_total
    else:
        with Operators() as operators:
            for _ in range(times):
                work()
        calls, microseconds = operators.calls, operators.microseconds
    longest = [
        {"name": name, "calls": calls[name] / times, "milliseconds": time / times / 1e3}
        for name, time in microseconds.most_common(LONGEST)
    ]
    return {"calls": calls.total() / times, "milliseconds": microseconds.total() / times / 1e3, "longest": longest}
