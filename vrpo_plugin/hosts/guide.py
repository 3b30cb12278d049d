"""``guide.safetensors`` from a host's checkpoint: the projectors and the critic of its aligner."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vrpo_plugin.errors import CheckpointError
from vrpo_plugin.hosts.checkpoint import check_new_file, read_checkpoint
from vrpo_plugin.modules.critic import LatentCritic, fold_of
from vrpo_plugin.modules.guide_parts import GuideParts, build_critic, group, load_critic
from vrpo_plugin.modules.taps import resolve_layers

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
_CRITIC = "vrpo.generation.critic."


def export_guide(
    source: Path,
    out: Path,
    *,
    critic: Path | None = None,
    layers: Sequence[int] | None = None,
    overwrite: bool = False,
) -> GuideParts:
    """Writes what :class:`vrpo_plugin.RewardGuide` needs of a checkpoint.

    Args:
        source: the host's .pt file, of a run with the plugin, or of REPA's own with its projectors.
        out: the file to write, .safetensors.
        critic: a file of ``vrpo train-critic``; by default the checkpoint's own.
        layers: 1-based blocks that the projectors read; by default the script's ``--encoder-depth``, else a third of
            the depth, as ``layers="early"``.
        overwrite: replace a file that is there.

    Returns:
        What was written.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or has no projectors or no critic; ``out`` exists, has
            another ending, or cannot be written.
        ConfigError: the layers do not fit the projectors.
    """
    check_new_file(source, out, (".safetensors",), overwrite=overwrite)
    checkpoint = read_checkpoint(source)
    parts = guide_parts(checkpoint, str(source), critic, layers)
    try:
        parts.save(out)
    except OSError as error:
        do = "Give a folder that exists and has room."
        raise CheckpointError(str(out), expected="a file that can be written", got=error, do=do) from error
    return parts


def guide_parts(
    checkpoint: Mapping[str, Any], name: str, critic_file: Path | None, layers: Sequence[int] | None
) -> GuideParts:
    """The parts in a checkpoint; see :func:`export_guide`."""
    weights = _weights(checkpoint)
    prefix, shape = _latents(weights, name)
    record: dict[str, Any] = {}
    if critic_file is not None:
        critic, record = load_critic(critic_file)
        if critic.latent_shape != shape:
            do = "Give the critic of this run's latents."
            raise CheckpointError(str(critic_file), expected=f"a critic of {shape}", got=critic.latent_shape, do=do)
    else:
        critic = _own_critic(weights, shape, name)
    own = group(weights, "vrpo.projectors.") or group(weights, "projectors.")
    if not own:
        do = "Export the guide of a run that aligns features (features='policy', or REPA's own)."
        raise CheckpointError(name, expected="projectors", got="none", do=do)
    chosen = tuple(layers) if layers else (_early(checkpoint, weights),)
    return GuideParts.of_weights(critic, own, chosen, prefix, record, do="Name the blocks: --guide-layers 4,8.")


def _weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The EMA's, and the aligner's of the last step: a patched host's EMA holds none (``HostAligner``)."""
    model, ema = (
        {_WRAPPERS.sub("", key): value for key, value in checkpoint[part].items()} for part in ("model", "ema")
    )
    return {key: value for key, value in model.items() if key.startswith("vrpo.")} | ema


def _latents(weights: Mapping[str, Tensor], name: str) -> tuple[int, tuple[int, int, int]]:
    """Tokens before the grid, and the shape of the latents, which are square in all hosts."""
    try:
        tokens = weights["pos_embed"].shape[1]
        channels, patch = weights["x_embedder.proj.weight"].shape[1:3]
    except KeyError as error:
        do = "Export from a SiT- or DiT-like host's checkpoint, or use RewardGuide.save."
        raise CheckpointError(name, expected="pos_embed and x_embedder in 'ema'", got=f"no {error}", do=do) from error
    side = math.isqrt(tokens)
    return tokens - side**2, (channels, side * patch, side * patch)


def _own_critic(weights: Mapping[str, Tensor], shape: tuple[int, int, int], name: str) -> LatentCritic:
    own = group(weights, _CRITIC)
    if not own:
        do = "Give one: --guide-critic critic.safetensors, made by 'vrpo train-critic' for the same encoder."
        raise CheckpointError(name, expected="a critic", got="none", do=do)
    heads = [own[f"heads.{i}.weight"] for i in range(sum(key.endswith(".weight") for key in group(own, "heads.")))]
    halvings = len({key.split(".")[0] for key in group(own, "down.")})
    grid = shape[1] // fold_of(shape[1], shape[2]) // 2**halvings
    sizes = {
        "latent_shape": shape,
        "target_dims": [len(head) for head in heads],
        "token_grid": (grid, grid),
        "width": heads[0].shape[1],
    }
    try:
        return build_critic(sizes, own)
    except RuntimeError as error:
        do = "Give the critic's file with --guide-critic."
        raise CheckpointError(name, expected=f"a critic of {sizes}", got=str(error)[:200], do=do) from error


def _early(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor]) -> int:
    depth = getattr(checkpoint.get("args"), "encoder_depth", None)
    if depth is not None:
        return int(depth)
    blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
    return resolve_layers("early", len(blocks))[0]
