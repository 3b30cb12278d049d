"""What the example trains with: encoder, model with aligner, training step, optimizer, loader, pictures."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from train_options import EVAL_SEED, TrainOptions

from vrpo_plugin import ConfigError, VRPOAligner, VRPOConfig
from vrpo_plugin.encoders import Targets
from vrpo_plugin.files import write_file
from vrpo_plugin.functional.interpolant import PathType, noisy_sample
from vrpo_plugin.functional.tensors import finite_samples
from vrpo_plugin.modules.guide_parts import GuideParts
from vrpo_plugin.standalone.data import PositionBatchSampler, TrainingSamples
from vrpo_plugin.standalone.drawing import (
    draw,
    draw_together,
    grid_picture,
    image_generators,
    keep_pixels,
    load_decoder,
)
from vrpo_plugin.standalone.evaluate import EvalProtocol, EvalResult, evaluate
from vrpo_plugin.standalone.extractors import RUN_NETWORK
from vrpo_plugin.standalone.feature_cache import FeatureCache
from vrpo_plugin.standalone.guides import RUN_GUIDE
from vrpo_plugin.standalone.run_folder import ENCODER_PREFIX
from vrpo_plugin.standalone.sit import SiT, create_sit
from vrpo_plugin.standalone.sources import Source, all_images
from vrpo_plugin.standalone.stopping import WorkerSignals
from vrpo_plugin.standalone.targets import SMALL, cached_targets, check_small, critic_targets, load_targets
from vrpo_plugin.standalone.training import aligner_of, parameter_groups

GRID_BATCH = 13  # images: a grid is eight batches, for the eight GPUs of a machine
JUDGE_SEED = 1  # fixed, and not the small encoder's: runs of all seeds and methods share one independent judge


def use_deterministic_kernels() -> None:
    """Same seed, same bits on a GPU too; torch raises where an operator has no such kernel. Before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def check_launch(accelerator: Accelerator) -> None:
    """Refuses what ``accelerate launch`` was told and this loop was not written for.

    Raises:
        ConfigError: DeepSpeed, Megatron-LM, FSDP before its second version, or accumulation.
    """
    if (steps := getattr(accelerator, "gradient_accumulation_steps", 1)) != 1:
        # Accelerate would divide the loss by it a second time.
        do = "Give --gradient-accumulation-steps to this script instead."
        raise ConfigError("accelerate launch: gradient_accumulation_steps", expected=1, got=steps, do=do)
    kind = accelerator.distributed_type
    # By name, for the enumeration differs from version to version of accelerate.
    if kind.value in ("DEEPSPEED", "MEGATRON_LM") or (
        kind.value == "FSDP" and not getattr(accelerator, "is_fsdp2", False)
    ):
        raise ConfigError(
            "accelerate launch",
            expected="one process, DDP, or FSDP with fsdp_version: 2",
            got=kind.value,
            do="Choose another distributed_type in the accelerate configuration.",
        )


def check_tools(options: TrainOptions) -> None:
    """Refuses what needs a package that is not installed; accelerate would leave a tracker out without a word.

    Raises:
        ConfigError: a package is missing, or there is no such tracker.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    trackers = [str(tracker) for tracker in get_available_trackers()]
    if options.report_to not in ("none", *(["all"] if trackers else []), *trackers):
        known = options.report_to in map(str, LOGGER_TYPE_TO_CLASS)
        do = f"pip install {options.report_to}." if known else "Correct it."
        expected = f"none, or a tracker that is installed ({', '.join(trackers) or 'none is'})"
        raise ConfigError("report_to", expected=expected, got=repr(options.report_to), do=do)
    needed = {"matplotlib": options.sampling_steps, "PIL": options.sampling_steps, "scipy": options.eval_samples}
    missing = [name for name, used in needed.items() if used and importlib.util.find_spec(name) is None]
    if missing:
        do = "pip install 'vrpo-plugin[examples]', or --sampling-steps 0 --eval-samples 0."
        raise ConfigError("grids and evaluation", expected="their packages", got=f"no {missing}", do=do)


def check_data(options: TrainOptions, config: VRPOConfig, source: Source, processes: int) -> None:
    """Refuses options that do not fit the data, before anything is written or trained.

    Raises:
        ConfigError: flips of cached latents, oblong images, too few of them, or a batch that cannot be shared out.
        DataError: too few images or classes to train a small network on.
    """
    PositionBatchSampler(batch_size=options.batch_size, num_batches=1, world_size=processes)
    cached = source.latent_shape != source.image_shape
    if cached and options.flip_prob:
        do = "Encode flipped images too, as REPA does, and leave --flip-prob out."
        raise ConfigError("flip_prob", expected="0 with cached latents", got=options.flip_prob, do=do)
    for shape in (source.image_shape, source.latent_shape):
        if shape[-1] != shape[-2]:
            raise ConfigError("data", expected="square images", got=shape, do="Crop them beforehand.")
    if options.eval_samples and len(source) <= EvalProtocol.k:
        do = "Add images, or take --eval-samples 0."
        raise ConfigError("data", expected=f"more than {EvalProtocol.k} images", got=len(source), do=do)
    if trains_small(options, config):
        check_small(source)
    if options.eval_samples and options.eval_network == SMALL:
        check_small(source, "small evaluation network", "--eval-network inception_v3")


def trains_small(options: TrainOptions, config: VRPOConfig) -> bool:
    """Whether the run begins with the training of a small encoder."""
    encodes = options.method != "none" and config.targets == "encoder" and options.features_dir is None
    return encodes and options.enc_type == SMALL and options.enc_checkpoint is None


def open_features(options: TrainOptions, source: Source) -> FeatureCache | None:
    """Stored tokens of these images; None where an encoder gives them.

    Raises:
        DataError, CheckpointError: the cache is not finished, or damaged.
        ConfigError: it is one of other images.
    """
    if options.features_dir is None:
        return None
    cache = FeatureCache(options.features_dir)
    cache.check(data=source.fingerprint(), images=len(source), flips=options.flip_prob > 0)
    return cache


def build_targets(
    options: TrainOptions,
    config: VRPOConfig,
    source: Source,
    features: FeatureCache | None,
    folder: Path,
    accelerator: Accelerator,
) -> Targets:
    """The frozen encoder; or its stored tokens or the pretrained critic in its place.

    The small encoder is trained once per run and kept in the run's folder.
    """
    if config.targets == "critic":
        assert config.critic_checkpoint is not None  # the configuration has refused otherwise
        return critic_targets(config.critic_checkpoint, source)
    if features is not None:
        return cached_targets(features, source)
    with accelerator.main_process_first():
        return load_targets(
            options.enc_type,
            source,
            checkpoint=options.enc_checkpoint,
            # Named after the data: what a failed start leaves behind is right or not found.
            cache=folder / f"{ENCODER_PREFIX}{source.fingerprint()}.safetensors",
            device=accelerator.device,
        )


def describe_targets(options: TrainOptions, config: VRPOConfig, targets: Targets) -> str:
    """One line for the user."""
    sizes = f"{' + '.join(map(str, targets.dims))} features"
    if config.targets == "critic":
        return f"the critic's, {sizes}; no encoder is loaded or run"
    if options.features_dir is not None:
        return f"stored tokens of {options.features_dir}, {sizes}; no encoder is loaded or run"
    return f"{options.enc_type}, {sizes}"


def build_model(options: TrainOptions, config: VRPOConfig, source: Source, targets: Targets | None) -> SiT:
    """The transformer, with its aligner attached as ``model.vrpo`` where the method has one."""
    torch.manual_seed(options.seed)
    channels, side, _ = source.latent_shape
    overrides: dict[str, Any] = {
        "input_size": side,
        "in_channels": channels,
        "num_classes": source.num_classes,
        "class_dropout_prob": options.cfg_prob,
        "qk_norm": options.qk_norm,
        "gradient_checkpointing": options.gradient_checkpointing,
    }
    if options.encoder_depth is not None:
        overrides["encoder_depth"] = options.encoder_depth
    model = create_sit(options.model, **overrides)
    if targets is not None:
        VRPOAligner.from_model(model, targets, config=config).attach(model)
    return model


def describe(options: TrainOptions, config: VRPOConfig, model: SiT) -> str:
    """One line that says what was built."""
    main, critic = (sum(p.numel() for p in group) / 1e6 for group in parameter_groups(model))
    parts = [f"{options.method}: {options.model} with heads {main:.2f}M trainable parameters"]
    aligner = aligner_of(model)
    if aligner is not None:
        parts.append(f"aligned block(s) {', '.join(map(str, aligner.layers))}")
        size = f"critic {critic:.2f}M" if critic else "frozen critic" if aligner.critic is not None else "no critic"
        parts.append(f"{size}, rewards {', '.join(config.rewards)}" if config.reward_coeff else size)
    return "; ".join(parts)


class TrainingStep(nn.Module):
    """One forward pass with its loss: all parameters are used inside one ``forward``, as DDP wants it."""

    def __init__(self, model: SiT, path_type: PathType) -> None:
        super().__init__()
        self.model = model
        self.path_type = path_type

    def forward(self, batch: dict[str, Tensor], z: tuple[Tensor, ...], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, target = noisy_sample(batch["x0"], batch["noise"], batch["t"], self.path_type)
        drop = None if self.model.null_label is None else batch["drop"]  # no label is ever dropped
        velocity = self.model(x_t, batch["t"], batch["y"], force_drop_ids=drop)
        denoising_loss = (velocity.float() - target).square().mean()
        metrics = {"denoising_loss": denoising_loss.detach()}
        metrics["nonfinite/x0"] = (~finite_samples(batch["x0"])).sum().float()
        if z:
            metrics["nonfinite/z"] = (~finite_samples(*z)).sum().float()
        loss = denoising_loss
        aligner = aligner_of(self.model)
        if aligner is not None:
            out = aligner(z or None, x0=batch["x0"], x_t=x_t, t=batch["t"], velocity=velocity, y=batch["y"], step=step)
            loss = denoising_loss + out.loss
            metrics |= {
                "proj_loss": out.features_loss.detach(),
                "generation_loss": out.generation_loss.detach(),
                "critic_loss": out.critic_loss.detach(),
                **out.metrics,
            }
        return loss, {"loss": loss.detach(), **metrics}


def save_guide(model: SiT, folder: Path) -> None:
    """Writes what guided sampling needs, where the run has projectors, a critic and whole weights."""
    aligner = aligner_of(model)
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if aligner is not None and len(aligner.projectors) and aligner.critic is not None and not sharded:
        GuideParts.of(model).save(folder / RUN_GUIDE)


def build_optimizer(options: TrainOptions, model: SiT) -> torch.optim.AdamW:
    """AdamW as in REPA, the critic in a group of its own."""
    main, critic = parameter_groups(model)
    groups: list[dict[str, Any]] = [{"params": main, "lr": options.learning_rate}]
    if critic:
        own = options.critic_learning_rate
        groups.append({"params": critic, "lr": options.learning_rate if own is None else own})
    return torch.optim.AdamW(
        groups,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        fused=True,  # so that a step that is not finite can be left out on the device
    )


def build_loader(
    options: TrainOptions,
    config: VRPOConfig,
    source: Source,
    accelerator: Accelerator,
    start_step: int,
    features: FeatureCache | None = None,
) -> DataLoader[dict[str, Tensor]]:
    """Loads this process's share of every micro step from ``start_step`` on."""
    samples = TrainingSamples(
        source,
        seed=options.seed,
        flip_prob=options.flip_prob,
        label_drop_prob=options.cfg_prob,
        time_sampling=options.weighting,
        path_type=config.path_type,
        features=features,
    )
    micro_steps = options.gradient_accumulation_steps
    sampler = PositionBatchSampler(
        batch_size=options.batch_size,
        num_batches=options.max_train_steps * micro_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_batch=start_step * micro_steps,
    )
    return DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=options.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=options.num_workers > 0,
        worker_init_fn=WorkerSignals(),
    )


def build_decoder(options: TrainOptions, source: Source, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Latents to pixels in [-1, 1]: the identity for pixel models, else the VAE; None where neither is there.

    Raises:
        ConfigError: grids or an evaluation of latents are asked for without a VAE.
    """
    if source.latent_shape == source.image_shape:
        return keep_pixels
    if options.vae is None:
        if options.sampling_steps or options.eval_samples:
            raise ConfigError(
                "vae",
                expected="a diffusers folder or name, to decode latents for grids and evaluation",
                got=None,
                do="Pass --vae (stabilityai/sd-vae-ft-mse or a folder), or --sampling-steps 0 --eval-samples 0.",
            )
        return None
    return load_decoder(options.vae, device)


class Painter:
    """Draws samples from a model: grids during the run, and the evaluation's images at its end."""

    def __init__(
        self,
        options: TrainOptions,
        config: VRPOConfig,
        source: Source,
        decode: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self.options, self.config, self.source, self.decode, self.device = options, config, source, decode, device
        self._network: Any = None

    def load_network(self) -> None:
        """Reads a named evaluation network now: its file may be missing, and the run may be long."""
        options = self.options
        if options.eval_samples and options.eval_network != SMALL:
            from vrpo_plugin.standalone.features import timm_features

            resolution = self.source.image_shape[-1]
            self._network = timm_features(
                options.eval_network, resolution=resolution, checkpoint=options.eval_checkpoint
            )

    def images(
        self, model: SiT, count: int, seed: int, batch_size: int = 256, description: str = "sampling"
    ) -> Tensor | None:
        """uint8 images (count, C, H, W) of evenly spread labels, the same noise on every call.

        All processes take part; the first one gets the images, the others None.
        """
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((count, *self.source.latent_shape), generator=generator)
        labels = torch.arange(count) % self.source.num_classes if self.source.num_classes else None
        options = self.options

        def draw_batch(numbers: range) -> Tensor:
            return draw(
                model,
                noise[numbers.start : numbers.stop],
                None if labels is None else labels[numbers.start : numbers.stop],
                decode=self.decode,
                device=self.device,
                generators=image_generators(seed, numbers),
                num_steps=options.solver_steps,
                solver=options.solver,
                path_type=self.config.path_type,
                guidance_scale=options.cfg_scale,
                guidance_interval=(options.guidance_low, options.guidance_high),
            )

        return draw_together(draw_batch, count, batch_size, description=description)

    def grid(self, model: SiT, path: Path) -> None:
        """A 10 x 10 picture, drawn by all processes; with ten classes, a column is a class."""
        images = self.images(model, 100, seed=0, batch_size=GRID_BATCH, description="grid")
        if images is not None:
            picture = grid_picture(images)
            write_file(path, lambda file: picture.save(file, format="png"))

    def evaluate(self, model: SiT, folder: Path) -> EvalResult | None:
        """Frechet distance, precision and recall against the training images, in a network of their own.

        All processes draw the samples; the first one measures, the others get None. A small network is kept in the
        run's folder, for ``vrpo eval``.
        """
        options = self.options
        images = self.images(model, options.eval_samples, EVAL_SEED, description="evaluation")
        if images is None:
            return None
        real, labels = all_images(self.source, 50_000)
        if options.eval_network == SMALL:
            from vrpo_plugin.standalone.small_training import train_small_features

            # Another architecture, width and seed than the small encoder's: the aligned network is no judge.
            network: Any = train_small_features(
                real, labels, seed=JUDGE_SEED, architecture="plain", width=24, device=self.device
            )
            network.save(folder / RUN_NETWORK)
        else:
            if self._network is None:
                self.load_network()
            network = self._network
            network.encoder.to(self.device)
        protocol = options.protocol(network.name, len(real), f"training images {self.source.fingerprint()}")
        return evaluate(network, real, images, protocol)
