"""Step time and peak memory of REPA's own training step, patched against unpatched, in one run.

    python benchmarks/host_step.py --repa REPA                      # REPA: a checkout; on the CPU, SiT-S/2's sizes
    python benchmarks/host_step.py --repa REPA --device cuda --model SiT-XL/2 --batch-size 32 --precision bf16

The step is REPA@67f7145's: its model under accelerate's autocast, its SILoss, gradient clipping, AdamW and its EMA, on
random latents and encoder tokens (the VAE and the encoder are not run: the patch does not touch them). Blocks of steps
of all variants alternate, so that a slow moment of the machine hits them alike; ratios are taken within each repeat.
Memory is the peak of a process of its own per variant.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

# The settings of the patch; None runs the host as it is.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "REPA": None,
    "VRPO": {},
    "VRPO, features readout only": {"reward_coeff": 0.0},
}
SMALL = {"hidden_size": 384, "decoder_hidden_size": 384, "depth": 12, "num_heads": 6, "patch_size": 2}  # SiT-S/2


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repa", type=Path, required=True, help="a checkout of sihyun-yu/REPA")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="small", help="a name of REPA's; small has SiT-S/2's sizes")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--steps", type=int, default=4, help="of a block")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    return parser.parse_args()


class Trainer:
    """One model with its optimizer and EMA; the host is patched only while this one is made or steps."""

    def __init__(self, options: argparse.Namespace, settings: dict[str, Any] | None) -> None:
        from accelerate import Accelerator
        from loss import SILoss
        from models import sit
        from train import update_ema

        self.settings, self.update_ema = settings, update_ema
        accelerator = Accelerator(mixed_precision=options.precision, cpu=options.device == "cpu")
        self.device = accelerator.device
        torch.manual_seed(0)
        sizes = {"z_dims": [options.dim], "encoder_depth": 8, "use_cfg": True, "fused_attn": True, "qk_norm": False}
        make = sit.SiT if options.model == "small" else sit.SiT_models[options.model]
        with self.patched():
            model = make(input_size=32, **sizes, **(SMALL if options.model == "small" else {})).to(self.device)
            self.ema = copy.deepcopy(model).requires_grad_(False)
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
            self.model = accelerator.prepare_model(model)
        self.loss = SILoss(accelerator=accelerator)
        self.x = torch.randn(options.batch_size, 4, 32, 32, device=self.device)
        self.y = torch.randint(0, 1000, (options.batch_size,), device=self.device)
        self.z = torch.randn(options.batch_size, options.tokens, options.dim, device=self.device)

    def patched(self) -> Any:
        from vrpo_plugin import apply_vrpo_to_repa

        return nullcontext() if self.settings is None else apply_vrpo_to_repa(**self.settings)

    def run(self, steps: int) -> float:
        """Seconds per step."""
        with self.patched():
            self.wait()
            begin = time.perf_counter()
            for _ in range(steps):
                self.step()
            self.wait()
            return (time.perf_counter() - begin) / steps

    def step(self) -> None:
        denoising, projection = self.loss(self.model, self.x, {"y": self.y}, zs=[self.z])
        (denoising.mean() + 0.5 * projection.mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.update_ema(self.ema, self.model)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_times(options: argparse.Namespace) -> dict[str, list[float]]:
    trainers = {name: Trainer(options, settings) for name, settings in VARIANTS.items()}
    for trainer in trainers.values():
        trainer.run(2)  # allocations, kernel selection
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(options.repeats):
        for name, trainer in trainers.items():
            times[name].append(trainer.run(options.steps))
    return times


def peak_in_own_process(name: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    options = parse_options()
    sys.path.insert(0, str(options.repa.resolve()))
    if options.memory_of is not None:
        trainer = Trainer(options, VARIANTS[options.memory_of])
        trainer.run(3)
        print(json.dumps(trainer.peak_bytes()))
        return
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.model}, batch {options.batch_size}, precision {options.precision}, {options.tokens} tokens x "
        f"{options.dim}; torch {torch.__version__}, {where}; {options.repeats} x {options.steps} steps"
    )
    # First: on Linux a process starts with the peak of the one that started it.
    memory = {name: peak_in_own_process(name) for name in VARIANTS}
    times = measure_times(options)
    print(f"{'':28} {'s/step':>8} {'time ratio (min .. max)':>26} {'peak MiB':>9} {'memory ratio':>13}")
    for name, seconds in times.items():
        ratios = [mine / host for mine, host in zip(seconds, times["REPA"], strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})"
        row = f"{name:28} {statistics.median(seconds):8.4f} {spread:>26} {memory[name] / 2**20:9.0f}"
        print(f"{row} {memory[name] / memory['REPA']:13.3f}")


if __name__ == "__main__":
    main()
