"""Pretraining a critic: at a host's small learning rate an online critic learns slowly."""

import math
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.errors import ConfigError, DataError
from vrpo_plugin.functional.rewards import semantic_reward
from vrpo_plugin.modules.critic import LatentCritic, save_critic
from vrpo_plugin.settings import check_kinds
from vrpo_plugin.standalone.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from vrpo_plugin.standalone.data import PositionBatchSampler, TrainingSamples
from vrpo_plugin.standalone.feature_cache import FeatureCache
from vrpo_plugin.standalone.phases import Phase, Remarks, describe_source
from vrpo_plugin.standalone.progress import progress
from vrpo_plugin.standalone.sources import Source, open_source
from vrpo_plugin.standalone.stopping import Agreement, StopSignals, WorkerSignals
from vrpo_plugin.standalone.targets import SMALL, cached_targets, load_targets
from vrpo_plugin.standalone.training import load_states, whole_states

if TYPE_CHECKING:
    from accelerate import Accelerator

HELD_OUT_EVERY = 20
EXCHANGE_EVERY = 50  # steps, at most
FREE_ON_RESUME = frozenset(
    {"resume", "checkpointing_steps", "num_workers", "data_dir", "output", "enc_checkpoint", "features_dir"}
)


@dataclass(frozen=True)
class CriticTraining:
    """Settings of :func:`train_critic`.

    Attributes:
        output: file to write, ``.safetensors``.
        data_dir: image folder or npz file (pixels), or REPA's layout (cached latents); None is scikit-learn's digits.
        resolution: side in pixels, for images.
        enc_type: as ``VRPOAligner``'s encoder: timm's or REPA's names, or ``small``.
        enc_checkpoint: local weights of the encoder.
        features_dir: folder that ``vrpo cache-features`` wrote for this data: its tokens are the targets, no encoder
            runs, and ``enc_type`` is not asked.
        critic_width: channels at the token grid; must be the run's.
        batch_size: over all processes.
        steps: optimizer steps.
        learning_rate: highest of a one-cycle schedule.
        num_workers: data loader processes per rank.
        seed: of everything random.
        mixed_precision: ``no``, ``fp16`` or ``bf16``; None is what ``accelerate launch`` says, else ``no``.
        checkpointing_steps: steps between checkpoints, which lie in a folder beside the output until it is written.
        resume: go on from the newest checkpoint, or start.
    """

    output: str
    data_dir: str | None = None
    resolution: int = 256
    enc_type: str = "dinov2-vit-b"
    enc_checkpoint: str | None = None
    features_dir: str | None = None
    critic_width: int = VRPOConfig.critic_width
    batch_size: int = 256
    steps: int = 20_000
    learning_rate: float = 1e-3
    num_workers: int = 4
    seed: int = 0
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    checkpointing_steps: int = 1000
    resume: bool = False


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


@dataclass(frozen=True)
class PartOfCache:
    """The same part of a cache of the source's features."""

    cache: FeatureCache
    part: Part

    def read(self, index: int, flipped: bool = False) -> Tensor:
        """As the cache's."""
        return self.cache.read(self.part.indices[index], flipped)


def train_critic(settings: CriticTraining) -> dict[str, Any]:
    """Trains a critic by cosine regression on clean latents (equation 15), writes it, and returns its record.

    Runs on one process or under ``accelerate launch``, with a progress bar that shows the agreement on held-out
    images, the mean cosine in [-1, 1]. A resumed training gives the same bits.

    Raises:
        ConfigError: the output file exists, cannot be written, or has an earlier encoder or checkpoints beside it; a
            resumed training had other settings; or a setting is out of range.
        DataError: fewer images than one batch and its held-out part need.
        SystemExit: a signal stopped it; there is a checkpoint of the step that was being made.
    """
    from accelerate import Accelerator

    output = Path(settings.output)
    _check(settings, output)
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    with Phase("data", enabled=accelerator.is_main_process) as phase:
        source = open_source(settings.data_dir, settings.resolution)
        phase.made = describe_source(source)
    if len(source) < 2 * HELD_OUT_EVERY:
        raise DataError("data", expected=f"at least {2 * HELD_OUT_EVERY} images", got=len(source), do="Add images.")
    _sampler(settings, accelerator)  # refuses a batch that cannot be shared out
    run = _Training(settings, source, accelerator)
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    if accelerator.is_main_process:
        _try_to_write(output)
    run.build()
    run.train()
    record = {k: v for k, v in asdict(settings).items() if k not in ("resume", "checkpointing_steps")}
    if run.cache is not None:
        record["enc_type"] = run.cache.identity.encoder
    record |= {"held_out_cosine": run.agreement_on_held_out(), "data_fingerprint": source.fingerprint()}
    record["made_for"] = asdict(replace(run.targets.critic_purpose(), target_norm="none"))
    if accelerator.is_main_process:
        save_critic(run.critic, output, record=record)
        shutil.rmtree(run.checkpoints)
    accelerator.end_training()
    return record


class _Training:
    """Critic, encoder, optimizer and schedule of one training, and its checkpoints."""

    def __init__(self, settings: CriticTraining, source: Source, accelerator: "Accelerator") -> None:
        self.settings, self.source, self.accelerator = settings, source, accelerator
        self.signals = StopSignals(say=accelerator.is_main_process)
        self.checkpoints = checkpoints_of(Path(settings.output))
        rank, processes = accelerator.process_index, accelerator.num_processes
        self.remarks = Remarks(source, "data" if processes == 1 else f"data (process {rank})")
        self.recorded = {k: v for k, v in asdict(settings).items() if k not in FREE_ON_RESUME}
        self.recorded |= {"data_fingerprint": source.fingerprint(), "precision": accelerator.mixed_precision}
        self.cache = FeatureCache(settings.features_dir) if settings.features_dir is not None else None
        if self.cache is not None:
            self.cache.check(data=source.fingerprint(), images=len(source), flips=False)
            self.recorded["features"] = self.cache.identity.digest()
        del self.recorded["mixed_precision"]
        self.found = self._find()

    def _find(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        newest = latest_checkpoint(self.checkpoints)
        found = None if newest is None else load_checkpoint(newest)
        former = self.recorded if found is None else found[1]["settings"]
        unlike = [f"{k}: {former.get(k)!r} then, {v!r} now" for k, v in self.recorded.items() if former.get(k) != v]
        if unlike:
            expected, do = "the settings that the training began with", "Use them, or remove that folder."
            raise ConfigError(str(self.checkpoints), expected=expected, got="; ".join(unlike), do=do)
        return found

    def build(self) -> None:
        settings, accelerator = self.settings, self.accelerator
        encoder = Phase("encoder", enabled=accelerator.is_main_process)
        with encoder, accelerator.main_process_first():
            if self.cache is not None:
                encoder.made = f"stored tokens of {settings.features_dir}"
                self.targets = cached_targets(self.cache, self.source)
            else:
                encoder.made = settings.enc_type
                self.targets = load_targets(
                    settings.enc_type,
                    self.source,
                    checkpoint=settings.enc_checkpoint,
                    cache=encoder_of(Path(settings.output)),
                    device=accelerator.device,
                )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            channels, height, side = self.source.latent_shape
            sizes = (channels, height, side), self.targets.dims, self.targets.grid
            self.critic = LatentCritic(*sizes, width=settings.critic_width)
        optimizer = torch.optim.AdamW(self.critic.parameters(), lr=settings.learning_rate, weight_decay=0.01)
        rate, steps = settings.learning_rate, settings.steps
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        self.model, self.optimizer = accelerator.prepare(self.critic, optimizer)
        self.step = 0
        if self.found is None:
            self.save()  # from here on --resume knows which images the encoder beside it was trained on
        else:
            self._load(*self.found)

    def _load(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        load_states(self.critic, self.optimizer.optimizer, tensors)
        self.schedule.load_state_dict(state["schedule"])
        for group, (rate, betas) in zip(self.optimizer.param_groups, state["groups"], strict=True):
            group.update(lr=rate, betas=tuple(betas))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.accelerator.print(f"resumed from step {self.step}")

    def save(self) -> None:
        """Writes a checkpoint of all that the next step depends on; randomness depends on the step alone."""
        tensors = whole_states(self.critic, self.optimizer.optimizer)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "settings": self.recorded,
                "schedule": self.schedule.state_dict(),
                "groups": [[group["lr"], list(group["betas"])] for group in self.optimizer.param_groups],
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            save_checkpoint(self.checkpoints, self.step, tensors, state, keep_last=2)
        self.accelerator.wait_for_everyone()

    def train(self) -> None:
        """Makes the remaining steps.

        Raises:
            SystemExit: a signal stopped it.
        """
        settings, main = self.settings, self.accelerator.is_local_main_process
        together = Agreement(self.accelerator, self.signals, every=EXCHANGE_EVERY, step=self.step)
        loader = iter(
            DataLoader(
                self._samples(held_out=False),
                batch_sampler=_sampler(settings, self.accelerator, self.step),
                num_workers=settings.num_workers,
                worker_init_fn=WorkerSignals(),
            )
        )
        cosines: list[Tensor] = []
        seconds: list[float] = []
        postfix: dict[str, str] = {}
        with self.signals, progress(settings.steps, "critic", unit="step", initial=self.step, enabled=main) as bar:
            started = time.perf_counter()
            while self.step < settings.steps and not together.stop:
                cosines.append(self._train_step(next(loader)))
                self.step += 1
                now = time.perf_counter()
                seconds.append(now - started)
                started = now
                bar.update()
                saves = self.step % settings.checkpointing_steps == 0 or self.step == settings.steps
                if saves or together.due(self.step):
                    shown = together.exchange(self.step, torch.stack(cosines), seconds)
                    self.remarks.say_new()
                    postfix |= {"train": f"{shown.mean():.3f}"}
                    cosines, seconds = [], []
                if saves or together.stop:
                    self.save()
                if main and self.step % max(1, settings.steps // 10) == 0:
                    postfix |= {"held_out": f"{self.agreement_on_held_out():.3f}"}
                bar.set_postfix(postfix, refresh=False)
        self.remarks.say_new(all_of_them=True)
        if together.stop and self.step < settings.steps:
            self.accelerator.print(self.signals.message(self.step))
            self.accelerator.end_training()
            raise SystemExit(self.signals.exit_status)

    def _samples(self, *, held_out: bool) -> TrainingSamples:
        part = Part(self.source, held_out=held_out)
        features = None if self.cache is None else PartOfCache(self.cache, part)
        return TrainingSamples(part, seed=self.settings.seed, features=features)

    @torch.no_grad()
    def _tokens(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What the critic is to give for a batch of samples, (B, N, D) of each encoder."""
        device = self.accelerator.device
        if self.cache is not None:
            return self.cache.decode(batch["features"].to(device))
        with self.accelerator.autocast():
            return self.targets.encode(batch["image"].to(device))

    def _train_step(self, batch: dict[str, Tensor]) -> Tensor:
        accelerator = self.accelerator
        z = self._tokens(batch)
        cosine = semantic_reward(self.model(batch["x0"].to(accelerator.device)).tokens, z).mean()
        accelerator.backward(1 - cosine)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return cosine.detach().float()

    @torch.no_grad()
    def agreement_on_held_out(self) -> float:
        """Mean cosine on at most 1,000 held-out images."""
        samples = self._samples(held_out=True)
        cosines = []
        for indices in torch.arange(min(len(samples.source), 1000)).split(self.settings.batch_size):
            batch = default_collate([samples[int(i)] for i in indices])
            z = self._tokens(batch)
            with self.accelerator.autocast():
                cosines.append(semantic_reward(self.critic(batch["x0"].to(self.accelerator.device)).tokens, z))
        return float(torch.cat(cosines).mean())


def checkpoints_of(output: Path) -> Path:
    """The folder of a training's checkpoints, beside its output; removed when that is written."""
    return output.with_suffix(".checkpoints")


def encoder_of(output: Path) -> Path:
    """The file of a small encoder, beside the critic that was trained with it."""
    return output.with_suffix(".encoder.safetensors")


def _check(settings: CriticTraining, output: Path) -> None:
    if output.exists():
        raise ConfigError(str(output), expected="a new file", got="an existing one", do="Choose another --output.")
    cache, begun = encoder_of(output), latest_checkpoint(checkpoints_of(output)) is not None
    if begun and not settings.resume:
        do = "Pass --resume to go on with it, or remove the folder."
        raise ConfigError(str(checkpoints_of(output)), expected="no folder", got="an earlier training", do=do)
    trains_small = settings.enc_type == SMALL and settings.enc_checkpoint is None and settings.features_dir is None
    if trains_small and cache.exists() and not begun:
        # It may be of other images: a run that was broken off left it.
        do = "Remove it, or go on with it by --enc-checkpoint."
        raise ConfigError(str(cache), expected="no file", got="an encoder of an earlier run", do=do)
    if (
        min(settings.steps, settings.batch_size, settings.checkpointing_steps) < 1
        or not 0 < settings.learning_rate < math.inf
    ):
        names = "steps, batch_size, checkpointing_steps, learning_rate"
        raise ConfigError(names, expected="> 0", got=settings, do="Correct them.")
    if settings.features_dir is not None and settings.enc_checkpoint is not None:
        do = "Give one of them: a cache holds what the encoder says of the data."
        raise ConfigError("features_dir", expected="None with enc_checkpoint", got=settings.features_dir, do=do)
    if settings.num_workers < 0 or settings.critic_width < 4:
        got = f"{settings.num_workers} and {settings.critic_width}"
        expected = "num_workers >= 0, critic_width >= 4"
        raise ConfigError("num_workers, critic_width", expected=expected, got=got, do="Correct them.")
    check_kinds(settings)


def _try_to_write(output: Path) -> None:
    """Finds out before the training whether its result can be written."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        expected, do = "a file in a folder that can be written", "Choose another --output."
        raise ConfigError(str(output), expected=expected, got=error, do=do) from error


def _sampler(settings: CriticTraining, accelerator: "Accelerator", start: int = 0) -> PositionBatchSampler:
    return PositionBatchSampler(
        batch_size=settings.batch_size,
        num_batches=settings.steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_batch=start,
    )
