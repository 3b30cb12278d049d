"""The plugin's share of a step by itself: the aligner forward and backward, down to the gradients of the transformer's
velocity and tokens. Kernels are counted by ``torch.profiler``; without a GPU, operator calls.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_stages.profiling import profile_kernels
from gpu_stages.stage import Stage, markdown
from gpu_stages.step import TOY
from gpu_stages.trainers import Size, variants, write_critic
from vrpo_plugin import VRPOAligner
from vrpo_plugin.standalone.sit import SIT_MODELS

STEPS = 5
TOLERANCE = 0.02  # of the loss, and of the gradients' norm, compiled against eager in bf16
NAMES = ("VRPO, frozen critic", "VRPO, online critic", "VRPO, features only")


def run(stage: Stage) -> str:
    """Every variant, eager and compiled."""
    size = TOY if stage.toy else Size("SiT-B/2", 64)
    unit = "kernels" if stage.cuda else "operator calls"
    if not stage.cuda:
        stage.skip("kernels", "needs CUDA; operator calls of the host are counted instead")
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        share = stage.attempt(name, lambda n=name: Share(stage, size, n))
        if share is None:
            continue
        for compiled in (False, True):
            title = f"{name}{', compiled' if compiled else ''}"
            if compiled and stage.left < (5 if stage.toy else 12):
                stage.skip(title, f"{stage.left:.0f} s left")
                continue
            measured = stage.attempt(title, lambda s=share, c=compiled: s.measure(c))
            if measured is not None:
                row = {"variant": title, "unit": unit, "measured": stage.stamp, **measured}
                rows.append(row)
                stage.keep(model=size.model, batch_size=size.batch_size, rows=rows)
                print(row["variant"], row["calls"], f"{row['milliseconds']:.2f} ms", flush=True)
    return table(rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Counts, then the longest kernels of each row."""
    if not rows:
        return ""
    text = counts(rows)
    for row in rows:
        longest = "; ".join(f"{k['milliseconds']:.3f} ms ({k['calls']:g}x) {k['name'][:90]}" for k in row["longest"])
        text += f"\n\n{row['variant']}, the longest: {longest}"
    return text


def counts(rows: Sequence[dict[str, Any]]) -> str:
    """One row per variant."""
    head = [
        "the plugin's share of a step",
        rows[0]["unit"],
        "their ms",
        "of the forward pass",
        "compiled against eager",
    ]
    cells = []
    for row in rows:
        numbers = [f"{row['calls']:g}", f"{row['milliseconds']:.2f}", f"{row['forward_calls']:g}"]
        cells.append([row["variant"], *numbers, _parity(row)])
    return markdown(head, cells)


def _parity(row: dict[str, Any]) -> str:
    if "loss_differs" not in row:
        return ""
    holds = max(row["loss_differs"], row["gradient_differs"]) <= TOLERANCE
    return f"loss {row['loss_differs']:.1e}, gradients {row['gradient_differs']:.1e}{'' if holds else ' **FAILS**'}"


class Share:
    """One aligner with the tensors that a transformer would give it."""

    def __init__(self, stage: Stage, size: Size, name: str) -> None:
        self.device, self.size, self.cuda = stage.device, size, stage.cuda
        critic = write_critic(stage.scratch / f"critic-{size.latent}-{size.dim}.safetensors", size)
        settings = variants(critic)[name].settings
        assert settings is not None  # of a variant with VRPO
        sizes = SIT_MODELS[size.model]
        torch.manual_seed(0)
        self.aligner = VRPOAligner(
            hidden_dim=sizes["hidden_size"],
            target_dims=(size.dim,),
            depth=sizes["depth"],
            latent_shape=size.latent,
            encoder_depth=sizes["encoder_depth"],
            **settings,
        ).to(self.device)
        batch = size.batch_size
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device, generator=generator)

        self.z = normal(batch, size.tokens, size.dim)
        self.x0, noise = normal(batch, *size.latent), normal(batch, *size.latent)
        self.t = torch.rand(batch, device=self.device, generator=generator)
        t = self.t[:, None, None, None]
        self.x_t = (1 - t) * self.x0 + t * noise
        self.velocity = (noise - self.x0 + 0.3 * normal(batch, *size.latent)).requires_grad_()
        self.hidden = normal(batch, size.tokens, sizes["hidden_size"]).requires_grad_()

    def measure(self, compiled: bool) -> dict[str, Any]:
        """Calls and time of a step; compiled also how far loss and gradients are from the eager ones."""
        aligner = copy.deepcopy(self.aligner)
        result: dict[str, Any] = {}
        if compiled:
            aligner.compile(backend="inductor" if self.cuda else "aot_eager")
            pairs = [self._gradients(copy.deepcopy(self.aligner)), self._gradients(aligner)]
            (loss, gradients), (other, others) = pairs
            result["loss_differs"] = abs(other - loss) / max(abs(loss), 1e-6)
            size = torch.stack([g.norm() for g in gradients]).norm()
            apart = torch.stack([(a - b).norm() for a, b in zip(gradients, others, strict=True)]).norm()
            result["gradient_differs"] = (apart / size).item()
        for _ in range(3):
            self._step(aligner)
        whole = profile_kernels(lambda: self._step(aligner), STEPS, cuda=self.cuda)
        forward = profile_kernels(lambda: self._loss(aligner), STEPS, cuda=self.cuda)
        return result | {
            "calls": whole["calls"],
            "milliseconds": whole["milliseconds"],
            "forward_calls": forward["calls"],
            "longest": whole["longest"],
        }

    def _loss(self, aligner: VRPOAligner) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.size.bf16):
            out = aligner(
                self.z, x0=self.x0, x_t=self.x_t, t=self.t, velocity=self.velocity, hidden=self.hidden, step=0
            )
        return out.loss

    def _step(self, aligner: VRPOAligner) -> None:
        for tensor in (self.velocity, self.hidden, *aligner.parameters()):
            tensor.grad = None
        self._loss(aligner).backward()

    def _gradients(self, aligner: VRPOAligner) -> tuple[float, list[Tensor]]:
        for tensor in (self.velocity, self.hidden, *aligner.parameters()):
            tensor.grad = None
        loss = self._loss(aligner)
        loss.backward()
        tensors = (self.velocity, self.hidden, *aligner.parameters())
        return loss.item(), [t.grad.float() for t in tensors if t.grad is not None]
