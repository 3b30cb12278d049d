"""The example trainer with a fault, as ``VRPO_FAULT=WHAT:STEP:RANK`` says; ``skip`` does nothing at that step."""

import os
import signal
from typing import Any

import torch
import train_repa_vrpo as example
from torch import Tensor

WHAT, _STEP, _RANK = os.environ["VRPO_FAULT"].split(":")
STEP, RANK = int(_STEP), int(_RANK)


class FaultyTrainer(example.Trainer):
    """Puts a NaN where it is told to, or sends itself signals (joined by +) in the middle of the step."""

    def _train_step(self, loader: Any) -> dict[str, Tensor]:
        if self.step != STEP:
            return super()._train_step(loader)
        if WHAT == "skip":
            next(loader)
            return {name: torch.tensor(float(name == "skipped")) for name in self.metrics.names}
        here = self.accelerator.process_index == RANK
        fault = self._signals if WHAT.startswith("SIG") else getattr(self, f"_{WHAT}")
        undo = fault() if here else lambda: None
        if WHAT == "latent" and here:
            batch = next(loader)
            batch["x0"][1, 0, 2, 3] = torch.nan
            loader = iter([batch])
        metrics = super()._train_step(loader)
        undo()
        return metrics

    def _latent(self) -> Any:
        return lambda: None

    def _target(self) -> Any:
        encode = self.encode

        def broken(images: Tensor) -> tuple[Tensor, ...]:
            z = encode(images)
            z[0][2, 1] = torch.inf
            return z

        self.encode = broken
        return lambda: setattr(self, "encode", encode)

    def _signals(self) -> Any:
        encode = self.encode

        def interrupted(images: Tensor) -> tuple[Tensor, ...]:
            for name in WHAT.split("+"):
                os.kill(os.getpid(), getattr(signal, name))
            return encode(images)

        self.encode = interrupted
        return lambda: setattr(self, "encode", encode)

    def _reward(self) -> Any:
        table = self.model.vrpo.generation.table
        pathwise = table.differentiable

        def broken(*args: Any) -> Tensor:
            values = pathwise(*args)
            return values * torch.where(torch.arange(values.shape[1]) == 1, torch.nan, 1.0)

        table.differentiable = broken
        return lambda: setattr(table, "differentiable", pathwise)

    def _gradient(self) -> Any:
        # After the processes have exchanged gradients: one of them is wrong on this one alone.
        clip, parameter = self.accelerator.clip_grad_norm_, next(iter(self.clip_groups[0]))

        def broken(*args: Any) -> Tensor:
            assert parameter.grad is not None
            parameter.grad.view(-1)[0] = torch.nan
            return clip(*args)

        self.accelerator.clip_grad_norm_ = broken
        return lambda: setattr(self.accelerator, "clip_grad_norm_", clip)


example.Trainer = FaultyTrainer

if __name__ == "__main__":
    example.main()
