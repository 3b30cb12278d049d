"""Taps: forward hooks that keep the hidden tokens of chosen blocks until the aligner takes them."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vrpo_plugin.errors import ConfigError, HostNotFoundError
from vrpo_plugin.modules.standstill import WrapperCheck


def resolve_layers(
    layers: Literal["early", "middle", "all"] | Sequence[int], depth: int, *, encoder_depth: int | None = None
) -> tuple[int, ...]:
    """Names of layers to 1-based block numbers, as REPA counts them.

    Args:
        layers: ``early`` (``encoder_depth`` where given, else a third of the depth), ``middle``, ``all``, or
            explicit numbers.
        depth: number of blocks.
        encoder_depth: the host's own aligned block, 1-based.

    Returns:
        Ascending block numbers.

    Raises:
        ConfigError: a block does not exist or is named twice.

    Source: REPA's ``--encoder-depth``; VRPO, arXiv 2606.00583, table 5, for early / middle / all.
    """
    if layers == "all":
        return tuple(range(1, depth + 1))
    if layers == "middle":
        return (max(1, round(depth / 2)),)
    if encoder_depth is not None and not isinstance(encoder_depth, Integral):
        raise ConfigError("encoder_depth", expected="a block number", got=repr(encoder_depth), do="Correct it.")
    early = max(1, round(depth / 3)) if encoder_depth is None else encoder_depth
    chosen = (early,) if layers == "early" else tuple(layers)
    if not chosen or any(not 1 <= i <= depth for i in chosen) or len(set(chosen)) != len(chosen):
        raise ConfigError(
            "layers",
            expected=f"distinct block numbers from 1 to {depth}",
            got=chosen,
            do='Choose such blocks, or "early".',
        )
    return tuple(sorted(chosen))


class Tap:
    """Keeps one block's output. Its hook is a bound method, so that a deep copy of the model has its own."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.armed = False

    def capture(self, module: nn.Module, args: Any, output: Any) -> None:
        # Reentrant checkpointing first runs a block without gradients: such tokens would teach it nothing.
        if self.armed and torch.is_grad_enabled():
            # A block of two streams (SD3's MMDiT) returns (context, image tokens).
            self.hidden, self.armed = output[-1] if isinstance(output, tuple) else output, False

    def __getstate__(self) -> dict[str, Any]:
        # A kept activation is no leaf, and deepcopy refuses those.
        return {"hidden": None, "armed": False}


def _see_hooks_when_compiled() -> None:
    """Makes compiled code notice our hooks.

    torch.compile takes it that hooks never change: code of a model of the same class, or of this one before, would be
    used again without them, and the taps would never fire.
    """
    import torch._dynamo

    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()  # what is compiled from here on looks at hooks


class Taps:
    """The taps of one model.

    They fire only in a call of the model itself with gradients on, so sampling and previews leave nothing
    behind, and only once per call, so that activation checkpointing's second run does not either.

    Args:
        layers: 1-based block numbers.
    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.taps = [Tap() for _ in layers]
        self.wrapper = WrapperCheck()

    def install(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        _see_hooks_when_compiled()
        model.register_forward_pre_hook(self.arm)
        for layer, tap in zip(self.layers, self.taps, strict=True):
            blocks[layer - 1].register_forward_hook(tap.capture)

    def watch_calls(self, model: nn.Module) -> None:
        """Without taps: looks at the model's calls all the same, see :meth:`arm`."""
        _see_hooks_when_compiled()
        model.register_forward_pre_hook(self.arm)

    def uninstall(self, model: nn.Module) -> None:
        owners = {id(self), *(id(tap) for tap in self.taps)}
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [k for k, hook in hooks.items() if id(getattr(hook, "__self__", None)) in owners]:
                    del hooks[key]

    def arm(self, module: nn.Module, args: Any) -> None:
        armed = torch.is_grad_enabled()
        if armed and not torch.compiler.is_compiling():
            self.wrapper.enter(module)
        for tap in self.taps:
            tap.armed, tap.hidden = armed, None

    def take(self) -> tuple[Tensor, ...]:
        """The kept tokens, one (B, N, D) per tap, which are forgotten here.

        Raises:
            HostNotFoundError: a tap has not fired since the last call.
        """
        hidden = tuple(tap.hidden for tap in self.taps if tap.hidden is not None)
        for tap in self.taps:
            tap.armed, tap.hidden = False, None
        if len(hidden) != len(self.taps):
            raise HostNotFoundError(
                "hidden tokens",
                expected=f"blocks {self.layers} to have run with gradients since the last call",
                got=f"{len(hidden)} of {len(self.taps)} taps fired",
                do="Call aligner.attach(model) once, then model(...) before aligner(...), with use_reentrant=False "
                "where activations are checkpointed; or pass hidden=.",
            )
        return hidden
