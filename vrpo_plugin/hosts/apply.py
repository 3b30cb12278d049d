"""Applies VRPO to a host whose modules can be imported: verify everything, then replace everything."""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.optim import Optimizer, optimizer

from vrpo_plugin.config import VRPOConfig, check_keys
from vrpo_plugin.errors import HostNotFoundError
from vrpo_plugin.hosts.base import HostSpec, Session, Shim
from vrpo_plugin.hosts.checks import changes_nothing, check_settings
from vrpo_plugin.hosts.compat import selected
from vrpo_plugin.hosts.guard import HostGuard, make_fused
from vrpo_plugin.hosts.known import HOSTS, find_spec, host_of_script
from vrpo_plugin.hosts.libraries import libraries_of, verify_libraries
from vrpo_plugin.hosts.metrics import Tracker
from vrpo_plugin.hosts.no_encoder import loader_seams, settle
from vrpo_plugin.hosts.options import CONFIG_KEYS, KEYS, OPTION_KEYS, HostOptions, resolve_settings
from vrpo_plugin.hosts.wrap import model_and_loss
from vrpo_plugin.patching.fingerprint import SourcePoint, inspect_point, verify_points
from vrpo_plugin.patching.handle import Hook, PatchHandle, Seam, active_handles, apply_patch

logger = logging.getLogger("vrpo_plugin")


def apply_vrpo(
    host: str | HostSpec | VRPOConfig | None = None,
    config: VRPOConfig | None = None,
    *,
    options: HostOptions | None = None,
    **overrides: Any,
) -> PatchHandle:
    """Patches the classes of a host in place, before its training loop makes the model.

    Args:
        host: by default that of the calling script, by its folder. Else a name (``repa``, ``repa_t2i``, ``reg``,
            ``irepa``, ``sit``, ``dit``, ``repae``, ``lightningdit``), or a :class:`HostSpec` of your own, also as
            ``file.py:NAME`` or ``module:NAME``. Its modules are imported, so its folder has to be on ``sys.path``, as
            it is for its own scripts. A configuration in its place is ``config``.
        config: the objective; by default from ``VRPO_CONFIG`` and the ``VRPO_<KEY>`` variables.
        options: how it is applied; by default from there too.
        **overrides: fields of either, also where it is given.

    Returns:
        The handle: ``.seams``, ``.hooks``, ``.remove()``, and a context manager. The same settings again give the same
        handle, and so does a call without settings in a script that was launched with VRPO.

    Raises:
        HostNotFoundError: the host's modules, or definitions in them, are not there.
        HostChangedError: they are not those of a verified commit.
        PatchConflictError: VRPO is applied with other settings.
        ConfigError: settings that are wrong, or that the host cannot serve.
    """
    if isinstance(host, VRPOConfig):
        host, config = None, host
    spec = _find(host, sys._getframe(1).f_globals.get("__file__")) if not isinstance(host, HostSpec) else host
    if config is None and options is None and not overrides:
        launched = [one for one in active_handles() if one.name == spec.name and one.launched]
        if launched:
            return launched[0]
    config, options = _settings(config, options, overrides)
    check_settings(spec, config, options)
    idle = changes_nothing(spec, config)
    given, targets = config, None
    if not idle:
        spec, config, targets = settle(spec, config)
    modules = {point.file: _import(spec, point) for point in spec.points}
    root = _root(spec.model, modules[spec.model.file])
    verify_points(root, spec.points, allow_unverified=options.allow_unverified)
    shims = tuple(shim for shim in selected(spec, options) if _can_be_used(root, shim))
    libraries = [*libraries_of(spec, shims)]
    verify_libraries(libraries)

    def seams(handle: PatchHandle) -> Sequence[Seam | Hook]:
        guard = HostGuard()
        limit = options.max_skipped_steps
        tracker = Tracker(options.log_every if spec.log_key is None else 0, guard, limit)
        session = Session(spec, config, options, handle, modules, idle, guard, tracker, targets, shims)
        return [
            *model_and_loss(session),
            *spec.seams(session),
            *loader_seams(session),
            *(seam for shim in shims for seam in shim.seams(session, shim)),
            *(one.seam(session) for one in libraries),
            *([_step_hooks(session)] if limit and not idle else []),
            *(hook for shim in shims for hook in shim.hooks(session, shim)),
        ]

    return apply_patch(spec.name, (given, options), seams)


def _step_hooks(session: Session) -> Hook:
    """Around the step of the optimizer that updates the aligner; every other one steps as it did."""

    def owns(stepping: Optimizer) -> bool:
        first = (group["params"][0] for group in stepping.param_groups if group["params"])
        return any(id(parameter) in session.model_parameters for parameter in first)

    def before(stepping: Optimizer, *_: Any) -> None:
        if owns(stepping):
            if session.options.fused_optimizer:
                make_fused(stepping)
            session.guard.before(stepping)

    def after(stepping: Optimizer, *_: Any) -> None:
        if owns(stepping):
            session.guard.after()

    def add() -> Callable[[], None]:
        first = optimizer.register_optimizer_step_pre_hook(before)
        second = optimizer.register_optimizer_step_post_hook(after)

        def take_away() -> None:
            first.remove()
            second.remove()

        return take_away

    return Hook("torch.optim step hooks", add)


def _settings(
    config: VRPOConfig | None, options: HostOptions | None, overrides: dict[str, Any]
) -> tuple[VRPOConfig, HostOptions]:
    """What is given, and from the environment what is not; single settings go before both."""
    check_keys(overrides, KEYS, subject="VRPO setting")
    objective = {key: value for key, value in overrides.items() if key in CONFIG_KEYS}
    others = {key: value for key, value in overrides.items() if key in OPTION_KEYS}
    if config is not None:
        config, objective = replace(config, **objective), {}
    if options is not None:
        options, others = replace(options, **others), {}
    if config is None or options is None:
        resolved = resolve_settings(objective | others)
        config, options = config or resolved[0], options or resolved[1]
    return config, options


def _find(host: str | None, caller: str | None) -> HostSpec:
    """The host by name, by ``VRPO_HOST``, or of the script that called."""
    name, folder = host or os.environ.get("VRPO_HOST"), None if caller is None else Path(caller).resolve().parent
    if name:
        return find_spec(name, folder)
    if caller is None:
        do = "Name the host: apply_vrpo('repa')."
        raise HostNotFoundError("apply_vrpo()", expected="a call in a host's script", got="no file", do=do)
    return host_of_script(Path(caller))


def _can_be_used(root: Path, shim: Shim) -> bool:
    """Whether what a shim relies on is there; its body may be another."""
    for point in shim.verified:
        finding = inspect_point(root, point)
        if finding.status not in ("known", "changed"):
            got = finding.reason or f"parameters ({', '.join(finding.parameters)})"
            logger.warning("vrpo_plugin compat %s: left out: %s: %s: %s", shim.name, point.file, point.name, got)
            return False
    return True


def _import(spec: HostSpec, point: SourcePoint) -> ModuleType:
    name = point.module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # the host's own dependency is missing: its message says which
        raise HostNotFoundError(
            spec.name,
            expected=f"module {name} of {spec.repository} on sys.path",
            got=f"no module named {error.name!r}",
            do="Call this from the host's own script, or start it with 'python -m vrpo_plugin.launch train.py'.",
        ) from error


def _root(point: SourcePoint, module: ModuleType) -> Path:
    return Path(str(module.__file__)).resolve().parents[point.file.count("/")]


def _named(name: str) -> Callable[..., PatchHandle]:
    """:func:`apply_vrpo` for one host."""

    def apply(config: VRPOConfig | None = None, **settings: Any) -> PatchHandle:
        return apply_vrpo(name, config, **settings)

    apply.__name__ = apply.__qualname__ = f"apply_vrpo_to_{name}"
    apply.__doc__ = f":func:`apply_vrpo` for {HOSTS[name].repository}."
    return apply


apply_vrpo_to_repa = _named("repa")
apply_vrpo_to_repa_t2i = _named("repa_t2i")
apply_vrpo_to_reg = _named("reg")
apply_vrpo_to_irepa = _named("irepa")
apply_vrpo_to_sit = _named("sit")
apply_vrpo_to_dit = _named("dit")
apply_vrpo_to_repae = _named("repae")
apply_vrpo_to_lightningdit = _named("lightningdit")
