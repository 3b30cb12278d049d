"""What other files share: the working precision, masks of finite samples, and the resampling of token grids."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vrpo_plugin.errors import DataError, ShapeError

# Lengths under which a vector has no direction worth a gradient: in units of its sample's mean, and at all.
SHORT, SHORTEST = 1e-3, 1e-4


def promote(x: Tensor) -> Tensor:
    """Brings float16, bfloat16 and whole numbers to float32 and leaves float32 and float64 as they are."""
    return x if x.is_floating_point() and x.dtype.itemsize >= 4 else x.float()


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no such numbers (MPS)."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def require_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Refuses a tensor that would be broadcast to another meaning.

    Raises:
        ShapeError: ``x`` has another shape.
    """
    if x.shape != shape:
        raise ShapeError(name, expected=tuple(shape), got=tuple(x.shape), do="Pass tensors of one batch.")


def require_pixels(subject: str, pixels: Tensor, *, first: bool) -> None:
    """Refuses floats that are no pixels in [-1, 1], and warns of pixels in [0, 1].

    Values that are not finite are refused in a first batch alone; later they leave out their sample.

    Args:
        subject: what error messages call it.
        pixels: floating, any shape.
        first: this is the caller's first batch. A device is made to wait for it, and for no later one.

    Raises:
        DataError: values leave [-1, 1] by far: [0, 255], or normalised twice.
    """
    if torch.compiler.is_compiling() or pixels.is_meta or not pixels.numel():
        return
    if not (first or pixels.device.type == "cpu"):
        return
    low, high = (pixels if first else finite_or_zero(pixels)).detach().aminmax()
    if not (low >= -2 and high <= 2):
        raise DataError(
            subject,
            expected="floats in [-1, 1]",
            got=f"values from {low.item():g} to {high.item():g}",
            do="Scale images in [0, 255] by x / 127.5 - 1, once.",
        )
    if first and low >= 0 and high > 0.5:
        warnings.warn(
            f"vrpo_plugin: {subject}: floats in [-1, 1] are expected, and the first batch has none below 0. "
            "If these are pixels in [0, 1], scale them by 2 * x - 1.",
            stacklevel=2,
        )


def square_grid(tokens: int) -> tuple[int, int]:
    """The side lengths of a square grid of ``tokens`` tokens.

    Raises:
        ShapeError: ``tokens`` is no square number.
    """
    side = math.isqrt(max(tokens, 0))
    if side * side != tokens or tokens < 1:
        raise ShapeError(
            "tokens",
            expected="a square number of tokens (prefix tokens already dropped)",
            got=tokens,
            do="Drop cls and register tokens, or give the grid as (height, width).",
        )
    return side, side


def grid_like(tokens: int, sides: tuple[int, int] | None) -> tuple[int, int]:
    """The grid of so many tokens of an image with these sides, whose aspect it has; of a square one where None.

    Raises:
        ShapeError: no grid of that aspect has so many tokens.
    """
    if sides is None or sides[0] == sides[1]:
        return square_grid(tokens)
    common = math.gcd(*sides)
    height, width = sides[0] // common, sides[1] // common
    times = math.isqrt(max(tokens, 0) // (height * width))
    if times < 1 or times * times * height * width != tokens:
        raise ShapeError(
            "tokens",
            expected=f"a grid as high to wide as {sides[0]} to {sides[1]} (prefix tokens already dropped)",
            got=tokens,
            do="Drop cls and register tokens, and give token_grid= and latent_shape= of these images.",
        )
    return times * height, times * width


def resample_tokens(z: Tensor, grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
    """Resamples a token grid bilinearly (antialiased where it shrinks).

    Args:
        z: tokens (B, h * w, D).
        grid: their (h, w).
        target_grid: the wanted (h', w').

    Returns:
        Tokens (B, h' * w', D), in float32 at least; ``z`` itself where the grids agree.

    Raises:
        ShapeError: ``z`` has not h * w tokens, or a grid is empty.
    """
    if z.shape[1] != grid[0] * grid[1] or min(*grid, *target_grid) < 1:
        expected = (
            f"{grid[0]} x {grid[1]}" if min(*grid, *target_grid) > 0 else f"no empty grid, {grid} to {target_grid}"
        )
        raise ShapeError("tokens", expected=expected, got=z.shape[1], do="Give their grid.")
    if grid == target_grid:
        return z
    maps = rearrange(promote(z), "b (h w) d -> b d h w", h=grid[0])
    maps = F.interpolate(maps, size=target_grid, mode="bilinear", antialias=True, align_corners=False)
    return rearrange(maps, "b d h w -> b (h w) d")


def is_finite(x: Tensor) -> Tensor:
    """Where ``x`` is neither NaN nor inf, in half the kernels of ``torch.isfinite``."""
    return x.abs() < torch.inf


def directions(x: Tensor, dim: int, *, eps: float = 1e-12) -> Tensor:
    """``x / max(|x|, eps)`` along ``dim``, with a gradient that is bounded.

    The derivative of a direction is one over the length: an empty token (a padded one, one that underflowed) would
    outweigh all others by many orders, and clipping would leave nothing of them. Vectors that are shorter than
    ``SHORT`` times their sample's mean length, or than ``SHORTEST``, keep their value and get no gradient.

    Args:
        x: vectors (B, ...), in float32 at least.
        dim: along which a vector lies.
        eps: smallest length that is divided by.

    Returns:
        Vectors of length 1, or 0, of the shape of ``x``.
    """
    return _Directions.apply(x, dim, eps)[0]


def cosines(x: Tensor, y: Tensor, dim: int, *, eps: float = 1e-12) -> Tensor:
    """``<x / max(|x|, eps), y / max(|y|, eps)>`` along ``dim``, with the gradient of :func:`directions`.

    Computed in float32 at least. Only the inputs, as they are, and their lengths are kept for the backward pass.

    Args:
        x, y: vectors (B, ...) of one shape, any floating dtype.
        dim: along which a vector lies.
        eps: smallest length that is divided by.

    Returns:
        Cosines of the shape of ``x`` without ``dim``.
    """
    return _Cosines.apply(x, y, dim, eps)[0].squeeze(dim)


def direction_distances(x: Tensor, y: Tensor, dim: int, *, eps: float = 1e-12) -> Tensor:
    """``|x / max(|x|, eps) - y / max(|y|, eps)|^2`` along ``dim``; else as :func:`cosines`."""
    return _DirectionDistances.apply(x, y, dim, eps)[0].squeeze(dim)


class _Directions(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor]:
        length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        return x / length.clamp(min=eps), length

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, float], output: tuple[Tensor, Tensor]) -> None:
        ctx.dim = inputs[1]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        unit, length = ctx.saved_tensors
        across = grad - unit * (grad * unit).sum(ctx.dim, keepdim=True)
        return torch.where(_long_enough(length), across / length, 0), None, None


def _long_enough(length: Tensor) -> Tensor:
    """Of vectors (B, ...): which get a gradient."""
    usual = length.mean(tuple(range(1, length.ndim)), keepdim=True)
    return length > (SHORT * usual).clamp(min=SHORTEST)


class _Cosines(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        length_x, length_y = _length(x, dim, eps), _length(y, dim, eps)
        return (promote(x) * y).sum(dim, keepdim=True) / (length_x * length_y), length_x, length_y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, float], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return None, None, None, None
        return *_gradients(ctx, grad, ctx.saved_tensors[2]), None, None


class _DirectionDistances(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        length_x, length_y = _length(x, dim, eps), _length(y, dim, eps)
        # The difference itself: 2 - 2 cos of two directions that are nearly one would be lost in rounding.
        return (x / length_x - y / length_y).square().sum(dim, keepdim=True), length_x, length_y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, float], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs, output)
        ctx.eps = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return None, None, None, None
        _, _, distance, length_x, length_y = ctx.saved_tensors
        # A vector that counts as 0 has no direction.
        cosine = torch.where(torch.minimum(length_x, length_y) > ctx.eps, 1 - distance / 2, 0)
        return *_gradients(ctx, -2 * grad, cosine), None, None


def _length(x: Tensor, dim: int, eps: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype).clamp(min=eps)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int, float], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:2], *output)


def _gradients(ctx: Any, grad: Tensor, cosine: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """By both vectors, of a function of their cosine: d cos / dx = (y - x cos |y| / |x|) / (|x| |y|)."""
    x, y, _, length_x, length_y = ctx.saved_tensors
    grad = grad / (length_x * length_y)

    def by(own: Tensor, other: Tensor, length: Tensor, length_other: Tensor) -> Tensor:
        across = torch.addcmul(other, own, cosine * length_other / length, value=-1)
        return (torch.where(_long_enough(length), grad, 0) * across).to(own.dtype)

    return (
        by(x, y, length_x, length_y) if ctx.needs_input_grad[0] else None,
        by(y, x, length_y, length_x) if ctx.needs_input_grad[1] else None,
    )


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values (B,) where the mask is True, 0 where it nowhere is."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def finite_samples(*tensors: Tensor) -> Tensor:
    """True (B,) for the samples that hold neither NaN nor inf in any of the tensors (B, ...)."""
    # A sum is finite only if its terms are, and reads the tensor once without a temporary.
    sums = torch.stack([x.detach().flatten(1).sum(1, dtype=torch.float32) for x in tensors])
    return is_finite(sums).all(0)


def zero_unless(sound: Tensor, x: Tensor) -> Tensor:
    """``x`` (B, ...) with zeros for the samples that are not sound, so that no NaN enters a backward pass."""
    return torch.where(sound.reshape(-1, *(1 for _ in x.shape[1:])), x, 0)


def finite_or_zero(x: Tensor) -> Tensor:
    """``x`` with zeros for its numbers that are not finite."""
    return torch.where(is_finite(x), x, 0)


def unused(parameters: Iterable[nn.Parameter], zero: Tensor) -> Tensor:
    """``zero``, with a gradient of 0 for each parameter: DDP waits for all that it knows.

    Sharded parameters, which have no values outside their module's call, are passed over.
    """
    for p in parameters:
        if p.requires_grad and type(p) is nn.Parameter:
            zero = zero + 0 * p.flatten()[:1].sum()
    return zero


def add_gradient(value: Tensor, loss: Tensor) -> Tensor:
    """``value`` with the gradient of ``value + loss``.

    A host then minimises our loss with its own, whatever it multiplies that by (loss scale, accumulation), and
    goes on logging its own.

    Args:
        value: any shape; a host's loss per sample (B,), of which it takes the mean.
        loss: scalar.
    """
    return _AddGradient.apply(value, loss)


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, loss: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.sum().to(ctx.dtype)
