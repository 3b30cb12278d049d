"""Which step a signal stops, and what becomes of the handlers."""

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

from vrpo_plugin.standalone.stopping import AGREE_SECONDS, SIGNALS, Agreement, StopSignals


class Processes:
    """Stands for an accelerator of two processes: the other one brings ``others``."""

    def __init__(self, others: torch.Tensor | None = None) -> None:
        self.num_processes = 1 if others is None else 2
        self.others = others

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "mean"
        return tensor if self.others is None else (tensor + self.others) / 2


def agreement(accelerator: Any, signals: StopSignals, **kwargs: Any) -> Agreement:
    return Agreement(accelerator, signals, **{"every": 50, **kwargs})


@pytest.mark.parametrize("number", SIGNALS)
def test_one_process_stops_after_the_step_of_the_signal(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopSignals() as signals:
        alone = agreement(Processes(), signals)
        alone.exchange(1, torch.zeros(1, 2), [0.001])
        assert not alone.due(7) and not alone.stop
        os.kill(os.getpid(), number)
        assert alone.due(7)
        alone.exchange(7, torch.zeros(6, 2), [0.001] * 6)
        assert alone.stop
    assert capfd.readouterr().err.count("the run ends after this step") == 1
    assert signals.exit_status == 128 + number
    signals._restore()
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_means_are_those_of_the_processes_and_one_signal_stops_both() -> None:
    values = torch.tensor([[1.0, float("nan")], [3.0, 4.0]])
    other = agreement(Processes(torch.tensor([3.0, 0.0, 1.0, 2.0, 1.0, 0.5])), StopSignals())
    means = other.exchange(2, values, [0.5, 0.5])
    torch.testing.assert_close(means, torch.tensor([[2.0, float("nan")], [2.0, 3.0]]), equal_nan=True)
    assert other.stop and other.signals.exit_status == 128 + signal.SIGTERM


@pytest.mark.parametrize(("seconds", "steps"), [(0.001, 50), (0.5, 10), (60.0, 1)])
def test_slow_steps_exchange_more_often(seconds: float, steps: int) -> None:
    two = agreement(Processes(torch.tensor([0.0, 0.0, seconds])), StopSignals(), step=100)
    assert two.due(101) and AGREE_SECONDS == 5
    two.exchange(100, torch.zeros(1, 1), [seconds])
    assert next(step for step in range(101, 151) if two.due(step)) == 100 + steps


def test_exchanges_meet_the_multiples() -> None:
    two = agreement(Processes(torch.tensor([0.0, 0.0, 0.001])), StopSignals(), step=117)
    two.exchange(118, torch.zeros(1, 1), [0.001])
    assert two.due(150) and not two.due(149)


def test_a_signal_that_came_too_late_does_what_it_did_before() -> None:
    seen: list[int] = []
    former = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with StopSignals(say=False) as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == []
        signals.release()
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, former)


LEAKED = """
import os, signal, torch
from torch.utils.data import DataLoader
from vrpo_plugin.standalone.stopping import WorkerSignals
loader = DataLoader(range(8), num_workers=2, worker_init_fn=WorkerSignals())
iterator = iter(loader)
kept = [next(iterator)]
os.kill(iterator._workers[0].pid, signal.SIGTERM)  # the other one gets the parent's alone
kept += [next(iterator) for _ in range(5)]
iterator.itself = iterator  # a cycle: nothing ends the workers before the process exits
print(len(kept), all(worker.is_alive() for worker in iterator._workers))
"""


def test_workers_outlive_a_signal_to_the_job_and_not_their_parent() -> None:
    result = subprocess.run([sys.executable, "-c", LEAKED], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "6 True\n"), result.stderr
