"""``vrpo sample``: images of a trained model, on all processes, the same ones on any number of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.modules.guide import RewardGuide
from vrpo_plugin.standalone.checkpoint import file_sha256
from vrpo_plugin.standalone.data import seeded_generator
from vrpo_plugin.standalone.drawing import batches_of, draw, image_generators, keep_pixels, load_decoder
from vrpo_plugin.standalone.guides import open_guide
from vrpo_plugin.standalone.progress import progress
from vrpo_plugin.standalone.sample_folder import FORMATS, SampleFolder
from vrpo_plugin.standalone.sampler import SOLVERS, Solver
from vrpo_plugin.standalone.trained import Trained

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = 1  # of samples.json


@dataclass(frozen=True)
class SampleSettings:
    """What is sampled, how, and where it goes.

    Attributes:
        output: folder.
        num: images over all processes.
        formats: of ``folder``, ``grid`` and ``npz``.
        labels: ``balanced`` (image i has class i mod classes), ``random``, or class numbers that are repeated.
        solver, num_steps: see :func:`vrpo_plugin.standalone.sampler.sample`.
        guidance_scale, guidance_interval: classifier-free guidance, and the times in [0, 1] (1 = noise) at which
            it acts.
        seed: of noise and random labels.
        batch_size: images per process and call of the model; moves an image by rounding alone.
        mixed_precision: ``no``, ``fp16`` or ``bf16``; None is what ``accelerate launch`` says, else ``no``.
        vae: diffusers folder or name, for models of latents.
        guide: file of a RewardGuide, or of a critic for a run that has none.
        guide_strength, guide_interval: of the guide; None is its own default.

    Raises:
        ConfigError: a value is out of range.
    """

    output: Path
    num: int = 100
    formats: tuple[str, ...] = ("folder", "grid")
    labels: str = "balanced"
    solver: Solver = "euler"
    num_steps: int = 50
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    batch_size: int = 64
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    vae: str | None = None
    guide: Path | None = None
    guide_strength: float | None = None
    guide_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        within, unguided = "0 <= LOW <= HIGH <= 1", self.guide_strength is self.guide_interval is None
        checks = {
            "num": (1 <= self.num <= 1_000_000, "1 to 1000000"),
            "format": (bool(self.formats) and {*self.formats} <= {*FORMATS}, f"of {', '.join(FORMATS)}"),
            "solver": (self.solver in SOLVERS, f"one of {', '.join(SOLVERS)}"),
            "steps": (self.num_steps >= 1, ">= 1"),
            "cfg": (1 <= self.guidance_scale < float("inf"), ">= 1, which is no guidance"),
            "cfg_interval": (_is_interval(self.guidance_interval), within),
            "batch_size": (self.batch_size >= 1, ">= 1"),
            "guide_strength": (0 <= (self.guide_strength or 0) < float("inf"), ">= 0"),
            "guide_interval": (self.guide_interval is None or _is_interval(self.guide_interval), within),
            "guide": (self.guide is not None or unguided, "a file with --guide-strength or --guide-interval"),
        }
        fields = {"format": "formats", "steps": "num_steps"}
        fields |= {"cfg": "guidance_scale", "cfg_interval": "guidance_interval"}
        for name, (valid, expected) in checks.items():
            if not valid:
                got = getattr(self, fields.get(name, name))
                raise ConfigError(name.replace("_", "-"), expected=expected, got=got, do="Correct it.")


def sample_images(trained: Trained, settings: SampleSettings) -> list[Path]:
    """Makes the images that are not there yet; every process of ``accelerate launch`` has to call it.

    Args:
        trained: the model.
        settings: what is made of it.

    Returns:
        Paths of what there is now: on the first process; the others get none.

    Raises:
        ConfigError: the settings do not fit the model, the VAE cannot be had, or the folder holds something else;
            nothing is written then.
        DataError: an image or samples.json in the folder cannot be read.
    """
    accelerator = _accelerator(settings)
    labels = choose_labels(settings.labels, settings.num, trained.model.num_classes, settings.seed)
    _check_model(trained, settings)
    trained.model.to(accelerator.device)
    guide = _load_guide(settings, trained)
    precision = str(accelerator.mixed_precision)
    record = protocol(trained, settings, precision, _describe_guide(settings, guide))
    folder = SampleFolder(settings.output, record, settings.formats)
    missing = folder.missing()
    todo = [b for b in batches_of(settings.num, settings.batch_size) if not missing.isdisjoint(b)]
    # Before anything is written: a VAE that is not there is refused.
    draw_batch = _drawer(trained, settings, labels, guide, accelerator) if todo else None
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    if accelerator.is_main_process:
        folder.start(missing)
    accelerator.wait_for_everyone()
    if draw_batch is not None:
        _make(todo, draw_batch, folder, accelerator)
    accelerator.wait_for_everyone()
    written = folder.finish(labels) if accelerator.is_main_process else []
    accelerator.end_training()
    return written


def choose_labels(kind: str, num: int, num_classes: int, seed: int) -> Tensor | None:
    """Labels (N,), int64, a function of the seed and an image's number; None for an unconditional model.

    Raises:
        ConfigError: ``kind`` is none of balanced, random and classes of the model, or the model has no classes.
    """
    if num_classes == 0:
        if kind not in ("balanced", "random"):
            do = "Leave --labels out."
            raise ConfigError("labels", expected="none: the model has no classes", got=kind, do=do)
        return None
    if kind == "balanced":
        return torch.arange(num) % num_classes
    if kind == "random":
        return torch.randint(num_classes, (num,), generator=seeded_generator("labels", seed, 0))
    try:
        given = [int(one) for one in kind.split(",")]
    except ValueError:
        given = [-1]
    if not all(0 <= label < num_classes for label in given):
        expected = f"balanced, random, or classes from 0 to {num_classes - 1} with commas between them"
        raise ConfigError("labels", expected=expected, got=repr(kind), do="Correct it.")
    return torch.tensor(given)[torch.arange(num) % len(given)]


def protocol(
    trained: Trained, settings: SampleSettings, mixed_precision: str, guide: dict[str, Any] | None
) -> dict[str, Any]:
    """What samples.json holds: everything that makes an image what it is."""
    return {
        "format": FORMAT,
        "model": trained.name,
        "checkpoint_sha256": trained.sha256,
        "step": trained.step,
        "ema": trained.ema,
        "solver": settings.solver,
        "num_steps": settings.num_steps,
        "guidance_scale": float(settings.guidance_scale),
        "guidance_interval": [float(t) for t in settings.guidance_interval],
        "guide": guide,
        "labels": settings.labels.replace(" ", "") if trained.model.num_classes else "none",
        "seed": settings.seed,
        "num_samples": settings.num,
        "resolution": trained.resolution,
        "mixed_precision": mixed_precision,
    }


def _check_model(trained: Trained, settings: SampleSettings) -> None:
    if settings.guidance_scale > 1 and trained.model.null_label is None:
        do = "Take --cfg 1."
        got = "a model that never saw samples without a label"
        expected = f"a model with a null label for --cfg {settings.guidance_scale:g}"
        raise ConfigError("cfg", expected=expected, got=got, do=do)
    if trained.latent and settings.vae is None:
        do = "Pass --vae with a diffusers folder, or the name stabilityai/sd-vae-ft-mse where it can be downloaded."
        raise ConfigError("vae", expected="the VAE of a model of latents", got=None, do=do)


def _accelerator(settings: SampleSettings) -> "Accelerator":
    from accelerate import Accelerator

    try:
        return Accelerator(mixed_precision=settings.mixed_precision)
    except ValueError as error:  # fp16 on a CPU, bf16 on a GPU that has none
        expected, do = "one that this machine has", "Take --mixed-precision no."
        raise ConfigError("mixed-precision", expected=expected, got=error, do=do) from error


def _make(
    todo: list[range], draw_batch: Callable[[range], Tensor], folder: SampleFolder, accelerator: "Accelerator"
) -> None:
    """Each process makes its share of the batches and writes it."""
    done, processes = folder.count - sum(map(len, todo)), accelerator.num_processes
    shown = accelerator.is_main_process
    with progress(folder.count, "sampling", unit="image", initial=done, enabled=shown) as bar:
        for first in range(0, len(todo), processes):
            turn = todo[first : first + processes]
            if accelerator.process_index < len(turn):
                numbers = turn[accelerator.process_index]
                folder.write(numbers, draw_batch(numbers))
            bar.update(sum(map(len, turn)))  # the other processes are about as far


def _drawer(
    trained: Trained, settings: SampleSettings, labels: Tensor | None, guide: Any, accelerator: "Accelerator"
) -> Callable[[range], Tensor]:
    device, model = accelerator.device, trained.model
    decode = load_decoder(settings.vae, device) if trained.latent and settings.vae else keep_pixels
    guided = {} if guide is None else {"guide": guide}

    def draw_batch(numbers: range) -> Tensor:
        generators = image_generators(settings.seed, numbers)
        # The same generator goes on with the SDE's noise.
        noise = torch.stack([torch.randn(model.input_shape, generator=one) for one in generators])
        with accelerator.autocast():
            return draw(
                model,
                noise,
                None if labels is None else labels[numbers.start : numbers.stop],
                decode=decode,
                device=device,
                generators=generators,
                num_steps=settings.num_steps,
                solver=settings.solver,
                path_type=trained.path_type,
                guidance_scale=settings.guidance_scale,
                guidance_interval=settings.guidance_interval,
                **guided,
            )

    return draw_batch


def _load_guide(settings: SampleSettings, trained: Trained) -> RewardGuide | None:
    """With its own defaults where nothing is said; None without one."""
    if settings.guide is None:
        return None
    said = {"strength": settings.guide_strength, "interval": settings.guide_interval}
    return open_guide(settings.guide, trained, **{k: v for k, v in said.items() if v is not None})


def _describe_guide(settings: SampleSettings, guide: RewardGuide | None) -> dict[str, Any] | None:
    if settings.guide is None or guide is None:
        return None
    interval = [float(t) for t in guide.interval]
    return {"sha256": file_sha256(settings.guide), "strength": float(guide.strength), "interval": interval}


def _is_interval(interval: tuple[float, float]) -> bool:
    low, high = interval
    return 0 <= low <= high <= 1
