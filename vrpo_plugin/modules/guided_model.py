"""A guided model with the signature of its host's, for the host's own sampler."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vrpo_plugin.errors import ConfigError
from vrpo_plugin.modules.parametrisation import Parametrisation, of_diffusion, of_path, of_sit_path


class Guide(Protocol):
    """What is asked of a :class:`vrpo_plugin.modules.guide.RewardGuide`."""

    model: Any
    strength: float

    def watch(self) -> AbstractContextManager[list[Tensor]]: ...

    def guide(
        self,
        output: Tensor,
        x_t: Tensor,
        t: Tensor,
        y: Tensor | None,
        hidden: Sequence[Tensor],
        parametrisation: Parametrisation,
    ) -> Tensor: ...


class GuidedModel:
    """Calls the model, then moves its output along the guide's reward; everything else is the model's.

    A call with labels whose second half is the null label is one of classifier-free guidance: the step is taken once,
    on the combined estimate, and added to both halves, so that the host's own combination gives the guided one.

    Args:
        guide: its model is called.
        host: ``repa`` (REPA, iREPA and this package: t = 1 is noise), ``sit`` (SiT: t = 1 is data) or ``dit``.
        path_type: of the training: ``linear`` or ``cosine`` for repa, ``Linear`` or ``GVP`` for sit.
        diffusion: DiT's, as ``create_diffusion`` returned it.
        cfg_scale: of the host's sampler, where that combines the halves itself (REPA).
        null_label: that stands for no class; by default the model's number of classes.

    Raises:
        ConfigError: host or path unknown, a scale below 1, or DiT without its diffusion.
    """

    def __init__(
        self,
        guide: Guide,
        *,
        host: str = "repa",
        path_type: str | None = None,
        diffusion: Any = None,
        cfg_scale: float = 1.0,
        null_label: int | None = None,
    ) -> None:
        if not cfg_scale >= 1:
            raise ConfigError("cfg_scale", expected="at least 1", got=cfg_scale, do="1 is none.")
        self.guide, self.model, self.cfg_scale = guide, guide.model, float(cfg_scale)
        self.parametrisation = _parametrisation(host, path_type, diffusion)
        self.null_label = _null_label(guide.model) if null_label is None else null_label

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet: in the constructor, or in a copy
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's call: (x, t, y) and what else the host passes."""
        return self._guided(self.model, x, t, args, kwargs, self.cfg_scale)

    forward = __call__

    def forward_with_cfg(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """SiT's and DiT's: the model combines the two halves itself, and gives each the result."""
        half = len(x) // 2
        halves = torch.cat([x[:half], x[:half]])  # the second half of x is never read
        return self._guided(self.model.forward_with_cfg, halves, t, args, kwargs, None)

    def _guided(
        self, call: Any, x: Tensor, t: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], scale: float | None
    ) -> Any:
        if self.guide.strength == 0:
            return call(x, t, *args, **kwargs)
        with self.guide.watch() as hidden:
            result = call(x, t, *args, **kwargs)
        output = result[0] if isinstance(result, tuple) else result
        y = kwargs.get("y", args[0] if args else None)
        # DiT's variances, in the second half of the channels, are no part of the estimate.
        value, rest = output[:, : x.shape[1]], output[:, x.shape[1] :]
        if scale is None or self._is_pair(y):
            count = len(x) // 2
            first, second = value[:count], value[count:]
            combined = first if scale is None else second + scale * (first - second)
        else:
            count, combined = len(x), value
        labels = None if y is None else y[:count]
        moved = self.guide.guide(combined, x[:count], t[:count], labels, hidden, self.parametrisation)
        change = moved - combined
        guided = torch.cat([value + torch.cat([change] * (len(x) // count)), rest], 1)
        return (guided, *result[1:]) if isinstance(result, tuple) else guided

    def _is_pair(self, y: Tensor | None) -> bool:
        if self.cfg_scale == 1 or y is None or len(y) % 2:
            return False
        if self.null_label is None:
            do = "Pass null_label=, or cfg_scale=1."
            raise ConfigError("null_label", expected="the label of no class", got=None, do=do)
        return bool((y[len(y) // 2 :] == self.null_label).all())


def _parametrisation(host: str, path_type: str | None, diffusion: Any) -> Parametrisation:
    if host == "repa":
        return of_path(path_type or "linear")  # type: ignore[arg-type]
    if host == "sit":
        return of_sit_path(path_type or "Linear")
    if host != "dit":
        raise ConfigError("host", expected="repa, sit or dit", got=repr(host), do="Choose one of these.")
    if diffusion is None:
        do = "Pass what create_diffusion returned."
        raise ConfigError("diffusion", expected="DiT's diffusion", got=None, do=do)
    return of_diffusion(diffusion)


def _null_label(model: nn.Module) -> int | None:
    own = getattr(model, "null_label", None)
    return own if own is not None else getattr(getattr(model, "y_embedder", None), "num_classes", None)
