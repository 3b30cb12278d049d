"""Feature networks of an evaluation: torch-fidelity's Inception, our small networks, timm encoders."""

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vrpo_plugin.encoders import weights_hash
from vrpo_plugin.errors import CheckpointError, ConfigError, ShapeError, WeightsNotFoundError
from vrpo_plugin.standalone.features import timm_features
from vrpo_plugin.standalone.small_network import load_small_features

INCEPTION = "inception"
POOL, SPATIAL, LOGITS = "pool", "spatial", "logits"
SPATIAL_CHANNELS = 7
ENCODER_RESOLUTION = 256  # smaller images are resized: an encoder with patches of 14 sees at least 224 pixels
RUN_NETWORK = "evaluation_network.safetensors"  # in the folder of a run of the example


@dataclass(frozen=True, eq=False)
class Extractor:
    """A frozen network that turns images into the features of an evaluation.

    Attributes:
        name: of the network, with a hash of its weights; goes into evaluation records.
        parts: images uint8 (B, 3, S, S) -> features per part, each (B, D) in float32: ``pool`` for every network;
            Inception also gives ``spatial`` (2,023 values, for sFID) and ``logits`` (1,008, for IS).
        resolution: side of the images that it takes, in pixels; None where it resizes them itself.
    """

    name: str
    parts: Callable[[Tensor], dict[str, Tensor]]
    resolution: int | None = None


def open_extractor(spec: str, *, resolution: int, device: str | torch.device = "cpu") -> Extractor:
    """Opens a feature network.

    Args:
        spec: ``inception`` (downloaded by torch-fidelity, if it is not in torch's cache), ``inception=FILE``, the
            file of a small network (``NAME.safetensors``), the folder of a run of the example that evaluated with one,
            a timm model or REPA's name of one, or ``NAME=FILE`` with local weights.
        resolution: side of the images in pixels.
        device: where to compute.

    Returns:
        The network.

    Raises:
        ConfigError: torch-fidelity is not installed, the name is unknown, or the network takes another resolution.
        WeightsNotFoundError: no such file, or no network for a download.
        CheckpointError: the file does not hold the network's weights.
    """
    name, _, file = spec.partition("=")
    if name == INCEPTION:
        return inception(file or None, device=device)
    if Path(spec).is_dir():
        spec = str(Path(spec) / RUN_NETWORK)
    if Path(spec).is_file() or (Path(spec).suffix == ".safetensors" and not file):
        return _small(spec, resolution, device)
    side = max(resolution, ENCODER_RESOLUTION)
    network = timm_features(name, resolution=side, checkpoint=file or None, device=device)
    return Extractor(network.name, lambda images: {POOL: network(images.to(device))})


def _small(path: str, resolution: int, device: str | torch.device) -> Extractor:
    network = load_small_features(path).to(device)
    if network.resolution != resolution:
        got, do = f"{resolution}x{resolution}", "Give a network that was trained on images of this size."
        expected = f"images of {network.resolution}x{network.resolution} pixels, which it was trained on"
        raise ConfigError(path, expected=expected, got=got, do=do)

    def parts(images: Tensor) -> dict[str, Tensor]:
        images = images.to(device)
        if network.channels == 1:
            if not (torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])):
                do = "Give a network that was trained on colour images."
                raise ShapeError(path, expected="grey images, which it was trained on", got="colour", do=do)
            images = images[:, :1]
        return {POOL: network(images)}

    return Extractor(network.name, parts, network.resolution)


def inception(weights: str | Path | None = None, *, device: str | torch.device = "cpu") -> Extractor:
    """Inception-v3 of 2015 with TensorFlow's resizing and pooling, as torch-fidelity rebuilt it.

    ``pool`` are the 2,048 values of its last pooling; ``spatial`` the first 7 channels of the convolution that ADM
    calls ``mixed_6/conv``, 17 x 17 positions, in ADM's order; ``logits`` those of its last layer without bias.

    Args:
        weights: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``; None takes it from torch's cache, or
            downloads it there, which is said first.
        device: where to compute.

    Returns:
        The network, in float32.

    Raises:
        ConfigError: torch-fidelity is not installed.
        WeightsNotFoundError: no such file, or the download failed.
        CheckpointError: the file does not hold its weights.

    Source: Szegedy et al., arXiv 1512.00567; layers of openai/guided-diffusion@22e0df8:evaluations/evaluator.py.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as theirs
    except ImportError as error:
        raise ConfigError(
            INCEPTION,
            expected="the package torch-fidelity",
            got="it is not installed",
            do="pip install 'vrpo-plugin[eval]', or give another feature network by --network.",
        ) from error
    path = _inception_file(theirs.URL_INCEPTION_V3) if weights is None else Path(weights)
    state = _inception_state(path)
    model = _build(theirs, path).to(device)

    found: dict[str, Tensor] = {}

    def keep(_module: Any, _inputs: Any, output: Tensor) -> None:
        found[SPATIAL] = rearrange(output[:, :SPATIAL_CHANNELS], "b c h w -> b (h w c)").float()

    model.Mixed_6d.branch1x1.register_forward_hook(keep)

    def parts(images: Tensor) -> dict[str, Tensor]:
        pool, logits = model(images.to(device))
        return {POOL: pool, SPATIAL: found.pop(SPATIAL), LOGITS: logits}

    return Extractor(f"{INCEPTION}-{weights_hash(state)}", parts)


def _build(theirs: Any, path: Path) -> Any:
    try:
        with redirect_stdout(sys.stderr), torch.random.fork_rng(devices=[]):
            return theirs.FeatureExtractorInceptionV3(
                INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
    except RuntimeError as error:  # load_state_dict: keys or shapes differ
        raise _no_inception(path, str(error).split("\n")[0]) from error


def _inception_state(path: Path) -> dict[str, Tensor]:
    """The weights, read without running what a pickle may hold; torch-fidelity reads the file again without care."""
    if not path.is_file():
        expected, do = "a file", "Name the file that holds torch-fidelity's Inception weights."
        raise WeightsNotFoundError(INCEPTION, expected=expected, got=f"none at {path}", do=do)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle errors have no common class
        raise _no_inception(path, f"{type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _no_inception(path, f"a {type(state).__name__}")
    return state


def _no_inception(path: Path, got: str) -> CheckpointError:
    do = "Download the file again; a file of torchvision or of ADM holds another network."
    return CheckpointError(str(path), expected="torch-fidelity's Inception weights", got=got, do=do)


def _inception_file(url: str) -> Path:
    """Where the weights are after a download, which is announced."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    # Here, and not in the command alone: whoever evaluates by our functions learns of it too.
    sys.stderr.write(f"Downloading Inception weights (91 MiB) from {url} to {path}\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1], progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError) as error:
        raise WeightsNotFoundError(
            INCEPTION,
            expected="Inception weights",
            got=f"a failed download: {error}",
            do=f"Download {url} elsewhere and pass it by --inception FILE, or give another network by --network.",
        ) from error
    return path


def open_extractors(specs: Sequence[str], *, resolution: int, device: str | torch.device) -> list[Extractor]:
    """Opens feature networks; see :func:`open_extractor`.

    Raises:
        ConfigError: a network is given twice.
    """
    opened = [open_extractor(spec, resolution=resolution, device=device) for spec in specs]
    names = [one.name for one in opened]
    if len(set(names)) < len(names):
        raise ConfigError("--network", expected="different networks", got=", ".join(names), do="Name each once.")
    return opened
