"""Runs a function on two gloo processes, or alone in a new one."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two_processes(function: Callable[[int, int], Any], folder: Path) -> list[Any]:
    """What ``function(rank, world_size)`` gives on each process; it must stand at the top of a module."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(function, port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _worker(rank: int, function: Callable[[int, int], Any], port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(function(rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


def in_new_process(function: Callable[[Path], Any], folder: Path) -> Any:
    """What ``function(folder)`` gives in a process of its own; it must stand at the top of a module."""
    mp.spawn(_alone, args=(function, folder), nprocs=1)
    return torch.load(folder / "alone.pt", weights_only=True)


def _alone(_: int, function: Callable[[Path], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.save(function(folder), folder / "alone.pt")
