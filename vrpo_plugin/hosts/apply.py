"""Applies VRPO to a host whose modules can be imported: verify everything, then replace everything."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from vrpo_plugin.config import VRPOConfig, check_keys
from vrpo_plugin.errors import HostNotFoundError, explain
from vrpo_plugin.hosts.base import HostSpec
from vrpo_plugin.hosts.compat import selected
from vrpo_plugin.hosts.guard import guarded_step
from vrpo_plugin.hosts.known import find_spec
from vrpo_plugin.hosts.options import CONFIG_KEYS, KEYS, OPTION_KEYS, HostOptions, resolve_settings
from vrpo_plugin.hosts.session import Session
from vrpo_plugin.hosts.wrap import wrap_constructor, wrap_forward, wrap_loss
from vrpo_plugin.patching.fingerprint import SourcePoint, verify_points
from vrpo_plugin.patching.handle import PatchHandle, Seam, apply_patch


def apply_vrpo(
    host: str | HostSpec,
    config: VRPOConfig | None = None,
    *,
    options: HostOptions | None = None,
    **overrides: Any,
) -> PatchHandle:
    """Patches the classes of a host in place, before its training loop makes the model.

    Args:
        host: a name (``repa``, ``repa_t2i``, ``reg``, ``irepa``, ``sit``, ``dit``, ``repae``, ``lightningdit``) or a
            :class:`HostSpec` of your own. Its modules are imported, so its folder has to be on ``sys.path``, as it
            is for its own scripts.
        config: the objective; by default from ``VRPO_CONFIG`` and the ``VRPO_<KEY>`` variables.
        options: how it is applied; by default from there too.
        **overrides: fields of either, also where it is given.

    Returns:
        The handle: ``.seams``, ``.remove()``, and a context manager. The same settings again give the same handle.

    Raises:
        HostNotFoundError: the host's modules, or definitions in them, are not there.
        HostChangedError: they are not those of a verified commit.
        PatchConflictError: VRPO is applied with other settings.
        ConfigError: settings that are wrong, or that the host cannot serve.
    """
    spec = find_spec(host) if isinstance(host, str) else host
    config, options = _settings(config, options, overrides)
    modules = {point.file: _import(spec, point) for point in spec.all_points}
    root = _root(spec.model.file, modules[spec.model.file])
    verify_points(root, spec.all_points, allow_unverified=options.allow_unverified)

    def seams(handle: PatchHandle) -> Sequence[Seam]:
        session = Session(spec, config, options, handle, modules)
        return [
            *_seams(session),
            *spec.seams(session),
            *guarded_step(session),
            *(seam for shim in selected(session) for seam in shim),
        ]

    return apply_patch(spec.name, (config, options), seams)


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


def _seams(session: Session) -> list[Seam]:
    spec = session.spec
    model = getattr(session.modules[spec.model.file], spec.model_class)
    label = spec.counted[0]
    found = [
        Seam(model, "__init__", wrap_constructor(session, label), label),
        Seam(model, "forward", wrap_forward(session), spec.model.name),
    ]
    if spec.loss is not None:
        owner, _, method = spec.loss.name.rpartition(".")
        cls = getattr(session.modules[spec.loss.file], owner)
        found.append(Seam(cls, method, wrap_loss(session, spec.loss.name), spec.loss.name))
    return found


def _import(spec: HostSpec, point: SourcePoint) -> ModuleType:
    name = point.file.removesuffix(".py").replace("/", ".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # the host's own dependency is missing: its message says which
        raise HostNotFoundError(
            explain(
                spec.name,
                expected=f"module {name} of {spec.repository} on sys.path",
                got=f"no module named {error.name!r}",
                do="Call this from the host's own script, or start it with 'python -m vrpo_plugin.launch train.py'.",
            )
        ) from error


def _root(file: str, module: ModuleType) -> Path:
    return Path(str(module.__file__)).resolve().parents[file.count("/")]


def apply_vrpo_to_repa(config: VRPOConfig | None = None, **settings: Any) -> PatchHandle:
    """:func:`apply_vrpo` for sihyun-yu/REPA, ``train.py``."""
    return apply_vrpo("repa", config, **settings)


def apply_vrpo_to_repa_t2i(config: VRPOConfig | None = None, **settings: Any) -> PatchHandle:
    """:func:`apply_vrpo` for sihyun-yu/REPA, ``train_t2i.py``."""
    return apply_vrpo("repa_t2i", config, **settings)


def apply_vrpo_to_reg(config: VRPOConfig | None = None, **settings: Any) -> PatchHandle:
    """:func:`apply_vrpo` for Martinser/REG."""
    return apply_vrpo("reg", config, **settings)


def apply_vrpo_to_irepa(config: VRPOConfig | None = None, **settings: Any) -> PatchHandle:
    """:func:`apply_vrpo` for End2End-Diffusion/iREPA, ``ldm/train.py``."""
    return apply_vrpo("irepa", config, **settings)


def apply_vrpo_to_sit(config: VRPOConfig | None = None, **settings: Any) -> PatchHandle:
    """:func:`apply_vrpo` for willisma/SiT."""
    return apply_vrpo("sit", config, **settings)


def apply_vrpo_to_dit(config: VRPOConfig | None = None, **settings: Any) -> PatchHandle:
    """:func:`apply_vrpo` for facebookresearch/DiT."""
    return apply_vrpo("dit", config, **settings)


def apply_vrpo_to_repae(config: VRPOConfig | None = None, **settings: Any) -> PatchHandle:
    """:func:`apply_vrpo` for End2End-Diffusion/REPA-E."""
    return apply_vrpo("repae", config, **settings)


def apply_vrpo_to_lightningdit(config: VRPOConfig | None = None, **settings: Any) -> PatchHandle:
    """:func:`apply_vrpo` for hustvl/LightningDiT."""
    return apply_vrpo("lightningdit", config, **settings)
