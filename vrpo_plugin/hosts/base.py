"""What a host codebase is to the plugin (:class:`HostSpec`), and the state of one application (:class:`Session`).

Neither imports torch, so that ``vrpo check`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from vrpo_plugin._moved import renamed_keywords
from vrpo_plugin.config import VRPOConfig
from vrpo_plugin.hosts.options import HostOptions
from vrpo_plugin.patching.fingerprint import SourcePoint
from vrpo_plugin.patching.handle import Hook, PatchHandle, Seam
from vrpo_plugin.patching.source import Insertion

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vrpo_plugin.encoders import Targets
    from vrpo_plugin.hosts.guard import HostGuard
    from vrpo_plugin.hosts.metrics import Tracker

logger = logging.getLogger("vrpo_plugin")


@dataclass(frozen=True)
class Aligned:
    """What the aligner returned for one call of the host's model.

    Attributes:
        features: scalar, in the place of the host's alignment loss, not yet weighted; None where the host's own
            stays.
        extra: scalar, all the rest, weighted: to be minimised with the host's denoising loss.
        metrics: log name to scalar.
    """

    features: Tensor | None
    extra: Tensor
    metrics: dict[str, Tensor]

    def add_to(self, loss: Tensor) -> Tensor:
        """The host's loss of any shape with the gradient of ``extra``, and with the value that it had."""
        from vrpo_plugin.functional.tensors import add_gradient

        return add_gradient(loss, self.extra)


@dataclass(frozen=True)
class Note:
    """A breakage of the host that a plugin cannot work around, and what its user can do.

    Attributes:
        file: of the host, relative to its folder.
        when: what the user does when it breaks.
        do: the one line to change.
        issue: where it is reported, or where it stands in the source.
    """

    file: str
    when: str
    do: str
    issue: str


@dataclass(frozen=True)
class LibrarySeam:
    """A method of a library, replaced for the whole process until the handle is removed.

    Attributes:
        module: where its class is imported from.
        point: file in the installed package, name and parameters; compared before anything is replaced.
        why: what it is replaced for.
        wrap: (session, original) to the replacement.
        owner: the class, where it inherits the method.
        needed: False leaves it alone.
    """

    module: str
    point: SourcePoint
    why: str
    wrap: Callable[[Session, Any], Any]
    owner: str = ""
    needed: Callable[[], bool] = lambda: True

    @property
    def label(self) -> str:
        """``accelerate.Accelerator.log``."""
        owner, _, name = self.point.name.rpartition(".")
        return f"{self.module}.{self.owner or owner}.{name}"

    def seam(self, session: Session) -> Seam:
        """The seam of one application; imports the library."""
        module, owner, name = self.label.rsplit(".", 2)
        cls = getattr(importlib.import_module(module), owner)
        return Seam(cls, name, lambda original: self.wrap(session, original), self.label)


def _nothing(*_: Any) -> Sequence[Any]:
    return ()


@dataclass(frozen=True)
class Shim:
    """A workaround for one upstream breakage.

    Attributes:
        name: to switch it off: ``compat=`` lists those to keep.
        issue: where the breakage is reported, or stands.
        reason: what breaks, and what this does.
        until: when it can go.
        verified: definitions it relies on; where one differs the shim is left out, with a warning.
        seams: (session, shim) to what it replaces in the host.
        hooks: (session, shim) to what it adds.
        libraries: what it replaces in libraries.
        fix_constructor: (session, shim, keywords) changes the keywords of the model's constructor.
        fix_arguments: (session, shim, arguments) changes what the script's argument parser returned.
    """

    name: str
    issue: str
    reason: str
    until: str
    verified: tuple[SourcePoint, ...] = ()
    seams: Callable[[Session, Shim], Sequence[Seam]] = _nothing
    hooks: Callable[[Session, Shim], Sequence[Hook]] = _nothing
    libraries: tuple[LibrarySeam, ...] = ()
    fix_constructor: Callable[[Session, Shim, dict[str, Any]], None] | None = None
    fix_arguments: Callable[[Session, Shim, argparse.Namespace], None] | None = None

    def used(self, session: Session) -> None:
        """Reports, once, that the host would have failed here."""
        if self.name not in session.reported:
            session.reported.add(self.name)
            logger.warning("vrpo_plugin compat %s: %s (%s)", self.name, self.reason, self.issue)


@dataclass(eq=False)
class Session:
    """State of one application; the module tree of the host holds only the aligner.

    Attributes:
        modules: the host's modules by file, as imported from its folder.
        idle: nothing is changed (``reward_coeff=0`` and ``features="host"``): no aligner is made.
        guard: leaves out steps that are not finite.
        tracker: the newest metrics.
        targets: where the encoder's tokens come from, where it is not the host's encoder.
        shims: those that are on.
        total_calls: of the aligner in this run, where the host says it.
        earlier_calls: that a resumed run has made, with an aligner or without.
        cache: of the host's own conversion: constants on the device.
        aligner_parameters, model_parameters: ``id`` of each.
        reported: names of shims that were reported.
    """

    spec: HostSpec
    config: VRPOConfig
    options: HostOptions
    handle: PatchHandle
    modules: Mapping[str, ModuleType]
    idle: bool
    guard: HostGuard
    tracker: Tracker
    targets: Targets | None = None
    shims: tuple[Shim, ...] = ()
    total_calls: int | None = None
    earlier_calls: int = 0
    cache: dict[str, Any] = field(default_factory=dict)
    aligner_parameters: set[int] = field(default_factory=set)
    model_parameters: set[int] = field(default_factory=set)
    reported: set[str] = field(default_factory=set)

    @property
    def model_class(self) -> Any:
        """The host's model class."""
        return getattr(self.modules[self.spec.model.file], self.spec.model_class)

    @property
    def encoder(self) -> str:
        """Where encoder tokens come from in this application, as ``HostSpec.encoder``."""
        return "critic" if self.config.targets == "critic" else self.spec.encoder

    @property
    def replaces_features(self) -> bool:
        """The host's own alignment loss is not run."""
        return self.config.features != "host"

    @property
    def uses_host_projectors(self) -> bool:
        """The features readout takes the host's projected tokens: one early block, a plain projector."""
        return self.spec.has_alignment_loss and self.config.layers == "early" and self.config.projector == "mlp"


def point(file: str, name: str, parameters: str, fingerprints: Mapping[str, str] | None = None) -> SourcePoint:
    """A :class:`SourcePoint` with its parameters as one text."""
    return SourcePoint(file, name, tuple(parameters.split()), fingerprints or {})


def apply_line(name: str) -> str:
    """The one line for a script of a host: by name, or of your own as ``module:NAME`` or ``file.py:NAME``."""
    call = f"apply_vrpo({name!r})" if ":" in name else f"apply_vrpo_to_{name}()"
    return f"import vrpo_plugin; vrpo_plugin.{call}  # vrpo-plugin"


def sizes_of_model(model: nn.Module) -> dict[str, Any]:
    """Sizes of a SiT-like model, as keywords of ``VRPOAligner``."""
    from vrpo_plugin.modules.checks import sizes_of_model

    return sizes_of_model(model)


def _not_called(*_: Any) -> Any:
    raise AssertionError("a spec with own_forward has no loss method")


@renamed_keywords(
    {
        "read": "before_loss",
        "convert": "in_forward",
        "hide": "show_to_loss",
        "write": "after_loss",
        "installed": "after_init",
        "projects": "has_alignment_loss",
        "points": "verified",
    }
)
@dataclass(frozen=True, kw_only=True)
class HostSpec:
    """A codebase that VRPO can be applied to: where to attach, and the conversion of units; no formula.

    When each function runs, in one training step of the host::

        the host's script                    the plugin
        args = parser.parse_args()           read_arguments(session, args)
        model = Model(...)                   sizes(model); the aligner is made and attached; after_init(session, model)
        loss_fn(model, images, ...)          before_loss(session, loss, arguments)    -> inputs
          model(x_t, t, ...)
            forward(x_t, t, ...)             in_forward(inputs, x_t, t, output)       -> keywords; the aligner runs
          output                             show_to_loss(session, output)            -> output
        result                               after_loss(session, loss, result, aligned) -> result
        loss.backward()
        optimizer.step()                     a step that is not finite is left out

    Outside of training (no gradients, ``model.eval()``, the EMA copy) the host's own loss and forward run alone.

    Attributes:
        name: as in ``apply_vrpo(name)``.
        repository: ``owner/name`` on GitHub.
        model: ``Class.forward`` of the model; its ``__init__`` is wrapped too.
        loss: the wrapped loss method, with a parameter ``model``; None where the model computes its loss itself.
        verified: further definitions that are compared with the verified commits before anything is replaced.
        before_loss: sees the host's loss call, its owner and its arguments by name, which it may replace; returns
            ``x0`` (clean latents), ``y`` (labels), with ``encoder="host"`` also ``z`` (encoder tokens, a tuple of
            (B, N, D)), and any plain value for ``in_forward``.
        in_forward: returns keywords of ``VRPOAligner.forward``: ``x_t``, ``t`` (0 = data, 1 = noise), ``velocity``
            (from data to noise) or ``x0_hat``, and ``z_tilde`` where the host projects. For other units give ``path``
            too, and they are converted: see ``hosts.units.to_aligner``.
        show_to_loss: what the host's loss sees of the model's output; by default all.
        after_loss: puts the aligner's losses into the loss call's result.
        own_forward: with ``loss=None``, (session, align, original forward, model, keywords) to the forward's result;
            calls ``align(model, inputs, t, output)`` itself.
        after_init: called with a model that has just got its aligner.
        read_arguments: called with what the script's argument parser returned.
        sizes: keywords of ``VRPOAligner`` that a model answers.
        folder: of the training scripts, relative to the repository.
        insertions: the one line, per script.
        blocks: attribute of the model that holds its blocks.
        has_alignment_loss: the host has projectors and an alignment loss of its own, with a weight of its own.
        encoder: where encoder tokens come from: ``host`` (``before_loss`` returns them), ``pixels`` (the plugin's
            frozen encoder, on what the host's VAE encodes) or ``critic`` (a pretrained critic in place of an encoder).
        encoder_loader: of a host with an encoder: its function that loads it, by REPA's contract. With
            ``targets="critic"`` it is replaced, and no encoder is loaded. None: that setting is refused.
        needs_encoder: why that setting is refused.
        prefix_tokens: as in ``VRPOAligner``.
        log_key: a name in the host's logged scalars; ours go beside it.
        seams: session to further replacements in the host.
        libraries: methods of libraries that are replaced.
        shims: workarounds for upstream breakages.
        notes: breakages without a workaround.
    """

    name: str
    repository: str
    model: SourcePoint
    loss: SourcePoint | None
    in_forward: Callable[[Mapping[str, Any], Any, Any, Any], dict[str, Any]]
    before_loss: Callable[[Session, Any, dict[str, Any]], dict[str, Any]] = _not_called
    after_loss: Callable[[Session, Any, Any, Aligned], Any] = _not_called
    verified: tuple[SourcePoint, ...] = ()
    show_to_loss: Callable[[Session, Any], Any] = lambda session, output: output
    own_forward: Callable[[Session, Callable[..., Aligned], Callable[..., Any], Any, dict[str, Any]], Any] | None = None
    after_init: Callable[[Session, Any], None] = lambda session, model: None
    read_arguments: Callable[[Session, argparse.Namespace], None] | None = None
    sizes: Callable[[Any], dict[str, Any]] = sizes_of_model
    folder: str = "."
    insertions: tuple[Insertion, ...] = ()
    blocks: str = "blocks"
    has_alignment_loss: bool = False
    encoder: Literal["host", "pixels", "critic"] = "host"
    encoder_loader: SourcePoint | None = None
    needs_encoder: str = "its script loads and runs its encoder, and nothing here says how to leave it out"
    prefix_tokens: int = 0
    log_key: str | None = None
    seams: Callable[[Session], Sequence[Seam]] = _nothing
    libraries: tuple[LibrarySeam, ...] = ()
    shims: tuple[Shim, ...] = ()
    notes: tuple[Note, ...] = ()

    @property
    def points(self) -> tuple[SourcePoint, ...]:
        """All definitions that are compared: the model, the loss, and the rest."""
        return (self.model, *((self.loss,) if self.loss else ()), *self.verified)

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the host with such a definition, relative to ``folder``."""
        return tuple(dict.fromkeys(one.file for one in self.points))

    @property
    def model_class(self) -> str:
        """Name of the model's class."""
        return self.model.name.rpartition(".")[0]

    @property
    def must_run(self) -> tuple[str, ...]:
        """Labels of the seams that every training run passes through: the constructor and the loss."""
        return (f"{self.model_class}.__init__", *((self.loss.name,) if self.loss else ()))
