"""Ends a run on a signal: at the end of a step, with a checkpoint, and at the same step on every process.

SLURM sends SIGTERM, or what ``--signal`` says (SIGUSR1), some seconds before it kills; Ctrl-C sends SIGINT.
"""

import atexit
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
AGREE_SECONDS = 5.0  # how long a signal may wait for the step at which all processes look; torchrun kills after 30 s


class StopSignals:
    """While it is entered, a signal is remembered and the step goes on; a second SIGINT ends the process at once.

    After a signal it stays in place until the process ends, so that a launcher's own SIGTERM changes nothing.

    Args:
        say: whether this process says that it saw a signal.
    """

    def __init__(self, *, say: bool = True) -> None:
        self.received: signal.Signals | None = None
        self._say = say
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody install a handler
            self._former = {one: signal.signal(one, self._receive) for one in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.received is None or error is not None:
            self._restore()

    def release(self) -> None:
        """Signals do again what they did before; one that came too late to stop a step does it now."""
        self._restore()
        if self.received is not None:
            os.kill(os.getpid(), self.received)

    def _restore(self) -> None:
        for one, handler in self._former.items():
            signal.signal(one, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.received is None:
            self.received = signal.Signals(number)
            if self._say:  # not by print: it may have been interrupted in the middle of its own
                again = ", Ctrl-C again ends it at once" if number == signal.SIGINT else ""
                os.write(2, f"\n{self.name}: the run ends after this step, with a checkpoint{again}\n".encode())

    @property
    def name(self) -> str:
        """Of the signal; where another process had it, of SIGTERM."""
        return (self.received or signal.SIGTERM).name

    @property
    def exit_status(self) -> int:
        """As a shell gives it for a process that a signal has ended."""
        return 128 + (self.received or signal.SIGTERM)

    def message(self, step: int) -> str:
        """The last line of a run that was stopped."""
        return f"stopped by {self.name} after step {step}, with a checkpoint; resume with --resume"


class Agreement:
    """Whether to stop, as all processes agree: asked where they exchange numbers anyway, never on the hot path.

    One process alone knows it after every step. Several cannot tell without waiting for each other, so they tell
    each other whenever they gather their metrics, and gather every few steps: so many that it takes about
    ``AGREE_SECONDS``, by the mean time of a step, which is the same number on every process.

    Args:
        accelerator: of the run.
        signals: what this process received.
        every: at most so many steps apart, and at all multiples of it.
        step: first step of the run, or that of its checkpoint.
    """

    def __init__(self, accelerator: "Accelerator", signals: StopSignals, *, every: int, step: int = 0) -> None:
        self.accelerator, self.signals, self.every = accelerator, signals, every
        self.stop = False
        self._next = step + 1

    def due(self, step: int) -> bool:
        """Whether all processes exchange at this step."""
        alone = self.accelerator.num_processes == 1
        return step >= self._next or (alone and self.signals.received is not None)

    def exchange(self, step: int, values: Tensor, seconds: list[float]) -> Tensor:
        """The mean over all processes of what each one brings, which settles ``stop`` and the next exchange too.

        Args:
            step: that was just made.
            values: (R, K), a row for each step since the last exchange, R > 0.
            seconds: of these steps.

        Returns:
            (R, K) on the CPU.
        """
        own = torch.tensor([float(self.signals.received is not None), sum(seconds) / len(seconds)])
        packed = torch.cat([values.flatten(), own.to(values)])
        *means, stop, pace = self.accelerator.reduce(packed, reduction="mean").tolist()
        self.stop = self.stop or stop > 0
        steps = int(min(self.every, max(1.0, AGREE_SECONDS / max(pace, 1e-9))))
        self._next = min(step + steps, (step // self.every + 1) * self.every)
        return torch.tensor(means, dtype=values.dtype).view(values.shape)


class WorkerSignals:
    """``worker_init_fn`` of a DataLoader: a signal to the whole job must not end its workers before the last step.

    torch's own handler would end them, and the training process with an error. When this process exits, its SIGTERM
    ends them as ever: a worker cannot see who sent one, so it looks whether this process is on its way out.
    """

    def __init__(self) -> None:
        self._leaving = torch.zeros(1, dtype=torch.uint8).share_memory_()
        atexit.register(self._leaving.fill_, 1)  # runs before multiprocessing's own, which was registered earlier

    def __call__(self, worker_id: int) -> None:
        """Runs in the worker."""
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._leaving.any():
            os._exit(0)
