"""Pretraining a critic: at a host's small learning rate an online critic learns slowly."""

import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import ConfigError, DataError
from vrpo_plugin.functional.rewards import semantic_reward
from vrpo_plugin.modules.critic import LatentCritic, save_critic
from vrpo_plugin.standalone.data import PositionBatchSampler, TrainingSamples
from vrpo_plugin.standalone.sources import Source, open_source
from vrpo_plugin.standalone.targets import SMALL, load_targets

HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class CriticTraining:
    """Settings of :func:`train_critic`.

    Attributes:
        output: file to write, ``.safetensors``.
        data_dir: image folder or npz file (pixels), or REPA's layout (cached latents); None is scikit-learn's digits.
        resolution: side in pixels, for images.
        enc_type: as ``VRPOAligner``'s encoder: timm's or REPA's names, or ``small``.
        enc_checkpoint: local weights of the encoder.
        critic_width: channels at the token grid; must be the run's.
        batch_size: over all processes.
        steps: optimizer steps.
        learning_rate: highest of a one-cycle schedule.
        num_workers: data loader processes per rank.
        seed: of everything random.
    """

    output: str
    data_dir: str | None = None
    resolution: int = 256
    enc_type: str = "dinov2-vit-b"
    enc_checkpoint: str | None = None
    critic_width: int = VRPOConfig.critic_width
    batch_size: int = 256
    steps: int = 20_000
    learning_rate: float = 1e-3
    num_workers: int = 4
    seed: int = 0


class Part:
    """Every n-th image of a source, or all the others.

    Args:
        source: the whole.
        held_out: True for every ``HELD_OUT_EVERY``-th image.
    """

    def __init__(self, source: Source, *, held_out: bool) -> None:
        self.source = source
        self.num_classes, self.image_shape, self.latent_shape = (
            source.num_classes,
            source.image_shape,
            source.latent_shape,
        )
        self.indices = [i for i in range(len(source)) if (i % HELD_OUT_EVERY == 0) == held_out]

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Tensor, Tensor | None, int]:
        """As the source's."""
        return self.source.load(self.indices[index])

    def fingerprint(self) -> str:
        """As the source's."""
        return self.source.fingerprint()


def train_critic(settings: CriticTraining) -> dict[str, Any]:
    """Trains a critic by cosine regression on clean latents (equation 15), writes it, and returns its record.

    Runs on one process or under ``accelerate launch``, with a progress bar that shows the agreement on held-out
    images, the mean cosine in [-1, 1].

    Raises:
        ConfigError: the output file exists, cannot be written, or has an earlier encoder beside it; or a setting is
            out of range.
        DataError: fewer images than one batch and its held-out part need.
    """
    from accelerate import Accelerator

    output = Path(settings.output)
    cache = output.with_suffix(".encoder.safetensors")
    _check(settings, output, cache)
    source = open_source(settings.data_dir, settings.resolution)
    if len(source) < 2 * HELD_OUT_EVERY:
        raise DataError("data", expected=f"at least {2 * HELD_OUT_EVERY} images", got=len(source), do="Add images.")
    accelerator = Accelerator()
    _loader(settings, source, accelerator)  # refuses a batch that cannot be shared out
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    if accelerator.is_main_process:
        _try_to_write(output)
    with accelerator.main_process_first():
        targets = load_targets(
            settings.enc_type, source, checkpoint=settings.enc_checkpoint, cache=cache, device=accelerator.device
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        channels, height, side = source.latent_shape
        critic = LatentCritic((channels, height, side), targets.dims, targets.grid, width=settings.critic_width)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps)
    model, optimizer = accelerator.prepare(critic, optimizer)
    loader = _loader(settings, Part(source, held_out=False), accelerator)
    held_out = Part(source, held_out=True)
    bar = tqdm(loader, total=settings.steps, desc="critic", disable=not accelerator.is_local_main_process)
    agreement = float("nan")
    for step, batch in enumerate(bar, start=1):
        x0, images = batch["x0"].to(accelerator.device), batch["image"].to(accelerator.device)
        cosine = semantic_reward(model(x0).tokens, targets.encode(images)).mean()
        accelerator.backward(1 - cosine)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, settings.steps // 10) == 0 or step == settings.steps:
            agreement = _agreement(critic, held_out, targets.encode, settings, accelerator.device)
            bar.set_postfix(train=f"{cosine.item():.3f}", held_out=f"{agreement:.3f}")
    made_for = replace(targets.critic_purpose(), target_norm="none")
    record = {**asdict(settings), "held_out_cosine": agreement, "data_fingerprint": source.fingerprint()}
    record["made_for"] = asdict(made_for)
    if accelerator.is_main_process:
        save_critic(critic, output, record=record)
    accelerator.end_training()
    return record


def _check(settings: CriticTraining, output: Path, cache: Path) -> None:
    if output.exists():
        raise ConfigError(str(output), expected="a new file", got="an existing one", do="Choose another --output.")
    if settings.enc_type == SMALL and settings.enc_checkpoint is None and cache.exists():
        # It may be of other images: a run that was broken off left it.
        do = "Remove it, or go on with it by --enc-checkpoint."
        raise ConfigError(str(cache), expected="no file", got="an encoder of an earlier run", do=do)
    if min(settings.steps, settings.batch_size) < 1 or not 0 < settings.learning_rate < math.inf:
        raise ConfigError("steps, batch_size, learning_rate", expected="> 0", got=settings, do="Correct them.")
    if settings.num_workers < 0 or settings.critic_width < 4:
        got = f"{settings.num_workers} and {settings.critic_width}"
        expected = "num_workers >= 0, critic_width >= 4"
        raise ConfigError("num_workers, critic_width", expected=expected, got=got, do="Correct them.")


def _try_to_write(output: Path) -> None:
    """Finds out before the training whether its result can be written."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        expected, do = "a file in a folder that can be written", "Choose another --output."
        raise ConfigError(str(output), expected=expected, got=error, do=do) from error


def _loader(settings: CriticTraining, source: Source, accelerator: Any) -> DataLoader[dict[str, Tensor]]:
    sampler = PositionBatchSampler(
        batch_size=settings.batch_size,
        num_batches=settings.steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    samples = TrainingSamples(source, seed=settings.seed)
    return DataLoader(samples, batch_sampler=sampler, num_workers=settings.num_workers)


@torch.no_grad()
def _agreement(
    critic: LatentCritic, source: Source, encode: Any, settings: CriticTraining, device: torch.device
) -> float:
    """Mean cosine on at most 1,000 held-out images."""
    count = min(len(source), 1000)
    sampler = PositionBatchSampler(batch_size=1, num_batches=count)
    samples = TrainingSamples(source, seed=settings.seed)
    cosines = []
    for indices in torch.tensor(list(sampler)).flatten().split(settings.batch_size):
        batch = [samples[int(i)] for i in indices]
        x0, images = (torch.stack([item[key] for item in batch]).to(device) for key in ("x0", "image"))
        cosines.append(semantic_reward(critic(x0).tokens, encode(images)))
    return float(torch.cat(cosines).mean())
