"""What a host codebase is to the plugin: a HostSpec, with its seams and the conversion of its units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vrpo_plugin.modules.checks import sizes_of_model
from vrpo_plugin.patching.fingerprint import SourcePoint
from vrpo_plugin.patching.handle import Seam
from vrpo_plugin.patching.source import Insertion

if TYPE_CHECKING:
    from vrpo_plugin.hosts.compat import Shim
    from vrpo_plugin.hosts.session import Session


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


@dataclass(frozen=True)
class Note:
    """A breakage of the host that a plugin cannot cure, and what its user can do.

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


def sizes_of_repa_model(model: nn.Module) -> dict[str, Any]:
    """Sizes of a model that knows its encoders' dimensions, as REPA's does."""
    return {**sizes_of_model(model), "target_dims": tuple(model.z_dims)}  # type: ignore[arg-type]


def point(file: str, name: str, parameters: str, fingerprints: Mapping[str, str]) -> SourcePoint:
    """A :class:`SourcePoint` with its parameters as one text."""
    return SourcePoint(file, name, tuple(parameters.split()), fingerprints)


def apply_line(name: str) -> str:
    """The one line for a host's script."""
    return f"import vrpo_plugin; vrpo_plugin.apply_vrpo_to_{name}()  # vrpo-plugin"


def _no_seams(session: Session) -> Sequence[Seam]:
    return ()


def _not_called(*_: Any) -> Any:
    raise AssertionError("a spec without a loss method converts in its forward")


@dataclass(frozen=True, kw_only=True)
class HostSpec:
    """A codebase that VRPO can be applied to: seams and conversion of units, no formula.

    Three functions convert. ``read(session, loss, arguments)`` sees the host's loss call (its owner, and its
    arguments by name, which it may replace) and returns what the aligner needs: ``z`` (encoder tokens, a tuple of
    (B, N, D)), ``x0`` (clean latents), ``y``, and any plain value for ``convert``. ``convert(inputs, x, t, output)``
    runs inside the model's forward and returns keywords of ``VRPOAligner.forward``: ``x_t``, ``t`` (0 = data,
    1 = noise), ``x0_hat`` (or ``velocity``, from data to noise), and ``z_tilde`` where the host projects.
    ``write(session, loss, result, aligned)`` puts the aligner's losses into the loss call's result.

    Attributes:
        name: as in ``apply_vrpo(name)``.
        repository: ``owner/name`` on GitHub.
        model: the model's class; its ``__init__`` and ``forward`` are wrapped.
        loss: the wrapped loss method, or None where the model computes its loss itself.
        points: definitions that are verified before anything is replaced.
        read, convert, write: see above.
        hide: what the host's loss sees of the model's output; by default all.
        forward: with ``loss=None``: (session, original forward, model, keywords) to the host's own output.
        installed: called with a model that has just got its aligner.
        sizes: keywords of ``VRPOAligner`` that a model answers.
        folder: of the training scripts, relative to the repository.
        files: relative to ``folder``; all exist in a checkout.
        insertions: the one line, per script.
        blocks: attribute of the model that holds its blocks.
        projects: the host has projectors and an alignment loss of its own, with a weight of its own.
        prefix_tokens: as in ``VRPOAligner``.
        needs_encoder: the plugin has to make the encoder's tokens, from the pixels that the host's VAE sees.
        log_key: a name in the host's logged scalars; ours go beside it.
        seams: more of them, for this host.
        shims: cures of upstream breakages.
        notes: breakages that cannot be cured.
    """

    name: str
    repository: str
    model: SourcePoint
    loss: SourcePoint | None
    convert: Callable[[Mapping[str, Any], Tensor, Tensor, Any], dict[str, Any]]
    read: Callable[[Session, Any, dict[str, Any]], dict[str, Any]] = _not_called
    write: Callable[[Session, Any, Any, Aligned], Any] = _not_called
    points: tuple[SourcePoint, ...] = ()
    hide: Callable[[Session, Any], Any] = lambda session, output: output
    forward: Callable[[Session, Callable[..., Any], nn.Module, dict[str, Any]], Any] | None = None
    installed: Callable[[Session, nn.Module], None] = lambda session, model: None
    sizes: Callable[[nn.Module], dict[str, Any]] = sizes_of_model
    folder: str = "."
    files: tuple[str, ...] = ()
    insertions: tuple[Insertion, ...] = ()
    blocks: str = "blocks"
    projects: bool = False
    needs_encoder: bool = False
    prefix_tokens: int = 0
    log_key: str | None = None
    seams: Callable[[Session], Sequence[Seam]] = _no_seams
    shims: tuple[Shim, ...] = field(default=())
    notes: tuple[Note, ...] = field(default=())

    @property
    def all_points(self) -> tuple[SourcePoint, ...]:
        """Definitions that are verified: the model, the loss, and the rest."""
        return (self.model, *((self.loss,) if self.loss else ()), *self.points)

    @property
    def model_class(self) -> str:
        """Name of the model's class."""
        return self.model.name.rpartition(".")[0]

    @property
    def counted(self) -> tuple[str, ...]:
        """Labels of the seams that every training run passes through: the constructor and the loss."""
        return (f"{self.model_class}.__init__", *((self.loss.name,) if self.loss else ()))
