"""The example's trainer on the stage's data, for stages that look at single steps."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_stages.data import unpack
from gpu_stages.stage import Stage

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from train_options import parse_options  # noqa: E402
from train_parts import build_loader  # noqa: E402
from train_repa_vrpo import Trainer  # noqa: E402

from vrpo_plugin.standalone.run_folder import MetricBuffer  # noqa: E402
from vrpo_plugin.standalone.small_training import train_small_features  # noqa: E402
from vrpo_plugin.standalone.sources import all_images, open_source  # noqa: E402
from vrpo_plugin.standalone.stopping import Agreement  # noqa: E402


def example_arguments(stage: Stage, name: str, **options: Any) -> list[str]:
    """The command line of a run: SiT-S/2 on 32 px images, or a tiny one on 16 px."""
    recipe = "cifar16" if stage.toy else "cifar32"
    resolution = 16 if stage.toy else 32
    chosen: dict[str, Any] = {
        "data_dir": unpack(stage.data, resolution, stage.scratch / f"data{resolution}", limit=10_000) / "train.npz",
        "resolution": resolution,
        "model": "SiT-Ti/2" if stage.toy else "SiT-S/2",
        "batch_size": 8 if stage.toy else 64,
        "num_workers": 0,
        "enc_type": "small",
        "critic_width": 32 if stage.toy else 64,
        "projector_dim": 256,
        "learning_rate": 1e-3,
        "sampling_steps": 0,
        "eval_samples": 0,
        "flush_steps": 100_000,
        "output_dir": stage.scratch / "runs",
        "exp_name": name,
    }
    chosen["enc_checkpoint"] = _encoder(stage, recipe, chosen["data_dir"], resolution)
    shutil.rmtree(stage.scratch / "runs" / name, ignore_errors=True)
    words = []
    for key, value in (chosen | options).items():
        flag = key.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def _encoder(stage: Stage, recipe: str, data: Path, resolution: int) -> Path:
    """The recipe's encoder, or one that is trained once, and not by each run."""
    prepared = stage.networks / recipe / "encoder.safetensors" if stage.networks else None
    if prepared is not None and prepared.exists():
        return prepared
    made = stage.scratch / f"encoder{resolution}.safetensors"
    if not made.exists():
        images, labels = all_images(open_source(data, resolution), 2000)
        train_small_features(images, labels, seed=0, steps=20 if stage.toy else 200, device=stage.device).save(made)
    return made


class SteppedTrainer(Trainer):
    """The example's trainer, one step at a time."""

    def batches(self) -> Iterator[Any]:
        """What ``train`` would iterate over."""
        self.agreement = Agreement(self.accelerator, self.signals, every=self.options.flush_steps, step=self.step)
        self.metrics = MetricBuffer(self.agreement)
        self.step_module.train()
        return iter(build_loader(self.options, self.config, self.source, self.accelerator, self.step))

    def advance(self, loader: Iterator[Any]) -> dict[str, Tensor]:
        """One step with its metrics, as in ``train``."""
        metrics = self._train_step(loader)
        self.step += 1
        self.metrics.add(self.step, metrics, 0.0)
        return metrics


@contextmanager
def example_trainer(stage: Stage, name: str, **options: Any) -> Iterator[SteppedTrainer]:
    """A trainer with these options on the stage's device."""
    parsed, config = parse_options(example_arguments(stage, name, **options))
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision otherwise
    accelerator = Accelerator(mixed_precision=parsed.mixed_precision, cpu=not stage.cuda)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = parsed.allow_tf32
    yield SteppedTrainer(parsed, config, accelerator)
