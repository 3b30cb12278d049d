"""What the aligner is given: sizes read off a model and an encoder, and the check of what a batch holds."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor, nn

from vrpo_plugin.errors import ConfigError, HostNotFoundError, ShapeError

logger = logging.getLogger("vrpo_plugin")

TIME_SLACK = 1e-3  # of times that low precision or a host's end point has rounded out of [0, 1]


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
            type(model).__name__,
            expected="blocks, pos_embed, in_channels and x_embedder.img_size, as SiT and DiT have",
            got=str(error),
            do="Call VRPOAligner(hidden_dim=, depth=, latent_shape=, target_dims=) yourself.",
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


def check_sizes(
    hidden_dim: Any, target_dims: Any, depth: Any, latent_shape: Any, token_grid: Any, prefix_tokens: Any
) -> tuple[int, ...]:
    """Checks the sizes that an aligner is made of, and returns ``target_dims`` as a tuple.

    Raises:
        ConfigError: one is no size.
    """
    dims = tuple(target_dims) if isinstance(target_dims, Sequence) else ()
    if not _are_sizes((hidden_dim, depth, *dims)) or not dims:
        _refuse("hidden_dim, depth, target_dims", ">= 1", (hidden_dim, depth, target_dims))
    if latent_shape is not None and not _are_sizes(latent_shape, 3):
        _refuse("latent_shape", "(C, H, W), for the critic", latent_shape)
    if token_grid is not None and not _are_sizes(token_grid, 2):
        _refuse("token_grid", "(h, w) or None", token_grid)
    if not (prefix_tokens == 0 or _are_sizes((prefix_tokens,))):
        _refuse("prefix_tokens", "a whole number >= 0", prefix_tokens)
    return dims


@dataclass(frozen=True)
class Given:
    """What one call of the aligner is given."""

    targets: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]
    projected: tuple[Tensor, ...]
    x0: Tensor | None
    x_t: Tensor | None
    t: Tensor | None
    estimate: Tensor | None

    def kind(self) -> tuple[Any, ...]:
        """What checks depend on, but for values."""
        tensors = (*self.targets, *self.tokens, *self.projected, self.x0, self.x_t, self.t, self.estimate)
        return tuple((x.shape, x.dtype, x.requires_grad) if isinstance(x, Tensor) else type(x) for x in tensors)


class CallChecks:
    """Checks the first call with each kind of tensors; later ones cost a look-up. A copy begins afresh.

    Args:
        target_dims: D of each encoder.
        layers: tapped blocks.
        hidden_dim: width of their tokens.
        projects_itself: the host does, and hands over projected tokens.
        generates: there is a generation readout, which needs latents and times.
    """

    def __init__(
        self,
        target_dims: tuple[int, ...],
        layers: tuple[int, ...],
        hidden_dim: int,
        *,
        projects_itself: bool,
        generates: bool,
    ) -> None:
        self.target_dims, self.layers, self.hidden_dim = target_dims, layers, hidden_dim
        self.projects_itself, self.generates = projects_itself, generates
        self.seen: set[Any] = set()

    def is_new(self, given: Given) -> bool:
        """Whether this kind was not checked. While compiling always: the checks then leave no code behind."""
        return torch.compiler.is_compiling() or given.kind() not in self.seen

    def check(self, given: Given, dtype: torch.dtype | None) -> None:
        """Checks shapes, and of the first times their values.

        Args:
            given: of the call.
            dtype: of the projectors, where there are any.

        Raises:
            ShapeError: they do not fit together.
            ConfigError: times outside [0, 1].
        """
        batch = check_targets(given.targets, self.target_dims)
        if given.tokens:
            assert dtype is not None
            check_hidden(given.tokens, batch, self.layers, self.hidden_dim, dtype)
        if self.projects_itself:
            check_projected(given.projected, batch, self.target_dims)
        if self.generates:
            check_latents(batch, x0=given.x0, x_t=given.x_t, t=given.t, estimate=given.estimate)
            assert given.t is not None
            if (given.t.dtype, given.t.device) not in self.seen:  # values are read once, not for every batch size
                check_times(given.t)

    def remember(self, given: Given) -> None:
        """Takes this kind as checked. Not while compiling: a changed attribute would compile it all again."""
        self.seen |= {given.kind()} if given.t is None else {given.kind(), (given.t.dtype, given.t.device)}


def check_targets(z: tuple[Tensor, ...], target_dims: tuple[int, ...]) -> int:
    """Checks encoder tokens, one (B, N, D) per encoder, and returns B.

    Raises:
        ShapeError: they do not fit.
    """
    batch = len(z[0]) if z and _is_tokens(z[0]) else 0
    if not _are_tokens(z, batch, target_dims):
        do = "D is the encoder's dimension: target_dims= of the aligner."
        _mismatch("z", f"one (B, N, D) per encoder, D in {target_dims}", [described(target) for target in z], do)
    return batch


def check_hidden(
    hidden: tuple[Tensor, ...], batch: int, layers: tuple[int, ...], hidden_dim: int, dtype: torch.dtype
) -> None:
    """Checks hidden tokens, one (B, N, hidden_dim) per tapped block, of the projectors' ``dtype``.

    Raises:
        ShapeError: they do not fit.
    """
    if not _are_tokens(hidden, batch, (hidden_dim,) * len(layers)):
        expected = f"one (B={batch}, N, {hidden_dim}) for each of blocks {layers}"
        _mismatch("hidden", expected, [described(h) for h in hidden], "Call the model and the aligner by turns.")
    other = {h.dtype for h in hidden} - {dtype}
    # Autocast levels them, but leaves float64 as it is.
    if other and (torch.float64 in (dtype, *other) or not torch.is_autocast_enabled(hidden[0].device.type)):
        do = "Call the aligner inside the model's torch.autocast, or cast the two to one dtype."
        _mismatch("hidden", f"{dtype} like the projectors, or autocast", [h.dtype for h in hidden], do)


def check_projected(z_tilde: tuple[Tensor, ...], batch: int, target_dims: tuple[int, ...]) -> None:
    """Checks projected tokens, one (B, N, D) per encoder.

    Raises:
        ShapeError: they do not fit.
    """
    if not _are_tokens(z_tilde, batch, target_dims):
        expected = f"one (B={batch}, N, D) per encoder, D in {target_dims}, with own_projectors=False"
        _mismatch("z_tilde", expected, [described(z) for z in z_tilde])


def check_latents(
    batch: int, *, x0: Tensor | None, x_t: Tensor | None, t: Tensor | None, estimate: Tensor | None
) -> None:
    """Checks the latents of the generation readout, (B, C, H, W) all, and the times (B,).

    Raises:
        ShapeError: one is missing or does not fit.
    """
    shape = tuple(x0.shape) if isinstance(x0, Tensor) and x0.ndim == 4 else "(B, C, H, W)"
    for name, given in {"x0": x0, "x_t": x_t, "velocity or x0_hat": estimate}.items():
        if not _is_floating(given) or tuple(given.shape) != shape or len(given) != batch:
            _mismatch(name, f"{shape} with B={batch}", described(given), _latent_advice(given, x0))
    if not _is_floating(t) or t.shape != (batch,):
        got = (tuple(t.shape), t.dtype) if isinstance(t, Tensor) else t
        _mismatch("t", f"({batch},), floating, 0 = data and 1 = noise", got)


def check_times(t: Tensor) -> None:
    """Refuses times outside [0, 1], which a batch of whole timesteps or of another convention has. Reads them back.

    Raises:
        ConfigError: a finite time is outside.
    """
    if torch.compiler.is_compiling() or t.is_meta:
        return
    inside = (t >= -TIME_SLACK) & (t <= 1 + TIME_SLACK)
    if not holds((inside | ~torch.isfinite(t)).all()):
        expected, got = "times in [0, 1], 0 = data and 1 = noise", f"{t.min().item():g} to {t.max().item():g}"
        do = "Divide timesteps by their number, and pass 1 - t where the model's time runs from noise to data."
        raise ConfigError("t", expected=expected, got=got, do=do)


def holds(condition: Tensor) -> bool:
    """Whether a condition (0-dim) holds. A device is made to wait: for first calls."""
    if condition.device.type != "cpu":
        return bool(condition)
    try:
        torch._assert_async(condition)  # on the CPU there is nothing to wait for, and nothing is read back
    except RuntimeError:
        return False
    return True


def warn_without_gradient(estimate: Tensor | None) -> None:
    """Warns of a prediction that leads to no model: the rewards would teach nobody."""
    if isinstance(estimate, Tensor) and not estimate.requires_grad:
        warnings.warn(
            "vrpo_plugin: velocity (or x0_hat) has no gradient, so the rewards reach no model. Pass the model's output "
            "as it is, made with gradients and not detached; or call aligner.eval() to measure only.",
            stacklevel=3,
        )


def described(x: object) -> object:
    """A tensor's shape, and what is wrong with its dtype; or what stands in its place."""
    if not isinstance(x, Tensor):
        return None if x is None else type(x).__name__
    return tuple(x.shape) if x.is_floating_point() else f"{tuple(x.shape)} of {x.dtype}, not floating"


def _is_floating(x: Any) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.is_floating_point()


def _is_tokens(x: Any) -> bool:
    return _is_floating(x) and x.ndim == 3 and x.shape[1] > 0


def _are_tokens(given: tuple[Any, ...], batch: int, dims: tuple[int, ...]) -> bool:
    """One (B, N, D) for each D."""
    return len(given) == len(dims) and all(
        _is_tokens(x) and len(x) == batch > 0 and x.shape[-1] == dim for x, dim in zip(given, dims, strict=True)
    )


def _are_sizes(given: Any, count: int | None = None) -> bool:
    return (
        isinstance(given, Sequence)
        and (count is None or len(given) == count)
        and all(isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= 1 for x in given)
    )


def _latent_advice(given: object, x0: object) -> str:
    if not (isinstance(given, Tensor) and isinstance(x0, Tensor)) or given.ndim != 4 or x0.ndim != 4:
        return ""
    if given.shape[1] == 2 * x0.shape[1]:
        return "Of a model that predicts a variance too, pass the first half: output.chunk(2, dim=1)[0]."
    return ""


def _refuse(name: str, expected: str, got: object) -> NoReturn:
    raise ConfigError(name, expected=expected, got=repr(got), do="Correct it.")


def _mismatch(name: str, expected: str, got: object, do: str = "") -> NoReturn:
    raise ShapeError(name, expected=expected, got=got, do=f"Pass the tensors of one batch. {do}".rstrip())
