"""Trained transformers, read to be sampled: from the example's runs, from one file, or from a host's weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vrpo_plugin.errors import CheckpointError, ConfigError
from vrpo_plugin.functional.interpolant import PathType
from vrpo_plugin.settings import read_mapping
from vrpo_plugin.standalone.checkpoint import MANIFEST, file_sha256, latest_checkpoint, load_group
from vrpo_plugin.standalone.sit import SIT_MODELS, SiT

# REPA's names of the paths, and SiT's.
PATHS: dict[object, PathType] = {"linear": "linear", "cosine": "cosine", "Linear": "linear", "GVP": "cosine"}
VAE_STRIDE = 8
USE_THE_HOST = "Sample it with its own codebase: generate.py or sample.py there."
# What wrappers put before a name, and the aligner, which is no part of what is sampled.
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
_ALIGNER = "vrpo."


@dataclass(frozen=True)
class Trained:
    """A trained transformer and what is known of it.

    Attributes:
        model: velocity = noise - data at t in [0, 1], 1 is noise; in eval mode.
        name: such as ``SiT-XL/2``.
        path_type: ``linear`` or ``cosine``.
        resolution: side of its images in pixels.
        ema: averaged weights, or those of the last step.
        step: training step; None where nothing says it.
        sha256: of the file that held the weights.
        settings: of the run, as config.json holds them.
        checkpoint: the run's, a folder; None where the weights are alone.
    """

    model: SiT
    name: str
    path_type: PathType
    resolution: int
    ema: bool
    step: int | None
    sha256: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None

    @property
    def latent(self) -> bool:
        """Whether a VAE has to decode what the model makes."""
        return self.model.input_shape[-1] != self.resolution

    def describe(self) -> str:
        """One line."""
        weights = "EMA" if self.ema else "raw weights"
        step = "" if self.step is None else f" of step {self.step}"
        classes = f"{self.model.num_classes} classes" if self.model.num_classes else "no classes"
        size = f"{self.resolution}x{self.resolution} pixels{' by a VAE' if self.latent else ''}"
        return f"{self.name}, {weights}{step} (sha256 {self.sha256[:12]}), {size}, {classes}"


def open_trained(
    path: str | Path, *, config: str | Path | None = None, ema: bool = True, step: int | None = None
) -> Trained:
    """Reads a run's folder, one of its checkpoints, or a ``.safetensors`` file of weights.

    Args:
        path: of the folder or the file.
        config: the settings that the model was built with: a run's config.json, or a YAML or JSON file with ``model``
            and ``resolution``; by default the config.json of the run, or the one beside the file.
        ema: the averaged weights, else those of the last step. A file holds what it holds.
        step: of the checkpoint in a run's folder; by default the newest.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or our SiT does not load it.
        ConfigError: there is no configuration, or it does not fit.
    """
    path = Path(path)
    if step is not None and not (path / "checkpoints").is_dir():
        do = "Leave --step out, or give the run's folder."
        raise ConfigError("step", expected="a run's folder, which holds several checkpoints", got=str(path), do=do)
    if path.suffix == ".safetensors":
        if (path.parent / MANIFEST).exists() and path.stem in ("ema", "model"):
            return open_trained(path.parent, config=config, ema=path.stem == "ema")
        settings = read_config(config or _config_beside(path))
        return build_trained(_read_file(path), settings, path, ema=ema, step=None, sha256=file_sha256(path))
    if (path / MANIFEST).exists():
        checkpoint, run = path, path.parent.parent
    elif (path / "checkpoints").is_dir():
        checkpoint, run = _checkpoint_of(path, step), path
    else:
        got = "none of them" if path.exists() else "nothing there"
        expected = "a run's folder, a checkpoint of it, a .safetensors file or a host's .pt file"
        raise CheckpointError(str(path), expected=expected, got=got, do="Check the path.")
    weights, found, digest = load_group(checkpoint, "ema" if ema else "model")
    settings = read_config(config or run / "config.json")
    trained = build_trained(weights, settings, checkpoint, ema=ema, step=found, sha256=digest)
    return replace(trained, checkpoint=checkpoint)


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a run's config.json, or in a YAML or JSON file of the same keys.

    Raises:
        ConfigError: the file is missing or no mapping.
    """
    values = read_mapping(path)
    settings = values.get("settings", values)
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: settings", expected="a mapping", got=repr(settings), do="Correct the file.")
    return {str(key).replace("-", "_"): value for key, value in settings.items()}


def build_trained(
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    source: str | Path,
    *,
    ema: bool,
    step: int | None,
    sha256: str,
) -> Trained:
    """Builds our SiT and loads the weights of a run or of a host, all of them and no others.

    Args:
        weights: by REPA's and SiT's names; those of the aligner are left out.
        settings: ``model`` and ``resolution`` (SiT: ``image_size``); ``cfg_prob`` and ``path_type`` where they are not
            REPA's defaults.
        source: where the weights come from, for messages.
        ema, step, sha256: see :class:`Trained`.

    Raises:
        CheckpointError: our SiT has not these weights.
        ConfigError: a setting is missing, or is one that is not supported.
    """
    named = {_WRAPPERS.sub("", key): value for key, value in weights.items()}
    named = {key: value.detach().float() for key, value in named.items() if not key.startswith(_ALIGNER)}
    name, resolution, path_type = _check_settings(settings, source)
    model = _build(name, named, settings, source)
    side = model.input_shape[-1]
    if resolution not in (side, side * VAE_STRIDE):
        expected = f"{side} (pixels) or {side * VAE_STRIDE} (latents), as the weights say"
        raise ConfigError("resolution", expected=expected, got=resolution, do="Correct the configuration.")
    return Trained(model, name, path_type, resolution, ema, step, sha256, settings)


class ReversedSiT(SiT):
    """SiT's own direction of time (0 is noise, and its velocity data - noise) seen from ours.

    Source: willisma/SiT@947f95b:transport/transport.py.
    """

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, **options: Any) -> Any:
        """As :meth:`SiT.forward`; the projections keep their sign."""
        out = super().forward(x, 1 - t, y, **options)
        return (-out[0], *out[1:]) if isinstance(out, tuple) else -out


def _check_settings(settings: Mapping[str, Any], source: str | Path) -> tuple[str, int, PathType]:
    name = settings.get("model")
    if name not in SIT_MODELS:
        expected = f"model, one of {tuple(SIT_MODELS)}"
        do = f"Name it in a file for --config; another model than these: {USE_THE_HOST}"
        raise ConfigError(str(source), expected=expected, got=repr(name), do=do)
    resolution = settings.get("resolution", settings.get("image_size"))
    if not isinstance(resolution, int) or resolution < 1:
        do = "Name the side of the images in pixels in a file for --config."
        raise ConfigError(str(source), expected="resolution, a number", got=repr(resolution), do=do)
    path = settings.get("path_type", "linear")
    prediction = settings.get("prediction", "v")
    if path not in PATHS or prediction not in ("v", "velocity"):
        expected = f"a path_type of {tuple(PATHS)} and a velocity as prediction"
        raise ConfigError(str(source), expected=expected, got=f"{path!r} and {prediction!r}", do=USE_THE_HOST)
    return name, resolution, PATHS[path]


def _build(name: str, weights: dict[str, Tensor], settings: Mapping[str, Any], source: str | Path) -> SiT:
    sizes = SIT_MODELS[name]
    try:
        channels = weights["x_embedder.proj.weight"].shape[1]
        side = round(weights["pos_embed"].shape[1] ** 0.5) * sizes["patch_size"]
        rows = len(weights["y_embedder.embedding_table.weight"])
        kind: type[SiT] = SiT
        if len(weights["final_layer.linear.bias"]) == 2 * sizes["patch_size"] ** 2 * channels:
            kind, weights = ReversedSiT, _without_sigma(weights, channels)
        heads = [key for key in weights if re.fullmatch(r"projectors\.\d+\.4\.weight", key)]
        overrides: dict[str, Any] = {**sizes}
        if heads:
            overrides["projector_dim"] = len(weights["projectors.0.0.weight"])
    except (KeyError, IndexError, TypeError) as error:
        _refuse(source, f"{len(weights)} others, without {error}")
    drop = settings.get("cfg_prob", 0.1)
    if not isinstance(drop, (int, float)):
        raise ConfigError(f"{source}: cfg_prob", expected="a number", got=repr(drop), do="Correct the configuration.")
    overrides |= {
        "input_size": side,
        "in_channels": channels,
        "num_classes": rows - (drop > 0),
        "class_dropout_prob": drop,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "z_dims": [len(weights[key]) for key in sorted(heads)],
    }
    with torch.device("meta"):  # no time for an initialisation that is overwritten, and no random number
        model = kind(**overrides)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    unlike = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
    if unlike:
        key = unlike[0]
        shapes = f"{given.get(key, 'none')} in place of {wanted.get(key, 'none')}"
        _refuse(source, f"{len(unlike)} that differ, such as {key}: {shapes}", name)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _without_sigma(weights: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The last layer's velocity half; SiT's scripts leave the other one unused."""
    kept = {}
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        both = rearrange(weights[key], "(patch half c) ... -> half patch c ...", half=2, c=channels)
        kept[key] = rearrange(both[0], "patch c ... -> (patch c) ...").contiguous()
    return {**weights, **kept}


def _refuse(source: str | Path, got: str, name: str = "SiT") -> NoReturn:
    expected = f"the weights of REPA's or SiT's {name}, by name and shape"
    raise CheckpointError(str(source), expected=expected, got=got, do=f"Check the configuration. {USE_THE_HOST}")


def _checkpoint_of(run: Path, step: int | None) -> Path:
    root = run / "checkpoints"
    found = latest_checkpoint(root) if step is None else root / f"{step:07d}"
    if found is None or not found.is_dir():
        there = sorted(int(path.name) for path in root.iterdir() if path.name.isdigit())
        expected = "a complete checkpoint" if step is None else f"a checkpoint of step {step}"
        got = f"those of steps {', '.join(map(str, there))}" if there else "none"
        raise CheckpointError(str(root), expected=expected, got=got, do="Choose one by --step, or train on.")
    return found


def _config_beside(file: Path) -> Path:
    beside = file.with_name("config.json")
    if not beside.exists():
        do = "Name a YAML or JSON file with model and resolution by --config."
        raise ConfigError(str(file), expected="a config.json beside it", got="none", do=do)
    return beside


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        do = "Check the path, or write the file again."
        raise CheckpointError(str(path), expected="a file of tensors", got=error, do=do) from error
