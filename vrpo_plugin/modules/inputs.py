"""What the aligner is given: sizes read off a model and an encoder, and the one check of a batch's shapes."""

import logging
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vrpo_plugin.errors import HostNotFoundError, ShapeError, explain

logger = logging.getLogger("vrpo_plugin")


def sizes_of_model(model: nn.Module) -> dict[str, Any]:
    """Keywords of ``VRPOAligner`` that a SiT- or DiT-like model answers.

    Raises:
        HostNotFoundError: the model lacks one of the attributes they are read from.
    """
    try:
        blocks: Any = model.blocks
        embedder: Any = model.x_embedder
        height, width = embedder.img_size
        position: Any = model.pos_embed
        channels: Any = model.in_channels
    except (AttributeError, TypeError) as error:
        raise HostNotFoundError(
            explain(
                type(model).__name__,
                expected="blocks, pos_embed, in_channels and x_embedder.img_size, as SiT and DiT have",
                got=str(error),
                do="Call VRPOAligner(hidden_dim=, depth=, latent_shape=, target_dims=) yourself.",
            )
        ) from error
    return {
        "hidden_dim": position.shape[-1],
        "depth": len(blocks),
        "latent_shape": (channels, height, width),
        "encoder_depth": getattr(model, "encoder_depth", None),
    }


def sizes_of_encoder(encoder: Any) -> dict[str, Any]:
    """Keywords of ``VRPOAligner`` that an encoder (or a sequence of dimensions) answers."""
    if isinstance(encoder, Sequence):
        return {"target_dims": tuple(encoder)}
    dims = getattr(encoder, "dims", None) or (encoder.dim,)
    sizes: dict[str, Any] = {"target_dims": tuple(dims)}
    if getattr(encoder, "grid", None) is not None:
        sizes["token_grid"] = tuple(encoder.grid)
    return sizes


def check_targets(z: tuple[Tensor, ...], target_dims: tuple[int, ...]) -> int:
    """Checks encoder tokens, one (B, N, D) per encoder, and returns B.

    Raises:
        ShapeError: they do not fit.
    """
    dims = tuple(target.shape[-1] for target in z)
    if dims != target_dims or any(target.ndim != 3 or len(target) != len(z[0]) for target in z):
        _mismatch("z", f"one (B, N, D) per encoder, D in {target_dims}", [tuple(target.shape) for target in z])
    return len(z[0])


def check_hidden(hidden: tuple[Tensor, ...], batch: int, layers: tuple[int, ...], hidden_dim: int) -> None:
    """Checks hidden tokens, one (B, N, hidden_dim) per tapped block.

    Raises:
        ShapeError: they do not fit.
    """
    if len(hidden) != len(layers) or any(h.ndim != 3 or len(h) != batch or h.shape[-1] != hidden_dim for h in hidden):
        expected = f"one (B={batch}, N, {hidden_dim}) for each of blocks {layers}"
        _mismatch("hidden", expected, [tuple(h.shape) for h in hidden])


def check_projected(z_tilde: tuple[Tensor, ...], batch: int, target_dims: tuple[int, ...]) -> None:
    """Checks projected tokens, one (B, N, D) per encoder.

    Raises:
        ShapeError: they do not fit.
    """
    dims = tuple(z.shape[-1] for z in z_tilde)
    if dims != target_dims or any(z.ndim != 3 or len(z) != batch for z in z_tilde):
        expected = f"one (B={batch}, N, D) per encoder, D in {target_dims}, with own_projectors=False"
        _mismatch("z_tilde", expected, [tuple(z.shape) for z in z_tilde])


def check_latents(
    batch: int, *, x0: Tensor | None, x_t: Tensor | None, t: Tensor | None, estimate: Tensor | None
) -> None:
    """Checks the latents of the generation readout, (B, C, H, W) all, and the times (B,).

    Raises:
        ShapeError: one is missing or does not fit.
    """
    shape = tuple(x0.shape) if x0 is not None and x0.ndim == 4 else "(B, C, H, W)"
    for name, given in {"x0": x0, "x_t": x_t, "velocity or x0_hat": estimate}.items():
        if given is None or tuple(given.shape) != shape or len(given) != batch:
            _mismatch(name, f"{shape} with B={batch}", None if given is None else tuple(given.shape))
    if t is None or t.shape != (batch,) or not t.is_floating_point():
        got = None if t is None else (tuple(t.shape), t.dtype)
        _mismatch("t", f"({batch},), floating, 0 = data and 1 = noise", got)


def say_group_sizes(batch: int, group_size: int) -> None:
    """Says where a batch does not fill its noise strata."""
    if torch.compiler.is_compiling():
        return
    if batch == 1:
        warnings.warn(
            "vrpo_plugin: a batch of one sample has nothing to be compared with: reward variances stay unknown, "
            'and scale="group" or "batch" gives no gradient. Use a larger batch per process.',
            stacklevel=2,
        )
    elif batch % group_size:
        last = batch if batch < group_size else group_size + batch % group_size
        logger.warning("batch of %d in noise strata of %d: the last one holds %d", batch, group_size, last)


def _mismatch(name: str, expected: str, got: object) -> NoReturn:
    raise ShapeError(explain(name, expected=expected, got=got, do="Pass the tensors of one batch."))
