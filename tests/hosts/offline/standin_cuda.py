"""Lets loops that insist on CUDA and NCCL run on gloo and the CPU; only where $VRPO_TEST_FAKE_CUDA is 1.

The host's script alone is told that there is a GPU: torch, accelerate and diffusers ask the same functions and would
then try to use one.
"""

import functools
import os
import sys
from types import ModuleType


class CpuDevices:
    """What the script sees as the number of GPUs: ``rank % count`` is the CPU."""

    def __rmod__(self, rank: int) -> object:
        import torch

        return torch.device("cpu")


def install(torch: ModuleType) -> None:
    import torch.distributed
    import torch.nn.parallel

    torch.cuda.is_available = _for_the_script(lambda: True, torch.cuda.is_available)
    torch.cuda.device_count = _for_the_script(CpuDevices, torch.cuda.device_count)
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    _gloo_for_nccl(torch.distributed)
    _cpu_modules(torch.nn.parallel.DistributedDataParallel)


def _for_the_script(ours, theirs):
    @functools.wraps(theirs)
    def answer():
        caller = sys._getframe(1).f_code.co_filename
        return ours() if os.path.basename(caller) == "train.py" else theirs()

    return answer


def _gloo_for_nccl(distributed: ModuleType) -> None:
    original = distributed.init_process_group

    @functools.wraps(original)
    def init_process_group(backend=None, *args, **kwargs):
        return original("gloo" if backend == "nccl" else backend, *args, **kwargs)

    distributed.init_process_group = init_process_group


def _cpu_modules(ddp: type) -> None:
    original = ddp.__init__

    @functools.wraps(original)
    def __init__(self, module, device_ids=None, *args, **kwargs):
        original(self, module, None, *args, **kwargs)

    ddp.__init__ = __init__
